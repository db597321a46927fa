"""Reading and writing numbers and vectors of them, whatever their strides and storage type.

Rows are read and written through a *base*, a pointer to (or array that starts with) the first
number.  Positions are byte offsets from there, so that any strides will do.  16-bit floats travel
as their bits (see `formats`).
"""

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from fastce.cpu.constants import X86
from fastce.cpu.formats import COMPUTE, decode, encode, storage_size, storage_type, vector_of
from fastce.cpu.vector import (
    I32,
    I64,
    call_llvm,
    coerce,
    filled,
    llvm_type,
    resize,
)

LINE = 64  # bytes: no vector of any storage type is shorter


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


@intrinsic
def on_the_stack(typingctx, base, count):
    """A pointer to room for `count` (a literal) numbers like those of `base`, until the return.

    None stays None.
    """
    if base is types.none:
        return base(base, count), lambda context, builder, sig, args: context.get_dummy_value()
    if not isinstance(count, types.IntegerLiteral):
        return None  # numba tries again with the literal
    pointer = types.CPointer(base.dtype)

    def codegen(context, builder, sig, args):
        item = context.get_data_type(base.dtype)
        room = cgutils.alloca_once(builder, ir.ArrayType(item, count.literal_value))
        room.align = LINE
        return builder.bitcast(room, item.as_pointer())

    return pointer(base, count), codegen


@intrinsic
def position(typingctx, pointer):
    """The address that a pointer holds."""

    def codegen(context, builder, sig, args):
        return builder.ptrtoint(args[0], I64)

    return types.int64(pointer), codegen


@intrinsic
def pointer_at(typingctx, position, item):
    """An address as a pointer to numbers of a type, such as `numpy.float32`; None for no type."""
    if item is types.none:
        return item(position, item), lambda context, builder, sig, args: context.get_dummy_value()
    pointer = types.CPointer(item.dtype)

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(position, item), codegen


@intrinsic
def array_at(typingctx, address, item, count):
    """An array of numbers of a type at an address; None for no type."""
    if item is types.none:
        nothing = item(address, item, count)
        return nothing, lambda context, builder, sig, args: context.get_dummy_value()
    result = types.Array(item.dtype, 1, "C")

    def codegen(context, builder, sig, args):
        pointer = types.CPointer(item.dtype)
        place = builder.inttoptr(args[0], context.get_value_type(pointer))
        return context.compile_internal(
            builder, lambda p, n: carray(p, (n,)), result(pointer, types.int64), [place, args[2]]
        )

    return result(types.int64, item, types.int64), codegen


@intrinsic
def hold(typingctx, memory):
    """Hold on to an array up to here: a bare pointer to it does not."""
    return types.void(memory), lambda context, builder, sig, args: context.get_dummy_value()


@intrinsic
def address_as(typingctx, memory, base):
    """The start of an array of bytes as a pointer to what `base` holds; None for no base."""
    if base is types.none:
        return types.none(
            memory, base
        ), lambda context, builder, sig, args: context.get_dummy_value()
    pointer = types.CPointer(base.dtype)

    def codegen(context, builder, sig, args):
        data = context.make_array(memory)(context, builder, args[0]).data
        return builder.bitcast(data, context.get_value_type(pointer))

    return pointer(memory, base), codegen


def _pointer(context: Any, builder: Any, base_type: Any, base: Any, offset: Any) -> Any:
    if isinstance(base_type, types.Array):
        base = context.make_array(base_type)(context, builder, base).data
    return builder.gep(base, [offset], source_etype=ir.IntType(8))


def _past_the_caches(builder: Any, stored: Any) -> None:
    stored.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))


def _write(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=1)


@intrinsic
def zeros(typingctx, base):
    """The vector of zeros that fits what is loaded from `base`."""
    ty = vector_of(base.dtype)

    def codegen(context, builder, sig, args):
        return filled(0.0, llvm_type(ty))

    return ty(base), codegen


@intrinsic
def item_size(typingctx, base):
    """Bytes of one stored number, a constant of the compiled code."""
    size = storage_size(base.dtype)
    return types.int64(base), lambda context, builder, sig, args: I64(size)


