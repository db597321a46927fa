"""What a GPU thread does that Python cannot say: 16-byte accesses, shuffles, ex2, bit patterns.

Addresses are plain integers, as kernels take them: one 8-byte argument each instead of the nine
of an array.  Shared memory is one region, addressed by byte offsets.  Numba's own code for arrays
never becomes 16-byte accesses; these intrinsics do.

Under numba's simulator (NUMBA_ENABLE_CUDASIM=1) the same names come from `simulated`.
"""

from llvmlite import ir
from numba import cuda
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

SIMULATED = False
WARP = 32

_i8, _i16, _i32, _i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_f16, _f32, _f64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
_GLOBAL, _SHARED = 1, 3
_KINDS = {
    "f32": (types.float32, _f32),
    "f64": (types.float64, _f64),
    "u16": (types.uint16, _i16),
    "u32": (types.uint32, _i32),
    "i8": (types.int8, _i8),
    "i16": (types.int16, _i16),
    "i32": (types.int32, _i32),
    "i64": (types.int64, _i64),
    "u8": (types.uint8, _i8),
}


def device(function):
    """Make a device function that always becomes part of its caller."""
    return cuda.jit(device=True, inline="always")(function)


def _asm(builder, result, text, constraints, *operands, effects=False, convergent=False):
    """A machine instruction; what threads do together (`convergent`) must not be duplicated."""
    kind = ir.FunctionType(result, [value.type for value in operands])
    code = ir.InlineAsm(kind, text, constraints, side_effect=effects or convergent)
    return builder.call(code, operands, attrs=("convergent",) if convergent else ())


def _register(name):
    """Read a special register, anew each time.

    Kernels compute where they stand twice rather than keep it in registers while they need these
    for other things.
    """

    @intrinsic
    def read(typingctx):
        def codegen(context, builder, signature, args):
            return _asm(builder, _i32, f"mov.u32 $0, %{name};", "=r", effects=True)

        return types.int32(), codegen

    return read


thread, block = _register("tid.x"), _register("ctaid.x")
# Of a cluster of blocks: its number, its size, and the number of this block in it.
cluster, cluster_size = _register("clusterid.x"), _register("cluster_nctarank")
cluster_rank = _register("cluster_ctarank")


@intrinsic
def barrier(typingctx):
    """Wait for all threads of the block."""

    def codegen(context, builder, signature, args):
        _asm(builder, ir.VoidType(), "bar.sync 0;", "~{memory}", convergent=True)
        return context.get_dummy_value()

    return types.none(), codegen


@intrinsic
def cluster_arrive(typingctx):
    """Tell the other blocks of the cluster that this thread has got here and stored what it has."""

    def codegen(context, builder, signature, args):
        text = "barrier.cluster.arrive.release;"
        _asm(builder, ir.VoidType(), text, "~{memory}", convergent=True)
        return context.get_dummy_value()

    return types.none(), codegen


@intrinsic
def cluster_wait(typingctx):
    """Wait until all threads of the cluster have arrived."""

    def codegen(context, builder, signature, args):
        text = "barrier.cluster.wait.acquire;"
        _asm(builder, ir.VoidType(), text, "~{memory}", convergent=True)
        return context.get_dummy_value()

    return types.none(), codegen


def _remote_store(kind):
    """Store of one number in the shared memory of another block of the cluster."""
    numba_type, _ = _KINDS[kind]
    suffix, letter = {"f64": ("f64", "d"), "i64": ("b64", "l")}[kind]

    @intrinsic
    def store(typingctx, offset, rank, value):
        def codegen(context, builder, signature, args):
            here = builder.ptrtoint(_shared(builder, args[0], _i8), _i32)
            there = _asm(builder, _i32, "mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", here,
                         builder.trunc(args[1], _i32))  # fmt: skip
            text = f"st.shared::cluster.{suffix} [$0], $1;"
            _asm(
                builder, ir.VoidType(), text, f"r,{letter},~{{memory}}", there, args[2],
                effects=True,
            )  # fmt: skip
            return context.get_dummy_value()

        return types.none(types.int64, types.int64, numba_type), codegen

    return store


@intrinsic
def publish(typingctx):
    """What this thread has written so far reaches the host before what it writes next."""

    def codegen(context, builder, signature, args):
        _asm(builder, ir.VoidType(), "membar.sys;", "~{memory}", effects=True)
        return context.get_dummy_value()

    return types.none(), codegen


def _pointer(builder, address, kind):
    return builder.inttoptr(address, ir.PointerType(kind, _GLOBAL))


