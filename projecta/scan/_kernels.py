"""The kernels of the `triton` backend.

A program is one warp. In the kernels of states (`forward_states`, `backward`, `carry`) its lanes are LANES
groups of states times CHANNELS channels, EACH of them again for each lane; time is a loop over slabs of 8.
Step sizes and inputs are worked out by the lane that owns the step, and spread; sums over states and channels
are scattered back. In `forward_times` lanes lie along time.

What keeps them fast is where loads stand: the arrays of a slab are loaded two slabs early, B and C one row of
states early, and `pin` holds them there. All arithmetic is float32; offsets are 64-bit.
"""

import inspect

import triton
import triton.language as tl

from projecta.scan._lanes import (
    LN_2,
    LOG2_E,
    WARP,
    apart,
    constant,
    exp2,
    pin,
    repeat,
    scanned,
    sigmoid,
    softplus,
    spread,
    summed,
    together,
    total,
)  # fmt: skip

# Sizes and strides that compile to the same code whatever they are; `ALIGN` says what matters of them.
SIZES = [
    "d", "l", "n", "per_group", "tiles", "slabs", "chunk", "groups", "over",
    *(f"{t}{axis}" for t in ("u", "s", "z", "y", "g", "du", "ds", "dz", "B", "C") for axis in "bd"),
    "Bg", "Bn", "Cg", "Cn", "kl", "kn", "kd",
]  # fmt: skip
SLAB = 8  # steps that a kernel of states takes at a time, and between saved states
STEPS = constant(SLAB)


def _kernel(function):
    return triton.jit(
        function, do_not_specialize=[name for name in SIZES if name in inspect.signature(function).parameters]
    )


@triton.jit
def _load(at, inside, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, inside, 0.0)


@triton.jit
def _slab(at, t1, stride, l, WHOLE: tl.constexpr, PACK: tl.constexpr, V: tl.constexpr):
    """V steps of each lane from its t1 on; packed, two 16-bit numbers in one integer.

    The compiler unpacks a pair where it is loaded, and so waits there; an integer it carries to its use.
    """
    if PACK:
        return tl.load((tl.reshape(at, (WARP,)) + t1 * stride).to(tl.pointer_type(tl.int32)))
    else:
        t2 = t1[:, None] + tl.arange(0, V)[None, :]
        return _load(at + t2 * stride, t2 < l, WHOLE)


@triton.jit
def _steps(loaded, like, PACK: tl.constexpr, V: tl.constexpr):
    """What `_slab` loaded as V tiles in float32; `like` is a pointer to its type."""
    if PACK:
        low = loaded.to(tl.int16).to(like.dtype.element_ty, bitcast=True)
        high = (loaded >> 16).to(tl.int16).to(like.dtype.element_ty, bitcast=True)
        return (low.to(tl.float32), high.to(tl.float32))
    else:
        return apart(loaded.to(tl.float32), V)


@triton.jit
def _three(
    at_s,
    sl,
    at_u,
    ul,
    at_z,
    zl,
    t1,
    l,
    c: tl.constexpr,
    WHOLE: tl.constexpr,
    PACK: tl.constexpr,
    V: tl.constexpr,
):
    """A slab of what the forward pass reads for a channel: delta, u; z if gated."""
    loads = (_slab(at_s, t1, sl, l, WHOLE, PACK, V), _slab(at_u, t1, ul, l, WHOLE, PACK, V))
    if len(at_z) > 0:
        loads = loads + (_slab(at_z[c], t1, zl, l, WHOLE, PACK, V),)
    return loads


@triton.jit
def _write(at, tiles, inside, WHOLE: tl.constexpr, V: tl.constexpr):
    if WHOLE:
        tl.store(at, together(tiles, V).to(at.dtype.element_ty))
    else:
        tl.store(at, together(tiles, V).to(at.dtype.element_ty), inside)


@triton.jit
def _weights(at, STEADY: tl.constexpr):
    """A slab of B or C: two loads of four, which a lane takes at once."""
    if STEADY:
        return ()
    else:
        return (tl.load(at), tl.load(at + 4))


@triton.jit
def _eight(loads, constant, j: tl.constexpr, STEADY: tl.constexpr):
    """The slab as 8 tiles."""
    if STEADY:
        return repeat(constant[j], STEPS)
    else:
        return apart(loads[0], 4) + apart(loads[1], 4)


