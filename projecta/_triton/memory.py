"""How Triton kernels read and write memory: 32-bit words, single numbers, a lane's steps, shared memory."""

import triton
import triton.language as tl

from projecta._triton.warp import INTERPRETED


@triton.jit
def load_words(at, W: tl.constexpr, FREE: tl.constexpr):
    """W adjacent 32-bit words of each lane from a pointer on: W tiles, by one load of up to 16 bytes.

    In assembly: for so many loads the compiler's search for layouts takes seconds, and it would unpack 16-bit
    numbers, and so wait, directly after the load. FREE loads may be moved past stores and barriers (`nc`:
    nothing writes here while the kernel runs); a `pin` keeps the others in place.
    """
    CACHE: tl.constexpr = ".nc.L2::128B" if FREE else ".L2::128B"
    if INTERPRETED:
        found = ()
        for i in tl.static_range(W):
            found = found + (tl.load(at.to(tl.pointer_type(tl.int32)) + i),)
        return found
    elif W == 1:
        return (
            tl.inline_asm_elementwise(
                "ld.global" + CACHE + ".b32 $0, [$1];", "=r,l", [at.to(tl.int64)], tl.int32, FREE, 1
            ),
        )
    elif W == 2:
        return tl.inline_asm_elementwise(
            "ld.global" + CACHE + ".v2.b32 {$0, $1}, [$2];", "=r,=r,l", [at.to(tl.int64)],
            (tl.int32, tl.int32), FREE, 1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "ld.global" + CACHE + ".v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [at.to(tl.int64)],
            (tl.int32, tl.int32, tl.int32, tl.int32), FREE, 1,
        )  # fmt: skip


@triton.jit
def store_words(at, tiles, inside, W: tl.constexpr):
    """Write W words of each lane that is inside, by one store."""
    if INTERPRETED:
        for i in tl.static_range(W):
            tl.store(at.to(tl.pointer_type(tl.int32)) + i, tiles[i], inside)
    elif W == 1:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $1, 0; @p st.global.b32 [$2], $3; mov.b32 $0, 0; }",
            "=r,r,l,r", [inside.to(tl.int32), at.to(tl.int64), tiles[0]], tl.int32, False, 1,
        )  # fmt: skip
    elif W == 2:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $1, 0; @p st.global.v2.b32 [$2], {$3, $4}; mov.b32 $0, 0; }",
            "=r,r,l,r,r", [inside.to(tl.int32), at.to(tl.int64), tiles[0], tiles[1]], tl.int32, False, 1,
        )  # fmt: skip
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $1, 0; @p st.global.v4.b32 [$2], {$3, $4, $5, $6};"
            " mov.b32 $0, 0; }",
            "=r,r,l,r,r,r,r", [inside.to(tl.int32), at.to(tl.int64), tiles[0], tiles[1], tiles[2], tiles[3]],
            tl.int32, False, 1,
        )  # fmt: skip


@triton.jit
def load_one(at, inside):
    """One number per lane that is inside, else 0, in float32: for arrays that cannot be read in words."""
    element: tl.constexpr = at.dtype.element_ty
    if INTERPRETED:
        return tl.load(at, inside, 0.0).to(tl.float32)
    elif element.primitive_bitwidth == 32:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.global.nc.b32 $0, [$1]; }",
            "=&r,l,r", [at.to(tl.int64), inside.to(tl.int32)], tl.int32, True, 1,
        ).to(tl.float32, bitcast=True)  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b16 $0, 0; @p ld.global.nc.b16 $0, [$1]; }",
            "=&h,l,r", [at.to(tl.int64), inside.to(tl.int32)], tl.int16, True, 1,
        ).to(element, bitcast=True).to(tl.float32)  # fmt: skip


@triton.jit
def store_one(at, value, inside):
    """Write one number per lane that is inside."""
    element: tl.constexpr = at.dtype.element_ty
    if INTERPRETED:
        tl.store(at, value.to(element), inside)
    elif element.primitive_bitwidth == 32:
        store_words(at, (value.to(tl.int32, bitcast=True),), inside, 1)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $1, 0; @p st.global.b16 [$2], $3; mov.b32 $0, 0; }", "=r,r,l,h",
            [inside.to(tl.int32), at.to(tl.int64), value.to(element).to(tl.int16, bitcast=True)],
            tl.int32, False, 1,
        )  # fmt: skip


@triton.jit
def unpack_word(word, element: tl.constexpr):
    """A word as one float32, or as two if it holds two 16-bit numbers."""
    if element.primitive_bitwidth == 32:
        return (word.to(tl.float32, bitcast=True),)
    elif element == tl.bfloat16:  # the upper half of a float32
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    else:
        low, high = word.to(tl.int16), (word >> 16).to(tl.int16)
        return low.to(element, bitcast=True).to(tl.float32), high.to(element, bitcast=True).to(tl.float32)


