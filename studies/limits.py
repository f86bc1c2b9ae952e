"""How near `accelerate` on a CPU comes to the machine's limits: prefill, training step and decoding.

`python -m studies.limits [FOLDER]` measures the rate of a matrix product (of in_proj's shape) and of reading
memory (a product of a large matrix and a vector), then a model of the mamba-130m shape in float32, in turns.
The limit of prefill and training is the time of their matrix products at that rate; the limit of decoding is
the time to read all weights once. It writes model_limits.csv.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import MambaConfig, MambaForCausalLM

from projecta import accelerate
from projecta.regress.store.provenance import record_provenance

WIDTH, LAYERS, VOCABULARY = 768, 24, 50_280
INNER, STATES, RANK = 2 * WIDTH, 16, WIDTH // 16
PREFILL, TRAINING = 1024, 512  # tokens
ROUNDS = 7


def products(tokens: int, heads: int) -> float:
    """Floating-point operations of the matrix products for so many tokens, `heads` of them with logits."""
    layer = 2 * WIDTH * INNER + INNER * (RANK + 2 * STATES) + RANK * INNER + INNER * WIDTH
    return 2.0 * tokens * LAYERS * layer + 2.0 * heads * WIDTH * VOCABULARY


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS)
    ).eval()
    ids = torch.randint(VOCABULARY, (1, PREFILL))
    x, weight = torch.randn(PREFILL, WIDTH), torch.randn(2 * INNER, WIDTH)
    large, vector = torch.randn(1 << 14, 1 << 13), torch.randn(1 << 13)  # 512 MiB
    size = sum(t.numel() * t.element_size() for t in model.parameters())
    with torch.no_grad(), accelerate(model):
        cache = model(ids[:, :8], use_cache=True).cache_params

    @torch.no_grad()
    def prefill() -> None:
        model(ids, logits_to_keep=1, use_cache=False)

    @torch.no_grad()
    def decode() -> None:
        model(ids[:, :1], cache_params=cache, use_cache=True)

    def train() -> None:
        logits = model(ids[:, :TRAINING], use_cache=False).logits[0, :-1]
        F.cross_entropy(logits, ids[0, 1:TRAINING]).backward()
        model.zero_grad(set_to_none=True)

    calls = {
        "product": lambda: F.linear(x, weight),
        "read": lambda: torch.mv(large, vector),
        "prefill": prefill,
        "training step": train,
        "decoding": decode,
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    with accelerate(model):
        for turn in range(ROUNDS + 1):
            for name, call in calls.items():
                taken = seconds(call)
                if turn:  # the first compiles
                    times[name].append(taken)
    found = {name: statistics.median(taken) for name, taken in times.items()}
    rate = 2 * x.numel() * len(weight) / found["product"]
    bandwidth = large.numel() * 4 / found["read"]
    # backward: two products for each of forward
    limits = {
        "prefill": (PREFILL, products(PREFILL, 1) / rate),
        "training step": (TRAINING, 3 * products(TRAINING, TRAINING) / rate),
        "decoding": (1, size / bandwidth),
    }
    path = arguments.folder / "model_limits.csv"
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["pass", "tokens", "limit_ms", "median_ms", "share", "bound", "gflop_s", "gib_s"])
        for name, (tokens, limit) in limits.items():
            bound = "memory" if name == "decoding" else "matrix products"
            share = limit / found[name]
            row = [name, tokens, f"{limit * 1e3:.4g}", f"{found[name] * 1e3:.4g}", f"{share:.3f}", bound]
            out.writerow([*row, f"{rate / 1e9:.4g}", f"{bandwidth / 2**30:.4g}"])
            print(f"{name}: {found[name] * 1e3:.4g} ms, {share:.0%} of the limit by {bound}")
    record_provenance([path], "nox -s against")


if __name__ == "__main__":
    main()
