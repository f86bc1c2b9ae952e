"""Helpers for all suites: device, clock, seeds, inputs, checks, peak memory. There is no benchmark here.

Importing this module does not touch the device and starts no thread: asv forks the measuring processes from a
process that has imported the suites. So what all of them need is prepared here, once.
"""

import ast
import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib
import os
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from asv_runner.benchmarks.mark import SkipNotImplemented

with contextlib.suppress(ImportError):
    import numba

    numba.njit("int64(int64)")(lambda x: x)  # numba sets up its types at the first compilation

LENGTHS = (512, 2048, 8192)
PEAK_LENGTHS = (2048, 8192)
LONG_LENGTHS = (2048, 8192, 32768, 65536)
FULL = os.environ.get("PROJECTA_FULL") == "1"
CHECKED = os.environ.get("PROJECTA_CHECKED") == "1"  # the gate's first pair has checked the same results
if CHECKED:  # the first pair notes what each benchmark's own process imports
    for _name in ("conv.cpu", "mamba", "mrss.cpu", "s4d", "scan.cpu", "vtp"):
        with contextlib.suppress(Exception):  # a commit may lack it; who needs it says what is wrong
            importlib.import_module(f"projecta.{_name}")

DEVICE_OF = {"cpu": "cpu", "triton": "cuda"}  # backends that need one device type
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # constants of glibc's malloc.h


class WrongResult(Exception):
    """The result of the timed call differs from the reference."""


class Suite:
    """Attributes of every timing suite.

    Each sample is one call. `repeat` limits the samples of a process: (least, most, seconds).
    One process measures each case. With PROJECTA_FULL=1 two processes do, at different times of the run.
    """

    number = 1
    repeat = (1, 10, 0.5)
    min_run_count = 1
    warmup_time = 0.0  # setup has run the call already
    rounds = 2 if FULL else 1
    unit = "MiB"

    @staticmethod
    def timer() -> float:
        """Wall-clock time, read after the device has finished its queued work."""
        synchronise()
        return timeit.default_timer()


def version(source: str, revision: int = 1) -> str:
    """The version of a suite: asv compares only results of the same version.

    It is a revision number and a hash of the code of the suite and of this module. The hash is computed from
    the syntax tree, so comments and docstrings do not change the version.
    """
    trees = [ast.parse(Path(path).read_text()) for path in (__file__, source)]
    for tree in trees:
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if (
                isinstance(body, list)
                and body
                and isinstance(body[0], ast.Expr)
                and isinstance(body[0].value, ast.Constant)
            ):
                node.body = body[1:]  # type: ignore[attr-defined]
    digest = hashlib.sha256("".join(map(ast.dump, trees)).encode()).hexdigest()[:12]
    return f"{revision}-{digest}"


def skip(reason: str) -> NoReturn:
    """Skip a benchmark. asv shows the reason."""
    raise SkipNotImplemented(reason)


def require(module: str, name: str, formerly: str = "") -> Any:
    """`module.name` from the measured commit; skip if the commit does not have it.

    `formerly` is the module that defined it in older commits.
    """
    for home in filter(None, (module, formerly)):
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(home), name)
    skip(f"this commit has no {module}.{name}")


def require_backend(name: str) -> None:
    """Skip if the commit does not have the backend, or if the backend needs another device type.

    A backend that should run here but cannot is a failure.
    """
    if name not in require("projecta", "available_backends")():
        skip(f"this commit has no backend {name!r}")
    if DEVICE_OF.get(name, device().type) != device().type:
        skip(f"backend {name!r} is not for device type {device().type!r}")


def require_full() -> None:
    """Skip unless PROJECTA_FULL=1: for sizes that need a large machine."""
    if not FULL:
        skip("long; set PROJECTA_FULL=1 to run it")


@functools.cache
def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise() -> None:
    """Wait until the device has finished."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def randn(*shape: int, seed: int) -> torch.Tensor:
    """Standard normal numbers, the same on every machine and device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device())


