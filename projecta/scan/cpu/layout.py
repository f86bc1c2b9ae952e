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

from projecta._cpu.memory import flat, memory, round_up
from projecta._cpu.simd import BYTES
from projecta._cpu.threads import run
from projecta.scan._operator import Inputs
from projecta.scan.cpu.tiles import TILE
from projecta.scan.cpu.weights import pack, unpack

CHUNK = 16  # steps between saved states
UNROLL = 4  # rows of states that one loop over time advances
SUPERBLOCK = 8  # blocks that share their sums of dB and dC
PIECE = 8192  # minimum steps of a piece
CORES = os.cpu_count() or 1


class Work(NamedTuple):
    """The work items of a kernel, and the workspace of its threads."""

    sizes: np.ndarray
    sequences: np.ndarray  # the row of each sequence
    bounds: np.ndarray  # first and last step of each sequence
    chunks: np.ndarray  # index of the first saved chunk of each sequence
    softplus: bool
    has_z: bool
    workspace: np.ndarray
    looks: np.ndarray  # prefetch addresses of each thread


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
    A: np.ndarray
    B: np.ndarray
    C: np.ndarray
    D: np.ndarray
    bias: np.ndarray


@functools.lru_cache(256)
def _piece_tables(b: int, l: int, pieces: int, piece: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, first and last step, and first saved chunk of each piece of each row."""
    starts = range(0, pieces * max(piece, 1), max(piece, 1))
    bounds = [min(t, l) for start in starts for t in (start, start + piece)]
    order = np.arange(b).repeat(pieces)
    return order, np.array(bounds * b), order * (l // CHUNK + 1) + np.array([*starts] * b) // CHUNK


class Layout:
    """The vector layout of a call's channels, states and sequences, and the arguments of both kernels."""

    def __init__(self, inputs: Inputs, delta_softplus: bool, reverse: bool = False):
        self.inputs, self.delta_softplus, self.reverse = inputs, delta_softplus, reverse
        u, _, A, B, C = inputs[:5]
        self.b, d, self.l = u.shape
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
            self.order = np.zeros(len(ends) - 1, np.int64)
            self.bounds = np.stack([ends[:-1], ends[1:]], 1).ravel()
            self.chunks = ends[:-1] // CHUNK + np.arange(len(ends) - 1)
        else:
            pieces = min(CORES // max(self.b * self.blocks, 1), self.l // PIECE)
            if pieces >= 4:  # pieces need two passes
                self.pieces, self.piece = pieces, round_up(-(-self.l // pieces), CHUNK)
            self.order, self.bounds, self.chunks = _piece_tables(self.b, self.l, self.pieces, self.piece)
        self.sequences = len(self.order)
        size = max(1, min(SUPERBLOCK, self.sequences * self.blocks // 16))
        self.supers = self.g * -(-per_group // size)
        self.sizes = np.array(
            [self.g, d // self.g, self.rows, self.padded, per_group, self.l, size, self.supers]
        )
        self.work = u.numel() * self.rows

    def arguments(self, y: Tensor, vectors: int) -> tuple[Work, Steps, Weights]:
        """Arguments of both kernels, for y or its gradient, and a workspace of `vectors` per thread."""
        u, delta, A, _, _, D, z, bias = self.inputs[:8]
        workspace, looks = self.workspace(vectors)
        work = Work(
            self.sizes,
            self.order,
            self.bounds,
            self.chunks,
            self.delta_softplus,
            z is not None,
            workspace,
            looks,
        )
        steps = Steps(*(part for t in (u, delta, u if z is None else z, y) for part in self.steps(t)))
        return work, steps, Weights(
            flat(A.contiguous()), *self.packed, self.channels(D), self.channels(bias)
        )  # fmt: skip

    def steps(self, t: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The memory of a (b, d, l) tensor and its strides, in the direction of the scan."""
        return memory(t, self.reverse)

    @property
    def kinds(self) -> tuple[int | None, int | None, int | None]:
        """1 or None for complex states, constant B, constant C; numba compiles separate code for each."""
        constant_B, constant_C = (1 if t.dim() == 2 else None for t in (self.inputs.B, self.inputs.C))
        return self.rotate, constant_B, constant_C

    @property
    def types(self) -> tuple:
        """What the types of the kernels' arguments follow from."""
        u, delta, _, _, _, _, z = self.inputs[:7]
        return u.dtype, delta.dtype, None if z is None else z.dtype, self.real, *self.kinds

    def workspace(self, vectors: int) -> tuple[np.ndarray, np.ndarray]:
        """Buffers of each thread: `vectors` aligned vectors, and prefetch addresses."""
        threads, size = torch.get_num_threads(), int(self.sizes[6])
        workspace = torch.empty(threads * vectors * self.width, dtype=self.real)
        return flat(workspace), np.zeros(threads * 16 * size, np.int64)

    def channels(self, t: Tensor | None) -> np.ndarray:
        """(d,) in the type of the state; zeros for None."""
        if t is None:
            return np.zeros(self.inputs.u.shape[1], _NUMPY[self.real])
        return flat(t.to(self.real).contiguous())

    @functools.cached_property
    def packed(self) -> tuple[np.ndarray, np.ndarray]:
        """B and C in the layout of `weights`."""
        return self.weights(self.inputs.B), self.weights(self.inputs.C, conjugate=True)

    def weights(self, B: Tensor, conjugate: bool = False) -> np.ndarray:
        """B or C, flat: (d, rows) if constant, else (b, g, l, padded rows). Complex: y is 2 Re(C h)."""
        if self.rotate:
            pairs = torch.view_as_real((2 * B.conj() if conjugate else B).resolve_conj())
            B = pairs.flatten(1) if B.dim() == 2 else pairs.transpose(3, 4).flatten(2, 3)
        if B.dim() == 2:
            return flat(B.to(self.real).contiguous())
        packed = np.empty(self.b * self.g * self.l * self.padded, _NUMPY[self.real])
        B = B if self.can_read(B) else B.to(self.real)
        self.by_tiles(pack, B, *memory(B, self.reverse), packed)
        return packed

    def unpack(self, parts: np.ndarray, grad: Tensor, conjugate: bool) -> None:
        """Write the gradient of B or C over time: the sum over the superblocks' `parts`."""
        found = grad
        if not self.can_read(grad):
            found = torch.empty(self.b, self.g, self.rows, self.l, dtype=self.real)
        target, strides = memory(found, self.reverse)
        self.by_tiles(unpack, found, parts, target, strides)
        if found is not grad:
            grad.copy_(self.gradient(found.transpose(2, 3), conjugate).transpose(2, 3))

    def by_tiles(self, kernel: Any, t: Tensor, *arrays: np.ndarray) -> None:
        """Run `pack` or `unpack` between a tensor (b, g, n, l) and the layout of the kernels."""
        tiles = -(-self.l // TILE)
        sizes = np.array([self.g, self.l, self.rows, self.padded, tiles, self.supers // self.g])
        types = (t.dtype, self.real)
        run(kernel, self.b * self.g * tiles, t.numel(), sizes, *arrays, types=types)

    def can_read(self, t: Tensor) -> bool:
        """Whether kernels read a tensor of this type into vectors of the state's type."""
        return t.itemsize == 2 or t.dtype == self.real

    def per_piece(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Buffers for a state (d, n) and for the sums of delta (d,) of each piece: (b, pieces, ...)."""
        A, d = self.inputs.A, shape[0]
        return A.new_empty(self.b, self.pieces, *shape), torch.empty(self.b, self.pieces, d, dtype=self.real)

    def gradient(self, rows: Tensor, conjugate: bool = False) -> Tensor:
        """(..., rows) as (..., n): complex if the states are."""
        if not self.rotate:
            return rows
        pairs = torch.view_as_complex(rows.unflatten(-1, (-1, 2)).contiguous())
        return 2 * pairs.conj() if conjugate else pairs


_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


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
