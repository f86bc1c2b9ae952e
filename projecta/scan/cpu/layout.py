"""The vector layout of a call's channels, states and sequences, for the kernels of `cpu`.

If there are too few blocks and sequences for the machine's processors, a long sequence is cut into pieces of
time, which are parallel work too. The cut depends on the shape and the machine, not on the number of threads
in use. So results do not depend on it either.
"""

import functools
import os
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from projecta._cpu.memory import NOTHING, round_up, zeros
from projecta._cpu.simd import BYTES, array_at
from projecta._cpu.threads import inner, run
from projecta.scan._operator import Inputs
from projecta.scan.cpu.tiles import TILE
from projecta.scan.cpu.weights import pack, unpack

CHUNK = 16  # steps between saved states
UNROLL = 4  # rows of states that one loop over time advances
SUPERBLOCK = 8  # blocks that share their sums of dB and dC
PIECE = 8192  # minimum steps of a piece
CORES = os.cpu_count() or 1


class Work(NamedTuple):
    """The work items of a kernel."""

    sizes: np.ndarray
    sequences: np.ndarray  # the row of each sequence
    bounds: np.ndarray  # first and last step of each sequence
    chunks: np.ndarray  # index of the first saved chunk of each sequence
    softplus: bool
    has_z: bool


class Kinds(NamedTuple):
    """Empty arrays of the types of tensors: u, delta, z, y or its gradient, and the states and sums."""

    u: np.ndarray
    delta: np.ndarray
    z: np.ndarray
    y: np.ndarray
    real: np.ndarray


class Steps(NamedTuple):
    """Tensors (b, d, l) as flat memory and strides; y is the output, or its gradient."""

    u: np.ndarray
    u_strides: np.ndarray
    delta: np.ndarray
    delta_strides: np.ndarray
    z: np.ndarray
    z_strides: np.ndarray
    y: np.ndarray
    y_strides: np.ndarray


class Weights(NamedTuple):
    """Flat memory in the type of the state; B and C in the layout of `weights`."""

    A: Any
    B: Any
    C: Any
    D: Any
    bias: Any


@inner
def steps_at(places, kinds):
    """The arrays of u, delta, z and y: each takes four of `places`, its address and its strides."""
    return Steps(
        array_at(places[0], 1, kinds.u), places[1:4], array_at(places[4], 1, kinds.delta), places[5:8],
        array_at(places[8], 1, kinds.z), places[9:12], array_at(places[12], 1, kinds.y), places[13:16],
    )  # fmt: skip


@inner
def weights_at(places, kinds):
    real = kinds.real
    return Weights(
        array_at(places[0], 1, real), array_at(places[1], 1, real), array_at(places[2], 1, real),
        array_at(places[3], 1, real), array_at(places[4], 1, real),
    )  # fmt: skip


