"""The convolution on the CPU in numba, in memory order: along channels for (b, l, d) memory, along time for
(b, d, l) memory.

Both are one loop: y[i] = act(bias + sum_j weight_j x_j[i]) for i along the contiguous axis, in vectors. Along
channels x_j is another row of memory, and a weight is a vector; along time x_j is the same row j steps later,
and a weight is one number. Items are chunks of time of a sequence and blocks of channels; they do not depend
on the number of threads, so results do not either.
"""

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from projecta._cpu.memory import NOTHING, zeros
from projecta._cpu.shuffles import sum_lanes
from projecta._cpu.simd import (
    array_at,
    claim,
    fma,
    get,
    lanes,
    load,
    put,
    sigmoid,
    splat,
    store,
    zero,
)
from projecta._cpu.threads import compiled, inner, run
from projecta.conv import reference
from projecta.conv._operator import Grads, Inputs, define

ROWS, COLUMNS = 64, 128  # steps and channels of an item along channels
STRETCH = 2048  # steps of an item along time


def unavailable() -> str:
    """Why this backend cannot run; "" when it can."""
    return ""


class Work(NamedTuple):
    """Work items: chunks of time, (row, sequence, t_start, t0, t1, t_end), and blocks of channels."""

    chunks: np.ndarray
    blocks: int
    columns: int
    width: int
    d: int


class Filter(NamedTuple):
    """Weights (k, d) and bias (d,), in the type that sums are in."""

    weight: np.ndarray
    bias: np.ndarray
    width: int
    d: int


class Source(NamedTuple):
    """A tensor (b, d, l), and the k - 1 steps before each sequence, (s, k - 1, d), if any."""

    x: np.ndarray
    strides: np.ndarray
    start: np.ndarray


@inner
def _source_at(places, kind, real):
    """The source from its address and strides, and the address of its start or 0."""
    start = array_at(places[4], 1 if places[4] else 0, real)
    return Source(array_at(places[0], 1, kind), places[1:4], start)


@inner
def _filter_at(places, work, real):
    return Filter(array_at(places[0], 1, real), array_at(places[1], 1, real), work.width, work.d)


@inner
def _tap(weight, at, along):
    """Weights of a vector of channels, or (along time) one weight in every lane."""
    return splat(weight, at) if along is not None else load(weight, at)


@inner
def _convolve_row(x, at, step, start, s, missing, taps, c, count, out, to, silu, along):
    """`count` outputs at out[to:]: channels c and on of one step, or (along time) steps of channel c.

    x[at + j step] is the input of tap j. The first `missing` taps read start[s + j d] instead, or nothing if
    there is no start; along time that holds for one step at a time.
    """
    weight, width, d, i = taps.weight, taps.width, taps.d, 0
    early = missing if start.size else 0
    if along is None or missing == 0:
        while i + lanes(weight) <= count:
            move = 0 if along is not None else i
            total = _tap(taps.bias, c + move, along)
            if along is None:
                for j in range(early):
                    total = fma(load(start, s + j * d + i), load(weight, c + j * d + i), total)
            for j in range(missing, width):
                total = fma(load(x, at + j * step + i), _tap(weight, c + j * d + move, along), total)
            store(out, to + i, total * sigmoid(total) if silu is not None else total)
            i += lanes(weight)
    while i < count:
        move = 0 if along is not None else i
        total = taps.bias[c + move]
        for j in range(early):
            total += start[s + j * d + move] * weight[c + j * d + move]
        for j in range(missing, width):
            total += get(x, at + j * step + i) * weight[c + j * d + move]
        put(out, to + i, total / (1 + np.exp(-total)) if silu is not None else total)
        i += 1


@inner
def _convolve_steps(
    source, base, step, sequence, t_start, t0, t1, taps, c, count, out, to, move, silu, along
):
    """Steps t0..t1 of one block, written `move` apart; x of step t is at base + t step."""
    kept, t = taps.width - 1, t0
    while t < t1:
        missing = max(0, kept - (t - t_start))
        s = (sequence * kept + t - t_start) * taps.d + c
        steps = 1
        if along is not None:
            steps = 1 if missing else t1 - t
        _convolve_row(
            source.x, base + (t - kept) * step, step, source.start, s, missing, taps, c,
            steps if along is not None else count, out, to + (t - t0) * move, silu, along,
        )  # fmt: skip
        t += steps


