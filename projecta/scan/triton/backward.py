"""The backward kernels of the Triton backend; `carry` is the first pass if time is cut into chunks."""

import triton
import triton.language as tl

from projecta._triton.launch import kernel
from projecta._triton.memory import (
    as_floats,
    barrier,
    first_step,
    load_rows,
    load_words,
    read,
    shared_buffer,
    store_one,
    store_shared,
    store_words,
    unpack_word,
    write,
)
from projecta._triton.warp import (
    LN_2,
    WARP,
    all_reduce,
    broadcast,
    compensated,
    exp2,
    reduce_scatter,
    reduce_warps,
    repeat,
    sigmoid,
    softplus,
    stage_sums,
)
from projecta.scan.triton.steps import (
    STEPS,
    channel_numbers,
    channel_of,
    eight_steps,
    lane_of,
    load_first_rows,
    own_rates,
    own_rows,
    own_steps,
    program_index,
    read_three,
    sequence_of,
    split_program,
    state_after_chunk,
)


@triton.jit
def _own_steps_and_grads(
    s, g, gate, bias, t1, l, SOFTPLUS: tl.constexpr, GATED: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Per-lane values of delta, and of the gradient of y before the gate."""
    own_s, own_g = (), ()
    for i in tl.static_range(len(s)):
        step, grad = s[i] + bias, g[i]
        if SOFTPLUS:
            step = softplus(step, False)
        if GATED:
            grad = grad * gate[i] * sigmoid(gate[i])
        if not WHOLE:
            inside = t1 + i < l
            step, grad = tl.where(inside, step, 0.0), tl.where(inside, grad, 0.0)
        own_s, own_g = own_s + (step,), own_g + (grad,)
    return own_s, own_g


@triton.jit
def _carry_block(
    p, own_s, own_g, rates, constant_C, at_C, half, block, slabs, lane, leader, STEADY_C: tl.constexpr,
    STRIDE: tl.constexpr, S: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The gradient of the states before a block of UNROLL slabs, from that of the states after it."""
    V: tl.constexpr = STEPS * UNROLL // LANES
    for k in tl.static_range(UNROLL - 1, -1, -1):
        steps = broadcast(own_s, leader, k * STEPS, V, STEPS, 2)
        grads = broadcast(own_g, leader, k * STEPS, V, STEPS, 2)
        then = ()
        for j in tl.static_range(len(p)):
            at, row_n = tl.minimum(block + k, slabs - 1).to(tl.int64) * STRIDE, j * LANES + lane
            in_buffer = half + (k * S + row_n * STEPS) * 4
            Cs = eight_steps(at_C + at, row_n, in_buffer, constant_C[j] if STEADY_C else None, STEADY_C)
            grad = p[j]
            for i in tl.static_range(STEPS - 1, -1, -1):
                grad = exp2(steps[i] * rates[j]) * (grads[i] * Cs[i] + grad)
            then = then + (grad,)
        p = then
    return p


@kernel
def carry(
    delta, A, C, z, bias, grad_y, carried, spans, sb, sd, sl, zb, zd, zl, gb, gd, gl, d, l, n, per_group,
    tiles, slabs, chunk, groups, count, parts, links, processors, SOFTPLUS: tl.constexpr,
    LOG_A: tl.constexpr, STEADY_B: tl.constexpr, STEADY_C: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr,
    CHANNELS: tl.constexpr, UNROLL: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """The gradient that each of the last `links` chunks adds to its start state, and its sum of delta.

    A program: WARPS times CHANNELS channels of a row and one of these chunks.
    """
    V: tl.constexpr = STEPS * UNROLL // LANES
    K: tl.constexpr = N // LANES
    STRIDE: tl.constexpr = ((0 if STEADY_B else N) + N) * STEPS
    S: tl.constexpr = 0 if STEADY_C else N * STEPS
    THREADS: tl.constexpr = WARP * WARPS
    chosen = program_index(count, processors)
    if chosen >= count:
        return
    tile, link, row, group = split_program(chosen, groups, tiles, links)
    index, zero = tl.arange(0, THREADS), tl.zeros((THREADS,), tl.float32)
    lane, column, leader = lane_of(index, LANES)
    at_C = C + ((row * groups + group) * slabs) * STRIDE
    real, channel = channel_of(tile, tiles, group, per_group, column, WARPS * CHANNELS)
    at_s = delta + row * sb + channel * sd + first_step(sl, l)
    at_g, at_z = grad_y + row * gb + channel * gd + first_step(gl, l), None
    if z is not None:
        at_z = z + row * zb + channel * zd + first_step(zl, l)
    own_bias = channel_numbers(bias, channel, zero)
    p, constant_C, rates = repeat(zero, K), (), own_rates(A, channel, lane, n, LOG_A, K, LANES)
    if STEADY_C:
        constant_C = own_rows(C + channel * n, lane, n, 1.0, K, LANES)
    part = parts - links + link
    first, final = part * chunk, tl.minimum((part + 1) * chunk, slabs)
    blocks, span = tl.cdiv(final - first, UNROLL), zero
    buffer, turn = shared_buffer(index, 2 * UNROLL * S * 4), 0
    slab = first + (blocks - 1) * UNROLL
    if S > 0:
        load_first_rows(at_C, buffer, index, slab, slabs, S, STRIDE, UNROLL, THREADS)
    t1 = slab * STEPS + lane * V
    now_s, now_g = read(at_s, t1, sl, l, WIDE, WHOLE, V), read(at_g, t1, gl, l, WIDE, WHOLE, V)
    now_z = () if z is None else read(at_z, t1, zl, l, WIDE, WHOLE, V)
    for back in range(0, blocks):
        block = first + (blocks - 1 - back) * UNROLL
        s, g = as_floats(now_s, delta, WIDE), as_floats(now_g, grad_y, WIDE)
        gate = () if z is None else as_floats(now_z, z, WIDE)
        t1 = tl.maximum(block - UNROLL, first) * STEPS + lane * V
        now_s, now_g = read(at_s, t1, sl, l, WIDE, WHOLE, V), read(at_g, t1, gl, l, WIDE, WHOLE, V)
        now_z = () if z is None else read(at_z, t1, zl, l, WIDE, WHOLE, V)
        half, turn = buffer + turn * (UNROLL * S * 4), 1 - turn
        if S > 0:
            slab = tl.maximum(block - UNROLL, first)
            coming = load_rows(
                at_C + slab.to(tl.int64) * STRIDE, index, slabs - slab, S, STRIDE, UNROLL, THREADS
            )
        own_s, own_g = _own_steps_and_grads(
            s, g, gate, own_bias, block * STEPS + lane * V, l, SOFTPLUS, z is not None, WHOLE
        )  # fmt: skip
        for i in tl.static_range(V):
            span += own_s[i]
        p = _carry_block(
            p, own_s, own_g, rates, constant_C, at_C, half, block, slabs, lane, leader, STEADY_C, STRIDE, S,
            LANES, UNROLL,
        )  # fmt: skip
        if S > 0:
            store_shared(coming, buffer + turn * (UNROLL * S * 4), index, UNROLL * S, THREADS)
            barrier(index)
    at = row * links + link
    tl.store(spans + at * d + channel, all_reduce(span, index, 2, LANES), real)
    for j in tl.static_range(K):
        tl.store(carried + (at * N + j * LANES + lane) * d + channel, p[j], real)


@triton.jit
def advance_states(
    states, rates, constant_B, at_s, at_u, at_B, delta, u, bias, lane, leader, slab, sl, ul, l, t_start,
    t_end, SOFTPLUS: tl.constexpr, STEADY_B: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr,
    V: tl.constexpr, LANES: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The states after a slab, from those before it, as in `forward_states` (but rounded differently)."""
    t1, then = slab * STEPS + lane * V, ()
    loaded_s, loaded_u = read(at_s, t1, sl, l, WIDE, WHOLE, V), read(at_u, t1, ul, l, WIDE, WHOLE, V)
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
    """Write a lane's R sums for dB or dC; two packed sequences may share a slab."""
    if bounds is None:
        row = ()
        for i in tl.static_range(R):
            row = row + (tiles[i].to(tl.int32, bitcast=True),)
        store_words(to, row, inside, R)
    else:
        for i in tl.static_range(R):
            store_one(to + i, tiles[i], inside & (t + i >= t_start) & (t + i < t_end))


@triton.jit
def _own_values(
    s, v, g, gate, ys, bias, t1, t_start, t_end, real, SOFTPLUS: tl.constexpr, GATED: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Per-lane values of delta, delta u, the gradient of y before the gate, u, the slope of softplus, and the
    gradient of z."""
    own_s, own_x, own_g, own_u, own_slope, own_gate = (), (), (), (), (), ()
    for i in tl.static_range(len(s)):
        step, value, grad = s[i] + bias, v[i], g[i]
        slope = bias * 0.0 + 1.0
        if SOFTPLUS:
            slope = sigmoid(step)
            step = softplus(step, False)
        if GATED:
            open = sigmoid(gate[i])
            if len(ys) > 0:
                own_gate = own_gate + (grad * ys[i] * open * (1.0 + gate[i] * (1.0 - open)),)
            grad = grad * gate[i] * open
        if not WHOLE:
            inside = real & (t1 + i >= t_start) & (t1 + i < t_end)
            step, slope = tl.where(inside, step, 0.0), tl.where(inside, slope, 0.0)
            value, grad = tl.where(inside, value, 0.0), tl.where(inside, grad, 0.0)
        own_s, own_x, own_g = own_s + (step,), own_x + (step * value,), own_g + (grad,)
        own_u, own_slope = own_u + (value,), own_slope + (slope,)
    return own_s, own_x, own_g, own_u, own_slope, own_gate


@triton.jit
def _gate_again(sums_y, index, skip, own_u, g, gate, LANES: tl.constexpr):
    """Per-lane values of the gradient of z and of y after the gate, from sums over a lane's states of C h."""
    sums, own_gate, outputs = reduce_scatter(sums_y, index, 2, LANES, STEPS), (), ()
    for i in tl.static_range(len(sums)):
        value, open = sums[i] + skip * own_u[i], sigmoid(gate[i])
        own_gate = own_gate + (g[i] * value * open * (1.0 + gate[i] * (1.0 - open)),)
        outputs = outputs + (value * gate[i] * open,)
    return own_gate, outputs


@triton.jit
def _saved_rows(saved, place, lane, d, channel, K: tl.constexpr, LANES: tl.constexpr):
    """The saved states of a lane at index `place` of the saved slabs."""
    found = ()
    for j in tl.static_range(K):
        found = found + (tl.load(saved + (place * (K * LANES) + j * LANES + lane) * d + channel),)
    return found


@triton.jit
def _back_row(
    state, grad, rate, steps, inputs, grads, Bs, Cs, sums_B, sums_A, sums_y, slab, bounds, t_start, t_end,
    STEADY_B: tl.constexpr, STEADY_C: tl.constexpr,
):  # fmt: skip
    """One state of a lane over a slab: forward from its start, then back.

    Returns the gradient of the state before the slab; the sums over states for dx (`sums_dx`), d(delta)
    (`sums_ddelta`) and y (`sums_y`, if not empty); the slab's sums for dA, dB and dC; and each step's
    products for dB and dC.
    """
    states, decays = (state,), ()
    for i in tl.static_range(STEPS):
        decay, gain = exp2(steps[i] * rate), inputs[i] * Bs[i]
        if bounds is not None:
            inside = (slab * STEPS + i >= t_start) & (slab * STEPS + i < t_end)
            gain = tl.where(inside, gain, 0.0)
        state = decay * state + gain
        states, decays = states + (state,), decays + (decay,)
    outputs = ()
    if len(sums_y) > 0:
        for i in tl.static_range(STEPS):
            value = states[i + 1] * Cs[i]
            if bounds is not None:
                inside = (slab * STEPS + i >= t_start) & (slab * STEPS + i < t_end)
                value = tl.where(inside, value, 0.0)
            outputs = outputs + (sums_y[i] + value,)
    zero = tl.zeros_like(grad)
    of_A, of_B, of_C = zero, zero, zero  # sums of the slab first: fewer rounding errors
    sums_dx, sums_ddelta, products_dB, products_dC = (), (), (), ()
    for i in tl.static_range(STEPS - 1, -1, -1):
        sent = grads[i] * Cs[i]
        if bounds is not None:
            inside = (slab * STEPS + i >= t_start) & (slab * STEPS + i < t_end)
            sent = tl.where(inside, sent, 0.0)
        grad = sent + grad
        sums_dx = (sums_B[i] + grad * Bs[i],) + sums_dx
        if STEADY_B:
            of_B += grad * inputs[i]
        products_dB, products_dC = (
            (grad * inputs[i],) + products_dB,
            (grads[i] * states[i + 1],) + products_dC,
        )
        if STEADY_C:
            of_C += grads[i] * states[i + 1]
        grad = decays[i] * grad
        change = grad * states[i]
        sums_ddelta = (sums_A[i] + rate * change,) + sums_ddelta
        of_A += steps[i] * change
    return grad, sums_dx, sums_ddelta, outputs, of_A, of_B, of_C, products_dB, products_dC


@triton.jit
def _back_slab(
    p, starts, rates, constant_B, constant_C, own_s, own_x, own_g, at_B, at_C, in_buffer, sums_buffer, index,
    lane, leader, slab, bounds, t_start, t_end, total_A, lost_A, total_B, total_C, STEADY_B: tl.constexpr,
    STEADY_C: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr, WARPS: tl.constexpr,
    S: tl.constexpr, OF_B: tl.constexpr, R: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """All states of a lane over a slab: carried gradients, sums over states, sums of dB and dC, totals.

    The sums over states are for d(delta), dx and, if OUTPUTS, y.
    """
    K: tl.constexpr = len(p)
    V: tl.constexpr = len(own_s)
    zero = tl.zeros_like(own_s[0])
    steps = broadcast(own_s, leader, 0, V, STEPS, 2)
    inputs = broadcast(own_x, leader, 0, V, STEPS, 2)
    grads = broadcast(own_g, leader, 0, V, STEPS, 2)
    sums_B, sums_A, sums_y = repeat(zero, STEPS), repeat(zero, STEPS), repeat(zero, STEPS if OUTPUTS else 0)
    then, new_A, new_B, new_C, kept, new_lost = (), (), (), (), (), ()
    for j in tl.static_range(K):
        row_n, at = j * LANES + lane, slab.to(tl.int64) * S
        here = in_buffer + row_n * (STEPS * 4)
        Bs = eight_steps(at_B + at, row_n, here, constant_B[j] if STEADY_B else None, STEADY_B)
        here += OF_B * STEPS * 4
        Cs = eight_steps(at_C + at, row_n, here, constant_C[j] if STEADY_C else None, STEADY_C)
        grad, sums_B, sums_A, sums_y, of_A, of_B, of_C, products_dB, products_dC = _back_row(
            starts[j], p[j], rates[j], steps, inputs, grads, Bs, Cs, sums_B, sums_A, sums_y, slab, bounds,
            t_start, t_end, STEADY_B, STEADY_C,
        )  # fmt: skip
        sum_A, lost = compensated(total_A[j], lost_A[j], of_A)
        then, new_A, new_lost = then + (grad,), new_A + (sum_A,), new_lost + (lost,)
        new_B, new_C = new_B + (total_B[j] + of_B,), new_C + (total_C[j] + of_C,)
        if S > 0:
            row_j = reduce_scatter(products_dB + products_dC, index, 1, 2, 2 * STEPS)
            row_j = reduce_scatter(row_j, index, 2 * LANES, CHANNELS // 2, STEPS)
            kept = kept + row_j
            if WARPS > 1:
                stage_sums(row_j, sums_buffer, index, slab % 2, j, K, R, WARPS)
    return then, sums_A, sums_B, sums_y, kept, new_A, new_lost, new_B, new_C


@triton.jit
def _write_kept(
    to, kept, index, t, t_start, t_end, bounds, K: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Write a lane's sums of dB and dC of a slab, for the rows that its warp keeps."""
    for j in tl.static_range((K + WARPS - 1) // WARPS):
        own_j = j * WARPS + index // WARP
        at = to + own_j * LANES * (2 * STEPS)
        write_sums(at, kept[j * R : (j + 1) * R], t, t_start, t_end, own_j < K, bounds, R)


@triton.jit
def _write_totals(
    to, total_D, total_bias, total_A, total_B, total_C, lane, n, real, STEADY_B: tl.constexpr,
    STEADY_C: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write the sums over time of dD, dbias and dA, and of dB and dC if B and C are constant."""
    N: tl.constexpr = len(total_A) * LANES
    only = real & (lane == 0)
    tl.store(to, total_D, only)
    tl.store(to + 1, total_bias, only)
    for j in tl.static_range(len(total_A)):
        row_n = j * LANES + lane
        own = real & (row_n < n)
        tl.store(to + 2 + row_n, total_A[j], own)
        if STEADY_B:
            tl.store(to + 2 + N + row_n, total_B[j], own)
        if STEADY_C:
            tl.store(to + 2 + (2 * N if STEADY_B else N) + row_n, total_C[j], own)


@triton.jit
def _write_gradients(
    sums_A, sums_B, own_s, own_u, own_g, own_slope, own_gate, own_y, skip, total_bias, lost_bias, outputs,
    strides,
    t1, t_start, t_end, real, index, WIDE: tl.constexpr, WHOLE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write du, ddelta and dz of a slab; return the sum of the bias's gradient so far."""
    to_u, to_s, to_z, to_y = outputs
    dul, dsl, dzl, yl = strides
    V: tl.constexpr = len(own_s)
    of_B = reduce_scatter(sums_B, index, 2, LANES, STEPS)
    of_A = reduce_scatter(sums_A, index, 2, LANES, STEPS)
    outs_u, outs_s = (), ()
    for i in tl.static_range(V):
        change = (of_A[i] * LN_2 + own_u[i] * of_B[i]) * own_slope[i]
        outs_u, outs_s = outs_u + (skip * own_g[i] + own_s[i] * of_B[i],), outs_s + (change,)
        total_bias, lost_bias = compensated(total_bias, lost_bias, change)
    write(to_u, t1, dul, outs_u, t_start, t_end, real, WIDE, WHOLE, V)
    write(to_s, t1, dsl, outs_s, t_start, t_end, real, WIDE, WHOLE, V)
    if to_z is not None:
        write(to_z, t1, dzl, own_gate, t_start, t_end, real, WIDE, WHOLE, V)
    if to_y is not None:
        write(to_y, t1, yl, own_y, t_start, t_end, real, WIDE, WHOLE, V)
    return total_bias, lost_bias


@triton.jit
def _read_slab(
    at_s, at_u, at_z, at_g, ungated, at_y, t1, sl, ul, zl, gl, l, WIDE: tl.constexpr, WHOLE: tl.constexpr,
    V: tl.constexpr,
):  # fmt: skip
    """V steps of each lane of delta, u, z, the gradient of y, and y before the gate if it was kept."""
    s, u, z = read_three(at_s, at_u, at_z, t1, sl, ul, zl, l, WIDE, WHOLE, V)
    y = () if ungated is None else read(ungated + at_y, t1, 1, l, WIDE * WIDE, WHOLE, V)
    return s, u, z, read(at_g, t1, gl, l, WIDE, WHOLE, V), y


@triton.jit
def _last_gradients(at, lane, n, real, K: tl.constexpr, LANES: tl.constexpr):
    """The gradients of a lane's states after the last step; zeros without a channel."""
    found = ()
    for j in tl.static_range(K):
        row_n = j * LANES + lane
        found = found + (tl.load(at + row_n, (row_n < n) & real, 0.0),)
    return found


@triton.jit
def _go_back(
    p, rates, constant_B, constant_C, u, delta, z, grad_y, ungated, saved, bounds, at_u, at_s, at_z, at_g,
    at_y, at_B, at_C, shared, outputs, strides, to_sums, sl, ul, zl, gl, own_bias, skip, lane, leader, index,
    first_sum, channel, real, place, origin, first, final, d, l, t_start, t_end, SOFTPLUS: tl.constexpr,
    STEADY_B: tl.constexpr, STEADY_C: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr,
    LANES: tl.constexpr, CHANNELS: tl.constexpr, WARPS: tl.constexpr, EVERY: tl.constexpr, S: tl.constexpr,
    OF_B: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Go back through slabs first..final of a sequence; return the gradient of the state before, and sums."""
    V: tl.constexpr = STEPS // LANES
    K: tl.constexpr = len(p)
    N: tl.constexpr = K * LANES
    THREADS: tl.constexpr = WARP * WARPS
    zero = tl.zeros_like(own_bias)
    total_D, total_bias, lost_D, lost_bias = zero, zero, zero, zero
    empty = repeat(zero, K)
    total_A, total_B, total_C, lost_A = empty, empty, empty, empty
    SUMS: tl.constexpr = 2 * THREADS * K * R if WARPS > 1 and S > 0 else 0
    buffer, coming, slab = shared_buffer(index, (2 * S + SUMS) * 4), (), tl.maximum(final - 1, 0)
    if S > 0:
        coming = load_rows(shared + slab.to(tl.int64) * S, index, 1, S, S, 1, THREADS)
        store_shared(coming, buffer + slab % 2 * (S * 4), index, S, THREADS)
        barrier(index)
    t1 = slab * STEPS + lane * V
    now_s, now_u, now_z, now_g, now_y = _read_slab(
        at_s, at_u, at_z, at_g, ungated, at_y, t1, sl, ul, zl, gl, l, WIDE, WHOLE, V
    )
    at = place + tl.maximum(final - 1 - origin, 0) // EVERY
    starts = _saved_rows(saved, at, lane, d, channel, K, LANES)
    for back in range(0, final - first):
        slab = final - 1 - back
        before = tl.maximum(slab - 1, first)
        if EVERY > 1:
            since = (slab - origin) % EVERY
            for i in range(since):
                starts = advance_states(
                    starts, rates, constant_B, at_s, at_u, at_B, delta, u, own_bias, lane, leader,
                    slab - since + i, sl, ul, l, t_start, t_end, SOFTPLUS, STEADY_B, WIDE, WHOLE, V, LANES,
                    S,
                )  # fmt: skip
        s, v, g = as_floats(now_s, delta, WIDE), as_floats(now_u, u, WIDE), as_floats(now_g, grad_y, WIDE)
        gate = () if z is None else as_floats(now_z, z, WIDE)
        ys = () if ungated is None else as_floats(now_y, ungated, WIDE * WIDE)
        if S > 0:
            coming = load_rows(shared + before.to(tl.int64) * S, index, 1, S, S, 1, THREADS)
        t1 = before * STEPS + lane * V
        now_s, now_u, now_z, now_g, now_y = _read_slab(
            at_s, at_u, at_z, at_g, ungated, at_y, t1, sl, ul, zl, gl, l, WIDE, WHOLE, V
        )
        t1 = slab * STEPS + lane * V
        own_s, own_x, own_g, own_u, own_slope, own_gate = _own_values(
            s, v, g, gate, ys, own_bias, t1, t_start, t_end, real, SOFTPLUS, z is not None, WHOLE
        )  # fmt: skip
        for i in tl.static_range(V):
            total_D, lost_D = compensated(total_D, lost_D, own_g[i] * own_u[i])
        in_buffer = buffer + slab % 2 * (S * 4)
        p, sums_A, sums_B, sums_y, kept, total_A, lost_A, total_B, total_C = _back_slab(
            p, starts, rates, constant_B, constant_C, own_s, own_x, own_g, at_B, at_C, in_buffer,
            buffer + 2 * S * 4, index, lane, leader, slab, bounds, t_start, t_end, total_A, lost_A, total_B,
            total_C, STEADY_B, STEADY_C, LANES, CHANNELS, WARPS, S, OF_B, R, outputs[3] is not None,
        )  # fmt: skip
        own_y = ()
        if outputs[3] is not None:
            own_gate, own_y = _gate_again(sums_y, index, skip, own_u, g, gate, LANES)
        if S > 0:
            store_shared(coming, buffer + (slab + 1) % 2 * (S * 4), index, S, THREADS)
            barrier(index)
            if WARPS > 1:
                kept = reduce_warps(kept, buffer + 2 * S * 4, index, slab % 2, K, R, WARPS)
            t = slab * STEPS + first_sum % STEPS
            to = to_sums + slab.to(tl.int64) * N * (2 * STEPS)
            _write_kept(to, kept, index, t, t_start, t_end, bounds, K, R, LANES, WARPS)
        starts = _saved_rows(saved, place + (before - origin) // EVERY, lane, d, channel, K, LANES)
        total_bias, lost_bias = _write_gradients(
            sums_A, sums_B, own_s, own_u, own_g, own_slope, own_gate, own_y, skip, total_bias, lost_bias,
            outputs, strides, t1, t_start, t_end, real, index, WIDE, WHOLE, LANES,
        )  # fmt: skip
    return p, total_D, total_bias, total_A, total_B, total_C


@kernel
def backward(
    u, delta, A, B, C, D, z, bias, bounds, grad_y, grad_last, saved, ungated, carried, spans, du, ddelta, dz,
    gated, sums, totals, grad_start, ub, ud, ul, sb, sd, sl, zb, zd, zl, gb, gd, gl, dub, dud, dul, dsb, dsd,
    dsl, dzb, dzd, dzl, yb, yd, yl, d, l, n, per_group, tiles, slabs, chunk, groups, count, parts, links,
    processors, SOFTPLUS: tl.constexpr, LOG_A: tl.constexpr, STEADY_B: tl.constexpr, STEADY_C: tl.constexpr,
    WIDE: tl.constexpr, WHOLE: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr,
    WARPS: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """A program: WARPS times CHANNELS channels of a sequence and a chunk of time.

    A slab starts from the last state saved before it, advanced to the slab if EVERY > 1. With `gated`
    it computes y again, which it writes there; without, dz is computed from `ungated`. Writes du, ddelta
    and dz. `totals` (sequence, chunk, d, 2 + N...): the sums over time of dD, dbias, dA (and dB, dC if
    constant) of this sequence and chunk. `sums` (tile of the group, row, group, slab, N, 16): the sums of dB
    and dC over this tile's channels.
    """
    K: tl.constexpr = N // LANES
    OF_B: tl.constexpr = 0 if STEADY_B else N
    S: tl.constexpr = (OF_B + (0 if STEADY_C else N)) * STEPS  # floats of B and C per slab
    THREADS: tl.constexpr = WARP * WARPS
    WIDTH: tl.constexpr = 2 + N + (N if STEADY_B else 0) + (N if STEADY_C else 0)
    R: tl.constexpr = 2 * STEPS // CHANNELS  # sums of dB and dC that a lane keeps
    chosen = program_index(count, processors)
    if chosen >= count:
        return
    tile, part, sequence, group = split_program(chosen, groups, tiles, parts)
    index, zero = tl.arange(0, THREADS), tl.zeros((THREADS,), tl.float32)
    lane, column, leader = lane_of(index, LANES)
    row, t_start, t_end, place = sequence_of(bounds, sequence, l, slabs, EVERY)
    rows = 1 if bounds is not None else count // (groups * tiles * parts)
    origin, limit = t_start // STEPS, tl.cdiv(t_end, STEPS)
    first, final = origin + part * chunk, tl.minimum(origin + (part + 1) * chunk, limit)
    weights = ((row * groups + group) * slabs) * S
    at_B, at_C, shared = B + weights, C + weights, (C if STEADY_B else B) + weights
    mine = (((tile % tiles).to(tl.int64) * rows + row) * groups + group) * slabs * N
    first_sum = (index % 2 * (CHANNELS // 2) + index % WARP // (2 * LANES)) * R  # the first that a lane keeps
    to_sums = sums + mine * (2 * STEPS) + (lane * (2 * STEPS) + first_sum)
    real, channel = channel_of(tile, tiles, group, per_group, column, CHANNELS * WARPS)
    at_u = u + row * ub + channel * ud + first_step(ul, l)
    at_s = delta + row * sb + channel * sd + first_step(sl, l)
    at_g = grad_y + row * gb + channel * gd + first_step(gl, l)
    to_u = du + row * dub + channel * dud + first_step(dul, l)
    to_s = ddelta + row * dsb + channel * dsd + first_step(dsl, l)
    at_y, at_z, to_z, to_y = (row * d + channel) * l, None, None, None
    if z is not None:
        at_z = z + row * zb + channel * zd + first_step(zl, l)
        to_z = dz + row * dzb + channel * dzd + first_step(dzl, l)
    if gated is not None:
        to_y = gated + row * yb + channel * yd + first_step(yl, l)
    own_bias, skip = channel_numbers(bias, channel, zero), channel_numbers(D, channel, zero)
    rates, constant_B, constant_C = own_rates(A, channel, lane, n, LOG_A, K, LANES), (), ()
    p = repeat(zero, K)
    if grad_last is not None:
        p = _last_gradients(grad_last + (sequence * d + channel) * n, lane, n, real, K, LANES)
    if STEADY_B:
        constant_B = own_rows(B + channel * n, lane, n, 1.0, K, LANES)
    if STEADY_C:
        constant_C = own_rows(C + channel * n, lane, n, 1.0, K, LANES)
    if carried is not None:
        for back in range(1, parts - part):  # the last chunk first; the first passes nothing on
            at = sequence * links + links - back
            p = state_after_chunk(p, rates, carried, spans, at, channel, lane, d, real, LANES)
    p, total_D, total_bias, total_A, total_B, total_C = _go_back(
        p, rates, constant_B, constant_C, u, delta, z, grad_y, ungated, saved, bounds, at_u, at_s, at_z,
        at_g, at_y, at_B, at_C, shared, (to_u, to_s, to_z, to_y), (dul, dsl, dzl, yl), to_sums, sl, ul, zl,
        gl, own_bias, skip, lane, leader, index, first_sum, channel, real, place, origin, first, final, d, l,
        t_start, t_end, SOFTPLUS, STEADY_B, STEADY_C, WIDE, WHOLE, LANES, CHANNELS, WARPS, EVERY, S, OF_B, R,
    )  # fmt: skip
    _write_totals(
        totals + ((sequence * parts + part) * d + channel) * WIDTH, all_reduce(total_D, index, 2, LANES),
        all_reduce(total_bias, index, 2, LANES), total_A, total_B, total_C, lane, n, real, STEADY_B,
        STEADY_C, LANES,
    )  # fmt: skip
    if grad_start is not None:
        if part == 0:
            for j in tl.static_range(K):
                row_n = j * LANES + lane
                tl.store(grad_start + (sequence * d + channel) * n + row_n, p[j], real & (row_n < n))
