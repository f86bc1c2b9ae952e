"""The kernels of the `triton` backend.

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

import inspect

import triton
import triton.language as tl

from projecta.scan._lanes import (
    INTERPRETED,
    LN_2,
    LOG2_E,
    WARP,
    also,
    barrier,
    collected,
    compensated,
    constant,
    exp2,
    fetched,
    lay,
    numbers,
    one,
    pin,
    prefetch,
    put,
    put_one,
    repeat,
    scanned,
    settle,
    settled,
    shared_room,
    shifted,
    shuffled,
    sigmoid,
    softplus,
    spread,
    summed,
    total,
    word,
    words,
)  # fmt: skip

# Sizes and strides: all compile to the same code whatever they are (see `_start` in triton.py).
SIZES = [
    "d", "l", "n", "per_group", "tiles", "slabs", "chunk", "groups", "over", "count", "processors", "parts",
    "blocks",
    *(f"{t}{axis}" for t in ("u", "s", "z", "y", "g", "du", "ds", "dz", "B", "C", "x") for axis in "bdl"),
    "Bg", "Bn", "Cg", "Cn", "per_B", "per_C",
]  # fmt: skip
SLAB = 8  # steps that a kernel of states takes at a time, and between saved states
STEPS = constant(SLAB)


def _kernel(function):
    return triton.jit(
        function, do_not_specialize=[name for name in SIZES if name in inspect.signature(function).parameters]
    )


@triton.jit
def _place(count, processors):
    """Which of `count` programs this is: those of one processor are neighbours, and share B and C."""
    i = tl.program_id(0)
    return i % processors * tl.cdiv(count, processors) + i // processors


@triton.jit
def _lane(index, LANES: tl.constexpr):
    """Of a thread: which states and which channel it has, and the first thread that has that channel.

    Threads 2 i and 2 i + 1 have the same states, so that they read B and C from shared memory in one go;
    the lanes of a channel are 2 threads apart, so that they read its steps side by side.
    """
    lane = index // 2 % LANES
    return lane, index % 2 + index // (2 * LANES) * 2, index - 2 * lane


@triton.jit
def _load(
    at, t1, stride, l, WIDE: tl.constexpr, WHOLE: tl.constexpr, V: tl.constexpr, FREE: tl.constexpr = True
):  # fmt: skip
    """V steps of each lane from its t1 on: words, or wherever they lie, one by one."""
    BITS: tl.constexpr = at.dtype.element_ty.primitive_bitwidth
    P: tl.constexpr = V if V * BITS <= 128 else 128 // BITS
    found = ()
    if WIDE:
        for i in tl.static_range(V // P):
            t = t1 + i * P
            if not WHOLE:
                t = tl.minimum(t, l - P)
            found = found + words(at + t, P * BITS // 32, FREE)
    else:
        for i in tl.static_range(V):
            found = found + (one(at + (t1 + i).to(tl.int64) * stride, t1 + i < l),)
    return found


@triton.jit
def _floats(loaded, like, WIDE: tl.constexpr):
    """What `_load` found, as tiles in float32; `like` is a pointer to its type."""
    tiles = ()
    for i in tl.static_range(len(loaded)):
        tiles = tiles + (numbers(loaded[i], like.dtype.element_ty) if WIDE else (loaded[i],))
    return tiles


@triton.jit
def _store(
    at, t1, stride, tiles, t_start, t_end, real, WIDE: tl.constexpr, WHOLE: tl.constexpr, V: tl.constexpr
):  # fmt: skip
    """V steps of each real lane from its t1 on, those within t_start..t_end."""
    element: tl.constexpr = at.dtype.element_ty
    BITS: tl.constexpr = element.primitive_bitwidth
    P: tl.constexpr = V if V * BITS <= 128 else 128 // BITS
    if WIDE:
        for i in tl.static_range(V // P):
            row, inside = (), real
            for k in tl.static_range(P * BITS // 32):
                row = row + (word(tiles, i * P * BITS // 32 + k, element),)
            if not WHOLE:
                inside = inside & (t1 + i * P < t_end)
            put(at + (t1 + i * P), row, inside, P * BITS // 32)
    else:
        for i in tl.static_range(V):
            inside = real & (t1 + i >= t_start) & (t1 + i < t_end)
            put_one(at + (t1 + i).to(tl.int64) * stride, tiles[i], inside)


@triton.jit
def _eight(at, row, shared, constant, STEADY: tl.constexpr):
    """A slab's 8 steps of a row of B or C: from shared memory; interpreted, from where they came from."""
    if STEADY:
        return repeat(constant, STEPS)
    else:
        if INTERPRETED:
            where = at + row * STEPS
            found = words(where, 4, True) + words(where + 4, 4, True)
        else:
            found = settled(shared) + settled(shared + 16)
        tiles = ()
        for i in tl.static_range(STEPS):
            tiles = tiles + numbers(found[i], tl.float32)
        return tiles