@compiled
def forward(counter, items, work, kind, real, places, silu, along):
    """Item i is channel block i % blocks of chunk i // blocks. places: x, start, weights, bias, y."""
    source, taps = _source_at(places, kind, real), _filter_at(places[5:], work, real)
    y, y_strides = array_at(places[7], 1, kind), places[8:11]
    blocks, columns = work.blocks, work.columns
    item = claim(counter)
    while item < items:
        row, sequence, t_start, t0, t1 = work.chunks[item // blocks, :5]
        c = item % blocks * columns
        sb, sd, sl = source.strides[0], source.strides[1], source.strides[2]
        to = row * y_strides[0] + c * y_strides[1] + t0 * y_strides[2]
        _convolve_steps(
            source, row * sb + c * sd, sl, sequence, t_start, t0, t1, taps, c, min(columns, taps.d - c), y,
            to, y_strides[2], silu, along,
        )  # fmt: skip
        item = claim(counter)


@inner
def _scale_by_slope(G, at, grad, where, count):
    """G = grad silu'(G), `count` numbers."""
    i = 0
    while i + lanes(G) <= count:
        value, grads = load(G, at + i), load(grad, where + i)
        open = sigmoid(value)
        store(G, at + i, grads * open * (value * (1.0 - open) + 1.0))
        i += lanes(G)
    while i < count:
        value = G[at + i]
        open = 1 / (1 + np.exp(-value))
        G[at + i] = get(grad, where + i) * open * (1 + value * (1 - open))
        i += 1


@inner
def _copy(G, at, grad, where, count):
    i = 0
    while i + lanes(G) <= count:
        store(G, at + i, load(grad, where + i))
        i += lanes(G)
    while i < count:
        G[at + i] = get(grad, where + i)
        i += 1


@inner
def _sum_products(G, x, at, count, total):
    """total + the sum of G[i] x[at + i], along time; x None: the sum of G."""
    i, sums = 0, zero(G)
    while i + lanes(G) <= count:
        sums = sums + load(G, i) if x is None else fma(load(G, i), load(x, at + i), sums)
        i += lanes(G)
    total += sum_lanes(sums)
    while i < count:
        total += G[i] if x is None else G[i] * get(x, at + i)
        i += 1
    return total


@inner
def _sum_along_time(G, source, base, sequence, t_start, t0, t1, taps, c, totals, to):
    """The sums over steps t0..t1 of g_t x of each tap of channel c, and of g_t."""
    kept, d = taps.width - 1, taps.d
    for j in range(taps.width):
        first, total = min(max(t0, t_start + kept - j), t1), G[0] * 0
        if source.start.size:
            for t in range(t0, first):
                total += G[t - t0] * source.start[(sequence * kept + t - t_start + j) * d + c]
        totals[to + j * d] = _sum_products(
            G[first - t0 :], source.x, base + first - kept + j, t1 - first, total
        )  # fmt: skip
    totals[to + taps.width * d] = _sum_products(G, None, 0, t1 - t0, G[0] * 0)


@inner
def _sum_along_channels(G, source, base, step, sequence, t_start, t0, t1, taps, c, count, totals, to):
    """The same of `count` channels; a step of G is COLUMNS numbers."""
    kept, d, width = taps.width - 1, taps.d, lanes(G)
    for j in range(taps.width + 1):
        first = t0 if j == taps.width else min(max(t0, t_start + kept - j), t1)
        early = t0 if source.start.size else first
        for i in range(0, count, width):
            if i + width <= count:
                sums = zero(G)
                for t in range(early, first):
                    s = (sequence * kept + t - t_start + j) * d + c
                    sums = fma(load(G, (t - t0) * COLUMNS + i), load(source.start, s + i), sums)
                for t in range(first, t1):
                    g = load(G, (t - t0) * COLUMNS + i)
                    if j == taps.width:
                        sums = sums + g
                    else:
                        sums = fma(g, load(source.x, base + (t - kept + j) * step + i), sums)
                store(totals, to + j * d + i, sums)
            else:
                for k in range(i, count):
                    total = G[0] * 0
                    for t in range(early, first):
                        s = (sequence * kept + t - t_start + j) * d + c
                        total += G[(t - t0) * COLUMNS + k] * source.start[s + k]
                    for t in range(first, t1):
                        g = G[(t - t0) * COLUMNS + k]
                        total += g if j == taps.width else g * get(source.x, base + (t - kept + j) * step + k)
                    totals[to + j * d + k] = total


@compiled
def backward(counter, items, work, kind, real, places, silu, along):
    """Items as in `forward`: dx, and the chunk's sums for dweight and dbias, totals (chunk, k + 1, d).

    G holds the gradient before the activation of the item's steps and the k - 1 after them. places: x, start,
    weights, bias, weights and zeros, the gradient of y, dx, totals.
    """
    source, taps = _source_at(places, kind, real), _filter_at(places[5:], work, real)
    plain = _filter_at(places[7:], work, real)
    grad, grad_strides = array_at(places[9], 1, kind), places[10:13]
    dx, dx_strides = array_at(places[13], 1, kind), places[14:17]
    totals = array_at(places[17], 1, real)
    blocks, columns = work.blocks, work.columns
    kept, d = taps.width - 1, taps.d
    begin, back = np.int64(0), np.int64(-1)  # no literals: numba would compile a function again for each
    G = np.empty(STRETCH + kept if along is not None else (ROWS + kept) * COLUMNS, real.dtype)
    item = claim(counter)
    while item < items:
        row, sequence, t_start, t0, t1, t_end = work.chunks[item // blocks]
        c, last = item % blocks * columns, min(t1 + kept, t_end)
        count, move = min(columns, d - c), 1 if along is not None else COLUMNS
        base = row * source.strides[0] + c * source.strides[1]
        at = row * grad_strides[0] + c * grad_strides[1] + t0 * grad_strides[2]
        G[(last - t0) * move : (t1 + kept - t0) * move] = 0
        if silu is not None:
            _convolve_steps(
                source, base, source.strides[2], sequence, t_start, t0, last, taps, c, count, G, begin,
                move, None, along,
            )  # fmt: skip
        if along is not None:
            if silu is not None:
                _scale_by_slope(G, begin, grad, at, last - t0)
            else:
                _copy(G, begin, grad, at, last - t0)
        else:
            for t in range(last - t0):
                if silu is not None:
                    _scale_by_slope(G, t * move, grad, at + t * grad_strides[2], count)
                else:
                    _copy(G, t * move, grad, at + t * grad_strides[2], count)
        to = row * dx_strides[0] + c * dx_strides[1] + t0 * dx_strides[2]
        if along is not None:
            _convolve_row(G, kept, back, source.start, begin, begin, plain, c, t1 - t0, dx, to, None, along)
            where = item // blocks * (taps.width + 1) * d + c
            _sum_along_time(G, source, base, sequence, t_start, t0, t1, taps, c, totals, where)
        else:
            for t in range(t1 - t0):
                here = to + t * dx_strides[2]
                _convolve_row(
                    G, (t + kept) * move, -move, source.start, begin, begin, plain, c, count, dx, here, None,
                    along,
                )  # fmt: skip
            where = item // blocks * (taps.width + 1) * d + c
            _sum_along_channels(
                G, source, base, source.strides[2], sequence, t_start, t0, t1, taps, c, count, totals, where
            )  # fmt: skip
        item = claim(counter)


class Passes:
    """The passes of all calls that differ in values only. Packed sequences' bounds are such values, too."""

    def __init__(self, inputs: Inputs, silu: bool, reverse: bool):
        x, weight, _, _, bounds = inputs
        b, d, l = x.shape
        self.along = 1 if x.stride(2) == 1 and l > 1 else None
        self.copies = not (self.along or x.stride(1) == 1 or d == 1)
        if self.copies:
            self.along = 1
        # Kernels along time read vectors of steps, so that they need a flipped copy; the others go backwards.
        self.reverse, self.flips = reverse, reverse and bool(self.along)
        self.silu = 1 if silu else None
        self.real = torch.float64 if x.dtype == torch.float64 else torch.float32
        columns = 1 if self.along else COLUMNS
        ends = (0, l) if bounds is None else tuple(bounds.tolist())
        chunks = _cut(b, ends, STRETCH if self.along else ROWS)
        self.work = Work(chunks, -(-d // columns), columns, weight.shape[1], d)
        self.zeros = zeros(d, self.real)

    def forward(self, inputs: Inputs, y: Tensor) -> None:
        """Write the convolution of `inputs` to y."""
        out = self._output(y, inputs.x)
        places, _kept = self._places(inputs)
        self._run(forward, out, [*places, *self._place(out)])
        self._keep(out, y)

    def backward(self, grad_y: Tensor, inputs: Inputs, grads: Grads) -> None:
        """Write the gradients of `inputs` to `grads`."""
        grad, dx = self._input(grad_y, inputs.x), self._output(grads.x, inputs.x)
        work, (places, kept) = self.work, self._places(inputs)
        totals = torch.empty(len(work.chunks), work.width + 1, work.d, dtype=self.real, device="cpu")
        plain = [kept[1].data_ptr(), self.zeros.data_ptr()]
        places = [*places, *plain, *self._place(grad), *self._place(dx), totals.data_ptr()]
        self._run(backward, dx, places)
        self._keep(dx, grads.x)
        sums = totals.sum(0)
        grads.weight.copy_(sums[:-1].t())
        if grads.bias is not None:
            grads.bias.copy_(sums[-1])
        if grads.start is not None:
            x, weight, bias, start, bounds = inputs
            if self.reverse:
                x, grad_y = x.flip(2), grad_y.flip(2)
            silu = bool(self.silu)
            grads.start.copy_(reference.start_gradient(grad_y, x, weight, bias, start, bounds, silu))  # type: ignore[arg-type]

    def _run(self, kernel: Any, like: Tensor, places: list[int]) -> None:
        items = len(self.work.chunks) * self.work.blocks
        run(
            kernel, items, 4 * like.numel(), self.work, NOTHING[like.dtype], NOTHING[self.real],
            np.array(places), self.silu, self.along, types=(like.dtype, self.real, self.silu, self.along),
        )  # fmt: skip

    def _places(self, inputs: Inputs) -> tuple[list[int], tuple[Tensor, ...]]:
        """Where kernels find x, start, weights and bias; and what must be kept until they are done."""
        x, weight, bias, start, _ = inputs
        x = self._input(x, x)
        weights = weight.to(self.real).t().contiguous()
        biases = self.zeros if bias is None else bias.to(self.real).contiguous()
        starts = self.zeros[:0] if start is None else start.to(self.real).transpose(1, 2).contiguous()
        places = [*self._place(x), starts.data_ptr(), weights.data_ptr(), biases.data_ptr()]
        return places, (x, weights, biases, starts)

    def _place(self, t: Tensor) -> list[int]:
        """Address and strides, in the direction of the convolution."""
        start, (row, channel, step) = t.data_ptr(), t.stride()
        if self.reverse and not self.flips:
            start, step = start + (t.shape[2] - 1) * step * t.itemsize, -step
        return [start, row, channel, step]

    def _input(self, t: Tensor, x: Tensor) -> Tensor:
        """t in the order of the kernel, contiguous along the axis along which it reads x."""
        t = t.flip(2) if self.flips else t
        return t if self._fits(t) else self._new(x).copy_(t)

    def _output(self, t: Tensor, x: Tensor) -> Tensor:
        """Memory for what `t` is to hold; `_keep` copies it there."""
        return self._new(x) if self.flips or not self._fits(t) else t

    def _new(self, x: Tensor) -> Tensor:
        kind = torch.contiguous_format if self.copies else torch.preserve_format
        return torch.empty_like(x, memory_format=kind)

    def _keep(self, written: Tensor, t: Tensor) -> None:
        if written is not t:
            t.copy_(written.flip(2) if self.flips else written)

    def _fits(self, t: Tensor) -> bool:
        axis = 2 if self.along else 1
        return t.stride(axis) == 1 or t.shape[axis] == 1


@functools.lru_cache(64)
def _cut(b: int, ends: tuple[int, ...], size: int) -> np.ndarray:
    """Chunks of time, (row, sequence, start and first, last step, end of the sequence)."""
    found = [
        (row, row if len(ends) == 2 else k, i, t, min(t + size, j), j)
        for row in range(b)
        for k, (i, j) in enumerate(itertools.pairwise(ends))
        for t in range(i, j, size)
    ]
    return np.array(found, np.int64).reshape(-1, 6)


def forward_pass(inputs: Inputs, silu: bool, y: Tensor, reverse: bool = False) -> None:
    Passes(inputs, silu, reverse).forward(inputs, y)


def backward_pass(
    grad_y: Tensor, inputs: Inputs, silu: bool, grads: Grads, reverse: bool = False
) -> None:  # fmt: skip
    Passes(inputs, silu, reverse).backward(grad_y, inputs, grads)


causal_conv = define("conv_cpu", forward_pass, backward_pass)


def causal_conv_update(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """As `reference.causal_conv_update`: one step moves little, and torch's operators move it."""
    return reference.causal_conv_update(x, state, weight, bias, silu)