def scan_inputs(b: int, d: int, l: int, n: int = 16) -> dict[str, torch.Tensor]:
    """Arguments of a Mamba layer's scan as initialised: rates 1...n, steps around softplus(-3)."""
    return {
        "u": randn(b, d, l, seed=0),
        "delta": 0.5 * randn(b, d, l, seed=1),
        "A": -torch.arange(1.0, n + 1, device=device()).repeat(d, 1),
        "B": randn(b, n, l, seed=2),
        "C": randn(b, n, l, seed=3),
        "D": torch.ones(d, device=device()),
        "z": randn(b, d, l, seed=4),
        "delta_bias": torch.full((d,), -3.0, device=device()),
    }


def pick_channels(inputs: dict[str, torch.Tensor], count: int = 4) -> dict[str, torch.Tensor]:
    """Some channels of `scan_inputs`, in float64 on the CPU. Channels do not mix, so a few suffice."""
    rows = channel_rows(inputs["u"].shape[1], count)
    along = {"u": 1, "delta": 1, "z": 1, "A": 0, "D": 0, "delta_bias": 0}
    return {
        name: (t.cpu().index_select(along[name], rows) if name in along else t.cpu()).double()
        for name, t in inputs.items()
    }


def channel_rows(d: int, count: int = 4) -> torch.Tensor:
    """Indices of `count` channels spread over d."""
    return torch.linspace(0, d - 1, count).long()


def check_close(name: str, got: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
    """Raise WrongResult if the largest error exceeds `tolerance` times the largest value."""
    error = (got.double().cpu() - truth.double().cpu()).abs().max() / truth.abs().max().cpu()
    if not error <= tolerance:
        raise WrongResult(f"{name}: error {error:.1e} of the largest value; at most {tolerance:.0e} is right")


def peak_mib(call: Callable[[], object]) -> float:
    """Peak memory of the call above the memory held before it, in MiB; on the GPU if there is one."""
    call()  # one-time loads and caches belong to the floor
    gc.collect()
    if device().type == "cuda":
        synchronise()
        torch.cuda.reset_peak_memory_stats()
        floor = torch.cuda.memory_allocated()
        call()
        synchronise()
        return (torch.cuda.max_memory_allocated() - floor) / 2**20
    if not Path("/proc/self/clear_refs").exists():
        skip("the peak of host memory is read from Linux's /proc")
    _trim_heap()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    floor_kib = _status_kib("VmRSS")
    result = call()
    peak = (_status_kib("VmHWM") - floor_kib) / 1024
    del result
    return max(0.0, peak)


def return_freed_memory() -> None:
    """Make the allocator return freed large blocks at once. For peaks, call it before large allocations.

    Otherwise the measured peak is that of the heap, including free blocks, and not that of live memory.
    """
    _allocate(trim=2**17, mmap=2**17)


def _keep_freed_memory() -> None:
    """Make the allocator reuse freed blocks of up to 32 MiB. Timings need it, so it runs at import.

    Otherwise the heap layout of a process decides if each call gets its tensors in fresh pages. The gradients
    of a scan then take either 2 page faults and 6.7 ms or 2,186 and 9.6 ms, for the life of the process.
    """
    _allocate(trim=2**31 - 1, mmap=2**25)


def _allocate(trim: int, mmap: int) -> None:
    """`trim`: free bytes at which the heap shrinks. `mmap`: size from which blocks are outside the heap."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.mallopt(_M_TRIM_THRESHOLD, trim)
        libc.mallopt(_M_MMAP_THRESHOLD, mmap)


def _trim_heap() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _status_kib(field: str) -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":")
    )
    return int(line.split()[1])


@functools.cache
def photographs(count: int, size: int = 224) -> torch.Tensor:
    """Photographs from scikit-image, (count, 3, size, size), normalised for CLIP."""
    import numpy as np
    import skimage.data
    import skimage.transform

    names = (
        "astronaut",
        "chelsea",
        "coffee",
        "rocket",
        "retina",
        "hubble_deep_field",
        "immunohistochemistry",
        "colorwheel",
    )
    images = []
    for i in range(count):
        image = getattr(skimage.data, names[i % len(names)])()[..., :3]
        side = min(image.shape[:2])
        top, left = ((edge - side) // 2 for edge in image.shape[:2])
        square = image[top : top + side, left : left + side]
        images.append(skimage.transform.resize(square, (size, size), anti_aliasing=True))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = (np.stack(images) - mean) / std
    return torch.from_numpy(pixels).float().permute(0, 3, 1, 2).contiguous().to(device())


_keep_freed_memory()
