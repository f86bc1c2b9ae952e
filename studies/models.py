"""`MambaLMHeadModel` of mamba-ssm beside transformers' `MambaForCausalLM` under `accelerate`, on a GPU.

`python -m studies.models SCAN_CSRC CONV_CSRC [FOLDER]` gives both the same weights (bfloat16), compares
their logits, and times a training step, prefill and decoding. It writes models.csv, a row for each.
mamba-ssm runs its fused path, and its own CUDA graph for decoding, as in its `generate(cg=True)`; projecta's
decoding is captured as docs/gpu.md shows. `nox -s against -- --gpu` installs what is needed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

from projecta import accelerate
from projecta.regress.store.provenance import record_provenance
from studies.against_mamba_ssm import captured, median_ms, peak_mib
from studies.block import Row, build_kernels, write_rows

MODELS = {"130m": (768, 24), "2.8b": (2560, 64)}  # d_model, layers
VOCABULARY = 50_280
PREFILL = (1, 1024)  # b, l
TRAINING = {"130m": (8, 2048), "2.8b": (1, 2048)}
DECODED = (1, 64)  # batch sizes
NEW_TOKENS = 64  # of `generate`
TOLERANCE = 5e-2  # of the largest logit, in bfloat16


def twin_models(width: int, layers: int) -> tuple[Any, Any]:
    """mamba-ssm's model and ours, with the same weights."""
    from mamba_ssm.models.config_mamba import MambaConfig as TheirConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    torch.manual_seed(0)
    shape = {"d_model": width, "n_layer": layers, "vocab_size": VOCABULARY}
    theirs = MambaLMHeadModel(TheirConfig(**shape), device="cuda", dtype=torch.bfloat16)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers)
    with torch.device("meta"):
        ours = MambaForCausalLM(config)
    weights = {
        name.replace("embedding.", "embeddings."): t.clone()
        for name, t in theirs.state_dict().items()
        if name != "lm_head.weight"
    }
    ours.load_state_dict(weights, strict=False, assign=True)
    ours.tie_weights()
    return theirs, ours.cuda()


def compare_logits(theirs: Any, ours: Any, ids: Tensor) -> float:
    with torch.no_grad():
        truth, got = (model(ids).logits.float() for model in (theirs, ours))
    difference = ((got - truth).abs().max() / truth.abs().max()).item()
    if not difference <= TOLERANCE:
        raise AssertionError(f"logits differ by {difference:.1e} of the largest")
    return difference


def measure_training(models: dict[str, Any], b: int, l: int) -> Row:
    ids = torch.randint(VOCABULARY, (b, l + 1), device="cuda")
    row: Row = {"b": b, "l": l}
    for name, model in models.items():
        options = {"use_cache": False} if name == "projecta" else {}

        def step(model: Any = model, options: dict = options) -> None:
            logits = model(ids[:, :-1], **options).logits.float()
            F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            model.zero_grad(set_to_none=True)

        row[f"{name}_mib"] = peak_mib(step)
        row[f"{name}_eager_ms"] = median_ms(step, 8)
    return row


@torch.inference_mode()
def measure_prefill(models: dict[str, Any], b: int, l: int) -> Row:
    ids = torch.randint(VOCABULARY, (b, l), device="cuda")
    row: Row = {"b": b, "l": l}
    for name, model in models.items():
        options = {"logits_to_keep": 1, "use_cache": False} if name == "projecta" else {"num_last_tokens": 1}

        def prefill(model: Any = model, options: dict = options) -> Tensor:
            return model(ids, **options).logits

        prefill()
        row[f"{name}_eager_ms"] = median_ms(prefill, 20)
        replay, kept = captured(prefill)
        row[f"{name}_ms"] = median_ms(replay, 20)
        del replay, kept
    return row


@torch.inference_mode()
def measure_decoding(models: dict[str, Any], b: int) -> Row:
    from mamba_ssm.utils.generation import update_graph_cache

    theirs, ours = models["mamba_ssm"], models["projecta"]
    ids = torch.randint(VOCABULARY, (b, 16), device="cuda")
    token = ids[:, :1].clone()
    row: Row = {"b": b, "l": 1}
    cache = update_graph_cache(theirs, None, b, 16, 32)
    position = torch.zeros_like(token)
    row["mamba_ssm_ms"] = median_ms(lambda: cache.run(token, position, 16), 50)
    state = ours(ids, use_cache=True).cache_params

    def decode() -> Tensor:
        return ours(token, cache_params=state, use_cache=True).logits

    row["projecta_eager_ms"] = median_ms(decode, 20)
    replay, _ = captured(decode)
    row["projecta_ms"] = median_ms(replay, 50)
    return row


def measure_generate(models: dict[str, Any], b: int) -> Row:
    """Milliseconds for each new token of `generate`, greedy, prompt of 16 tokens."""
    ids = torch.randint(VOCABULARY, (b, 16), device="cuda")
    length = 16 + NEW_TOKENS
    options = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    options["attention_mask"] = torch.ones_like(ids)
    calls = {
        "mamba_ssm": lambda: models["mamba_ssm"].generate(ids, length, cg=True),
        "projecta_eager": lambda: models["projecta"].generate(ids, **options),
        "projecta": lambda: models["projecta"].generate(ids, cache_implementation="static", **options),
    }
    row: Row = {"b": b, "l": NEW_TOKENS}
    for name, call in calls.items():
        times = []
        for _ in range(4):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1e3 / NEW_TOKENS)
        row[f"{name}_ms"] = statistics.median(times[1:])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scan_csrc", type=Path)
    parser.add_argument("conv_csrc", type=Path)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    build_kernels(arguments.scan_csrc, arguments.conv_csrc)
    arguments.folder.mkdir(exist_ok=True)
    rows: list[Row] = []
    for size, shape in MODELS.items():
        theirs, ours = twin_models(*shape)
        models = {"mamba_ssm": theirs, "projecta": ours}
        with accelerate(ours):
            ids = torch.randint(VOCABULARY, (2, 64), device="cuda")
            difference = compare_logits(theirs, ours, ids)
            cases: list[tuple[str, Callable[..., Row], tuple]] = [
                ("prefill", measure_prefill, PREFILL),
                *(("decoding", measure_decoding, (b,)) for b in DECODED),
                *(("generate", measure_generate, (b,)) for b in DECODED[:1]),
                ("training", measure_training, TRAINING[size]),
            ]
            for kind, measure, case in cases:
                found = {"model": size, "pass": kind} | measure(models, *case) | {"difference": difference}
                rows.append(found)
                ratio = {
                    key: f"{found['mamba_ssm' + key] / found['projecta' + key]:.2f}"
                    for key in ("_ms", "_eager_ms", "_mib")
                    if "mamba_ssm" + key in found
                }
                print(*found.values(), "mamba-ssm / projecta:", ratio, flush=True)
        del theirs, ours, models
        torch.cuda.empty_cache()
    path = arguments.folder / "models.csv"
    write_rows(path, rows)
    record_provenance([path], "nox -s against -- --gpu")


if __name__ == "__main__":
    main()
