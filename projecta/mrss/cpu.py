"""MRSS on the CPU as one operator: sums over blocks, the scan's kernels, and the way back to tokens.

A coarse band takes one pass over u, delta, z and y: a tile of tokens is summed over its blocks, the scan's
own loop advances the states by these, and the tile's y is written. With gradients the values of each block
are kept. The backward pass goes from tokens to blocks, through the scan's kernel, and back to tokens.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from projecta._cpu.memory import flat, in_large_pages, memory, round_up
from projecta._cpu.simd import (
    BYTES,
    LOG2_E,
    address,
    claim,
    fence,
    fma,
    get,
    lanes,
    load,
    magnitude_below,
    prefetch,
    sigmoid,
    softplus_and_slope,
    store,
    zero,
)
from projecta._cpu.threads import compiled, inner, run
from projecta.mrss.reference import block_means, cut_blocks
from projecta.scan._operator import Inputs
from projecta.scan.cpu import launch as scan
from projecta.scan.cpu.forward import States, advance_any, save_states
from projecta.scan.cpu.layout import CHUNK, UNROLL, Layout, Steps, Weights, saved_shape
from projecta.scan.cpu.tiles import (
    SKEW,
    TILE,
    clear_vectors,
    fetch_channels,
    fetch_rows,
    limits_of,
    look_ahead,
    read,
    write,
    write_rows,
    write_steps,
)  # fmt: skip

NAME = "cpu"


class Band(NamedTuple):
    """The work items of the kernels: blocks of channels of sequences, and a workspace of each thread."""

    sizes: np.ndarray  # channels, items per sequence, period, channels with padding, blocks of a row
    rows: np.ndarray
    bounds: np.ndarray
    first: np.ndarray  # the first block of each sequence
    softplus: bool
    has_z: bool
    workspace: np.ndarray
    looks: np.ndarray  # prefetch addresses of each thread


class Blocks(NamedTuple):
    """Values of each block of tokens and channel: mean of u, sum of delta, output of the scan."""

    u: np.ndarray
    delta: np.ndarray
    y: np.ndarray


@inner
def _item(band, item, width):
    """Row, first step, end, channel, channels, and the place of the first block of an item."""
    sizes = band.sizes
    sequence, channel = item // sizes[1], item % sizes[1] * width
    row = band.rows[sequence]
    place = (row * sizes[4] + band.first[sequence]) * sizes[3] + channel
    return row, band.bounds[2 * sequence], band.bounds[2 * sequence + 1], channel, place


@inner
def _fetch(ahead, count, t):
    """Prefetch a cache line of the next tile of each of `count` tensors."""
    for i in range(0, 4 * count, 4):
        prefetch(ahead[i] + (t >> ahead[i + 2]) * ahead[i + 1] + (t & ahead[i + 3]) * BYTES)


@inner
def _sum_tile(band, S, X, sums, drive, means, count, last, biases, limits, ahead, total, product, left):
    """Sums of s and s u, and means of u, of the blocks that end in a tile; `last`: the sequence ends in it.

    Returns their number, whether exponents are safe, and the sums of the block that goes on.
    """
    width, found, fits, tiny = lanes(S), 0, True, zero(S) + 1.2e-38
    for at in range(0, count * width, width):
        _fetch(ahead, 3, at // width)
        s = load(S, at) + biases
        if band.softplus:
            s, _ = softplus_and_slope(s)
        total, product, left = total + s, fma(s, load(X, at), product), left - 1
        if left == 0 or (last and at // width + 1 == count):
            fits = fits and magnitude_below(total, limits)
            store(sums, found * width, total)
            store(drive, found * width, product)
            store(means, found * width, product / (total + tiny))
            total, product, left, found = zero(S), zero(S), band.sizes[2], found + 1
    return found, fits, total, product, left


@inner
def _read_tile(band, X, Z, Y, out, count, skips, value, unread):
    """y of a tile's tokens, which read `value`. Returns it and the tokens left in the present block."""
    width, done = lanes(X), 0
    for at in range(0, count * width, width):
        y = fma(skips, load(X, at), value)
        if band.has_z:
            gate = load(Z, at)
            y = y * gate * sigmoid(gate)
        store(out, at, y)
        unread -= 1
        if unread == 0:
            value, unread, done = load(Y, done * width), band.sizes[2], done + 1
    return value, unread


