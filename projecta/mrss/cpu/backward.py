"""The backward kernels of a coarse band, before and after the scan's own: from y to blocks, and to tokens."""

import numpy as np

from projecta._cpu.simd import (
    array_at,
    claim,
    fence,
    fma,
    lanes,
    load,
    sigmoid,
    softplus_and_slope,
    store,
    zero,
)
from projecta._cpu.threads import compiled, inner
from projecta.mrss.cpu.forward import fetch_lines
from projecta.mrss.cpu.rows import TINY, blocks_of_tile, expand_rows, new_rows, pool_rows
from projecta.scan.cpu.layout import steps_at
from projecta.scan.cpu.tiles import (
    SKEW,
    TILE,
    aligned,
    fetch_channels,
    look_ahead,
    read,
    write,
    write_channels,
)


@inner
def _item(band, item, width):
    """Sequence, row, first token, end, channel, channels, and the place of the first block of an item."""
    sizes = band.sizes
    sequence, channel = item // sizes[1], item % sizes[1] * width
    row = band.rows[sequence]
    place = (row * sizes[4] + band.first[sequence]) * sizes[3] + channel
    bounds = band.bounds[2 * sequence], band.bounds[2 * sequence + 1]
    return sequence, row, bounds[0], bounds[1], channel, min(width, sizes[0] - channel), place