def _shared(builder, offset, kind):
    region = builder.module.globals.get("fastce_shared")
    if region is None:
        region = ir.GlobalVariable(
            builder.module, ir.ArrayType(_i8, 0), "fastce_shared", addrspace=_SHARED
        )
        region.linkage, region.align = "external", 16
    place = builder.gep(region, [_i32(0), builder.trunc(offset, _i32)])
    return builder.bitcast(place, ir.PointerType(kind, _SHARED))


def _accessors(kind, place):
    """Load and store of one number at an address or in shared memory."""
    numba_type, llvm_type = _KINDS[kind]

    @intrinsic
    def load(typingctx, where):
        def codegen(context, builder, signature, args):
            value = builder.load(place(builder, args[0], llvm_type))
            value.align = numba_type.bitwidth // 8
            return value

        return numba_type(types.int64), codegen

    @intrinsic
    def store(typingctx, where, value):
        def codegen(context, builder, signature, args):
            stored = builder.store(args[1], place(builder, args[0], llvm_type))
            stored.align = numba_type.bitwidth // 8
            return context.get_dummy_value()

        return types.none(types.int64, numba_type), codegen

    return load, store


def _vector_accessors(kind, place):
    """Load and store of 16 bytes, from and to consecutive entries of a local array."""
    numba_type, llvm_type = _KINDS[kind]
    count = 128 // numba_type.bitwidth
    vector = ir.VectorType(llvm_type, count)

    def entry(context, builder, array_type, array, first, k):
        data = context.make_array(array_type)(context, builder, array).data
        return builder.gep(data, [builder.add(first, ir.Constant(first.type, k))])

    @intrinsic
    def load(typingctx, where, array, first):
        def codegen(context, builder, signature, args):
            value = builder.load(place(builder, args[0], vector))
            value.align = 16
            for k in range(count):
                to = entry(context, builder, signature.args[1], args[1], args[2], k)
                builder.store(builder.extract_element(value, _i32(k)), to)
            return context.get_dummy_value()

        return types.none(types.int64, array, types.int64), codegen

    @intrinsic
    def store(typingctx, where, array, first):
        def codegen(context, builder, signature, args):
            value = ir.Constant(vector, ir.Undefined)
            for k in range(count):
                of = entry(context, builder, signature.args[1], args[1], args[2], k)
                value = builder.insert_element(value, builder.load(of), _i32(k))
            stored = builder.store(value, place(builder, args[0], vector))
            stored.align = 16
            return context.get_dummy_value()

        return types.none(types.int64, array, types.int64), codegen

    return load, store


load = {kind: _accessors(kind, _pointer)[0] for kind in _KINDS}
store = {kind: _accessors(kind, _pointer)[1] for kind in _KINDS}
shared_load = {kind: _accessors(kind, _shared)[0] for kind in _KINDS}
shared_store = {kind: _accessors(kind, _shared)[1] for kind in _KINDS}
remote_store = {kind: _remote_store(kind) for kind in ("f64", "i64")}
_WORDS = ("f32", "f64", "u32")
load_vector = {kind: _vector_accessors(kind, _pointer)[0] for kind in _WORDS}
store_vector = {kind: _vector_accessors(kind, _pointer)[1] for kind in _WORDS}
shared_load_vector = {kind: _vector_accessors(kind, _shared)[0] for kind in _WORDS}
shared_store_vector = {kind: _vector_accessors(kind, _shared)[1] for kind in _WORDS}


@intrinsic
def copy_async(typingctx, offset, address):
    """Start copying 16 bytes to shared memory without passing through registers."""

    def codegen(context, builder, signature, args):
        to = builder.ptrtoint(_shared(builder, args[0], _i8), _i32)
        text = "cp.async.cg.shared.global [$0], [$1], 16;"
        _asm(builder, ir.VoidType(), text, "r,l,~{memory}", to, args[1], effects=True)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), codegen


@intrinsic
def wait_for_copies(typingctx):
    """Wait until the copies that this thread has started are there for it to read."""

    def codegen(context, builder, signature, args):
        _asm(builder, ir.VoidType(), "cp.async.wait_all;", "~{memory}", effects=True)
        return context.get_dummy_value()

    return types.none(), codegen


@intrinsic
def exchange(typingctx, value, distance):
    """The value of the lane whose number differs by the bit `distance`."""

    def one(builder, bits, distance):
        text = "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;"
        return _asm(builder, _i32, text, "=r,r,r", bits, distance, convergent=True)

    def codegen(context, builder, signature, args):
        value, distance = args[0], builder.trunc(args[1], _i32)
        if signature.args[0].bitwidth == 32:
            return builder.bitcast(one(builder, builder.bitcast(value, _i32), distance), value.type)
        bits = builder.bitcast(value, _i64)
        low = one(builder, builder.trunc(bits, _i32), distance)
        high = one(builder, builder.trunc(builder.lshr(bits, _i64(32)), _i32), distance)
        high = builder.shl(builder.zext(high, _i64), _i64(32))
        return builder.bitcast(builder.or_(high, builder.zext(low, _i64)), value.type)

    return value(value, types.int64), codegen


