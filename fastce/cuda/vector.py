"""What a GPU thread does that Python cannot say: shuffles, barriers, ex2, bit patterns.

How it gets at memory is in `memory`.  Under numba's simulator (NUMBA_ENABLE_CUDASIM=1) the same
names come from `simulated`.
"""

from llvmlite import ir
from numba import cuda
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

from fastce.cuda.memory import F16, F32, F64, I16, I32, I64, asm

SIMULATED = False
WARP = 32


def device(function):
    """Make a device function that always becomes part of its caller."""
    return cuda.jit(device=True, inline="always")(function)


def _register(name):
    """Read a special register, anew each time.

    Kernels compute where they stand twice rather than keep it in registers while they need these
    for other things.
    """

    @intrinsic
    def read(typingctx):
        def codegen(context, builder, signature, args):
            return asm(builder, I32, f"mov.u32 $0, %{name};", "=r", effects=True)

        return types.int32(), codegen

    return read


thread, block = _register("tid.x"), _register("ctaid.x")
# Of a cluster of blocks: its number, its size, and the number of this block in it.
cluster, cluster_size = _register("clusterid.x"), _register("cluster_nctarank")
cluster_rank = _register("cluster_ctarank")


def _meeting(text):
    """Device function: threads meet, and see what they have stored before."""

    @intrinsic
    def meet(typingctx):
        def codegen(context, builder, signature, args):
            asm(builder, ir.VoidType(), text, "~{memory}", convergent=True)
            return context.get_dummy_value()

        return types.none(), codegen

    return meet


# Wait for all threads of the block, or for all lanes of the warp.
barrier, warp_barrier = _meeting("bar.sync 0;"), _meeting("bar.warp.sync 0xffffffff;")
# Tell the other blocks of the cluster that this thread has got here and stored what it has; wait
# until all threads of the cluster have arrived.
cluster_arrive = _meeting("barrier.cluster.arrive.release;")
cluster_wait = _meeting("barrier.cluster.wait.acquire;")


@intrinsic
def publish(typingctx):
    """What this thread has written so far reaches the host before what it writes next."""

    def codegen(context, builder, signature, args):
        asm(builder, ir.VoidType(), "membar.sys;", "~{memory}", effects=True)
        return context.get_dummy_value()

    return types.none(), codegen


@intrinsic
def exchange(typingctx, value, distance):
    """The value of the lane whose number differs by the bit `distance`."""

    def one(builder, bits, distance):
        text = "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;"
        return asm(builder, I32, text, "=r,r,r", bits, distance, convergent=True)

    def codegen(context, builder, signature, args):
        value, distance = args[0], builder.trunc(args[1], I32)
        if signature.args[0].bitwidth == 32:
            return builder.bitcast(one(builder, builder.bitcast(value, I32), distance), value.type)
        bits = builder.bitcast(value, I64)
        low = one(builder, builder.trunc(bits, I32), distance)
        high = one(builder, builder.trunc(builder.lshr(bits, I64(32)), I32), distance)
        high = builder.shl(builder.zext(high, I64), I64(32))
        return builder.bitcast(builder.or_(high, builder.zext(low, I64)), value.type)

    return value(value, types.int64), codegen


def _float_suffix(kind):
    return ("f32", "=f,f,f") if kind == types.float32 else ("f64", "=d,d,d")


@intrinsic
def maximum(typingctx, a, b):
    """The larger of two floats, NaN if one is."""

    def codegen(context, builder, signature, args):
        a, b = args
        if signature.return_type == types.float32:
            return asm(builder, F32, "max.NaN.f32 $0, $1, $2;", "=f,f,f", a, b)
        larger = builder.select(builder.fcmp_ordered(">", a, b), a, b)
        return builder.select(builder.fcmp_unordered("uno", a, a), a, larger)

    return a(a, a), codegen


@intrinsic
def minimum(typingctx, a, b):
    """The smaller of two floats, the other one if one is NaN."""

    def codegen(context, builder, signature, args):
        name, constraints = _float_suffix(signature.return_type)
        return asm(builder, args[0].type, f"min.{name} $0, $1, $2;", constraints, *args)

    return a(a, a), codegen


@intrinsic
def exponential(typingctx, x, power):
    """exp(x) * 2**power; float32 through one ex2, within 2**-22 and the rounding of its own."""

    def codegen(context, builder, signature, args):
        x, power = args
        if signature.return_type == types.float32:
            t = builder.fma(x, F32(1.4426950216293335), power)
            return asm(builder, F32, "ex2.approx.ftz.f32 $0, $1;", "=f,f", t)
        t = builder.fma(power, F64(0.6931471805599453), x)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(F64, [F64]), "__nv_exp"
        )
        return builder.call(function, [t])

    return x(x, x), codegen


