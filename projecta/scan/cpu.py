"""The scan on the CPU in numba: as fast as the vector units allow, without a compiler to install.

A vector holds as many channels as it has lanes; one loop over time advances four states of them at once, in
registers. Channels of a group are taken in blocks of that many lanes. Blocks and sequences are the parallel
work: threads run the kernels without the interpreter's lock. Results do not depend on the number of threads.

Tiles of `TILE` steps are read from the caller's memory, whatever its strides and type, and turned so that a
step is a vector. The decay is 2^(delta A log2 e); where no exponent of a tile leaves the safe range, the
clamps are left out.

The backward pass takes superblocks of several blocks. From the states that the forward pass saved every
`CHUNK` steps it forms the states of a chunk again, then goes through the chunk in reverse. Gradients of B and
C are summed over the channels of a superblock in vectors, lane by lane at last, and over superblocks in their
order.

Real A only: `projecta.scan.AUTO` sends complex A to "vectorised".
"""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from numba import njit
from torch import Tensor

from projecta.scan import reference
from projecta.scan._operator import Inputs, define
from projecta.scan._vectors import (
    BYTES,
    LOG2_E,
    exp2_product,
    exp2_product_safe,
    fence,
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
    sum_lanes,
    transpose,
    transpose_past_cache,
    zero,
)

TILE = 64  # steps that are read and turned together
CHUNK = 16  # steps between saved states
SKEW = 5  # vectors between tiles: stores and loads 4 KiB apart would wait for each other
UNROLL = 4  # states that one loop over time advances
SUPERBLOCK = 8  # blocks that share their sums of dB and dC
SMALL = 200_000  # elements of (b, d, l, n) below which one thread is faster than two


def _compiled(function: Callable) -> Callable:
    """Compiled for each type when it is first called, and kept on disk where a folder can be written."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # numba found no folder for its cache
        return njit(nogil=True, error_model="numpy")(function)


@_compiled
def _read(source, strides, row, channel, step, channels, steps, tile, at):
    """Bring channels x steps of the caller's memory into vectors at tile[at:]; other lanes are 0."""
    channel_stride, step_stride = strides[1], strides[2]
    base = row * strides[0] + channel * channel_stride + step * step_stride
    width = lanes(tile)
    done = 0
    if channels == width and step_stride == 1:
        done = steps // width * width
        for t in range(0, done, width):
            transpose(source, base + t, channel_stride, tile, at + t * width, width)
    elif channels == width and channel_stride == 1:
        done = steps
        for t in range(steps):
            store(tile, at + t * width, load(source, base + t * step_stride))
    for t in range(done, steps):
        first = at + t * width
        store(tile, first, zero(tile))
        for c in range(channels):
            put(tile, first + c, get(source, base + c * channel_stride + t * step_stride))


@_compiled
def _write(target, strides, row, channel, step, channels, steps, tile, at):
    """The way back of `_read`."""
    channel_stride, step_stride = strides[1], strides[2]
    base = row * strides[0] + channel * channel_stride + step * step_stride
    width = lanes(tile)
    done = 0
    if channels == width and step_stride == 1:
        done = steps // width * width
        size = target.itemsize
        lines = (target.ctypes.data + size * base) % BYTES == 0 and size * channel_stride % BYTES == 0
        if lines and size * width == BYTES:
            for t in range(0, done, width):
                transpose_past_cache(tile, at + t * width, width, target, base + t, channel_stride)
        else:
            for t in range(0, done, width):
                transpose(tile, at + t * width, width, target, base + t, channel_stride)
    elif channels == width and channel_stride == 1:
        done = steps
        for t in range(steps):
            store(target, base + t * step_stride, load(tile, at + t * width))
    for t in range(done, steps):
        for c in range(channels):
            put(target, base + c * channel_stride + t * step_stride, get(tile, at + t * width + c))


@_compiled
def _weight(B, varying, constant):
    """B or C of a state: one number for all lanes if it varies in time (1-D), else a vector (2-D)."""
    if B.ndim == 1:
        return splat(B, varying)
    return load(B, constant)


@_compiled
def _decay(s, A, clamp):
    """2^(s A); `clamp` is None where no exponent leaves the safe range."""
    if clamp is None:
        return exp2_product(s, A)
    return exp2_product_safe(s, A)