@compiled
def forward(counter, items, band, x, work, blocks, weights, states, keep, steady_B, steady_C):
    """Sums over blocks, the scan of the blocks, and y: one pass over u, delta and z, by tiles.

    `blocks` are the means of u, the sums of delta and the scan's outputs by block, which `keep` writes. Item
    i is block of channels i % (g per_group) of sequence i // (g per_group), as in the scan's own kernel.
    """
    sizes, saved, period = work.sizes, states.saved, band.sizes[2]
    g, k, rows, n, per_group, l = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]
    width, each, d = lanes(weights.bias), g * per_group, g * k
    area, held = (TILE + SKEW) * width, n * width
    thread = claim(counter[1:])
    own = band.workspace[thread * workspace_vectors(n) * width :]
    ahead = band.looks[16 * thread :]
    S, X, Z, sums, own = own[:area], own[area:], own[2 * area :], own[3 * area :], own[4 * area :]
    drive, Y, means, own = own, own[area:], own[2 * area :], own[3 * area :]
    H, rates, own_B, own_C, ends = own, own[held:], own[2 * held :], own[3 * held :], own[4 * held :]
    B, C = weights.B if steady_B is None else own_B, weights.C if steady_C is None else own_C
    save, lines = saved.size > 0, address(saved, 0) % BYTES == 0
    item = claim(counter)
    while item < items:
        sequence, block = item // each, item % each
        row, group, lane = work.sequences[sequence], block // per_group, block % per_group * width
        channel, channels = group * k + lane, min(width, k - lane)
        w, place = (row * g + group) * l * n, (sequence * d + channel) * rows
        fetch_rows(weights.A, channel * rows, channels, rows, n, LOG2_E, LOG2_E, rates, 0)
        if steady_B is not None:
            fetch_rows(weights.B, channel * rows, channels, rows, n, 1.0, 1.0, own_B, 0)
        if steady_C is not None:
            fetch_rows(weights.C, channel * rows, channels, rows, n, 1.0, 1.0, own_C, 0)
        clear_vectors(H, 0, n)
        if states.start.size:
            fetch_rows(states.start, place, channels, rows, n, 1.0, 1.0, H, 0)
        fetch_channels(weights.bias, channel, channels, ends, 0)
        fetch_channels(weights.D, channel, channels, ends, width)
        biases, skips, value, limits = load(ends, 0), load(ends, width), zero(ends), limits_of(rates, 0, n)
        total, product, left, unread = zero(ends), zero(ends), period, period
        start, end = band.bounds[2 * sequence], band.bounds[2 * sequence + 1]
        first, index = work.bounds[2 * sequence], 0
        for t0 in range(start, end, TILE):
            count = min(TILE, end - t0)
            read(x.delta, x.delta_strides, row, channel, channels, t0, count, S, 0)
            read(x.u, x.u_strides, row, channel, channels, t0, count, X, 0)
            look_ahead(ahead, x.delta, x.delta_strides, row, channel, t0 + TILE)
            look_ahead(ahead[4:], x.u, x.u_strides, row, channel, t0 + TILE)
            look_ahead(ahead[8:], x.z, x.z_strides, row, channel, t0 + TILE)
            found, fits, total, product, left = _sum_tile(
                band, S, X, sums, drive, means, count, t0 + count == end, biases, limits, ahead, total,
                product, left,
            )  # fmt: skip
            clear_vectors(Y, 0, found)
            done = 0
            while done < found:
                steps = min(CHUNK - (index + done) % CHUNK, found - done)
                if save and (index + done) % CHUNK == 0:
                    chunk = work.chunks[sequence] + (index + done) // CHUNK
                    save_states(saved, (chunk * each + block) * held, H, held, lines)
                advance_any(
                    sums, drive, Y, done, steps, rates, B, C, w + (first + index) * n, n, H, ahead, fits,
                    None, steady_B, steady_C,
                )  # fmt: skip
                done += steps
            if keep:
                to = (row * l + first + index) * band.sizes[3] + channel
                write_steps(blocks.u, to, band.sizes[3], channels, found, means)
                write_steps(blocks.delta, to, band.sizes[3], channels, found, sums)
                write_steps(blocks.y, to, band.sizes[3], channels, found, Y)
            if band.has_z:
                read(x.z, x.z_strides, row, channel, channels, t0, count, Z, 0)
            value, unread = _read_tile(band, X, Z, Y, S, count, skips, value, unread)
            write(x.y, x.y_strides, row, channel, channels, t0, count, S, 0)
            index += found
        for empty in range(index, work.bounds[2 * sequence + 1] - first):  # between packed sequences
            if save and empty % CHUNK == 0:
                chunk = work.chunks[sequence] + empty // CHUNK
                save_states(saved, (chunk * each + block) * held, H, held, lines)
        write_rows(states.last, place, channels, rows, H, 0)
        item = claim(counter)
    fence()


