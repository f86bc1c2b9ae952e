"""The forward kernels of the Triton backend.

A program is one or a few warps. In the kernels over states (`forward_states`, `backward`, `carry`) a warp's
lanes are LANES groups of states times CHANNELS channels. The warp loops over time, in blocks of UNROLL slabs
of 8 steps. One lane computes the step size and input of each step and broadcasts them; sums over states and
channels are reduce-scatters. In `forward_times` the lanes run along time.

Loads, shuffles and latency limit the speed. So a block's arrays are loaded one block early, up to 16 bytes
per lane, and B and C one row of states early. All arithmetic is float32; offsets are 64-bit.

The flags WIDE and WHOLE are those of `steps`.
"""

import triton
import triton.language as tl

from projecta._triton.launch import kernel
from projecta._triton.memory import (
    as_floats,
    barrier,
    first_step,
    load_rows,
    load_words,
    prefetch,
    read,
    shared_buffer,
    store_shared,
    store_words,
    write,
)
from projecta._triton.warp import (
    WARP,
    all_reduce,
    and_uniform,
    broadcast,
    exp2,
    pin,
    reduce_scatter,
    repeat,
    shift_up,
    shuffle,
    warp_scan,
)
from projecta.scan.triton.steps import (
    STEPS,
    added,
    channel_numbers,
    channel_of,
    eight_steps,
    lane_of,
    load_first_rows,
    own_outputs,
    own_rates,
    own_rows,
    own_steps,
    program_index,
    rate_of,
    read_three,
    sequence_of,
    split_program,
    state_after_chunk,
)


