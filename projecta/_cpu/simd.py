"""Vectors of 64 bytes for numba kernels: 16 float32 or 8 float64 lanes, held in registers.

numba does not compile loops to full-width vectors, so the kernels use explicit vectors. LLVM splits these
operations on narrower machines (AVX2, NEON): nothing here depends on the processor. In a kernel, +, -, * and
/ take vectors and scalars; `fma` rounds once. No operation is reordered, or assumes finite values.

numba's disk cache checks only a kernel's file: after a change here, delete `projecta/scan/cpu/__pycache__`.
"""

import operator

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model
from numba.np import arrayobj

BYTES = 64
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)


class Vector(types.Type):
    """The numba type of a vector of `scalar`."""

    def __init__(self, scalar: types.Float):
        self.scalar = scalar
        super().__init__(name=f"Vector({scalar})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, Kind(kind.scalar).vector)


class Kind:
    """The properties of a scalar type: LLVM types, lanes, layout of a float."""

    def __init__(self, scalar: types.Float):
        self.double = scalar == types.float64
        self.lanes = BYTES // (8 if self.double else 4)
        self.bytes = 8 if self.double else 4
        self.mantissa = 52 if self.double else 23
        self.bias = 1023 if self.double else 127
        self.element = ir.DoubleType() if self.double else ir.FloatType()
        self.integer = _INT64 if self.double else _INT32
        self.vector = ir.VectorType(self.element, self.lanes)
        self.integers = ir.VectorType(self.integer, self.lanes)
        self.suffix = f"v{self.lanes}f{64 if self.double else 32}"

    def held(self, stored):
        """The LLVM type of a stored scalar: int16 holds a bfloat16, uint16 a float16 (numba has neither)."""
        return {types.int16: ir.IntType(16), types.uint16: ir.HalfType()}.get(stored, self.element)

    def constant(self, value: float) -> ir.Constant:
        value = float(value if self.double else np.float32(value))
        return ir.Constant(self.vector, [value] * self.lanes)

    def whole(self, value: int) -> ir.Constant:
        return ir.Constant(self.integers, [value] * self.lanes)


def _every(kind, value: int):
    """`value` in every lane of an LLVM integer vector, or unchanged for a scalar."""
    return [value] * kind.count if isinstance(kind, ir.VectorType) else value


def number(stored):
    """The type for arithmetic on a stored scalar."""
    return stored if isinstance(stored, types.Float) else types.float32


def _chebyshev(function, degree: int, low: float, high: float) -> list[float]:
    """Coefficients of a near-minimax polynomial."""
    fit = np.polynomial.Chebyshev.interpolate(function, degree, domain=[low, high])
    return fit.convert(kind=np.polynomial.Polynomial, domain=[-1, 1], window=[-1, 1]).coef.tolist()


def _exp2_slope(r):
    """(2^r - 1) / r."""
    near = np.abs(r) < 1e-9
    return np.where(near, np.log(2), np.expm1(r * np.log(2)) / np.where(near, 1, r))


# 2^r on [-1/2, 1/2], with 2^0 = 1 exactly: a decay of 1 must not drift. log(1 + e) on [0, 1], as e times a
# polynomial of 2 e - 1. The degrees give errors of 2e-7 and 1e-16 (exp2), 3e-8 and 1e-15 (log).
_EXP2 = {
    False: [1.0, *_chebyshev(_exp2_slope, 4, -0.5, 0.5)],
    True: [1.0, *_chebyshev(_exp2_slope, 12, -0.5, 0.5)],
}
_LOG1P = {
    double: _chebyshev(lambda q: np.log1p((q + 1) / 2) / np.where(q == -1, 1, (q + 1) / 2), degree, -1.0, 1.0)
    for double, degree in ((False, 8), (True, 19))
}
# sin(pi r) / r and cos(pi r) as polynomials of r^2, r in [-1/2, 1/2]; errors of 1e-8 and 1e-16.
_SIN = {
    double: _chebyshev(lambda q: np.pi * np.sinc(np.sqrt(q)), degree, 0.0, 0.25)
    for double, degree in ((False, 5), (True, 10))
}
_COS = {
    double: _chebyshev(lambda q: np.cos(np.pi * np.sqrt(q)), degree, 0.0, 0.25)
    for double, degree in ((False, 5), (True, 10))
}
LOG2_E = float(np.log2(np.e))


class Emit:
    """Emits vector arithmetic into a function that numba is lowering; the values are LLVM values."""

    def __init__(self, builder: ir.IRBuilder, scalar: types.Float):
        self.b, self.kind = builder, Kind(scalar)

    def call(self, name: str, *args):
        kind = self.kind.vector
        function = ir.FunctionType(kind, [kind] * len(args))
        return self.b.call(
            cgutils.get_or_insert_function(self.b.module, function, f"llvm.{name}.{self.kind.suffix}"), args
        )

    def fma(self, x, y, z):
        return self.call("fma", x, y, z)

    def larger(self, x, y):
        """x where x > y, else y; y where either is NaN."""
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

    def smaller(self, x, y):
        return self.b.select(self.b.fcmp_ordered("<", x, y), x, y)

    def polynomial(self, x, coefficients: list[float]):
        result = self.kind.constant(coefficients[-1])
        for c in reversed(coefficients[:-1]):
            result = self.fma(result, x, self.kind.constant(c))
        return result

    def splat(self, value):
        one = self.b.insert_element(
            ir.Constant(self.kind.vector, ir.Undefined), value, ir.Constant(_INT32, 0)
        )
        lanes = ir.Constant(ir.VectorType(_INT32, self.kind.lanes), [0] * self.kind.lanes)
        return self.b.shuffle_vector(one, ir.Constant(self.kind.vector, ir.Undefined), lanes)

    def shuffle(self, x, y, lanes: list[int]):
        return self.b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_INT32, len(lanes)), lanes))

    def exp2_of_product(self, x, y, safe: bool):
        """2^(x y). Unless `safe`, |x y| must stay below 126 (float64: 1022), and neither be NaN.

        Adding 1.5 * 2^mantissa rounds x y to an integer k in the low bits of the sum. Shifting k into the
        exponent gives 2^k; a polynomial gives 2^(x y - k).
        """
        kind = self.kind
        magic = 1.5 * 2.0**kind.mantissa
        shift = kind.whole(kind.mantissa)
        if not safe:
            t = self.fma(x, y, kind.constant(magic))
            r = self.fma(x, y, self.b.fneg(self.b.fsub(t, kind.constant(magic))))
            scale = self.b.shl(self.b.bitcast(t, kind.integers), shift)
            p = self.b.bitcast(self.polynomial(r, _EXP2[kind.double]), kind.integers)
            return self.b.bitcast(self.b.add(p, scale), kind.vector)
        magic += kind.bias
        t = self.fma(x, y, kind.constant(magic))
        t = self.larger(t, kind.constant(magic - kind.bias))  # 2^k = 0
        t = self.smaller(t, kind.constant(magic + kind.bias + 1))  # 2^k = inf
        r = self.fma(x, y, self.b.fneg(self.b.fsub(t, kind.constant(magic))))
        r = self.b.select(
            self.b.fcmp_unordered(">", r, kind.constant(-1)), r, kind.constant(-1)
        )  # not inf * 0
        scale = self.b.bitcast(self.b.shl(self.b.bitcast(t, kind.integers), shift), kind.vector)
        return self.b.fmul(self.polynomial(r, _EXP2[kind.double]), scale)

    def reciprocal(self, x):
        """1 / x for x from 1 to 2^120, in a third of the time of a division.

        Subtracting the bits of x from those of a constant negates the exponent: a reciprocal to 5 %. Each
        Newton step squares the error.
        """
        if self.kind.double:
            return self.b.fdiv(self.kind.constant(1), x)
        bits = self.b.sub(self.kind.whole(0x7EF311C7), self.b.bitcast(x, self.kind.integers))
        r, minus = self.b.bitcast(bits, self.kind.vector), self.b.fneg(x)
        for _ in range(3):
            r = self.fma(r, self.fma(minus, r, self.kind.constant(1)), r)
        return r

    def exp_of_minus(self, x):
        """e^-x, with x clamped to -80...80 (float64: 700); a finite number for NaN."""
        limit = 700.0 if self.kind.double else 80.0
        x = self.smaller(self.larger(x, self.kind.constant(-limit)), self.kind.constant(limit))
        return self.exp2_of_product(x, self.kind.constant(-LOG2_E), safe=False)

    def softplus_and_slope(self, x):
        """log(1 + e^x), x itself above 20, and its derivative 1 / (1 + e^-x)."""
        e = self.exp_of_minus(self.call("fabs", x))
        one, zero = self.kind.constant(1), self.kind.constant(0)
        log = self.polynomial(
            self.fma(e, self.kind.constant(2), self.kind.constant(-1)), _LOG1P[self.kind.double]
        )
        positive = self.b.fcmp_unordered(">", x, zero)  # or NaN, which then enters the sum
        value = self.fma(e, log, self.b.select(positive, x, zero))
        part = self.reciprocal(self.b.fadd(one, e))
        slope = self.b.select(positive, part, self.b.fmul(e, part))
        slope = self.b.select(self.b.fcmp_unordered("uno", x, x), x, slope)
        far = self.b.fcmp_ordered(">", x, self.kind.constant(20))
        return self.b.select(far, x, value), self.b.select(far, one, slope)

    def sigmoid(self, x):
        """1 / (1 + e^-x)."""
        return self.reciprocal(self.b.fadd(self.kind.constant(1), self.exp_of_minus(x)))

    def cos_and_sin(self, x):
        """cos and sin of 2 pi x, from half the angle: the polynomials stay within a quarter turn."""
        magic = self.kind.constant(1.5 * 2.0**self.kind.mantissa)
        r = self.b.fsub(x, self.b.fsub(self.b.fadd(x, magic), magic))
        square, two = self.b.fmul(r, r), self.kind.constant(2)
        sin = self.b.fmul(r, self.polynomial(square, _SIN[self.kind.double]))
        cos = self.polynomial(square, _COS[self.kind.double])
        twice = self.b.fmul(two, sin)
        return self.fma(self.b.fneg(twice), sin, self.kind.constant(1)), self.b.fmul(twice, cos)

    def pointer(self, context, array_type, array, offset):
        """Address of element `offset` of a flat array, without bounds check."""
        data = context.make_array(array_type)(context, self.b, array).data
        return self.b.gep(data, [offset])

    def load(self, pointer, stored):
        """`lanes` stored scalars as a vector."""
        held, align = self.kind.held(stored), stored.bitwidth // 8
        value = self.b.load(
            self.b.bitcast(pointer, ir.VectorType(held, self.kind.lanes).as_pointer()), align=align
        )
        return self.widen(value, stored, self.kind.integers, self.kind.vector)

    def store(self, pointer, value, stored, past_cache=False):
        held, align = self.kind.held(stored), stored.bitwidth // 8
        kind = ir.VectorType(held, self.kind.lanes)
        value, pointer = (
            self.narrow(value, stored, self.kind.whole, kind),
            self.b.bitcast(pointer, kind.as_pointer()),
        )
        done = self.b.store(value, pointer, align=align * self.kind.lanes if past_cache else align)
        if past_cache:
            done.set_metadata("nontemporal", self.b.module.add_metadata([ir.Constant(_INT32, 1)]))

    def widen(self, value, stored, integers, floats):
        """Convert a stored value to a float; bfloat16 is the upper half of a float32."""
        if stored == types.int16:
            wide = self.b.zext(value, integers)
            return self.b.bitcast(self.b.shl(wide, ir.Constant(integers, _every(integers, 16))), floats)
        return self.b.fpext(value, floats) if stored == types.uint16 else value

    def narrow(self, value, stored, whole, kind):
        """Convert a float to the stored type, rounded to the nearest, ties to even."""
        if stored == types.int16:
            bits = self.b.bitcast(value, whole(0).type)
            odd = self.b.and_(self.b.lshr(bits, whole(16)), whole(1))
            rounded = self.b.add(bits, self.b.add(odd, whole(0x7FFF)))
            kept = self.b.select(self.b.fcmp_unordered("uno", value, value), whole(0x7FC00000), rounded)
            return self.b.trunc(self.b.lshr(kept, whole(16)), kind)
        return self.b.fptrunc(value, kind) if stored == types.uint16 else value


