"""Memory as kernels address it: 16-byte accesses, shared memory, that of other blocks, copies.

Addresses are plain integers, as kernels take them: one 8-byte argument each instead of the nine
of an array.  Shared memory is one region, addressed by byte offsets.  Numba's own code for arrays
never becomes 16-byte accesses; these intrinsics do.
"""

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
_GLOBAL, _SHARED = 1, 3
_KINDS = {
    "f32": (types.float32, F32),
    "f64": (types.float64, F64),
    "u16": (types.uint16, I16),
    "u32": (types.uint32, I32),
    "i8": (types.int8, I8),
    "i16": (types.int16, I16),
    "i32": (types.int32, I32),
    "i64": (types.int64, I64),
    "u8": (types.uint8, I8),
}


def asm(builder, result, text, constraints, *operands, effects=False, convergent=False):
    """A machine instruction; what threads do together (`convergent`) must not be duplicated."""
    kind = ir.FunctionType(result, [value.type for value in operands])
    code = ir.InlineAsm(kind, text, constraints, side_effect=effects or convergent)
    return builder.call(code, operands, attrs=("convergent",) if convergent else ())


def _pointer(builder, address, kind):
    return builder.inttoptr(address, ir.PointerType(kind, _GLOBAL))


def _shared(builder, offset, kind):
    region = builder.module.globals.get("fastce_shared")
    if region is None:
        region = ir.GlobalVariable(
            builder.module, ir.ArrayType(I8, 0), "fastce_shared", addrspace=_SHARED
        )
        region.linkage, region.align = "external", 16
    place = builder.gep(region, [I32(0), builder.trunc(offset, I32)])
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
                builder.store(builder.extract_element(value, I32(k)), to)
            return context.get_dummy_value()

        return types.none(types.int64, array, types.int64), codegen

    @intrinsic
    def store(typingctx, where, array, first):
        def codegen(context, builder, signature, args):
            value = ir.Constant(vector, ir.Undefined)
            for k in range(count):
                of = entry(context, builder, signature.args[1], args[1], args[2], k)
                value = builder.insert_element(value, builder.load(of), I32(k))
            stored = builder.store(value, place(builder, args[0], vector))
            stored.align = 16
            return context.get_dummy_value()

        return types.none(types.int64, array, types.int64), codegen

    return load, store


def _remote_store(kind):
    """Store of one number in the shared memory of another block of the cluster."""
    numba_type, _ = _KINDS[kind]
    suffix, letter = {"f64": ("f64", "d"), "i64": ("b64", "l")}[kind]

    @intrinsic
    def store(typingctx, offset, rank, value):
        def codegen(context, builder, signature, args):
            here = builder.ptrtoint(_shared(builder, args[0], I8), I32)
            there = asm(builder, I32, "mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", here,
                         builder.trunc(args[1], I32))  # fmt: skip
            text = f"st.shared::cluster.{suffix} [$0], $1;"
            asm(
                builder, ir.VoidType(), text, f"r,{letter},~{{memory}}", there, args[2],
                effects=True,
            )  # fmt: skip
            return context.get_dummy_value()

        return types.none(types.int64, types.int64, numba_type), codegen

    return store


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
        to = builder.ptrtoint(_shared(builder, args[0], I8), I32)
        text = "cp.async.cg.shared.global [$0], [$1], 16;"
        asm(builder, ir.VoidType(), text, "r,l,~{memory}", to, args[1], effects=True)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), codegen


@intrinsic
def wait_for_copies(typingctx):
    """Wait until the copies that this thread has started are there for it to read."""

    def codegen(context, builder, signature, args):
        asm(builder, ir.VoidType(), "cp.async.wait_all;", "~{memory}", effects=True)
        return context.get_dummy_value()

    return types.none(), codegen
