"""The backward kernel of the CPU backend.

A superblock is several blocks of channels that share their sums of dB and dC. From the states that the
forward pass saved every `CHUNK` steps the kernel computes the states of a chunk again, then goes through the
chunk in reverse.
"""

import math

from projecta.scan.cpu import lazy
from projecta.scan.cpu.layout import CHUNK, UNROLL
from projecta.scan.cpu.recurrence import decay_of, in_turns, match_rows, step_rows, step_rows_back, weight_of
from projecta.scan.cpu.simd import (
    BYTES,
    address,
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
    sum_lanes,
    zero,
)
from projecta.scan.cpu.threads import compiled, inner
from projecta.scan.cpu.tiles import (
    SKEW,
    TILE,
    clear_vectors,
    exponent_unit,
    fetch_rows,
    index,
    limits_of,
    look_ahead,
    read,
    write,
)


@inner
def retrace(
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
        ds2 = in_turns(f1, rotate) * A1
        ds = fma(f2, A2, ds)
        ds2 = fma(in_turns(f3, rotate), A3, ds2)
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
def backward_room(n, size):
    """Vectors that a thread of `backward` works in, for `size` blocks.

    Ten tiles each, a chunk's states and decays, sums of dB and dC over the blocks; then of each block A, B,
    C, the carried gradient, dA, dB, dC, and bias, D, dD, dbias, span, limits, fit.
    """
    return 10 * size * (TILE + SKEW) + 8 * CHUNK + 4 + 2 * CHUNK * n + 7 * size * n + 7 * size


@compiled
def backward(
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
    T = room[thread * backward_room(n, size) * width :]
    hs, own = T[size * tiles :], T[size * tiles + 4 * (CHUNK + 1) * width :]
    decays, collect_B = own, own[4 * CHUNK * width :]
    collect_C, own = collect_B[CHUNK * held :], collect_B[2 * CHUNK * held :]
    rates, own_B, own_C, carries = own, own[each:], own[2 * each :], own[3 * each :]
    sums_A, held_B, held_C, ends = own[4 * each :], own[5 * each :], own[6 * each :], own[7 * each :]
    fits = ends[6 * size * width :]
    B_here, C_here = B if steady_B is None else own_B, C if steady_C is None else own_C
    ahead = looks[16 * size * thread :]
    unit = exponent_unit(periods, exact)
    turn = 1.0 / (2 * math.pi) if rotate is not None else unit
    item = claim(counter)
    while item < items:
        sequence, superblock = item // supers, item % supers
        row, group = sequences[sequence], superblock // per_super
        block0 = superblock % per_super * size  # in the group
        count = min(size, per_group - block0)
        start, end = bounds[2 * sequence], bounds[2 * sequence + 1]
        w = (row * g + group) * l * n
        clear_vectors(sums_A, 0, 3 * size * n)  # held_B and held_C as well
        clear_vectors(ends, 0, 6 * size)
        for i in range(count):
            lane, own, e = (block0 + i) * width, i * held, 6 * i * width
            channel, channels = group * k + lane, min(width, k - lane)
            fetch_rows(A, channel * rows, channels, rows, n, unit, turn, rates, own)
            store(ends, e + 5 * width, limits_of(rates, own, n))
            fetch_rows(last_grad, (sequence * d + channel) * rows, channels, rows, n, 1.0, 1.0, carries, own)
            fetch_rows(bias, channel, channels, 1, 1, 1.0, 1.0, ends, e)
            fetch_rows(D, channel, channels, 1, 1, 1.0, 1.0, ends, e + width)
            if steady_B is not None:
                fetch_rows(B, channel * rows, channels, rows, n, 1.0, 1.0, own_B, own)
            if steady_C is not None:
                fetch_rows(C, channel * rows, channels, rows, n, 1.0, 1.0, own_C, own)
        total = (end - start + TILE - 1) // TILE
        for tile in range(total - 1, -1, -1):
            t0 = start + tile * TILE
            steps = min(TILE, end - t0)
            for i in range(count):
                lane, o = (block0 + i) * width, i * tiles
                channel, channels = group * k + lane, min(width, k - lane)
                e = 6 * i * width
                biases, span, limits = load(ends, e), load(ends, e + 4 * width), load(ends, e + 5 * width)
                read(delta, index(sd, row, channel, t0), sd[1], sd[2], channels, steps, T, o)
                read(u, index(su, row, channel, t0), su[1], su[2], channels, steps, T, o + 6 * area)
                read(dy, index(sdy, row, channel, t0), sdy[1], sdy[2], channels, steps, T, o + 2 * area)
                if has_z:
                    read(z, index(sz, row, channel, t0), sz[1], sz[2], channels, steps, T, o + 7 * area)
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
                look_ahead(ahead, 16 * i, delta, index(sd, row, channel, t0 - TILE), sd[1], sd[2])
                look_ahead(ahead, 16 * i + 4, u, index(su, row, channel, t0 - TILE), su[1], su[2])
                look_ahead(ahead, 16 * i + 8, dy, index(sdy, row, channel, t0 - TILE), sdy[1], sdy[2])
                look_ahead(ahead, 16 * i + 12, z, index(sz, row, channel, t0 - TILE), sz[1], sz[2])
            for at in range((steps - 1) // CHUNK * CHUNK, -1, -CHUNK):
                here = min(CHUNK, steps - at)
                if steady_B is None:
                    clear_vectors(collect_B, 0, here * n)
                if steady_C is None:
                    clear_vectors(collect_C, 0, here * n)
                for i in range(count):
                    block, own = group * per_group + block0 + i, i * held
                    before = ((chunks[sequence] + (t0 - start + at) // CHUNK) * blocks + block) * held
                    ahead_states = address(saved, before - blocks * held)
                    sink_B, pb, tb = (collect_B, 0, held) if steady_B is None else (held_B, own, 0)
                    sink_C, pc, tc = (collect_C, 0, held) if steady_C is None else (held_C, own, 0)
                    for q in range(0, n, UNROLL):
                        if periods is not None:
                            lazy.retrace(
                                T, i * tiles, area, at, here, rates, own, B_here, C_here,
                                w + (t0 + at) * n, n, q, saved, before, hs, carries, sums_A,
                                sink_B, pb, tb, sink_C, pc, tc, periods[(block * n + q) // UNROLL], exact,
                                steady_B, steady_C, ahead, 16 * i, ahead_states,
                            )  # fmt: skip
                        elif rotate is not None:
                            retrace(
                                T, i * tiles, at, here, rates, own, B_here, C_here, w + (t0 + at) * n, n, q,
                                saved, before, hs, decays, carries, sums_A, sink_B, pb, tb, sink_C, pc, tc,
                                1, 1, steady_B, steady_C, ahead, 16 * i, ahead_states,
                            )  # fmt: skip
                        elif fits[i] > 0:
                            retrace(
                                T, i * tiles, at, here, rates, own, B_here, C_here, w + (t0 + at) * n, n, q,
                                saved, before, hs, decays, carries, sums_A, sink_B, pb, tb, sink_C, pc, tc,
                                None, None, steady_B, steady_C, ahead, 16 * i, ahead_states,
                            )  # fmt: skip
                        else:
                            retrace(
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
                write(ddelta, index(sdd, row, channel, t0), sdd[1], sdd[2], channels, steps, T, o)
                write(du, index(sdu, row, channel, t0), sdu[1], sdu[2], channels, steps, T, o + 6 * area)
                if has_z:
                    write(dz, index(sdz, row, channel, t0), sdz[1], sdz[2], channels, steps, T, o + 7 * area)
        for i in range(count):
            lane, own, e = (block0 + i) * width, i * held, 6 * i * width
            channel, channels = group * k + lane, min(width, k - lane)
            channel_here, states = sequence * d + channel, (sequence * d + channel) * rows
            write(dA, states, rows, 1, channels, rows, sums_A, own)
            write(dD, channel_here, 1, 1, channels, 1, ends, e + 2 * width)
            write(dbias, channel_here, 1, 1, channels, 1, ends, e + 3 * width)
            if spans.size:
                write(spans, channel_here, 1, 1, channels, 1, ends, e + 4 * width)
            if start_grad.size:
                write(start_grad, states, rows, 1, channels, rows, carries, own)
            if steady_B is not None:
                write(dB, states, rows, 1, channels, rows, held_B, own)
            if steady_C is not None:
                write(dC, states, rows, 1, channels, rows, held_C, own)
        item = claim(counter)
    fence()