@compiled
def average(counter, items, sizes, source, strides, target):
    """Means over blocks of (b, g, n, l) with `strides`, as (b, g, blocks, n).

    sizes: g, l, n, period, blocks, tiles. Item i is tile i % tiles of blocks of row i // tiles of (b, g).
    """
    g, l, n, period, blocks, tiles = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]
    item = claim(counter)
    while item < items:
        row, first = item // tiles, item % tiles * TILE
        base = row // g * strides[0] + row % g * strides[1]
        for k in range(first, min(first + TILE, blocks)):
            start, end = k * period, min((k + 1) * period, l)
            for c in range(n):
                at, total = base + c * strides[2], 0.0
                for t in range(start, end):
                    total += get(source, at + t * strides[3])
                target[(row * blocks + k) * n + c] = total / (end - start)
        item = claim(counter)


@inner
def workspace_vectors(n):
    """Workspace of a thread, in vectors: tiles of tokens and of blocks, and states."""
    return 7 * (TILE + SKEW) + 4 * n + 3


@compiled
def expand_back(counter, items, band, x, D, blocks, dz, dz_strides, dblocks, dD):
    """The gradients of z, of the blocks' values and of D; x.y is the gradient of y."""
    width, period, padded = lanes(D), band.sizes[2], band.sizes[3]
    area = (TILE + SKEW) * width
    thread = claim(counter[1:])
    own, ahead = band.workspace[thread * workspace_vectors(0) * width :], band.looks[16 * thread :]
    X, Z, G = own, own[area:], own[2 * area :]
    item = claim(counter)
    while item < items:
        row, start, end, channel, place = _item(band, item, width)
        channels, left, begin = min(width, band.sizes[0] - channel), period, place
        skips, held, sent, skipped = load(D, channel), zero(D), zero(D), zero(D)
        for t0 in range(start, end, TILE):
            count = min(TILE, end - t0)
            read(x.u, x.u_strides, row, channel, channels, t0, count, X, 0)
            read(x.y, x.y_strides, row, channel, channels, t0, count, G, 0)
            if band.has_z:
                read(x.z, x.z_strides, row, channel, channels, t0, count, Z, 0)
            look_ahead(ahead, x.u, x.u_strides, row, channel, t0 + TILE)
            look_ahead(ahead[4:], x.y, x.y_strides, row, channel, t0 + TILE)
            look_ahead(ahead[8:], x.z, x.z_strides, row, channel, t0 + TILE)
            for at in range(0, count * width, width):
                _fetch(ahead, 3, at // width)
                grad, u = load(G, at), load(X, at)
                if band.has_z:
                    gate = load(Z, at)
                    slope = sigmoid(gate)
                    store(Z, at, grad * fma(skips, u, held) * slope * (1.0 + gate * (1.0 - slope)))
                    grad = grad * gate * slope
                sent, skipped, left = sent + grad, fma(grad, u, skipped), left - 1
                if left == 0 or t0 + at // width + 1 == end:
                    if place > begin:
                        store(dblocks, place - padded, sent)
                    store(dblocks, place, zero(D))  # the last block's value is not read
                    held, sent, left, place = load(blocks, place), zero(D), period, place + padded
            if band.has_z:
                write(dz, dz_strides, row, channel, channels, t0, count, Z, 0)
        store(dD, item // band.sizes[1] * padded + channel, skipped)
        item = claim(counter)
    fence()


@compiled
def pool_back(counter, items, band, x, D, bias, means, spans, dmeans, dspans, du, ddelta, strides, dbias):
    """The gradients of u, delta and the bias; x.y is the gradient of y, du and ddelta have `strides`."""
    width, period, padded = lanes(bias), band.sizes[2], band.sizes[3]
    area = (TILE + SKEW) * width
    thread = claim(counter[1:])
    own, ahead = band.workspace[thread * workspace_vectors(0) * width :], band.looks[16 * thread :]
    S, X, Z, G = own, own[area:], own[2 * area :], own[3 * area :]
    tiny = zero(bias) + 1.2e-38
    item = claim(counter)
    while item < items:
        row, start, end, channel, place = _item(band, item, width)
        channels, left = min(width, band.sizes[0] - channel), 0
        biases, skips, total = load(bias, channel), load(D, channel), zero(bias)
        by_u, by_s = zero(bias), zero(bias)
        for t0 in range(start, end, TILE):
            count = min(TILE, end - t0)
            read(x.delta, x.delta_strides, row, channel, channels, t0, count, S, 0)
            read(x.u, x.u_strides, row, channel, channels, t0, count, X, 0)
            read(x.y, x.y_strides, row, channel, channels, t0, count, G, 0)
            if band.has_z:
                read(x.z, x.z_strides, row, channel, channels, t0, count, Z, 0)
            look_ahead(ahead, x.delta, x.delta_strides, row, channel, t0 + TILE)
            look_ahead(ahead[4:], x.u, x.u_strides, row, channel, t0 + TILE)
            look_ahead(ahead[8:], x.y, x.y_strides, row, channel, t0 + TILE)
            look_ahead(ahead[12:], x.z, x.z_strides, row, channel, t0 + TILE)
            for at in range(0, count * width, width):
                _fetch(ahead, 4, at // width)
                if left == 0:
                    by_u = load(dmeans, place) / (load(spans, place) + tiny)
                    by_s = load(dspans, place) - by_u * load(means, place)
                    left, place = period, place + padded
                left -= 1
                s, grad, u = load(S, at) + biases, load(G, at), load(X, at)
                if band.has_z:
                    gate = load(Z, at)
                    grad = grad * gate * sigmoid(gate)
                change = fma(by_u, u, by_s)
                if band.softplus:
                    s, slope = softplus_and_slope(s)
                    change = change * slope
                total = total + change
                store(X, at, fma(by_u, s, skips * grad))
                store(S, at, change)
            write(du, strides[:3], row, channel, channels, t0, count, X, 0)
            write(ddelta, strides[3:], row, channel, channels, t0, count, S, 0)
        store(dbias, item // band.sizes[1] * padded + channel, total)
        item = claim(counter)
    fence()


class Coarse:
    """One coarse band of a call."""

    def __init__(self, inputs: Inputs, softplus: bool, period: int):
        u, A, B, C, z, bounds = inputs.u, inputs.A, inputs.B, inputs.C, inputs.z, inputs.cu_seqlens
        self.inputs, self.softplus, self.real = inputs, softplus, A.dtype
        b, self.d, self.l = u.shape
        self.width = BYTES // A.dtype.itemsize
        self.padded = round_up(self.d, self.width)
        self.blocks = cut_blocks(self.l, period, bounds, u.device)
        if bounds is None:
            rows, ends, first = np.arange(b), np.array([0, self.l] * b), np.zeros(b, np.int64)
        else:
            ends = bounds.numpy().astype(np.int64)
            first, rows = self.blocks.bounds[:-1].numpy().astype(np.int64), np.zeros(len(ends) - 1, np.int64)  # type: ignore[index]
            ends = np.stack([ends[:-1], ends[1:]], 1).ravel()
        self.sequences, each = len(rows), self.padded // self.width
        sizes = np.array([self.d, each, period, self.padded, self.blocks.number])
        vectors = workspace_vectors.py_func(round_up(A.shape[1], UNROLL))
        workspace = torch.empty(torch.get_num_threads() * vectors * self.width, dtype=self.real, device="cpu")
        self.items = self.sequences * each
        looks = np.zeros(16 * torch.get_num_threads(), np.int64)
        self.band = Band(sizes, rows, ends, first, softplus, z is not None, flat(workspace), looks)
        self.B, self.C = (self.means(t) for t in (B, C))

    def means(self, t: Tensor) -> Tensor:
        """`block_means` of B or C."""
        if t.dim() == 2 or self.blocks.bounds is not None:
            return block_means(t, self.blocks, self.real)
        b, g, n, l = t.shape
        number = self.blocks.number
        tiles = -(-number // TILE)
        found = torch.empty(b, g, number, n, dtype=self.real, device="cpu")
        sizes = np.array([g, l, n, self.blocks.period, number, tiles])
        run(average, b * g * tiles, t.numel(), sizes, *memory(t), flat(found), types=(t.dtype, self.real))
        return found.transpose(2, 3)

    def new(self) -> Tensor:
        """A value of each block and channel, as (b, d, blocks): a view of (b, blocks, padded)."""
        fill = torch.empty if self.blocks.bounds is None else torch.zeros  # packed: empty blocks between
        whole = fill(len(self.inputs.u), self.blocks.number, self.padded, dtype=self.real, device="cpu")
        return whole[..., : self.d].transpose(1, 2)

    def channels(self, t: Tensor | None) -> np.ndarray:
        whole = torch.zeros(self.padded, dtype=self.real, device="cpu")
        if t is not None:
            whole[: self.d] = t
        return flat(whole)

    def tokens(self, y: Tensor) -> Steps:
        u, delta, z = self.inputs.u, self.inputs.delta, self.inputs.z
        return Steps(*memory(u), *memory(delta), *memory(u if z is None else z), *memory(y))

    def run(self, kernel: Any, *arguments: Any) -> None:
        run(kernel, self.items, self.inputs.u.numel(), self.band, *arguments)

    def scan(self, x: Tensor, span: Tensor) -> Inputs:
        start = self.inputs.initial_state
        return Inputs(x, span, self.inputs.A, self.B, self.C, None, None, None, start, self.blocks.bounds)

    def forward(self, y: Tensor, last: Tensor, save: bool) -> list[Tensor]:
        x, span, blocks = self.new(), self.new(), self.new()
        own, start = self.scan(x, span), self.inputs.initial_state
        layout = Layout(own, False)
        saved = x.new_empty(saved_shape(own, self.sequences, 8) if save else 0)
        weights = layout.weights(own._replace(D=self.inputs.D, delta_bias=self.inputs.delta_bias))
        none = saved[:0]
        states = States(
            flat(none), flat(none if start is None else start.contiguous()), flat(last), flat(saved)
        )
        kept = Blocks(_whole(x), _whole(span), _whole(blocks))
        run(
            forward, layout.sequences * layout.blocks, self.inputs.u.numel() * 4, self.band,
            self.tokens(y), layout.work, kept, Weights(*map(flat, weights)), states, save,
            *layout.variant[1:],
        )  # fmt: skip
        return [saved, x, span, blocks]

    def backward(self, grad_y: Tensor, grad_last: Tensor, kept: list[Tensor], grads: Inputs) -> tuple:
        """Write the gradients; return those of B and C by block, for `spread`."""
        saved, x, span, blocks = kept
        tokens, D = self.tokens(grad_y), self.channels(self.inputs.D)
        dblocks, dx, dspan = self.new(), self.new(), self.new()
        sums = torch.empty(2, self.sequences, self.padded, dtype=self.real, device="cpu")
        dz = grads.u if grads.z is None else grads.z
        self.run(expand_back, tokens, D, _whole(blocks), *memory(dz), _whole(dblocks), flat(sums[0]))
        own = self.scan(x, span)
        dB, dC = torch.empty_like(self.B), torch.empty_like(self.C)
        scan.backward_pass(
            dblocks, grad_last, saved, own, False,
            Inputs(dx, dspan, grads.A, dB, dC, None, None, None, grads.initial_state),
        )  # fmt: skip
        strides = np.concatenate([grads.u.stride(), grads.delta.stride()])
        self.run(
            pool_back, tokens, D, self.channels(self.inputs.delta_bias), _whole(x), _whole(span), _whole(dx),
            _whole(dspan), memory(grads.u)[0], memory(grads.delta)[0], strides, flat(sums[1]),
        )  # fmt: skip
        for grad, each in ((grads.D, sums[0]), (grads.delta_bias, sums[1])):
            if grad is not None:
                grad.copy_(each[:, : self.d].sum(0))
        return dB, dC

    def spread(self, name: str, gradient: Tensor, to: Tensor, add: bool) -> None:
        """Write the gradient of B or C (`name`) by block to that by token, or add it."""
        if to.dim() == 4:
            gradient = (gradient / self.blocks.sizes.to(self.real))[..., self.blocks.of]
        if add:
            to.add_(gradient)
        else:
            to.copy_(gradient)


def _whole(t: Tensor) -> np.ndarray:
    """The memory of a tensor from `Coarse.new`, with its padding."""
    return flat(t.as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,)))


def takes(inputs: Inputs) -> bool:
    return True


def new_like(t: Tensor) -> Tensor:
    new = torch.empty_like(t)
    in_large_pages(new)
    return new


def may_run_beside(u: Tensor) -> bool:
    return False  # each band takes all threads
