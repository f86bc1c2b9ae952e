"""The forward kernels of the Triton backend.

A program is one warp, in `backward` a few. In the kernels of states (`forward_states`, `backward`, `carry`) a
warp's lanes are LANES groups of states times CHANNELS channels; time is a loop over blocks of UNROLL slabs of
8. Step sizes and inputs are worked out by the lane that owns the step, and spread; sums over states and
channels are scattered back. In `forward_times` lanes lie along time.

What bounds them are the words that a warp loads and shuffles, and waiting: a block's arrays are loaded a
block early, up to 16 bytes a lane, B and C a row of states early. All arithmetic is float32; offsets are
64-bit.

The flags: WIDE says that arrays can be read in words (time contiguous, aligned, in eights); WHOLE that there
is nothing to mask (whole blocks and tiles of channels, one sequence a row).
"""

import triton
import triton.language as tl

from projecta.scan.triton.steps import (
    STEPS,
    as_floats,
    eight_steps,
    kernel,
    lane_of,
    own_outputs,
    own_steps,
    program_place,
    read,
    write,
)
from projecta.scan.triton.warp import (
    LOG2_E,
    WARP,
    all_reduce,
    and_uniform,
    barrier,
    broadcast,
    exp2,
    load_stretches,
    load_words,
    pin,
    prefetch,
    reduce_scatter,
    repeat,
    shared_room,
    shift_up,
    shuffle,
    store_shared,
    store_words,
    warp_scan,
)