@functools.lru_cache(256)
def _piece_tables(b: int, l: int, pieces: int, piece: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, first and last step, and first saved chunk of each piece of each row."""
    starts = range(0, pieces * max(piece, 1), max(piece, 1))
    bounds = [min(t, l) for start in starts for t in (start, start + piece)]
    order = np.arange(b).repeat(pieces)
    return order, np.array(bounds * b), order * (l // CHUNK + 1) + np.array([*starts] * b) // CHUNK


class Layout:
    """The vector layout of a call's channels, states and sequences. It keeps no values of the call's tensors.

    Kernels take the addresses of tensors: to make arrays of them would cost more than a small kernel.
    """

    def __init__(self, inputs: Inputs, delta_softplus: bool, reverse: bool = False):
        self.reverse = reverse
        u, delta, A, B, C, _, z = inputs[:7]
        self.b, d, self.l = u.shape
        self.d = d
        self.rotate = 1 if A.is_complex() else None
        self.rows = A.shape[1] * (2 if A.is_complex() else 1)  # rows of states per block
        self.real = A.dtype.to_real()
        self.width = BYTES // self.real.itemsize
        self.padded = round_up(self.rows, UNROLL)
        self.g = B.shape[1] if B.dim() == 4 else C.shape[1] if C.dim() == 4 else 1
        per_group = -(-(d // self.g) // self.width)
        self.blocks = self.g * per_group
        self.pieces, self.piece = 1, self.l
        if inputs.cu_seqlens is not None:
            ends = inputs.cu_seqlens.numpy().astype(np.int64)
            order = np.zeros(len(ends) - 1, np.int64)
            bounds = np.stack([ends[:-1], ends[1:]], 1).ravel()
            chunks = ends[:-1] // CHUNK + np.arange(len(ends) - 1)
        else:
            pieces = min(CORES // max(self.b * self.blocks, 1), self.l // PIECE)
            if pieces >= 4:  # pieces need two passes
                self.pieces, self.piece = pieces, round_up(-(-self.l // pieces), CHUNK)
            order, bounds, chunks = _piece_tables(self.b, self.l, self.pieces, self.piece)
        self.sequences = len(order)
        size = max(1, min(SUPERBLOCK, self.sequences * self.blocks // 16))
        self.supers = self.g * -(-per_group // size)
        sizes = [self.g, d // self.g, self.rows, self.padded, per_group, self.l, size, self.supers]
        self.work = Work(np.array(sizes), order, bounds, chunks, delta_softplus, z is not None)
        self.size = u.numel() * self.rows  # of the work, as `run` counts it
        self.types = u.dtype, delta.dtype, u.dtype if z is None else z.dtype
        # None or 1: numba compiles code of its own for complex states, constant B and constant C.
        self.variant = self.rotate, *(1 if t.dim() == 2 else None for t in (B, C))
        self.tiles = -(-self.l // TILE)
        self.weight_sizes = np.array(
            [self.g, self.l, self.rows, self.padded, self.tiles, self.supers // self.g]
        )

    def run(self, kernel: Any, items: int, y: Tensor, places: list[int], work: int, keep: Any = None) -> None:
        """Run a kernel of this layout on tensors at `places`, with y or its gradient; `keep` as in `run`."""
        types = *self.types, y.dtype, self.real
        run(
            kernel, items, work, self.work, Kinds(*(NOTHING[kind] for kind in types)), np.array(places),
            *self.variant, types=(*types, *self.variant), keep=keep,
        )  # fmt: skip

    def places(self, *tensors: Tensor) -> list[int]:
        """Address and strides, in the direction of the scan, of tensors (b, d, l)."""
        found: list[int] = []
        for t in tensors:
            start, (row, channel, step) = t.data_ptr(), t.stride()
            if self.reverse:
                start, step = start + (self.l - 1) * step * t.itemsize, -step
            found += start, row, channel, step
        return found

    def weights(self, inputs: Inputs) -> Weights:
        """Tensors that the kernels read."""
        return Weights(
            inputs.A.contiguous(), self.packed(inputs.B), self.packed(inputs.C, conjugate=True),
            self.channels(inputs.D), self.channels(inputs.delta_bias),
        )  # fmt: skip

    def channels(self, t: Tensor | None) -> Tensor:
        """(d,) in the type of the state; zeros for None."""
        return zeros(self.d, self.real) if t is None else t.to(self.real).contiguous()

    def packed(self, B: Tensor, conjugate: bool = False) -> Tensor:
        """B or C: (d, rows) if constant, else (b, g, l, padded rows), flat. Complex: y is 2 Re(C h)."""
        if self.rotate:
            pairs = torch.view_as_real((2 * B.conj() if conjugate else B).resolve_conj())
            B = pairs.flatten(1) if B.dim() == 2 else pairs.transpose(3, 4).flatten(2, 3)
        if B.dim() == 2:
            return B.to(self.real).contiguous()
        packed = torch.empty(self.b * self.g * self.l * self.padded, dtype=self.real, device="cpu")
        B = B if self.can_read(B) else B.to(self.real)
        self.by_tiles(pack, B, packed)
        return packed

    def unpack(self, parts: Tensor, grad: Tensor, conjugate: bool) -> None:
        """Write the gradient of B or C over time: the sum over the superblocks' `parts`."""
        found = grad
        if not self.can_read(grad):
            found = torch.empty(self.b, self.g, self.rows, self.l, dtype=self.real, device="cpu")
        self.by_tiles(unpack, found, parts)
        if found is not grad:
            grad.copy_(self.gradient(found.transpose(2, 3), conjugate).transpose(2, 3))

    def by_tiles(self, kernel: Any, t: Tensor, rows: Tensor) -> None:
        """Run `pack` or `unpack` between a tensor (b, g, n, l) and `rows`, in the layout of the kernels."""
        start, strides = t.data_ptr(), t.stride()
        if self.reverse:
            start += (self.l - 1) * strides[3] * t.itemsize
            strides = *strides[:3], -strides[3]
        run(
            kernel, self.b * self.g * self.tiles, t.numel(), self.weight_sizes, NOTHING[t.dtype],
            NOTHING[self.real], np.array((start, *strides, rows.data_ptr())), types=(t.dtype, self.real),
        )  # fmt: skip

    def can_read(self, t: Tensor) -> bool:
        """Whether kernels read a tensor of this type into vectors of the state's type."""
        return t.itemsize == 2 or t.dtype == self.real

    def per_piece(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Buffers for a state (d, n) and for the sums of delta (d,) of each piece: (b, pieces, ...)."""
        kind = self.real.to_complex() if self.rotate else self.real
        states = torch.empty(self.b, self.pieces, *shape, dtype=kind, device="cpu")
        return states, torch.empty(self.b, self.pieces, shape[0], dtype=self.real, device="cpu")

    def gradient(self, rows: Tensor, conjugate: bool = False) -> Tensor:
        """(..., rows) as (..., n): complex if the states are."""
        if not self.rotate:
            return rows
        pairs = torch.view_as_complex(rows.unflatten(-1, (-1, 2)).contiguous())
        return 2 * pairs.conj() if conjugate else pairs


def saved_shape(inputs: Inputs, sequences: int, every: int) -> tuple[int, ...]:
    """Shape of the saved states before each chunk, in the vector layout."""
    u, _, A, B, C = inputs[:5]
    b, d, l = u.shape
    parts = 2 if A.is_complex() else 1
    width = BYTES * parts // A.element_size()
    g = B.shape[1] if B.dim() == 4 else C.shape[1] if C.dim() == 4 else 1
    blocks = g * (round_up(d // g, width) // width)
    chunks = b * (l // CHUNK + 1) if b > 1 else l // CHUNK + sequences
    return (chunks * blocks * round_up(parts * A.shape[1], UNROLL) * width // parts,)
