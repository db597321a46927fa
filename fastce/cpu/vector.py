"""A portable SIMD vector for numba: what LLVM turns into AVX2, AVX-512 or NEON instructions.

A vector holds a fixed number of lanes whatever the processor, so that the order of additions, and
with it every bit of a result, is the program's choice.  LLVM splits a vector into as many registers
as the processor needs.  Floating-point operations are strict IEEE (no fast-math): NaN arrives.

Rows are read and written through a *base*, a pointer to (or array that starts with) the first
number.  Positions are byte offsets from there, so that any strides will do.  16-bit floats travel
as their bits: a base of uint16 holds float16, a base of int16 holds bfloat16.
"""

import operator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

# Four AVX2 registers, two of AVX-512, eight of NEON or SSE.  Wider than one register on purpose:
# LLVM lays out a vector operation register by register, so that the long dependency chain of exp
# runs in as many interleaved copies; with fewer the multipliers wait (llvm-mca for Zen 3: 8.4
# cycles for eight float32 with 512 bits, 5.5 with 1024, where 5 is the limit of the ports).
BITS = 1024


class VectorType(types.Type):  # type: ignore[misc]
    """`lanes` numbers of one scalar type, held in registers."""

    def __init__(self, element: types.Type, lanes: int) -> None:
        self.element = element
        self.lanes = lanes
        super().__init__(name=f"vector({lanes} x {element})")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: VectorType) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(_ELEMENTS[fe_type.element], fe_type.lanes))


_I1, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
_ELEMENTS = {
    types.float64: ir.DoubleType(),
    types.float32: ir.FloatType(),
    types.boolean: _I1,
}
# What a base of each storage type holds once it is loaded.
_COMPUTE = {
    types.float64: types.float64,
    types.float32: types.float32,
    types.uint16: types.float32,  # float16
    types.int16: types.float32,  # bfloat16
}


def _llvm(ty: types.Type) -> ir.Type:
    if isinstance(ty, VectorType):
        return ir.VectorType(_ELEMENTS[ty.element], ty.lanes)
    return _ELEMENTS[ty]


def _element(ty: types.Type) -> types.Type:
    return ty.element if isinstance(ty, VectorType) else ty


def _like(ty: types.Type, element: types.Type) -> types.Type:
    """The type shaped like `ty` with other elements."""
    return VectorType(element, ty.lanes) if isinstance(ty, VectorType) else element


def _bits_type(ty: types.Type) -> ir.Type:
    """Integers as wide as the floats of `ty`, shaped like it."""
    word = _I64 if _element(ty) == types.float64 else _I32
    return ir.VectorType(word, ty.lanes) if isinstance(ty, VectorType) else word


def _constant(value: float, ty: ir.Type) -> ir.Constant:
    if isinstance(ty, ir.VectorType):
        return ir.Constant(ty, [value] * ty.count)
    return ir.Constant(ty, value)


def _broadcast(builder: Any, scalar: Any, lanes: int) -> Any:
    vector = ir.VectorType(scalar.type, lanes)
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, _I32(0))
    order = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    return builder.shuffle_vector(single, ir.Constant(vector, ir.Undefined), order)


def _coerce(context: Any, builder: Any, value: Any, source: types.Type, target: types.Type) -> Any:
    """Turn a scalar into the scalar or vector type `target`."""
    if source == target:
        return value
    value = context.cast(builder, value, source, _element(target))
    return _broadcast(builder, value, target.lanes) if isinstance(target, VectorType) else value


def _call(builder: Any, name: str, result: ir.Type, *values: Any) -> Any:
    function_type = ir.FunctionType(result, [value.type for value in values])
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, function_type, name)
    return builder.call(function, values)


def _suffix(ty: ir.Type) -> str:
    if isinstance(ty, ir.VectorType):
        return f"v{ty.count}{_suffix(ty.element)}"
    if isinstance(ty, ir.IntType):
        return f"i{ty.width}"
    return "f64" if isinstance(ty, ir.DoubleType) else "f32"


# Arithmetic and comparison -----------------------------------------------------------------------


