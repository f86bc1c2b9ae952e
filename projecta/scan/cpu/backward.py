"""The backward kernel of the CPU backend.

A superblock is several blocks of channels that share their sums of dB and dC. The kernel recomputes the
states of a chunk from those that the forward pass saved every `CHUNK` steps, then goes through the chunk in
reverse.
"""

import math
from typing import NamedTuple

import numpy as np

from projecta._cpu.shuffles import sum_lanes
from projecta._cpu.simd import (
    BYTES,
    LOG2_E,
    address,
    array_at,
    claim,
    fence,
    fma,
    lanes,
    load,
    magnitude_below,
    prefetch,
    put,
    sigmoid,
    softplus_and_slope,
    store,
    zero,
)
from projecta._cpu.threads import compiled, inner
from projecta.scan.cpu.layout import CHUNK, UNROLL, steps_at, weights_at
from projecta.scan.cpu.recurrence import (
    decay_of,
    match_rows,
    step_rows,
    step_rows_back,
    to_radians,
    weight_of,
)
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
    write_channels,
    write_rows,
)


@inner
def _recompute(
    T, o, first, steps, A, a, B, C, w, n, q, H, own, hs, decays, clamp, rotate, steady_B, steady_C, ahead,
    look
):  # fmt: skip
    """Recompute the states of a chunk into hs, and their decays into decays; add C h to Y."""
    width = lanes(T)
    area = (TILE + SKEW) * width
    S, X, Y = o, o + area, o + 3 * area
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
        x0, x1 = x * weight_of(B, v, b, steady_B), x * weight_of(B, v + 1, b + width, steady_B)
        x2, x3 = (
            x * weight_of(B, v + 2, b + 2 * width, steady_B),
            x * weight_of(B, v + 3, b + 3 * width, steady_B),
        )
        d0, d1 = decay_of(s, A0, A1, clamp, rotate)
        d2, d3 = decay_of(s, A2, A3, clamp, rotate)
        h0, h1 = step_rows(d0, d1, h0, h1, x0, x1, rotate)
        h2, h3 = step_rows(d2, d3, h2, h3, x2, x3, rotate)
        y = fma(weight_of(C, v, b, steady_C), h0, load(T, Y + t))
        y2 = weight_of(C, v + 1, b + width, steady_C) * h1
        y = fma(weight_of(C, v + 2, b + 2 * width, steady_C), h2, y)
        y2 = fma(weight_of(C, v + 3, b + 3 * width, steady_C), h3, y2)
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


