"""The forward kernel of a coarse band, and the means of B and C over blocks."""

from typing import NamedTuple

import numpy as np

from projecta._cpu.simd import (
    BYTES,
    LOG2_E,
    address,
    array_at,
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
from projecta._cpu.threads import compiled, inner
from projecta.mrss.cpu.rows import TINY, blocks_of_tile, new_rows, read_rows, sum_rows
from projecta.scan.cpu.forward import advance_any, save_states
from projecta.scan.cpu.layout import CHUNK, steps_at, weights_at
from projecta.scan.cpu.tiles import (
    SKEW,
    TILE,
    aligned,
    clear_vectors,
    fetch_channels,
    fetch_rows,
    limits_of,
    look_ahead,
    optional,
    read,
    write,
    write_rows,
    write_steps,
)


class Band(NamedTuple):
    """What a coarse band's kernels need to know of a call besides the scan's `Work`.

    sizes: channels, blocks of channels of a sequence, period, channels with padding, blocks of a row.
    """

    sizes: np.ndarray
    rows: np.ndarray  # of each sequence
    bounds: np.ndarray  # first and last token of each sequence
    first: np.ndarray  # the first block of each sequence
    softplus: bool
    has_z: bool


@inner
def fetch_lines(ahead, count, t):
    """Prefetch a cache line of the next tile of each of `count` tensors."""
    for i in range(0, 4 * count, 4):
        prefetch(ahead[i] + (t >> ahead[i + 2]) * ahead[i + 1] + (t & ahead[i + 3]) * BYTES)


@inner
def _sum_tile(band, S, X, sums, drive, means, count, last, biases, limits, ahead, total, product, left):
    """Sums of s and s u, and means of u, of the blocks that end in a tile; `last`: the sequence ends in it.

    Returns their number, whether exponents are safe, and the sums of the block that goes on.
    """
    width, found, fits, tiny = lanes(S), 0, True, zero(S) + TINY
    for at in range(0, count * width, width):
        fetch_lines(ahead, 3, at // width)
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


@inner
def _save(saved, work, sequence, index, block, blocks, H, held, lines):
    """Save the states before chunk `index` // CHUNK of a sequence."""
    chunk = work.chunks[sequence] + index // CHUNK
    save_states(saved, (chunk * blocks + block) * held, H, held, lines)


@inner
def _fetch(weights, starts, place, channel, channels, rows, to, steady_B, steady_C):
    """What a block of channels needs of the weights, and the states that it starts from.

    rows: numbers of a channel's states, without and with padding.
    """
    rates, own_B, own_C, H, ends = to
    n, padded = rows
    fetch_rows(weights.A, channel * n, channels, n, padded, LOG2_E, LOG2_E, rates, 0)
    if steady_B is not None:
        fetch_rows(weights.B, channel * n, channels, n, padded, 1.0, 1.0, own_B, 0)
    if steady_C is not None:
        fetch_rows(weights.C, channel * n, channels, n, padded, 1.0, 1.0, own_C, 0)
    clear_vectors(H, 0, padded)
    if starts.size:
        fetch_rows(starts, place, channels, n, padded, 1.0, 1.0, H, 0)
    fetch_channels(weights.bias, channel, channels, ends, 0)
    fetch_channels(weights.D, channel, channels, ends, lanes(ends))


@inner
def _read_steps(x, row, channel, channels, t0, count, S, X, ahead):
    """delta and u of a tile, as vectors over channels; what to prefetch of the next one."""
    read(x.delta, x.delta_strides, row, channel, channels, t0, count, S, 0)
    read(x.u, x.u_strides, row, channel, channels, t0, count, X, 0)
    look_ahead(ahead, x.delta, x.delta_strides, row, channel, t0 + TILE)
    look_ahead(ahead[4:], x.u, x.u_strides, row, channel, t0 + TILE)
    look_ahead(ahead[8:], x.z, x.z_strides, row, channel, t0 + TILE)


@inner
def _keep(kept, to, stride, channels, found, means, sums, Y):
    """Write the values of a tile's blocks for the backward pass."""
    write_steps(kept[0], to, stride, channels, found, means)
    write_steps(kept[1], to, stride, channels, found, sums)
    write_steps(kept[2], to, stride, channels, found, Y)


@compiled
def forward(counter, items, band, work, kinds, places, rows, steady_B, steady_C):
    """Item i is block of channels i % blocks of sequence i // blocks, as in the scan's own kernel.

    places: steps, weights, then the states at the start and at the end and those to save, then the means of
    u, the sums of delta and the scan's outputs by block, to keep for the backward pass.
    """
    x, weights, real = steps_at(places, kinds), weights_at(places[16:], kinds), kinds.real
    starts, lasts = optional(places[21], real), array_at(places[22], 1, real)
    saved, kept = optional(places[23], real), optional(places[24], real)
    kept = kept, optional(places[25], real), optional(places[26], real)
    g, k, n_rows, n, per_group, l = work.sizes[:6]
    width, blocks, d, period = lanes(real), g * per_group, g * k, band.sizes[2]
    size = TILE if rows is None else blocks_of_tile(period, band.sizes[4])  # vectors of a tile
    tokens = TILE if rows is None else size * period
    area, held = (size + width + SKEW) * width, n * width  # rows are transposed by whole squares
    own = aligned(real, 7 * (size + width + SKEW) + 4 * n + 2)
    S, X, Z, sums, own = own[:area], own[area:], own[2 * area :], own[3 * area :], own[4 * area :]
    drive, Y, means, own = own, own[area:], own[2 * area :], own[3 * area :]
    H, rates, own_B, own_C, ends = own, own[held:], own[2 * held :], own[3 * held :], own[4 * held :]
    B, C = weights.B if steady_B is None else own_B, weights.C if steady_C is None else own_C
    own_rows, ahead = new_rows(real, tokens, size), np.zeros(16, np.int64)
    ahead[::4] = address(own, 0)  # something to prefetch
    lines, held_vectors = address(saved, 0) % BYTES == 0, (rates, own_B, own_C, H, ends)
    item = claim(counter)
    while item < items:
        sequence, block = item // blocks, item % blocks
        row, group, lane = work.sequences[sequence], block // per_group, block % per_group * width
        channel, channels = group * k + lane, min(width, k - lane)
        w, place = (row * g + group) * l * n, (sequence * d + channel) * n_rows
        _fetch(weights, starts, place, channel, channels, (n_rows, n), held_vectors, steady_B, steady_C)
        biases, skips, value, limits = load(ends, 0), load(ends, width), zero(ends), limits_of(rates, 0, n)
        total, product, left, unread = zero(ends), zero(ends), period, period
        first, index, end = work.bounds[2 * sequence], 0, band.bounds[2 * sequence + 1]
        own_rows.values[:] = 0
        for t0 in range(band.bounds[2 * sequence], end, tokens):
            count = min(tokens, end - t0)
            if rows is None:
                _read_steps(x, row, channel, channels, t0, count, S, X, ahead)
                found, fits, total, product, left = _sum_tile(
                    band, S, X, sums, drive, means, count, t0 + count == end, biases, limits, ahead, total,
                    product, left,
                )  # fmt: skip
            else:
                at = row, channel, channels, t0, count
                found, fits = sum_rows(band, x, at, ends, own_rows, sums, drive, means, limits)
            clear_vectors(Y, 0, found)
            done = 0
            while done < found:
                steps = min(CHUNK - (index + done) % CHUNK, found - done) if saved.size else found
                if saved.size and (index + done) % CHUNK == 0:
                    _save(saved, work, sequence, index + done, block, blocks, H, held, lines)
                advance_any(
                    sums, drive, Y, done, steps, rates, B, C, w + (first + index) * n, n, H, ahead, fits,
                    None, steady_B, steady_C,
                )  # fmt: skip
                done += steps
            if saved.size:
                to = (row * l + first + index) * band.sizes[3] + channel
                _keep(kept, to, band.sizes[3], channels, found, means, sums, Y)
            if rows is None:
                if band.has_z:
                    read(x.z, x.z_strides, row, channel, channels, t0, count, Z, 0)
                value, unread = _read_tile(band, X, Z, Y, S, count, skips, value, unread)
                write(x.y, x.y_strides, row, channel, channels, t0, count, S, 0)
            else:
                read_rows(band, x, (row, channel, channels, t0, count), ends, own_rows, Y, found)
            index += found
        for empty in range(index, work.bounds[2 * sequence + 1] - first):  # between packed sequences
            if saved.size and empty % CHUNK == 0:
                _save(saved, work, sequence, empty, block, blocks, H, held, lines)
        write_rows(lasts, place, channels, n_rows, H, 0)
        item = claim(counter)
    fence()


@compiled
def average(counter, items, sizes, kind_B, kind_C, real, places):
    """Means over blocks of B and C (b, g, n, l), as (b, g, blocks, padded n): the layout of the kernels.

    sizes: rows of (b, g), g, l, n, padded n, period, blocks, tiles. places: address and strides of each, of
    types `kind_B` and `kind_C`, or 0 if it is constant, and address of its means. Item i is a tile of blocks.
    """
    item = claim(counter)
    while item < items:
        if places[0]:
            _average_tile(sizes, array_at(places[0], 1, kind_B), places[1:], real, item)
        if places[6]:
            _average_tile(sizes, array_at(places[6], 1, kind_C), places[7:], real, item)
        item = claim(counter)


@inner
def _average_tile(sizes, source, places, real, item):
    g, l, n, padded, period, blocks, tiles = sizes[1:]
    row, first, target = item // tiles, item % tiles * TILE, array_at(places[4], 1, real)
    base = row // g * places[0] + row % g * places[1]
    for k in range(first, min(first + TILE, blocks)):
        start, end, to = k * period, min((k + 1) * period, l), (row * blocks + k) * padded
        for c in range(padded):
            total = 0.0
            if c < n:
                for t in range(start, end):
                    total += get(source, base + c * places[2] + t * places[3])
            target[to + c] = total / (end - start)


@compiled
def spread(counter, items, sizes, real, places):
    """Rows of numbers by block, to rows by token, as `average` divides them.

    sizes: rows of a batch, numbers from batch to batch, tokens, period, and whether to add. places: addresses
    of the source, which is dense, and of the target.
    """
    source, target = array_at(places[0], 1, real), array_at(places[1], 1, real)
    rows, stride, l, period, add = sizes
    blocks = -(-l // period)
    item = claim(counter)
    while item < items:
        base = item // rows * stride + item % rows * l
        for k in range(blocks):
            start, end = k * period, min((k + 1) * period, l)
            each = source[item * blocks + k] / (end - start)
            for t in range(base + start, base + end):
                target[t] = target[t] + each if add else each
        item = claim(counter)