@intrinsic
def load(typingctx, base, offset, step, like):
    """A vector like `like` of the numbers from `offset`, `step` bytes apart (None: adjacent)."""
    storage = base.dtype

    def codegen(context, builder, sig, args):
        item = storage_type(storage)
        start = _pointer(context, builder, base, args[0], args[1])
        if step is types.none:
            raw = builder.load(start, typ=ir.VectorType(item, like.lanes), align=1)
        else:
            raw = ir.Constant(ir.VectorType(item, like.lanes), ir.Undefined)
            for lane in range(like.lanes):
                distance = builder.mul(args[2], I64(lane))
                pointer = builder.gep(start, [distance], source_etype=ir.IntType(8))
                number = builder.load(pointer, typ=item, align=1)
                raw = builder.insert_element(raw, number, I32(lane))
        numbers = decode(builder, raw, storage)
        return resize(builder, numbers, COMPUTE[storage], like.element)

    return like(base, types.int64, step, like), codegen


@intrinsic
def store(typingctx, base, offset, step, value):
    """Write a vector of numbers at `offset`, `step` bytes apart (None: side by side)."""
    storage = base.dtype

    def codegen(context, builder, sig, args):
        start = _pointer(context, builder, base, args[0], args[1])
        raw = encode(builder, args[3], storage)
        if step is types.none:
            _write(builder, raw, start)
        else:
            for lane in range(value.lanes):
                distance = builder.mul(args[2], I64(lane))
                pointer = builder.gep(start, [distance], source_etype=ir.IntType(8))
                _write(builder, builder.extract_element(raw, I32(lane)), pointer)
        return context.get_dummy_value()

    return types.void(base, types.int64, step, value), codegen


@intrinsic
def store_streaming(typingctx, base, offset, value):
    """Write a vector of numbers side by side past the caches; the address is a multiple of LINE.

    Saves reading the memory before it is written.  `drain` must follow before others may look.
    """
    storage = base.dtype

    def codegen(context, builder, sig, args):
        raw = encode(builder, args[2], storage)
        start = _pointer(context, builder, base, args[0], args[1])
        written = builder.store(raw, builder.bitcast(start, raw.type.as_pointer()), align=LINE)
        _past_the_caches(builder, written)
        return context.get_dummy_value()

    return types.void(base, types.int64, value), codegen


@intrinsic
def drain(typingctx):
    """Make streaming stores visible to other threads."""

    def codegen(context, builder, sig, args):
        if X86:
            call_llvm(builder, "llvm.x86.sse.sfence", ir.VoidType())
        else:
            builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def first_line(typingctx, base, offset):
    """How many numbers lie between a position and the next multiple of LINE."""
    size = storage_size(base.dtype)

    def codegen(context, builder, sig, args):
        start = builder.ptrtoint(_pointer(context, builder, base, args[0], args[1]), I64)
        return builder.udiv(builder.and_(builder.neg(start), I64(LINE - 1)), I64(size))

    return types.int64(base, types.int64), codegen


@intrinsic
def load_number(typingctx, base, offset):
    """The one number at `offset`, as float64."""
    storage = base.dtype

    def codegen(context, builder, sig, args):
        pointer = _pointer(context, builder, base, args[0], args[1])
        raw = builder.load(pointer, typ=storage_type(storage), align=1)
        number = decode(builder, raw, storage)
        return resize(builder, number, COMPUTE[storage], types.float64)

    return types.float64(base, types.int64), codegen


@intrinsic
def store_number(typingctx, base, offset, value):
    """Write one number at `offset`."""
    storage = base.dtype

    def codegen(context, builder, sig, args):
        number = coerce(context, builder, args[2], value, COMPUTE[storage])
        pointer = _pointer(context, builder, base, args[0], args[1])
        _write(builder, encode(builder, number, storage), pointer)
        return context.get_dummy_value()

    return types.void(base, types.int64, value), codegen


def _copy(
    context: Any, builder: Any, sig: Any, args: Any, item: ir.Type, *, streaming: bool
) -> Any:
    """Copy one `item` from the first base and offset to the second."""
    start = _pointer(context, builder, sig.args[0], args[0], args[1])
    end = _pointer(context, builder, sig.args[2], args[2], args[3])
    end = builder.bitcast(end, item.as_pointer())
    raw = builder.load(start, typ=item, align=1)
    written = builder.store(raw, end, align=LINE if streaming else 1)
    if streaming:
        _past_the_caches(builder, written)
    return context.get_dummy_value()


