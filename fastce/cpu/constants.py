"""Floating-point formats: the constants of each, polynomials, powers of two, exponents.

The numbers are rounded by the compiler to the element type that a name is asked for with.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from fastce.cpu.vector import (
    I32,
    bits_type,
    call_llvm,
    element_of,
    filled,
    llvm_type,
    suffix,
)


def _processor() -> tuple[str, frozenset[str]]:
    """Target triple and features of the processor that numba compiles for."""
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return triple, frozenset(features.split(","))


_TRIPLE, _FEATURES = _processor()
X86 = _TRIPLE.startswith(("x86_64", "i386", "i686"))
CONVERTS_FLOAT16 = not X86 or "+f16c" in _FEATURES
# Whether multiplication and addition are rounded once.
FUSED = "+fma" in _FEATURES or _TRIPLE.startswith(("aarch64", "arm64"))

# exp(d) = 2**(k/STEPS) exp(r): the powers of 2**(1/STEPS) come from a table that fits a register.
STEPS = 8

_LN2 = 0.6931471805599453
_LN2_FLOAT32 = 0.693147182464599609375

# ROUND: adding it leaves the nearest integer in the low bits.  BIAS: of the exponent.
# DIGITS: bits of the significand.
# LIFT: the power that leaves room above for sums and below for the smallest terms; LIFTED: two to
# it.  TINY: the smallest normal number.
# LN2_PARTS: of ln(2) / STEPS; a first part so short that k times it is exact for |k| < 2**14, and
# the rest.  In float32 with fused multiply-adds one part will do, an instruction less: its rounding
# error acts as if every logit were larger by a factor 1 + 2.7e-9, and LN2_EXCESS lets the maximum
# share it.
# EXP: (exp(r) - 1) / r for |r| <= ln(2) / (2 STEPS), minimax in the relative error of exp (Remez;
# 2.6e-8 in float32, 2.9e-18 in float64).  EXPM1: the same for |r| <= ln(2) / 2, in the relative
# error of exp(r) - 1 (interpolated where Chebyshev polynomials are extreme; 4.1e-17).
# ATANH: (atanh(s) / s - 1) / s**2 in s**2 up to tan(pi / 8)**4 (4.6e-18).
CONSTANTS: dict[Any, dict[str, Any]] = {
    types.float32: {
        "ROUND": 1.5 * 2.0**23,
        "BIAS": 127.0,
        "DIGITS": 24.0,
        "LIFT": 64.0,
        "LIFTED": 2.0**64,
        "TINY": 2.0**-126,
        "LOG2E": 1.4426950408889634,
        "STEPS_LOG2E": STEPS * 1.4426950408889634,
        "LN2": _LN2,
        "LN2_PARTS": (
            (_LN2_FLOAT32 / STEPS,) if FUSED else (0.086669921875, -2.652430500683632e-05)
        ),
        "LN2_EXCESS": _LN2_FLOAT32 - _LN2 if FUSED else 0.0,
        "EXP": (1.0, 0.50006448485043115275, 0.16666858441087554735),
    },
    types.float64: {
        "ROUND": 1.5 * 2.0**52,
        "BIAS": 1023.0,
        "DIGITS": 53.0,
        "LIFT": 512.0,
        "LIFTED": 2.0**512,
        "TINY": 2.0**-1022,
        "LOG2E": 1.4426950408889634,
        "STEPS_LOG2E": STEPS * 1.4426950408889634,
        "LN2": _LN2,
        "LN2_PARTS": (0.08664339756978734, 2.0582436978621353e-13),
        "LN2_EXCESS": 0.0,
        "EXP": (
            1.0,
            0.50000000000002961818,
            0.1666666666666372383,
            0.041666666570073878008,
            0.0083333333711349512328,
            0.0013889780671754467423,
            0.00019840565480707613566,
        ),
        "EXPM1": (
            1.0,
            0.5000000000000001,
            0.16666666666666669,
            0.04166666666662413,
            0.008333333333330062,
            0.0013888888917213717,
            0.00019841269863053618,
            2.4801521295954376e-05,
            2.7557268459997064e-06,
            2.7620088445409746e-07,
            2.510038549551032e-08,
        ),
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


@intrinsic
def constant(typingctx, name, like):
    """The constant called `name` for the element type of `like`, from CONSTANTS."""
    if not isinstance(name, types.StringLiteral):
        return None  # numba tries again with the literal
    value = CONSTANTS[element_of(like)][name.literal_value]
    ty = element_of(like)

    def codegen(context, builder, sig, args):
        return ir.Constant(llvm_type(ty), value)

    return ty(name, like), codegen


@intrinsic
def polynomial(typingctx, name, x):
    """Value at x of the polynomial called `name`, lowest coefficient first.

    Long ones by Horner's rule in x**2 over pairs of terms: one multiplication more than in x, but a
    dependency chain half as long, which is what the processor waits for.
    """
    if not isinstance(name, types.StringLiteral):
        return None  # numba tries again with the literal
    coefficients = CONSTANTS[element_of(x)][name.literal_value]

    def codegen(context, builder, sig, args):
        llvm = llvm_type(x)

        def multiply_add(a, b, c):
            return call_llvm(builder, f"llvm.fmuladd.{suffix(llvm)}", llvm, a, b, c)

        terms = [filled(c, llvm) for c in coefficients]
        power = args[1]
        if len(terms) > 3:
            pairs = zip(terms[::2], terms[1::2], strict=False)
            last = terms[-1:] if len(terms) % 2 else []
            terms = [multiply_add(high, power, low) for low, high in pairs] + last
            power = builder.fmul(power, power)
        value = terms.pop()
        while terms:
            value = multiply_add(value, power, terms.pop())
        return value

    return x(name, x), codegen


@intrinsic
def less_ln2(typingctx, x, k):
    """x - k ln(2) / STEPS, with the parts that CONSTANTS gives."""
    parts = CONSTANTS[element_of(x)]["LN2_PARTS"]

    def codegen(context, builder, sig, args):
        value, llvm = args[0], llvm_type(x)
        for part in parts:
            name = f"llvm.fmuladd.{suffix(llvm)}"
            value = call_llvm(builder, name, llvm, args[1], filled(-part, llvm), value)
        return value

    return x(x, k), codegen


def _mantissa(ty: types.Type) -> int:
    """Bits of the fraction."""
    return 52 if element_of(ty) == types.float64 else 23


@intrinsic
def power_of_two(typingctx, rounded):
    """2**k, where adding ROUND and the exponent bias has left k's biased form in the low bits."""

    def codegen(context, builder, sig, args):
        words = bits_type(rounded)
        bits = builder.shl(builder.bitcast(args[0], words), filled(_mantissa(rounded), words))
        return builder.bitcast(bits, llvm_type(rounded))

    return rounded(rounded), codegen