@inner
def _go_back(
    T, o, first, steps, A, a, B, C, w, n, q, hs, decays, carry, dA, dB, pb, tb, dC, pc, tc, rotate, steady_B,
    steady_C, next_states,
):  # fmt: skip
    """Go back through the chunk: gradients of X, S, B and C, the carried gradient and dA."""
    width = lanes(T)
    area = (TILE + SKEW) * width
    S, X, G, DX, DS = o, o + area, o + 2 * area, o + 4 * area, o + 5 * area
    b = a + q * width
    A0, A1, A2, A3 = load(A, b), load(A, b + width), load(A, b + 2 * width), load(A, b + 3 * width)
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
        g0 = fma(weight_of(C, v, b, steady_C), g, c0)
        g1 = fma(weight_of(C, v + 1, b + width, steady_C), g, c1)
        g2 = fma(weight_of(C, v + 2, b + 2 * width, steady_C), g, c2)
        g3 = fma(weight_of(C, v + 3, b + 3 * width, steady_C), g, c3)
        to = pb + i * tb + k
        store(dB, to, fma(g0, x, load(dB, to)))
        store(dB, to + width, fma(g1, x, load(dB, to + width)))
        store(dB, to + 2 * width, fma(g2, x, load(dB, to + 2 * width)))
        store(dB, to + 3 * width, fma(g3, x, load(dB, to + 3 * width)))
        dx = fma(g0, weight_of(B, v, b, steady_B), load(T, DX + t))
        dx2 = g1 * weight_of(B, v + 1, b + width, steady_B)
        dx = fma(g2, weight_of(B, v + 2, b + 2 * width, steady_B), dx)
        dx2 = fma(g3, weight_of(B, v + 3, b + 3 * width, steady_B), dx2)
        store(T, DX + t, dx + dx2)
        c0, c1 = step_rows_back(load(decays, j), load(decays, j + width), g0, g1, rotate)
        c2, c3 = step_rows_back(load(decays, j + 2 * width), load(decays, j + 3 * width), g2, g3, rotate)
        f0, f1 = match_rows(c0, c1, load(hs, j), load(hs, j + width), rotate)
        f2, f3 = match_rows(c2, c3, load(hs, j + 2 * width), load(hs, j + 3 * width), rotate)
        ds = fma(f0, A0, load(T, DS + t))
        ds2 = to_radians(f1, rotate) * A1
        ds = fma(f2, A2, ds)
        ds2 = fma(to_radians(f3, rotate), A3, ds2)
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
def retrace(
    tile, first, steps, A, a, weights, place, states, carry, dA, sinks, clamp, rotate, steady_B, steady_C,
    looks
):  # fmt: skip
    """One chunk and four rows of states: recompute the states, then go back through them.

    T holds the tiles of a block from `o` on: S = delta, X = delta u, G = gradient of y before the gate,
    Y = C h, DX = gradient of X, DS = gradient of S over log 2. A, carry and dA of the block begin at a, the
    states before the chunk at H[own]. dB and dC of step t are summed at pb + t tb and pc + t tc.

    tile: T, o. weights: B, C. place: w, n, q. states: H, own, hs, decays. sinks: dB, pb, tb, dC, pc, tc.
    looks: ahead, look, next_states.

        g_t = C_t dy_t + a_{t+1} g_{t+1},  dC_t = dy_t h_t,  dB_t = g_t x_t,  d(delta A)_t = a_t g_t h_{t-1}
    """
    (T, o), (B, C), (w, n, q), (H, own, hs, decays) = tile, weights, place, states
    (dB, pb, tb, dC, pc, tc), (ahead, look, next_states) = sinks, looks
    _recompute(
        T, o, first, steps, A, a, B, C, w, n, q, H, own, hs, decays, clamp, rotate, steady_B, steady_C,
        ahead, look
    )  # fmt: skip
    _go_back(
        T, o, first, steps, A, a, B, C, w, n, q, hs, decays, carry, dA, dB, pb, tb, dC, pc, tc, rotate,
        steady_B, steady_C, next_states,
    )  # fmt: skip


@inner
def workspace_vectors(n, size):
    """Workspace of a thread of `backward` for `size` blocks, in vectors.

    Ten tiles per block; states and decays of a chunk; sums of dB and dC over the blocks; then for each block
    A, B, C, the carried gradient, dA, dB, dC, and bias, D, dD, dbias, span, limits, fit.
    """
    return 10 * size * (TILE + SKEW) + 8 * CHUNK + 4 + 2 * CHUNK * n + 7 * size * n + 7 * size


class States(NamedTuple):
    """Flat states of the sequences, empty if absent; `spans` receives the sums of delta."""

    spans: np.ndarray
    last_grad: np.ndarray
    saved: np.ndarray
    start_grad: np.ndarray


class Grads(NamedTuple):
    """Gradients (b, d, l) as flat memory and strides."""

    du: np.ndarray
    du_strides: np.ndarray
    ddelta: np.ndarray
    ddelta_strides: np.ndarray
    dz: np.ndarray
    dz_strides: np.ndarray


class Sums(NamedTuple):
    """Sums over each sequence; if B and C vary, B and C hold dB and dC summed over each superblock."""

    dA: np.ndarray
    dD: np.ndarray
    dbias: np.ndarray
    dB: np.ndarray
    dC: np.ndarray
    B: np.ndarray
    C: np.ndarray


@inner
def grads_at(places, kinds):
    return Grads(
        array_at(places[0], 1, kinds.u), places[1:4], array_at(places[4], 1, kinds.delta), places[5:8],
        array_at(places[8], 1, kinds.z), places[9:12],
    )  # fmt: skip