def _binary(symbol: Any, emit: Any, boolean: bool) -> None:
    """Give `symbol` a meaning between vectors, or a vector and a number."""

    def common(args: tuple[types.Type, ...]) -> VectorType | None:
        vectors = [a for a in args if isinstance(a, VectorType)]
        if len(args) != 2 or not vectors:
            return None
        others = [a for a in args if a != vectors[0]]
        return vectors[0] if all(isinstance(a, types.Number) for a in others) else None

    @infer_global(symbol)
    class Template(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: tuple[types.Type, ...], kws: dict[str, types.Type]) -> Any:
            vector = common(args)
            if vector is None or kws:
                return None
            return signature(_like(vector, types.boolean) if boolean else vector, *args)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = common(sig.args)
        values = [
            _coerce(context, builder, v, t, vector) for v, t in zip(args, sig.args, strict=True)
        ]
        return emit(builder, *values)

    for left, right in (
        (VectorType, VectorType),
        (VectorType, types.Number),
        (types.Number, VectorType),
    ):
        lower_builtin(symbol, left, right)(lower)


_binary(operator.add, lambda b, x, y: b.fadd(x, y), False)
_binary(operator.sub, lambda b, x, y: b.fsub(x, y), False)
_binary(operator.mul, lambda b, x, y: b.fmul(x, y), False)
_binary(operator.truediv, lambda b, x, y: b.fdiv(x, y), False)
_binary(operator.lt, lambda b, x, y: b.fcmp_ordered("<", x, y), True)
_binary(operator.gt, lambda b, x, y: b.fcmp_ordered(">", x, y), True)
_binary(operator.le, lambda b, x, y: b.fcmp_ordered("<=", x, y), True)
_binary(operator.ge, lambda b, x, y: b.fcmp_ordered(">=", x, y), True)
_binary(operator.eq, lambda b, x, y: b.fcmp_ordered("==", x, y), True)
_binary(operator.ne, lambda b, x, y: b.fcmp_unordered("!=", x, y), True)


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c, rounded once where the processor can; numbers spread to the lanes of a vector."""
    ty = next((t for t in (a, b, c) if isinstance(t, VectorType)), types.float64)

    def codegen(context, builder, sig, args):
        values = [_coerce(context, builder, v, t, ty) for v, t in zip(args, sig.args, strict=True)]
        llvm = _llvm(ty)
        return _call(builder, f"llvm.fmuladd.{_suffix(llvm)}", llvm, *values)

    return ty(a, b, c), codegen


@intrinsic
def where(typingctx, condition, yes, no):
    """Choose lane by lane; with a plain boolean, choose one of two numbers without a branch."""
    ty = next((t for t in (yes, no) if isinstance(t, VectorType)), None)
    if ty is None:
        ty = typingctx.unify_types(yes, no)
        if isinstance(condition, VectorType):
            ty = VectorType(ty, condition.lanes)

    def codegen(context, builder, sig, args):
        chosen = [
            _coerce(context, builder, v, t, ty) for v, t in zip(args[1:], sig.args[1:], strict=True)
        ]
        return builder.select(args[0], *chosen)

    return ty(condition, yes, no), codegen


@intrinsic
def both(typingctx, a, b):
    """Lane-wise and of two conditions."""
    return a(a, b), lambda context, builder, sig, args: builder.and_(*args)


@intrinsic
def any_lane(typingctx, condition):
    """Whether the condition holds in one lane at least."""

    def codegen(context, builder, sig, args):
        word = ir.IntType(condition.lanes)
        bits = builder.bitcast(args[0], word)
        return builder.icmp_unsigned("!=", bits, ir.Constant(word, 0))

    return types.boolean(condition), codegen


@intrinsic
def first_lane(typingctx, condition):
    """Number of the first lane where the condition holds; the number of lanes if nowhere."""

    def codegen(context, builder, sig, args):
        word = ir.IntType(condition.lanes)
        bits = builder.bitcast(args[0], word)
        count = _call(builder, f"llvm.cttz.i{condition.lanes}", word, bits, _I1(0))
        return builder.zext(count, _I64)

    return types.int64(condition), codegen


# Lanes -------------------------------------------------------------------------------------------


@intrinsic
def splat(typingctx, value, like):
    """`value` in every lane of a vector (or a scalar) shaped and typed like `like`."""

    def codegen(context, builder, sig, args):
        return _coerce(context, builder, args[0], value, like)

    return like(value, like), codegen


@intrinsic
def lanes(typingctx, like):
    """How many lanes a vector has, a constant of the compiled code."""
    count = like.lanes

    def codegen(context, builder, sig, args):
        return _I64(count)

    return types.int64(like), codegen


@intrinsic
def lane_numbers(typingctx, like):
    """0, 1, 2, ... in the lanes."""

    def codegen(context, builder, sig, args):
        return ir.Constant(_llvm(like), [float(i) for i in range(like.lanes)])

    return like(like), codegen


@intrinsic
def extract(typingctx, vector, lane):
    """The number in one lane."""

    def codegen(context, builder, sig, args):
        return builder.extract_element(*args)

    return vector.element(vector, lane), codegen


@intrinsic
def insert(typingctx, vector, lane, value):
    """The vector with another number in one lane."""

    def codegen(context, builder, sig, args):
        number = _coerce(context, builder, args[2], value, vector.element)
        return builder.insert_element(args[0], number, args[1])

    return vector(vector, lane, value), codegen


def _halves(builder: Any, vector: Any) -> tuple[Any, Any]:
    count = vector.type.count
    undefined = ir.Constant(vector.type, ir.Undefined)
    low, high = (
        builder.shuffle_vector(
            vector, undefined, ir.Constant(ir.VectorType(_I32, count // 2), list(part))
        )
        for part in (range(count // 2), range(count // 2, count))
    )
    return low, high


def _fold(combine: Any) -> Any:
    """Reduce a vector by halves, in an order that is the same everywhere."""

    def codegen(context, builder, sig, args):
        vector = args[0]
        while vector.type.count > 1:
            vector = combine(builder, *_halves(builder, vector))
        return builder.extract_element(vector, _I32(0))

    return codegen


def _larger(builder: Any, x: Any, y: Any) -> Any:
    # The form of x86's max instruction: NaN in x is passed over, which `llvm.maxnum` does slower.
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


@intrinsic
def total(typingctx, vector):
    """Sum of the lanes."""
    return vector.element(vector), _fold(lambda builder, x, y: builder.fadd(x, y))


@intrinsic
def largest(typingctx, vector):
    """Largest of the lanes, none of which may be NaN."""
    return vector.element(vector), _fold(_larger)


@intrinsic
def maximum(typingctx, x, y):
    """Lane-wise maximum; y where x is NaN."""
    return y(x, y), lambda context, builder, sig, args: _larger(builder, *args)


@intrinsic
def convert(typingctx, value, like):
    """The same numbers with the elements of `like`: widened, rounded or as they are."""
    source, target = _element(value), _element(like)

    def codegen(context, builder, sig, args):
        return _resize(builder, args[0], source, target)

    return _like(value, target)(value, like), codegen


# Powers of two -----------------------------------------------------------------------------------


@intrinsic
def constant(typingctx, name, like):
    """The constant called `name` for the element type of `like`, from CONSTANTS."""
    if not isinstance(name, types.StringLiteral):
        return None  # numba tries again with the literal
    value = CONSTANTS[_element(like)][name.literal_value]
    ty = _element(like)

    def codegen(context, builder, sig, args):
        return ir.Constant(_llvm(ty), value)

    return ty(name, like), codegen


@intrinsic
def polynomial(typingctx, name, x):
    """Value at x of the polynomial called `name`, lowest coefficient first.

    Horner's rule in x**2 over pairs of terms: as many multiplications as in x and one more, but a
    dependency chain half as long, which is what the processor waits for (12% of a whole pass).
    """
    if not isinstance(name, types.StringLiteral):
        return None  # numba tries again with the literal
    coefficients = CONSTANTS[_element(x)][name.literal_value]

    def codegen(context, builder, sig, args):
        llvm = _llvm(x)

        def multiply_add(a, b, c):
            return _call(builder, f"llvm.fmuladd.{_suffix(llvm)}", llvm, a, b, c)

        pairs = []
        for k in range(0, len(coefficients), 2):
            low, *high = (_constant(c, llvm) for c in coefficients[k : k + 2])
            if high and coefficients[k + 1] == 1.0:
                pairs.append(builder.fadd(args[1], low))
            else:
                pairs.append(multiply_add(high[0], args[1], low) if high else low)
        square = builder.fmul(args[1], args[1])
        value = pairs.pop()
        while pairs:
            value = multiply_add(value, square, pairs.pop())
        return value

    return x(name, x), codegen


@intrinsic
def less_ln2(typingctx, x, k):
    """x - k ln 2, with ln 2 in the parts that CONSTANTS gives."""
    parts = CONSTANTS[_element(x)]["LN2_PARTS"]

    def codegen(context, builder, sig, args):
        value, llvm = args[0], _llvm(x)
        for part in parts:
            name = f"llvm.fmuladd.{_suffix(llvm)}"
            value = _call(builder, name, llvm, args[1], _constant(-part, llvm), value)
        return value

    return x(x, k), codegen


@intrinsic
def power_of_two(typingctx, rounded):
    """2**k, where adding ROUND and the exponent bias has left k's biased form in the low bits."""

    def codegen(context, builder, sig, args):
        words = _bits_type(rounded)
        mantissa = 52 if _element(rounded) == types.float64 else 23
        bits = builder.shl(builder.bitcast(args[0], words), _constant(mantissa, words))
        return builder.bitcast(bits, _llvm(rounded))

    return rounded(rounded), codegen


