"""The four dtypes of logits: how 16-byte vectors of them are loaded, unpacked, packed, stored."""

from typing import Any, NamedTuple

import numpy as np

from fastce.cuda import machine
from fastce.cuda.machine import device

# Codes of the dtypes that a kernel learns of at run time: those of targets, weights, soft labels.
CODES = {
    "float64": 0, "float32": 1, "float16": 2, "bfloat16": 3,
    "int8": 4, "int16": 5, "int32": 6, "int64": 7,
    "uint8": 8, "uint16": 9, "uint32": 10, "uint64": 11, "bool": 8,
}  # fmt: skip


class Format(NamedTuple):
    """How logits of one dtype are read, held and written.

    A vector of 16 bytes is held as `words` numbers of the type `word`, of `per_word` logits each.
    `coarse` and `fine`, with their bit patterns, define the fixed-point sum of `rows.accumulate`.
    """

    name: str
    size: int
    compute: Any
    word: Any
    words: int
    per_word: int
    empty: Any  # a word of -inf
    load_vector: Any
    store_vector: Any
    shared_load_vector: Any
    shared_store_vector: Any
    first: Any
    second: Any
    pack: Any
    word_max: Any
    word_min: Any
    load: Any
    store: Any
    shared_load: Any
    shared_store: Any
    coarse: Any
    minus_coarse: Any
    fine: Any
    minus_fine: Any
    high_unit: float
    low_unit: float
    one: int  # the term of the maximum, in units of `coarse`
    count: Any  # integer type of the sums of a thread


@device
def _same(word):
    return word


@device
def _only(first, second):
    return first


def _fixed_point(coarse: Any, fine: Any) -> dict[str, Any]:
    """Constants of the sum that rounds to the units in the last place of `coarse` and `fine`."""
    integer = np.int32 if coarse.dtype == np.float32 else np.int64
    high_unit, low_unit = float(np.spacing(coarse)), float(np.spacing(fine))
    return {
        "coarse": coarse,
        "minus_coarse": integer(-int(coarse.view(integer))),
        "fine": fine,
        "minus_fine": integer(-int(fine.view(integer))),
        "high_unit": high_unit,
        "low_unit": low_unit,
        "one": round(1 / high_unit),
        "count": integer,
    }


# A thread adds up at most 512 terms in 32 bits: 512 * 2**22 coarse units; fine ones are 2**-45.
_SINGLE = _fixed_point(np.float32(2.0), np.float32(1.5 * 2.0**-22))
# 2**22 terms in 64 bits: units of 2**-40 and 2**-82.
_DOUBLE = _fixed_point(np.float64(1.5 * 2.0**12), np.float64(1.5 * 2.0**-30))


def _wide(name: str, kind: str, compute: Any, fixed: dict[str, Any]) -> Format:
    size = np.dtype(compute).itemsize
    return Format(
        name, size, compute, compute, 16 // size, 1, compute(-np.inf),
        machine.load_vector[kind], machine.store_vector[kind],
        machine.shared_load_vector[kind], machine.shared_store_vector[kind],
        _same, _same, _only, machine.maximum, machine.minimum,
        machine.load[kind], machine.store[kind],
        machine.shared_load[kind], machine.shared_store[kind], **fixed,
    )  # fmt: skip


def _half(name: str, minus_inf: int) -> Format:
    low, high, pack = machine.low_half[name], machine.high_half[name], machine.pack_halves[name]
    load, store = machine.load["u16"], machine.store["u16"]
    shared_load, shared_store = machine.shared_load["u16"], machine.shared_store["u16"]

    @device
    def load_one(where):
        return low(np.uint32(load(where)))

    @device
    def store_one(where, value):
        store(where, np.uint16(pack(value, value) & 0xFFFF))

    @device
    def shared_load_one(where):
        return low(np.uint32(shared_load(where)))

    @device
    def shared_store_one(where, value):
        shared_store(where, np.uint16(pack(value, value) & 0xFFFF))

    return Format(
        name, 2, np.float32, np.uint32, 4, 2, np.uint32(minus_inf << 16 | minus_inf),
        machine.load_vector["u32"], machine.store_vector["u32"],
        machine.shared_load_vector["u32"], machine.shared_store_vector["u32"],
        low, high, pack, machine.max_halves[name], machine.min_halves[name],
        load_one, store_one, shared_load_one, shared_store_one, **_SINGLE,
    )  # fmt: skip


FORMATS = {
    "float64": _wide("float64", "f64", np.float64, _DOUBLE),
    "float32": _wide("float32", "f32", np.float32, _SINGLE),
    "float16": _half("float16", 0xFC00),
    "bfloat16": _half("bfloat16", 0xFF80),
}

_f64, _f32, _u16 = machine.load["f64"], machine.load["f32"], machine.load["u16"]
_f16, _bf16 = machine.low_half["float16"], machine.low_half["bfloat16"]
_i8, _i16, _i32, _i64 = (machine.load[kind] for kind in ("i8", "i16", "i32", "i64"))
_u8, _u32 = machine.load["u8"], machine.load["u32"]
_convert = machine.convert


@device
def integer(base, index, code):
    """An integer of any dtype; those beyond int64 become its largest."""
    if code == 7:
        return _i64(base + 8 * index)
    if code == 6:
        return np.int64(_i32(base + 4 * index))
    if code == 10:
        return np.int64(_u32(base + 4 * index))
    if code == 11:
        value = _i64(base + 8 * index)
        return value if value >= 0 else 0x7FFFFFFFFFFFFFFF
    if code == 5:
        return np.int64(_i16(base + 2 * index))
    if code == 9:
        return np.int64(_u16(base + 2 * index))
    if code == 4:
        return np.int64(_i8(base + index))
    return np.int64(_u8(base + index))


@device
def number(where, code, like):
    """A float of any of the four dtypes, in the precision of `like`."""
    if code == 1:
        return _convert(_f32(where), like)
    if code == 0:
        return _convert(_f64(where), like)
    if code == 2:
        return _convert(_f16(np.uint32(_u16(where))), like)
    return _convert(_bf16(np.uint32(_u16(where))), like)


@device
def any_number(where, code, like):
    """A number of any dtype, in the precision of `like`."""
    if code >= 4:
        return _convert(np.float64(integer(where, 0, code)), like)
    return number(where, code, like)
