"""Coarse bands whose memory is contiguous in time: tokens are summed and read along their own rows.

A tile is a whole number of blocks, of one channel after the other. Only values of blocks are transposed to
vectors over channels, which the scan needs.
"""

from typing import NamedTuple

import numpy as np

from projecta._cpu.shuffles import pair_copies, pair_sums, sum_lanes, transpose
from projecta._cpu.simd import (
    BYTES,
    address,
    fma,
    get,
    lanes,
    load,
    magnitude_below,
    prefetch,
    put,
    sigmoid,
    softplus_and_slope,
    splat,
    store,
    store_past_cache,
    zero,
)
from projecta._cpu.threads import inner
from projecta.scan.cpu.tiles import aligned

TOKENS, BLOCKS = 2048, 256  # of a tile, about: rows are long, for the hardware prefetches along them
AHEAD = 512  # tokens between what is read and what is prefetched: the hardware stops at each page
TINY = 1.2e-38  # a mean over a block whose steps are all 0 is 0
FIRST = 16  # place of a tile's first block in its row; the block before it is kept, too


class Rows(NamedTuple):
    """Memory for a tile: S and P for a row of tokens, the next three for rows of blocks of all channels."""

    S: np.ndarray
    P: np.ndarray
    sums: np.ndarray
    products: np.ndarray
    values: np.ndarray
    vectors: np.ndarray  # over channels, one for each block
    spare: np.ndarray  # pairs of vectors for the last tokens of a row
    stride: int  # from row to row of blocks