@intrinsic
def exponent(typingctx, x):
    """The k, as a float64, with x * 2**-k in [sqrt(1/2), sqrt(2)); x is float64 and at least 1."""

    def codegen(context, builder, sig, args):
        words = _bits_type(x)
        root = int(np.float64(np.sqrt(0.5)).view(np.int64))
        k = builder.sub(builder.bitcast(args[0], words), _constant(root, words))
        k = builder.lshr(k, _constant(52, words))
        # As the low bits of 2**52 the integer becomes a float without a conversion instruction.
        k = builder.or_(k, _constant(int(np.float64(2.0**52).view(np.int64)), words))
        return builder.fsub(builder.bitcast(k, _llvm(x)), _constant(2.0**52, _llvm(x)))

    return x(x), codegen


# Memory ------------------------------------------------------------------------------------------


@intrinsic
def address(typingctx, base):
    """The base as a bare pointer; None stays None.

    Kernels turn their bases into pointers first: an array handed from function to function has its
    references counted, row by row, in a counter that all threads share.
    """
    if base is types.none:
        return types.none(base), lambda context, builder, sig, args: context.get_dummy_value()
    pointer = types.CPointer(base.dtype)

    def codegen(context, builder, sig, args):
        return context.make_array(base)(context, builder, args[0]).data

    return pointer(base), codegen


