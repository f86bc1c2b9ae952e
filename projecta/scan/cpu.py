"""The scan on the CPU in numba: as fast as the vector units allow, without a compiler to install.

A vector holds as many channels as it has lanes; one loop over time advances four rows of their states at
once, in registers. A real state is one row; a complex state is two, its real and its imaginary part. Channels
of a group are taken in blocks of that many lanes. Blocks and sequences are the parallel work: threads run the
kernels without the interpreter's lock. Results do not depend on the number of threads.

Tiles of `TILE` steps are read from the caller's memory, whatever its strides and type, and turned so that a
step is a vector; so are A, D and the states. The decay is 2^(delta A log2 e); where no exponent of a tile
leaves the safe range, the clamps are left out.

The backward pass takes superblocks of several blocks. From the states that the forward pass saved every
`CHUNK` steps it forms the states of a chunk again, then goes through the chunk in reverse. Gradients of B and
C are summed over the channels of a superblock in vectors, lane by lane at last, and over superblocks in their
order.
"""

import math

import numpy as np
import torch
from torch import Tensor

from projecta.scan import _lazy, reference
from projecta.scan._layout import CHUNK, UNROLL, Layout, flat, in_large_pages, memory, saved_shape
from projecta.scan._operator import Inputs, define
from projecta.scan._threads import compiled, inner, run
from projecta.scan._vectors import (
    BYTES,
    LOG2_E,
    address,
    claim,
    cos_and_sin,
    exp2_product,
    exp2_product_safe,
    fence,
    fma,
    get,
    lanes,
    largest_magnitude,
    load,
    magnitude_below,
    prefetch,
    put,
    sigmoid,
    softplus_and_slope,
    splat,
    store,
    store_past_cache,
    sum_lanes,
    transpose,
    transpose_past_cache,
    zero,
)

TILE = 64  # steps that are read and turned together
SKEW = 5  # vectors between tiles: stores and loads 4 KiB apart would wait for each other
RADIANS = 2 * math.pi * LOG2_E  # A's imaginary parts count turns, its real parts powers of 2


@inner
def _at(strides, row, channel, step):
    """Where an element of a (b, d, l) tensor lies in its memory."""
    return row * strides[0] + channel * strides[1] + step * strides[2]


@inner
def _read(source, base, channel_stride, step_stride, channels, steps, tile, at):
    """Bring channels x steps of the caller's memory into vectors at tile[at:]; other lanes are 0."""
    width = lanes(tile)
    done = 0
    if channels == width and channel_stride == 1:
        done = steps
        for t in range(steps):
            store(tile, at + t * width, load(source, base + t * step_stride))
    elif channels == width and step_stride == 1:
        done = steps // width * width
        for t in range(0, done, width):
            transpose(source, base + t, channel_stride, tile, at + t * width, width)
    for t in range(done, steps):
        first = at + t * width
        store(tile, first, zero(tile))
        for c in range(channels):
            put(tile, first + c, get(source, base + c * channel_stride + t * step_stride))


@inner
def _write(target, base, channel_stride, step_stride, channels, steps, tile, at):
    """The way back of `_read`."""
    width = lanes(tile)
    done = 0
    if channels == width and channel_stride == 1:
        done = steps
        for t in range(steps):
            store(target, base + t * step_stride, load(tile, at + t * width))
    elif channels == width and step_stride == 1:
        done = steps // width * width
        size = target.itemsize
        lines = address(target, base) % BYTES == 0 and size * channel_stride % BYTES == 0
        if lines and size * width == BYTES:
            for t in range(0, done, width):
                transpose_past_cache(tile, at + t * width, width, target, base + t, channel_stride)
        else:
            for t in range(0, done, width):
                transpose(tile, at + t * width, width, target, base + t, channel_stride)
    for t in range(done, steps):
        for c in range(channels):
            put(target, base + c * channel_stride + t * step_stride, get(tile, at + t * width + c))


@inner
def _weight(B, varying, constant, steady):
    """B or C of a row of states: one number for all lanes if it varies in time (`steady` is None), else a
    vector."""
    if steady is None:
        return splat(B, varying)
    return load(B, constant)


@inner
def _decay(s, A, A_next, clamp, rotate):
    """Of two rows: 2^(s A) each, or as a complex number; `clamp` is None where no exponent leaves the safe
    range, `rotate` where states are real."""
    if rotate is not None:
        size = exp2_product_safe(s, A)
        cos, sin = cos_and_sin(s * A_next)
        return size * cos, size * sin
    if clamp is None:
        return exp2_product(s, A), exp2_product(s, A_next)
    return exp2_product_safe(s, A), exp2_product_safe(s, A_next)


@inner
def _step(d, d_next, h, h_next, x, x_next, rotate):
    """d h + x of two rows."""
    if rotate is not None:
        x, x_next = x - d_next * h_next, fma(d_next, h, x_next)
        return fma(d, h, x), fma(d, h_next, x_next)
    return fma(d, h, x), fma(d_next, h_next, x_next)


