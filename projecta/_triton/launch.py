"""Launches Triton kernels: compiled once for calls that differ in values only, then started directly."""

import functools
import inspect
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
from torch import Tensor

# Sizes and strides: the compiled code is the same for all values (see `start_kernel`).
SIZES = [
    "d", "l", "n", "per_group", "tiles", "slabs", "chunk", "groups", "over", "count", "processors", "parts",
    "blocks",
    *(f"{t}{a}" for t in ("u", "s", "z", "y", "g", "du", "ds", "dz", "dx", "B", "C", "x") for a in "bdl"),
    "Bg", "Bn", "Cg", "Cn", "per_B", "per_C",
]  # fmt: skip


def cannot_run() -> str:
    """Why Triton kernels cannot run here; "" when they can."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if torch.version.hip:
        return "the kernels contain instructions of NVIDIA's"
    return "" if torch.cuda.is_available() else "there is no CUDA device"


def kernel(function):
    return triton.jit(
        function, do_not_specialize=[name for name in SIZES if name in inspect.signature(function).parameters]
    )


# Tensors that kernels take with strides; all other tensors are contiguous.
_STRIDED = {
    "u", "delta", "z", "y", "x", "dt", "B", "C", "grad_y", "du", "ddelta", "dz", "gated", "dB", "dC", "dx",
    "state",
}  # fmt: skip

_known: dict[tuple, Any] = {}


def cached(make: Callable, tensors: Iterable[Tensor | None], *others) -> Any:
    """The cached result of `make()` for tensors that differ from these in values only."""
    key = (
        *others, *(None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16) for t in tensors)
    )  # fmt: skip
    found = _known.get(key)
    if found is None:
        if len(_known) >= 4096:  # many lengths must not fill the memory
            _known.clear()
        found = _known[key] = make()
    return found


def start_kernel(
    launches: dict, kernel, tensors: dict[str, Tensor | None], describe: Callable, name: str = ""
) -> None:
    """Launch a kernel. Its arguments are `tensors`, in its order, then numbers, then constants.

    The first launch calls `describe` for the grid, numbers by name, and constants and options by name. Later
    launches go straight to the compiled kernel. Triton's launcher would inspect every argument each time.
    """
    known = launches.get(name or kernel)
    if known is None:
        if list(tensors) != kernel.arg_names[: len(tensors)]:
            raise AssertionError(f"{kernel} takes {kernel.arg_names} in this order; got {list(tensors)}")
        for argument, t in tensors.items():
            if t is not None and argument not in _STRIDED and not t.is_contiguous():
                raise AssertionError(f"{argument} must be contiguous; got strides {t.stride()} of {t.shape}")
        grid, sizes, options = describe()
        built = kernel[grid](**tensors, **sizes, **options)
        if built is not None:  # the interpreter builds nothing
            given = sizes | options
            rest = tuple(given[argument] for argument in kernel.arg_names[len(tensors) :])
            launches[name or kernel] = built[(*grid, 1, 1)[:3]], rest
    else:
        run, rest = known
        # for a tensor, the launcher would also ask the driver whether it is on the GPU
        run(*(None if t is None else t.data_ptr() for t in tensors.values()), *rest)


def new_buffer(like: Tensor, size: int) -> Tensor:
    return like.new_empty(size, dtype=torch.float32)


def as_float32(t: Tensor | None) -> Tensor | None:
    """`t` as contiguous float32; no copy if it is already."""
    return None if t is None else t.to(torch.float32).contiguous()


@functools.cache
def processors_of(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def strides_of(**tensors: Tensor | None) -> dict[str, int]:
    """Strides as kernels name them: `sb`, `sd`, `sl` of an array s (b, d, l)."""
    return {
        name + axis: 0 if t is None else t.stride(i)
        for name, t in tensors.items()
        for i, axis in enumerate("bdl")
    }
