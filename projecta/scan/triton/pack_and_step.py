"""The small Triton kernels: pack B and C, reduce sums to gradients, fold chunks, one step of decoding."""

import triton.language as tl

from projecta._triton.launch import kernel
from projecta._triton.memory import first_step
from projecta._triton.warp import LOG2_E, exp2, sigmoid, softplus
from projecta.scan.triton.steps import STEPS, rate_of


@kernel
def pack_weights(
    B, C, to_B, to_C, Bb, Bg, Bn, Bl, Cb, Cg, Cn, Cl, l, n, groups, slabs, blocks,
    N: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Pack B and C, (b, g, n, l) of any strides, in float32, with zeros beyond n and l.

    As (b, g, slab, N of each that varies, 8); or for LANES lanes along time as (b, g, n, block, 4, LANES, 4),
    so that each quarter of the lanes' 16 steps is contiguous.
    """
    t = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    row, state = tl.program_id(0) // blocks, tl.program_id(1) * 16 + tl.arange(0, 16)[:, None]
    b, g = (row // groups).to(tl.int64), (row % groups).to(tl.int64)
    if LANES == 0:
        S: tl.constexpr = N * STEPS if B is None or C is None else 2 * N * STEPS
        to = (row.to(tl.int64) * slabs + t // STEPS) * S + state * STEPS + t % STEPS
        here = (t < slabs * STEPS) & (state < N)
    else:
        size: tl.constexpr = 16 * LANES
        to = (row.to(tl.int64) * n + state) * (slabs * size) + t // size * size
        to = to + t % 16 // 4 * (LANES * 4) + t // 16 % LANES * 4 + t % 4
        here = (t < slabs * size) & (state < n)
    inside = (t < l) & (state < n)
    if UNIT:
        Bl, Cl = 1, 1
    if B is not None:
        at = B + b * Bb + g * Bg + first_step(Bl, l)
        x = tl.load(at + state.to(tl.int64) * Bn + t.to(tl.int64) * Bl, inside, 0.0)
        tl.store(to_B + to, x.to(tl.float32), here)
    if C is not None:
        at = C + b * Cb + g * Cg + first_step(Cl, l)
        x = tl.load(at + state.to(tl.int64) * Cn + t.to(tl.int64) * Cl, inside, 0.0)
        tl.store(to_C + to, x.to(tl.float32), here)


@kernel
def reduce_tiles(
    sums, dB, dC, Bb, Bg, Bn, Bl, Cb, Cg, Cn, Cl, l, n, groups, tiles, slabs, blocks,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the tiles of each group, in their order, into dB and dC (b, g, n, l)."""
    row, rows = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    each = slabs.to(tl.int64) * (N * 2 * STEPS)
    inside = at < each
    where = sums + row * each + at
    sum = tl.zeros((BLOCK,), tl.float32)
    for tile in range(0, tiles // 16 * 16, 16):
        for i in tl.static_range(16):
            sum += tl.load(where + (tile + i) * rows * each, inside, 0.0)
    for tile in range(tiles // 16 * 16, tiles):
        sum += tl.load(where + tile * rows * each, inside, 0.0)
    step, state, slab = at % (2 * STEPS), at // (2 * STEPS) % N, at // (2 * STEPS * N)
    t = (slab * STEPS + step % STEPS).to(tl.int64)
    b, g, state = (row // groups).to(tl.int64), (row % groups).to(tl.int64), state.to(tl.int64)
    inside = inside & (t < l) & (state < n)
    if dB is not None:
        to = dB + b * Bb + g * Bg + state * Bn + first_step(Bl, l) + t * Bl
        tl.store(to, sum.to(dB.dtype.element_ty), inside & (step < STEPS))
    if dC is not None:
        to = dC + b * Cb + g * Cg + state * Cn + first_step(Cl, l) + t * Cl
        tl.store(to, sum.to(dC.dtype.element_ty), inside & (step >= STEPS))


@kernel
def reduce_chunks(
    totals, A, dA, dD, dbias, dB, dC, d, n, over,
    N: tl.constexpr, LOG_A: tl.constexpr, STEADY_B: tl.constexpr, STEADY_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum `totals` over sequences and chunks, in their order, into the gradients; one channel per program."""
    WIDTH: tl.constexpr = 2 + N + (N if STEADY_B else 0) + (N if STEADY_C else 0)
    channel, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    sum = tl.zeros((BLOCK,), tl.float32)
    for i in range(over):
        sum += tl.load(totals + (i * tl.cast(d, tl.int64) + channel) * WIDTH + at, at < WIDTH, 0.0)
    if dD is not None:
        tl.store(dD + channel + at, sum.to(dD.dtype.element_ty), at == 0)
    if dbias is not None:
        tl.store(dbias + channel + at - 1, sum.to(dbias.dtype.element_ty), at == 1)
    to, here, change = channel * n + at - 2, (at >= 2) & (at < 2 + n), sum
    if LOG_A:
        change = -exp2(tl.load(A + to, here, 0.0).to(tl.float32) * LOG2_E) * sum
    tl.store(dA + to, change.to(dA.dtype.element_ty), here)
    if STEADY_B:
        where = at - (2 + N)
        tl.store(dB + channel * n + where, sum.to(dB.dtype.element_ty), (where >= 0) & (where < n))
    if STEADY_C:
        where = at - (WIDTH - N)
        tl.store(dC + channel * n + where, sum.to(dC.dtype.element_ty), (where >= 0) & (where < n))


@kernel
def fold_chunks(
    carried, spans, A, start, to, d, n, parts, BACK: tl.constexpr, LOG_A: tl.constexpr, N: tl.constexpr,
    STATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state after all chunks of a sequence (or BACK, the gradient before them), from `start` or zero."""
    channel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sequence, state = tl.program_id(1).to(tl.int64), tl.arange(0, STATES)[:, None]
    inside = (channel < d) & (state < n)
    at = channel * n + state
    rate = rate_of(tl.load(A + at, inside, 0.0), inside, LOG_A)
    h = tl.zeros((STATES, BLOCK), tl.float32)
    if start is not None:
        h = tl.load(start + sequence * d * n + at, inside, 0.0)
    for i in range(parts):
        chunk = sequence * parts + (parts - 1 - i if BACK else i)
        passed = tl.load(spans + chunk * d + channel, channel < d, 0.0)
        gained = tl.load(carried + (chunk * N + state) * d + channel, inside, 0.0)
        h = exp2(rate * passed) * h + gained
    tl.store(to + sequence * d * n + at, h, inside)


@kernel
def update_state(
    state, x, dt, A, B, C, D, z, bias, dt_weight, y, xb, xd, sb, sd, zb, zd, Bb, Bg, Bn, Cb, Cg, Cn, d, n,
    per_B, per_C, tiles, SOFTPLUS: tl.constexpr, LOG_A: tl.constexpr, CHANNELS: tl.constexpr, N: tl.constexpr,
    GROUPED: tl.constexpr, WHOLE: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Program (tile of channels, row): advance the state (b, d, n) in place by one step; B, C (b, g, n).

    WHOLE: n = N, so that the compiler knows how a channel's states are aligned. With dt_weight (d, RANK), dt
    is (b, RANK).
    """
    row = (tl.program_id(0) // tiles).to(tl.int64)
    channel, state_n = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, N)[None, :]
    real, at_B, at_C, wide = channel < d, state_n * Bn, state_n * Cn, channel.to(tl.int64)
    if WHOLE:
        held, states, inside = channel[:, None] * N + state_n, state + row * d * N, state_n < N
        here = real[:, None]
    else:
        held, states, inside = channel[:, None] * n + state_n, state + row * d * n, state_n < n
        here = real[:, None] & inside
    if GROUPED:
        at_B, at_C = at_B + (channel // per_B)[:, None] * Bg, at_C + (channel // per_C)[:, None] * Cg
        inside = here
    h = tl.load(states + held, here, 0.0)
    rate = tl.load(A + held, here, 0.0).to(tl.float32)
    weight = tl.load(B + row * Bb + at_B, inside, 0.0).to(tl.float32)
    output = tl.load(C + row * Cb + at_C, inside, 0.0).to(tl.float32)
    u = tl.load(x + row * xb + wide * xd, real, 0.0).to(tl.float32)
    if dt_weight is None:
        delta = tl.load(dt + row * sb + wide * sd, real, 0.0).to(tl.float32)
    else:
        delta = tl.zeros((CHANNELS,), tl.float32)
        for first in tl.static_range(0, RANK, 32):
            k = first + tl.arange(0, 32)
            here_k = real[:, None] & (k < RANK)[None, :]
            rows = tl.load(dt_weight + wide[:, None] * RANK + k[None, :], here_k, 0.0)
            column = tl.load(dt + row * sb + k * sd, k < RANK, 0.0)
            delta += tl.sum(rows.to(tl.float32) * column.to(tl.float32)[None, :], 1)
    if bias is not None:
        delta += tl.load(bias + channel, real, 0.0).to(tl.float32)
    if SOFTPLUS:
        delta = softplus(delta, False)
    if LOG_A:
        rate = -exp2(rate * LOG2_E)
    h = exp2(delta[:, None] * (rate * LOG2_E)) * h + (delta * u)[:, None] * weight
    tl.store(states + held, h, here)
    out = tl.sum(h * output, 1)
    if D is not None:
        out += tl.load(D + channel, real, 0.0).to(tl.float32) * u
    if z is not None:
        gate = tl.load(z + row * zb + wide * zd, real, 0.0).to(tl.float32)
        out *= gate * sigmoid(gate)
    tl.store(y + row * d + channel, out.to(y.dtype.element_ty), real)
