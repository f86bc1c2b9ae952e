"""MRSS on a GPU: kernels that sum tokens to blocks and read blocks back, around the scan's own kernels.

A program takes some channels of a row and some blocks: a tile (channels, blocks, steps of a block). All
arithmetic is float32, and sums have a fixed order. Arrays of blocks are (b, d, blocks), contiguous.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from projecta._triton.launch import cached, narrow, ordered_strides, start_kernel
from projecta._triton.warp import constant, sigmoid, softplus
from projecta.mrss.reference import Blocks, cut_blocks
from projecta.scan._operator import Inputs
from projecta.scan.triton import launch as scan

NAME = "triton"
# Elements of u from which on bands run side by side: outside of a graph a second stream costs processor time.
LARGE, LARGE_IN_GRAPH = 1 << 26, 1 << 20
TINY = constant(1.2e-38)
new_like = torch.empty_like
LONGEST, TILE = 64, 1024  # of a tile: most steps of a block, and elements
ALONG, ACROSS = (1, 4), (32, 1)  # channels and warps of a tile where time is last in memory, and elsewhere


@triton.jit
def _place(tiles, parts, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr):
    """Row, part of the blocks, channels and blocks of a program."""
    program = tl.program_id(0)
    part, tile = program % parts, program // parts % tiles
    row = (program // (parts * tiles)).to(tl.int64)
    return row, part, tile * CHANNELS + tl.arange(0, CHANNELS), part * BLOCKS + tl.arange(0, BLOCKS)


@triton.jit
def _extent(k, blocks, l, begins, sizes, PERIOD: tl.constexpr):
    """First step and number of steps of each block."""
    if begins is None:
        begin = k * PERIOD
        return begin, tl.where(k < blocks, tl.minimum(l - begin, PERIOD), 0)
    else:
        return tl.load(begins + k, k < blocks, 0), tl.load(sizes + k, k < blocks, 0)


@triton.jit
def _reads(k, blocks, leads):
    """Whether the tokens of each block read the block before."""
    if leads is None:
        return (k > 0) & (k < blocks)
    else:
        return (k < blocks) & (tl.load(leads + k, k < blocks, 1) == 0)


@triton.jit
def _steps(c, begin, size, first, channels, STEPS: tl.constexpr, WHOLE: tl.constexpr):
    """Times (1, blocks, steps) of a tile, and the mask of its elements."""
    j = first + tl.arange(0, STEPS)
    t = (begin[:, None] + j[None, :])[None].to(tl.int64)
    inside = (c < channels)[:, None, None] & (size > 0)[None, :, None]
    if not WHOLE:
        inside = inside & (j[None, :] < size[:, None])[None]
    return t, inside


@triton.jit
def _numbers(at, c, channels):
    """The number of a (d,) tensor for each channel, as (channels, 1, 1)."""
    if at is None:
        return tl.zeros(c.shape, tl.float32)[:, None, None]
    else:
        return tl.load(at + c, c < channels, 0).to(tl.float32)[:, None, None]


@triton.jit
def _load(at, c, t, inside, stride, along):
    return tl.load(at + (c.to(tl.int64) * stride)[:, None, None] + t * along, inside, 0).to(tl.float32)


@triton.jit
def _store(at, c, t, inside, stride, along, value):
    tl.store(at + (c.to(tl.int64) * stride)[:, None, None] + t * along, value.to(at.dtype.element_ty), inside)


@triton.jit
def _of_blocks(row, c, k, channels, blocks):
    """Places in an array of blocks, as (channels, blocks), and which of them exist."""
    at = ((row * channels + c)[:, None] * blocks) + k[None, :]
    return at, (c < channels)[:, None] & (k < blocks)[None, :]


@triton.jit
def pool(
    u, delta, bias, begins, sizes, x, span, ub, ud, ul, sb, sd, sl, channels, l, blocks, tiles, parts,
    SOFTPLUS: tl.constexpr, PERIOD: tl.constexpr, STEPS: tl.constexpr, WHOLE: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The sum of the step sizes over each block, and the mean of u with them as weights; without delta, 1."""
    row, _, c, k = _place(tiles, parts, CHANNELS, BLOCKS)
    begin, size = _extent(k, blocks, l, begins, sizes, PERIOD)
    shift = _numbers(bias, c, channels)
    total = tl.zeros((CHANNELS, BLOCKS), tl.float32)
    product = tl.zeros((CHANNELS, BLOCKS), tl.float32)
    for first in range(0, PERIOD, STEPS):
        t, inside = _steps(c, begin, size, first, channels, STEPS, WHOLE)
        value = _load(u + row * ub, c, t, inside, ud, ul)
        if delta is None:
            step = tl.where(inside, 1.0, 0.0) + tl.zeros((1, 1, STEPS), tl.float32)
        else:
            step = _load(delta + row * sb, c, t, inside, sd, sl) + shift
            if SOFTPLUS:
                step = softplus(step, False)
            step = tl.where(inside, step, 0.0)
        total += tl.sum(step, 2)
        product += tl.sum(step * value, 2)
    at, there = _of_blocks(row, c, k, channels, blocks)
    tl.store(x + at, product / (total + TINY), there)
    if span is not None:
        tl.store(span + at, total, there)