@intrinsic
def copy_number(typingctx, source, offset, target, target_offset):
    """Copy one stored number."""
    item = storage_type(source.dtype)

    def codegen(context, builder, sig, args):
        return _copy(context, builder, sig, args, item, streaming=False)

    return types.void(source, types.int64, target, types.int64), codegen


@intrinsic
def copy_vector(typingctx, source, offset, target, target_offset, like):
    """Copy stored numbers that lie side by side, as many as the vector `like` has lanes."""
    item = ir.VectorType(storage_type(source.dtype), like.lanes)

    def codegen(context, builder, sig, args):
        return _copy(context, builder, sig, args, item, streaming=False)

    return types.void(source, types.int64, target, types.int64, like), codegen


@intrinsic
def copy_vector_streaming(typingctx, source, offset, target, target_offset, like):
    """`copy_vector` past the caches to a multiple of LINE; `drain` must follow."""
    item = ir.VectorType(storage_type(source.dtype), like.lanes)

    def codegen(context, builder, sig, args):
        return _copy(context, builder, sig, args, item, streaming=True)

    return types.void(source, types.int64, target, types.int64, like), codegen


@intrinsic
def transpose(typingctx, source, offset, step, target, target_offset, target_step):
    """Copy 4 x 4 stored numbers: the k-th of the j-th four to the j-th place of the k-th four.

    Fours start at the offsets plus 0, 1, 2, 3 times the steps; each lies side by side.
    """
    item = storage_type(source.dtype)
    four = ir.VectorType(item, 4)

    def codegen(context, builder, sig, args):
        def fours(base_type, base, offset, step):
            for k in range(4):
                place = builder.add(offset, builder.mul(step, I64(k)))
                yield _pointer(context, builder, base_type, base, place)

        def shuffled(x, y, *order):
            return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, 4), order))

        a, b, c, d = (
            builder.load(p, typ=four, align=1) for p in fours(source, args[0], args[1], args[2])
        )
        ab, cd = shuffled(a, b, 0, 4, 1, 5), shuffled(c, d, 0, 4, 1, 5)
        ab2, cd2 = shuffled(a, b, 2, 6, 3, 7), shuffled(c, d, 2, 6, 3, 7)
        columns = [
            shuffled(ab, cd, 0, 1, 4, 5), shuffled(ab, cd, 2, 3, 6, 7),
            shuffled(ab2, cd2, 0, 1, 4, 5), shuffled(ab2, cd2, 2, 3, 6, 7),
        ]  # fmt: skip
        for column, p in zip(columns, fours(target, args[3], args[4], args[5]), strict=True):
            _write(builder, column, p)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(source, i64, i64, target, i64, i64), codegen


@intrinsic
def prefetch(typingctx, base, offset):
    """Ask for the line at a position, which may lie anywhere, even outside all arrays."""

    def codegen(context, builder, sig, args):
        start = _pointer(context, builder, base, args[0], args[1])
        pointer = builder.bitcast(start, ir.IntType(8).as_pointer())
        reading, nearest, data = I32(0), I32(3), I32(1)
        call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, reading, nearest, data)
        return context.get_dummy_value()

    return types.void(base, types.int64), codegen


@intrinsic
def line_aligned(typingctx, base, offset):
    """Whether a position is a multiple of LINE."""

    def codegen(context, builder, sig, args):
        start = builder.ptrtoint(_pointer(context, builder, base, args[0], args[1]), I64)
        return builder.icmp_unsigned("==", builder.and_(start, I64(LINE - 1)), I64(0))

    return types.boolean(base, types.int64), codegen


@intrinsic
def claim(typingctx, counter):
    """Take the next number of a counter that several threads share."""

    def codegen(context, builder, sig, args):
        pointer = context.make_array(counter)(context, builder, args[0]).data
        return builder.atomic_rmw("add", pointer, I64(1), "monotonic")

    return types.int64(counter), codegen
