"""Tensors as numba kernels take them: flat memory and strides."""

import ctypes
import functools
import sys

import numpy as np
import torch
from torch import Tensor

# the types that kernels read, as numpy names them; `simd` reads those of 16 bits
_KINDS = {
    torch.float32: "f4", torch.float64: "f8", torch.bfloat16: "i2", torch.float16: "u2", torch.int32: "i4",
    torch.int64: "i8", torch.uint8: "u1", torch.bool: "u1",
}  # fmt: skip
_KINDS = {dtype: np.dtype(kind).str for dtype, kind in _KINDS.items()}
NOTHING = {dtype: np.empty(0, kind) for dtype, kind in _KINDS.items()}  # an empty array of each type


class _Memory:
    """A contiguous tensor, to numpy a flat array.

    `Tensor.numpy` would fix the size of the tensor's memory for ever, and FSDP must free that of weights.
    """

    __slots__ = ("__array_interface__", "kept")

    def __init__(self, t: Tensor):
        self.kept, kind = t, _KINDS[t.dtype]
        self.__array_interface__ = {
            "data": (t.data_ptr(), False), "shape": (t.numel(),), "typestr": kind, "version": 3,
        }  # fmt: skip


def flat(t: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor as a flat array; complex numbers as pairs.

    Kernels add offsets to an array's address and ignore its strides. So every array for a kernel comes from
    here, and a tensor that is not contiguous is an error.
    """
    if t.is_complex():
        t = torch.view_as_real(t.detach())
    if not t.is_contiguous():
        raise AssertionError(
            f"a kernel needs contiguous memory; got strides {t.stride()} of {tuple(t.shape)}"
        )
    return np.asarray(_Memory(t)) if t.numel() else NOTHING[t.dtype]


def memory(t: Tensor, reverse: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The memory of a tensor (..., l) as a flat array, and the strides with which kernels address it.

    `reverse`: the array begins at the last step, and the stride of time is negative.
    """
    if reverse and t.numel():
        array, forward = memory(t)
        array = array[(t.shape[-1] - 1) * forward[-1] :]
        forward[-1] = -forward[-1]
        return array, forward
    strides = t.stride()
    if not t.is_contiguous():
        last = sum((size - 1) * stride for size, stride in zip(t.shape, strides, strict=True))
        t = t.detach().as_strided((last + 1 if t.numel() else 0,), (1,))
    return flat(t), np.array(strides)


@functools.lru_cache(64)
def zeros(d: int, dtype: torch.dtype) -> Tensor:
    """d zeros, to be read only."""
    return torch.zeros(d, dtype=dtype, device="cpu")


_LARGE_PAGE, _MADV_HUGEPAGE = 2**21, 14  # Linux


_ALWAYS_FRESH = 2**25  # bytes: glibc's malloc maps larger blocks anew each time


@functools.cache
def _madvise():
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def in_large_pages(*tensors: Tensor | None) -> None:
    """Ask Linux for large pages for tensors that have not been written yet.

    Otherwise a fresh tensor of 50 MB costs 12,000 page faults, as much time as the scan that fills it.
    """
    for t in tensors:
        if t is not None and t.numel() * t.element_size() >= _ALWAYS_FRESH and _madvise() is not None:
            start = round_up(t.data_ptr(), _LARGE_PAGE)
            size = t.data_ptr() + t.untyped_storage().nbytes() - start
            _madvise()(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_HUGEPAGE)  # advice: may fail


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
