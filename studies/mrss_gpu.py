"""MRSS beside the full scan on a GPU: time of a forward pass and of both passes, and peak memory, by bands.

`python -m studies.mrss_gpu [FOLDER]` times all bands in one run, eagerly and by replay of a CUDA graph, and
writes FOLDER/mrss_gpu.csv. "half at 1 alone" is the full scan of half of the channels: what the bands with
half at 1 cannot go below.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from projecta import mrss_scan, selective_scan
from projecta.regress.store.provenance import record_provenance
from studies.against_mamba_ssm import kernel_and_eager_ms, peak_mib
from studies.block import write_rows

BANDS = {
    "half per 8": ((0.5, 1), (0.5, 8)),
    "half per 4": ((0.5, 1), (0.5, 4)),
    "five eighths per 8": ((0.375, 1), (0.625, 8)),
    "three quarters per 8": ((0.25, 1), (0.75, 8)),
}
WIDTH, STATES = 1536, 16
CASES = [  # dtype, batch, length, which axis is last in memory
    (torch.float16, 8, 2048, "time"),
    (torch.float16, 8, 2048, "channels"),
    (torch.float16, 32, 2048, "time"),
    (torch.float16, 8, 8192, "time"),
    (torch.float32, 8, 2048, "time"),
]
ALONG = ("u", "delta", "z")
Arguments = dict[str, torch.Tensor]


def inputs(dtype: torch.dtype, b: int, d: int, l: int, last: str) -> Arguments:
    draw = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=draw).to(dtype)

    found = {"u": randn(b, d, l), "delta": 0.5 * randn(b, d, l), "z": randn(b, d, l)}
    if last == "channels":
        found = {name: t.mT.contiguous().mT for name, t in found.items()}
    A = -torch.arange(1.0, STATES + 1, device="cuda").repeat(d, 1)
    found |= {"A": A, "B": randn(b, STATES, l), "C": randn(b, STATES, l)}
    return found | {
        "D": torch.ones(d, device="cuda"), "delta_bias": torch.full((d,), -3.0, device="cuda")
    }  # fmt: skip


def half(given: Arguments) -> Arguments:
    """The first half of the channels, as views."""
    cut = {name: t[:, : WIDTH // 2] if name in ALONG else t[: WIDTH // 2] for name, t in given.items()}
    return cut | {"B": given["B"], "C": given["C"]}


def outputs(scan: Callable[..., torch.Tensor], given: Arguments) -> list[torch.Tensor]:
    """y and every gradient."""
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    y = scan(**leaves, delta_softplus=True)
    grad = torch.cos(torch.arange(y.numel(), device="cuda", dtype=torch.float64)).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, list(leaves.values()), grad)]


def check(last: str) -> float:
    """The largest error in float32 against torch's operators in float64, over the largest value."""
    given, worst = inputs(torch.float32, 2, 64, 509, last), 0.0
    wide = {name: t.double() for name, t in given.items()}
    for bands in BANDS.values():
        truth = outputs(partial(mrss_scan, bands=bands, backend="vectorised"), wide)
        for got, wanted in zip(outputs(partial(mrss_scan, bands=bands), given), truth, strict=True):
            worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max()))
    return worst


def calls(scan: Callable[..., torch.Tensor], given: Arguments) -> dict[str, Callable[[], object]]:
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    grad = torch.randn_like(given["u"])

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return scan(**given, delta_softplus=True)

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(scan(**leaves, delta_softplus=True), list(leaves.values()), grad)

    return {"forward": forward, "forward+backward": both}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"))
    folder = parser.parse_args().folder
    folder.mkdir(exist_ok=True)
    for last in ("time", "channels"):
        error = check(last)
        print(f"{last} last in memory: error {error:.1e}", flush=True)
        if not error <= 1e-4:
            raise AssertionError(f"MRSS differs from torch's operators by {error:.1e} of the largest value")
    rows: list[dict[str, Any]] = []
    for dtype, b, l, last in CASES:
        given = inputs(dtype, b, WIDTH, l, last)
        scans = {"full scan": (selective_scan, given), "half at 1 alone": (selective_scan, half(given))}
        scans |= {name: (partial(mrss_scan, bands=bands), given) for name, bands in BANDS.items()}
        for name, (scan, tensors) in scans.items():
            for way, call in calls(scan, tensors).items():
                row: dict[str, Any] = {
                    "dtype": str(dtype).removeprefix("torch."), "batch": b, "length": l, "last": last,
                    "scan": name, "pass": way,
                }  # fmt: skip
                row["graph_ms"], row["eager_ms"] = kernel_and_eager_ms(call)
                row["peak_mib"] = peak_mib(call)
                rows.append(row)
                print(*(f"{v:.4g}" if isinstance(v, float) else v for v in row.values()), flush=True)
    path = folder / "mrss_gpu.csv"
    write_rows(path, rows)
    record_provenance([path], "python -m studies.mrss_gpu")


if __name__ == "__main__":
    main()