@inner
def blocks_of_tile(period, blocks):
    """Blocks of a tile of a row that has so many."""
    return max(1, min(BLOCKS, TOKENS // period, blocks))


@inner
def new_rows(like, tokens, blocks):
    """Memory for tiles of so many tokens and blocks."""
    width = lanes(like)
    row, stride = (-(-tokens // width) + 4) * width, (-(-blocks // width) + 2) * width
    vectors, area = (blocks + width) * width, stride * width
    own = aligned(like, (2 * row + vectors) // width + 3 * stride + 14)
    S, P, own = own[:row], own[row:], own[2 * row :]
    vectors, sums, own = own[:vectors], own[vectors : vectors + area], own[vectors + area :]
    sums[:], own[:] = 0, 0  # a block of fewer channels than lanes leaves rows as they are
    return Rows(S, P, sums, own[:area], own[area : 2 * area], vectors, own[2 * area :], stride)


@inner
def at_token(strides, row, channel, t):
    """The place of a token in memory that is contiguous in time."""
    return row * strides[0] + channel * strides[1] + t


@inner
def copy_in(source, at, count, target):
    """`count` numbers to `target`, filled up with zeros to two vectors."""
    store(target, 0, zero(target))
    store(target, lanes(target), zero(target))
    for i in range(count):
        put(target, i, get(source, at + i))


@inner
def copy_out(source, target, at, count):
    for i in range(count):
        put(target, at + i, get(source, i))


@inner
def are_lines(target, at, width):
    """Whether vectors from target[at:] on are aligned cache lines."""
    return address(target, at) % BYTES == 0 and target.itemsize * width == BYTES


@inner
def put_vector(target, at, value, lines):
    """Store a vector; past the cache if it is a cache line."""
    if lines:
        store_past_cache(target, at, value)
    else:
        store(target, at, value)


@inner
def put_pair(row, t, first, second, period):
    """Two vectors of tokens at row[t:], or their sums by pairs if blocks have pairs."""
    if period & 1:
        store(row, t, first)
        store(row, t + lanes(row), second)
    else:
        store(row, t // 2, pair_sums(first, second))


@inner
def get_pair(row, t, period):
    """What two vectors of tokens from t on read, as `spread_blocks` has left it; as `put_pair`, but back."""
    if period & 1:
        return load(row, t), load(row, t + lanes(row))
    return pair_copies(load(row, t // 2))


@inner
def copy_pair(row, t, period, target):
    """`get_pair` as two vectors at the start of `target`."""
    first, second = get_pair(row, t, period)
    store(target, 0, first)
    store(target, lanes(row), second)


@inner
def sum_blocks(row, count, period, sums, at):
    """sums[at + k] = the sum of block k of a row of `count` tokens, which `put_pair` has written.

    The row is overwritten.
    """
    width, parts, size = lanes(row), period, count
    if period & 1 == 0:
        parts, size = period // 2, (count + 1) // 2
        vectors = -(-size // width)
        while parts & 1 == 0 and period // parts < width:
            store(row, vectors * width, zero(row))
            vectors = (vectors + 1) // 2
            for i in range(0, vectors * width, width):
                store(row, i, pair_sums(load(row, 2 * i), load(row, 2 * i + width)))
            parts, size = parts // 2, (size + 1) // 2
    if parts == 1:
        for i in range(0, size, width):
            store(sums, at + i, load(row, i))
        return
    for k in range(-(-size // parts)):
        total = row[k * parts]
        for i in range(k * parts + 1, min((k + 1) * parts, size)):
            total += row[i]
        sums[at + k] = total


@inner
def spread_blocks(values, at, count, period, row):
    """Prepare `get_pair` for a row of `count` tokens, whose block k reads values[at + k]."""
    width, parts, copies, size = lanes(row), period, 1, -(-count // period)
    while parts & 1 == 0 and copies < width:
        parts, copies = parts // 2, 2 * copies
    if parts > 1:
        for k in range(size):
            value = splat(values, at + k)
            for t in range(k * parts, (k + 1) * parts, width):
                store(row, t, value)
    else:
        for i in range(0, size, width):
            store(row, i, load(values, at + i))
    size *= parts
    while copies > 2:
        for i in range((size - 1) // width * width, -1, -width):
            low, high = pair_copies(load(row, i))
            store(row, 2 * i, low)
            store(row, 2 * i + width, high)
        copies, size = copies // 2, 2 * size


@inner
def _pool_pairs(delta, at, u, at_u, count, bias, softplus, S, P, period):
    """s and s u of `count` tokens, whole pairs of vectors, by `put_pair`."""
    width = lanes(S)
    for t in range(0, count, 2 * width):
        for i in range(t, t + 2 * width, width):
            prefetch(address(delta, at + i + AHEAD))
            prefetch(address(u, at_u + i + AHEAD))
        s, s2 = load(delta, at + t) + bias, load(delta, at + t + width) + bias
        if softplus:
            s, _ = softplus_and_slope(s)
            s2, _ = softplus_and_slope(s2)
        put_pair(S, t, s, s2, period)
        put_pair(P, t, s * load(u, at_u + t), s2 * load(u, at_u + t + width), period)


@inner
def _pool_row(delta, at, u, at_u, count, bias, softplus, rows, period):
    """The same of any number of tokens; those that fill up a pair are 0."""
    S, P, spare, width = rows.S, rows.P, rows.spare, lanes(rows.S)
    whole = count // (2 * width) * 2 * width
    _pool_pairs(delta, at, u, at_u, whole, bias, softplus, S, P, period)
    if whole < count:
        s, x, p = spare, spare[2 * width :], spare[4 * width :]
        copy_in(delta, at + whole, count - whole, s)
        copy_in(u, at_u + whole, count - whole, x)
        _pool_pairs(s, 0, x, 0, 2 * width, bias, softplus, s, p, 1)
        for i in range(count - whole, 2 * width):
            s[i], p[i] = 0.0, 0.0
        put_pair(S, whole, load(s, 0), load(s, width), period)
        put_pair(P, whole, load(p, 0), load(p, width), period)


@inner
def _read_pairs(u, at_u, z, at_z, has_z, y, at_y, count, skip, values, period, lines):
    """y of `count` tokens, whole pairs of vectors, which read `values`."""
    width = lanes(values)
    for t in range(0, count, 2 * width):
        for i in range(t, t + 2 * width, width):
            prefetch(address(z, at_z + i + AHEAD))
        y1, y2 = get_pair(values, t, period)
        y1, y2 = fma(skip, load(u, at_u + t), y1), fma(skip, load(u, at_u + t + width), y2)
        if has_z:
            gate, gate2 = load(z, at_z + t), load(z, at_z + t + width)
            y1, y2 = y1 * gate * sigmoid(gate), y2 * gate2 * sigmoid(gate2)
        put_vector(y, at_y + t, y1, lines)
        put_vector(y, at_y + t + width, y2, lines)


@inner
def _read_row(u, at_u, z, at_z, has_z, y, at_y, count, skip, rows, period):
    """The same of any number of tokens."""
    spare, width = rows.spare, lanes(rows.S)
    lines = are_lines(y, at_y, width)
    whole = count // (2 * width) * 2 * width
    _read_pairs(u, at_u, z, at_z, has_z, y, at_y, whole, skip, rows.S, period, lines)
    if whole < count:
        x, gate, value = spare, spare[2 * width :], spare[4 * width :]
        copy_in(u, at_u + whole, count - whole, x)
        copy_in(z, at_z + whole, count - whole, gate)
        copy_pair(rows.S, whole, period, value)
        _read_pairs(x, 0, gate, 0, has_z, x, 0, 2 * width, skip, value, 1, False)
        copy_out(x, y, at_y + whole, count - whole)


@inner
def sum_rows(band, x, at, ends, rows, sums, drive, means, limits):
    """Sums of s and s u, and means of u, of the blocks of a tile.

    Returns their number, and whether exponents are safe.
    """
    row, channel, channels, t0, count = at
    period, width, tiny = band.sizes[2], lanes(sums), zero(sums) + TINY
    found = -(-count // period)
    for c in range(channels):
        at_delta, at_u = (
            at_token(x.delta_strides, row, channel + c, t0),
            at_token(x.u_strides, row, channel + c, t0),
        )
        _pool_row(x.delta, at_delta, x.u, at_u, count, splat(ends, c), band.softplus, rows, period)
        sum_blocks(rows.S, count, period, rows.sums, c * rows.stride)
        sum_blocks(rows.P, count, period, rows.products, c * rows.stride)
    fits = True
    for k in range(0, found, width):
        transpose(rows.sums, k, rows.stride, sums, k * width, width)
        transpose(rows.products, k, rows.stride, drive, k * width, width)
    for at in range(0, found * width, width):
        total = load(sums, at)
        fits = fits and magnitude_below(total, limits)
        store(means, at, load(drive, at) / (total + tiny))
    return found, fits


@inner
def read_rows(band, x, at, ends, rows, Y, found):
    """y of a tile's tokens from the values of its blocks."""
    row, channel, channels, t0, count = at
    width, period = lanes(Y), band.sizes[2]
    for k in range(0, found, width):
        transpose(Y, k * width, width, rows.values, FIRST + k, rows.stride)
    for c in range(channels):
        at_u, at_z = at_token(x.u_strides, row, channel + c, t0), at_token(x.z_strides, row, channel + c, t0)
        at_y, skip = at_token(x.y_strides, row, channel + c, t0), splat(ends, width + c)
        before = c * rows.stride + FIRST - 1
        spread_blocks(rows.values, before, count, period, rows.S)
        _read_row(x.u, at_u, x.z, at_z, band.has_z, x.y, at_y, count, skip, rows, period)
        rows.values[before] = rows.values[before + found]


@inner
def _expand_pairs(u, at_u, z, at_z, has_z, g, at_g, dz, at_dz, count, skip, values, S, period, lines, total):
    """dz and, by `put_pair`, the gradients of what `count` tokens read. Returns `total`, D's gradient."""
    width = lanes(S)
    for t in range(0, count, 2 * width):
        for i in range(t, t + 2 * width, width):
            prefetch(address(z, at_z + i + AHEAD))
            prefetch(address(g, at_g + i + AHEAD))
            prefetch(address(u, at_u + i + AHEAD))
        v1, v2 = get_pair(values, t, period)
        u1, u2 = load(u, at_u + t), load(u, at_u + t + width)
        g1, g2 = load(g, at_g + t), load(g, at_g + t + width)
        if has_z:
            z1, z2 = load(z, at_z + t), load(z, at_z + t + width)
            s1, s2 = sigmoid(z1), sigmoid(z2)
            put_vector(dz, at_dz + t, g1 * fma(skip, u1, v1) * s1 * (1.0 + z1 * (1.0 - s1)), lines)
            put_vector(dz, at_dz + t + width, g2 * fma(skip, u2, v2) * s2 * (1.0 + z2 * (1.0 - s2)), lines)
            g1, g2 = g1 * z1 * s1, g2 * z2 * s2
        total = fma(g2, u2, fma(g1, u1, total))
        put_pair(S, t, g1, g2, period)
    return total


@inner
def _expand_row(u, at_u, z, at_z, has_z, g, at_g, dz, at_dz, count, skip, rows, period):
    """The same of any number of tokens; those that fill up a pair are 0. Returns the gradient of D."""
    spare, width = rows.spare, lanes(rows.S)
    pair, total = 2 * width, zero(rows.S)
    whole, lines = count // pair * pair, are_lines(dz, at_dz, width)
    total = _expand_pairs(
        u, at_u, z, at_z, has_z, g, at_g, dz, at_dz, whole, skip, rows.P, rows.S, period, lines, total
    )
    if whole < count:
        x, gate, grad, value = spare, spare[pair:], spare[2 * pair :], spare[3 * pair :]
        copy_in(u, at_u + whole, count - whole, x)
        copy_in(z, at_z + whole, count - whole, gate)
        copy_in(g, at_g + whole, count - whole, grad)
        copy_pair(rows.P, whole, period, value)
        sent = spare[4 * pair :]
        total = _expand_pairs(
            x, 0, gate, 0, has_z, grad, 0, gate, 0, pair, skip, value, sent, 1, False, total
        )
        if has_z:
            copy_out(gate, dz, at_dz + whole, count - whole)
        put_pair(rows.S, whole, load(sent, 0), load(sent, width), period)
    return sum_lanes(total)


@inner
def expand_rows(band, x, at, ends, rows, dz, dz_strides, blocks, dblocks, begin, place):
    """The gradients of z and of blocks from those of a tile's tokens; that of D is added to `ends`.

    place: of the tile's first block; returns that of the next tile's.
    """
    row, channel, channels, t0, count = at
    width, period, padded, vectors = lanes(ends), band.sizes[2], band.sizes[3], rows.vectors
    found = -(-count // period)
    for k in range(found):
        store(vectors, k * width, load(blocks, place + k * padded))
    for k in range(0, found, width):
        transpose(vectors, k * width, width, rows.values, FIRST + k, rows.stride)
    for c in range(channels):
        at_u, at_z = at_token(x.u_strides, row, channel + c, t0), at_token(x.z_strides, row, channel + c, t0)
        at_g, at_dz = at_token(x.y_strides, row, channel + c, t0), at_token(dz_strides, row, channel + c, t0)
        before = c * rows.stride + FIRST - 1
        spread_blocks(rows.values, before, count, period, rows.P)
        ends[width + c] += _expand_row(
            x.u, at_u, x.z, at_z, band.has_z, x.y, at_g, dz, at_dz, count, splat(ends, c), rows, period
        )
        sum_blocks(rows.S, count, period, rows.sums, c * rows.stride)
        rows.values[before] = rows.values[before + found]
    for k in range(0, found, width):
        transpose(rows.sums, k, rows.stride, vectors, k * width, width)
    for k in range(found):  # a block's value is read by the next one, the last block's is not
        if place + k * padded > begin:
            store(dblocks, place + (k - 1) * padded, load(vectors, k * width))
    place += found * padded
    store(dblocks, place - padded, zero(ends))
    return place


@inner
def _token_gradients(s, u, grad, gate, has_z, skip, softplus, by_u, by_s):
    """The gradients of u and delta of a vector of tokens; s: delta with its bias."""
    if has_z:
        grad = grad * gate * sigmoid(gate)
    change = fma(by_u, u, by_s)
    if softplus:
        s, slope = softplus_and_slope(s)
        change = change * slope
    return fma(by_u, s, grad * skip), change


@inner
def _pool_back_pairs(steps, at, has_z, to, count, bias, skip, softplus, by_u, by_s, period, total):
    """The gradients of u and delta of `count` tokens, whole pairs of vectors. Returns `total`, the bias' one.

    steps: delta, u, z and the gradient of y, and at: where they begin. to: the same of du and ddelta, and
    whether they are cache lines. by_u, by_s: what blocks add, by `spread_blocks`.
    """
    delta, u, z, g = steps
    at_s, at_u, at_z, at_g = at
    du, ddelta, at_du, at_ddelta, du_lines, ddelta_lines = to
    width = lanes(by_u)
    for t in range(0, count, 2 * width):
        for i in range(t, t + 2 * width, width):
            prefetch(address(delta, at_s + i + AHEAD))
            prefetch(address(u, at_u + i + AHEAD))
            prefetch(address(z, at_z + i + AHEAD))
            prefetch(address(g, at_g + i + AHEAD))
        first_u, second_u = get_pair(by_u, t, period)
        first_s, second_s = get_pair(by_s, t, period)
        x, change = _token_gradients(
            load(delta, at_s + t) + bias, load(u, at_u + t), load(g, at_g + t), load(z, at_z + t), has_z,
            skip, softplus, first_u, first_s,
        )  # fmt: skip
        put_vector(du, at_du + t, x, du_lines)
        put_vector(ddelta, at_ddelta + t, change, ddelta_lines)
        total, i = total + change, t + width
        x, change = _token_gradients(
            load(delta, at_s + i) + bias, load(u, at_u + i), load(g, at_g + i), load(z, at_z + i), has_z,
            skip, softplus, second_u, second_s,
        )  # fmt: skip
        put_vector(du, at_du + i, x, du_lines)
        put_vector(ddelta, at_ddelta + i, change, ddelta_lines)
        total = total + change
    return total


@inner
def _pool_back_row(steps, at, has_z, to, count, bias, skip, softplus, rows, period):
    """The same of any number of tokens. Returns the bias' gradient."""
    delta, u, z, g = steps
    du, ddelta, at_du, at_ddelta, _, _ = to
    width, spare = lanes(rows.S), rows.spare
    pair = 2 * width
    whole, total = count // pair * pair, zero(rows.S)
    total = _pool_back_pairs(steps, at, has_z, to, whole, bias, skip, softplus, rows.S, rows.P, period, total)
    if whole < count:
        rest = count - whole
        s, x, gate, grad = spare, spare[pair:], spare[2 * pair :], spare[3 * pair :]
        by_u, by_s = spare[4 * pair :], spare[5 * pair :]
        copy_in(delta, at[0] + whole, rest, s)
        copy_in(u, at[1] + whole, rest, x)
        copy_in(z, at[2] + whole, rest, gate)
        copy_in(g, at[3] + whole, rest, grad)
        for row, tail in ((rows.S, by_u), (rows.P, by_s)):
            copy_pair(row, whole, period, tail)
            for i in range(rest, pair):
                tail[i] = 0.0
        total = _pool_back_pairs(
            (s, x, gate, grad), (0, 0, 0, 0), has_z, (x, s, 0, 0, False, False), pair, bias, skip, softplus,
            by_u, by_s, 1, total,
        )  # fmt: skip
        copy_out(x, du, at_du + whole, rest)
        copy_out(s, ddelta, at_ddelta + whole, rest)
    return sum_lanes(total)


@inner
def pool_rows(band, x, at, ends, rows, to, by_u, by_s):
    """The gradients of u and delta of a tile's tokens; that of the bias is added to `ends`.

    by_u, by_s: vectors of what the tile's blocks add to the gradients of s u and of s.
    """
    row, channel, channels, t0, count = at
    du, du_strides, ddelta, ddelta_strides = to
    width, period = lanes(ends), band.sizes[2]
    found = -(-count // period)
    for k in range(0, found, width):
        transpose(by_u, k * width, width, rows.sums, k, rows.stride)
        transpose(by_s, k * width, width, rows.products, k, rows.stride)
    for c in range(channels):
        spread_blocks(rows.sums, c * rows.stride, count, period, rows.S)
        spread_blocks(rows.products, c * rows.stride, count, period, rows.P)
        places = (
            at_token(x.delta_strides, row, channel + c, t0), at_token(x.u_strides, row, channel + c, t0),
            at_token(x.z_strides, row, channel + c, t0), at_token(x.y_strides, row, channel + c, t0),
        )  # fmt: skip
        at_du, at_ddelta = (
            at_token(du_strides, row, channel + c, t0),
            at_token(ddelta_strides, row, channel + c, t0),
        )
        targets = (
            du, ddelta, at_du, at_ddelta, are_lines(du, at_du, width), are_lines(ddelta, at_ddelta, width)
        )  # fmt: skip
        ends[2 * width + c] += _pool_back_row(
            (x.delta, x.u, x.z, x.y), places, band.has_z, targets, count, splat(ends, c),
            splat(ends, width + c), band.softplus, rows, period,
        )  # fmt: skip