def _lower(operation, method: str) -> None:
    """Define `operation` on two vectors, or a vector and a scalar."""

    @infer_global(operation)
    class _Template(AbstractTemplate):
        def generic(self, args, kws):
            kinds = [a for a in args if isinstance(a, Vector)]
            rest = [a for a in args if not isinstance(a, Vector | types.Float | types.Integer)]
            if kinds and not rest and len(args) == 2 and all(k == kinds[0] for k in kinds):
                return signature(kinds[0], *(a if isinstance(a, Vector) else kinds[0].scalar for a in args))
            return None

    def lower(context, builder, sig, args):
        emit = Emit(builder, sig.return_type.scalar)
        values = [v if isinstance(t, Vector) else emit.splat(v) for t, v in zip(sig.args, args, strict=True)]
        return getattr(builder, method)(*values)

    for shape in ((Vector, Vector), (Vector, types.Float), (types.Float, Vector)):
        lower_builtin(operation, *shape)(lower)


for _operation, _method in (
    (operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv"),
):  # fmt: skip
    _lower(_operation, _method)


@intrinsic
def lanes(typing, array):
    """Number of lanes of a vector of the array's scalars, a compile-time constant."""
    count = Kind(number(array.dtype)).lanes
    return types.intp(array), lambda context, builder, sig, args: ir.Constant(_INT64, count)


@intrinsic
def load(typing, array, offset):
    """The vector at array[offset:]; no bounds are checked, here and below."""

    def lower(context, builder, sig, args):
        emit = Emit(builder, number(array.dtype))
        return emit.load(emit.pointer(context, array, *args), array.dtype)

    return Vector(number(array.dtype))(array, types.intp), lower


@intrinsic
def store(typing, array, offset, value):
    """array[offset:] = value."""

    def lower(context, builder, sig, args):
        emit = Emit(builder, value.scalar)
        emit.store(emit.pointer(context, array, args[0], args[1]), args[2], array.dtype)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), lower


