"""The backward kernels of the Triton backend; `carry` is the first pass where time is cut into chunks."""

import triton
import triton.language as tl

from projecta.scan.triton.steps import (
    STEPS,
    as_floats,
    eight_steps,
    kernel,
    lane_of,
    own_steps,
    program_place,
    read,
    write,
)
from projecta.scan.triton.warp import (
    LN_2,
    LOG2_E,
    WARP,
    all_reduce,
    barrier,
    broadcast,
    compensated,
    exp2,
    load_stretches,
    load_words,
    reduce_scatter,
    reduce_warps,
    repeat,
    shared_room,
    sigmoid,
    softplus,
    stage_sums,
    store_one,
    store_shared,
    store_words,
    unpack_word,
)


@kernel
def carry(
    delta, A, C, z, bias, grad_y, carried, spans, sb, sd, sl, zb, zd, zl, gb, gd, gl,
    d, l, n, per_group, tiles, slabs, chunk, groups, count, parts, processors,
    SOFTPLUS: tl.constexpr, STEADY_B: tl.constexpr, STEADY_C: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr, UNROLL: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """What each chunk of time but the first adds to the gradient of the state at its start; its sum of delta.

    A program: WARPS times CHANNELS channels of a row and one of those chunks, of which there are `parts`.
    """
    V: tl.constexpr = STEPS * UNROLL // LANES
    K: tl.constexpr = N // LANES
    STRIDE: tl.constexpr = ((0 if STEADY_B else N) + N) * STEPS
    S: tl.constexpr = 0 if STEADY_C else N * STEPS
    THREADS: tl.constexpr = WARP * WARPS
    chosen = program_place(count, processors)
    if chosen >= count:
        return
    tile, part = chosen % (groups * tiles), chosen // (groups * tiles) % parts
    row = (chosen // (groups * tiles) // parts).to(tl.int64)
    group = tile // tiles
    index, zero = tl.arange(0, THREADS), tl.zeros((THREADS,), tl.float32)
    lane, column, leader = lane_of(index, LANES)
    at_C = C + ((row * groups + group) * slabs) * STRIDE
    own_channel = (tile % tiles) * (WARPS * CHANNELS) + column
    real = own_channel < per_group
    channel = (group * per_group + tl.minimum(own_channel, per_group - 1)).to(tl.int64)
    at_s, at_g, at_z = delta + row * sb + channel * sd, grad_y + row * gb + channel * gd, None
    if z is not None:
        at_z = z + row * zb + channel * zd
    own_bias = zero if bias is None else tl.load(bias + channel)
    p, rates, constant_C = (), (), ()
    for j in tl.static_range(K):
        row_n = j * LANES + lane
        rates = rates + (tl.load(A + channel * n + row_n, row_n < n, 0.0) * LOG2_E,)
        p = p + (zero,)
        if STEADY_C:
            constant_C = constant_C + (tl.load(C + channel * n + row_n, row_n < n, 0.0),)
    first, final = (part + 1) * chunk, tl.minimum((part + 2) * chunk, slabs)
    blocks, span = tl.cdiv(final - first, UNROLL), zero
    room, turn, coming = shared_room(index, 2 * UNROLL * S * 4), 0, ()
    slab = first + (blocks - 1) * UNROLL
    if S > 0:
        coming = load_stretches(
            at_C + slab.to(tl.int64) * STRIDE, index, slabs - slab, S, STRIDE, UNROLL, THREADS
        )
        store_shared(coming, room, index, UNROLL * S, THREADS)
        barrier(index)
    t1 = slab * STEPS + lane * V
    now_s, now_g = read(at_s, t1, sl, l, WIDE, WHOLE, V), read(at_g, t1, gl, l, WIDE, WHOLE, V)
    now_z = () if z is None else read(at_z, t1, zl, l, WIDE, WHOLE, V)
    for back in range(0, blocks):
        block = first + (blocks - 1 - back) * UNROLL
        s, g = as_floats(now_s, delta, WIDE), as_floats(now_g, grad_y, WIDE)
        if z is not None:
            gate = as_floats(now_z, z, WIDE)
        t1 = tl.maximum(block - UNROLL, first) * STEPS + lane * V
        now_s, now_g = (
            read(at_s, t1, sl, l, WIDE, WHOLE, V),
            read(at_g, t1, gl, l, WIDE, WHOLE, V),
        )
        now_z = () if z is None else read(at_z, t1, zl, l, WIDE, WHOLE, V)
        half, turn = room + turn * (UNROLL * S * 4), 1 - turn
        if S > 0:
            slab = tl.maximum(block - UNROLL, first)
            coming = load_stretches(
                at_C + slab.to(tl.int64) * STRIDE, index, slabs - slab, S, STRIDE, UNROLL, THREADS
            )
        own_s, own_g = (), ()
        for i in tl.static_range(V):
            step, grad = s[i] + own_bias, g[i]
            if SOFTPLUS:
                step = softplus(step, False)
            if z is not None:
                grad = grad * gate[i] * sigmoid(gate[i])
            if not WHOLE:
                inside = block * STEPS + lane * V + i < l
                step, grad = tl.where(inside, step, 0.0), tl.where(inside, grad, 0.0)
            span += step
            own_s, own_g = own_s + (step,), own_g + (grad,)
        for k in tl.static_range(UNROLL - 1, -1, -1):
            steps = broadcast(own_s, leader, k * STEPS, V, STEPS, 2)
            grads = broadcast(own_g, leader, k * STEPS, V, STEPS, 2)
            then = ()
            for j in tl.static_range(K):
                at, row_n = tl.minimum(block + k, slabs - 1).to(tl.int64) * STRIDE, j * LANES + lane
                in_room = half + (k * S + row_n * STEPS) * 4
                Cs = eight_steps(at_C + at, row_n, in_room, constant_C[j] if STEADY_C else None, STEADY_C)
                grad = p[j]
                for i in tl.static_range(STEPS - 1, -1, -1):
                    grad = exp2(steps[i] * rates[j]) * (grads[i] * Cs[i] + grad)
                then = then + (grad,)
            p = then
        if S > 0:
            store_shared(coming, room + turn * (UNROLL * S * 4), index, UNROLL * S, THREADS)
            barrier(index)
    at = row * parts + part
    tl.store(spans + at * d + channel, all_reduce(span, index, 2, LANES), real)
    for j in tl.static_range(K):
        tl.store(carried + (at * N + j * LANES + lane) * d + channel, p[j], real)


@triton.jit
def advance_states(
    states, rates, constant_B, at_s, at_u, at_B, delta, u, bias, lane, leader, slab, sl, ul, l, t_start,
    t_end, SOFTPLUS: tl.constexpr, STEADY_B: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr,
    V: tl.constexpr, LANES: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The states after a slab, from those before it, as in `forward_states` (to rounding: compiled apart)."""
    t1, then = slab * STEPS + lane * V, ()
    loaded_s, loaded_u = (
        read(at_s, t1, sl, l, WIDE, WHOLE, V),
        read(at_u, t1, ul, l, WIDE, WHOLE, V),
    )
    own = own_steps(loaded_s, loaded_u, delta, u, bias, t1, t_start, t_end, SOFTPLUS, WIDE, WHOLE)
    steps, inputs = broadcast(own, leader, 0, V, STEPS, 2), broadcast(own[V:], leader, 0, V, STEPS, 2)
    for j in tl.static_range(len(states)):
        Bs = repeat(constant_B[j], STEPS) if STEADY_B else ()
        if not STEADY_B:
            where = at_B + (slab.to(tl.int64) * S + (j * LANES + lane) * STEPS)
            found = load_words(where, 4, True) + load_words(where + 4, 4, True)
            for i in tl.static_range(STEPS):
                Bs = Bs + unpack_word(found[i], tl.float32)
        state = states[j]
        for i in tl.static_range(STEPS):
            gain = inputs[i] * Bs[i]
            if not WHOLE:  # another sequence's B may be NaN
                t = slab * STEPS + i
                gain = tl.where((t >= t_start) & (t < t_end), gain, 0.0)
            state = exp2(steps[i] * rates[j]) * state + gain
        then = then + (state,)
    return then


@triton.jit
def write_sums(to, tiles, t, t_start, t_end, inside, bounds, R: tl.constexpr):
    """A lane's R sums for dB or dC; two packed sequences may share a slab."""
    if bounds is None:
        row = ()
        for i in tl.static_range(R):
            row = row + (tiles[i].to(tl.int32, bitcast=True),)
        store_words(to, row, inside, R)
    else:
        for i in tl.static_range(R):
            store_one(to + i, tiles[i], inside & (t + i >= t_start) & (t + i < t_end))


@kernel
def backward(
    u, delta, A, B, C, D, z, bias, bounds, grad_y, grad_last, saved, ungated, carried, spans,
    du, ddelta, dz, sums, totals, grad_start,
    ub, ud, ul, sb, sd, sl, zb, zd, zl, gb, gd, gl, dub, dud, dul, dsb, dsd, dsl, dzb, dzd, dzl,
    d, l, n, per_group, tiles, slabs, chunk, groups, count, parts, processors,
    SOFTPLUS: tl.constexpr, STEADY_B: tl.constexpr, STEADY_C: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr, WARPS: tl.constexpr,
    EVERY: tl.constexpr,
):  # fmt: skip
    """A program: WARPS times CHANNELS channels of a sequence and a chunk of time.

    A slab starts from the state saved last before it, taken on to it if EVERY is more than 1. Writes du,
    ddelta, dz; for this sequence and chunk the sums over time of dD, dbias, dA (and dB, dC if steady):
    `totals` (sequence, chunk, d, 2 + N...); and for this tile the sums over its channels of dB and dC,
    `sums`: (tile of the group, row, group, slab, N, 16).
    """
    V: tl.constexpr = STEPS // LANES
    K: tl.constexpr = N // LANES
    OF_B: tl.constexpr = 0 if STEADY_B else N
    S: tl.constexpr = (OF_B + (0 if STEADY_C else N)) * STEPS  # numbers of a slab of B and C
    THREADS: tl.constexpr = WARP * WARPS
    WIDTH: tl.constexpr = 2 + N + (N if STEADY_B else 0) + (N if STEADY_C else 0)
    R: tl.constexpr = 2 * STEPS // CHANNELS  # sums of dB and dC that a lane keeps
    chosen = program_place(count, processors)
    if chosen >= count:
        return
    tile, part = chosen % (groups * tiles), chosen // (groups * tiles) % parts
    sequence = (chosen // (groups * tiles) // parts).to(tl.int64)
    group = tile // tiles
    index, zero = tl.arange(0, THREADS), tl.zeros((THREADS,), tl.float32)
    lane, column, leader = lane_of(index, LANES)
    row, t_start, t_end, rows = sequence, 0, l, count // (groups * tiles * parts)
    place = sequence * tl.cdiv(slabs, EVERY)
    if bounds is not None:
        row, rows = sequence * 0, 1
        t_start, t_end = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
        place = sequence + t_start // (STEPS * EVERY)
    origin, limit = t_start // STEPS, tl.cdiv(t_end, STEPS)
    first, final = origin + part * chunk, tl.minimum(origin + (part + 1) * chunk, limit)
    weights = ((row * groups + group) * slabs) * S
    at_B, at_C, shared = B + weights, C + weights, (C if STEADY_B else B) + weights
    mine = (((tile % tiles).to(tl.int64) * rows + row) * groups + group) * slabs * N
    first_sum = (index % 2 * (CHANNELS // 2) + index % WARP // (2 * LANES)) * R  # that a lane keeps
    to_sums = sums + mine * (2 * STEPS) + (lane * (2 * STEPS) + first_sum)
    own_channel = (tile % tiles) * (CHANNELS * WARPS) + column
    real = own_channel < per_group
    channel = (group * per_group + tl.minimum(own_channel, per_group - 1)).to(tl.int64)
    at_u, at_s = u + row * ub + channel * ud, delta + row * sb + channel * sd
    at_g, at_y = grad_y + row * gb + channel * gd, (row * d + channel) * l
    to_u, to_s = du + row * dub + channel * dud, ddelta + row * dsb + channel * dsd
    at_z, to_z = None, None
    if z is not None:
        at_z, to_z = z + row * zb + channel * zd, dz + row * dzb + channel * dzd
    own_bias = zero if bias is None else tl.load(bias + channel)
    skip = zero if D is None else tl.load(D + channel)
    total_D, total_bias, lost_D, lost_bias = zero, zero, zero, zero
    p, rates, constant_B, constant_C, total_A, total_B, total_C, lost_A = (), (), (), (), (), (), (), ()
    for j in tl.static_range(K):
        row_n = j * LANES + lane
        here = row_n < n
        rates = rates + (tl.load(A + channel * n + row_n, here, 0.0) * LOG2_E,)
        p = p + (tl.load(grad_last + (sequence * d + channel) * n + row_n, here & real, 0.0),)
        total_A, total_B, total_C = total_A + (zero,), total_B + (zero,), total_C + (zero,)
        lost_A = lost_A + (zero,)
        if STEADY_B:
            constant_B = constant_B + (tl.load(B + channel * n + row_n, here, 0.0),)
        if STEADY_C:
            constant_C = constant_C + (tl.load(C + channel * n + row_n, here, 0.0),)
    if carried is not None:
        for back in range(1, parts - part):  # the last chunk first; the first hands nothing on
            at = sequence * (parts - 1) + parts - 1 - back
            span, then = tl.load(spans + at * d + channel), ()
            for j in tl.static_range(K):
                gained = tl.load(carried + (at * N + j * LANES + lane) * d + channel, real, 0.0)
                then = then + (exp2(rates[j] * span) * p[j] + gained,)
            p = then
    room, coming = shared_room(index, 2 * S * 4 + (2 * THREADS * K * R * 4 if WARPS > 1 and S > 0 else 0)), ()
    slab = tl.maximum(final - 1, 0)
    if S > 0:
        coming = load_stretches(shared + slab.to(tl.int64) * S, index, 1, S, S, 1, THREADS)
        store_shared(coming, room + slab % 2 * (S * 4), index, S, THREADS)
        barrier(index)
    t1 = slab * STEPS + lane * V
    now_s, now_u = read(at_s, t1, sl, l, WIDE, WHOLE, V), read(at_u, t1, ul, l, WIDE, WHOLE, V)
    now_g, now_z, now_y = read(at_g, t1, gl, l, WIDE, WHOLE, V), (), ()
    if z is not None:
        now_z = read(at_z, t1, zl, l, WIDE, WHOLE, V)
        now_y = read(ungated + at_y, t1, 1, l, WIDE, WHOLE, V)
    starts = ()
    for j in tl.static_range(K):
        at_state = ((place + tl.maximum(final - 1 - origin, 0) // EVERY) * N + j * LANES + lane) * d + channel
        starts = starts + (tl.load(saved + at_state),)
    for back in range(0, final - first):
        slab = final - 1 - back
        before = tl.maximum(slab - 1, first)
        if EVERY > 1:
            since = (slab - origin) % EVERY
            for i in range(since):
                starts = advance_states(
                    starts, rates, constant_B, at_s, at_u, at_B, delta, u, own_bias, lane, leader,
                    slab - since + i, sl, ul, l, t_start, t_end, SOFTPLUS, STEADY_B, WIDE, WHOLE, V, LANES, S,
                )  # fmt: skip
        s, v, g = as_floats(now_s, delta, WIDE), as_floats(now_u, u, WIDE), as_floats(now_g, grad_y, WIDE)
        if z is not None:
            gate, ys = as_floats(now_z, z, WIDE), as_floats(now_y, ungated, WIDE)
        if S > 0:
            coming = load_stretches(shared + before.to(tl.int64) * S, index, 1, S, S, 1, THREADS)
        t1 = before * STEPS + lane * V
        now_s, now_u = (
            read(at_s, t1, sl, l, WIDE, WHOLE, V),
            read(at_u, t1, ul, l, WIDE, WHOLE, V),
        )
        now_g, now_z, now_y = read(at_g, t1, gl, l, WIDE, WHOLE, V), (), ()
        if z is not None:
            now_z = read(at_z, t1, zl, l, WIDE, WHOLE, V)
            now_y = read(ungated + at_y, t1, 1, l, WIDE, WHOLE, V)
        t1 = slab * STEPS + lane * V
        own_s, own_x, own_g, own_u, own_slope, own_gate = (), (), (), (), (), ()
        for i in tl.static_range(V):
            step, value, grad = s[i] + own_bias, v[i], g[i]
            slope = zero + 1.0
            if SOFTPLUS:
                slope = sigmoid(step)
                step = softplus(step, False)
            if z is not None:
                open = sigmoid(gate[i])
                own_gate = own_gate + (grad * ys[i] * open * (1.0 + gate[i] * (1.0 - open)),)
                grad = grad * gate[i] * open
            if not WHOLE:
                inside = real & (t1 + i >= t_start) & (t1 + i < t_end)
                step, slope = tl.where(inside, step, 0.0), tl.where(inside, slope, 0.0)
                value, grad = tl.where(inside, value, 0.0), tl.where(inside, grad, 0.0)
            total_D, lost_D = compensated(total_D, lost_D, grad * value)
            own_s, own_x, own_g = own_s + (step,), own_x + (step * value,), own_g + (grad,)
            own_u, own_slope = own_u + (value,), own_slope + (slope,)
        steps = broadcast(own_s, leader, 0, V, STEPS, 2)
        inputs = broadcast(own_x, leader, 0, V, STEPS, 2)
        grads = broadcast(own_g, leader, 0, V, STEPS, 2)
        sums_B, sums_A = repeat(zero, STEPS), repeat(zero, STEPS)
        then, new_A, new_B, new_C, kept, new_lost = (), (), (), (), (), ()
        for j in tl.static_range(K):
            rate, state, row_n = rates[j], starts[j], j * LANES + lane
            at, in_room = slab.to(tl.int64) * S, room + slab % 2 * (S * 4) + row_n * (STEPS * 4)
            Bs = eight_steps(at_B + at, row_n, in_room, constant_B[j] if STEADY_B else None, STEADY_B)
            in_room += OF_B * STEPS * 4
            Cs = eight_steps(at_C + at, row_n, in_room, constant_C[j] if STEADY_C else None, STEADY_C)
            states, decays = (state,), ()
            for i in tl.static_range(STEPS):
                decay, gain = exp2(steps[i] * rate), inputs[i] * Bs[i]
                if bounds is not None:
                    inside = (slab * STEPS + i >= t_start) & (slab * STEPS + i < t_end)
                    gain = tl.where(inside, gain, 0.0)
                state = decay * state + gain
                states, decays = states + (state,), decays + (decay,)
            grad, of_A, of_B, of_C = p[j], zero, zero, zero  # a slab's sums: fewer roundings than one by one
            news_B, news_A, over_B, over_C = (), (), (), ()
            for i in tl.static_range(STEPS - 1, -1, -1):
                sent = grads[i] * Cs[i]
                if bounds is not None:
                    inside = (slab * STEPS + i >= t_start) & (slab * STEPS + i < t_end)
                    sent = tl.where(inside, sent, 0.0)
                grad = sent + grad
                news_B = (sums_B[i] + grad * Bs[i],) + news_B
                if STEADY_B:
                    of_B += grad * inputs[i]
                over_B, over_C = (grad * inputs[i],) + over_B, (grads[i] * states[i + 1],) + over_C
                if STEADY_C:
                    of_C += grads[i] * states[i + 1]
                grad = decays[i] * grad
                change = grad * states[i]
                news_A = (sums_A[i] + rate * change,) + news_A
                of_A += steps[i] * change
            sums_B, sums_A = news_B, news_A
            sum_A, lost = compensated(total_A[j], lost_A[j], of_A)
            then, new_A, new_lost = then + (grad,), new_A + (sum_A,), new_lost + (lost,)
            new_B, new_C = new_B + (total_B[j] + of_B,), new_C + (total_C[j] + of_C,)
            if S > 0:
                row_j = reduce_scatter(over_B + over_C, index, 1, 2, 2 * STEPS)
                row_j = reduce_scatter(row_j, index, 2 * LANES, CHANNELS // 2, STEPS)
                kept = kept + row_j
                if WARPS > 1:
                    stage_sums(row_j, room + 2 * S * 4, index, slab % 2, j, K, R, WARPS)
        if S > 0:
            store_shared(coming, room + (slab + 1) % 2 * (S * 4), index, S, THREADS)
            barrier(index)
            if WARPS > 1:
                kept = reduce_warps(kept, room + 2 * S * 4, index, slab % 2, K, R, WARPS)
            for j in tl.static_range((K + WARPS - 1) // WARPS):
                own_j, t = j * WARPS + index // WARP, slab * STEPS + first_sum % STEPS
                to = to_sums + (slab.to(tl.int64) * N + own_j * LANES) * (2 * STEPS)
                write_sums(to, kept[j * R : (j + 1) * R], t, t_start, t_end, own_j < K, bounds, R)
        p, total_A, total_B, total_C, lost_A, starts = then, new_A, new_B, new_C, new_lost, ()
        for j in tl.static_range(K):
            at_state = ((place + (before - origin) // EVERY) * N + j * LANES + lane) * d + channel
            starts = starts + (tl.load(saved + at_state),)
        of_B = reduce_scatter(sums_B, index, 2, LANES, STEPS)
        of_A = reduce_scatter(sums_A, index, 2, LANES, STEPS)
        outs_u, outs_s = (), ()
        for i in tl.static_range(V):
            change = (of_A[i] * LN_2 + own_u[i] * of_B[i]) * own_slope[i]
            outs_u, outs_s = outs_u + (skip * own_g[i] + own_s[i] * of_B[i],), outs_s + (change,)
            total_bias, lost_bias = compensated(total_bias, lost_bias, change)
        write(to_u, t1, dul, outs_u, t_start, t_end, real, WIDE, WHOLE, V)
        write(to_s, t1, dsl, outs_s, t_start, t_end, real, WIDE, WHOLE, V)
        if z is not None:
            write(to_z, t1, dzl, own_gate, t_start, t_end, real, WIDE, WHOLE, V)
    to = totals + ((sequence * parts + part) * d + channel) * WIDTH
    only = real & (lane == 0)
    tl.store(to, all_reduce(total_D, index, 2, LANES), only)
    tl.store(to + 1, all_reduce(total_bias, index, 2, LANES), only)
    for j in tl.static_range(K):
        row_n = j * LANES + lane
        own = real & (row_n < n)
        tl.store(to + 2 + row_n, total_A[j], own)
        if STEADY_B:
            tl.store(to + 2 + N + row_n, total_B[j], own)
        if STEADY_C:
            tl.store(to + WIDTH - N + row_n, total_C[j], own)
        if grad_start is not None:
            if part == 0:
                tl.store(grad_start + (sequence * d + channel) * n + row_n, p[j], own)
