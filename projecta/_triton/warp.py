"""Building blocks of the Triton kernels: warp shuffles, scans and reductions, loads and stores, fast maths.

A tile is one warp: (32,), one element per lane. A tuple of V tiles holds V steps (or states) of each lane in
registers. Memory is read and written in 32-bit words, which hold one float32 or two 16-bit numbers.
"""

import os

import triton
import triton.language as tl


def constant(x):
    """A global that a kernel may use; the interpreter needs the plain number."""
    return x if os.environ.get("TRITON_INTERPRET") == "1" else tl.constexpr(x)


INTERPRETED = constant(os.environ.get("TRITON_INTERPRET") == "1")  # on the CPU, without assembly
WARP = constant(32)
LOG2_E = constant(1.4426950408889634)
LN_2 = constant(0.6931471805599453)


@triton.jit
def exp2(x):
    """2^x to 2 ulp; results below 2^-126 are zero."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def reciprocal(x):
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def sigmoid(x):
    return reciprocal(1.0 + exp2(x * -LOG2_E))


@triton.jit
def softplus(x, BROAD: tl.constexpr):
    """max(x, 0) + log(1 + e) with e = exp(-|x|), to 2e-7 of the value.

    log(1 + e) / e is a minimax polynomial: the logarithm unit is exact to 2^-22 where 1 + e is near 1, which
    is 5e-6 of a step of 0.05. BROAD computes the terms in parallel, not one after the other. On an H100 this
    makes the forward pass a fifth faster with 32-bit inputs, and a twentieth slower with 16-bit inputs.
    """
    e = exp2(tl.abs(x) * -LOG2_E)
    if BROAD:
        e2 = e * e
        e4 = e2 * e2
        a, b = 0.99999994 - 0.49999493 * e, 0.33319095 - 0.24842978 * e
        c, d = 0.19105989 - 0.13663207 * e, 0.078225493 - 0.029504957 * e
        p = (a + b * e2) + e4 * ((c + d * e2) + e4 * 0.0052326238)
    else:
        p = 0.0052326238 * e - 0.029504957
        p = p * e + 0.078225493
        p = p * e - 0.13663207
        p = p * e + 0.19105989
        p = p * e - 0.24842978
        p = p * e + 0.33319095
        p = p * e - 0.49999493
        p = p * e + 0.99999994
    return tl.maximum(x, 0.0) + e * p


@triton.jit
def and_uniform(inside, condition):
    """inside & condition, for a condition that all lanes share.

    The interpreter of Triton 3.9 would broadcast the condition as int32, which cannot be a mask.
    """
    if INTERPRETED:
        return inside & (condition.to(tl.int32) + tl.zeros(inside.shape, tl.int32) != 0)
    else:
        return inside & condition


@triton.jit
def compensated(total, lost, value):
    """total + value, and the rounding error of the sum so far (Kahan)."""
    value = value - lost
    new = total + value
    return new, (new - total) - value


@triton.jit
def pin(x, index):
    """Return 0.0 after all earlier loads that are not FREE have been issued.

    A barrier (of one warp: a few cycles) keeps ptxas from moving loads for the next iteration down to its
    start. x, and a use of the result, keep the barrier itself in place.
    """
    if INTERPRETED:
        return 0.0
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b32 t; setp.ne.u32 p, $1, 0xffffffff; bar.red.popc.u32 t, $2, 32, p;"
            " shr.u32 $0, t, 20; }",
            "=r,r,r", [x, index // WARP + 1], tl.int32, False, 1,
        ).to(tl.float32)  # fmt: skip


@triton.jit
def shuffle(x, source):
    """x of lane `source` of the same warp."""
    if INTERPRETED:
        return tl.gather(x, source + tl.zeros(x.shape, tl.int32), 0)
    else:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=f,f,r", [x, source], tl.float32, True, 1
        )


@triton.jit
def stage_sums(
    tiles, buffer, index, half, j: tl.constexpr, K: tl.constexpr, R: tl.constexpr, WARPS: tl.constexpr
):
    """Store R tiles, row j of K, to one half of `buffer`; `reduce_warps` adds them."""
    if not INTERPRETED:
        HALF: tl.constexpr = WARPS * WARP * K * R * 4
        at = buffer + half * HALF + ((index // WARP * K + j) * WARP + index % WARP) * (R * 4)
        for i in tl.static_range(0, R, 2):
            tl.inline_asm_elementwise(
                "st.shared.v2.f32 [$1], {$2, $3}; mov.b32 $0, 0;", "=r,r,f,f",
                [at + i * 4, tiles[i], tiles[i + 1]],
                tl.int32, False, 1,
            )  # fmt: skip


@triton.jit
def reduce_warps(tiles, buffer, index, half, K: tl.constexpr, R: tl.constexpr, WARPS: tl.constexpr):
    """The sum of K rows of R tiles over the program's warps: warp w keeps rows w, WARPS + w...

    Call it after a barrier: one is enough if the halves of `buffer` alternate. The interpreter sums `tiles`.
    """
    HALF: tl.constexpr = WARPS * WARP * K * R * 4
    warp, place = index // WARP, index % WARP
    found = ()
    for j in tl.static_range((K + WARPS - 1) // WARPS):
        row = tl.minimum(j * WARPS + warp, K - 1)
        for i in tl.static_range(R):
            sum = tl.zeros((WARP * WARPS,), tl.float32)
            for w in tl.static_range(WARPS):
                if INTERPRETED:
                    for k in tl.static_range(WARPS):
                        if j * WARPS + k < K:
                            other = tl.gather(tiles[(j * WARPS + k) * R + i], w * WARP + place, 0)
                            sum += tl.where(warp == k, other, 0.0)
                else:
                    at = buffer + half * HALF + ((w * K + row) * WARP + place) * (R * 4) + i * 4
                    sum += tl.inline_asm_elementwise(
                        "ld.shared.f32 $0, [$1];", "=f,r", [at], tl.float32, False, 1
                    )
            found = found + (sum,)
    return found


@triton.jit
def repeat(x, V: tl.constexpr):
    """The tile, repeated V times."""
    tiles = ()
    for _ in tl.static_range(V):
        tiles = tiles + (x,)
    return tiles


@triton.jit
def broadcast(own, leader, FIRST: tl.constexpr, V: tl.constexpr, T: tl.constexpr, UNIT: tl.constexpr):
    """Broadcast T steps, from FIRST on, in each group of lanes: V steps per lane, lanes UNIT apart."""
    tiles = ()
    for i in tl.static_range(FIRST, FIRST + T):
        tiles = tiles + (shuffle(own[i % V], leader + i // V * UNIT),)
    return tiles


@triton.jit
def reduce_scatter(tiles, index, UNIT: tl.constexpr, L: tl.constexpr, T: tl.constexpr):
    """Sum T tiles over groups of L lanes, UNIT lanes apart; lane i of a group keeps sums i T / L and on."""
    if L == 1:
        return tiles
    else:
        V: tl.constexpr = T // L
        upper = (index & UNIT) != 0
        half = ()
        for i in tl.static_range(T // 2):
            one, other = tiles[i // V * 2 * V + i % V], tiles[i // V * 2 * V + i % V + V]
            keep, send = tl.where(upper, other, one), tl.where(upper, one, other)
            half = half + (keep + shuffle(send, index ^ UNIT),)
        return reduce_scatter(half, index, 2 * UNIT, L // 2, T // 2)


@triton.jit
def all_reduce(x, index, UNIT: tl.constexpr, L: tl.constexpr):
    """The sum over each group of L lanes, UNIT lanes apart, in every lane."""
    if L == 1:
        return x
    else:
        return all_reduce(x + shuffle(x, index ^ (UNIT * L // 2)), index, UNIT, L // 2)


@triton.constexpr_function
def _link(REACH, LAST):
    further = "" if LAST else f" shfl.sync.up.b32 a, $2, {REACH}, 0, 0xffffffff; @p mul.f32 $0, $2, a;"
    return (
        f"{{ .reg .pred p; .reg .f32 a, b; shfl.sync.up.b32 b|p, $3, {REACH}, 0, 0xffffffff;"
        f" mov.f32 $1, $3; @p fma.rn.f32 $1, $2, b, $3; mov.f32 $0, $2;{further} }}"
    )


@triton.jit
def warp_scan(decay, state, lane, REACH: tl.constexpr = 1):
    """Inclusive scan of h -> decay h + state over a warp's lanes."""
    if REACH == WARP:
        return state
    elif INTERPRETED:
        before, chained = tl.maximum(lane - REACH, 0), lane >= REACH
        joined = tl.where(chained, decay * shuffle(state, before) + state, state)
        return warp_scan(tl.where(chained, decay * shuffle(decay, before), decay), joined, lane, 2 * REACH)
    else:
        further, joined = tl.inline_asm_elementwise(
            _link(REACH, 2 * REACH == WARP), "=&f,=&f,f,f", [decay, state], (tl.float32, tl.float32), True, 1
        )
        return warp_scan(further, joined, lane, 2 * REACH)


@triton.jit
def shift_up(x, first, lane):
    """x of the lane before; in lane 0, `first`."""
    if INTERPRETED:
        return tl.where(lane == 0, first, shuffle(x, tl.maximum(lane - 1, 0)))
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; shfl.sync.up.b32 $0|p, $1, 1, 0, 0xffffffff; @!p mov.f32 $0, $2; }", "=&f,f,f",
            [x, first], tl.float32, True, 1,
        )  # fmt: skip