@_kernel
def forward_states(
    u, delta, A, B, C, D, z, bias, start, bounds, y, last, saved, ungated,
    ub, ud, ul, sb, sd, sl, zb, zd, zl, yb, yd, yl, kl, kn, kd,
    d, l, n, per_group, tiles, slabs,
    SOFTPLUS: tl.constexpr, STEADY_B: tl.constexpr, STEADY_C: tl.constexpr, WHOLE: tl.constexpr,
    ALIGN: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr, EACH: tl.constexpr,
    PACK: tl.constexpr,
):  # fmt: skip
    """Program (tile, sequence): EACH times CHANNELS channels of a group. Lane i has states i, LANES + i..."""
    V: tl.constexpr = STEPS // LANES
    K: tl.constexpr = N // LANES
    EXACT: tl.constexpr = WHOLE and bounds is None
    tile, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group = tile // tiles
    ub, ud, sb, sd = ub // ALIGN * ALIGN, ud // ALIGN * ALIGN, sb // ALIGN * ALIGN, sd // ALIGN * ALIGN
    zb, zd, yb, yd = zb // ALIGN * ALIGN, zd // ALIGN * ALIGN, yb // ALIGN * ALIGN, yd // ALIGN * ALIGN
    index, zero = tl.arange(0, WARP), tl.zeros((WARP,), tl.float32)
    lane, column = index % LANES, index // LANES
    step2 = (lane * V)[:, None] + tl.arange(0, V)[None, :]
    row, t_start, t_end, place = sequence, 0, l, sequence * slabs
    if bounds is not None:
        row = sequence * 0
        t_start, t_end = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
        place = sequence + t_start // STEPS
    first, final = t_start // STEPS, tl.cdiv(t_end, STEPS)
    groups = tl.num_programs(0) // tiles
    weights = (
        ((row * groups + group) * slabs) * (N * STEPS) + (lane * STEPS)[:, None] + tl.arange(0, 4)[None, :]
    )
    h, rates, constant_B, constant_C = (), (), (), ()
    skips, biases, channels, at_u, at_s, at_z, at_y = (), (), (), (), (), (), ()
    for c in tl.static_range(EACH):
        within = tl.minimum((tile % tiles) * (CHANNELS * EACH) + c * CHANNELS + column, per_group - 1)
        channel = (group * per_group + within).to(tl.int64)
        channels = channels + (channel,)
        at_u, at_s = (
            at_u + (u + row * ub + channel[:, None] * ud,),
            at_s + (delta + row * sb + channel[:, None] * sd,),
        )
        at_y = at_y + (row * yb + channel[:, None] * yd,)
        if z is not None:
            at_z = at_z + (z + row * zb + channel[:, None] * zd,)
        biases = biases + (zero if bias is None else tl.load(bias + channel),)
        skips = skips + (zero if D is None else tl.load(D + channel),)
        for j in tl.static_range(K):
            row_n = j * LANES + lane
            here = row_n < n
            rates = rates + (tl.load(A + channel * n + row_n, here, 0.0) * LOG2_E,)
            if start is None:
                h = h + (zero,)
            else:
                h = h + (tl.load(start + (sequence * d + channel) * n + row_n, here, 0.0),)
            if STEADY_B:
                constant_B = constant_B + (tl.load(B + channel * n + row_n, here, 0.0),)
            if STEADY_C:
                constant_C = constant_C + (tl.load(C + channel * n + row_n, here, 0.0),)
    ahead = ()
    at = weights + tl.minimum(first, slabs - 1) * (N * STEPS)
    next_B, next_C = _weights(B + at, STEADY_B), _weights(C + at, STEADY_C)
    M: tl.constexpr = 2 if z is None else 3  # arrays
    later = ()
    for c in tl.static_range(EACH):
        t1 = tl.minimum(first, slabs - 1) * STEPS + lane * V  # within bounds for an empty sequence, too
        ahead = ahead + _three(at_s[c], sl, at_u[c], ul, at_z, zl, t1, l, c, WHOLE, PACK, V)
        t1 = tl.minimum(first + 1, slabs - 1) * STEPS + lane * V
        later = later + _three(at_s[c], sl, at_u[c], ul, at_z, zl, t1, l, c, WHOLE, PACK, V)
    for slab in range(first, final):
        t0 = slab * STEPS
        inside2 = (t0 + step2 >= t_start) & (t0 + step2 < t_end)
        now = ahead
        steps, inputs, own_y = (), (), ()
        for c in tl.static_range(EACH):
            s, v = _steps(now[M * c], delta, PACK, V), _steps(now[M * c + 1], u, PACK, V)
            own_s, own_x = (), ()
            for i in tl.static_range(V):
                raw, value = s[i] + biases[c], v[i]
                if SOFTPLUS:
                    raw = softplus(raw)
                if not EXACT:
                    t = t0 + lane * V + i
                    raw = tl.where((t >= t_start) & (t < t_end), raw, 0.0)
                    value = tl.where((t >= t_start) & (t < t_end), value, 0.0)
                own_s, own_x, own_y = own_s + (raw,), own_x + (raw * value,), own_y + (skips[c] * value,)
            steps = steps + spread(own_s, column * LANES, V, STEPS)
            inputs = inputs + spread(own_x, column * LANES, V, STEPS)
        outputs = repeat(zero, EACH * STEPS)
        then = ()
        for j in tl.static_range(K):
            now_B, now_C = next_B, next_C
            if j + 1 < K:
                at = weights + (slab * N + (j + 1) * LANES) * STEPS
            else:
                at = weights + tl.minimum(slab + 1, final - 1) * (N * STEPS)
            next_B, next_C = _weights(B + at, STEADY_B), _weights(C + at, STEADY_C)
            if j == 0:
                pinned = pin(slab)
            sums = ()
            for c in tl.static_range(EACH):
                state, rate = h[c * K + j], rates[c * K + j] + pinned
                Bs, Cs = (
                    _eight(now_B, constant_B, c * K + j, STEADY_B),
                    _eight(now_C, constant_C, c * K + j, STEADY_C),
                )
                if saved is not None:
                    to = (place + slab - first) * kl + (j * LANES + lane) * kn + channels[c] * kd
                    tl.store(saved + to, state)
                for i in tl.static_range(STEPS):
                    gain = inputs[c * STEPS + i] * Bs[i]
                    if bounds is not None:  # another sequence's B may be NaN
                        gain = tl.where((t0 + i >= t_start) & (t0 + i < t_end), gain, 0.0)
                    state = exp2(steps[c * STEPS + i] * rate) * state + gain
                    sums = sums + (outputs[c * STEPS + i] + state * Cs[i],)
                then = then + (state,)
            outputs = sums
        # Two slabs early: a wait for B or C would also wait for these.
        ahead, later, h = later, (), ()
        for c in tl.static_range(EACH):
            t1 = tl.minimum(slab + 2, final - 1) * STEPS + lane * V
            later = later + _three(at_s[c], sl, at_u[c], ul, at_z, zl, t1, l, c, WHOLE, PACK, V)
        pinned = pin(slab)
        for c in tl.static_range(EACH):
            for j in tl.static_range(K):
                h = h + (then[j * EACH + c],)
            partial = ()
            for i in tl.static_range(STEPS):
                partial = partial + (outputs[c * STEPS + i],)
            partial = summed(partial, index, 1, LANES, STEPS)
            raws, gated = (), ()
            if z is not None:
                gate = _steps(now[M * c + 2], z, PACK, V)
            for i in tl.static_range(V):
                value = partial[i] + own_y[c * V + i] + pinned
                raws = raws + (value,)
                if z is not None:
                    value = value * gate[i] * sigmoid(gate[i])
                gated = gated + (value,)
            to = at_y[c] + (t0 + step2) * yl
            if ungated is not None:
                _write(ungated + to, raws, inside2, EXACT, V)
            _write(y + to, gated, inside2, EXACT, V)
    for c in tl.static_range(EACH):
        for j in tl.static_range(K):
            row_n = j * LANES + lane
            tl.store(last + (sequence * d + channels[c]) * n + row_n, h[c * K + j], row_n < n)


