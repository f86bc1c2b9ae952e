"""Launches the kernels of `mrss.cpu`: the passes of a band, for all calls that differ in values only."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from projecta._cpu.memory import NOTHING, in_large_pages, round_up
from projecta._cpu.simd import BYTES
from projecta._cpu.threads import run, together
from projecta.mrss.cpu import backward, forward
from projecta.mrss.reference import block_means, cut_blocks
from projecta.scan._operator import Inputs
from projecta.scan.cpu.launch import Passes, addresses, sums_for
from projecta.scan.cpu.layout import Kinds, saved_shape
from projecta.scan.cpu.tiles import TILE

NAME = "cpu"


class Fine:
    """A band that is scanned at every token."""

    keeps = 1  # tensors between the passes

    def __init__(self, inputs: Inputs, softplus: bool):
        self.passes = Passes(inputs, softplus)

    def forward(self, inputs: Inputs, y: Tensor, last: Tensor, save: bool) -> list[Tensor]:
        saved = last.new_empty(saved_shape(inputs, len(last), 8) if save else 0)
        self.passes.forward(inputs, y, last, saved)
        return [saved]

    def backward(
        self, inputs: Inputs, grad_y: Tensor, grad_last: Tensor | None, kept: list[Tensor], grads: Inputs
    ) -> None:  # fmt: skip
        self.passes.backward(grad_y, grad_last, kept[0], inputs, grads)


class Coarse:
    """A band that is scanned once per block of `period` tokens."""

    keeps = 6  # tensors between the passes

    def __init__(self, inputs: Inputs, softplus: bool, period: int):
        u, A, B, C, z, bounds = inputs.u, inputs.A, inputs.B, inputs.C, inputs.z, inputs.cu_seqlens
        self.real, self.period = A.dtype, period
        self.b, self.d, l = u.shape
        self.blocks = cut_blocks(l, period, bounds, u.device)
        width, number = BYTES // A.dtype.itemsize, self.blocks.number
        self.padded = round_up(self.d, width)
        if bounds is None:
            rows, first = np.arange(self.b), np.zeros(self.b, np.int64)
            ends = np.array([0, l] * self.b)
        else:
            ends, cut = bounds.numpy().astype(np.int64), self.blocks.bounds.numpy()  # type: ignore[union-attr]
            rows, first = np.zeros(len(ends) - 1, np.int64), cut[:-1].astype(np.int64)
            ends = np.stack([ends[:-1], ends[1:]], 1).ravel()
        self.sequences, self.size = len(rows), u.numel()
        B, C = (t if t.dim() == 2 else self._new(*t.shape[1:3]) for t in (B, C))
        own = Inputs(
            self._new(), self._new(), A, B, C, None, None, None, inputs.initial_state, self.blocks.bounds
        )
        self.passes, self.saved_shape = Passes(own, False), saved_shape(own, self.sequences, 8)
        self.layout = self.passes.layout
        sizes = np.array([self.d, self.padded // width, period, self.padded, number])
        self.band = forward.Band(sizes, rows, ends, first, softplus, z is not None)
        self.kinds = u.dtype, inputs.delta.dtype, u.dtype if z is None else z.dtype
        tiles = -(-number // TILE)
        g, n, padded = self.layout.g, A.shape[1], self.layout.padded
        self.averages = np.array([self.b * g, g, l, n, padded, period, number, tiles])

    def _new(self, *shape: int) -> Tensor:
        """A value of each block and channel, as (b, d, blocks): a view of (b, blocks, padded d)."""
        fill = torch.empty if self.blocks.bounds is None else torch.zeros  # packed: empty blocks between
        if shape:
            return fill(self.b, *shape, self.blocks.number, dtype=self.real, device="cpu")
        whole = fill(self.b, self.blocks.number, self.padded, dtype=self.real, device="cpu")
        return whole[..., : self.d].transpose(1, 2)

    def _means(self, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        """`block_means` of B and C. Unless packed, views of memory in the layout of the kernels."""
        if self.blocks.bounds is not None or B.dim() == C.dim() == 2:
            return block_means(B, self.blocks, self.real), block_means(C, self.blocks, self.real)
        found, places = [], []
        for t in (B, C):
            if t.dim() == 2:
                found.append(t)
                places += [0] * 6
                continue
            b, g, n, _ = t.shape
            new = torch.empty(b, g, self.blocks.number, self.layout.padded, dtype=self.real, device="cpu")
            found.append(new[..., :n].transpose(2, 3))
            places += [t.data_ptr(), *t.stride(), new.data_ptr()]
        run(
            forward.average, int(self.averages[0] * self.averages[-1]), B.numel() + C.numel(), self.averages,
            NOTHING[B.dtype], NOTHING[C.dtype], NOTHING[self.real], np.array(places),
            types=(B.dtype, C.dtype, self.real),
        )  # fmt: skip
        return found[0], found[1]

    def _packed(self, means: Tensor) -> Tensor:
        """`_means` in the layout of the kernels."""
        within = means.dim() == 4 and self.blocks.bounds is None
        return means if within else self.layout.packed(means)

    def _run(
        self, kernel: Any, per_sequence: int, inputs: Inputs, y: Tensor, others: tuple[Any, ...],
        places: list[int], work: int, scanned: tuple = (), variant: tuple = (), keep: Any = None,
    ) -> None:  # fmt: skip
        """Run a kernel on the tensors of tokens: the inputs, y or its gradient, and others.

        scanned and variant: what the forward kernel takes besides, of the scan's layout.
        """
        u, delta, z = inputs.u, inputs.delta, inputs.u if inputs.z is None else inputs.z
        along = all(t.stride(2) == 1 for t in (u, delta, z, y, *others))
        types, variant = (*self.kinds, y.dtype, self.real), (1 if along else None, *variant)
        run(
            kernel, self.sequences * per_sequence, work * self.size, self.band, *scanned,
            Kinds(*(NOTHING[kind] for kind in types)),
            np.array(self.layout.places(u, delta, z, y, *others) + places), *variant,
            types=(*types, *variant), keep=keep,
        )  # fmt: skip

    def forward(self, inputs: Inputs, y: Tensor, last: Tensor, save: bool) -> list[Tensor]:
        """Write y and the last state; return what `backward` needs."""
        layout, start = self.layout, inputs.initial_state
        means = self._means(inputs.B, inputs.C)
        B, C = (self._packed(t) for t in means)
        kept = [last.new_empty(self.saved_shape), *(self._new() for _ in range(3))] if save else []
        bias, D, A = layout.channels(inputs.delta_bias), layout.channels(inputs.D), inputs.A.contiguous()
        start = None if start is None else start.contiguous()
        places = [*addresses(A), B.data_ptr(), C.data_ptr(), *addresses(D, bias, start, last)]
        places += [t.data_ptr() for t in kept] if save else [0] * 4
        self._run(
            forward.forward, layout.blocks, inputs, y, (), places, 4, (layout.work,), layout.variant[1:],
            (A, B, C, D, bias, start),
        )  # fmt: skip
        return [*kept, *means] if save else []

    def backward(
        self, inputs: Inputs, grad_y: Tensor, grad_last: Tensor | None, kept: list[Tensor], grads: Inputs
    ) -> tuple[Tensor, Tensor]:
        """Write the gradients; return those of B and C by block, for `spread`."""
        (saved, x, span, values, B, C), layout, z = kept, self.layout, inputs.z
        each = int(self.band.sizes[1])
        D, bias = layout.channels(inputs.D), layout.channels(inputs.delta_bias)
        dvalues, dx, dspan = self._new(), self._new(), self._new()
        sums = [sums_for(grad, self.real, self.sequences, self.d) for grad in (grads.D, grads.delta_bias)]
        places = addresses(D) + [t.data_ptr() for t in (values, dvalues)] + addresses(sums[0])
        dz = grads.u if z is None else grads.z
        self._run(backward.expand, each, inputs, grad_y, (dz,), places, 1)
        own = Inputs(x, span, inputs.A, B, C, None, None, None, inputs.initial_state, self.blocks.bounds)
        dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (B, C))
        to = Inputs(dx, dspan, grads.A, dB, dC, None, None, None, grads.initial_state)
        self.passes.backward(dvalues, grad_last, saved, own, to)
        places = addresses(D, bias) + [t.data_ptr() for t in (x, span, dx, dspan)] + addresses(sums[1])
        self._run(backward.pool, each, inputs, grad_y, (grads.u, grads.delta), places, 1)
        for grad, own_sums in zip((grads.D, grads.delta_bias), sums, strict=True):
            if grad is not None and own_sums is not grad:
                grad.copy_(own_sums.sum(0))
        return dB, dC

    def spread(self, inputs: Inputs, name: str, gradient: Tensor, to: Tensor, add: bool) -> None:
        """Write the gradient of B or C (`name`) by block to that by token, or add it."""
        if to.dim() == 4 and self.blocks.bounds is None:
            sizes = np.array([to.shape[1] * to.shape[2], to.stride(0), to.shape[3], self.period, add])
            places = np.array([*addresses(gradient), to.data_ptr()])
            items = len(to) * int(sizes[0])
            run(forward.spread, items, to.numel(), sizes, NOTHING[self.real], places, types=(self.real,))
            return
        if to.dim() == 4:
            gradient = (gradient / self.blocks.sizes.to(self.real))[..., self.blocks.of]
        if add:
            to.add_(gradient)
        else:
            to.copy_(gradient)


def takes(inputs: Inputs) -> bool:
    return True


def new_like(t: Tensor) -> Tensor:
    new = torch.empty_like(t)
    in_large_pages(new)
    return new


def may_run_beside(u: Tensor) -> bool:
    return False  # each band takes all threads


scanning = together  # forward passes of bands are the same work for threads
