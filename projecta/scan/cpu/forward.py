"""The forward kernel of the CPU backend.

One loop over time advances four rows of states at once, in registers. A sequence's blocks of channels are
the parallel work.
"""

import math

from projecta.scan.cpu import lazy
from projecta.scan.cpu.layout import CHUNK, UNROLL
from projecta.scan.cpu.recurrence import decay_of, step_rows, weight_of
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
    sigmoid,
    softplus_and_slope,
    store,
    store_past_cache,
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
def advance(S, X, Y, first, steps, A, B, C, w, n, H, ahead, clamp, rotate, steady_B, steady_C):
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
            x0, x1 = x * weight_of(B, v, k, steady_B), x * weight_of(B, v + 1, k + width, steady_B)
            x2, x3 = (
                x * weight_of(B, v + 2, k + 2 * width, steady_B),
                x * weight_of(B, v + 3, k + 3 * width, steady_B),
            )
            d0, d1 = decay_of(s, A0, A1, clamp, rotate)
            d2, d3 = decay_of(s, A2, A3, clamp, rotate)
            h0, h1 = step_rows(d0, d1, h0, h1, x0, x1, rotate)
            h2, h3 = step_rows(d2, d3, h2, h3, x2, x3, rotate)
            y = fma(weight_of(C, v, k, steady_C), h0, load(Y, t * width))
            y2 = weight_of(C, v + 1, k + width, steady_C) * h1
            y = fma(weight_of(C, v + 2, k + 2 * width, steady_C), h2, y)
            y2 = fma(weight_of(C, v + 3, k + 3 * width, steady_C), h3, y2)
            store(Y, t * width, y + y2)
        store(H, k, h0)
        store(H, k + width, h1)
        store(H, k + 2 * width, h2)
        store(H, k + 3 * width, h3)


@inner
def forward_room(n):
    """Vectors that a thread of `forward` works in: S X Y Z, H, A, B, C, bias, D and span."""
    return 4 * (TILE + SKEW) + 4 * n + 3


@compiled
def forward(
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
    own = room[thread * forward_room(n) * width :]  # as many vectors as `forward_room` says
    S, X, Y, Z, own = own[:area], own[area:], own[2 * area :], own[3 * area :], own[4 * area :]
    H, rates, own_B, own_C, ends = own, own[held:], own[2 * held :], own[3 * held :], own[4 * held :]
    B_here, C_here = B if steady_B is None else own_B, C if steady_C is None else own_C
    ahead = looks[16 * thread :]
    save, lines = saved.size > 0, address(saved, 0) % BYTES == 0
    unit = exponent_unit(periods, exact)
    turn = 1.0 / (2 * math.pi) if rotate is not None else unit
    item = claim(counter)
    while item < items:
        sequence, block = item // blocks, item % blocks
        row, group, lane = sequences[sequence], block // per_group, block % per_group * width
        channel, channels = group * k + lane, min(width, k - lane)
        w, states = (row * g + group) * l * n, (sequence * d + channel) * rows
        fetch_rows(A, channel * rows, channels, rows, n, unit, turn, rates, 0)
        limits = limits_of(rates, 0, n)
        if steady_B is not None:
            fetch_rows(B, channel * rows, channels, rows, n, 1.0, 1.0, own_B, 0)
        if steady_C is not None:
            fetch_rows(C, channel * rows, channels, rows, n, 1.0, 1.0, own_C, 0)
        if start_state.size:
            fetch_rows(start_state, states, channels, rows, n, 1.0, 1.0, H, 0)
        else:
            clear_vectors(H, 0, n)
        fetch_rows(bias, channel, channels, 1, 1, 1.0, 1.0, ends, 0)
        fetch_rows(D, channel, channels, 1, 1, 1.0, 1.0, ends, width)
        biases, skips, span = load(ends, 0), load(ends, width), zero(ends)
        start, end = bounds[2 * sequence], bounds[2 * sequence + 1]
        for t0 in range(start, end, TILE):
            steps = min(TILE, end - t0)
            read(delta, index(sd, row, channel, t0), sd[1], sd[2], channels, steps, S, 0)
            read(u, index(su, row, channel, t0), su[1], su[2], channels, steps, X, 0)
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
            look_ahead(ahead, 0, delta, index(sd, row, channel, t0 + TILE), sd[1], sd[2])
            look_ahead(ahead, 4, u, index(su, row, channel, t0 + TILE), su[1], su[2])
            look_ahead(ahead, 8, z, index(sz, row, channel, t0), sz[1], sz[2])
            look_ahead(ahead, 12, z, index(sz, row, channel, t0), sz[1], sz[2])
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
                    lazy.advance(
                        S, X, Y, t, more, rates, B_here, C_here, v, n, H, ahead, periods,
                        block * (n // UNROLL), exact, steady_B, steady_C,
                    )  # fmt: skip
                elif rotate is not None:
                    advance(
                        S, X, Y, t, more, rates, B_here, C_here, v, n, H, ahead, 1, 1, steady_B,
                        steady_C,
                    )  # fmt: skip
                elif fits:
                    advance(
                        S, X, Y, t, more, rates, B_here, C_here, v, n, H, ahead, None, None, steady_B,
                        steady_C,
                    )  # fmt: skip
                else:
                    advance(
                        S, X, Y, t, more, rates, B_here, C_here, v, n, H, ahead, 1, None, steady_B,
                        steady_C,
                    )  # fmt: skip
            if has_z:
                read(z, index(sz, row, channel, t0), sz[1], sz[2], channels, steps, Z, 0)
                for at in range(0, steps * width, width):
                    gate = load(Z, at)
                    store(Y, at, load(Y, at) * gate * sigmoid(gate))
            write(y, index(sy, row, channel, t0), sy[1], sy[2], channels, steps, Y, 0)
        write(last_state, states, rows, 1, channels, rows, H, 0)
        if spans.size:
            store(ends, 2 * width, span)
            write(spans, sequence * d + channel, 1, 1, channels, 1, ends, 2 * width)
        item = claim(counter)
    fence()