@inner
def states_at(places, kinds):
    real = kinds.real
    return States(
        optional(places[0], real), optional(places[1], real), array_at(places[2], 1, real),
        optional(places[3], real),
    )  # fmt: skip


@inner
def sums_at(places, kinds):
    real = kinds.real
    return Sums(
        array_at(places[0], 1, real), array_at(places[1], 1, real), array_at(places[2], 1, real),
        array_at(places[3], 1, real), array_at(places[4], 1, real), array_at(places[5], 1, real),
        array_at(places[6], 1, real),
    )  # fmt: skip


@inner
def _prepare(T, o, area, steps, ends, e, softplus, has_z):
    """Compute S, X, G and the slopes of softplus and gate; return whether all exponents are safe."""
    width, inside = lanes(T), True
    biases, span, limits = load(ends, e), load(ends, e + 4 * width), load(ends, e + 5 * width)
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
    store(ends, e + 4 * width, span)
    return inside


@inner
def _finish(T, o, area, steps, ends, e, unit, softplus, has_z):
    """Compute the gradients of delta, u and z from those of S, X and y; sum those of D and the bias."""
    width = lanes(T)
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


@inner
def _retrace(
    tile, area, at, steps, rates, own, weights, place, n, saved, before, hs, decays, carries, sums_A, sinks,
    fits, rotate, steady_B, steady_C, looks,
):  # fmt: skip
    """Retrace all rows of states of a block over a chunk, by the variant for this call and its exponents."""
    for q in range(0, n, UNROLL):
        here = place, n, q
        if rotate is not None:
            retrace(
                tile, at, steps, rates, own, weights, here, (saved, before, hs, decays), carries, sums_A,
                sinks, 1, 1, steady_B, steady_C, looks,
            )  # fmt: skip
        elif fits:
            retrace(
                tile, at, steps, rates, own, weights, here, (saved, before, hs, decays), carries, sums_A,
                sinks, None, None, steady_B, steady_C, looks,
            )  # fmt: skip
        else:
            retrace(
                tile, at, steps, rates, own, weights, here, (saved, before, hs, decays), carries, sums_A,
                sinks, 1, None, steady_B, steady_C, looks,
            )  # fmt: skip


@inner
def _retrace_chunk(
    tile, at, steps, rates, weights, place, n, count, first, states, carries, sums_A, sinks, fits, rotate,
    steady_B, steady_C, ahead, sums, to,
):  # fmt: skip
    """Retrace all blocks of a superblock over a chunk; sum dB and dC over blocks and lanes.

    `first` is the first block; the states of `chunk` + `first` blocks precede its states in memory.
    """
    (T, tiles, area), (saved, chunk, blocks, hs, decays) = tile, states
    collect_B, held_B, collect_C, held_C = sinks
    width = lanes(T)
    held = n * width
    if steady_B is None:
        clear_vectors(collect_B, 0, steps * n)
    if steady_C is None:
        clear_vectors(collect_C, 0, steps * n)
    for i in range(count):
        own, before = i * held, (chunk + first + i) * held
        looks = ahead, 16 * i, address(saved, before - blocks * held)
        sink_B, pb, tb = (collect_B, 0, held) if steady_B is None else (held_B, own, 0)
        sink_C, pc, tc = (collect_C, 0, held) if steady_C is None else (held_C, own, 0)
        _retrace(
            (T, i * tiles), area, at, steps, rates, own, weights, place, n, saved, before, hs, decays,
            carries, sums_A, (sink_B, pb, tb, sink_C, pc, tc), fits[i] > 0, rotate, steady_B, steady_C,
            looks,
        )  # fmt: skip
    for j in range(steps * n):
        if steady_B is None:
            put(sums.B, to + j, sum_lanes(load(collect_B, j * width)))
        if steady_C is None:
            put(sums.C, to + j, sum_lanes(load(collect_C, j * width)))