def _pointer(context: Any, builder: Any, base_type: Any, base: Any, offset: Any) -> Any:
    if isinstance(base_type, types.Array):
        base = context.make_array(base_type)(context, builder, base).data
    return builder.gep(base, [offset], source_etype=ir.IntType(8))


def _write(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=1)


def _decode(builder: Any, raw: Any, storage: types.Type) -> Any:
    """Stored bits to the numbers that are computed with."""
    count = raw.type.count if isinstance(raw.type, ir.VectorType) else None

    def shaped(ty: ir.Type) -> ir.Type:
        return ty if count is None else ir.VectorType(ty, count)

    if storage == types.uint16:
        return builder.fpext(builder.bitcast(raw, shaped(ir.HalfType())), shaped(ir.FloatType()))
    if storage == types.int16:
        bits = builder.zext(raw, shaped(_I32))
        bits = builder.shl(bits, _constant(16, shaped(_I32)))
        return builder.bitcast(bits, shaped(ir.FloatType()))
    return raw


def _encode(builder: Any, value: Any, storage: types.Type) -> Any:
    """Numbers to stored bits, rounded to nearest even."""
    count = value.type.count if isinstance(value.type, ir.VectorType) else None

    def shaped(ty: ir.Type) -> ir.Type:
        return ty if count is None else ir.VectorType(ty, count)

    if storage == types.uint16:
        return builder.bitcast(builder.fptrunc(value, shaped(ir.HalfType())), shaped(_I16))
    if storage == types.int16:
        words = shaped(_I32)
        bits = builder.bitcast(value, words)
        odd = builder.and_(builder.lshr(bits, _constant(16, words)), _constant(1, words))
        rounded = builder.add(builder.add(bits, odd), _constant(0x7FFF, words))
        quiet = builder.or_(bits, _constant(0x400000, words))  # rounding could turn NaN to inf
        bits = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
        return builder.trunc(builder.lshr(bits, _constant(16, words)), shaped(_I16))
    return value


