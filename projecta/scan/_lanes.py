"""What the Triton kernels are written in: lanes of a warp, values a lane keeps in registers, quick maths.

A tile is one warp: (32,), one element a lane. A tuple of V tiles holds V steps (or states) of each lane in
registers; `apart` and `together` turn a (32, V) block of memory into one and back, which only renames
registers.
"""

import os

import triton
import triton.language as tl


def constant(x):
    """A global that a kernel may use; the interpreter wants the bare number."""
    return x if os.environ.get("TRITON_INTERPRET") == "1" else tl.constexpr(x)


INTERPRETED = constant(os.environ.get("TRITON_INTERPRET") == "1")  # on the CPU, without assembly
WARP = constant(32)
LOG2_E = constant(1.4426950408889634)
LN_2 = constant(0.6931471805599453)


@triton.jit
def exp2(x):
    """2^x to 2 ulp; below 2^-126 zero."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def log2(x):
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


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
def softplus(x):
    """max(x, 0) + log(1 + e) with e = exp(-|x|); the series where 1 + e would round."""
    e = exp2(tl.abs(x) * -LOG2_E)
    return tl.maximum(x, 0.0) + tl.where(e < 2.0**-11, e - 0.5 * e * e, log2(1.0 + e) * LN_2)


@triton.jit
def apart(x, V: tl.constexpr):
    """(32, V) as V tiles."""
    if V == 1:
        return (tl.reshape(x, (WARP,)),)
    else:
        even, odd = tl.split(tl.reshape(x, (WARP, V // 2, 2)))
        evens, odds = apart(even, V // 2), apart(odd, V // 2)
        tiles = ()
        for i in tl.static_range(V // 2):
            tiles = tiles + (evens[i], odds[i])
        return tiles


@triton.jit
def together(tiles, V: tl.constexpr):
    """V tiles as (32, V)."""
    if V == 1:
        return tl.reshape(tiles[0], (WARP, 1))
    else:
        evens, odds = (), ()
        for i in tl.static_range(V // 2):
            evens, odds = evens + (tiles[2 * i],), odds + (tiles[2 * i + 1],)
        return tl.reshape(tl.join(together(evens, V // 2), together(odds, V // 2)), (WARP, V))


@triton.jit
def repeat(x, V: tl.constexpr):
    """The tile V times."""
    tiles = ()
    for _ in tl.static_range(V):
        tiles = tiles + (x,)
    return tiles


@triton.jit
def spread(own, leader, V: tl.constexpr, T: tl.constexpr):
    """Give every lane all T steps that its group of T / V lanes owns, V each; `leader` is the first."""
    tiles = ()
    for i in tl.static_range(T):
        tiles = tiles + (tl.gather(own[i % V], leader + i // V, 0),)
    return tiles


@triton.jit
def summed(tiles, index, UNIT: tl.constexpr, L: tl.constexpr, V: tl.constexpr):
    """Sum V tiles over groups of L lanes, UNIT lanes apart; the i-th of a group keeps sums i V / L and on."""
    if L == 1:
        return tiles
    else:
        upper = (index & (UNIT * L // 2)) != 0
        half = ()
        for i in tl.static_range(V // 2):
            keep = tl.where(upper, tiles[V // 2 + i], tiles[i])
            send = tl.where(upper, tiles[i], tiles[V // 2 + i])
            half = half + (keep + tl.gather(send, index ^ (UNIT * L // 2), 0),)
        return summed(half, index, UNIT, L // 2, V // 2)


@triton.jit
def total(x, index, L: tl.constexpr):
    """The sum over each group of L adjacent lanes, in all of them."""
    if L == 1:
        return x
    else:
        return total(x + tl.gather(x, index ^ (L // 2), 0), index, L // 2)


@triton.jit
def scanned(decay, state, index, lane, L: tl.constexpr, REACH: tl.constexpr = 1):
    """Chain h -> decay h + state over groups of L adjacent lanes: what each lane has after its own link."""
    if REACH == L:
        return state
    else:
        before = tl.where(lane >= REACH, index - REACH, index)
        joined = tl.where(lane >= REACH, decay * tl.gather(state, before, 0) + state, state)
        return scanned(
            tl.where(lane >= REACH, decay * tl.gather(decay, before, 0), decay),
            joined,
            index,
            lane,
            L,
            2 * REACH,
        )


@triton.jit
def pin(x):
    """0.0, once all loads so far have been issued.

    A barrier (of one warp: a few cycles) keeps ptxas from moving loads for the next round down to where that
    round begins, as it otherwise does; x, and a use of the result, keep the barrier itself in its place.
    """
    if INTERPRETED:
        return 0.0
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b32 t; setp.ne.u32 p, $1, 0xffffffff; bar.red.popc.u32 t, 0, p;"
            " shr.u32 $0, t, 20; }",
            "=r,r", [x], tl.int32, False, 1,
        ).to(tl.float32)  # fmt: skip
