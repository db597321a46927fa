"""A portable SIMD vector for numba: what LLVM turns into AVX2, AVX-512 or NEON instructions.

A vector holds a fixed number of lanes whatever the processor, so that the order of additions, and
with it every bit of a result, is the program's choice.  LLVM splits a vector into as many registers
as the processor needs.  Floating-point operations are strict IEEE (no fast-math): NaN arrives.
"""

import operator
from typing import Any

from llvmlite import ir
from numba import types
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
        super().__init__(dmm, fe_type, ir.VectorType(ELEMENTS[fe_type.element], fe_type.lanes))


I1, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
ELEMENTS = {
    types.float64: ir.DoubleType(),
    types.float32: ir.FloatType(),
    types.boolean: I1,
}


def llvm_type(ty: types.Type) -> ir.Type:
    """The LLVM type of a vector or a number."""
    if isinstance(ty, VectorType):
        return ir.VectorType(ELEMENTS[ty.element], ty.lanes)
    return ELEMENTS[ty]


def element_of(ty: types.Type) -> types.Type:
    """The type of the numbers in a vector; a number has its own."""
    return ty.element if isinstance(ty, VectorType) else ty


def _like(ty: types.Type, element: types.Type) -> types.Type:
    """The type shaped like `ty` with other elements."""
    return VectorType(element, ty.lanes) if isinstance(ty, VectorType) else element


def bits_type(ty: types.Type) -> ir.Type:
    """Integers as wide as the floats of `ty`, shaped like it."""
    word = I64 if element_of(ty) == types.float64 else I32
    return ir.VectorType(word, ty.lanes) if isinstance(ty, VectorType) else word


def filled(value: float, ty: ir.Type) -> ir.Constant:
    """A constant of an LLVM type, in every lane if it is a vector."""
    if isinstance(ty, ir.VectorType):
        return ir.Constant(ty, [value] * ty.count)
    return ir.Constant(ty, value)


def _broadcast(builder: Any, scalar: Any, lanes: int) -> Any:
    vector = ir.VectorType(scalar.type, lanes)
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
    order = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return builder.shuffle_vector(single, ir.Constant(vector, ir.Undefined), order)


def coerce(context: Any, builder: Any, value: Any, source: types.Type, target: types.Type) -> Any:
    """Turn a scalar into the scalar or vector type `target`."""
    if source == target:
        return value
    value = context.cast(builder, value, source, element_of(target))
    return _broadcast(builder, value, target.lanes) if isinstance(target, VectorType) else value


def call_llvm(builder: Any, name: str, result: ir.Type, *values: Any) -> Any:
    """Call an LLVM intrinsic."""
    function_type = ir.FunctionType(result, [value.type for value in values])
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, function_type, name)
    return builder.call(function, values)


def suffix(ty: ir.Type) -> str:
    """What the names of LLVM intrinsics for a type end with."""
    if isinstance(ty, ir.VectorType):
        return f"v{ty.count}{suffix(ty.element)}"
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
            coerce(context, builder, v, t, vector) for v, t in zip(args, sig.args, strict=True)
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
        values = [coerce(context, builder, v, t, ty) for v, t in zip(args, sig.args, strict=True)]
        llvm = llvm_type(ty)
        return call_llvm(builder, f"llvm.fmuladd.{suffix(llvm)}", llvm, *values)

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
            coerce(context, builder, v, t, ty) for v, t in zip(args[1:], sig.args[1:], strict=True)
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
        count = call_llvm(builder, f"llvm.cttz.i{condition.lanes}", word, bits, I1(0))
        return builder.zext(count, I64)

    return types.int64(condition), codegen


# Lanes -------------------------------------------------------------------------------------------


@intrinsic
def splat(typingctx, value, like):
    """`value` in every lane of a vector (or a scalar) shaped and typed like `like`."""

    def codegen(context, builder, sig, args):
        return coerce(context, builder, args[0], value, like)

    return like(value, like), codegen


@intrinsic
def lanes(typingctx, like):
    """How many lanes a vector has, a constant of the compiled code."""
    count = like.lanes

    def codegen(context, builder, sig, args):
        return I64(count)

    return types.int64(like), codegen


@intrinsic
def lane_numbers(typingctx, like):
    """0, 1, 2, ... in the lanes."""

    def codegen(context, builder, sig, args):
        return ir.Constant(llvm_type(like), [float(i) for i in range(like.lanes)])

    return like(like), codegen


@intrinsic
def extract(typingctx, vector, lane):
    """The number in one lane."""

    def codegen(context, builder, sig, args):
        return builder.extract_element(*args)

    return vector.element(vector, lane), codegen


@intrinsic
def every_fourth(typingctx, vector, first):
    """The lanes `first`, `first` + 4, `first` + 8, ... as a vector; `first` is a literal."""
    if not isinstance(first, types.IntegerLiteral):
        return None  # numba tries again with the literal
    ty = VectorType(vector.element, vector.lanes // 4)

    def codegen(context, builder, sig, args):
        order = list(range(first.literal_value, vector.lanes, 4))
        undefined = ir.Constant(args[0].type, ir.Undefined)
        return builder.shuffle_vector(
            args[0], undefined, ir.Constant(ir.VectorType(I32, len(order)), order)
        )

    return ty(vector, first), codegen


@intrinsic
def insert(typingctx, vector, lane, value):
    """The vector with another number in one lane."""

    def codegen(context, builder, sig, args):
        number = coerce(context, builder, args[2], value, vector.element)
        return builder.insert_element(args[0], number, args[1])

    return vector(vector, lane, value), codegen


def _halves(builder: Any, vector: Any) -> tuple[Any, Any]:
    count = vector.type.count
    undefined = ir.Constant(vector.type, ir.Undefined)
    low, high = (
        builder.shuffle_vector(
            vector, undefined, ir.Constant(ir.VectorType(I32, count // 2), list(part))
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
        return builder.extract_element(vector, I32(0))

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
    source, target = element_of(value), element_of(like)

    def codegen(context, builder, sig, args):
        return resize(builder, args[0], source, target)

    return _like(value, target)(value, like), codegen


def resize(builder: Any, value: Any, source: types.Type, target: types.Type) -> Any:
    """float32 to float64 or back."""
    element = ELEMENTS[target]
    vector = isinstance(value.type, ir.VectorType)
    llvm = ir.VectorType(element, value.type.count) if vector else element
    if source == target:
        return value
    return builder.fpext(value, llvm) if target == types.float64 else builder.fptrunc(value, llvm)
