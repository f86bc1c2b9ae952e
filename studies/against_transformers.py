"""Time projecta against transformers, mambapy and mamba-ssm's reference on a CPU: the scan, and Mamba models.

`python -m studies.against_transformers [FOLDER]` times them interleaved in one process and writes
against_transformers.csv. The file has one row for each case and implementation: the median time in ms, and
the ratio of this time to projecta's (median, least and most over the rounds). `--mamba-ssm FILE` names
mamba-ssm's selective_scan_interface.py, and adds its `selective_scan_ref`, which needs no GPU.

    scan     b = 1, d = 1536, n = 16, l = 2048, float32, with z, D, bias and softplus: the layer of mamba-130m
    model    24 layers of that width: prefill of 256 tokens, a training step of 32, decoding of 16
"""

import argparse
import ast
import csv
import inspect
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from projecta import selective_scan
from projecta.regress.store.provenance import PACKAGES, facts_here, record_provenance

OURS = "projecta"
Call = Callable[[], object]


def reference_of(file: Path) -> Callable:
    """`selective_scan_ref` of mamba-ssm's source; its module would import the CUDA extensions."""
    import einops

    tree = ast.parse(file.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") == "selective_scan_ref"]
    names = {"torch": torch, "F": torch.nn.functional, "rearrange": einops.rearrange, "repeat": einops.repeat}
    exec(compile(tree, str(file), "exec"), names)
    return names["selective_scan_ref"]


def scan_calls(
    backward: bool, mamba_ssm: Path | None = None, b: int = 1, d: int = 1536, l: int = 2048, n: int = 16
) -> dict[str, Call]:
    """The scan by implementation; the results are compared with projecta's."""
    import transformers.models.mamba.modeling_mamba as modeling

    torch.manual_seed(0)
    u, z, delta = torch.randn(b, d, l), torch.randn(b, d, l), 0.5 * torch.randn(b, d, l)
    A, D, bias = -torch.arange(1.0, n + 1).repeat(d, 1), torch.ones(d), torch.full((d,), -3.0)
    B, C, grad = torch.randn(b, n, l), torch.randn(b, n, l), torch.randn(b, d, l)
    leaves = [t.requires_grad_(backward) for t in (u, delta, A, B, C, D, z, bias)]
    theirs = inspect.unwrap(modeling.mamba_selective_scan)

    def loop(u, delta, A, B, C, D, z, bias, **flags):
        return theirs(u, delta, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True, **flags)

    def parallel(*arguments):
        return loop(*arguments, use_mambapy=True)

    def ours(*arguments):
        return selective_scan(*arguments, True, backend="cpu")

    def call(scan: Callable) -> Call:
        def run() -> torch.Tensor:
            with torch.set_grad_enabled(backward):
                y = scan(*leaves)
                y = y[0] if isinstance(y, tuple) else y
                if backward:
                    torch.autograd.grad(y, leaves, grad)
            return y.detach()

        return run

    calls: dict[str, Call] = {OURS: call(ours)}
    calls["mambapy"] = call(parallel)
    if not backward:  # takes minutes with gradients: the autograd graph holds every step
        calls["transformers"] = call(loop)
    if not backward and mamba_ssm is not None:
        reference = reference_of(mamba_ssm)
        calls["mamba_ssm's selective_scan_ref"] = call(lambda *tensors: reference(*tensors, True))
    truth = calls[OURS]()
    for name, run in calls.items():
        torch.testing.assert_close(
            run(), truth, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    return calls


def model_calls(kind: str) -> dict[str, Call]:
    """A model of mamba-130m's shape, as transformers runs it and after `accelerate`."""
    from benchmarks import mamba

    make, length = {
        "prefill": (mamba._prefill, 256),
        "training step": (mamba._train, 32),
        "decoding": (mamba._decode, 16),
    }[kind]
    return {OURS: make("accelerated", length, 24), "transformers": make("stock", length, 24)}


def compare(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, interleaved; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i:
                found[name].append(time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mamba-ssm", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    cases = {
        "scan, forward": lambda: scan_calls(False, arguments.mamba_ssm),
        "scan, forward + backward": lambda: scan_calls(backward=True),
        **{
            f"model, {kind}": lambda kind=kind: model_calls(kind)
            for kind in ("prefill", "training step", "decoding")
        },
    }
    path = arguments.folder / "against_transformers.csv"
    arguments.folder.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["case", "implementation", "median_ms", "times_as_fast", "least", "most", "rounds"])
        for case, make in cases.items():
            found = compare(make(), arguments.rounds)
            for name, seconds in found.items():
                ratios = [theirs / ours for theirs, ours in zip(seconds, found[OURS], strict=True)]
                numbers = (
                    1e3 * statistics.median(seconds),
                    statistics.median(ratios),
                    min(ratios),
                    max(ratios),
                )
                out.writerow([case, name, *(f"{x:.4g}" for x in numbers), len(seconds)])
                file.flush()
                print(
                    f"{case:26s} {name:13s} {numbers[0]:10.2f} ms, projecta {numbers[1]:.1f} times as fast",
                    flush=True,
                )
    record_provenance([path], "nox -s against", facts_here([*PACKAGES, "mambapy"]))


if __name__ == "__main__":
    main()