@inner
def _step_back(d, d_next, g, g_next, rotate):
    """The conjugate of d, times g."""
    if rotate is not None:
        return fma(d, g, d_next * g_next), d * g_next - d_next * g
    return d * g, d_next * g_next


@inner
def _match(c, c_next, h, h_next, rotate):
    """c times the conjugate of h."""
    if rotate is not None:
        return fma(c, h, c_next * h_next), c_next * h - c * h_next
    return c * h, c_next * h_next


@inner
def _turned(f, rotate):
    """The part of the second row in the gradient of s, whose unit is that of the first."""
    if rotate is not None:
        return f * RADIANS
    return f


@inner
def _advance(S, X, Y, first, steps, A, B, C, w, n, H, ahead, clamp, rotate, steady_B, steady_C):
    """Advance the states H of a block over steps of a tile, from `first` on, and add C h to Y.

    S is delta, X delta u; w says where B and C begin. There are more rows in the caller's memory
    than the hardware fetches ahead: each pass over time asks for a line of the next tile per step.
    """
    width = lanes(S)
    for q in range(0, n, UNROLL):
        k, row = q * width, (q // UNROLL) & 3
        line, stride = ahead[4 * row], ahead[4 * row + 1]
        shift, mask = ahead[4 * row + 2], ahead[4 * row + 3]
        A0, A1, A2, A3 = load(A, k), load(A, k + width), load(A, k + 2 * width), load(A, k + 3 * width)
        h0, h1, h2, h3 = load(H, k), load(H, k + width), load(H, k + 2 * width), load(H, k + 3 * width)
        for t in range(first, first + steps):
            prefetch(line + (t >> shift) * stride + (t & mask) * BYTES)
            s, x, v = load(S, t * width), load(X, t * width), w + t * n + q
            x0, x1 = x * _weight(B, v, k, steady_B), x * _weight(B, v + 1, k + width, steady_B)
            x2, x3 = (
                x * _weight(B, v + 2, k + 2 * width, steady_B),
                x * _weight(B, v + 3, k + 3 * width, steady_B),
            )
            d0, d1 = _decay(s, A0, A1, clamp, rotate)
            d2, d3 = _decay(s, A2, A3, clamp, rotate)
            h0, h1 = _step(d0, d1, h0, h1, x0, x1, rotate)
            h2, h3 = _step(d2, d3, h2, h3, x2, x3, rotate)
            y = fma(_weight(C, v, k, steady_C), h0, load(Y, t * width))
            y2 = _weight(C, v + 1, k + width, steady_C) * h1
            y = fma(_weight(C, v + 2, k + 2 * width, steady_C), h2, y)
            y2 = fma(_weight(C, v + 3, k + 3 * width, steady_C), h3, y2)
            store(Y, t * width, y + y2)
        store(H, k, h0)
        store(H, k + width, h1)
        store(H, k + 2 * width, h2)
        store(H, k + 3 * width, h3)


@inner
def _look_ahead(ahead, i, source, base, channel_stride, step_stride):
    """Where the lines of a tile of `source` lie: 64 of them, so many in a row of memory."""
    size = source.itemsize
    contiguous = step_stride == 1
    per_row = TILE * size // BYTES if contiguous else 1
    ahead[i] = address(source, base)
    ahead[i + 1] = size * (channel_stride if contiguous else step_stride)
    ahead[i + 2] = 0 if per_row == 1 else 1 if per_row == 2 else 2 if per_row == 4 else 3
    ahead[i + 3] = per_row - 1


@inner
def _clear(tile, at, count):
    """Zeros to `count` vectors from tile[at] on."""
    for q in range(count):
        store(tile, at + q * lanes(tile), zero(tile))


@inner
def _fetch(source, base, channels, rows, padded, scale, scale_next, tile, at):
    """Bring `rows` numbers per channel, channels side by side, into vectors at tile[at:], then zeros.

    Of each two rows one is multiplied by `scale`, one by `scale_next`.
    """
    width = lanes(tile)
    _read(source, base, rows, 1, channels, rows, tile, at)
    for q in range(0, rows, 2):
        store(tile, at + q * width, load(tile, at + q * width) * scale)
    for q in range(1, rows, 2):
        store(tile, at + q * width, load(tile, at + q * width) * scale_next)
    _clear(tile, at + rows * width, padded - rows)


@inner
def _limits(rates, at, n):
    """Steps below which no exponent of a block leaves the safe range; NaN if a rate is."""
    largest = zero(rates)
    for q in range(at, at + n * lanes(rates), lanes(rates)):
        largest = largest_magnitude(load(rates, q), largest)
    return (126.0 if rates.itemsize == 4 else 1022.0) / largest


@inner
def _unit(periods, exact):
    """What exponents are counted in, as a factor of A: powers of 2, or eighths for the compound decay."""
    if periods is not None and exact is None:
        return 0.125
    return LOG2_E


@inner
def _forward_room(n):
    """Vectors that a thread of `_forward` works in: S X Y Z, H, A, B, C, bias, D and span."""
    return 4 * (TILE + SKEW) + 4 * n + 3


@compiled
def _forward(
    counter, items, sizes, sequences, bounds, chunks, softplus, has_z, rotate, steady_B, steady_C,
    u, su, delta, sd, z, sz, y, sy, A, B, C, D, bias, room, looks, periods, exact, spans, start_state,
    last_state, saved,
):  # fmt: skip
    """Item i is block i % blocks of sequence i // blocks; `spans` takes the sums of delta, if it has room.

    `periods`, if not None, has those of each block and four rows; `exact` is None for the compound decay.
    """
    g, k, rows, n, per_group, l = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]
    width, blocks, d = lanes(bias), g * per_group, g * k
    area, held = (TILE + SKEW) * width, n * width
    thread = claim(counter[1:])
    own = room[thread * _forward_room(n) * width :]  # as many vectors as `_forward_room` says
    S, X, Y, Z, own = own[:area], own[area:], own[2 * area :], own[3 * area :], own[4 * area :]
    H, rates, own_B, own_C, ends = own, own[held:], own[2 * held :], own[3 * held :], own[4 * held :]
    B_here, C_here = B if steady_B is None else own_B, C if steady_C is None else own_C
    ahead = looks[16 * thread :]
    save, lines = saved.size > 0, address(saved, 0) % BYTES == 0
    unit = _unit(periods, exact)
    turn = 1.0 / (2 * math.pi) if rotate is not None else unit
    item = claim(counter)
    while item < items:
        sequence, block = item // blocks, item % blocks
        row, group, lane = sequences[sequence], block // per_group, block % per_group * width
        channel, channels = group * k + lane, min(width, k - lane)
        w, states = (row * g + group) * l * n, (sequence * d + channel) * rows
        _fetch(A, channel * rows, channels, rows, n, unit, turn, rates, 0)
        limits = _limits(rates, 0, n)
        if steady_B is not None:
            _fetch(B, channel * rows, channels, rows, n, 1.0, 1.0, own_B, 0)
        if steady_C is not None:
            _fetch(C, channel * rows, channels, rows, n, 1.0, 1.0, own_C, 0)
        if start_state.size:
            _fetch(start_state, states, channels, rows, n, 1.0, 1.0, H, 0)
        else:
            _clear(H, 0, n)
        _fetch(bias, channel, channels, 1, 1, 1.0, 1.0, ends, 0)
        _fetch(D, channel, channels, 1, 1, 1.0, 1.0, ends, width)
        biases, skips, span = load(ends, 0), load(ends, width), zero(ends)
        start, end = bounds[2 * sequence], bounds[2 * sequence + 1]
        for t0 in range(start, end, TILE):
            steps = min(TILE, end - t0)
            _read(delta, _at(sd, row, channel, t0), sd[1], sd[2], channels, steps, S, 0)
            _read(u, _at(su, row, channel, t0), su[1], su[2], channels, steps, X, 0)
            fits = True
            for at in range(0, steps * width, width):
                s, x = load(S, at) + biases, load(X, at)
                if softplus:
                    s, _ = softplus_and_slope(s)
                fits = fits and magnitude_below(s, limits)
                span = span + s
                store(S, at, s)
                store(Y, at, skips * x)
                store(X, at, s * x)
            _look_ahead(ahead, 0, delta, _at(sd, row, channel, t0 + TILE), sd[1], sd[2])
            _look_ahead(ahead, 4, u, _at(su, row, channel, t0 + TILE), su[1], su[2])
            _look_ahead(ahead, 8, z, _at(sz, row, channel, t0), sz[1], sz[2])
            _look_ahead(ahead, 12, z, _at(sz, row, channel, t0), sz[1], sz[2])
            stride = CHUNK if save else TILE
            for t in range(0, steps, stride):
                if save:
                    to = ((chunks[sequence] + (t0 - start + t) // CHUNK) * blocks + block) * held
                    for q in range(0, held, width):
                        if lines:
                            store_past_cache(saved, to + q, load(H, q))
                        else:
                            store(saved, to + q, load(H, q))
                more, v = min(stride, steps - t), w + t0 * n
                if periods is not None:
                    _lazy.advance(
                        S, X, Y, t, more, rates, B_here, C_here, v, n, H, ahead, periods,
                        block * (n // UNROLL), exact, steady_B, steady_C,
                    )  # fmt: skip
                elif rotate is not None:
                    _advance(
                        S, X, Y, t, more, rates, B_here, C_here, v, n, H, ahead, 1, 1, steady_B,
                        steady_C,
                    )  # fmt: skip
                elif fits:
                    _advance(
                        S, X, Y, t, more, rates, B_here, C_here, v, n, H, ahead, None, None, steady_B,
                        steady_C,
                    )  # fmt: skip
                else:
                    _advance(
                        S, X, Y, t, more, rates, B_here, C_here, v, n, H, ahead, 1, None, steady_B,
                        steady_C,
                    )  # fmt: skip
            if has_z:
                _read(z, _at(sz, row, channel, t0), sz[1], sz[2], channels, steps, Z, 0)
                for at in range(0, steps * width, width):
                    gate = load(Z, at)
                    store(Y, at, load(Y, at) * gate * sigmoid(gate))
            _write(y, _at(sy, row, channel, t0), sy[1], sy[2], channels, steps, Y, 0)
        _write(last_state, states, rows, 1, channels, rows, H, 0)
        if spans.size:
            store(ends, 2 * width, span)
            _write(spans, sequence * d + channel, 1, 1, channels, 1, ends, 2 * width)
        item = claim(counter)
    fence()


@inner
def _retrace(
    T, o, first, steps, A, a, B, C, w, n, q, H, own, hs, decays, carry, dA,
    dB, pb, tb, dC, pc, tc, clamp, rotate, steady_B, steady_C, ahead, look, next_states,
):  # fmt: skip
    """One chunk and four rows of states: form the states again, then go back through them.

    T holds the tiles of a block, from `o` on: S delta, X delta u, G the gradient of y before the gate, Y = C
    h, and DX and DS, the gradients of X and, over log 2, of S. A, carry and dA of the block begin at a, the
    states before the chunk at H[own]. dB and dC collect at pb + t tb and pc + t tc.

        g_t = C_t dy_t + a_{t+1} g_{t+1},  dC_t = dy_t h_t,  dB_t = g_t x_t,  d(delta A)_t = a_t g_t h_{t-1}
    """
    width = lanes(T)
    area = (TILE + SKEW) * width
    S, X, G, Y, DX, DS = o, o + area, o + 2 * area, o + 3 * area, o + 4 * area, o + 5 * area
    b, k = a + q * width, own + q * width
    A0, A1, A2, A3 = load(A, b), load(A, b + width), load(A, b + 2 * width), load(A, b + 3 * width)
    h0, h1, h2, h3 = load(H, k), load(H, k + width), load(H, k + 2 * width), load(H, k + 3 * width)
    store(hs, 0, h0)
    store(hs, width, h1)
    store(hs, 2 * width, h2)
    store(hs, 3 * width, h3)
    near = look + 4 * ((q // UNROLL) & 3)
    line, stride, shift, mask = ahead[near], ahead[near + 1], ahead[near + 2], ahead[near + 3]
    for i in range(steps):
        prefetch(line + ((first + i) >> shift) * stride + ((first + i) & mask) * BYTES)
        t = (first + i) * width
        s, x, v = load(T, S + t), load(T, X + t), w + i * n + q
        x0, x1 = x * _weight(B, v, b, steady_B), x * _weight(B, v + 1, b + width, steady_B)
        x2, x3 = (
            x * _weight(B, v + 2, b + 2 * width, steady_B),
            x * _weight(B, v + 3, b + 3 * width, steady_B),
        )
        d0, d1 = _decay(s, A0, A1, clamp, rotate)
        d2, d3 = _decay(s, A2, A3, clamp, rotate)
        h0, h1 = _step(d0, d1, h0, h1, x0, x1, rotate)
        h2, h3 = _step(d2, d3, h2, h3, x2, x3, rotate)
        y = fma(_weight(C, v, b, steady_C), h0, load(T, Y + t))
        y2 = _weight(C, v + 1, b + width, steady_C) * h1
        y = fma(_weight(C, v + 2, b + 2 * width, steady_C), h2, y)
        y2 = fma(_weight(C, v + 3, b + 3 * width, steady_C), h3, y2)
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
    c0, c1, c2 = load(carry, b), load(carry, b + width), load(carry, b + 2 * width)
    c3 = load(carry, b + 3 * width)
    e0, e1, e2, e3 = load(dA, b), load(dA, b + width), load(dA, b + 2 * width), load(dA, b + 3 * width)
    k = q * width
    for i in range(steps - 1, -1, -1):
        t = (first + i) * width
        prefetch(next_states + (q + (i & 3)) * BYTES)
        s, x, g, v, j = load(T, S + t), load(T, X + t), load(T, G + t), w + i * n + q, i * 4 * width
        to = pc + i * tc + k
        store(dC, to, fma(g, load(hs, j + 4 * width), load(dC, to)))
        store(dC, to + width, fma(g, load(hs, j + 5 * width), load(dC, to + width)))
        store(dC, to + 2 * width, fma(g, load(hs, j + 6 * width), load(dC, to + 2 * width)))
        store(dC, to + 3 * width, fma(g, load(hs, j + 7 * width), load(dC, to + 3 * width)))
        g0 = fma(_weight(C, v, b, steady_C), g, c0)
        g1 = fma(_weight(C, v + 1, b + width, steady_C), g, c1)
        g2 = fma(_weight(C, v + 2, b + 2 * width, steady_C), g, c2)
        g3 = fma(_weight(C, v + 3, b + 3 * width, steady_C), g, c3)
        to = pb + i * tb + k
        store(dB, to, fma(g0, x, load(dB, to)))
        store(dB, to + width, fma(g1, x, load(dB, to + width)))
        store(dB, to + 2 * width, fma(g2, x, load(dB, to + 2 * width)))
        store(dB, to + 3 * width, fma(g3, x, load(dB, to + 3 * width)))
        dx = fma(g0, _weight(B, v, b, steady_B), load(T, DX + t))
        dx2 = g1 * _weight(B, v + 1, b + width, steady_B)
        dx = fma(g2, _weight(B, v + 2, b + 2 * width, steady_B), dx)
        dx2 = fma(g3, _weight(B, v + 3, b + 3 * width, steady_B), dx2)
        store(T, DX + t, dx + dx2)
        c0, c1 = _step_back(load(decays, j), load(decays, j + width), g0, g1, rotate)
        c2, c3 = _step_back(load(decays, j + 2 * width), load(decays, j + 3 * width), g2, g3, rotate)
        f0, f1 = _match(c0, c1, load(hs, j), load(hs, j + width), rotate)
        f2, f3 = _match(c2, c3, load(hs, j + 2 * width), load(hs, j + 3 * width), rotate)
        ds = fma(f0, A0, load(T, DS + t))
        ds2 = _turned(f1, rotate) * A1
        ds = fma(f2, A2, ds)
        ds2 = fma(_turned(f3, rotate), A3, ds2)
        store(T, DS + t, ds + ds2)
        e0, e1, e2, e3 = fma(f0, s, e0), fma(f1, s, e1), fma(f2, s, e2), fma(f3, s, e3)
    store(carry, b, c0)
    store(carry, b + width, c1)
    store(carry, b + 2 * width, c2)
    store(carry, b + 3 * width, c3)
    store(dA, b, e0)
    store(dA, b + width, e1)
    store(dA, b + 2 * width, e2)
    store(dA, b + 3 * width, e3)


@inner
def _backward_room(n, size):
    """Vectors that a thread of `_backward` works in, for `size` blocks.

    Ten tiles each, a chunk's states and decays, sums of dB and dC over the blocks; then of each block A, B,
    C, the carried gradient, dA, dB, dC, and bias, D, dD, dbias, span, limits, fit.
    """
    return 10 * size * (TILE + SKEW) + 8 * CHUNK + 4 + 2 * CHUNK * n + 7 * size * n + 7 * size


@compiled
def _backward(
    counter, items, sizes, sequences, bounds, chunks, softplus, has_z, rotate, steady_B, steady_C,
    u, su, delta, sd, z, sz, dy, sdy, A, B, C, D, bias, room, looks, periods, exact, spans, last_grad, saved,
    du, sdu, ddelta, sdd, dz, sdz, start_grad, dA, dD, dbias, dB, dC, sums_B, sums_C,
):  # fmt: skip
    """Item i is superblock i % supers of sequence i // supers.

    dA, dD, dbias, and dB and dC if B and C are constant, take the sums over each sequence; sums_B and sums_C
    else those over each superblock.
    """
    g, k, rows, n, per_group, l = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]
    size, supers = sizes[6], sizes[7]
    width, blocks, d, per_super = lanes(bias), g * per_group, g * k, supers // g
    area, held = (TILE + SKEW) * width, n * width
    tiles, each = 10 * area, size * held  # S X G Y DX DS U Z slope Q
    thread = claim(counter[1:])
    T = room[thread * _backward_room(n, size) * width :]
    hs, own = T[size * tiles :], T[size * tiles + 4 * (CHUNK + 1) * width :]
    decays, collect_B = own, own[4 * CHUNK * width :]
    collect_C, own = collect_B[CHUNK * held :], collect_B[2 * CHUNK * held :]
    rates, own_B, own_C, carries = own, own[each:], own[2 * each :], own[3 * each :]
    sums_A, held_B, held_C, ends = own[4 * each :], own[5 * each :], own[6 * each :], own[7 * each :]
    fits = ends[6 * size * width :]
    B_here, C_here = B if steady_B is None else own_B, C if steady_C is None else own_C
    ahead = looks[16 * size * thread :]
    unit = _unit(periods, exact)
    turn = 1.0 / (2 * math.pi) if rotate is not None else unit
    item = claim(counter)
    while item < items:
        sequence, superblock = item // supers, item % supers
        row, group = sequences[sequence], superblock // per_super
        block0 = superblock % per_super * size  # in the group
        count = min(size, per_group - block0)
        start, end = bounds[2 * sequence], bounds[2 * sequence + 1]
        w = (row * g + group) * l * n
        _clear(sums_A, 0, 3 * size * n)  # held_B and held_C as well
        _clear(ends, 0, 6 * size)
        for i in range(count):
            lane, own, e = (block0 + i) * width, i * held, 6 * i * width
            channel, channels = group * k + lane, min(width, k - lane)
            _fetch(A, channel * rows, channels, rows, n, unit, turn, rates, own)
            store(ends, e + 5 * width, _limits(rates, own, n))
            _fetch(last_grad, (sequence * d + channel) * rows, channels, rows, n, 1.0, 1.0, carries, own)
            _fetch(bias, channel, channels, 1, 1, 1.0, 1.0, ends, e)
            _fetch(D, channel, channels, 1, 1, 1.0, 1.0, ends, e + width)
            if steady_B is not None:
                _fetch(B, channel * rows, channels, rows, n, 1.0, 1.0, own_B, own)
            if steady_C is not None:
                _fetch(C, channel * rows, channels, rows, n, 1.0, 1.0, own_C, own)
        total = (end - start + TILE - 1) // TILE
        for tile in range(total - 1, -1, -1):
            t0 = start + tile * TILE
            steps = min(TILE, end - t0)
            for i in range(count):
                lane, o = (block0 + i) * width, i * tiles
                channel, channels = group * k + lane, min(width, k - lane)
                e = 6 * i * width
                biases, span, limits = load(ends, e), load(ends, e + 4 * width), load(ends, e + 5 * width)
                _read(delta, _at(sd, row, channel, t0), sd[1], sd[2], channels, steps, T, o)
                _read(u, _at(su, row, channel, t0), su[1], su[2], channels, steps, T, o + 6 * area)
                _read(dy, _at(sdy, row, channel, t0), sdy[1], sdy[2], channels, steps, T, o + 2 * area)
                if has_z:
                    _read(z, _at(sz, row, channel, t0), sz[1], sz[2], channels, steps, T, o + 7 * area)
                inside = True
                for t in range(o, o + steps * width, width):
                    s = load(T, t) + biases
                    if softplus:
                        s, slope = softplus_and_slope(s)
                        store(T, t + 8 * area, slope)
                    inside = inside and magnitude_below(s, limits)
                    span = span + s
                    store(T, t, s)
                    store(T, t + area, s * load(T, t + 6 * area))
                    if has_z:
                        gate, grad = load(T, t + 7 * area), load(T, t + 2 * area)
                        open_ = sigmoid(gate)
                        store(T, t + 2 * area, grad * gate * open_)
                        store(T, t + 9 * area, grad * open_ * (1.0 + gate * (1.0 - open_)))
                    for clear in range(3, 6):
                        store(T, t + clear * area, zero(T))
                fits[i] = 1 if inside else 0
                store(ends, e + 4 * width, span)
                _look_ahead(ahead, 16 * i, delta, _at(sd, row, channel, t0 - TILE), sd[1], sd[2])
                _look_ahead(ahead, 16 * i + 4, u, _at(su, row, channel, t0 - TILE), su[1], su[2])
                _look_ahead(ahead, 16 * i + 8, dy, _at(sdy, row, channel, t0 - TILE), sdy[1], sdy[2])
                _look_ahead(ahead, 16 * i + 12, z, _at(sz, row, channel, t0 - TILE), sz[1], sz[2])
            for at in range((steps - 1) // CHUNK * CHUNK, -1, -CHUNK):
                here = min(CHUNK, steps - at)
                if steady_B is None:
                    _clear(collect_B, 0, here * n)
                if steady_C is None:
                    _clear(collect_C, 0, here * n)
                for i in range(count):
                    block, own = group * per_group + block0 + i, i * held
                    before = ((chunks[sequence] + (t0 - start + at) // CHUNK) * blocks + block) * held
                    ahead_states = address(saved, before - blocks * held)
                    sink_B, pb, tb = (collect_B, 0, held) if steady_B is None else (held_B, own, 0)
                    sink_C, pc, tc = (collect_C, 0, held) if steady_C is None else (held_C, own, 0)
                    for q in range(0, n, UNROLL):
                        if periods is not None:
                            _lazy.retrace(
                                T, i * tiles, area, at, here, rates, own, B_here, C_here,
                                w + (t0 + at) * n, n, q, saved, before, hs, carries, sums_A,
                                sink_B, pb, tb, sink_C, pc, tc, periods[(block * n + q) // UNROLL], exact,
                                steady_B, steady_C, ahead, 16 * i, ahead_states,
                            )  # fmt: skip
                        elif rotate is not None:
                            _retrace(
                                T, i * tiles, at, here, rates, own, B_here, C_here, w + (t0 + at) * n, n, q,
                                saved, before, hs, decays, carries, sums_A, sink_B, pb, tb, sink_C, pc, tc,
                                1, 1, steady_B, steady_C, ahead, 16 * i, ahead_states,
                            )  # fmt: skip
                        elif fits[i] > 0:
                            _retrace(
                                T, i * tiles, at, here, rates, own, B_here, C_here, w + (t0 + at) * n, n, q,
                                saved, before, hs, decays, carries, sums_A, sink_B, pb, tb, sink_C, pc, tc,
                                None, None, steady_B, steady_C, ahead, 16 * i, ahead_states,
                            )  # fmt: skip
                        else:
                            _retrace(
                                T, i * tiles, at, here, rates, own, B_here, C_here, w + (t0 + at) * n, n, q,
                                saved, before, hs, decays, carries, sums_A, sink_B, pb, tb, sink_C, pc, tc,
                                1, None, steady_B, steady_C, ahead, 16 * i, ahead_states,
                            )  # fmt: skip
                to = ((row * supers + superblock) * l + t0 + at) * n
                for j in range(here * n):
                    if steady_B is None:
                        put(sums_B, to + j, sum_lanes(load(collect_B, j * width)))
                    if steady_C is None:
                        put(sums_C, to + j, sum_lanes(load(collect_C, j * width)))
            for i in range(count):
                lane, o, e = (block0 + i) * width, i * tiles, 6 * i * width
                channel, channels = group * k + lane, min(width, k - lane)
                skips = load(ends, e + width)
                sum_D, sum_bias = load(ends, e + 2 * width), load(ends, e + 3 * width)
                for t in range(o, o + steps * width, width):
                    s, grad, x_grad = load(T, t), load(T, t + 2 * area), load(T, t + 4 * area)
                    value = load(T, t + 6 * area)
                    grad_delta = fma(x_grad, value, load(T, t + 5 * area) * (1.0 / unit))
                    if softplus:
                        grad_delta = grad_delta * load(T, t + 8 * area)
                    sum_D, sum_bias = fma(grad, value, sum_D), sum_bias + grad_delta
                    if has_z:
                        ungated = fma(skips, value, load(T, t + 3 * area))
                        store(T, t + 7 * area, load(T, t + 9 * area) * ungated)
                    store(T, t + 6 * area, fma(x_grad, s, skips * grad))
                    store(T, t, grad_delta)
                store(ends, e + 2 * width, sum_D)
                store(ends, e + 3 * width, sum_bias)
                _write(ddelta, _at(sdd, row, channel, t0), sdd[1], sdd[2], channels, steps, T, o)
                _write(du, _at(sdu, row, channel, t0), sdu[1], sdu[2], channels, steps, T, o + 6 * area)
                if has_z:
                    _write(dz, _at(sdz, row, channel, t0), sdz[1], sdz[2], channels, steps, T, o + 7 * area)
        for i in range(count):
            lane, own, e = (block0 + i) * width, i * held, 6 * i * width
            channel, channels = group * k + lane, min(width, k - lane)
            channel_here, states = sequence * d + channel, (sequence * d + channel) * rows
            _write(dA, states, rows, 1, channels, rows, sums_A, own)
            _write(dD, channel_here, 1, 1, channels, 1, ends, e + 2 * width)
            _write(dbias, channel_here, 1, 1, channels, 1, ends, e + 3 * width)
            if spans.size:
                _write(spans, channel_here, 1, 1, channels, 1, ends, e + 4 * width)
            if start_grad.size:
                _write(start_grad, states, rows, 1, channels, rows, carries, own)
            if steady_B is not None:
                _write(dB, states, rows, 1, channels, rows, held_B, own)
            if steady_C is not None:
                _write(dC, states, rows, 1, channels, rows, held_C, own)
        item = claim(counter)
    fence()


def _forward_pass(inputs: Inputs, delta_softplus: bool, y: Tensor, last_state: Tensor, saved: Tensor) -> None:
    layout, start, none = Layout(inputs, delta_softplus), inputs.initial_state, saved[:0]
    in_large_pages(y, saved)
    if layout.pieces == 1:
        _forward_run(layout, y, start, last_state, saved, none)
        return
    # From zero, each piece ends in `gained`; the states between pieces follow, and the true pass with them.
    gained, spans = layout.per_piece(inputs.A.shape)
    _forward_run(layout, y, None, gained.flatten(0, 1), none, spans)
    state = torch.zeros_like(last_state) if start is None else start
    decays, starts = torch.exp(spans[..., None] * inputs.A), torch.empty_like(gained)
    for i in range(layout.pieces):
        starts[:, i] = state
        state = decays[:, i] * state + gained[:, i]
    _forward_run(layout, y, starts.flatten(0, 1), gained.flatten(0, 1), saved, none)
    last_state.copy_(gained[:, -1])


def _forward_run(
    layout: Layout, y: Tensor, start: Tensor | None, last: Tensor, saved: Tensor, spans: Tensor,
    periods: np.ndarray | None = None, exact: int | None = None,
) -> None:  # fmt: skip
    vectors = _forward_room.py_func(layout.padded)
    run(
        _forward, layout.sequences * layout.blocks, layout.work, *layout.arguments(y, vectors), periods,
        exact, flat(spans), flat(saved[:0] if start is None else start.contiguous()), flat(last), flat(saved),
    )  # fmt: skip


def _backward_pass(
    grad_y: Tensor, grad_last: Tensor, saved: Tensor, inputs: Inputs, delta_softplus: bool, grads: Inputs
) -> None:
    layout, none = Layout(inputs, delta_softplus), saved[:0]
    in_large_pages(*grads)
    if layout.pieces == 1:
        _backward_run(layout, grad_y, grad_last, saved, grads, grads.initial_state, none)
        return
    # As in the forward pass, in reverse: what each piece alone sends to its start, then the true pass.
    sent, spans = layout.per_piece(inputs.A.shape)
    alone = torch.zeros_like(sent).flatten(0, 1)
    _backward_run(layout, grad_y, alone, saved, grads, sent.flatten(0, 1), spans)
    decays, ends, grad = torch.exp(spans[..., None] * inputs.A).conj(), torch.empty_like(sent), grad_last
    for i in reversed(range(layout.pieces)):
        ends[:, i] = grad
        grad = decays[:, i] * grad + sent[:, i]
    _backward_run(layout, grad_y, ends.flatten(0, 1), saved, grads, None, none)
    if grads.initial_state is not None:
        grads.initial_state.copy_(grad)


def _backward_run(
    layout: Layout, grad_y: Tensor, grad_last: Tensor, saved: Tensor, grads: Inputs,
    grad_start: Tensor | None, spans: Tensor, periods: np.ndarray | None = None, exact: int | None = None,
) -> None:  # fmt: skip
    inputs, s, d = layout.inputs, layout.sequences, layout.inputs.A.shape[0]

    def room(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=layout.real)

    dA, dD, dbias = room(s, d, layout.rows), room(s, d), room(s, d)
    constant = [room(s if t.dim() == 2 else 0, d, layout.rows) for t in (inputs.B, inputs.C)]
    sums = [
        room(layout.b if t.dim() == 4 else 0, layout.g, layout.supers // layout.g, layout.l, layout.padded)
        for t in (inputs.B, inputs.C)
    ]
    vectors = _backward_room.py_func(layout.padded, int(layout.sizes[6]))
    run(
        _backward, s * layout.supers, layout.work, *layout.arguments(grad_y, vectors), periods, exact,
        flat(spans), flat(grad_last.contiguous()), flat(saved), *memory(grads.u), *memory(grads.delta),
        *memory(grads.u if grads.z is None else grads.z),
        flat(saved[:0] if grad_start is None else grad_start),
        *map(flat, (dA, dD, dbias, *constant, *sums)),
    )  # fmt: skip
    grads.A.copy_(layout.gradient(dA.sum(0)))
    for grad, each in ((grads.D, dD), (grads.delta_bias, dbias)):
        if grad is not None:
            grad.copy_(each.sum(0))
    for grad, each, part, conjugate in (
        (grads.B, constant[0], sums[0], False), (grads.C, constant[1], sums[1], True),
    ):  # fmt: skip
        if grad.dim() == 2:
            grad.copy_(layout.gradient(each.sum(0), conjugate))
        else:
            over = part.sum(2)[..., : layout.rows]
            grad.copy_(layout.gradient(over, conjugate).transpose(2, 3))


def lazy_forward(
    inputs: Inputs, delta_softplus: bool, periods: np.ndarray, exact: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`projecta.mrss_scan`: y, the last states, and what `lazy_backward` needs if `save`.

    `periods` has those of each vector of channels and four states in turn; they divide `CHUNK`.
    """
    layout, (u, _, A) = Layout(inputs, delta_softplus, whole=True), inputs[:3]
    saved = A.new_empty(saved_shape(inputs, layout.sequences, 1) if save else 0)
    y, last = torch.empty_like(u), A.new_empty(layout.sequences, *A.shape)
    start, none = inputs.initial_state, saved[:0]
    in_large_pages(y, saved)
    _forward_run(layout, y, start, last, saved, none, periods, 1 if exact else None)
    return y, last, saved


def lazy_backward(
    grad_y: Tensor, grad_last: Tensor, saved: Tensor, inputs: Inputs, delta_softplus: bool, grads: Inputs,
    periods: np.ndarray, exact: bool,
) -> None:  # fmt: skip
    """Writes `grads`, None where an input is."""
    layout, none = Layout(inputs, delta_softplus, whole=True), saved[:0]
    in_large_pages(*grads)
    _backward_run(
        layout, grad_y, grad_last, saved, grads, grads.initial_state, none, periods, 1 if exact else None
    )


selective_scan = define("scan_cpu", _forward_pass, _backward_pass, saved_shape)
selective_state_update = reference.selective_state_update  # few operations on all states at once: not slower


def unavailable() -> str:
    """Why this backend cannot run; "" when it can."""
    return ""