@inner
def _channels(group, k, block, width):
    """The first channel of a block of a group, and its number of channels."""
    lane = block * width
    return group * k + lane, min(width, k - lane)


@inner
def _begin_block(
    weights, channel, channels, rows, n, unit, turn, rates, own_B, own_C, own, ends, e, steady_B, steady_C
):
    """Load A, D, the bias, and B and C if they are constant, of a block's channels into vectors."""
    width = lanes(ends)
    fetch_rows(weights.A, channel * rows, channels, rows, n, unit, turn, rates, own)
    store(ends, e + 5 * width, limits_of(rates, own, n))
    fetch_channels(weights.bias, channel, channels, ends, e)
    fetch_channels(weights.D, channel, channels, ends, e + width)
    if steady_B is not None:
        fetch_rows(weights.B, channel * rows, channels, rows, n, 1.0, 1.0, own_B, own)
    if steady_C is not None:
        fetch_rows(weights.C, channel * rows, channels, rows, n, 1.0, 1.0, own_C, own)


@inner
def _end_block(
    sums, states, place, channels, rows, sums_A, held_B, held_C, carries, own, ends, e, steady_B, steady_C
):  # fmt: skip
    """Write a block's sums over its sequence; `place` indexes its first channel in (sequence, d)."""
    width = lanes(ends)
    write_rows(sums.dA, place * rows, channels, rows, sums_A, own)
    write_channels(sums.dD, place, channels, ends, e + 2 * width)
    write_channels(sums.dbias, place, channels, ends, e + 3 * width)
    if states.spans.size:
        write_channels(states.spans, place, channels, ends, e + 4 * width)
    if states.start_grad.size:
        write_rows(states.start_grad, place * rows, channels, rows, carries, own)
    if steady_B is not None:
        write_rows(sums.dB, place * rows, channels, rows, held_B, own)
    if steady_C is not None:
        write_rows(sums.dC, place * rows, channels, rows, held_C, own)


@inner
def _begin_tile(work, x, T, o, area, row, channel, channels, t0, steps, ends, e, ahead, i):
    """Read a tile of a block and prepare it; return whether its exponents are safe."""
    read(x.delta, x.delta_strides, row, channel, channels, t0, steps, T, o)
    read(x.u, x.u_strides, row, channel, channels, t0, steps, T, o + 6 * area)
    read(x.y, x.y_strides, row, channel, channels, t0, steps, T, o + 2 * area)
    if work.has_z:
        read(x.z, x.z_strides, row, channel, channels, t0, steps, T, o + 7 * area)
    inside = _prepare(T, o, area, steps, ends, e, work.softplus, work.has_z)
    look_ahead(ahead[i:], x.delta, x.delta_strides, row, channel, t0 - TILE)
    look_ahead(ahead[i + 4 :], x.u, x.u_strides, row, channel, t0 - TILE)
    look_ahead(ahead[i + 8 :], x.y, x.y_strides, row, channel, t0 - TILE)
    look_ahead(ahead[i + 12 :], x.z, x.z_strides, row, channel, t0 - TILE)
    return inside


@inner
def _end_tile(work, grads, T, o, area, row, channel, channels, t0, steps, ends, e, unit):
    """Finish a tile of a block and write its gradients."""
    _finish(T, o, area, steps, ends, e, unit, work.softplus, work.has_z)
    write(grads.ddelta, grads.ddelta_strides, row, channel, channels, t0, steps, T, o)
    write(grads.du, grads.du_strides, row, channel, channels, t0, steps, T, o + 6 * area)
    if work.has_z:
        write(grads.dz, grads.dz_strides, row, channel, channels, t0, steps, T, o + 7 * area)


