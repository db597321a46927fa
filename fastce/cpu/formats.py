"""The types that logits are stored in, and the numbers that are computed with.

16-bit floats are stored as their bits: uint16 stands for float16, int16 for bfloat16.
"""

from typing import Any

from llvmlite import ir
from numba import types

from fastce.cpu.constants import CONVERTS_FLOAT16
from fastce.cpu.vector import BITS, ELEMENTS, I16, I32, VectorType, filled

# What a number of each storage type is once it is loaded.
COMPUTE = {
    types.float64: types.float64,
    types.float32: types.float32,
    types.uint16: types.float32,  # float16
    types.int16: types.float32,  # bfloat16
}


def _shaped(ty: ir.Type, like: ir.Type) -> ir.Type:
    """`ty`, or as many of it as the vector type `like` has lanes."""
    return ir.VectorType(ty, like.count) if isinstance(like, ir.VectorType) else ty


def decode(builder: Any, raw: Any, storage: types.Type) -> Any:
    """Stored bits to the numbers that are computed with."""
    floats, words = _shaped(ir.FloatType(), raw.type), _shaped(I32, raw.type)
    if storage == types.uint16:
        if CONVERTS_FLOAT16:
            return builder.fpext(builder.bitcast(raw, _shaped(ir.HalfType(), raw.type)), floats)
        return _decode_float16(builder, raw, floats, words)
    if storage == types.int16:
        bits = builder.shl(builder.zext(raw, words), filled(16, words))
        return builder.bitcast(bits, floats)
    return raw


def encode(builder: Any, value: Any, storage: types.Type) -> Any:
    """Numbers to stored bits, rounded to nearest even."""
    halves, words = _shaped(I16, value.type), _shaped(I32, value.type)
    if storage == types.uint16:
        if CONVERTS_FLOAT16:
            half = builder.fptrunc(value, _shaped(ir.HalfType(), value.type))
            return builder.bitcast(half, halves)
        return builder.trunc(_encode_float16(builder, value, words), halves)
    if storage == types.int16:
        bits = builder.bitcast(value, words)
        quiet = builder.or_(bits, filled(0x400000, words))  # rounding could turn NaN to inf
        rounded = _round_bits(builder, bits, 16, words)
        bits = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
        return builder.trunc(builder.lshr(bits, filled(16, words)), halves)
    return value


def _round_bits(builder: Any, bits: Any, dropped: int, words: ir.Type) -> Any:
    """What the bits above the lowest `dropped` become when rounded to nearest even."""
    odd = builder.and_(builder.lshr(bits, filled(dropped, words)), filled(1, words))
    return builder.add(builder.add(bits, odd), filled((1 << (dropped - 1)) - 1, words))


def _decode_float16(builder: Any, raw: Any, floats: ir.Type, words: ir.Type) -> Any:
    """For processors that do not convert float16: LLVM would call a function that is not there.

    Read as bits of a float32 the exponent is too small by 112, which a multiplication mends,
    denormals included.
    """
    bits = builder.zext(raw, words)
    sign = builder.shl(builder.and_(bits, filled(0x8000, words)), filled(16, words))
    size = builder.shl(builder.and_(bits, filled(0x7FFF, words)), filled(13, words))
    scaled = builder.fmul(builder.bitcast(size, floats), filled(2.0**112, floats))
    finite = builder.bitcast(scaled, words)
    special = builder.or_(size, filled(0x7F800000, words))  # infinity or NaN
    known = builder.icmp_unsigned("<", size, filled(0x7C00 << 13, words))
    return builder.bitcast(builder.or_(builder.select(known, finite, special), sign), floats)


def _encode_float16(builder: Any, value: Any, words: ir.Type) -> Any:
    bits = builder.bitcast(value, words)
    sign = builder.and_(builder.lshr(bits, filled(16, words)), filled(0x8000, words))
    size = builder.and_(bits, filled(0x7FFFFFFF, words))
    normal = builder.sub(_round_bits(builder, size, 13, words), filled(112 << 23, words))
    normal = builder.lshr(normal, filled(13, words))
    # Beside one half the last place of a float32 is that of a denormal float16.
    shifted = builder.fadd(builder.bitcast(size, value.type), filled(0.5, value.type))
    small = builder.sub(builder.bitcast(shifted, words), filled(0x3F000000, words))
    payload = builder.and_(builder.lshr(size, filled(13, words)), filled(0x3FF, words))
    nan = builder.or_(payload, filled(0x7E00, words))

    def above(bound: int) -> Any:
        return builder.icmp_unsigned(">", size, filled(bound, words))

    half = builder.select(above(0x387FFFFF), normal, small)
    half = builder.select(above(0x477FEFFF), filled(0x7C00, words), half)  # from 65520 on: infinity
    return builder.or_(builder.select(above(0x7F800000), nan, half), sign)


def storage_type(storage: types.Type) -> ir.Type:
    """What lies in memory."""
    return ELEMENTS.get(storage, I16)


def storage_size(storage: types.Type) -> int:
    """Bytes of one stored number."""
    return int(storage.bitwidth) // 8


def vector_of(storage: types.Type) -> VectorType:
    """The vector that stored numbers are loaded into."""
    element = COMPUTE[storage]
    return VectorType(element, BITS // element.bitwidth)
