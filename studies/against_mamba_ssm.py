"""The selective scan of mamba-ssm (its CUDA kernel) and projecta's Triton backend, side by side on one GPU.

`python -m studies.against_mamba_ssm CSRC [FOLDER]` builds mamba-ssm's kernel (nvcc, 1 to 3 minutes), checks
projecta's output against it, and times both: a median over replays of a CUDA graph (kernel time) and over
eager calls. It writes against_mamba_ssm.csv, one row for each dtype and shape, and prints geometric means.
CSRC is the folder csrc/selective_scan of mamba-ssm's sources, which `nox -s against -- --gpu` fetches.
"""

import argparse
import csv
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from projecta import selective_scan
from projecta.regress.store.provenance import record_provenance

SHAPES = (  # b, d, l
    (1, 1536, 512), (1, 1536, 2048), (1, 1536, 16384), (1, 1536, 65536), (8, 1536, 512), (8, 1536, 2048),
    (8, 1536, 8192), (32, 1536, 2048), (64, 1536, 256), (1, 5120, 2048), (8, 5120, 2048), (4, 1024, 1000),
)  # fmt: skip
STATES = 16
TOLERANCE = {torch.float16: 3e-2, torch.bfloat16: 6e-2, torch.float32: 3e-3}  # as in mamba-ssm's tests
PASSES = ("forward", "both")  # both: forward + backward


def build_kernel(csrc: Path, name: str = "selective_scan_cuda") -> Any:
    """An extension of mamba-ssm or causal-conv1d, compiled for this machine's GPU."""
    from torch.utils.cpp_extension import load

    major, minor = torch.cuda.get_device_capability()
    os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count()))
    undefine = [
        f"-U__CUDA_NO_{name}__"
        for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_OPERATORS", "BFLOAT16_CONVERSIONS")
    ]
    flags = ["-O3", "-std=c++17", "--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda"]
    sources = sorted(str(path) for end in ("cpp", "cu") for path in csrc.glob(f"*.{end}"))
    return load(name, sources, extra_include_paths=[str(csrc)], extra_cuda_cflags=flags + undefine)


def median_ms(call: Callable[[], object], repeats: int = 30) -> float:
    """The median time of a call on the GPU."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def captured(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """The replay of a call's CUDA graph, and the call's result, which each replay overwrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


def kernel_and_eager_ms(call: Callable[[], object]) -> tuple[float, float]:
    """Median times of a call: by replay of its CUDA graph, and eagerly."""
    replay, kept = captured(call)
    replay()
    torch.cuda.synchronize()
    times = median_ms(replay), median_ms(call)
    del kept
    return times


def peak_mib(call: Callable[[], object]) -> float:
    """Peak memory of a call above the memory held before it."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    floor = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - floor) / 2**20


def measure(cuda: Any, dtype: torch.dtype, b: int, d: int, l: int) -> dict[str, Any]:
    """One row of the table."""
    draw = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype, generator=draw)

    u, z, delta, grad = randn(b, d, l), randn(b, d, l), 0.5 * randn(b, d, l), randn(b, d, l)
    B, C = randn(b, 1, STATES, l), randn(b, 1, STATES, l)
    A = -torch.arange(1.0, STATES + 1, device="cuda").repeat(d, 1)
    D, bias = torch.ones(d, device="cuda"), torch.full((d,), -3.0, device="cuda")

    def their_forward():
        return cuda.fwd(u, delta, A, B, C, D, z, bias, True)

    def their_both():
        out, x, _ = their_forward()
        return cuda.bwd(u, delta, A, B, C, D, z, bias, grad, x, out, None, True, False)

    leaves = [t.detach().requires_grad_() for t in (u, delta, A, B, C, D, z, bias)]

    def our_forward():
        with torch.no_grad():
            return selective_scan(u, delta, A, B, C, D, z, bias, True, backend="triton")

    def our_both():
        return torch.autograd.grad(selective_scan(*leaves, True, backend="triton"), leaves, grad)

    ours, theirs = our_forward().float(), their_forward()[2].float()
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not error <= TOLERANCE[dtype]:
        raise AssertionError(f"{dtype} {b} {d} {l}: outputs differ by {error:.1e} of the largest value")
    row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "b": b, "d": d, "l": l}
    for name, their_call, our_call in zip(
        PASSES, (their_forward, their_both), (our_forward, our_both), strict=True
    ):
        row[f"mamba_ssm_{name}_ms"], row[f"mamba_ssm_{name}_eager_ms"] = kernel_and_eager_ms(their_call)
        row[f"projecta_{name}_ms"], row[f"projecta_{name}_eager_ms"] = kernel_and_eager_ms(our_call)
        row[f"{name}_times_as_fast"] = row[f"mamba_ssm_{name}_ms"] / row[f"projecta_{name}_ms"]
        row[f"{name}_memory_ratio"] = peak_mib(our_call) / peak_mib(their_call)
    return row | {"difference": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("csrc", type=Path)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    cuda = build_kernel(arguments.csrc)
    arguments.folder.mkdir(exist_ok=True)
    path, rows = arguments.folder / "against_mamba_ssm.csv", []
    for dtype in TOLERANCE:
        for b, d, l in SHAPES:
            rows.append(measure(cuda, dtype, b, d, l))
            row = {name: f"{x:.4g}" if isinstance(x, float) else x for name, x in rows[-1].items()}
            print(*row.values(), flush=True)
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]))
        out.writeheader()
        out.writerows(
            {name: f"{x:.4g}" if isinstance(x, float) else x for name, x in row.items()} for row in rows
        )
    for name in PASSES:
        for dtype in (*TOLERANCE, None):
            own = [row for row in rows if dtype is None or row["dtype"] == str(dtype).removeprefix("torch.")]
            for kind in ("times_as_fast", "memory_ratio"):
                ratios = [row[f"{name}_{kind}"] for row in own]
                mean = math.exp(statistics.mean(map(math.log, ratios)))
                least, most = min(ratios), max(ratios)
                print(
                    f"{name} {kind} {dtype or 'all'}: mean {mean:.2f} (geometric), {least:.2f} to {most:.2f}"
                )
    record_provenance([path], "nox -s against -- --gpu")


if __name__ == "__main__":
    main()