@intrinsic
def fractional_power_of_two(typingctx, rounded):
    """2**(k/STEPS), where adding ROUND and STEPS times the bias has left k's form in the low bits.

    The bits of 2**(j/STEPS) for j = k mod STEPS, and k shifted to where its upper part adds to the
    exponent; the table has what its lower part adds to the fraction subtracted.  Exactly zero where
    the low bits are zero.
    """
    element = element_of(rounded)
    word, floats = (np.uint64, np.float64) if element == types.float64 else (np.uint32, np.float32)
    shift = _mantissa(rounded) - (STEPS.bit_length() - 1)

    def bits_of(value: float) -> int:
        return int(np.array(value, floats).view(word))

    one = bits_of(1.0)
    mask = 2 ** (8 * np.dtype(word).itemsize) - 1
    table = [(bits_of(2.0 ** (j / STEPS)) - one - (j << shift)) & mask for j in range(STEPS)]

    def codegen(context, builder, sig, args):
        words = bits_type(rounded)
        bits = builder.bitcast(args[0], words)
        fraction = _look_up(builder, table, bits)
        return builder.bitcast(
            builder.add(fraction, builder.shl(bits, filled(shift, words))), llvm_type(rounded)
        )

    return rounded(rounded), codegen


def _look_up(builder: Any, table: list[int], bits: Any) -> Any:
    """The entries of a table of STEPS words that the lowest bits of each word choose."""
    words = bits.type
    if isinstance(words, ir.VectorType):
        if "+avx512f" in _FEATURES:
            return _in_parts(builder, bits, 512 // words.element.width, _permute_avx512, table)
        if "+avx2" in _FEATURES:
            return _in_parts(builder, bits, 256 // words.element.width, _permute_avx2, table)
    return _look_up_in_memory(builder, table, bits)


def _in_parts(builder: Any, bits: Any, size: int, permute: Any, table: list[int]) -> Any:
    """Look up register by register."""
    undefined = ir.Constant(bits.type, ir.Undefined)
    parts = []
    for start in range(0, bits.type.count, size):
        order = ir.Constant(ir.VectorType(I32, size), list(range(start, start + size)))
        parts.append(permute(builder, table, builder.shuffle_vector(bits, undefined, order)))
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=True)
        count = parts[0].type.count * 2
        order = ir.Constant(ir.VectorType(I32, count), list(range(count)))
        parts = [builder.shuffle_vector(low, high, order) for low, high in pairs]
    return parts[0]


def _permute(builder: Any, name: str, table: list[int], index: Any) -> Any:
    """One instruction that takes its operand's words from a register by their lowest bits."""
    words = index.type
    floats = ir.VectorType(
        ir.DoubleType() if words.element.width == 64 else ir.FloatType(), words.count
    )
    entries = ir.Constant(words, table * (words.count // len(table)))
    chosen = call_llvm(builder, name, floats, builder.bitcast(entries, floats), index)
    return builder.bitcast(chosen, words)


def _permute_avx512(builder: Any, table: list[int], index: Any) -> Any:
    kind = "df" if index.type.element.width == 64 else "sf"
    return _permute(builder, f"llvm.x86.avx512.permvar.{kind}.512", table, index)


def _permute_avx2(builder: Any, table: list[int], index: Any) -> Any:
    name = "llvm.x86.avx2.permps"
    if index.type.element.width == 32:
        return _permute(builder, name, table, index)
    # Two halves of a 64-bit word, each from a table of 32-bit words.
    halves = ir.VectorType(I32, 8)
    index = builder.bitcast(index, halves)
    even = ir.Constant(halves, [0, 0, 2, 2, 4, 4, 6, 6])
    index = builder.shuffle_vector(index, ir.Constant(halves, ir.Undefined), even)
    low, high = (
        _permute(builder, name, [(entry >> by) & 0xFFFFFFFF for entry in table], index)
        for by in (0, 32)
    )
    blend = ir.Constant(halves, [0, 9, 2, 11, 4, 13, 6, 15])
    return builder.bitcast(
        builder.shuffle_vector(low, high, blend), ir.VectorType(ir.IntType(64), 4)
    )


def _look_up_in_memory(builder: Any, table: list[int], bits: Any) -> Any:
    vector = isinstance(bits.type, ir.VectorType)
    word = bits.type.element if vector else bits.type
    name = f"fastce.powers.{word.width}"
    entries = builder.module.globals.get(name)
    if entries is None:
        content = ir.Constant(ir.ArrayType(word, len(table)), table)
        entries = ir.GlobalVariable(builder.module, content.type, name)
        entries.initializer = content
        entries.global_constant = True
        entries.linkage = "internal"

    def entry(index: Any) -> Any:
        index = builder.and_(index, ir.Constant(word, len(table) - 1))
        return builder.load(builder.gep(entries, [ir.Constant(word, 0), index], inbounds=True))

    if not vector:
        return entry(bits)
    result = ir.Constant(bits.type, ir.Undefined)
    for lane in range(bits.type.count):
        number = entry(builder.extract_element(bits, I32(lane)))
        result = builder.insert_element(result, number, I32(lane))
    return result


@intrinsic
def exponent(typingctx, x):
    """The k, as a float64, with x * 2**-k in [sqrt(1/2), sqrt(2)); x is float64 and at least 1."""

    def codegen(context, builder, sig, args):
        words = bits_type(x)
        root = int(np.float64(np.sqrt(0.5)).view(np.int64))
        k = builder.sub(builder.bitcast(args[0], words), filled(root, words))
        k = builder.lshr(k, filled(52, words))
        # As the low bits of 2**52 the integer becomes a float without a conversion instruction.
        k = builder.or_(k, filled(int(np.float64(2.0**52).view(np.int64)), words))
        return builder.fsub(builder.bitcast(k, llvm_type(x)), filled(2.0**52, llvm_type(x)))

    return x(x), codegen