@triton.jit
def _advance_block(
    h, rates, own, constant_B, constant_C, block, final, origin, place, at_B, at_C, half, ahead, coming,
    next_s, next_u, delta, u, bias, saved, bounds, lane, leader, index, channel, real, d, l, slabs, t_start,
    t_end, SOFTPLUS: tl.constexpr, STEADY_B: tl.constexpr, STEADY_C: tl.constexpr, HAS_C: tl.constexpr,
    WIDE: tl.constexpr, WHOLE: tl.constexpr, STRIDE: tl.constexpr, S: tl.constexpr, OF_B: tl.constexpr,
    LANES: tl.constexpr, UNROLL: tl.constexpr, THREADS: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """The states after a block of UNROLL slabs, its outputs, and the per-lane steps of the next block.

    `coming`, B and C of the next block, is stored to shared memory at `ahead`. STEADY_C: C is constant, or is
    not read (unless HAS_C).
    """
    V: tl.constexpr = STEPS * UNROLL // LANES
    K: tl.constexpr = len(h)
    N: tl.constexpr = K * LANES
    zero = tl.zeros((THREADS,), tl.float32)
    sums, next_own = (), ()
    for k in tl.static_range(UNROLL):
        slab = block + k
        steps = broadcast(own, leader, k * STEPS, V, STEPS, 2)
        inputs = broadcast(own[V:], leader, k * STEPS, V, STEPS, 2)
        outputs, then = repeat(zero, STEPS), ()
        for j in tl.static_range(K):
            at, row_n = tl.minimum(slab, slabs - 1).to(tl.int64) * STRIDE, j * LANES + lane
            in_buffer = half + (k * S + row_n * STEPS) * 4
            Bs = eight_steps(at_B + at, row_n, in_buffer, constant_B[j] if STEADY_B else None, STEADY_B)
            in_buffer += OF_B * STEPS * 4
            steady_C = constant_C[j] if HAS_C else zero
            Cs = eight_steps(at_C + at, row_n, in_buffer, steady_C, STEADY_C)
            if saved is not None:
                to = ((place + (slab - origin) // EVERY) * N + j * LANES + lane) * d + channel
                here = and_uniform(real, (slab < final) & ((slab - origin) % EVERY == 0))
                store_words(saved + to, (h[j].to(tl.int32, bitcast=True),), here, 1)
            state, new = h[j], ()
            for i in tl.static_range(STEPS):
                gain = inputs[i] * Bs[i]
                if bounds is not None:  # another sequence's B may be NaN
                    t = slab * STEPS + i
                    gain = tl.where((t >= t_start) & (t < t_end), gain, 0.0)
                state = exp2(steps[i] * rates[j]) * state + gain
                new = new + (outputs[i] + state * Cs[i],)
            outputs, then = new, then + (state,)
            if k == UNROLL - 1 and j == K // 2:  # overlaps with the exponentials of the states
                store_shared(coming, ahead, index, UNROLL * S, THREADS)
                t1 = (block + UNROLL) * STEPS + lane * V
                next_own = own_steps(
                    next_s, next_u, delta, u, bias, t1, t_start, t_end, SOFTPLUS, WIDE, WHOLE
                )
        h, sums = then, sums + outputs
    return h, sums, next_own


@triton.jit
def _first_states(
    A, B, C, start, carried, spans, sequence, channel, lane, part, links, d, n, zero, STEADY_B: tl.constexpr,
    STEADY_C: tl.constexpr, LOG_A: tl.constexpr, ENDS: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A lane's states at the start of a chunk, its rates, and its B and C if they are constant."""
    rates = own_rates(A, channel, lane, n, LOG_A, K, LANES)
    h, constant_B, constant_C = repeat(zero, K), (), ()
    if start is not None and not ENDS:
        h = own_rows(start + (sequence * d + channel) * n, lane, n, 1.0, K, LANES)
    if STEADY_B:
        constant_B = own_rows(B + channel * n, lane, n, 1.0, K, LANES)
    if STEADY_C and not ENDS:
        constant_C = own_rows(C + channel * n, lane, n, 1.0, K, LANES)
    if carried is not None and not ENDS:
        for before in range(0, part):
            at = sequence * links + before
            h = state_after_chunk(h, rates, carried, spans, at, channel, lane, d, lane >= 0, LANES)
    return h, rates, constant_B, constant_C


@triton.jit
def _write_outputs(
    sums, skip, loaded_u, loaded_z, u, z, ungated, at_ungated, y, at_y, yl, index, t1, t_start, t_end, real,
    WIDE: tl.constexpr, WHOLE: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Write a block's outputs, and if `ungated` the outputs before the gate."""
    V: tl.constexpr = STEPS * UNROLL // LANES
    scattered = reduce_scatter(sums, index, 2, LANES, UNROLL * STEPS)
    values = own_outputs(scattered, skip, loaded_u, loaded_z, u, z, WIDE)
    if ungated is not None:
        write(ungated + at_ungated, t1, 1, values, t_start, t_end, real, WIDE * WIDE, WHOLE, V)
    write(y + at_y, t1, yl, values[V:], t_start, t_end, real, WIDE, WHOLE, V)


@triton.jit
def _write_states(
    h, carried, last, sequence, part, parts, channel, lane, d, n, real, ENDS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Write the end states of a chunk (ENDS), or the last states of the sequence."""
    N: tl.constexpr = len(h) * LANES
    for j in tl.static_range(len(h)):
        row_n = j * LANES + lane
        if ENDS:
            at = (sequence * parts + part) * N + row_n
            tl.store(carried + at * d + channel, h[j], real)
        else:
            at = (sequence * d + channel) * n + row_n
            tl.store(last + at, h[j], and_uniform(real & (row_n < n), part == parts - 1))


@kernel
def forward_states(
    u, delta, A, B, C, D, z, bias, start, bounds, carried, spans, y, last, saved, ungated, ub, ud, ul, sb,
    sd, sl, zb, zd, zl, yb, yd, yl, d, l, n, per_group, tiles, slabs, chunk, groups, count, parts,
    links, processors, SOFTPLUS: tl.constexpr, LOG_A: tl.constexpr, STEADY_B: tl.constexpr,
    STEADY_C: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr,
    CHANNELS: tl.constexpr, UNROLL: tl.constexpr, WARPS: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """WARPS times CHANNELS channels of a sequence and a chunk; saves the state before each EVERY-th slab.

    Without y it computes the end state from zero of each of the first `links` chunks, and its sum of delta.
    """
    ENDS: tl.constexpr = y is None
    V: tl.constexpr = STEPS * UNROLL // LANES
    K: tl.constexpr = N // LANES
    OF_B: tl.constexpr = 0 if STEADY_B else N
    STRIDE: tl.constexpr = (OF_B + (0 if STEADY_C else N)) * STEPS
    S: tl.constexpr = (OF_B + (0 if STEADY_C or ENDS else N)) * STEPS  # floats of B and C per slab
    THREADS: tl.constexpr = WARP * WARPS
    chosen = program_index(count, processors)
    if chosen >= count:
        return
    tile, part, sequence, group = split_program(chosen, groups, tiles, parts)
    index, zero = tl.arange(0, THREADS), tl.zeros((THREADS,), tl.float32)
    lane, column, leader = lane_of(index, LANES)
    row, t_start, t_end, place = sequence_of(bounds, sequence, l, slabs, EVERY)
    origin = t_start // STEPS
    first, final = origin + part * chunk, tl.minimum(origin + (part + 1) * chunk, tl.cdiv(t_end, STEPS))
    weights = ((row * groups + group) * slabs) * STRIDE
    at_B, at_C, shared = B + weights, C + weights, (C if STEADY_B else B) + weights
    real, channel = channel_of(tile, tiles, group, per_group, column, WARPS * CHANNELS)
    at_u = u + row * ub + channel * ud + first_step(ul, l)
    at_s = delta + row * sb + channel * sd + first_step(sl, l)
    at_y, at_z, span = row * yb + channel * yd + first_step(yl, l), None, zero
    if z is not None:
        at_z = z + row * zb + channel * zd + first_step(zl, l)
    own_bias, skip = channel_numbers(bias, channel, zero), channel_numbers(D, channel, zero)
    h, rates, constant_B, constant_C = _first_states(
        A, B, C, start, carried, spans, sequence, channel, lane, part, links, d, n, zero, STEADY_B, STEADY_C,
        LOG_A, ENDS, K, LANES,
    )  # fmt: skip
    buffer, turn = shared_buffer(index, 2 * UNROLL * S * 4), 0
    slab = tl.minimum(first, slabs - 1)  # within bounds also for an empty sequence
    if S > 0:
        load_first_rows(shared, buffer, index, slab, slabs, S, STRIDE, UNROLL, THREADS)
    loaded_s, loaded_u, loaded_z = read_three(
        at_s, at_u, at_z, slab * STEPS + lane * V, sl, ul, zl, l, WIDE, WHOLE, V
    )  # fmt: skip
    t1 = first * STEPS + lane * V
    own = own_steps(loaded_s, loaded_u, delta, u, own_bias, t1, t_start, t_end, SOFTPLUS, WIDE, WHOLE)
    for block in range(first, final, UNROLL):
        t1 = (block + UNROLL) * STEPS + lane * V
        if WHOLE:
            t1 = tl.minimum(t1, l - V)
        next_s, next_u, next_z = read_three(at_s, at_u, at_z, t1, sl, ul, zl, l, WIDE, WHOLE, V)
        half, turn, coming = buffer + turn * (UNROLL * S * 4), 1 - turn, ()
        if S > 0:
            slab = tl.minimum(block + UNROLL, slabs - 1)
            at = shared + slab.to(tl.int64) * STRIDE
            coming = load_rows(at, index, slabs - slab, S, STRIDE, UNROLL, THREADS)
        span = added(span, own, V)
        ahead = buffer + turn * (UNROLL * S * 4)
        h, sums, next_own = _advance_block(
            h, rates, own, constant_B, constant_C, block, final, origin, place, at_B, at_C, half, ahead,
            coming, next_s, next_u, delta, u, own_bias, saved, bounds, lane, leader, index, channel, real, d,
            l, slabs, t_start, t_end, SOFTPLUS, STEADY_B, STEADY_C or ENDS, STEADY_C and not ENDS, WIDE,
            WHOLE, STRIDE, S, OF_B, LANES, UNROLL, THREADS, EVERY,
        )  # fmt: skip
        if not ENDS:
            _write_outputs(
                sums, skip, loaded_u, loaded_z, u, z, ungated, (row * d + channel) * l, y, at_y, yl, index,
                block * STEPS + lane * V, t_start, t_end, real, WIDE, WHOLE, LANES, UNROLL,
            )  # fmt: skip
        own, loaded_u, loaded_z = next_own, next_u, next_z
        if S > 0:
            barrier(index)
    if ENDS:
        tl.store(spans + (sequence * parts + part) * d + channel, all_reduce(span, index, 2, LANES), real)
    _write_states(h, carried, last, sequence, part, parts, channel, lane, d, n, real, ENDS, LANES)


@triton.jit
def sixteen_steps(
    at, t1, lane, l, NATIVE: tl.constexpr, WHOLE: tl.constexpr, FREE: tl.constexpr
):  # fmt: skip
    """16 steps of B or C per lane: from the caller's memory (NATIVE), or from four packed quarters."""
    if NATIVE:
        return read(at, t1, 1, l, NATIVE, WHOLE, 2 * STEPS, FREE)
    else:
        found = ()
        for i in tl.static_range(4):
            found = found + load_words(at + (lane * 4 + i * 4 * WARP), 4, FREE)
        return found


@triton.jit
def _first_row(X, row, Xb, group, Xg, Xn, groups, l, n, blocks, NATIVE: tl.constexpr):
    """The first row of B or C for `sixteen_steps`; how far the next row is, and the next block."""
    if NATIVE:
        at = X + row * Xb + group * Xg
        return at + (l - 1 if NATIVE < 0 else 0), tl.cast(Xn, tl.int64), 0
    else:
        size = blocks * (2 * STEPS * WARP)
        return X + (row * groups + group) * n * size, tl.cast(size, tl.int64), 2 * STEPS * WARP


@triton.jit
def _scan_state(own, outputs, rate, carry, span, Bs, Cs, lane, T: tl.constexpr):
    """Scan one state over a block; return each lane's end state, and the outputs with C h added."""
    decays, gains = (), ()
    for i in tl.static_range(T):
        decays, gains = decays + (exp2(own[i] * rate),), gains + (own[T + i] * Bs[i],)
    h = gains[0]
    for i in tl.static_range(1, T):
        h = decays[i] * h + gains[i]
    decay = exp2(span * rate)
    ends = warp_scan(decay, tl.where(lane == 0, decay * carry + h, h), lane)
    h = shift_up(ends, carry, lane)
    new = ()
    for i in tl.static_range(T):
        h = decays[i] * h + gains[i]
        new = new + (outputs[i] + h * Cs[i],)
    return ends, new


@kernel
def forward_times(
    u, delta, A, B, C, D, z, bias, start, y, last, ub, ud, ul, sb, sd, sl, zb, zd, zl, yb, yd, yl, Bb, Bg,
    Bn, Cb, Cg, Cn, d, l, n, per_group, tiles, slabs, chunk, groups, count, parts, processors,
    SOFTPLUS: tl.constexpr, LOG_A: tl.constexpr, STEADY_B: tl.constexpr, STEADY_C: tl.constexpr,
    WIDE: tl.constexpr, WHOLE: tl.constexpr, NATIVE: tl.constexpr, PIN: tl.constexpr,
):  # fmt: skip
    """A program: one channel of a row; lane i scans steps 16 i... of a block, one state at a time.

    Each lane first scans its 16 steps from zero. A warp scan over the lanes' end states gives each lane its
    true start. Then the steps are repeated with the same exponentials. Lane i also carries state i to the
    next block: n <= 32. NATIVE: B and C are read from the caller's memory; -1: backwards. It saves nothing.
    """
    T: tl.constexpr = 2 * STEPS
    SIZE: tl.constexpr = WARP * T
    chosen = program_index(count, processors)
    if chosen >= count:
        return
    tile, _, row, group = split_program(chosen, groups, tiles, 1)
    lane, zero = tl.arange(0, WARP), tl.zeros((WARP,), tl.float32)
    every, channel = lane >= 0, tile.to(tl.int64)
    at_u = u + row * ub + channel * ud + first_step(ul, l)
    at_s = delta + row * sb + channel * sd + first_step(sl, l)
    at_y, at_z = row * yb + channel * yd + first_step(yl, l), None
    if z is not None:
        at_z = z + row * zb + channel * zd + first_step(zl, l)
    own_bias, skip = channel_numbers(bias, channel, zero), channel_numbers(D, channel, zero)
    blocks = tl.cdiv(l, SIZE)
    ORDER: tl.constexpr = NATIVE if NATIVE else 1
    at_B, turn_B, ahead = _first_row(B, row, Bb, group, Bg, Bn, groups, l, n, blocks, NATIVE)
    at_C, turn_C, ahead = _first_row(C, row, Cb, group, Cg, Cn, groups, l, n, blocks, NATIVE)
    held = channel * n + lane
    rates, carries = rate_of(tl.load(A + held, lane < n, 0.0), lane < n, LOG_A), zero
    if start is not None:
        carries = tl.load(start + row * d * n + held, lane < n, 0.0)
    if STEADY_B:
        constant_B = tl.load(B + held, lane < n, 0.0)
    if STEADY_C:
        constant_C = tl.load(C + held, lane < n, 0.0)
    for block in range(0, blocks):
        t1 = block * SIZE + lane * T
        next_B, next_C = (), ()
        row_B, row_C = at_B + block * ahead, at_C + block * ahead
        if not STEADY_B:
            next_B = sixteen_steps(row_B, t1, lane, l, NATIVE, WHOLE, not PIN)
        if not STEADY_C:
            next_C = sixteen_steps(row_C, t1, lane, l, NATIVE, WHOLE, not PIN)
        loaded_s, loaded_u = read(at_s, t1, sl, l, WIDE, WHOLE, T), read(at_u, t1, ul, l, WIDE, WHOLE, T)
        if WIDE:
            later = tl.minimum(t1 + SIZE, l - 1)
            prefetch(at_s + WIDE * later)
            prefetch(at_u + WIDE * later)
            if z is not None:
                prefetch(at_z + WIDE * tl.minimum(t1, l - 1))
        own = own_steps(loaded_s, loaded_u, delta, u, own_bias, t1, 0, l, SOFTPLUS, WIDE, WHOLE)
        span, outputs = zero, repeat(zero, T)
        span = added(span, own, T)
        for state in tl.range(0, n, loop_unroll_factor=2):
            now_B, now_C = next_B, next_C
            row_B += tl.where(state + 1 < n, turn_B, 0)
            row_C += tl.where(state + 1 < n, turn_C, 0)
            if not STEADY_B:
                next_B = sixteen_steps(row_B, t1, lane, l, NATIVE, WHOLE, not PIN)
            if not STEADY_C:
                next_C = sixteen_steps(row_C, t1, lane, l, NATIVE, WHOLE, not PIN)
            rate = shuffle(rates, state)
            if PIN:
                rate += pin(state, lane)
            carry = shuffle(carries, state)
            Bs = repeat(shuffle(constant_B, state), T) if STEADY_B else as_floats(now_B, B, ORDER)
            Cs = repeat(shuffle(constant_C, state), T) if STEADY_C else as_floats(now_C, C, ORDER)
            ends, outputs = _scan_state(own, outputs, rate, carry, span, Bs, Cs, lane, T)
            carries = tl.where(lane == state, shuffle(ends, WARP - 1), carries)
        loaded_z = () if z is None else read(at_z, t1, zl, l, WIDE, WHOLE, T)
        values = own_outputs(outputs, skip, loaded_u, loaded_z, u, z, WIDE)
        write(y + at_y, t1, yl, values[T:], 0, l, every, WIDE, WHOLE, T)
    tl.store(last + row * d * n + held, carries, lane < n)
