"""Operations across the lanes of vectors, for numba kernels: sums, pairs and transpositions."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from projecta._cpu.simd import Emit, Kind, number

_INT32, _INT64 = ir.IntType(32), ir.IntType(64)


@intrinsic
def sum_lanes(typing, x):
    """The sum of the lanes, in a fixed order."""

    def lower(context, builder, sig, args):
        emit, (value,) = Emit(builder, x.scalar), args
        width = emit.kind.lanes
        while width > 1:
            width //= 2
            value = builder.fadd(
                emit.shuffle(value, value, [*range(width)]),
                emit.shuffle(value, value, [*range(width, 2 * width)]),
            )
        return builder.extract_element(value, ir.Constant(_INT32, 0))

    return x.scalar(x), lower


@intrinsic
def pair_sums(typing, x, y):
    """The sums of adjacent lanes of x, then of y."""

    def lower(context, builder, sig, args):
        emit = Emit(builder, x.scalar)
        even, odd = (emit.shuffle(*args, [*range(i, 2 * emit.kind.lanes, 2)]) for i in (0, 1))
        return builder.fadd(even, odd)

    return x(x, x), lower


@intrinsic
def pair_copies(typing, x):
    """Two vectors with each lane of x twice: of its lower half, and of its upper half."""

    def lower(context, builder, sig, args):
        emit, twice = Emit(builder, x.scalar), [i // 2 for i in range(2 * Kind(x.scalar).lanes)]
        size = emit.kind.lanes
        halves = [emit.shuffle(args[0], args[0], part) for part in (twice[:size], twice[size:])]
        return context.make_tuple(builder, sig.return_type, halves)

    return types.UniTuple(x, 2)(x), lower


def _transposed(typing, source, target, past_cache: bool):
    """Signature and lowering of a transposition.

    Each round swaps the off-diagonal halves of ever smaller squares, two rows at a time.
    """

    def lower(context, builder, sig, args):
        emit = Emit(builder, number(source.dtype))
        size = emit.kind.lanes

        def row(array_type, array, offset, stride, r):
            where = builder.add(offset, builder.mul(ir.Constant(_INT64, r), stride))
            return emit.pointer(context, array_type, array, where)

        rows = [emit.load(row(source, args[0], args[1], args[2], r), source.dtype) for r in range(size)]
        half = size // 2
        while half:
            upper = [c if not c & half else size + c - half for c in range(size)]
            lower_ = [c + half if not c & half else size + c for c in range(size)]
            for r in range(size):
                if not r & half:
                    x, y = rows[r], rows[r + half]
                    rows[r], rows[r + half] = emit.shuffle(x, y, upper), emit.shuffle(x, y, lower_)
            half //= 2
        for r in range(size):
            emit.store(row(target, args[3], args[4], args[5], r), rows[r], target.dtype, past_cache)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), lower


@intrinsic
def transpose(typing, source, start, source_stride, target, first, target_stride):
    """Transpose a square of as many rows as lanes, from rows of source to rows of target."""
    return _transposed(typing, source, target, past_cache=False)


@intrinsic
def transpose_past_cache(typing, source, start, source_stride, target, first, target_stride):
    """`transpose` by non-temporal stores: rows of target are aligned cache lines; a `fence` must follow."""
    return _transposed(typing, source, target, past_cache=True)