@triton.jit
def expand(
    values, u, z, D, begins, sizes, leads, y, ub, ud, ul, zb, zd, zl, yb, yd, yl, channels, l, blocks, tiles,
    parts, PERIOD: tl.constexpr, STEPS: tl.constexpr, WHOLE: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """y of the tokens of each block, which read the value of the block before."""
    row, _, c, k = _place(tiles, parts, CHANNELS, BLOCKS)
    begin, size = _extent(k, blocks, l, begins, sizes, PERIOD)
    at, there = _of_blocks(row, c, k, channels, blocks)
    value = tl.load(values + at - 1, there & _reads(k, blocks, leads)[None, :], 0.0)[:, :, None]
    skip = _numbers(D, c, channels)
    for first in range(0, PERIOD, STEPS):
        t, inside = _steps(c, begin, size, first, channels, STEPS, WHOLE)
        out = tl.where(inside, value, 0.0)
        if D is not None:
            out += skip * _load(u + row * ub, c, t, inside, ud, ul)
        if z is not None:
            gate = _load(z + row * zb, c, t, inside, zd, zl)
            out = out * gate * sigmoid(gate)
        _store(y + row * yb, c, t, inside, yd, yl, out)


@triton.jit
def expand_back(
    values, u, z, D, begins, sizes, leads, grad_y, dvalues, dz, sums, ub, ud, ul, zb, zd, zl, gb, gd, gl, dzb,
    dzd, dzl, channels, l, blocks, tiles, parts, PERIOD: tl.constexpr, STEPS: tl.constexpr,
    WHOLE: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The gradients of the blocks' values, of z, and in `sums` those of D by program."""
    row, part, c, k = _place(tiles, parts, CHANNELS, BLOCKS)
    begin, size = _extent(k, blocks, l, begins, sizes, PERIOD)
    at, there = _of_blocks(row, c, k, channels, blocks)
    reading = there & _reads(k, blocks, leads)[None, :]
    value = tl.load(values + at - 1, reading, 0.0)[:, :, None]
    skip = _numbers(D, c, channels)
    total, skipped = tl.zeros((CHANNELS, BLOCKS), tl.float32), tl.zeros((CHANNELS, BLOCKS), tl.float32)
    for first in range(0, PERIOD, STEPS):
        t, inside = _steps(c, begin, size, first, channels, STEPS, WHOLE)
        grad, own = _load(grad_y + row * gb, c, t, inside, gd, gl), value
        if D is not None:
            token = _load(u + row * ub, c, t, inside, ud, ul)
            own = own + skip * token
        if z is not None:
            gate = _load(z + row * zb, c, t, inside, zd, zl)
            share = sigmoid(gate)
            by_gate = grad * own * share * (1.0 + gate * (1.0 - share))
            _store(dz + row * dzb, c, t, inside, dzd, dzl, by_gate)
            grad = grad * gate * share
        total += tl.sum(grad, 2)
        if D is not None:
            skipped += tl.sum(grad * token, 2)
    tl.store(dvalues + at - 1, total, reading)
    unread = there & ((k + 1 >= blocks) | (_reads(k + 1, blocks, leads) == 0))[None, :]
    tl.store(dvalues + at, tl.zeros((CHANNELS, BLOCKS), tl.float32), unread)
    if D is not None:
        tl.store(sums + (row * parts + part) * channels + c, tl.sum(skipped, 1), c < channels)


@triton.jit
def pool_back(
    u, delta, z, D, bias, begins, sizes, x, span, dx, dspan, grad_y, du, ddelta, sums, ub, ud, ul, sb, sd, sl,
    zb, zd, zl, gb, gd, gl, dub, dud, dul, dsb, dsd, dsl, channels, l, blocks, tiles, parts,
    SOFTPLUS: tl.constexpr, PERIOD: tl.constexpr, STEPS: tl.constexpr, WHOLE: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The gradients of u and delta, and in `sums` those of the bias by program."""
    row, part, c, k = _place(tiles, parts, CHANNELS, BLOCKS)
    begin, size = _extent(k, blocks, l, begins, sizes, PERIOD)
    at, there = _of_blocks(row, c, k, channels, blocks)
    by_u = tl.load(dx + at, there, 0.0) / (tl.load(span + at, there, 0.0) + TINY)
    by_step = (tl.load(dspan + at, there, 0.0) - by_u * tl.load(x + at, there, 0.0))[:, :, None]
    by_u = by_u[:, :, None]
    skip, shift = _numbers(D, c, channels), _numbers(bias, c, channels)
    total = tl.zeros((CHANNELS, BLOCKS), tl.float32)
    for first in range(0, PERIOD, STEPS):
        t, inside = _steps(c, begin, size, first, channels, STEPS, WHOLE)
        step = _load(delta + row * sb, c, t, inside, sd, sl) + shift
        change = tl.where(inside, by_step + by_u * _load(u + row * ub, c, t, inside, ud, ul), 0.0)
        if SOFTPLUS:
            change = change * sigmoid(step)
            step = softplus(step, False)
        by_token = by_u * step
        if D is not None:
            grad = _load(grad_y + row * gb, c, t, inside, gd, gl)
            if z is not None:
                gate = _load(z + row * zb, c, t, inside, zd, zl)
                grad = grad * gate * sigmoid(gate)
            by_token += skip * grad
        _store(du + row * dub, c, t, inside, dud, dul, by_token)
        _store(ddelta + row * dsb, c, t, inside, dsd, dsl, change)
        total += tl.sum(change, 2)
    if bias is not None:
        tl.store(sums + (row * parts + part) * channels + c, tl.sum(total, 1), c < channels)


@triton.jit
def spread(
    values, begins, sizes, y, yb, yd, yl, channels, l, blocks, tiles, parts, ADD: tl.constexpr,
    PERIOD: tl.constexpr, STEPS: tl.constexpr, WHOLE: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Each token's equal share of the value of its own block, written to y or added to it."""
    row, _, c, k = _place(tiles, parts, CHANNELS, BLOCKS)
    begin, size = _extent(k, blocks, l, begins, sizes, PERIOD)
    at, there = _of_blocks(row, c, k, channels, blocks)
    value = (tl.load(values + at, there, 0.0) / tl.maximum(size, 1).to(tl.float32)[None, :])[:, :, None]
    for first in range(0, PERIOD, STEPS):
        t, inside = _steps(c, begin, size, first, channels, STEPS, WHOLE)
        own = value
        if ADD:
            own = own + _load(y + row * yb, c, t, inside, yd, yl)
        _store(y + row * yb, c, t, inside, yd, yl, own + tl.zeros((1, 1, STEPS), tl.float32))


class Fine:
    """A band that is scanned at every token."""

    keeps = 1  # tensors between the passes

    def __init__(self, inputs: Inputs, softplus: bool):
        self.softplus = softplus

    def forward(self, inputs: Inputs, y: Tensor, last: Tensor, save: bool) -> list[Tensor]:
        saved = last.new_empty(scan.saved_shape(inputs, len(last), 8) if save else 0)
        scan.forward_pass(inputs, self.softplus, y, last, saved)
        return [saved]

    def backward(
        self, inputs: Inputs, grad_y: Tensor, grad_last: Tensor | None, kept: list[Tensor], grads: Inputs
    ) -> None:  # fmt: skip
        scan.backward_pass(grad_y, grad_last, kept[0], inputs, self.softplus, grads)


class Coarse:
    """A band that is scanned once per block of `period` tokens."""

    keeps = 4  # tensors between the passes

    def __init__(self, inputs: Inputs, softplus: bool, period: int):
        self.options = softplus, period

    def forward(self, inputs: Inputs, y: Tensor, last: Tensor, save: bool) -> list[Tensor]:
        """Write y and the last state; return what `backward` needs."""
        return _Call(inputs, *self.options).forward(y, last, save)

    def backward(
        self, inputs: Inputs, grad_y: Tensor, grad_last: Tensor | None, kept: list[Tensor], grads: Inputs
    ) -> tuple[Tensor, Tensor]:
        """Write the gradients; return those of B and C by block, for `spread`."""
        return _Call(inputs, *self.options).backward(grad_y, grad_last, kept, grads)

    def spread(self, inputs: Inputs, name: str, gradient: Tensor, to: Tensor, add: bool) -> None:
        """Write the gradient of B or C (`name`) by block to that by token, or add it."""
        _Call(inputs, *self.options).spread(name, gradient, to, add)


class _Call:
    """One call of a coarse band."""

    def __init__(self, inputs: Inputs, softplus: bool, period: int):
        u, bounds = inputs.u, inputs.cu_seqlens
        D, bias = narrow(inputs.D), narrow(inputs.delta_bias)
        self.inputs, self.softplus = inputs._replace(D=D, delta_bias=bias), softplus
        self.b, self.d, self.l = u.shape
        self.sequences = self.b if bounds is None else len(bounds) - 1
        self.blocks = cut_blocks(self.l, period, bounds, u.device)
        self.extent: dict[str, Tensor | None] = {"begins": None, "sizes": None}
        self.leads = None
        if bounds is not None:
            self.extent["begins"], self.extent["sizes"], self.leads = _packed_blocks(bounds, self.blocks)
        self.launches: dict = {}

    def _tiles(self, like: Tensor) -> tuple[dict[str, int], int, int]:
        """A tile that suits the memory of `like` (b, d, l); how many there are over channels and blocks."""
        steps = min(triton.next_power_of_2(self.blocks.period), LONGEST)
        most, warps = ALONG if like.stride(2) == 1 else ACROSS
        channels = min(triton.next_power_of_2(like.shape[1]), most)
        blocks = min(triton.next_power_of_2(self.blocks.number), max(TILE // (steps * channels), 1))
        tiles, parts = -(-like.shape[1] // channels), -(-self.blocks.number // blocks)
        shape = {"STEPS": steps, "CHANNELS": channels, "BLOCKS": blocks, "num_warps": warps}
        return shape, tiles, parts

    def _start(
        self, kernel: Any, tensors: dict[str, Tensor | None], strides: dict[str, Tensor | None], like: Tensor,
        name: str = "", **options: Any,
    ) -> None:  # fmt: skip
        period = self.blocks.period

        def describe() -> tuple:
            shape, tiles, parts = self._tiles(like)
            sizes = ordered_strides(1, **strides) | {
                "channels": like.shape[1], "l": self.l, "blocks": self.blocks.number, "tiles": tiles,
                "parts": parts,
            }  # fmt: skip
            whole = self.leads is None and self.l % period == 0 and period % shape["STEPS"] == 0
            shape |= {"PERIOD": period, "WHOLE": whole}
            return (len(like) * tiles * parts,), sizes, shape | options

        start_kernel(self.launches, kernel, tensors, describe, name)

    def _new(self, *shape: int) -> Tensor:
        return self.inputs.A.new_empty(shape or (self.b, self.d, self.blocks.number))

    def _launches_of(self, *others: Tensor | None) -> dict:
        """The compiled launches of calls whose tensors differ from these in values only."""
        tensors = *self.inputs, *others
        return cached(dict, tensors, "mrss", self.softplus, self.blocks.period, self.inputs.u.device)

    def _scan(self, x: Tensor, span: Tensor) -> Inputs:
        """The inputs of the scan of the blocks."""
        _, _, A, B, C, *_, start, _ = self.inputs
        B, C = self._means("B", B), self._means("C", C)
        return Inputs(x, span, A, B, C, None, None, None, start, self.blocks.bounds)

    def _means(self, name: str, t: Tensor) -> Tensor:
        """B or C (b, g, n, l) as (b, g, n, blocks); constant ones as they are."""
        if t.dim() == 2:
            return t
        flat = t.flatten(1, 2)
        mean = self._new(*flat.shape[:2], self.blocks.number)
        tensors = {"u": flat, "delta": None, "bias": None, **self.extent, "x": mean, "span": None}
        self._start(pool, tensors, {"u": flat, "s": None}, flat, name, SOFTPLUS=False)
        return mean.unflatten(1, t.shape[1:3])

    def _sums(self) -> Tensor:
        """A sum of each program and channel."""
        return self._new(self.b * self._tiles(self.inputs.u)[2], self.d)

    def forward(self, y: Tensor, last: Tensor, save: bool) -> list[Tensor]:
        u, delta, _, _, _, D, z, bias, *_ = self.inputs
        self.launches = self._launches_of(y)
        x, span, values = self._new(), self._new(), self._new()
        tensors = {"u": u, "delta": delta, "bias": bias, **self.extent, "x": x, "span": span}
        self._start(pool, tensors, {"u": u, "s": delta}, u, SOFTPLUS=self.softplus)
        own = self._scan(x, span)
        saved = self._new(*(scan.saved_shape(own, self.sequences, 8) if save else (0,)))
        scan.forward_pass(own, False, values, last, saved)
        tensors = {"values": values, "u": u, "z": z, "D": D, **self.extent, "leads": self.leads, "y": y}
        self._start(expand, tensors, {"u": u, "z": z, "y": y}, u)
        return [saved, x, span, values]

    def backward(self, grad_y: Tensor, grad_last: Tensor | None, kept: list[Tensor], grads: Inputs) -> tuple:
        u, delta, _, _, _, D, z, bias, *_ = self.inputs
        saved, x, span, values = kept
        self.launches = self._launches_of(grad_y, *grads)
        dvalues, dx, dspan, by_D, by_bias = self._new(), self._new(), self._new(), self._sums(), self._sums()
        tensors = {
            "values": values, "u": u, "z": z, "D": D, **self.extent, "leads": self.leads, "grad_y": grad_y,
            "dvalues": dvalues, "dz": grads.z, "sums": by_D,
        }  # fmt: skip
        self._start(expand_back, tensors, {"u": u, "z": z, "g": grad_y, "dz": grads.z}, u)
        own = self._scan(x, span)
        dB, dC = (torch.empty_like(t) for t in (own.B, own.C))
        to = Inputs(dx, dspan, grads.A, dB, dC, None, None, None, grads.initial_state)
        scan.backward_pass(dvalues, grad_last, saved, own, False, to)
        tensors = {
            "u": u, "delta": delta, "z": z, "D": D, "bias": bias, **self.extent, "x": x, "span": span,
            "dx": dx, "dspan": dspan, "grad_y": grad_y, "du": grads.u, "ddelta": grads.delta, "sums": by_bias,
        }  # fmt: skip
        strides = {"u": u, "s": delta, "z": z, "g": grad_y, "du": grads.u, "ds": grads.delta}
        self._start(pool_back, tensors, strides, u, SOFTPLUS=self.softplus)
        for grad, each in ((grads.D, by_D), (grads.delta_bias, by_bias)):
            if grad is not None:
                grad.copy_(each.sum(0))
        return dB, dC

    def spread(self, name: str, gradient: Tensor, to: Tensor, add: bool) -> None:
        if to.dim() == 2:
            to.copy_(gradient)
            return
        flat = to.flatten(1, 2)  # a view: `to` holds its groups and states densely
        tensors = {"values": gradient, **self.extent, "y": flat}
        self._start(spread, tensors, {"y": flat}, flat, f"spread {name}", ADD=add)


def _packed_blocks(bounds: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """First step and number of steps of each block, and whether it begins a sequence; nothing waits."""
    starts, first = bounds.long(), blocks.bounds.long()  # type: ignore[union-attr]
    k = torch.arange(blocks.number, device=bounds.device)
    own = torch.searchsorted(first[:-1].contiguous(), k, right=True) - 1
    begins = starts[own] + (k - first[own]) * blocks.period
    sizes = (starts[own + 1] - begins).clamp(0, blocks.period)
    return begins.int(), sizes.int(), (k == first[own]).int()


scanning = contextlib.nullcontext


def takes(inputs: Inputs) -> bool:
    """Whether the arithmetic is float32; the scan refuses or narrows anything else."""
    return all(t is None or t.dtype != torch.float64 for t in (inputs.A, inputs.delta, inputs.z))


@contextlib.contextmanager
def beside(u: Tensor) -> Iterator[None]:
    """A second stream for coarse bands: they wait for memory while the scan of the others computes."""
    side = _side_stream(u.device)
    side.wait_stream(torch.cuda.current_stream(u.device))
    with torch.cuda.stream(side):
        yield


def join(u: Tensor) -> None:
    torch.cuda.current_stream(u.device).wait_stream(_side_stream(u.device))


def may_run_beside(u: Tensor) -> bool:
    if not u.is_cuda:
        return False
    _side_stream(u.device)  # a capture that comes later may make none
    return u.numel() >= (LARGE_IN_GRAPH if torch.cuda.is_current_stream_capturing() else LARGE)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)  # so that its programs do not wait for all of the others