@_compiled
def _advance(S, X, Y, first, steps, A, a, B, C, w, n, H, clamp, ahead):
    """Advance the states H of a block over steps of a tile, from `first` on, and add C h to Y.

    S is delta, X delta u; a and w say where A, and B and C, begin. There are more rows in the caller's memory
    than the hardware fetches ahead: each pass over time asks for a line of the next tile per step.
    """
    width = lanes(S)
    for q in range(0, n, UNROLL):
        at, k, row = a + q * width, q * width, (q // UNROLL) & 3
        address, stride, shift, mask = ahead[row, 0], ahead[row, 1], ahead[row, 2], ahead[row, 3]
        A0, A1, A2, A3 = load(A, at), load(A, at + width), load(A, at + 2 * width), load(A, at + 3 * width)
        h0, h1, h2, h3 = load(H, k), load(H, k + width), load(H, k + 2 * width), load(H, k + 3 * width)
        for t in range(first, first + steps):
            prefetch(address + (t >> shift) * stride + (t & mask) * BYTES)
            s, x, v = load(S, t * width), load(X, t * width), w + t * n + q
            d0, d1 = _decay(s, A0, clamp), _decay(s, A1, clamp)
            d2, d3 = _decay(s, A2, clamp), _decay(s, A3, clamp)
            h0 = fma(d0, h0, x * _weight(B, v, at))
            h1 = fma(d1, h1, x * _weight(B, v + 1, at + width))
            h2 = fma(d2, h2, x * _weight(B, v + 2, at + 2 * width))
            h3 = fma(d3, h3, x * _weight(B, v + 3, at + 3 * width))
            y = fma(_weight(C, v, at), h0, load(Y, t * width))
            y2 = _weight(C, v + 1, at + width) * h1
            y = fma(_weight(C, v + 2, at + 2 * width), h2, y)
            y2 = fma(_weight(C, v + 3, at + 3 * width), h3, y2)
            store(Y, t * width, y + y2)
        store(H, k, h0)
        store(H, k + width, h1)
        store(H, k + 2 * width, h2)
        store(H, k + 3 * width, h3)


@_compiled
def _scratch(like, count):
    """`count` scalars that begin at a multiple of a vector's bytes."""
    raw = np.empty(count + 16, like.dtype)
    return raw[(-(raw.ctypes.data // raw.itemsize)) % 16 :][:count]


@_compiled
def _look_ahead(ahead, i, source, strides, row, channel, step):
    """Where the lines of a tile of `source` lie: 64 of them, so many in a row of memory."""
    channel_stride, step_stride = strides[1], strides[2]
    base = row * strides[0] + channel * channel_stride + step * step_stride
    size = source.itemsize
    ahead[i, 0] = source.ctypes.data + size * base
    contiguous = step_stride == 1
    ahead[i, 1] = size * (channel_stride if contiguous else step_stride)
    per_row = TILE * size // BYTES if contiguous else 1
    ahead[i, 2] = 0 if per_row == 1 else 1 if per_row == 2 else 2 if per_row == 4 else 3
    ahead[i, 3] = per_row - 1


@_compiled
def _forward(
    first, stop, sizes, rows, bounds, chunks, softplus, has_z, u, su, delta, sd, z, sz, y, sy,
    A, limits, B, C, D, bias, state, saved,
):  # fmt: skip
    """Items first...stop; item i is block i % blocks of sequence i // blocks."""
    g, k, n, per_group, l = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
    width, blocks = lanes(A), g * per_group
    area = (TILE + SKEW) * width
    room = _scratch(A, 4 * area + n * width)
    S, X, Y, Z, H = (
        room[:area],
        room[area : 2 * area],
        room[2 * area : 3 * area],
        room[3 * area : 4 * area],
        room[4 * area :],
    )
    ahead = np.zeros((4, 4), np.int64)
    save = saved.size > 0
    for item in range(first, stop):
        sequence, block = item // blocks, item % blocks
        row, group, lane = rows[sequence], block // per_group, block % per_group * width
        channel, channels = group * k + lane, min(width, k - lane)
        a, w, limit = block * n * width, (row * g + group) * l * n, limits[block]
        H[:] = state[item * n * width : (item + 1) * n * width]
        biases, skips = load(bias, block * width), load(D, block * width)
        start, end = bounds[2 * sequence], bounds[2 * sequence + 1]
        for t0 in range(start, end, TILE):
            steps = min(TILE, end - t0)
            _read(delta, sd, row, channel, t0, channels, steps, S, 0)
            _read(u, su, row, channel, t0, channels, steps, X, 0)
            fits = True
            for at in range(0, steps * width, width):
                s, x = load(S, at) + biases, load(X, at)
                if softplus:
                    s, _ = softplus_and_slope(s)
                fits = fits and magnitude_below(s, limit)
                store(S, at, s)
                store(Y, at, skips * x)
                store(X, at, s * x)
            _look_ahead(ahead, 0, delta, sd, row, channel, t0 + TILE)
            _look_ahead(ahead, 1, u, su, row, channel, t0 + TILE)
            _look_ahead(ahead, 2, z, sz, row, channel, t0)
            ahead[3] = ahead[2]
            stride = CHUNK if save else TILE
            for t in range(0, steps, stride):
                if save:
                    to = ((chunks[sequence] + (t0 - start + t) // CHUNK) * blocks + block) * n * width
                    saved[to : to + n * width] = H
                if fits:
                    _advance(S, X, Y, t, min(stride, steps - t), A, a, B, C, w + t0 * n, n, H, None, ahead)
                else:
                    _advance(S, X, Y, t, min(stride, steps - t), A, a, B, C, w + t0 * n, n, H, 1, ahead)
            if has_z:
                _read(z, sz, row, channel, t0, channels, steps, Z, 0)
                for at in range(0, steps * width, width):
                    gate = load(Z, at)
                    store(Y, at, load(Y, at) * gate * sigmoid(gate))
            _write(y, sy, row, channel, t0, channels, steps, Y, 0)
        state[item * n * width : (item + 1) * n * width] = H
    fence()


@_compiled
def _retrace(
    T, o, first, steps, A, a, B, C, w, n, q, H, hs, decays, carry, dA,
    dB, pb, tb, dC, pc, tc, clamp, ahead, look,
):  # fmt: skip
    """One chunk and four states: form the states again, then go back through them.

    T holds the tiles of a block, from `o` on: S delta, X delta u, G the gradient of y before the gate, Y = C
    h, and DX and DS, the gradients of X and, over log 2, of S. dB and dC collect at pb + t tb and pc + t tc.

        g_t = C_t dy_t + a_{t+1} g_{t+1},  dC_t = dy_t h_t,  dB_t = g_t x_t,  d(delta A)_t = a_t g_t h_{t-1}
    """
    width = lanes(T)
    area = (TILE + SKEW) * width
    S, X, G, Y, DX, DS = o, o + area, o + 2 * area, o + 3 * area, o + 4 * area, o + 5 * area
    at, k = a + q * width, q * width
    A0, A1, A2, A3 = load(A, at), load(A, at + width), load(A, at + 2 * width), load(A, at + 3 * width)
    h0, h1, h2, h3 = load(H, k), load(H, k + width), load(H, k + 2 * width), load(H, k + 3 * width)
    store(hs, 0, h0)
    store(hs, width, h1)
    store(hs, 2 * width, h2)
    store(hs, 3 * width, h3)
    near = look + ((q // UNROLL) & 3)
    address, stride, shift, mask = ahead[near, 0], ahead[near, 1], ahead[near, 2], ahead[near, 3]
    for i in range(steps):
        prefetch(address + ((first + i) >> shift) * stride + ((first + i) & mask) * BYTES)
        t = (first + i) * width
        s, x, v = load(T, S + t), load(T, X + t), w + i * n + q
        d0, d1 = _decay(s, A0, clamp), _decay(s, A1, clamp)
        d2, d3 = _decay(s, A2, clamp), _decay(s, A3, clamp)
        h0 = fma(d0, h0, x * _weight(B, v, at))
        h1 = fma(d1, h1, x * _weight(B, v + 1, at + width))
        h2 = fma(d2, h2, x * _weight(B, v + 2, at + 2 * width))
        h3 = fma(d3, h3, x * _weight(B, v + 3, at + 3 * width))
        y = fma(_weight(C, v, at), h0, load(T, Y + t))
        y2 = _weight(C, v + 1, at + width) * h1
        y = fma(_weight(C, v + 2, at + 2 * width), h2, y)
        y2 = fma(_weight(C, v + 3, at + 3 * width), h3, y2)
        store(T, Y + t, y + y2)
        put4 = i * 4 * width
        store(decays, put4, d0)
        store(decays, put4 + width, d1)
        store(decays, put4 + 2 * width, d2)
        store(decays, put4 + 3 * width, d3)
        store(hs, put4 + 4 * width, h0)
        store(hs, put4 + 5 * width, h1)
        store(hs, put4 + 6 * width, h2)
        store(hs, put4 + 7 * width, h3)
    c0, c1, c2, c3 = (
        load(carry, k),
        load(carry, k + width),
        load(carry, k + 2 * width),
        load(carry, k + 3 * width),
    )
    e0, e1, e2, e3 = load(dA, k), load(dA, k + width), load(dA, k + 2 * width), load(dA, k + 3 * width)
    for i in range(steps - 1, -1, -1):
        t = (first + i) * width
        s, x, g, v, j = load(T, S + t), load(T, X + t), load(T, G + t), w + i * n + q, i * 4 * width
        to = pc + i * tc + k
        store(dC, to, fma(g, load(hs, j + 4 * width), load(dC, to)))
        store(dC, to + width, fma(g, load(hs, j + 5 * width), load(dC, to + width)))
        store(dC, to + 2 * width, fma(g, load(hs, j + 6 * width), load(dC, to + 2 * width)))
        store(dC, to + 3 * width, fma(g, load(hs, j + 7 * width), load(dC, to + 3 * width)))
        g0 = fma(_weight(C, v, at), g, c0)
        g1 = fma(_weight(C, v + 1, at + width), g, c1)
        g2 = fma(_weight(C, v + 2, at + 2 * width), g, c2)
        g3 = fma(_weight(C, v + 3, at + 3 * width), g, c3)
        to = pb + i * tb + k
        store(dB, to, fma(g0, x, load(dB, to)))
        store(dB, to + width, fma(g1, x, load(dB, to + width)))
        store(dB, to + 2 * width, fma(g2, x, load(dB, to + 2 * width)))
        store(dB, to + 3 * width, fma(g3, x, load(dB, to + 3 * width)))
        dx = fma(g0, _weight(B, v, at), load(T, DX + t))
        dx2 = g1 * _weight(B, v + 1, at + width)
        dx = fma(g2, _weight(B, v + 2, at + 2 * width), dx)
        dx2 = fma(g3, _weight(B, v + 3, at + 3 * width), dx2)
        store(T, DX + t, dx + dx2)
        c0, c1 = load(decays, j) * g0, load(decays, j + width) * g1
        c2, c3 = load(decays, j + 2 * width) * g2, load(decays, j + 3 * width) * g3
        f0, f1 = c0 * load(hs, j), c1 * load(hs, j + width)
        f2, f3 = c2 * load(hs, j + 2 * width), c3 * load(hs, j + 3 * width)
        ds = fma(f0, A0, load(T, DS + t))
        ds2 = f1 * A1
        ds = fma(f2, A2, ds)
        ds2 = fma(f3, A3, ds2)
        store(T, DS + t, ds + ds2)
        e0, e1, e2, e3 = fma(f0, s, e0), fma(f1, s, e1), fma(f2, s, e2), fma(f3, s, e3)
    store(carry, k, c0)
    store(carry, k + width, c1)
    store(carry, k + 2 * width, c2)
    store(carry, k + 3 * width, c3)
    store(dA, k, e0)
    store(dA, k + width, e1)
    store(dA, k + 2 * width, e2)
    store(dA, k + 3 * width, e3)


@_compiled
def _backward(
    first, stop, sizes, rows, bounds, chunks, softplus, has_z, u, su, delta, sd, z, sz, dy, sdy,
    A, limits, B, C, D, bias, saved, du, sdu, ddelta, sdd, dz, sdz, carries, dA, dD, dbias, dB, dC, sums_B,
    sums_C,
):  # fmt: skip
    """Items first...stop; item i is superblock i % supers of sequence i // supers.

    `carries` holds the gradient of the last state and ends as that of the initial one. dB and dC are what is
    kept for each block if B and C are constant; else sums_B and sums_C take the sums over each superblock.
    """
    g, k, n, per_group, l, size, supers = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]
    width, blocks, per_super = lanes(A), g * per_group, supers // g
    area, held = (TILE + SKEW) * width, n * width
    tiles = 10 * area  # S X G Y DX DS U Z slope Q
    T = _scratch(A, size * tiles + size * area)
    work = _scratch(A, (8 * CHUNK + 4) * width)
    hs, decays = work[: (CHUNK + 1) * 4 * width], work[(CHUNK + 1) * 4 * width :]
    vary_B, vary_C = B.ndim == 1, C.ndim == 1
    collect_B, collect_C = _scratch(A, CHUNK * held), _scratch(A, CHUNK * held)
    fits = np.zeros(size, np.bool_)
    ahead = np.zeros((4 * size, 4), np.int64)
    for item in range(first, stop):
        sequence, superblock = item // supers, item % supers
        row, group = rows[sequence], superblock // per_super
        block0 = superblock % per_super * size  # in the group
        count = min(size, per_group - block0)
        start, end = bounds[2 * sequence], bounds[2 * sequence + 1]
        w = (row * g + group) * l * n
        total = (end - start + TILE - 1) // TILE
        for tile in range(total - 1, -1, -1):
            t0 = start + tile * TILE
            steps = min(TILE, end - t0)
            for i in range(count):
                block = group * per_group + block0 + i
                lane = (block0 + i) * width
                channel, channels, o = group * k + lane, min(width, k - lane), i * tiles
                biases, limit = load(bias, block * width), limits[block]
                _read(delta, sd, row, channel, t0, channels, steps, T, o)
                _read(
                    u,
                    su,
                    row,
                    channel,
                    t0,
                    channels,
                    steps,
                    T,
                    o + 6 * area,
                )
                _read(
                    dy,
                    sdy,
                    row,
                    channel,
                    t0,
                    channels,
                    steps,
                    T,
                    o + 2 * area,
                )
                if has_z:
                    _read(
                        z,
                        sz,
                        row,
                        channel,
                        t0,
                        channels,
                        steps,
                        T,
                        o + 7 * area,
                    )
                inside = True
                for t in range(o, o + steps * width, width):
                    s = load(T, t) + biases
                    if softplus:
                        s, slope = softplus_and_slope(s)
                        store(T, t + 8 * area, slope)
                    inside = inside and magnitude_below(s, limit)
                    store(T, t, s)
                    store(T, t + area, s * load(T, t + 6 * area))
                    if has_z:
                        gate, grad = load(T, t + 7 * area), load(T, t + 2 * area)
                        open_ = sigmoid(gate)
                        store(T, t + 2 * area, grad * gate * open_)
                        store(T, t + 9 * area, grad * open_ * (1.0 + gate * (1.0 - open_)))
                    for clear in range(3, 6):
                        store(T, t + clear * area, zero(T))
                fits[i] = inside
                _look_ahead(ahead, 4 * i, delta, sd, row, channel, t0 - TILE)
                _look_ahead(ahead, 4 * i + 1, u, su, row, channel, t0 - TILE)
                _look_ahead(ahead, 4 * i + 2, dy, sdy, row, channel, t0 - TILE)
                _look_ahead(ahead, 4 * i + 3, z, sz, row, channel, t0 - TILE)
            for at in range((steps - 1) // CHUNK * CHUNK, -1, -CHUNK):
                here = min(CHUNK, steps - at)
                if vary_B:
                    collect_B[: here * held] = 0
                if vary_C:
                    collect_C[: here * held] = 0
                for i in range(count):
                    block = group * per_group + block0 + i
                    own = (sequence * blocks + block) * held
                    H = saved[((chunks[sequence] + (t0 - start + at) // CHUNK) * blocks + block) * held :]
                    sink_B, pb, tb = (collect_B, 0, held) if vary_B else (dB, own, 0)
                    sink_C, pc, tc = (collect_C, 0, held) if vary_C else (dC, own, 0)
                    for q in range(0, n, UNROLL):
                        if fits[i]:
                            _retrace(
                                T, i * tiles, at, here, A, block * held, B, C, w + (t0 + at) * n, n, q, H, hs,
                                decays, carries[own:], dA[own:], sink_B, pb, tb, sink_C, pc, tc, None,
                                ahead, 4 * i,
                            )  # fmt: skip
                        else:
                            _retrace(
                                T, i * tiles, at, here, A, block * held, B, C, w + (t0 + at) * n, n, q, H, hs,
                                decays, carries[own:], dA[own:], sink_B, pb, tb, sink_C, pc, tc, 1,
                                ahead, 4 * i,
                            )  # fmt: skip
                to = ((row * supers + superblock) * l + t0 + at) * n
                for j in range(here * n):
                    if vary_B:
                        put(sums_B, to + j, sum_lanes(load(collect_B, j * width)))
                    if vary_C:
                        put(sums_C, to + j, sum_lanes(load(collect_C, j * width)))
            for i in range(count):
                block = group * per_group + block0 + i
                lane = (block0 + i) * width
                channel, channels, o = group * k + lane, min(width, k - lane), i * tiles
                skips, own = load(D, block * width), (sequence * blocks + block) * width
                sum_D, sum_bias = load(dD, own), load(dbias, own)
                for t in range(o, o + steps * width, width):
                    s, grad, x_grad, value = (
                        load(T, t),
                        load(T, t + 2 * area),
                        load(T, t + 4 * area),
                        load(T, t + 6 * area),
                    )
                    grad_delta = fma(x_grad, value, load(T, t + 5 * area) * (1.0 / LOG2_E))
                    if softplus:
                        grad_delta = grad_delta * load(T, t + 8 * area)
                    sum_D, sum_bias = fma(grad, value, sum_D), sum_bias + grad_delta
                    if has_z:
                        store(
                            T, t + 7 * area, load(T, t + 9 * area) * fma(skips, value, load(T, t + 3 * area))
                        )
                    store(T, t + 6 * area, fma(x_grad, s, skips * grad))
                    store(T, t, grad_delta)
                store(dD, own, sum_D)
                store(dbias, own, sum_bias)
                _write(
                    ddelta,
                    sdd,
                    row,
                    channel,
                    t0,
                    channels,
                    steps,
                    T,
                    o,
                )
                _write(
                    du,
                    sdu,
                    row,
                    channel,
                    t0,
                    channels,
                    steps,
                    T,
                    o + 6 * area,
                )
                if has_z:
                    _write(dz, sdz, row, channel, t0, channels, steps, T, o + 7 * area)
    fence()


class _Layout:
    """How channels, states and sequences of a call lie in vectors; what both kernels take."""

    def __init__(self, inputs: Inputs):
        u, _, A, B, C = inputs[:5]
        self.inputs = inputs
        self.b, d, self.l = u.shape
        self.dtype, self.width = A.dtype, BYTES // A.element_size()
        self.n, self.padded = A.shape[1], _round_up(A.shape[1], UNROLL)
        self.g = next((t.shape[1] for t in (B, C) if t.dim() == 4), 1)
        self.k = d // self.g
        self.per_group = _round_up(self.k, self.width) // self.width
        self.blocks = self.g * self.per_group
        self.state_size = self.padded * self.width
        if inputs.cu_seqlens is None:
            self.rows, starts = np.arange(self.b), np.zeros(self.b, np.int64)
            self.bounds = np.tile(np.array([0, self.l]), self.b)
            self.chunks = self.rows * (self.l // CHUNK + 1)
        else:
            ends = inputs.cu_seqlens.numpy().astype(np.int64)
            starts, self.rows = ends[:-1], np.zeros(len(ends) - 1, np.int64)
            self.bounds = np.stack([starts, ends[1:]], 1).ravel()
            self.chunks = starts // CHUNK + np.arange(len(starts))
        self.sequences = len(self.rows)
        self.size = max(1, min(SUPERBLOCK, self.sequences * self.blocks // 16))
        self.supers = self.g * (-(-self.per_group // self.size))
        self.work = u.numel() * self.n

    def channels(self, t: Tensor | None) -> np.ndarray:
        """(d,) as (blocks, width), flat; 0 where there is no channel."""
        packed = torch.zeros(self.g, self.per_group * self.width, dtype=self.dtype)
        if t is not None:
            packed[:, : self.k] = t.view(self.g, self.k)
        return packed.view(-1).numpy()

    def states(self, t: Tensor, scale: float = 1.0) -> np.ndarray:
        """(..., d, n) as (..., blocks, padded n, width), flat."""
        packed = torch.zeros(
            t.numel() // (self.g * self.k * self.n),
            self.g,
            self.per_group * self.width,
            self.padded,
            dtype=self.dtype,
        )
        packed[:, :, : self.k, : self.n] = t.reshape(-1, self.g, self.k, self.n) * scale
        return packed.unflatten(2, (-1, self.width)).transpose(3, 4).contiguous().view(-1).numpy()

    def unpack(self, packed: np.ndarray) -> Tensor:
        """The way back of `states`: (sequences, d, n)."""
        wide = torch.from_numpy(packed).view(-1, self.g, self.per_group, self.padded, self.width)
        return wide.transpose(3, 4).flatten(2, 3)[:, :, : self.k, : self.n].flatten(1, 2)

    def weights(self, B: Tensor) -> np.ndarray:
        """B or C: over time (b, g, l, padded n), flat; if constant as the states, in two dimensions."""
        if B.dim() == 2:
            return self.states(B).reshape(-1, self.width)
        packed = torch.zeros(self.b, self.g, self.l, self.padded, dtype=self.dtype)
        packed[..., : self.n] = B.transpose(2, 3)
        return packed.view(-1).numpy()

    def arguments(self, delta_softplus: bool) -> tuple:
        """Sizes, sequences and options, as both kernels begin."""
        sizes = np.array([self.g, self.k, self.padded, self.per_group, self.l, self.size, self.supers])
        return sizes, self.rows, self.bounds, self.chunks, delta_softplus, self.inputs.z is not None

    def parameters(self) -> tuple:
        """A, the steps up to which its exponents are safe, B, C, D, delta_bias."""
        A = self.states(self.inputs.A, LOG2_E)
        exponent = 126.0 if self.dtype == torch.float32 else 1022.0
        with np.errstate(divide="ignore"):  # rates of 0 are safe for any step
            limits = exponent / np.abs(A).reshape(self.blocks, -1).max(1)
        _, _, _, B, C, D, _, bias = self.inputs[:8]
        return (
            A,
            limits.astype(A.dtype),
            self.weights(B),
            self.weights(C),
            self.channels(D),
            self.channels(bias),
        )


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


_STORED = {torch.bfloat16: torch.int16, torch.float16: torch.uint16}  # as `_vectors` knows them


def _memory(t: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The memory of a (b, d, l) tensor as a flat array, and the strides."""
    t = t.detach()
    span = (
        1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        if t.numel()
        else 0
    )
    flat = t.view(_STORED[t.dtype]) if t.dtype in _STORED else t
    return flat.as_strided((span,), (1,)).numpy(), np.array(t.stride())


_pools: dict[int, ThreadPoolExecutor] = {}  # by process: a forked child starts threads of its own


_called: set[tuple] = set()  # kernels and types that have run in this process


def _run(kernel: Callable, items: int, work: int, *arguments) -> None:
    """kernel(first, stop, *arguments) over all items, on as many threads as torch uses."""
    key = (kernel, *((a.dtype, a.ndim) for a in arguments if isinstance(a, np.ndarray)))
    if key not in _called:  # not in several threads: each would compile
        note = threading.Timer(
            1.0, print, ["projecta: compiling the CPU scan, once for these types"], {"file": sys.stderr}
        )
        note.start()
        try:
            kernel(0, 0, *arguments)
        finally:
            note.cancel()
        _called.add(key)
    threads = min(torch.get_num_threads(), items)
    if threads < 2 or work < SMALL:
        kernel(0, items, *arguments)
        return
    pool = _pools.get(os.getpid())
    if pool is None or pool._max_workers < threads:
        pool = _pools[os.getpid()] = ThreadPoolExecutor(threads)
    parts = min(items, 4 * threads)
    bounds = [items * i // parts for i in range(parts + 1)]
    for part in [pool.submit(kernel, *pair, *arguments) for pair in pairwise(bounds)]:
        part.result()


def _forward_pass(inputs: Inputs, delta_softplus: bool, y: Tensor, last_state: Tensor, saved: Tensor) -> None:
    lay = _Layout(inputs)
    gate = inputs.u if inputs.z is None else inputs.z
    state = np.zeros(lay.sequences * lay.blocks * lay.state_size, saved.numpy().dtype)
    if inputs.initial_state is not None:
        state = lay.states(inputs.initial_state)
    _run(
        _forward, lay.sequences * lay.blocks, lay.work, *lay.arguments(delta_softplus),
        *_memory(inputs.u), *_memory(inputs.delta), *_memory(gate), *_memory(y), *lay.parameters(), state,
        saved.numpy(),
    )  # fmt: skip
    last_state.copy_(lay.unpack(state))


def _backward_pass(
    grad_y: Tensor, grad_last: Tensor, saved: Tensor, inputs: Inputs, delta_softplus: bool, grads: Inputs
) -> None:
    lay = _Layout(inputs)
    gate, gate_grad = (inputs.u, grads.u) if inputs.z is None or grads.z is None else (inputs.z, grads.z)
    kind = saved.numpy().dtype
    kept = lay.sequences * lay.blocks
    carries, dA = lay.states(grad_last), np.zeros(kept * lay.state_size, kind)
    dD, dbias = np.zeros((2, kept * lay.width), kind)
    constant, sums = [], []
    for B in (inputs.B, inputs.C):
        constant.append(np.zeros(kept * lay.state_size if B.dim() == 2 else 0, kind))
        sums.append(
            torch.zeros(0 if B.dim() == 2 else lay.b * lay.supers * lay.l * lay.padded, dtype=saved.dtype)
        )
    _run(
        _backward, lay.sequences * lay.supers, lay.work, *lay.arguments(delta_softplus),
        *_memory(inputs.u), *_memory(inputs.delta), *_memory(gate), *_memory(grad_y), *lay.parameters(),
        saved.numpy().ravel(), *_memory(grads.u), *_memory(grads.delta), *_memory(gate_grad), carries, dA, dD,
        dbias, *constant, *(s.numpy() for s in sums),
    )  # fmt: skip
    grads.A.copy_(lay.unpack(dA).sum(0))
    for grad, total in ((grads.D, dD), (grads.delta_bias, dbias)):
        if grad is not None:
            lanes_of = torch.from_numpy(total).view(lay.sequences, lay.g, lay.per_group * lay.width)[
                ..., : lay.k
            ]
            grad.copy_(lanes_of.sum(0).flatten())
    if grads.initial_state is not None:
        grads.initial_state.copy_(lay.unpack(carries))
    for grad, each, part in ((grads.B, constant[0], sums[0]), (grads.C, constant[1], sums[1])):
        if grad.dim() == 2:
            grad.copy_(lay.unpack(each).sum(0))
        else:
            over = part.view(lay.b, lay.g, lay.supers // lay.g, lay.l, lay.padded)[..., : lay.n].sum(2)
            grad.copy_(over.transpose(2, 3))


def _saved_shape(u: Tensor, A: Tensor, B: Tensor, C: Tensor, sequences: int) -> tuple[int, ...]:
    """The states before each chunk, as they lie in vectors."""
    b, d, l = u.shape
    width = BYTES // A.element_size()
    g = B.shape[1] if B.dim() == 4 else C.shape[1] if C.dim() == 4 else 1
    blocks = g * (_round_up(d // g, width) // width)
    chunks = b * (l // CHUNK + 1) if b > 1 else l // CHUNK + sequences
    return (chunks * blocks * _round_up(A.shape[1], UNROLL) * width,)


selective_scan = define("scan_cpu", _forward_pass, _backward_pass, _saved_shape)
selective_state_update = reference.selective_state_update


def unavailable() -> str:
    """Why this backend cannot run; "" when it can."""
    return ""