@kernel
def forward_states(
    u, delta, A, B, C, D, z, bias, start, bounds, carried, spans, y, last, saved, ungated,
    ub, ud, ul, sb, sd, sl, zb, zd, zl, yb, yd, yl,
    d, l, n, per_group, tiles, slabs, chunk, groups, count, parts, processors,
    SOFTPLUS: tl.constexpr, STEADY_B: tl.constexpr, STEADY_C: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr, UNROLL: tl.constexpr,
    WARPS: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """A program: WARPS times CHANNELS channels of a sequence and a chunk of time.

    It saves the state before every EVERY-th slab. Without y it only works out, for each chunk but the last,
    the state that it leaves from zero, and its sum of delta: `parts` is then the number of those.
    """
    ENDS: tl.constexpr = y is None
    V: tl.constexpr = STEPS * UNROLL // LANES
    K: tl.constexpr = N // LANES
    OF_B: tl.constexpr = 0 if STEADY_B else N
    STRIDE: tl.constexpr = (OF_B + (0 if STEADY_C else N)) * STEPS
    S: tl.constexpr = (OF_B + (0 if STEADY_C or ENDS else N)) * STEPS  # numbers of a slab of B and C
    THREADS: tl.constexpr = WARP * WARPS
    chosen = program_place(count, processors)
    if chosen >= count:
        return
    tile, part = chosen % (groups * tiles), chosen // (groups * tiles) % parts
    sequence = (chosen // (groups * tiles) // parts).to(tl.int64)
    group = tile // tiles
    index, zero = tl.arange(0, THREADS), tl.zeros((THREADS,), tl.float32)
    lane, column, leader = lane_of(index, LANES)
    row, t_start, t_end, place = sequence, 0, l, sequence * tl.cdiv(slabs, EVERY)
    if bounds is not None:
        row = sequence * 0
        t_start, t_end = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
        place = sequence + t_start // (STEPS * EVERY)
    origin, limit = t_start // STEPS, tl.cdiv(t_end, STEPS)
    first, final = origin + part * chunk, tl.minimum(origin + (part + 1) * chunk, limit)
    weights = ((row * groups + group) * slabs) * STRIDE
    at_B, at_C, shared = B + weights, C + weights, (C if STEADY_B else B) + weights
    own_channel = (tile % tiles) * (WARPS * CHANNELS) + column
    real = own_channel < per_group
    channel = (group * per_group + tl.minimum(own_channel, per_group - 1)).to(tl.int64)
    at_u, at_s = u + row * ub + channel * ud, delta + row * sb + channel * sd
    at_y, at_z, span = row * yb + channel * yd, None, zero
    if z is not None:
        at_z = z + row * zb + channel * zd
    own_bias = zero if bias is None else tl.load(bias + channel)
    skip = zero if D is None else tl.load(D + channel)
    h, rates, constant_B, constant_C = (), (), (), ()
    for j in tl.static_range(K):
        row_n = j * LANES + lane
        here = row_n < n
        rates = rates + (tl.load(A + channel * n + row_n, here, 0.0) * LOG2_E,)
        if start is None or ENDS:
            h = h + (zero,)
        else:
            h = h + (tl.load(start + (sequence * d + channel) * n + row_n, here, 0.0),)
        if STEADY_B:
            constant_B = constant_B + (tl.load(B + channel * n + row_n, here, 0.0),)
        if STEADY_C and not ENDS:
            constant_C = constant_C + (tl.load(C + channel * n + row_n, here, 0.0),)
    if carried is not None and not ENDS:
        for before in range(0, part):
            at = sequence * (parts - 1) + before
            passed, then = tl.load(spans + at * d + channel), ()
            for j in tl.static_range(K):
                gained = tl.load(carried + (at * N + j * LANES + lane) * d + channel)
                then = then + (exp2(rates[j] * passed) * h[j] + gained,)
            h = then
    room, turn, coming = shared_room(index, 2 * UNROLL * S * 4), 0, ()
    slab = tl.minimum(first, slabs - 1)  # within bounds for an empty sequence, too
    if S > 0:
        coming = load_stretches(
            shared + slab.to(tl.int64) * STRIDE, index, slabs - slab, S, STRIDE, UNROLL, THREADS
        )
        store_shared(coming, room, index, UNROLL * S, THREADS)
        barrier(index)
    t1 = slab * STEPS + lane * V
    loaded_s, loaded_u = (
        read(at_s, t1, sl, l, WIDE, WHOLE, V),
        read(at_u, t1, ul, l, WIDE, WHOLE, V),
    )
    loaded_z = () if z is None else read(at_z, t1, zl, l, WIDE, WHOLE, V)
    t1 = first * STEPS + lane * V
    own = own_steps(loaded_s, loaded_u, delta, u, own_bias, t1, t_start, t_end, SOFTPLUS, WIDE, WHOLE)
    for block in range(first, final, UNROLL):
        t1 = (block + UNROLL) * STEPS + lane * V
        if WHOLE:
            t1 = tl.minimum(t1, l - V)
        next_s, next_u = (
            read(at_s, t1, sl, l, WIDE, WHOLE, V),
            read(at_u, t1, ul, l, WIDE, WHOLE, V),
        )
        next_z = () if z is None else read(at_z, t1, zl, l, WIDE, WHOLE, V)
        half, turn = room + turn * (UNROLL * S * 4), 1 - turn
        if S > 0:
            slab = tl.minimum(block + UNROLL, slabs - 1)
            coming = load_stretches(
                shared + slab.to(tl.int64) * STRIDE, index, slabs - slab, S, STRIDE, UNROLL, THREADS
            )
        for i in tl.static_range(V):
            span += own[i]
        sums, next_own = (), ()
        for k in tl.static_range(UNROLL):
            slab = block + k
            steps = broadcast(own, leader, k * STEPS, V, STEPS, 2)
            inputs = broadcast(own[V:], leader, k * STEPS, V, STEPS, 2)
            outputs, then = repeat(zero, STEPS), ()
            for j in tl.static_range(K):
                at, row_n = tl.minimum(slab, slabs - 1).to(tl.int64) * STRIDE, j * LANES + lane
                in_room = half + (k * S + row_n * STEPS) * 4
                Bs = eight_steps(at_B + at, row_n, in_room, constant_B[j] if STEADY_B else None, STEADY_B)
                in_room += OF_B * STEPS * 4
                steady_C = constant_C[j] if STEADY_C and not ENDS else zero
                Cs = eight_steps(at_C + at, row_n, in_room, steady_C, STEADY_C or ENDS)
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
                if k == UNROLL - 1 and j == K // 2:  # beside the states, which wait for their exponentials
                    store_shared(coming, room + turn * (UNROLL * S * 4), index, UNROLL * S, THREADS)
                    t1 = (block + UNROLL) * STEPS + lane * V
                    next_own = own_steps(
                        next_s, next_u, delta, u, own_bias, t1, t_start, t_end, SOFTPLUS, WIDE, WHOLE
                    )
            h, sums = then, sums + outputs
        if not ENDS:
            t1 = block * STEPS + lane * V
            scattered = reduce_scatter(sums, index, 2, LANES, UNROLL * STEPS)
            values = own_outputs(scattered, skip, loaded_u, loaded_z, u, z, WIDE)
            if ungated is not None:
                at_ungated = ungated + (row * d + channel) * l
                write(at_ungated, t1, 1, values, t_start, t_end, real, WIDE, WHOLE, V)
            write(y + at_y, t1, yl, values[V:], t_start, t_end, real, WIDE, WHOLE, V)
        own, loaded_u, loaded_z = next_own, next_u, next_z
        if S > 0:
            barrier(index)
    if ENDS:
        at = sequence * parts + part
        tl.store(spans + at * d + channel, all_reduce(span, index, 2, LANES), real)
        for j in tl.static_range(K):
            tl.store(carried + (at * N + j * LANES + lane) * d + channel, h[j], real)
    else:
        for j in tl.static_range(K):
            row_n = j * LANES + lane
            own = and_uniform(real & (row_n < n), part == parts - 1)
            tl.store(last + (sequence * d + channel) * n + row_n, h[j], own)


@triton.jit
def sixteen_steps(
    at, t1, lane, l, NATIVE: tl.constexpr, WHOLE: tl.constexpr, FREE: tl.constexpr
):  # fmt: skip
    """16 steps of B or C for each lane: as they lie in memory, or in quarters, each one stretch of memory."""
    if NATIVE:
        return read(at, t1, 1, l, True, WHOLE, 2 * STEPS, FREE)
    else:
        found = ()
        for i in tl.static_range(4):
            found = found + load_words(at + (lane * 4 + i * 4 * WARP), 4, FREE)
        return found


@kernel
def forward_times(
    u, delta, A, B, C, D, z, bias, start, y, last,
    ub, ud, ul, sb, sd, sl, zb, zd, zl, yb, yd, yl, Bb, Bg, Bn, Cb, Cg, Cn,
    d, l, n, per_group, tiles, slabs, chunk, groups, count, parts, processors,
    SOFTPLUS: tl.constexpr, STEADY_B: tl.constexpr, STEADY_C: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, NATIVE: tl.constexpr, PIN: tl.constexpr,
):  # fmt: skip
    """A program: one channel of a row; lane i scans steps 16 i... of a block, a state at a time.

    A lane's own 16 steps give its end state from zero; the lanes' ends are scanned, which gives each its true
    start; and the steps are taken again, with the exponentials kept. Lane i also carries state i to the next
    block: n <= 32. NATIVE reads B and C where they lie. For inference: it saves nothing.
    """
    T: tl.constexpr = 2 * STEPS
    SIZE: tl.constexpr = WARP * T
    chosen = program_place(count, processors)
    if chosen >= count:
        return
    tile, row = chosen % (groups * tiles), (chosen // (groups * tiles)).to(tl.int64)
    group = tile // tiles
    lane, zero = tl.arange(0, WARP), tl.zeros((WARP,), tl.float32)
    every, channel = lane >= 0, tile.to(tl.int64)
    at_u, at_s = u + row * ub + channel * ud, delta + row * sb + channel * sd
    at_y, at_z = row * yb + channel * yd, None
    if z is not None:
        at_z = z + row * zb + channel * zd
    own_bias = zero if bias is None else tl.load(bias + channel)
    skip = zero if D is None else tl.load(D + channel)
    blocks = tl.cdiv(l, SIZE)
    if NATIVE:
        at_B, at_C = B + (row * Bb + group * Bg), C + (row * Cb + group * Cg)
        turn_B, turn_C, ahead = tl.cast(Bn, tl.int64), tl.cast(Cn, tl.int64), 0
    else:
        at_B = B + ((row * groups + group) * n * blocks * SIZE)
        at_C = C + ((row * groups + group) * n * blocks * SIZE)
        turn_B, turn_C, ahead = tl.cast(blocks * SIZE, tl.int64), tl.cast(blocks * SIZE, tl.int64), SIZE
    held = channel * n + lane
    rates, carries = tl.load(A + held, lane < n, 0.0) * LOG2_E, zero
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
        loaded_s, loaded_u = (
            read(at_s, t1, sl, l, WIDE, WHOLE, T),
            read(at_u, t1, ul, l, WIDE, WHOLE, T),
        )
        if WIDE:
            later = tl.minimum(t1 + SIZE, l - 1)
            prefetch(at_s + later)
            prefetch(at_u + later)
            if z is not None:
                prefetch(at_z + tl.minimum(t1, l - 1))
        own = own_steps(loaded_s, loaded_u, delta, u, own_bias, t1, 0, l, SOFTPLUS, WIDE, WHOLE)
        span, outputs = zero, repeat(zero, T)
        for i in tl.static_range(T):
            span += own[i]
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
            Bs = repeat(shuffle(constant_B, state), T) if STEADY_B else as_floats(now_B, B, True)
            Cs = repeat(shuffle(constant_C, state), T) if STEADY_C else as_floats(now_C, C, True)
            decays, gains = (), ()
            for i in tl.static_range(T):
                decays, gains = decays + (exp2(own[i] * rate),), gains + (own[T + i] * Bs[i],)
            h = gains[0]
            for i in tl.static_range(1, T):
                h = decays[i] * h + gains[i]
            decay = exp2(span * rate)
            ends = warp_scan(decay, tl.where(lane == 0, decay * carry + h, h), lane)
            h = shift_up(ends, carry, lane)
            carries = tl.where(lane == state, shuffle(ends, WARP - 1), carries)
            new = ()
            for i in tl.static_range(T):
                h = decays[i] * h + gains[i]
                new = new + (outputs[i] + h * Cs[i],)
            outputs = new
        loaded_z = () if z is None else read(at_z, t1, zl, l, WIDE, WHOLE, T)
        values = own_outputs(outputs, skip, loaded_u, loaded_z, u, z, WIDE)
        write(y + at_y, t1, yl, values[T:], 0, l, every, WIDE, WHOLE, T)
    tl.store(last + row * d * n + held, carries, lane < n)