@intrinsic
def store_past_cache(typing, array, offset, value):
    """Non-temporal `store` into an aligned cache line that is not read soon; a `fence` must follow."""

    def lower(context, builder, sig, args):
        emit = Emit(builder, value.scalar)
        emit.store(emit.pointer(context, array, *args[:2]), args[2], array.dtype, past_cache=True)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), lower


@intrinsic
def get(typing, array, offset):
    """array[offset] as a number."""
    scalar = number(array.dtype)

    def lower(context, builder, sig, args):
        emit = Emit(builder, scalar)
        pointer = emit.pointer(context, array, *args)
        held = emit.kind.held(array.dtype)
        value = builder.load(builder.bitcast(pointer, held.as_pointer()), align=array.dtype.bitwidth // 8)
        return emit.widen(value, array.dtype, emit.kind.integer, emit.kind.element)

    return scalar(array, types.intp), lower


@intrinsic
def put(typing, array, offset, value):
    """array[offset] = value."""
    scalar = number(array.dtype)

    def lower(context, builder, sig, args):
        emit = Emit(builder, scalar)
        pointer = emit.pointer(context, array, args[0], args[1])
        held = emit.kind.held(array.dtype)
        stored = emit.narrow(args[2], array.dtype, lambda x: ir.Constant(emit.kind.integer, x), held)
        builder.store(stored, builder.bitcast(pointer, held.as_pointer()), align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, scalar), lower


@intrinsic
def address(typing, array, offset):
    """The memory address of array[offset]."""

    def lower(context, builder, sig, args):
        return builder.ptrtoint(Emit(builder, types.float32).pointer(context, array, *args), _INT64)

    return types.int64(array, types.intp), lower


@intrinsic
def array_at(typing, address, size, like):
    """The flat array of so many scalars, of the type of those of `like`, at a memory address."""
    kind = types.Array(like.dtype, 1, "C")

    def lower(context, builder, sig, args):
        array, element = context.make_array(kind)(context, builder), context.get_data_type(kind.dtype)
        itemsize = ir.Constant(_INT64, context.get_abi_sizeof(element))
        data = builder.inttoptr(args[0], element.as_pointer())
        arrayobj.populate_array(array, data, [args[1]], [itemsize], itemsize, None)
        return array._getvalue()

    return kind(types.int64, types.int64, like), lower


@intrinsic
def prefetch(typing, address):
    """Prefetch the cache line at a memory address, which need not be valid."""

    def lower(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _INT32, _INT32, _INT32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(
            function, [pointer, ir.Constant(_INT32, 0), ir.Constant(_INT32, 2), ir.Constant(_INT32, 1)]
        )
        return context.get_dummy_value()

    return types.void(types.int64), lower


@intrinsic
def splat(typing, array, offset):
    """array[offset] in every lane."""

    def lower(context, builder, sig, args):
        emit = Emit(builder, array.dtype)
        return emit.splat(builder.load(emit.pointer(context, array, *args), align=emit.kind.bytes))

    return Vector(array.dtype)(array, types.intp), lower


@intrinsic
def zero(typing, array):
    """0 in every lane of a vector of the array's scalars."""
    kind = Kind(array.dtype)
    return Vector(array.dtype)(array), lambda context, builder, sig, args: kind.constant(0)


@intrinsic
def fma(typing, x, y, z):
    """x y + z, rounded once."""
    return x(x, x, x), lambda context, builder, sig, args: Emit(builder, x.scalar).fma(*args)


@intrinsic
def line(typing, x, y):
    """max(0, 1 + x y); NaN where x y is NaN."""

    def lower(context, builder, sig, args):
        emit = Emit(builder, x.scalar)
        return emit.larger(emit.kind.constant(0), emit.fma(*args, emit.kind.constant(1)))

    return x(x, x), lower


@intrinsic
def exp2_product(typing, x, y):
    """2^(x y) for |x y| below 126 (float64: 1022); `magnitude_below` checks that."""

    def lower(context, builder, sig, args):
        return Emit(builder, x.scalar).exp2_of_product(*args, safe=False)

    return x(x, x), lower


@intrinsic
def exp2_product_safe(typing, x, y):
    """2^(x y) for any x and y."""

    def lower(context, builder, sig, args):
        return Emit(builder, x.scalar).exp2_of_product(*args, safe=True)

    return x(x, x), lower


@intrinsic
def softplus_and_slope(typing, x):
    """(log(1 + e^x), 1 / (1 + e^-x))."""

    def lower(context, builder, sig, args):
        return context.make_tuple(builder, sig.return_type, Emit(builder, x.scalar).softplus_and_slope(*args))

    return types.UniTuple(x, 2)(x), lower


@intrinsic
def sigmoid(typing, x):
    """1 / (1 + e^-x), and a finite number for NaN: multiply by x to keep NaN."""
    return x(x), lambda context, builder, sig, args: Emit(builder, x.scalar).sigmoid(*args)


@intrinsic
def cos_and_sin(typing, x):
    """(cos(2 pi x), sin(2 pi x))."""

    def lower(context, builder, sig, args):
        return context.make_tuple(builder, sig.return_type, Emit(builder, x.scalar).cos_and_sin(*args))

    return types.UniTuple(x, 2)(x), lower


@intrinsic
def largest_magnitude(typing, x, y):
    """max(|x|, y), NaN if either is NaN."""

    def lower(context, builder, sig, args):
        emit = Emit(builder, x.scalar)
        return emit.call("maximum", emit.call("fabs", args[0]), args[1])

    return x(x, x), lower


@intrinsic
def magnitude_below(typing, x, limits):
    """Whether |x| < limits in every lane (false if one is NaN)."""

    def lower(context, builder, sig, args):
        emit = Emit(builder, x.scalar)
        bits = builder.fcmp_ordered("<", emit.call("fabs", args[0]), args[1])
        mask = builder.bitcast(bits, ir.IntType(emit.kind.lanes))
        return builder.icmp_unsigned("==", mask, ir.Constant(mask.type, -1))

    return types.boolean(x, x), lower


@intrinsic
def claim(typing, counter):
    """Return counter[0] and increment it atomically: each number goes to one thread only."""

    def lower(context, builder, sig, args):
        pointer = context.make_array(counter)(context, builder, args[0]).data
        return builder.atomic_rmw("add", pointer, ir.Constant(_INT64, 1), "monotonic")

    return types.int64(counter), lower


@intrinsic
def fence(typing):
    """Make all earlier stores, non-temporal ones too, visible to every thread."""

    def lower(context, builder, sig, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), lower
