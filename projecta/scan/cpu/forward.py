"""The forward kernel of the CPU backend.

One loop over time advances four rows of states at once, in registers. A sequence's blocks of channels are
the parallel work.
"""

import math
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
from projecta._cpu.threads import compiled, inner
from projecta.scan.cpu.layout import CHUNK, UNROLL, steps_at, weights_at
from projecta.scan.cpu.recurrence import decay_of, step_rows, weight_of
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
def advance(S, X, Y, first, steps, A, B, C, w, n, H, ahead, clamp, rotate, steady_B, steady_C):
    """Advance the states H of a block over steps of a tile, from `first` on, and add C h to Y.

    S is delta, X is delta u; B and C begin at offset w. The hardware cannot prefetch all rows of the caller's
    memory: each pass over time prefetches one cache line of the next tile per step.
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


class States(NamedTuple):
    """Flat states of the sequences, empty if absent; `spans` receives the sums of delta."""

    spans: np.ndarray
    start: np.ndarray
    last: np.ndarray
    saved: np.ndarray


@inner
def _prepare(S, X, Y, count, biases, skips, span, limits, softplus):
    """Compute S, X = S u and Y = D u of a tile; return whether exponents are safe, and the sum of S."""
    width, fits = lanes(S), True
    for at in range(0, count * width, width):
        s, x = load(S, at) + biases, load(X, at)
        if softplus:
            s, _ = softplus_and_slope(s)
        fits = fits and magnitude_below(s, limits)
        span = span + s
        store(S, at, s)
        store(Y, at, skips * x)
        store(X, at, s * x)
    return fits, span


@inner
def save_states(saved, to, H, held, lines):
    """Save the states of a block; `lines`: whether they fill aligned cache lines."""
    for q in range(0, held, lanes(H)):
        if lines:
            store_past_cache(saved, to + q, load(H, q))
        else:
            store(saved, to + q, load(H, q))


@inner
def advance_any(
    S, X, Y, t, steps, rates, B, C, v, n, H, ahead, fits, rotate, steady_B, steady_C
):  # fmt: skip
    """Advance the states over some steps, by the variant for this call and its exponents."""
    if rotate is not None:
        advance(S, X, Y, t, steps, rates, B, C, v, n, H, ahead, 1, 1, steady_B, steady_C)
    elif fits:
        advance(S, X, Y, t, steps, rates, B, C, v, n, H, ahead, None, None, steady_B, steady_C)
    else:
        advance(S, X, Y, t, steps, rates, B, C, v, n, H, ahead, 1, None, steady_B, steady_C)


@inner
def _gate(Y, Z, count):
    """Y silu(Z)."""
    width = lanes(Y)
    for at in range(0, count * width, width):
        gate = load(Z, at)
        store(Y, at, load(Y, at) * gate * sigmoid(gate))


@compiled
def forward(counter, items, work, kinds, places, rotate, steady_B, steady_C):
    """Item i is block i % blocks of sequence i // blocks. places: steps, weights, then States."""
    x, weights, real = steps_at(places, kinds), weights_at(places[16:], kinds), kinds.real
    states = States(
        optional(places[21], real), optional(places[22], real), array_at(places[23], 1, real),
        optional(places[24], real),
    )  # fmt: skip
    sizes, saved = work.sizes, states.saved
    g, k, rows, n, per_group, l = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]
    width, blocks, d = lanes(real), g * per_group, g * k
    area, held = (TILE + SKEW) * width, n * width
    own = aligned(real, 4 * (TILE + SKEW) + 4 * n + 3)  # S X Y Z, then H, A, B, C, then bias, D and span
    S, X, Y, Z, own = own[:area], own[area:], own[2 * area :], own[3 * area :], own[4 * area :]
    H, rates, own_B, own_C, ends = own, own[held:], own[2 * held :], own[3 * held :], own[4 * held :]
    B, C = weights.B if steady_B is None else own_B, weights.C if steady_C is None else own_C
    ahead = np.zeros(16, np.int64)  # what to prefetch
    save, lines = saved.size > 0, address(saved, 0) % BYTES == 0
    unit = LOG2_E
    turn = 1.0 / (2 * math.pi) if rotate is not None else unit
    item = claim(counter)
    while item < items:
        sequence, block = item // blocks, item % blocks
        row, group, lane = work.sequences[sequence], block // per_group, block % per_group * width
        channel, channels = group * k + lane, min(width, k - lane)
        w, place = (row * g + group) * l * n, (sequence * d + channel) * rows
        fetch_rows(weights.A, channel * rows, channels, rows, n, unit, turn, rates, 0)
        limits = limits_of(rates, 0, n)
        if steady_B is not None:
            fetch_rows(weights.B, channel * rows, channels, rows, n, 1.0, 1.0, own_B, 0)
        if steady_C is not None:
            fetch_rows(weights.C, channel * rows, channels, rows, n, 1.0, 1.0, own_C, 0)
        if states.start.size:
            fetch_rows(states.start, place, channels, rows, n, 1.0, 1.0, H, 0)
        else:
            clear_vectors(H, 0, n)
        fetch_channels(weights.bias, channel, channels, ends, 0)
        fetch_channels(weights.D, channel, channels, ends, width)
        biases, skips, span = load(ends, 0), load(ends, width), zero(ends)
        start, end = work.bounds[2 * sequence], work.bounds[2 * sequence + 1]
        for t0 in range(start, end, TILE):
            count = min(TILE, end - t0)
            read(x.delta, x.delta_strides, row, channel, channels, t0, count, S, 0)
            read(x.u, x.u_strides, row, channel, channels, t0, count, X, 0)
            fits, span = _prepare(S, X, Y, count, biases, skips, span, limits, work.softplus)
            look_ahead(ahead, x.delta, x.delta_strides, row, channel, t0 + TILE)
            look_ahead(ahead[4:], x.u, x.u_strides, row, channel, t0 + TILE)
            look_ahead(ahead[8:], x.z, x.z_strides, row, channel, t0)
            look_ahead(ahead[12:], x.z, x.z_strides, row, channel, t0)
            stride = CHUNK if save else TILE
            for t in range(0, count, stride):
                if save:
                    chunk = work.chunks[sequence] + (t0 - start + t) // CHUNK
                    save_states(saved, (chunk * blocks + block) * held, H, held, lines)
                advance_any(
                    S, X, Y, t, min(stride, count - t), rates, B, C, w + t0 * n, n, H, ahead, fits, rotate,
                    steady_B, steady_C,
                )  # fmt: skip
            if work.has_z:
                read(x.z, x.z_strides, row, channel, channels, t0, count, Z, 0)
                _gate(Y, Z, count)
            write(x.y, x.y_strides, row, channel, channels, t0, count, Y, 0)
        write_rows(states.last, place, channels, rows, H, 0)
        if states.spans.size:
            store(ends, 2 * width, span)
            write_channels(states.spans, sequence * d + channel, channels, ends, 2 * width)
        item = claim(counter)
    fence()