@triton.jit
def _own(
    loaded_s, loaded_u, delta, u, bias, t1, t_start, t_end, SOFTPLUS: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Of the steps that a lane owns: delta, then delta u."""
    s, v = _floats(loaded_s, delta, WIDE), _floats(loaded_u, u, WIDE)
    steps, inputs = (), ()
    for i in tl.static_range(len(s)):
        step, value = s[i] + bias, v[i]
        if SOFTPLUS:
            step = softplus(step, u.dtype.element_ty == tl.float32)
        if not WHOLE:
            inside = (t1 + i >= t_start) & (t1 + i < t_end)
            step, value = tl.where(inside, step, 0.0), tl.where(inside, value, 0.0)
        steps, inputs = steps + (step,), inputs + (step * value,)
    return steps + inputs


@triton.jit
def _outputs(sums, skip, loaded_u, loaded_z, u, z, WIDE: tl.constexpr):
    """Of the steps that a lane owns: y before the gate, then after it."""
    v = _floats(loaded_u, u, WIDE)
    raws, gated = (), ()
    if len(loaded_z) > 0:
        gate = _floats(loaded_z, z, WIDE)
    for i in tl.static_range(len(v)):
        value = sums[i] + skip * v[i]
        raws = raws + (value,)
        if len(loaded_z) > 0:
            value = value * gate[i] * sigmoid(gate[i])
        gated = gated + (value,)
    return raws + gated


@_kernel
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
    chosen = _place(count, processors)
    if chosen >= count:
        return
    tile, part = chosen % (groups * tiles), chosen // (groups * tiles) % parts
    sequence = (chosen // (groups * tiles) // parts).to(tl.int64)
    group = tile // tiles
    index, zero = tl.arange(0, THREADS), tl.zeros((THREADS,), tl.float32)
    lane, column, leader = _lane(index, LANES)
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
        coming = fetched(shared + slab.to(tl.int64) * STRIDE, index, slabs - slab, S, STRIDE, UNROLL, THREADS)
        settle(coming, room, index, UNROLL * S, THREADS)
        barrier(index)
    t1 = slab * STEPS + lane * V
    loaded_s, loaded_u = _load(at_s, t1, sl, l, WIDE, WHOLE, V), _load(at_u, t1, ul, l, WIDE, WHOLE, V)
    loaded_z = () if z is None else _load(at_z, t1, zl, l, WIDE, WHOLE, V)
    t1 = first * STEPS + lane * V
    own = _own(loaded_s, loaded_u, delta, u, own_bias, t1, t_start, t_end, SOFTPLUS, WIDE, WHOLE)
    for block in range(first, final, UNROLL):
        t1 = (block + UNROLL) * STEPS + lane * V
        if WHOLE:
            t1 = tl.minimum(t1, l - V)
        next_s, next_u = _load(at_s, t1, sl, l, WIDE, WHOLE, V), _load(at_u, t1, ul, l, WIDE, WHOLE, V)
        next_z = () if z is None else _load(at_z, t1, zl, l, WIDE, WHOLE, V)
        half, turn = room + turn * (UNROLL * S * 4), 1 - turn
        if S > 0:
            slab = tl.minimum(block + UNROLL, slabs - 1)
            coming = fetched(
                shared + slab.to(tl.int64) * STRIDE, index, slabs - slab, S, STRIDE, UNROLL, THREADS
            )
        for i in tl.static_range(V):
            span += own[i]
        sums, next_own = (), ()
        for k in tl.static_range(UNROLL):
            slab = block + k
            steps = spread(own, leader, k * STEPS, V, STEPS, 2)
            inputs = spread(own[V:], leader, k * STEPS, V, STEPS, 2)
            outputs, then = repeat(zero, STEPS), ()
            for j in tl.static_range(K):
                at, row_n = tl.minimum(slab, slabs - 1).to(tl.int64) * STRIDE, j * LANES + lane
                in_room = half + (k * S + row_n * STEPS) * 4
                Bs = _eight(at_B + at, row_n, in_room, constant_B[j] if STEADY_B else None, STEADY_B)
                in_room += OF_B * STEPS * 4
                steady_C = constant_C[j] if STEADY_C and not ENDS else zero
                Cs = _eight(at_C + at, row_n, in_room, steady_C, STEADY_C or ENDS)
                if saved is not None:
                    to = ((place + (slab - origin) // EVERY) * N + j * LANES + lane) * d + channel
                    here = also(real, (slab < final) & ((slab - origin) % EVERY == 0))
                    put(saved + to, (h[j].to(tl.int32, bitcast=True),), here, 1)
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
                    settle(coming, room + turn * (UNROLL * S * 4), index, UNROLL * S, THREADS)
                    t1 = (block + UNROLL) * STEPS + lane * V
                    next_own = _own(
                        next_s, next_u, delta, u, own_bias, t1, t_start, t_end, SOFTPLUS, WIDE, WHOLE
                    )
            h, sums = then, sums + outputs
        if not ENDS:
            t1 = block * STEPS + lane * V
            scattered = summed(sums, index, 2, LANES, UNROLL * STEPS)
            values = _outputs(scattered, skip, loaded_u, loaded_z, u, z, WIDE)
            if ungated is not None:
                at_ungated = ungated + (row * d + channel) * l
                _store(at_ungated, t1, 1, values, t_start, t_end, real, WIDE, WHOLE, V)
            _store(y + at_y, t1, yl, values[V:], t_start, t_end, real, WIDE, WHOLE, V)
        own, loaded_u, loaded_z = next_own, next_u, next_z
        if S > 0:
            barrier(index)
    if ENDS:
        at = sequence * parts + part
        tl.store(spans + at * d + channel, total(span, index, 2, LANES), real)
        for j in tl.static_range(K):
            tl.store(carried + (at * N + j * LANES + lane) * d + channel, h[j], real)
    else:
        for j in tl.static_range(K):
            row_n = j * LANES + lane
            own = also(real & (row_n < n), part == parts - 1)
            tl.store(last + (sequence * d + channel) * n + row_n, h[j], own)


@triton.jit
def _sixteen(
    at, t1, lane, l, NATIVE: tl.constexpr, WHOLE: tl.constexpr, FREE: tl.constexpr
):  # fmt: skip
    """16 steps of B or C for each lane: as they lie in memory, or in quarters, each one stretch of memory."""
    if NATIVE:
        return _load(at, t1, 1, l, True, WHOLE, 2 * STEPS, FREE)
    else:
        found = ()
        for i in tl.static_range(4):
            found = found + words(at + (lane * 4 + i * 4 * WARP), 4, FREE)
        return found


@_kernel
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
    chosen = _place(count, processors)
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
            next_B = _sixteen(row_B, t1, lane, l, NATIVE, WHOLE, not PIN)
        if not STEADY_C:
            next_C = _sixteen(row_C, t1, lane, l, NATIVE, WHOLE, not PIN)
        loaded_s, loaded_u = _load(at_s, t1, sl, l, WIDE, WHOLE, T), _load(at_u, t1, ul, l, WIDE, WHOLE, T)
        if WIDE:
            later = tl.minimum(t1 + SIZE, l - 1)
            prefetch(at_s + later)
            prefetch(at_u + later)
            if z is not None:
                prefetch(at_z + tl.minimum(t1, l - 1))
        own = _own(loaded_s, loaded_u, delta, u, own_bias, t1, 0, l, SOFTPLUS, WIDE, WHOLE)
        span, outputs = zero, repeat(zero, T)
        for i in tl.static_range(T):
            span += own[i]
        for state in tl.range(0, n, loop_unroll_factor=2):
            now_B, now_C = next_B, next_C
            row_B += tl.where(state + 1 < n, turn_B, 0)
            row_C += tl.where(state + 1 < n, turn_C, 0)
            if not STEADY_B:
                next_B = _sixteen(row_B, t1, lane, l, NATIVE, WHOLE, not PIN)
            if not STEADY_C:
                next_C = _sixteen(row_C, t1, lane, l, NATIVE, WHOLE, not PIN)
            rate = shuffled(rates, state)
            if PIN:
                rate += pin(state, lane)
            carry = shuffled(carries, state)
            Bs = repeat(shuffled(constant_B, state), T) if STEADY_B else _floats(now_B, B, True)
            Cs = repeat(shuffled(constant_C, state), T) if STEADY_C else _floats(now_C, C, True)
            decays, gains = (), ()
            for i in tl.static_range(T):
                decays, gains = decays + (exp2(own[i] * rate),), gains + (own[T + i] * Bs[i],)
            h = gains[0]
            for i in tl.static_range(1, T):
                h = decays[i] * h + gains[i]
            decay = exp2(span * rate)
            ends = scanned(decay, tl.where(lane == 0, decay * carry + h, h), lane)
            h = shifted(ends, carry, lane)
            carries = tl.where(lane == state, shuffled(ends, WARP - 1), carries)
            new = ()
            for i in tl.static_range(T):
                h = decays[i] * h + gains[i]
                new = new + (outputs[i] + h * Cs[i],)
            outputs = new
        loaded_z = () if z is None else _load(at_z, t1, zl, l, WIDE, WHOLE, T)
        values = _outputs(outputs, skip, loaded_u, loaded_z, u, z, WIDE)
        _store(y + at_y, t1, yl, values[T:], 0, l, every, WIDE, WHOLE, T)
    tl.store(last + row * d * n + held, carries, lane < n)


@_kernel
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
    chosen = _place(count, processors)
    if chosen >= count:
        return
    tile, part = chosen % (groups * tiles), chosen // (groups * tiles) % parts
    row = (chosen // (groups * tiles) // parts).to(tl.int64)
    group = tile // tiles
    index, zero = tl.arange(0, THREADS), tl.zeros((THREADS,), tl.float32)
    lane, column, leader = _lane(index, LANES)
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
        coming = fetched(at_C + slab.to(tl.int64) * STRIDE, index, slabs - slab, S, STRIDE, UNROLL, THREADS)
        settle(coming, room, index, UNROLL * S, THREADS)
        barrier(index)
    t1 = slab * STEPS + lane * V
    now_s, now_g = _load(at_s, t1, sl, l, WIDE, WHOLE, V), _load(at_g, t1, gl, l, WIDE, WHOLE, V)
    now_z = () if z is None else _load(at_z, t1, zl, l, WIDE, WHOLE, V)
    for back in range(0, blocks):
        block = first + (blocks - 1 - back) * UNROLL
        s, g = _floats(now_s, delta, WIDE), _floats(now_g, grad_y, WIDE)
        if z is not None:
            gate = _floats(now_z, z, WIDE)
        t1 = tl.maximum(block - UNROLL, first) * STEPS + lane * V
        now_s, now_g = _load(at_s, t1, sl, l, WIDE, WHOLE, V), _load(at_g, t1, gl, l, WIDE, WHOLE, V)
        now_z = () if z is None else _load(at_z, t1, zl, l, WIDE, WHOLE, V)
        half, turn = room + turn * (UNROLL * S * 4), 1 - turn
        if S > 0:
            slab = tl.maximum(block - UNROLL, first)
            coming = fetched(
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
            steps = spread(own_s, leader, k * STEPS, V, STEPS, 2)
            grads = spread(own_g, leader, k * STEPS, V, STEPS, 2)
            then = ()
            for j in tl.static_range(K):
                at, row_n = tl.minimum(block + k, slabs - 1).to(tl.int64) * STRIDE, j * LANES + lane
                in_room = half + (k * S + row_n * STEPS) * 4
                Cs = _eight(at_C + at, row_n, in_room, constant_C[j] if STEADY_C else None, STEADY_C)
                grad = p[j]
                for i in tl.static_range(STEPS - 1, -1, -1):
                    grad = exp2(steps[i] * rates[j]) * (grads[i] * Cs[i] + grad)
                then = then + (grad,)
            p = then
        if S > 0:
            settle(coming, room + turn * (UNROLL * S * 4), index, UNROLL * S, THREADS)
            barrier(index)
    at = row * parts + part
    tl.store(spans + at * d + channel, total(span, index, 2, LANES), real)
    for j in tl.static_range(K):
        tl.store(carried + (at * N + j * LANES + lane) * d + channel, p[j], real)


@triton.jit
def _taken_on(
    states, rates, constant_B, at_s, at_u, at_B, delta, u, bias, lane, leader, slab, sl, ul, l, t_start,
    t_end, SOFTPLUS: tl.constexpr, STEADY_B: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr,
    V: tl.constexpr, LANES: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The states after a slab, from those before it, as in `forward_states` (to rounding: compiled apart)."""
    t1, then = slab * STEPS + lane * V, ()
    loaded_s, loaded_u = _load(at_s, t1, sl, l, WIDE, WHOLE, V), _load(at_u, t1, ul, l, WIDE, WHOLE, V)
    own = _own(loaded_s, loaded_u, delta, u, bias, t1, t_start, t_end, SOFTPLUS, WIDE, WHOLE)
    steps, inputs = spread(own, leader, 0, V, STEPS, 2), spread(own[V:], leader, 0, V, STEPS, 2)
    for j in tl.static_range(len(states)):
        Bs = repeat(constant_B[j], STEPS) if STEADY_B else ()
        if not STEADY_B:
            where = at_B + (slab.to(tl.int64) * S + (j * LANES + lane) * STEPS)
            found = words(where, 4, True) + words(where + 4, 4, True)
            for i in tl.static_range(STEPS):
                Bs = Bs + numbers(found[i], tl.float32)
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
def _write_sums(to, tiles, t, t_start, t_end, inside, bounds, R: tl.constexpr):
    """A lane's R sums for dB or dC; two packed sequences may share a slab."""
    if bounds is None:
        row = ()
        for i in tl.static_range(R):
            row = row + (tiles[i].to(tl.int32, bitcast=True),)
        put(to, row, inside, R)
    else:
        for i in tl.static_range(R):
            put_one(to + i, tiles[i], inside & (t + i >= t_start) & (t + i < t_end))


@_kernel
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
    chosen = _place(count, processors)
    if chosen >= count:
        return
    tile, part = chosen % (groups * tiles), chosen // (groups * tiles) % parts
    sequence = (chosen // (groups * tiles) // parts).to(tl.int64)
    group = tile // tiles
    index, zero = tl.arange(0, THREADS), tl.zeros((THREADS,), tl.float32)
    lane, column, leader = _lane(index, LANES)
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
        coming = fetched(shared + slab.to(tl.int64) * S, index, 1, S, S, 1, THREADS)
        settle(coming, room + slab % 2 * (S * 4), index, S, THREADS)
        barrier(index)
    t1 = slab * STEPS + lane * V
    now_s, now_u = _load(at_s, t1, sl, l, WIDE, WHOLE, V), _load(at_u, t1, ul, l, WIDE, WHOLE, V)
    now_g, now_z, now_y = _load(at_g, t1, gl, l, WIDE, WHOLE, V), (), ()
    if z is not None:
        now_z = _load(at_z, t1, zl, l, WIDE, WHOLE, V)
        now_y = _load(ungated + at_y, t1, 1, l, WIDE, WHOLE, V)
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
                starts = _taken_on(
                    starts, rates, constant_B, at_s, at_u, at_B, delta, u, own_bias, lane, leader,
                    slab - since + i, sl, ul, l, t_start, t_end, SOFTPLUS, STEADY_B, WIDE, WHOLE, V, LANES, S,
                )  # fmt: skip
        s, v, g = _floats(now_s, delta, WIDE), _floats(now_u, u, WIDE), _floats(now_g, grad_y, WIDE)
        if z is not None:
            gate, ys = _floats(now_z, z, WIDE), _floats(now_y, ungated, WIDE)
        if S > 0:
            coming = fetched(shared + before.to(tl.int64) * S, index, 1, S, S, 1, THREADS)
        t1 = before * STEPS + lane * V
        now_s, now_u = _load(at_s, t1, sl, l, WIDE, WHOLE, V), _load(at_u, t1, ul, l, WIDE, WHOLE, V)
        now_g, now_z, now_y = _load(at_g, t1, gl, l, WIDE, WHOLE, V), (), ()
        if z is not None:
            now_z = _load(at_z, t1, zl, l, WIDE, WHOLE, V)
            now_y = _load(ungated + at_y, t1, 1, l, WIDE, WHOLE, V)
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
        steps = spread(own_s, leader, 0, V, STEPS, 2)
        inputs = spread(own_x, leader, 0, V, STEPS, 2)
        grads = spread(own_g, leader, 0, V, STEPS, 2)
        sums_B, sums_A = repeat(zero, STEPS), repeat(zero, STEPS)
        then, new_A, new_B, new_C, kept, new_lost = (), (), (), (), (), ()
        for j in tl.static_range(K):
            rate, state, row_n = rates[j], starts[j], j * LANES + lane
            at, in_room = slab.to(tl.int64) * S, room + slab % 2 * (S * 4) + row_n * (STEPS * 4)
            Bs = _eight(at_B + at, row_n, in_room, constant_B[j] if STEADY_B else None, STEADY_B)
            in_room += OF_B * STEPS * 4
            Cs = _eight(at_C + at, row_n, in_room, constant_C[j] if STEADY_C else None, STEADY_C)
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
                row_j = summed(over_B + over_C, index, 1, 2, 2 * STEPS)
                row_j = summed(row_j, index, 2 * LANES, CHANNELS // 2, STEPS)
                kept = kept + row_j
                if WARPS > 1:
                    lay(row_j, room + 2 * S * 4, index, slab % 2, j, K, R, WARPS)
        if S > 0:
            settle(coming, room + (slab + 1) % 2 * (S * 4), index, S, THREADS)
            barrier(index)
            if WARPS > 1:
                kept = collected(kept, room + 2 * S * 4, index, slab % 2, K, R, WARPS)
            for j in tl.static_range((K + WARPS - 1) // WARPS):
                own_j, t = j * WARPS + index // WARP, slab * STEPS + first_sum % STEPS
                to = to_sums + (slab.to(tl.int64) * N + own_j * LANES) * (2 * STEPS)
                _write_sums(to, kept[j * R : (j + 1) * R], t, t_start, t_end, own_j < K, bounds, R)
        p, total_A, total_B, total_C, lost_A, starts = then, new_A, new_B, new_C, new_lost, ()
        for j in tl.static_range(K):
            at_state = ((place + (before - origin) // EVERY) * N + j * LANES + lane) * d + channel
            starts = starts + (tl.load(saved + at_state),)
        of_B = summed(sums_B, index, 2, LANES, STEPS)
        of_A = summed(sums_A, index, 2, LANES, STEPS)
        outs_u, outs_s = (), ()
        for i in tl.static_range(V):
            change = (of_A[i] * LN_2 + own_u[i] * of_B[i]) * own_slope[i]
            outs_u, outs_s = outs_u + (skip * own_g[i] + own_s[i] * of_B[i],), outs_s + (change,)
            total_bias, lost_bias = compensated(total_bias, lost_bias, change)
        _store(to_u, t1, dul, outs_u, t_start, t_end, real, WIDE, WHOLE, V)
        _store(to_s, t1, dsl, outs_s, t_start, t_end, real, WIDE, WHOLE, V)
        if z is not None:
            _store(to_z, t1, dzl, own_gate, t_start, t_end, real, WIDE, WHOLE, V)
    to = totals + ((sequence * parts + part) * d + channel) * WIDTH
    only = real & (lane == 0)
    tl.store(to, total(total_D, index, 2, LANES), only)
    tl.store(to + 1, total(total_bias, index, 2, LANES), only)
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


@_kernel
def arrange(
    B, C, to_B, to_C, Bb, Bg, Bn, Bl, Cb, Cg, Cn, Cl, l, n, groups, slabs, blocks,
    N: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """B and C, (b, g, n, l) of any strides, in float32, zero beyond n and l.

    As (b, g, slab, N of each that varies, 8); or for LANES lanes along time as (b, g, n, block, 4, LANES, 4),
    so that each quarter of the lanes' 16 steps is one stretch of memory.
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
        x = tl.load(B + b * Bb + g * Bg + state.to(tl.int64) * Bn + t.to(tl.int64) * Bl, inside, 0.0)
        tl.store(to_B + to, x.to(tl.float32), here)
    if C is not None:
        x = tl.load(C + b * Cb + g * Cg + state.to(tl.int64) * Cn + t.to(tl.int64) * Cl, inside, 0.0)
        tl.store(to_C + to, x.to(tl.float32), here)


@_kernel
def finish(
    sums, dB, dC, Bb, Bg, Bn, Bl, Cb, Cg, Cn, Cl, l, n, groups, tiles, slabs, blocks,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum what the tiles of each group hold, in their order, into dB and dC (b, g, n, l)."""
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
        to = dB + b * Bb + g * Bg + state * Bn + t * Bl
        tl.store(to, sum.to(dB.dtype.element_ty), inside & (step < STEPS))
    if dC is not None:
        to = dC + b * Cb + g * Cg + state * Cn + t * Cl
        tl.store(to, sum.to(dC.dtype.element_ty), inside & (step >= STEPS))


@_kernel
def fold(
    totals, dA, dD, dbias, dB, dC, d, n, over,
    N: tl.constexpr, STEADY_B: tl.constexpr, STEADY_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum `totals` over sequences and chunks, in their order, into the gradients of one channel a program."""
    WIDTH: tl.constexpr = 2 + N + (N if STEADY_B else 0) + (N if STEADY_C else 0)
    channel, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    sum = tl.zeros((BLOCK,), tl.float32)
    for i in range(over):
        sum += tl.load(totals + (i * tl.cast(d, tl.int64) + channel) * WIDTH + at, at < WIDTH, 0.0)
    if dD is not None:
        tl.store(dD + channel + at, sum.to(dD.dtype.element_ty), at == 0)
    if dbias is not None:
        tl.store(dbias + channel + at - 1, sum.to(dbias.dtype.element_ty), at == 1)
    tl.store(dA + channel * n + at - 2, sum, (at >= 2) & (at < 2 + n))
    if STEADY_B:
        where = at - (2 + N)
        tl.store(dB + channel * n + where, sum.to(dB.dtype.element_ty), (where >= 0) & (where < n))
    if STEADY_C:
        where = at - (WIDTH - N)
        tl.store(dC + channel * n + where, sum.to(dC.dtype.element_ty), (where >= 0) & (where < n))


@_kernel
def step(
    state, x, dt, A, B, C, D, z, bias, y, xb, xd, sb, sd, zb, zd, Bb, Bg, Bn, Cb, Cg, Cn, d, n, per_B, per_C,
    tiles, SOFTPLUS: tl.constexpr, CHANNELS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Program (tile of channels, row): advance the state (b, d, n) in place by one step; B, C (b, g, n)."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    channel = (tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)
    state_n = tl.arange(0, N)[None, :].to(tl.int64)
    real = channel < d
    here = real[:, None] & (state_n < n)
    u = tl.load(x + row * xb + channel * xd, real, 0.0).to(tl.float32)
    delta = tl.load(dt + row * sb + channel * sd, real, 0.0).to(tl.float32)
    if bias is not None:
        delta += tl.load(bias + channel, real, 0.0)
    if SOFTPLUS:
        delta = softplus(delta, False)
    held = channel[:, None] * n + state_n
    at_B = row * Bb + (channel // per_B)[:, None] * Bg + state_n * Bn
    at_C = row * Cb + (channel // per_C)[:, None] * Cg + state_n * Cn
    weight = tl.load(B + at_B, here, 0.0).to(tl.float32)
    decay = exp2(delta[:, None] * (tl.load(A + held, here, 0.0) * LOG2_E))
    h = tl.load(state + row * d * n + held, here, 0.0)
    h = decay * h + (delta * u)[:, None] * weight
    tl.store(state + row * d * n + held, h, here)
    out = tl.sum(h * tl.load(C + at_C, here, 0.0).to(tl.float32), 1)
    if D is not None:
        out += tl.load(D + channel, real, 0.0) * u
    if z is not None:
        gate = tl.load(z + row * zb + channel * zd, real, 0.0).to(tl.float32)
        out *= gate * sigmoid(gate)
    tl.store(y + row * d + channel, out.to(y.dtype.element_ty), real)