@intrinsic
def convert(typingctx, x, like):
    """A float in the precision of another."""

    def codegen(context, builder, signature, args):
        return context.cast(builder, args[0], signature.args[0], signature.return_type)

    return like(x, like), codegen


@intrinsic
def exclusive_or(typingctx, word, other):
    """The word itself if the other is zero, which the compiler cannot know."""

    def codegen(context, builder, signature, args):
        return builder.xor(*args)

    return word(types.uint32, types.uint32), codegen


@intrinsic
def as_bits(typingctx, x):
    """The bit pattern of a float as an integer."""
    integer = types.int32 if x == types.float32 else types.int64

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(signature.return_type.bitwidth))

    return integer(x), codegen


@intrinsic
def from_bits(typingctx, bits):
    """The float64 with a bit pattern."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], F64)

    return types.float64(types.int64), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c, rounded once."""

    def codegen(context, builder, signature, args):
        return builder.fma(*args)

    return a(a, a, a), codegen


@intrinsic
def power_of_two(typingctx, k):
    """2**k in float32 for a whole k in [-126, 127]; zero for -127."""

    def codegen(context, builder, signature, args):
        exponent = builder.add(builder.fptosi(args[0], I32), I32(127))
        return builder.bitcast(builder.shl(exponent, I32(23)), F32)

    return types.float32(types.float32), codegen


@intrinsic
def quotient(typingctx, a, b):
    """a // b of numbers below 2**32, a subroutine and Python's rules for signs and zero less."""

    def codegen(context, builder, signature, args):
        return builder.zext(builder.udiv(*(builder.trunc(a, I32) for a in args)), I64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def add(typingctx, a, b):
    """a + b without numba's promotion of 32-bit integers."""

    def codegen(context, builder, signature, args):
        return builder.add(*args)

    return a(a, a), codegen


@intrinsic
def reciprocal(typingctx, x):
    """1 / x of 1 <= x < 2**100 or, in float64, 2**1000, without the branches of a division.

    NaN stays.
    """
    single = x == types.float32
    kind, suffix, letter = (F32, "f32", "f") if single else (F64, "f64", "d")
    # From 2**-23, or 2**-20 to 2**-40 to the rounding of float64, and settled.
    steps = 1 if single else 3

    def codegen(context, builder, signature, args):
        x = args[0]
        y = asm(builder, kind, f"rcp.approx.ftz.{suffix} $0, $1;", f"={letter},{letter}", x)
        for _ in range(steps):
            error = builder.fma(builder.fsub(kind(-0.0), x), y, kind(1.0))
            y = builder.fma(y, error, y)
        return y

    return x(x), codegen


def _half(kind, high):
    """Widen one half of a 32-bit word to float32."""

    @intrinsic
    def widen(typingctx, word):
        def codegen(context, builder, signature, args):
            word = args[0]
            if kind == "bfloat16":
                bits = builder.and_(word, I32(0xFFFF0000)) if high else builder.shl(word, I32(16))
                return builder.bitcast(bits, F32)
            bits = builder.lshr(word, I32(16)) if high else word
            return builder.fpext(builder.bitcast(builder.trunc(bits, I16), F16), F32)

        return types.float32(types.uint32), codegen

    return widen


def _pack(kind):
    """Round two float32 to one word of two halves."""
    short = {"bfloat16": "bf16", "float16": "f16"}[kind]

    @intrinsic
    def pack(typingctx, low, high):
        def codegen(context, builder, signature, args):
            text = f"cvt.rn.{short}x2.f32 $0, $1, $2;"
            return asm(builder, I32, text, "=r,f,f", args[1], args[0])

        return types.uint32(types.float32, types.float32), codegen

    return pack


def _halves(kind, name):
    """Larger or smaller of the halves of two words, each for itself; NaN as in `maximum`."""
    short = {"bfloat16": "bf16", "float16": "f16"}[kind]

    @intrinsic
    def extreme(typingctx, a, b):
        def codegen(context, builder, signature, args):
            return asm(builder, I32, f"{name}.{short}x2 $0, $1, $2;", "=r,r,r", *args)

        return types.uint32(types.uint32, types.uint32), codegen

    return extreme


low_half = {kind: _half(kind, False) for kind in ("bfloat16", "float16")}
high_half = {kind: _half(kind, True) for kind in ("bfloat16", "float16")}
pack_halves = {kind: _pack(kind) for kind in ("bfloat16", "float16")}
max_halves = {kind: _halves(kind, "max.NaN") for kind in ("bfloat16", "float16")}
min_halves = {kind: _halves(kind, "min") for kind in ("bfloat16", "float16")}