def _float_suffix(kind):
    return ("f32", "=f,f,f") if kind == types.float32 else ("f64", "=d,d,d")


@intrinsic
def maximum(typingctx, a, b):
    """The larger of two floats, NaN if one is."""

    def codegen(context, builder, signature, args):
        a, b = args
        if signature.return_type == types.float32:
            return _asm(builder, _f32, "max.NaN.f32 $0, $1, $2;", "=f,f,f", a, b)
        larger = builder.select(builder.fcmp_ordered(">", a, b), a, b)
        return builder.select(builder.fcmp_unordered("uno", a, a), a, larger)

    return a(a, a), codegen


@intrinsic
def minimum(typingctx, a, b):
    """The smaller of two floats, the other one if one is NaN."""

    def codegen(context, builder, signature, args):
        name, constraints = _float_suffix(signature.return_type)
        return _asm(builder, args[0].type, f"min.{name} $0, $1, $2;", constraints, *args)

    return a(a, a), codegen


@intrinsic
def exponential(typingctx, x, power):
    """exp(x) * 2**power; float32 through one ex2, within 2**-22 and the rounding of its own."""

    def codegen(context, builder, signature, args):
        x, power = args
        if signature.return_type == types.float32:
            t = builder.fma(x, _f32(1.4426950216293335), power)
            return _asm(builder, _f32, "ex2.approx.ftz.f32 $0, $1;", "=f,f", t)
        t = builder.fma(power, _f64(0.6931471805599453), x)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_f64, [_f64]), "__nv_exp"
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
        return builder.bitcast(args[0], _f64)

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
        exponent = builder.add(builder.fptosi(args[0], _i32), _i32(127))
        return builder.bitcast(builder.shl(exponent, _i32(23)), _f32)

    return types.float32(types.float32), codegen


@intrinsic
def quotient(typingctx, a, b):
    """a // b of numbers below 2**32, a subroutine and Python's rules for signs and zero less."""

    def codegen(context, builder, signature, args):
        return builder.zext(builder.udiv(*(builder.trunc(a, _i32) for a in args)), _i64)

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
    kind, suffix, letter = (_f32, "f32", "f") if single else (_f64, "f64", "d")
    # From 2**-23, or 2**-20 to 2**-40 to the rounding of float64, and settled.
    steps = 1 if single else 3

    def codegen(context, builder, signature, args):
        x = args[0]
        y = _asm(builder, kind, f"rcp.approx.ftz.{suffix} $0, $1;", f"={letter},{letter}", x)
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
                bits = builder.and_(word, _i32(0xFFFF0000)) if high else builder.shl(word, _i32(16))
                return builder.bitcast(bits, _f32)
            bits = builder.lshr(word, _i32(16)) if high else word
            return builder.fpext(builder.bitcast(builder.trunc(bits, _i16), _f16), _f32)

        return types.float32(types.uint32), codegen

    return widen


def _pack(kind):
    """Round two float32 to one word of two halves."""
    short = {"bfloat16": "bf16", "float16": "f16"}[kind]

    @intrinsic
    def pack(typingctx, low, high):
        def codegen(context, builder, signature, args):
            text = f"cvt.rn.{short}x2.f32 $0, $1, $2;"
            return _asm(builder, _i32, text, "=r,f,f", args[1], args[0])

        return types.uint32(types.float32, types.float32), codegen

    return pack


def _halves(kind, name):
    """Larger or smaller of the halves of two words, each for itself; NaN as in `maximum`."""
    short = {"bfloat16": "bf16", "float16": "f16"}[kind]

    @intrinsic
    def extreme(typingctx, a, b):
        def codegen(context, builder, signature, args):
            return _asm(builder, _i32, f"{name}.{short}x2 $0, $1, $2;", "=r,r,r", *args)

        return types.uint32(types.uint32, types.uint32), codegen

    return extreme


low_half = {kind: _half(kind, False) for kind in ("bfloat16", "float16")}
high_half = {kind: _half(kind, True) for kind in ("bfloat16", "float16")}
pack_halves = {kind: _pack(kind) for kind in ("bfloat16", "float16")}
max_halves = {kind: _halves(kind, "max.NaN") for kind in ("bfloat16", "float16")}
min_halves = {kind: _halves(kind, "min") for kind in ("bfloat16", "float16")}