@inner
def _expand_tile(band, X, Z, G, count, ahead, skips, blocks, dblocks, begin, state, last):
    """The gradients of z, in Z, and those of blocks that end in a tile; `last`: the sequence ends in it.

    state: the value that tokens read, the sums of its gradient and of D's, tokens left in the present block,
    and its place.
    """
    held, sent, skipped, left, place = state
    width, padded = lanes(X), band.sizes[3]
    for at in range(0, count * width, width):
        fetch_lines(ahead, 3, at // width)
        grad, u = load(G, at), load(X, at)
        if band.has_z:
            gate = load(Z, at)
            slope = sigmoid(gate)
            store(Z, at, grad * fma(skips, u, held) * slope * (1.0 + gate * (1.0 - slope)))
            grad = grad * gate * slope
        sent, skipped, left = sent + grad, fma(grad, u, skipped), left - 1
        if left == 0 or (last and at // width + 1 == count):
            if place > begin:
                store(dblocks, place - padded, sent)
            store(dblocks, place, zero(X))  # the last block's value is not read
            held, sent, left, place = load(blocks, place), zero(X), band.sizes[2], place + padded
    return held, sent, skipped, left, place


@compiled
def expand(counter, items, band, kinds, places, rows):
    """The gradients of z, of the blocks' values and of D; x.y is the gradient of y.

    places: steps, dz, then D, the values of blocks, their gradient and that of D.
    """
    x, real, period = steps_at(places, kinds), kinds.real, band.sizes[2]
    dz, dz_strides = array_at(places[16], 1, kinds.z), places[17:20]
    D, blocks = array_at(places[20], 1, real), array_at(places[21], 1, real)
    dblocks, dD = array_at(places[22], 1, real), array_at(places[23], 1, real)
    width, area = lanes(real), (TILE + SKEW) * lanes(real)
    tokens = TILE if rows is None else blocks_of_tile(period, band.sizes[4]) * period
    own, own_rows, ahead = (
        aligned(real, 3 * (TILE + SKEW) + 2),
        new_rows(real, tokens, tokens // period + 1),
        np.zeros(16, np.int64),
    )
    X, Z, G, ends = own, own[area:], own[2 * area :], own[3 * area :]
    item = claim(counter)
    while item < items:
        sequence, row, start, end, channel, channels, place = _item(band, item, width)
        fetch_channels(D, channel, channels, ends, 0)
        begin, skips, state = place, load(ends, 0), (zero(real), zero(real), zero(real), period, place)
        store(ends, width, zero(real))
        own_rows.values[:] = 0
        for t0 in range(start, end, tokens):
            count, last = min(tokens, end - t0), t0 + tokens >= end
            if rows is not None:
                at = row, channel, channels, t0, count
                place = expand_rows(
                    band, x, at, ends, own_rows, dz, dz_strides, blocks, dblocks, begin, place
                )
            else:
                read(x.u, x.u_strides, row, channel, channels, t0, count, X, 0)
                read(x.y, x.y_strides, row, channel, channels, t0, count, G, 0)
                if band.has_z:
                    read(x.z, x.z_strides, row, channel, channels, t0, count, Z, 0)
                look_ahead(ahead, x.u, x.u_strides, row, channel, t0 + TILE)
                look_ahead(ahead[4:], x.y, x.y_strides, row, channel, t0 + TILE)
                look_ahead(ahead[8:], x.z, x.z_strides, row, channel, t0 + TILE)
                state = _expand_tile(band, X, Z, G, count, ahead, skips, blocks, dblocks, begin, state, last)
                if band.has_z:
                    write(dz, dz_strides, row, channel, channels, t0, count, Z, 0)
        if rows is None:
            store(ends, width, state[2])
        write_channels(dD, sequence * band.sizes[0] + channel, channels, ends, width)
        item = claim(counter)
    fence()


@inner
def by_block(at, means, spans, dmeans, dspans):
    """What a block's gradients add to those of its tokens: of s u, and of s."""
    by_u = load(dmeans, at) / (load(spans, at) + (zero(means) + TINY))
    return by_u, load(dspans, at) - by_u * load(means, at)


@inner
def _pool_tile(band, S, X, Z, G, count, ahead, ends, grads, state):
    """The gradients of u and delta of a tile, in X and S.

    grads: means, sums of delta and the gradients of both, by block. state: what a block adds, tokens left in
    it, the next one's place, and the sum of the bias' gradient.
    """
    (by_u, by_s, left, place, total), width = state, lanes(X)
    biases, skips = load(ends, 0), load(ends, width)
    for at in range(0, count * width, width):
        fetch_lines(ahead, 4, at // width)
        if left == 0:
            by_u, by_s = by_block(place, *grads)
            left, place = band.sizes[2], place + band.sizes[3]
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
    return by_u, by_s, left, place, total


@compiled
def pool(counter, items, band, kinds, places, rows):
    """The gradients of u, delta and the bias; x.y is the gradient of y.

    places: steps, du, ddelta, then D, the bias, means, sums of delta, the gradients of both, and that of the
    bias.
    """
    x, real, period = steps_at(places, kinds), kinds.real, band.sizes[2]
    du, du_strides = array_at(places[16], 1, kinds.u), places[17:20]
    ddelta, ddelta_strides = array_at(places[20], 1, kinds.delta), places[21:24]
    D, bias = array_at(places[24], 1, real), array_at(places[25], 1, real)
    grads = (
        array_at(places[26], 1, real), array_at(places[27], 1, real), array_at(places[28], 1, real),
        array_at(places[29], 1, real),
    )  # fmt: skip
    dbias = array_at(places[30], 1, real)
    width, area = lanes(real), (TILE + SKEW) * lanes(real)
    tokens = TILE if rows is None else blocks_of_tile(period, band.sizes[4]) * period
    own, own_rows, ahead = (
        aligned(real, 4 * (TILE + SKEW) + 3),
        new_rows(real, tokens, tokens // period + 1),
        np.zeros(16, np.int64),
    )
    S, X, Z, G, ends = own, own[area:], own[2 * area :], own[3 * area :], own[4 * area :]
    of_s = aligned(real, own_rows.vectors.size // width)
    item = claim(counter)
    while item < items:
        sequence, row, start, end, channel, channels, place = _item(band, item, width)
        fetch_channels(bias, channel, channels, ends, 0)
        fetch_channels(D, channel, channels, ends, width)
        store(ends, 2 * width, zero(real))
        state = zero(real), zero(real), 0, place, zero(real)
        for t0 in range(start, end, tokens):
            count = min(tokens, end - t0)
            if rows is not None:
                at, to = (row, channel, channels, t0, count), (du, du_strides, ddelta, ddelta_strides)
                for k in range(-(-count // period)):
                    by_u, by_s = by_block(place, *grads)
                    store(own_rows.vectors, k * width, by_u)
                    store(of_s, k * width, by_s)
                    place += band.sizes[3]
                pool_rows(band, x, at, ends, own_rows, to, own_rows.vectors, of_s)
            else:
                read(x.delta, x.delta_strides, row, channel, channels, t0, count, S, 0)
                read(x.u, x.u_strides, row, channel, channels, t0, count, X, 0)
                read(x.y, x.y_strides, row, channel, channels, t0, count, G, 0)
                if band.has_z:
                    read(x.z, x.z_strides, row, channel, channels, t0, count, Z, 0)
                look_ahead(ahead, x.delta, x.delta_strides, row, channel, t0 + TILE)
                look_ahead(ahead[4:], x.u, x.u_strides, row, channel, t0 + TILE)
                look_ahead(ahead[8:], x.y, x.y_strides, row, channel, t0 + TILE)
                look_ahead(ahead[12:], x.z, x.z_strides, row, channel, t0 + TILE)
                state = _pool_tile(band, S, X, Z, G, count, ahead, ends, grads, state)
                write(du, du_strides, row, channel, channels, t0, count, X, 0)
                write(ddelta, ddelta_strides, row, channel, channels, t0, count, S, 0)
        if rows is None:
            store(ends, 2 * width, state[4])
        write_channels(dbias, sequence * band.sizes[0] + channel, channels, ends, 2 * width)
        item = claim(counter)
    fence()