@triton.jit
def pack_word(tiles, i: tl.constexpr, element: tl.constexpr):
    """The i-th word of a row of numbers."""
    if element.primitive_bitwidth == 32:
        return tiles[i].to(tl.int32, bitcast=True)
    elif element == tl.float16 and not INTERPRETED:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 a, b; cvt.rn.f16.f32 a, $1; cvt.rn.f16.f32 b, $2; mov.b32 $0, {a, b}; }", "=r,f,f",
            [tiles[2 * i], tiles[2 * i + 1]], tl.int32, True, 1,
        )  # fmt: skip
    else:
        low = tiles[2 * i].to(element).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low | (tiles[2 * i + 1].to(element).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def prefetch(at):
    """Prefetch a cache line into L2."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)], tl.int32, False, 1
        )


@triton.constexpr_function
def _buffer(BYTES):
    return f"{{ .shared .align 16 .b8 buffer[{BYTES}]; mov.u32 $0, buffer; }}"


@triton.jit
def shared_buffer(index, BYTES: tl.constexpr):
    """The address of BYTES bytes of shared memory; a kernel may call this once."""
    if INTERPRETED or BYTES == 0:
        return index
    else:
        return tl.inline_asm_elementwise(_buffer(BYTES), "=r,r", [index], tl.int32, False, 1)


@triton.jit
def barrier(index):
    """Wait for all warps of the program."""
    if not INTERPRETED:
        tl.inline_asm_elementwise("bar.sync 0; mov.b32 $0, 0;", "=r,r", [index], tl.int32, False, 1)


@triton.jit
def load_rows(
    at, index, count, S: tl.constexpr, STRIDE: tl.constexpr, U: tl.constexpr, THREADS: tl.constexpr
):
    """Load U runs of S numbers, STRIDE apart, 16 bytes per thread; beyond `count`, the last run again."""
    found = ()
    if not INTERPRETED:
        for i in tl.static_range((U * S // 4 + THREADS - 1) // THREADS):
            v = i * THREADS + index
            stretch = tl.minimum(v // (S // 4), count - 1)
            found = found + load_words(at + (stretch * STRIDE + v % (S // 4) * 4), 4, True)
    return found


@triton.jit
def store_shared(tiles, buffer, index, SIZE: tl.constexpr, THREADS: tl.constexpr):
    """Store the SIZE numbers from `load_rows` to shared memory."""
    for i in tl.static_range(len(tiles) // 4):
        v = i * THREADS + index
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $1, 0; @p st.shared.v4.b32 [$2], {$3, $4, $5, $6};"
            " mov.b32 $0, 0; }",
            "=r,r,r,r,r,r,r",
            [(v < SIZE // 4).to(tl.int32), buffer + v * 16, tiles[4 * i], tiles[4 * i + 1], tiles[4 * i + 2],
             tiles[4 * i + 3]],
            tl.int32, False, 1,
        )  # fmt: skip


@triton.jit
def load_shared(at):
    """Load 16 bytes from shared memory, at half the cost if lanes 2 i and 2 i + 1 read the same."""
    return tl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r", [at],
        (tl.int32, tl.int32, tl.int32, tl.int32), False, 1,
    )  # fmt: skip


@triton.jit
def reversed_tiles(tiles):
    """The tiles from the last to the first."""
    found = ()
    for i in tl.static_range(len(tiles)):
        found = found + (tiles[len(tiles) - 1 - i],)
    return found


@triton.jit
def first_step(stride, l):
    """Where the first step stands, from the start in memory: with a negative stride, at the end."""
    return tl.where(stride < 0, (1 - l).to(tl.int64) * stride, 0)


@triton.jit
def read(
    at, t1, stride, l, WIDE: tl.constexpr, WHOLE: tl.constexpr, V: tl.constexpr, FREE: tl.constexpr = True
):  # fmt: skip
    """V steps of each lane from its t1 on: in words (WIDE), or one by one with any stride.

    WIDE is -1 where time runs backwards in memory; the words come in memory's order, as `as_floats` knows.
    """
    BITS: tl.constexpr = at.dtype.element_ty.primitive_bitwidth
    P: tl.constexpr = V if V * BITS <= 128 else 128 // BITS
    found = ()
    if WIDE:
        for i in tl.static_range(V // P):
            t = t1 + (i if WIDE > 0 else V // P - 1 - i) * P
            if not WHOLE:
                t = tl.minimum(t, l - P)
            at_words = at + t if WIDE > 0 else at - (t + (P - 1))
            found = found + load_words(at_words, P * BITS // 32, FREE)
    else:
        for i in tl.static_range(V):
            found = found + (load_one(at + (t1 + i).to(tl.int64) * stride, t1 + i < l),)
    return found


@triton.jit
def as_floats(loaded, like, WIDE: tl.constexpr):
    """The result of `read`, as tiles in float32; `like` is a pointer to its type."""
    tiles = ()
    for i in tl.static_range(len(loaded)):
        tiles = tiles + (unpack_word(loaded[i], like.dtype.element_ty) if WIDE else (loaded[i],))
    return reversed_tiles(tiles) if WIDE < 0 else tiles


@triton.jit
def write(
    at, t1, stride, tiles, t_start, t_end, real, WIDE: tl.constexpr, WHOLE: tl.constexpr, V: tl.constexpr
):  # fmt: skip
    """Write V steps of each lane that has a channel (`real`), from its t1 on, within t_start..t_end.

    WIDE is as in `read`.
    """
    element: tl.constexpr = at.dtype.element_ty
    BITS: tl.constexpr = element.primitive_bitwidth
    P: tl.constexpr = V if V * BITS <= 128 else 128 // BITS
    if WIDE:
        ordered = reversed_tiles(tiles) if WIDE < 0 else tiles
        for i in tl.static_range(V // P):
            row, inside = (), real
            for k in tl.static_range(P * BITS // 32):
                row = row + (pack_word(ordered, i * P * BITS // 32 + k, element),)
            t = t1 + (i if WIDE > 0 else V // P - 1 - i) * P
            if not WHOLE:
                inside = inside & (t < t_end)
            store_words(at + t if WIDE > 0 else at - (t + (P - 1)), row, inside, P * BITS // 32)
    else:
        for i in tl.static_range(V):
            inside = real & (t1 + i >= t_start) & (t1 + i < t_end)
            store_one(at + (t1 + i).to(tl.int64) * stride, tiles[i], inside)