def _resize(builder: Any, value: Any, source: types.Type, target: types.Type) -> Any:
    """float32 to float64 or back."""
    element = _ELEMENTS[target]
    vector = isinstance(value.type, ir.VectorType)
    llvm = ir.VectorType(element, value.type.count) if vector else element
    if source == target:
        return value
    return builder.fpext(value, llvm) if target == types.float64 else builder.fptrunc(value, llvm)


def _storage_type(storage: types.Type) -> ir.Type:
    return _ELEMENTS.get(storage, _I16)


def _storage_size(storage: types.Type) -> int:
    return int(storage.bitwidth) // 8


def _processor_fuses() -> bool:
    """Whether the processor that numba compiles for multiplies and adds in one rounding."""
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return "+fma" in features.split(",") or triple.startswith(("aarch64", "arm64"))


FUSED = _processor_fuses()


def _vector_of(storage: types.Type) -> VectorType:
    element = _COMPUTE[storage]
    return VectorType(element, BITS // element.bitwidth)


@intrinsic
def zeros(typingctx, base):
    """The vector of zeros that fits what is loaded from `base`."""
    ty = _vector_of(base.dtype)

    def codegen(context, builder, sig, args):
        return _constant(0.0, _llvm(ty))

    return ty(base), codegen


@intrinsic
def item_size(typingctx, base):
    """Bytes of one stored number, a constant of the compiled code."""
    size = _storage_size(base.dtype)
    return types.int64(base), lambda context, builder, sig, args: _I64(size)


@intrinsic
def load(typingctx, base, offset, step, like):
    """A vector like `like` of the numbers from `offset`, `step` bytes apart (None: adjacent)."""
    storage = base.dtype

    def codegen(context, builder, sig, args):
        item = _storage_type(storage)
        start = _pointer(context, builder, base, args[0], args[1])
        if step is types.none:
            raw = builder.load(start, typ=ir.VectorType(item, like.lanes), align=1)
        else:
            raw = ir.Constant(ir.VectorType(item, like.lanes), ir.Undefined)
            for lane in range(like.lanes):
                distance = builder.mul(args[2], _I64(lane))
                pointer = builder.gep(start, [distance], source_etype=ir.IntType(8))
                number = builder.load(pointer, typ=item, align=1)
                raw = builder.insert_element(raw, number, _I32(lane))
        numbers = _decode(builder, raw, storage)
        return _resize(builder, numbers, _COMPUTE[storage], like.element)

    return like(base, types.int64, step, like), codegen


@intrinsic
def prefetch(typingctx, base, offset, step, like):
    """Ask for the memory of a vector that will be loaded soon, which need not exist."""
    size = _storage_size(base.dtype) * like.lanes

    def codegen(context, builder, sig, args):
        if step is types.none:
            start = _pointer(context, builder, base, args[0], args[1])
            hints = (_I32(0), _I32(3), _I32(1))  # to read, into the nearest cache, as data
            for line in range(0, size, 64):
                pointer = builder.gep(start, [_I64(line)], source_etype=ir.IntType(8))
                _call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *hints)
        return context.get_dummy_value()

    return types.void(base, types.int64, step, like), codegen


@intrinsic
def store(typingctx, base, offset, step, value):
    """Write a vector of numbers at `offset`, `step` bytes apart (None: side by side)."""
    storage = base.dtype

    def codegen(context, builder, sig, args):
        start = _pointer(context, builder, base, args[0], args[1])
        raw = _encode(builder, args[3], storage)
        if step is types.none:
            _write(builder, raw, start)
        else:
            for lane in range(value.lanes):
                distance = builder.mul(args[2], _I64(lane))
                pointer = builder.gep(start, [distance], source_etype=ir.IntType(8))
                _write(builder, builder.extract_element(raw, _I32(lane)), pointer)
        return context.get_dummy_value()

    return types.void(base, types.int64, step, value), codegen