@compiled
def backward(counter, items, work, kinds, places, rotate, steady_B, steady_C):
    """Item i is superblock i % supers of sequence i // supers.

    places: steps, the gradients of u, delta and z likewise, weights, then States and Sums.
    """
    x, grads, weights = steps_at(places, kinds), grads_at(places[16:], kinds), weights_at(places[28:], kinds)
    states, sums, real = states_at(places[33:], kinds), sums_at(places[37:], kinds), kinds.real
    sizes, saved = work.sizes, states.saved
    g, k, rows, n, per_group, l = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]
    size, supers = sizes[6], sizes[7]
    width, blocks, d, per_super = lanes(real), g * per_group, g * k, supers // g
    area, held = (TILE + SKEW) * width, n * width
    tiles, each = 10 * area, size * held  # S X G Y DX DS U Z, slopes of softplus and gate
    T = aligned(real, workspace_vectors(n, size))
    hs, own = T[size * tiles :], T[size * tiles + 4 * (CHUNK + 1) * width :]
    decays, collect_B = own, own[4 * CHUNK * width :]
    collect_C, own = collect_B[CHUNK * held :], collect_B[2 * CHUNK * held :]
    rates, own_B, own_C, carries = own, own[each:], own[2 * each :], own[3 * each :]
    sums_A, held_B, held_C, ends = own[4 * each :], own[5 * each :], own[6 * each :], own[7 * each :]
    fits = ends[6 * size * width :]
    B, C = weights.B if steady_B is None else own_B, weights.C if steady_C is None else own_C
    ahead = np.zeros(16 * size, np.int64)  # what to prefetch
    unit = LOG2_E
    turn = 1.0 / (2 * math.pi) if rotate is not None else unit
    item = claim(counter)
    while item < items:
        sequence, superblock = item // supers, item % supers
        row, group = work.sequences[sequence], superblock // per_super
        block0 = superblock % per_super * size  # in the group
        count = min(size, per_group - block0)
        start, end = work.bounds[2 * sequence], work.bounds[2 * sequence + 1]
        w = (row * g + group) * l * n
        clear_vectors(sums_A, 0, 3 * size * n)  # held_B and held_C as well
        clear_vectors(ends, 0, 6 * size)
        for i in range(count):
            channel, channels = _channels(group, k, block0 + i, width)
            _begin_block(
                weights, channel, channels, rows, n, unit, turn, rates, own_B, own_C, i * held, ends,
                6 * i * width, steady_B, steady_C,
            )  # fmt: skip
            place = (sequence * d + channel) * rows
            if states.last_grad.size:
                fetch_rows(states.last_grad, place, channels, rows, n, 1.0, 1.0, carries, i * held)
            else:
                clear_vectors(carries, i * held, n)
        total = (end - start + TILE - 1) // TILE
        for tile in range(total - 1, -1, -1):
            t0 = start + tile * TILE
            steps = min(TILE, end - t0)
            for i in range(count):
                channel, channels = _channels(group, k, block0 + i, width)
                inside = _begin_tile(
                    work, x, T, i * tiles, area, row, channel, channels, t0, steps, ends, 6 * i * width,
                    ahead, 16 * i
                )  # fmt: skip
                fits[i] = 1 if inside else 0
            for at in range((steps - 1) // CHUNK * CHUNK, -1, -CHUNK):
                chunk = (work.chunks[sequence] + (t0 - start + at) // CHUNK) * blocks
                to = ((row * supers + superblock) * l + t0 + at) * n
                _retrace_chunk(
                    (T, tiles, area), at, min(CHUNK, steps - at), rates, (B, C), w + (t0 + at) * n, n, count,
                    group * per_group + block0, (saved, chunk, blocks, hs, decays), carries, sums_A,
                    (collect_B, held_B, collect_C, held_C), fits, rotate, steady_B, steady_C, ahead, sums, to,
                )  # fmt: skip
            for i in range(count):
                channel, channels = _channels(group, k, block0 + i, width)
                _end_tile(
                    work, grads, T, i * tiles, area, row, channel, channels, t0, steps, ends, 6 * i * width,
                    unit
                )  # fmt: skip
        for i in range(count):
            channel, channels = _channels(group, k, block0 + i, width)
            _end_block(
                sums, states, sequence * d + channel, channels, rows, sums_A, held_B, held_C, carries,
                i * held, ends, 6 * i * width, steady_B, steady_C,
            )  # fmt: skip
        item = claim(counter)
    fence()