@triton.jit
def _row(at, l, t0, stride, WHOLE: tl.constexpr, T: tl.constexpr, V: tl.constexpr):
    """T steps of each lane as they lie in memory, by loads of V."""
    loads = ()
    for i in tl.static_range(T // V):
        step2 = t0[:, None] + i * V + tl.arange(0, V)[None, :]
        loads = loads + (_load(at + step2 * stride, step2 < l, WHOLE),)
    return loads


@triton.jit
def _quarters(at, LANES: tl.constexpr, STEADY: tl.constexpr):
    """16 steps of B or C for each lane, by loads of four."""
    if STEADY:
        return ()
    else:
        return (tl.load(at), tl.load(at + 4 * LANES), tl.load(at + 8 * LANES), tl.load(at + 12 * LANES))


@triton.jit
def _tiles(loads, T: tl.constexpr, V: tl.constexpr):
    tiles = ()
    for i in tl.static_range(T // V):
        tiles = tiles + apart(loads[i].to(tl.float32), V)
    return tiles


@_kernel
def forward_times(
    u, delta, A, B, C, D, z, bias, start, bounds, y, last, saved, ungated,
    ub, ud, ul, sb, sd, sl, zb, zd, zl, yb, yd, yl, kl, kn, kd,
    d, l, n, per_group, tiles, slabs,
    SOFTPLUS: tl.constexpr, STEADY_B: tl.constexpr, STEADY_C: tl.constexpr, WHOLE: tl.constexpr,
    ALIGN: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr, EACH: tl.constexpr, V: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Program (tile, sequence), as in `forward_states`; lane i scans steps 16 i... of a block, for one state.

    A lane's own 16 steps give its end state from zero; the lanes' ends are scanned, which gives each its true
    start; and the steps are taken again, with the exponentials kept. Lane i also carries state i to the next
    block: n <= LANES.
    """
    T: tl.constexpr = 2 * STEPS
    EXACT: tl.constexpr = WHOLE and bounds is None
    tile, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group = tile // tiles
    ub, ud, sb, sd = ub // ALIGN * ALIGN, ud // ALIGN * ALIGN, sb // ALIGN * ALIGN, sd // ALIGN * ALIGN
    zb, zd, yb, yd = zb // ALIGN * ALIGN, zd // ALIGN * ALIGN, yb // ALIGN * ALIGN, yd // ALIGN * ALIGN
    l = l // ALIGN * ALIGN
    index, zero = tl.arange(0, WARP), tl.zeros((WARP,), tl.float32)
    lane, column = index % LANES, index // LANES
    leader = index - lane
    row, t_start, t_end, place = sequence, 0, l, sequence * slabs
    if bounds is not None:
        row = sequence * 0
        t_start, t_end = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
        place = sequence
    size: tl.constexpr = LANES * T
    blocks = tl.cdiv(l, size)
    weights = (row * (tl.num_programs(0) // tiles) + group) * n * blocks * size
    weights = weights + (lane * 4)[:, None] + tl.arange(0, 4)[None, :]
    rates, carries, constant_B, constant_C = (), (), (), ()
    skips, biases, channels, at_u, at_s, at_z, at_y = (), (), (), (), (), (), ()
    for c in tl.static_range(EACH):
        within = tl.minimum((tile % tiles) * (CHANNELS * EACH) + c * CHANNELS + column, per_group - 1)
        channel = (group * per_group + within).to(tl.int64)
        channels = channels + (channel,)
        at_u, at_s = (
            at_u + ((u + row * ub + channel * ud)[:, None],),
            at_s + ((delta + row * sb + channel * sd)[:, None],),
        )
        at_y = at_y + ((row * yb + channel * yd)[:, None],)
        if z is not None:
            at_z = at_z + ((z + row * zb + channel * zd)[:, None],)
        biases = biases + (zero if bias is None else tl.load(bias + channel),)
        skips = skips + (zero if D is None else tl.load(D + channel),)
        held = channel * n + lane
        rates = rates + (tl.load(A + held, lane < n, 0.0) * LOG2_E,)
        if start is None:
            carries = carries + (zero,)
        else:
            carries = carries + (tl.load(start + sequence * d * n + held, lane < n, 0.0),)
        if STEADY_B:
            constant_B = constant_B + (tl.load(B + held, lane < n, 0.0),)
        if STEADY_C:
            constant_C = constant_C + (tl.load(C + held, lane < n, 0.0),)
    for block in range(t_start // (LANES * T), tl.cdiv(t_end, LANES * T)):
        t0 = block * (LANES * T) + lane * T
        steps, inputs, outputs, spans = (), (), (), ()
        for c in tl.static_range(EACH):
            s = _tiles(_row(at_s[c], l, t0, sl, WHOLE, T, V), T, V)
            v = _tiles(_row(at_u[c], l, t0, ul, WHOLE, T, V), T, V)
            span = zero
            for i in tl.static_range(T):
                raw, value = s[i] + biases[c], v[i]
                if SOFTPLUS:
                    raw = softplus(raw)
                if not EXACT:
                    raw = tl.where((t0 + i >= t_start) & (t0 + i < t_end), raw, 0.0)
                    value = tl.where((t0 + i >= t_start) & (t0 + i < t_end), value, 0.0)
                span += raw
                steps, inputs, outputs = (
                    steps + (raw,),
                    inputs + (raw * value,),
                    outputs + (skips[c] * value,),
                )
            spans = spans + (span,)
        at = weights + block * size
        next_B, next_C = _quarters(B + at, LANES, STEADY_B), _quarters(C + at, LANES, STEADY_C)
        for state in tl.range(0, n, loop_unroll_factor=2):
            now_B, now_C = next_B, next_C
            at = weights + (tl.minimum(state + 1, n - 1) * blocks + block) * size
            next_B, next_C = _quarters(B + at, LANES, STEADY_B), _quarters(C + at, LANES, STEADY_C)
            pinned = pin(state)
            if not STEADY_B:
                Bs = _tiles(now_B, T, 4)
            if not STEADY_C:
                Cs = _tiles(now_C, T, 4)
            sums, then = (), ()
            for c in tl.static_range(EACH):
                rate = tl.gather(rates[c], leader + state, 0) + pinned
                carry = tl.gather(carries[c], leader + state, 0)
                if STEADY_B:
                    Bs = repeat(tl.gather(constant_B[c], leader + state, 0), T)
                if STEADY_C:
                    Cs = repeat(tl.gather(constant_C[c], leader + state, 0), T)
                decays, gains, h = (), (), zero
                for i in tl.static_range(T):
                    decays = decays + (exp2(steps[c * T + i] * rate),)
                    gain = inputs[c * T + i] * Bs[i]
                    if bounds is not None:  # another sequence's B may be NaN
                        gain = tl.where((t0 + i >= t_start) & (t0 + i < t_end), gain, 0.0)
                    gains = gains + (gain,)
                    h = decays[i] * h + gains[i]
                decay = exp2(spans[c] * rate)
                ends = scanned(decay, tl.where(lane == 0, decay * carry + h, h), index, lane, LANES)
                h = tl.where(lane == 0, carry, tl.gather(ends, tl.where(lane == 0, index, index - 1), 0))
                then = then + (tl.where(lane == state, tl.gather(ends, leader + (LANES - 1), 0), carries[c]),)
                for i in tl.static_range(T):
                    if saved is not None:
                        if i % STEPS == 0:
                            to = (place + (t0 + i) // STEPS) * kl + state * kn + channels[c] * kd
                            tl.store(saved + to, h, (t0 + i + STEPS > t_start) & (t0 + i < t_end))
                    h = decays[i] * h + gains[i]
                    sums = sums + (outputs[c * T + i] + h * Cs[i],)
            outputs, carries = sums, then
        for c in tl.static_range(EACH):
            gates = outputs
            if z is not None:
                gates = _tiles(_row(at_z[c], l, t0, zl, WHOLE, T, V), T, V)
            for part in tl.static_range(T // V):
                step2 = t0[:, None] + part * V + tl.arange(0, V)[None, :]
                inside2 = (step2 >= t_start) & (step2 < t_end)
                raws, gated = (), ()
                for i in tl.static_range(V):
                    value = outputs[c * T + part * V + i]
                    raws = raws + (value,)
                    if z is not None:
                        value = value * gates[part * V + i] * sigmoid(gates[part * V + i])
                    gated = gated + (value,)
                if ungated is not None:
                    _write(ungated + at_y[c] + step2 * yl, raws, inside2, EXACT, V)
                _write(y + at_y[c] + step2 * yl, gated, inside2, EXACT, V)
    for c in tl.static_range(EACH):
        tl.store(last + (sequence * d + channels[c]) * n + lane, carries[c], lane < n)


@_kernel
def carry(
    delta, A, C, z, bias, grad_y, carried, spans, sb, sd, sl, zb, zd, zl, gb, gd, gl,
    d, l, n, per_group, tiles, slabs, chunk,
    SOFTPLUS: tl.constexpr, STEADY_C: tl.constexpr, WHOLE: tl.constexpr,
    ALIGN: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """What each chunk of time adds to the gradient of the state at its start, and its sum of delta.

    Program (tile, sequence, chunk), laid out as in `backward`.
    """
    V: tl.constexpr = STEPS // LANES
    K: tl.constexpr = N // LANES
    tile, row, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    group, groups = tile // tiles, tl.num_programs(0) // tiles
    sb, sd, zb, zd = sb // ALIGN * ALIGN, sd // ALIGN * ALIGN, zb // ALIGN * ALIGN, zd // ALIGN * ALIGN
    gb, gd = gb // ALIGN * ALIGN, gd // ALIGN * ALIGN
    index, zero = tl.arange(0, WARP), tl.zeros((WARP,), tl.float32)
    lane, column = index % LANES, index // LANES
    step2 = (lane * V)[:, None] + tl.arange(0, V)[None, :]
    weights = (
        ((row * groups + group) * slabs) * (N * STEPS) + (lane * STEPS)[:, None] + tl.arange(0, 4)[None, :]
    )
    p, rates, constant_C, biases, channels, at_s, at_z, at_g, sums = (), (), (), (), (), (), (), (), ()
    for c in tl.static_range(EACH):
        within = tl.minimum((tile % tiles) * (CHANNELS * EACH) + c * CHANNELS + column, per_group - 1)
        channel = (group * per_group + within).to(tl.int64)
        channels = channels + (channel,)
        at_s, at_g = (
            at_s + (delta + row * sb + channel[:, None] * sd,),
            at_g + (grad_y + row * gb + channel[:, None] * gd,),
        )
        if z is not None:
            at_z = at_z + (z + row * zb + channel[:, None] * zd,)
        biases, sums = biases + (zero if bias is None else tl.load(bias + channel),), sums + (zero,)
        for j in tl.static_range(K):
            row_n = j * LANES + lane
            rates = rates + (tl.load(A + channel * n + row_n, row_n < n, 0.0) * LOG2_E,)
            p = p + (zero,)
            if STEADY_C:
                constant_C = constant_C + (tl.load(C + channel * n + row_n, row_n < n, 0.0),)
    first, final = part * chunk, tl.minimum((part + 1) * chunk, slabs)
    ahead, at = (), weights + tl.maximum(final - 1, 0) * (N * STEPS)
    next_C = _weights(C + at, STEADY_C)
    for c in tl.static_range(EACH):
        t2 = tl.maximum(final - 1, 0) * STEPS + step2
        ahead = ahead + (_load(at_s[c] + t2 * sl, t2 < l, WHOLE), _load(at_g[c] + t2 * gl, t2 < l, WHOLE))
        if z is not None:
            ahead = ahead + (_load(at_z[c] + t2 * zl, t2 < l, WHOLE),)
    for slab in range(final - 1, first - 1, -1):
        t0 = slab * STEPS
        now, ahead = ahead, ()
        for c in tl.static_range(EACH):
            t2 = tl.maximum(slab - 1, first) * STEPS + step2
            ahead = ahead + (_load(at_s[c] + t2 * sl, t2 < l, WHOLE), _load(at_g[c] + t2 * gl, t2 < l, WHOLE))
            if z is not None:
                ahead = ahead + (_load(at_z[c] + t2 * zl, t2 < l, WHOLE),)
        steps, grads, new = (), (), ()
        M: tl.constexpr = 2 if z is None else 3
        for c in tl.static_range(EACH):
            s, g = apart(now[M * c].to(tl.float32), V), apart(now[M * c + 1].to(tl.float32), V)
            if z is not None:
                gates = apart(now[M * c + 2].to(tl.float32), V)
            own_s, own_g, span = (), (), sums[c]
            for i in tl.static_range(V):
                raw, grad = s[i] + biases[c], g[i]
                if SOFTPLUS:
                    raw = softplus(raw)
                if not WHOLE:
                    raw = tl.where(t0 + lane * V + i < l, raw, 0.0)
                if z is not None:
                    grad = grad * gates[i] * sigmoid(gates[i])
                span += raw
                own_s, own_g = own_s + (raw,), own_g + (grad,)
            steps, grads = (
                steps + spread(own_s, column * LANES, V, STEPS),
                grads + spread(own_g, column * LANES, V, STEPS),
            )
            new = new + (span,)
        sums = new
        then = ()
        for j in tl.static_range(K):
            now_C = next_C
            if j + 1 < K:
                at = weights + (slab * N + (j + 1) * LANES) * STEPS
            else:
                at = weights + tl.maximum(slab - 1, first) * (N * STEPS)
            next_C = _weights(C + at, STEADY_C)
            if j == 0:
                pinned = pin(slab)
            for c in tl.static_range(EACH):
                grad, rate = p[c * K + j], rates[c * K + j] + pinned
                Cs = _eight(now_C, constant_C, c * K + j, STEADY_C)
                for i in tl.static_range(STEPS - 1, -1, -1):
                    grad = exp2(steps[c * STEPS + i] * rate) * (grads[c * STEPS + i] * Cs[i] + grad)
                then = then + (grad,)
        p = ()
        for c in tl.static_range(EACH):
            for j in tl.static_range(K):
                p = p + (then[j * EACH + c],)
    at = row * tl.num_programs(2) + part
    for c in tl.static_range(EACH):
        tl.store(spans + at * d + channels[c], total(sums[c], index, LANES))
        for j in tl.static_range(K):
            tl.store(carried + (at * N + j * LANES + lane) * d + channels[c], p[c * K + j])


@triton.jit
def _five(
    at_s, sl, at_u, ul, at_g, gl, at_z, zl, ungated, at_y, yl, t1, l, c: tl.constexpr,
    WHOLE: tl.constexpr, PACK: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """A slab of what backward reads for a channel: delta, u, grad_y; z and the ungated output if gated."""
    loads = (_slab(at_s, t1, sl, l, WHOLE, PACK, V), _slab(at_u, t1, ul, l, WHOLE, PACK, V))
    loads = loads + (_slab(at_g, t1, gl, l, WHOLE, PACK, V),)
    if ungated is not None:
        loads = loads + (
            _slab(at_z[c], t1, zl, l, WHOLE, PACK, V),
            _slab(ungated + at_y, t1, yl, l, WHOLE, PACK, V),
        )
    return loads


@_kernel
def backward(
    u, delta, A, B, C, D, z, bias, bounds, grad_y, grad_last, saved, ungated, carried, spans,
    du, ddelta, dz, sums, totals, grad_start,
    ub, ud, ul, sb, sd, sl, zb, zd, zl, gb, gd, gl, yb, yd, yl, dub, dud, dul, dsb, dsd, dsl, dzb, dzd, dzl,
    kl, kn, kd,
    d, l, n, per_group, tiles, slabs, chunk,
    SOFTPLUS: tl.constexpr, STEADY_B: tl.constexpr, STEADY_C: tl.constexpr, WHOLE: tl.constexpr,
    ALIGN: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr, EACH: tl.constexpr,
    PACK: tl.constexpr,
):  # fmt: skip
    """Program (tile, sequence, chunk), laid out as in `forward_states`.

    Writes du, ddelta, dz; for this sequence and chunk the sums over time of dD, dbias, dA (and dB, dC
    if steady): `totals` (sequence, chunk, d, 2 + N...); and for this tile the sums over its channels of dB
    and dC, `sums`: (tile of the group, row, group, slab, N, 16).
    """
    V: tl.constexpr = STEPS // LANES
    K: tl.constexpr = N // LANES
    WIDTH: tl.constexpr = 2 + N + (N if STEADY_B else 0) + (N if STEADY_C else 0)
    R: tl.constexpr = 2 * STEPS // CHANNELS  # sums of dB and dC that a lane keeps
    EXACT: tl.constexpr = WHOLE and bounds is None
    tile, sequence, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    parts = tl.num_programs(2)
    group, groups = tile // tiles, tl.num_programs(0) // tiles
    ub, ud, sb, sd = ub // ALIGN * ALIGN, ud // ALIGN * ALIGN, sb // ALIGN * ALIGN, sd // ALIGN * ALIGN
    zb, zd, yb, yd = zb // ALIGN * ALIGN, zd // ALIGN * ALIGN, yb // ALIGN * ALIGN, yd // ALIGN * ALIGN
    gb, gd, dub, dud = gb // ALIGN * ALIGN, gd // ALIGN * ALIGN, dub // ALIGN * ALIGN, dud // ALIGN * ALIGN
    dsb, dsd, dzb, dzd = (
        dsb // ALIGN * ALIGN,
        dsd // ALIGN * ALIGN,
        dzb // ALIGN * ALIGN,
        dzd // ALIGN * ALIGN,
    )
    index, zero = tl.arange(0, WARP), tl.zeros((WARP,), tl.float32)
    lane, column = index % LANES, index // LANES
    step2 = (lane * V)[:, None] + tl.arange(0, V)[None, :]
    row, t_start, t_end, place, sequences = sequence, 0, l, sequence * slabs, tl.num_programs(1)
    rows = sequences
    if bounds is not None:
        row, rows = sequence * 0, 1
        t_start, t_end = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
        place = sequence + t_start // STEPS
    origin, limit = t_start // STEPS, tl.cdiv(t_end, STEPS)
    first, final = origin + part * chunk, tl.minimum(origin + (part + 1) * chunk, limit)
    block = ((row * groups + group) * slabs) * N
    weights = block * STEPS + (lane * STEPS)[:, None] + tl.arange(0, 4)[None, :]
    mine = (((tile % tiles).to(tl.int64) * rows + row) * groups + group) * slabs * N
    to_sums = (
        sums + mine * (2 * STEPS) + (lane * (2 * STEPS) + column * R)[:, None] + tl.arange(0, R)[None, :]
    )
    p, rates, constant_B, constant_C, total_A, total_B, total_C = (), (), (), (), (), (), ()
    skips, biases, channels, reals, totals_D, totals_bias = (), (), (), (), (), ()
    at_u, at_s, at_z, at_g, at_y, to_u, to_s, to_z = (), (), (), (), (), (), (), ()
    for c in tl.static_range(EACH):
        within = (tile % tiles) * (CHANNELS * EACH) + c * CHANNELS + column
        real = within < per_group
        channel = (group * per_group + tl.minimum(within, per_group - 1)).to(tl.int64)
        channels, reals = channels + (channel,), reals + (real,)
        at_u, at_s = (
            at_u + (u + row * ub + channel[:, None] * ud,),
            at_s + (delta + row * sb + channel[:, None] * sd,),
        )
        at_g, at_y = (
            at_g + (grad_y + row * gb + channel[:, None] * gd,),
            at_y + (row * yb + channel[:, None] * yd,),
        )
        to_u, to_s = (
            to_u + (du + row * dub + channel[:, None] * dud,),
            to_s + (ddelta + row * dsb + channel[:, None] * dsd,),
        )
        if z is not None:
            at_z, to_z = (
                at_z + (z + row * zb + channel[:, None] * zd,),
                to_z + (dz + row * dzb + channel[:, None] * dzd,),
            )
        biases = biases + (zero if bias is None else tl.load(bias + channel),)
        skips = skips + (zero if D is None else tl.load(D + channel),)
        totals_D, totals_bias = totals_D + (zero,), totals_bias + (zero,)
        for j in tl.static_range(K):
            row_n = j * LANES + lane
            here = row_n < n
            rates = rates + (tl.load(A + channel * n + row_n, here, 0.0) * LOG2_E,)
            p = p + (tl.load(grad_last + (sequence * d + channel) * n + row_n, here & real, 0.0),)
            total_A, total_B, total_C = total_A + (zero,), total_B + (zero,), total_C + (zero,)
            if STEADY_B:
                constant_B = constant_B + (tl.load(B + channel * n + row_n, here, 0.0),)
            if STEADY_C:
                constant_C = constant_C + (tl.load(C + channel * n + row_n, here, 0.0),)
    if carried is not None:
        for back in range(1, parts - part):
            at = sequence * parts + parts - back
            then = ()
            for c in tl.static_range(EACH):
                span = tl.load(spans + at * d + channels[c])
                for j in tl.static_range(K):
                    gained = tl.load(carried + (at * N + j * LANES + lane) * d + channels[c], reals[c], 0.0)
                    then = then + (exp2(rates[c * K + j] * span) * p[c * K + j] + gained,)
            p = then
    ahead, at = (), weights + tl.maximum(final - 1, 0) * (N * STEPS)
    next_B, next_C = _weights(B + at, STEADY_B), _weights(C + at, STEADY_C)
    later, starts = (), ()
    M: tl.constexpr = 3 if z is None else 5  # arrays
    for c in tl.static_range(EACH):
        ahead = ahead + _five(
            at_s[c],
            sl,
            at_u[c],
            ul,
            at_g[c],
            gl,
            at_z,
            zl,
            ungated,
            at_y[c],
            yl,
            tl.maximum(final - 1, 0) * STEPS + lane * V,
            l,
            c,
            WHOLE,
            PACK,
            V,
        )
        later = later + _five(
            at_s[c],
            sl,
            at_u[c],
            ul,
            at_g[c],
            gl,
            at_z,
            zl,
            ungated,
            at_y[c],
            yl,
            tl.maximum(final - 2, 0) * STEPS + lane * V,
            l,
            c,
            WHOLE,
            PACK,
            V,
        )
        for j in tl.static_range(K):
            at_state = (
                (place + tl.maximum(final - 1 - origin, 0)) * kl + (j * LANES + lane) * kn + channels[c] * kd
            )
            starts = starts + (tl.load(saved + at_state, j * LANES + lane < n, 0.0),)  # no state: not saved
    for slab in range(final - 1, first - 1, -1):
        t0 = slab * STEPS
        inside2 = (t0 + step2 >= t_start) & (t0 + step2 < t_end)
        now = ahead
        own_u, own_step, own_slope, own_skip, own_gate = (), (), (), (), ()
        steps, inputs, grads, new_D = (), (), (), ()
        for c in tl.static_range(EACH):
            s, v = _steps(now[M * c], delta, PACK, V), _steps(now[M * c + 1], u, PACK, V)
            g = _steps(now[M * c + 2], grad_y, PACK, V)
            if z is not None:
                gates, ys = _steps(now[M * c + 3], z, PACK, V), _steps(now[M * c + 4], ungated, PACK, V)
            own_s, own_x, own_g = (), (), ()
            for i in tl.static_range(V):
                raw, value, grad = s[i] + biases[c], v[i], g[i]
                slope = zero + 1.0
                if SOFTPLUS:
                    slope = sigmoid(raw)
                    raw = softplus(raw)
                valid = reals[c]
                if not EXACT:
                    t = t0 + lane * V + i
                    valid = valid & (t >= t_start) & (t < t_end)
                    raw, slope = tl.where(valid, raw, 0.0), tl.where(valid, slope, 0.0)
                value, grad = tl.where(valid, value, 0.0), tl.where(valid, grad, 0.0)
                if z is not None:
                    open = sigmoid(gates[i])
                    own_gate = own_gate + (grad * ys[i] * open * (1.0 + gates[i] * (1.0 - open)),)
                    grad = tl.where(valid, grad * gates[i] * open, 0.0)
                own_s, own_x, own_g = own_s + (raw,), own_x + (raw * value,), own_g + (grad,)
                own_u, own_step, own_slope = own_u + (value,), own_step + (raw,), own_slope + (slope,)
                own_skip = own_skip + (skips[c] * grad,)
            steps = steps + spread(own_s, column * LANES, V, STEPS)
            inputs = inputs + spread(own_x, column * LANES, V, STEPS)
            grads = grads + spread(own_g, column * LANES, V, STEPS)
            sum_D = totals_D[c]
            for i in tl.static_range(V):
                sum_D += own_g[i] * own_u[c * V + i]
            new_D = new_D + (sum_D,)
        totals_D = new_D
        sums_B, sums_A = repeat(zero, EACH * STEPS), repeat(zero, EACH * STEPS)
        then_p, then_A, then_B, then_C = (), (), (), ()
        for j in tl.static_range(K):
            now_B, now_C = next_B, next_C
            if j + 1 < K:
                at = weights + (slab * N + (j + 1) * LANES) * STEPS
            else:
                at = weights + tl.maximum(slab - 1, first) * (N * STEPS)
            next_B, next_C = _weights(B + at, STEADY_B), _weights(C + at, STEADY_C)
            if j == 0:
                pinned = pin(slab)
            summed_B, summed_A = (), ()
            over_B, over_C = repeat(zero, STEPS), repeat(zero, STEPS)
            for c in tl.static_range(EACH):
                rate, state = rates[c * K + j] + pinned, starts[c * K + j]
                Bs, Cs = (
                    _eight(now_B, constant_B, c * K + j, STEADY_B),
                    _eight(now_C, constant_C, c * K + j, STEADY_C),
                )
                states, decays = (state,), ()
                for i in tl.static_range(STEPS):
                    decay, gain = exp2(steps[c * STEPS + i] * rate), inputs[c * STEPS + i] * Bs[i]
                    if bounds is not None:
                        gain = tl.where((t0 + i >= t_start) & (t0 + i < t_end), gain, 0.0)
                    state = decay * state + gain
                    states, decays = states + (state,), decays + (decay,)
                grad = p[c * K + j]
                of_A, of_B, of_C = total_A[c * K + j], total_B[c * K + j], total_C[c * K + j]
                news_B, news_A, overs_B, overs_C = (), (), (), ()
                for i in tl.static_range(STEPS - 1, -1, -1):
                    sent = grads[c * STEPS + i] * Cs[i]
                    if bounds is not None:
                        sent = tl.where((t0 + i >= t_start) & (t0 + i < t_end), sent, 0.0)
                    grad = sent + grad
                    news_B = (sums_B[c * STEPS + i] + grad * Bs[i],) + news_B
                    if STEADY_B:
                        of_B += grad * inputs[c * STEPS + i]
                    else:
                        overs_B = (over_B[i] + grad * inputs[c * STEPS + i],) + overs_B
                    if STEADY_C:
                        of_C += grads[c * STEPS + i] * states[i + 1]
                    else:
                        overs_C = (over_C[i] + grads[c * STEPS + i] * states[i + 1],) + overs_C
                    grad = decays[i] * grad
                    change = grad * states[i]
                    news_A = (sums_A[c * STEPS + i] + rate * change,) + news_A
                    of_A += steps[c * STEPS + i] * change
                summed_B, summed_A = summed_B + news_B, summed_A + news_A
                if not STEADY_B:
                    over_B = overs_B
                if not STEADY_C:
                    over_C = overs_C
                then_p, then_A = then_p + (grad,), then_A + (of_A,)
                then_B, then_C = then_B + (of_B,), then_C + (of_C,)
            sums_B, sums_A = summed_B, summed_A
            if not STEADY_B or not STEADY_C:
                kept = summed(over_B + over_C, index, LANES, CHANNELS, 2 * STEPS)
                to = to_sums + (slab * N + j * LANES) * (2 * STEPS)
                if bounds is None:
                    tl.store(to, together(kept, R))
                else:
                    t2 = t0 + ((column * R)[:, None] + tl.arange(0, R)[None, :]) % STEPS
                    tl.store(to, together(kept, R), (t2 >= t_start) & (t2 < t_end))
        p, total_A, total_B, total_C, new_bias = (), (), (), (), ()
        ahead, later, starts = later, (), ()
        for c in tl.static_range(EACH):
            later = later + _five(
                at_s[c],
                sl,
                at_u[c],
                ul,
                at_g[c],
                gl,
                at_z,
                zl,
                ungated,
                at_y[c],
                yl,
                tl.maximum(slab - 2, first) * STEPS + lane * V,
                l,
                c,
                WHOLE,
                PACK,
                V,
            )
            for j in tl.static_range(K):
                at_state = (
                    (place + tl.maximum(slab - 1, first) - origin) * kl
                    + (j * LANES + lane) * kn
                    + channels[c] * kd
                )
                starts = starts + (
                    tl.load(saved + at_state, j * LANES + lane < n, 0.0),
                )  # no state: not saved
        pinned = pin(slab)
        for c in tl.static_range(EACH):
            for j in tl.static_range(K):
                p, total_A = p + (then_p[j * EACH + c],), total_A + (then_A[j * EACH + c],)
                total_B, total_C = total_B + (then_B[j * EACH + c],), total_C + (then_C[j * EACH + c],)
            of_B, of_A = (), ()
            for i in tl.static_range(STEPS):
                of_B, of_A = of_B + (sums_B[c * STEPS + i],), of_A + (sums_A[c * STEPS + i],)
            of_B, of_A = summed(of_B, index, 1, LANES, STEPS), summed(of_A, index, 1, LANES, STEPS)
            outs_u, outs_s, sum_bias = (), (), totals_bias[c]
            outs_z = ()
            for i in tl.static_range(V):
                change = pinned + (of_A[i] * LN_2 + own_u[c * V + i] * of_B[i]) * own_slope[c * V + i]
                outs_u, outs_s = (
                    outs_u + (own_skip[c * V + i] + own_step[c * V + i] * of_B[i],),
                    outs_s + (change,),
                )
                sum_bias += change
                if z is not None:
                    outs_z = outs_z + (own_gate[c * V + i],)
            new_bias = new_bias + (sum_bias,)
            inside = reals[c][:, None] & (step2 >= 0)
            if not EXACT:
                inside = inside & inside2
            _write(to_u[c] + (t0 + step2) * dul, outs_u, inside, False, V)
            _write(to_s[c] + (t0 + step2) * dsl, outs_s, inside, False, V)
            if z is not None:
                _write(to_z[c] + (t0 + step2) * dzl, outs_z, inside, False, V)
        totals_bias = new_bias
    for c in tl.static_range(EACH):
        to = totals + ((sequence * parts + part) * d + channels[c]) * WIDTH
        only = reals[c] & (lane == 0)
        tl.store(to, total(totals_D[c], index, LANES), only)
        tl.store(to + 1, total(totals_bias[c], index, LANES), only)
        for j in tl.static_range(K):
            row_n = j * LANES + lane
            own = reals[c] & (row_n < n)
            tl.store(to + 2 + row_n, total_A[c * K + j], own)
            if STEADY_B:
                tl.store(to + 2 + N + row_n, total_B[c * K + j], own)
            if STEADY_C:
                tl.store(to + WIDTH - N + row_n, total_C[c * K + j], own)
            if grad_start is not None:
                if part == 0:
                    tl.store(grad_start + (sequence * d + channels[c]) * n + row_n, p[c * K + j], own)


@_kernel
def arrange(
    B, C, to_B, to_C, Bb, Bg, Bn, Bl, Cb, Cg, Cn, Cl, l, n, groups, slabs,
    N: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """B and C, (b, g, n, l) of any strides, in float32, zero beyond n and l.

    As (b, g, slab, N, 8); or for LANES lanes along time as (b, g, n, block, 4, LANES, 4), so that each
    quarter of the lanes' 16 steps is one stretch of memory.
    """
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    row, state = tl.program_id(1), tl.program_id(2) * 16 + tl.arange(0, 16)[:, None]
    b, g = (row // groups).to(tl.int64), row % groups
    if LANES == 0:
        to = (row.to(tl.int64) * slabs + t // STEPS) * (N * STEPS) + state * STEPS + t % STEPS
        here = (t < slabs * STEPS) & (state < N)
    else:
        size: tl.constexpr = 16 * LANES
        to = (row.to(tl.int64) * n + state) * (slabs * size) + t // size * size
        to = to + t % 16 // 4 * (LANES * 4) + t // 16 % LANES * 4 + t % 4
        here = (t < slabs * size) & (state < n)
    inside = (t < l) & (state < n)
    if B is not None:
        x = tl.load(B + b * Bb + g * Bg + state * Bn + t.to(tl.int64) * Bl, inside, 0.0)
        tl.store(to_B + to, x.to(tl.float32), here)
    if C is not None:
        x = tl.load(C + b * Cb + g * Cg + state * Cn + t.to(tl.int64) * Cl, inside, 0.0)
        tl.store(to_C + to, x.to(tl.float32), here)


@_kernel
def finish(
    sums,
    dB,
    dC,
    Bb,
    Bg,
    Bn,
    Bl,
    Cb,
    Cg,
    Cn,
    Cl,
    l,
    n,
    groups,
    tiles,
    slabs,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum what the tiles of each group hold, in their order, into dB and dC (b, g, n, l)."""
    row = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    each = slabs.to(tl.int64) * (N * 2 * STEPS)
    inside = at < each
    where = sums + row * each + at
    sum = tl.zeros((BLOCK,), tl.float32)
    for tile in range(0, tiles // 16 * 16, 16):
        for i in tl.static_range(16):
            sum += tl.load(where + (tile + i) * tl.num_programs(1) * each, inside, 0.0)
    for tile in range(tiles // 16 * 16, tiles):
        sum += tl.load(where + tile * tl.num_programs(1) * each, inside, 0.0)
    step, state, slab = at % (2 * STEPS), at // (2 * STEPS) % N, at // (2 * STEPS * N)
    t = (slab * STEPS + step % STEPS).to(tl.int64)
    b, g = (row // groups).to(tl.int64), row % groups
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
        sum += tl.load(totals + (i * d + channel) * WIDTH + at, at < WIDTH, 0.0)
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
    SOFTPLUS: tl.constexpr, CHANNELS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Program (tile of channels, row): advance the state (b, d, n) in place by one step; B, C (b, g, n)."""
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    state_n = tl.arange(0, N)[None, :]
    real = channel < d
    here = real[:, None] & (state_n < n)
    u = tl.load(x + row * xb + channel * xd, real, 0.0).to(tl.float32)
    delta = tl.load(dt + row * sb + channel * sd, real, 0.0).to(tl.float32)
    if bias is not None:
        delta += tl.load(bias + channel, real, 0.0)
    if SOFTPLUS:
        delta = softplus(delta)
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