@intrinsic
def load_number(typingctx, base, offset):
    """The one number at `offset`, as float64."""
    storage = base.dtype

    def codegen(context, builder, sig, args):
        pointer = _pointer(context, builder, base, args[0], args[1])
        raw = builder.load(pointer, typ=_storage_type(storage), align=1)
        number = _decode(builder, raw, storage)
        return _resize(builder, number, _COMPUTE[storage], types.float64)

    return types.float64(base, types.int64), codegen


@intrinsic
def store_number(typingctx, base, offset, value):
    """Write one number at `offset`."""
    storage = base.dtype

    def codegen(context, builder, sig, args):
        number = _coerce(context, builder, args[2], value, _COMPUTE[storage])
        pointer = _pointer(context, builder, base, args[0], args[1])
        _write(builder, _encode(builder, number, storage), pointer)
        return context.get_dummy_value()

    return types.void(base, types.int64, value), codegen


@intrinsic
def claim(typingctx, counter):
    """Take the next number of a counter that several threads share."""

    def codegen(context, builder, sig, args):
        pointer = context.make_array(counter)(context, builder, args[0]).data
        return builder.atomic_rmw("add", pointer, _I64(1), "monotonic")

    return types.int64(counter), codegen


_LN2 = 0.6931471805599453
_LN2_FLOAT32 = 0.693147182464599609375
_EXP_FLOAT64 = (
    1.0,
    1.0,
    0.50000000000000055725,
    0.16666666666657302303,
    0.041666666666573635121,
    0.0083333333377154854032,
    0.001388888893234104522,
    0.00019841261491360821582,
    0.000024801504510721327167,
    2.7564254942741234141e-6,
    2.7626296685818641824e-7,
    2.298131157187549447e-8,
)

# ROUND: adding it leaves the nearest integer in the low bits.  BIAS: of the exponent.
# LIFT: the power that leaves room above for sums and below for the smallest terms; LIFTED: two to
# it.  TINY: the smallest normal number.
# LN2_PARTS: a first part so short that k times it is exact for |k| < 2**11, and the rest.  In
# float32 with fused multiply-adds one part will do, an instruction less: its rounding error acts
# as if every logit were larger by a factor 1 + 2.7e-9, and LN2_EXCESS lets the maximum share it.
# EXP: minimax polynomials of exp on [-ln2/2, ln2/2] (Remez; error 2.6e-9 in float32, 1.8e-17 in
# float64), whose first two coefficients are exactly one.  EXPM1: of (exp(x) - 1) / x there.
# ATANH: of (atanh(s) / s - 1) / s**2 in s**2 up to tan(pi / 8)**4 (4.6e-18).
CONSTANTS: dict[Any, dict[str, Any]] = {
    types.float32: {
        "ROUND": 1.5 * 2.0**23,
        "BIAS": 127.0,
        "LIFT": 64.0,
        "LIFTED": 2.0**64,
        "TINY": 2.0**-126,
        "LOG2E": 1.4426950408889634,
        "LN2": _LN2,
        "LN2_PARTS": (_LN2_FLOAT32,) if FUSED else (0.693115234375, 3.1946184945309415e-05),
        "LN2_EXCESS": _LN2_FLOAT32 - _LN2 if FUSED else 0.0,
        "EXP": (
            1.0,
            1.0,
            0.50000004343796659085,
            0.16666365440108084467,
            0.041664777281619289101,
            0.0083790112519003688768,
            0.0014061241289936536761,
        ),
    },
    types.float64: {
        "ROUND": 1.5 * 2.0**52,
        "BIAS": 1023.0,
        "LIFT": 512.0,
        "LIFTED": 2.0**512,
        "TINY": 2.0**-1022,
        "LOG2E": 1.4426950408889634,
        "LN2": _LN2,
        "LN2_PARTS": (0.6931471805601177, -1.7239444525614835e-13),
        "LN2_EXCESS": 0.0,
        "EXP": _EXP_FLOAT64,
        "EXPM1": _EXP_FLOAT64[1:],
        "ATANH": (
            0.33333333333333348442,
            0.19999999999949721617,
            0.14285714313001634371,
            0.11111105565129938514,
            0.090914447278374730211,
            0.076658553091053857215,
            0.07308292712444311767,
        ),
    },
}
