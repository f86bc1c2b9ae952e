"""The Mamba block of mamba-ssm (fused, CUDA convolution) beside projecta's `MambaBlock`, on one GPU.

`python -m studies.block SCAN_CSRC CONV_CSRC [FOLDER]` builds the kernels of mamba-ssm and causal-conv1d,
gives both blocks the same weights, compares their outputs, and times replays of a CUDA graph and eager calls.
It writes block.csv, one row for each dtype and shape, and block_profile.csv, the time of each of our kernels.
The Python packages mamba_ssm (with an empty __init__.py, so that Mamba-2 is not imported), causal_conv1d and
einops must be importable: `nox -s against -- --gpu` sees to all of it.
"""

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from projecta import MambaBlock
from projecta.regress.store.provenance import record_provenance
from studies.against_mamba_ssm import build_kernel, kernel_and_eager_ms, peak_mib

SHAPES = ((768, 1, 512), (768, 8, 2048), (2560, 1, 2048), (2560, 8, 512), (768, 64, 256))  # d_model, b, l
STEPS = ((768, 1), (2560, 1), (2560, 64))  # d_model, b
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-3}  # as in mamba-ssm's tests
Row = dict[str, Any]


def twin_blocks(theirs: type, width: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """mamba-ssm's block and ours, with the same weights."""
    torch.manual_seed(0)
    block = theirs(width, layer_idx=0, device="cuda", dtype=dtype)
    ours = MambaBlock(width, device="cuda", dtype=dtype)
    ours.load_state_dict(block.state_dict())
    return block, ours


def measure_sequence(theirs: type, dtype: torch.dtype, width: int, b: int, l: int) -> Row:
    blocks = dict(zip(("mamba_ssm", "projecta"), twin_blocks(theirs, width, dtype), strict=True))
    x = torch.randn(b, l, width, device="cuda", dtype=dtype)
    grad = torch.randn_like(x)
    with torch.no_grad():
        truth, got = (block(x).float() for block in blocks.values())
    difference = ((got - truth).abs().max() / truth.abs().max()).item()
    if not difference <= TOLERANCE[dtype]:
        raise AssertionError(
            f"{dtype} {width} {b} {l}: outputs differ by {difference:.1e} of the largest value"
        )
    row: Row = {"dtype": str(dtype).removeprefix("torch."), "d_model": width, "b": b, "l": l}
    for name, block in blocks.items():
        leaf = x.clone().requires_grad_()
        leaves = [leaf, *block.parameters()]

        def forward(block: Any = block) -> torch.Tensor:
            with torch.no_grad():
                return block(x)

        def both(block: Any = block, leaf: Any = leaf, leaves: Any = leaves) -> Sequence[torch.Tensor]:
            return torch.autograd.grad(block(leaf), leaves, grad)

        for kind, call in (("forward", forward), ("both", both)):
            row[f"{name}_{kind}_ms"], row[f"{name}_{kind}_eager_ms"] = kernel_and_eager_ms(call)
        row[f"{name}_both_mib"] = peak_mib(both)
    return row | {"difference": difference}


def measure_step(theirs: type, dtype: torch.dtype, width: int, b: int) -> Row:
    block, ours = twin_blocks(theirs, width, dtype)
    x = torch.randn(b, 1, width, device="cuda", dtype=dtype)
    conv, ssm = block.allocate_inference_cache(b, 1)
    state = ours.initial_state(b)
    row: Row = {"dtype": str(dtype).removeprefix("torch."), "d_model": width, "b": b, "l": 1}
    with torch.inference_mode():
        for name, call in (
            ("mamba_ssm", lambda: block.step(x, conv, ssm)), ("projecta", lambda: ours.step(x[:, 0], state)),
        ):  # fmt: skip
            row[f"{name}_step_ms"], row[f"{name}_step_eager_ms"] = kernel_and_eager_ms(call)
    return row


def profile_block(width: int, b: int, l: int, kind: str) -> list[Row]:
    """The kernels of one pass in bfloat16, in their order: mean times of three runs."""
    block = MambaBlock(width, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(b, l, width, device="cuda", dtype=torch.bfloat16, requires_grad=kind == "both")
    state = block.initial_state(b)

    def run() -> object:
        if kind == "both":
            return torch.autograd.grad(block(x), [x, *block.parameters()], torch.ones_like(x))
        with torch.inference_mode():
            return block.step(x[:, 0], state) if kind == "step" else block(x)

    for _ in range(3):
        run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    each = len(events) // 3
    return [
        {
            "d_model": width, "b": b, "l": l, "pass": kind, "kernel": events[i].name[:60],
            "us": statistics.mean(events[i + j * each].device_time for j in range(3)),
        }
        for i in range(each)
    ]  # fmt: skip


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, names, restval="")
        out.writeheader()
        for row in rows:
            out.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def print_means(rows: Sequence[Row]) -> None:
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for key in dict.fromkeys(k.removeprefix("projecta_") for row in rows for k in row if "projecta" in k):
            ratios = [
                row[f"mamba_ssm_{key}"] / row[f"projecta_{key}"]
                for row in rows
                if row["dtype"] == dtype and f"projecta_{key}" in row
            ]
            mean = math.exp(statistics.mean(map(math.log, ratios)))
            print(f"{dtype} {key}: mamba-ssm / projecta {mean:.2f} (geometric mean), least {min(ratios):.2f}")


def build_kernels(scan_csrc: Path, conv_csrc: Path) -> None:
    """Compile mamba-ssm's extensions beside each other, and refuse to measure it without its fast path."""
    sources = {"selective_scan_cuda": scan_csrc, "causal_conv1d_cuda": conv_csrc}
    with ThreadPoolExecutor(2) as pool:
        sys.modules.update(zip(sources, pool.map(build_kernel, sources.values(), sources), strict=True))
    from mamba_ssm.modules import mamba_simple

    if mamba_simple.causal_conv1d_fn is None or mamba_simple.selective_state_update is None:
        raise RuntimeError("mamba-ssm would run without its fast path: causal_conv1d or triton is missing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scan_csrc", type=Path)
    parser.add_argument("conv_csrc", type=Path)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    build_kernels(arguments.scan_csrc, arguments.conv_csrc)
    from mamba_ssm.modules.mamba_simple import Mamba

    arguments.folder.mkdir(exist_ok=True)
    rows: list[Row] = []
    cases: list[tuple[Callable, tuple]] = [
        *((measure_sequence, (dtype, *shape)) for dtype in TOLERANCE for shape in SHAPES),
        *((measure_step, (dtype, *shape)) for dtype in TOLERANCE for shape in STEPS),
    ]
    for measure, case in cases:
        rows.append(measure(Mamba, *case))
        print({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    profiles = [
        row for shape in SHAPES[:3] for kind in ("forward", "both") for row in profile_block(*shape, kind)
    ]
    profiles += [row for width, b in STEPS for row in profile_block(width, b, 1, "step")]
    paths = [arguments.folder / "block.csv", arguments.folder / "block_profile.csv"]
    for path, found in zip(paths, (rows, profiles), strict=True):
        write_rows(path, found)
    print_means(rows)
    record_provenance(paths, "nox -s against -- --gpu")


if __name__ == "__main__":
    main()
