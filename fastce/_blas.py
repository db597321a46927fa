"""Matrix products by the BLAS that NumPy brings, which can also add to what is there.

`matmul` writes a product apart from the sum that it is added to, and reads it again: measured, that
is a tenth of the time of dweight, to which a few hundred rows are added at once. The routine that
it calls takes a sum as well, and is looked up by its C name. Another library, SciPy's say, would
not do: each has threads of its own, which spin for some 25 ms after a product; where the two took
turns, the products of a head took 1.4 times as long.
"""

import ctypes
import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from fastce._arguments import AnyArray

# Bytes of a product that is added once it is whole: smaller ones pack their operands too often
# (2 MiB took a quarter longer), larger ones leave the caches.
BLOCK = 8 << 20
# Additions in a piece that one thread claims, and those from which more threads are worth waking.
ADDITIONS, PARALLEL = 1 << 16, 1 << 17
# Names that builds of NumPy give the routine, and their integers. (On 32 bits all is 32 bits.)
NAMES = {
    "scipy_cblas_{}64_": ctypes.c_int64,
    "cblas_{}64_": ctypes.c_int64,
    "scipy_cblas_{}": ctypes.c_int32,
    "cblas_{}": ctypes.c_int32,
}
ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112  # numbers of the C interface

Routine = Callable[[AnyArray, AnyArray, AnyArray, bool], None]


def multiply(a: AnyArray, b: AnyArray, out: AnyArray, *, accumulate: bool = False) -> None:
    """``out = a @ b``, or ``out += a @ b``; all of one dtype, float32 or float64."""
    routine = _routine(out.dtype.char)
    if routine is not None and all(_fits(array) for array in (a, b, out)):
        routine(a, b, out, accumulate)
    elif not accumulate:
        np.matmul(a, b, out=out)
    else:
        step = max(1, BLOCK // max(1, out.shape[1] * out.itemsize))
        for start in range(0, len(out), step):
            part = slice(start, start + step)
            add(out[part], np.matmul(a[part], b))


def add(target: AnyArray, addend: AnyArray) -> None:
    """target += addend, on all threads where that is worth it."""
    if not target.flags.c_contiguous or target.size < PARALLEL:
        target += addend
        return
    from fastce.cpu.matrix import add as kernel
    from fastce.cpu.threads import launch

    rows = max(1, ADDITIONS // target.shape[1])
    launch(kernel, (target, addend, rows), parallel=True, chunks=-(-len(target) // rows))


@functools.cache
def _routine(char: str) -> Routine | None:
    """The routine for a dtype, where NumPy's library has one under a name that is known."""
    try:
        extension = importlib.import_module("numpy._core._multiarray_umath")
        library = ctypes.CDLL(extension.__file__)  # has the names of what it is linked to as well
    except (ImportError, AttributeError, OSError):
        return None
    name, real = {"f": ("sgemm", ctypes.c_float), "d": ("dgemm", ctypes.c_double)}[char]
    for pattern, integer in NAMES.items():
        gemm = getattr(library, pattern.format(name), None)
        if gemm is not None:
            gemm.restype = None
            gemm.argtypes = [
                *[ctypes.c_int] * 3, *[integer] * 3, real, ctypes.c_void_p, integer,
                ctypes.c_void_p, integer, real, ctypes.c_void_p, integer,
            ]  # fmt: skip
            return functools.partial(_call, gemm)
    return None


def _call(gemm: Any, a: AnyArray, b: AnyArray, out: AnyArray, accumulate: bool) -> None:
    if not _by_rows(out):
        a, b, out = b.T, a.T, out.T
    transposes = [PLAIN if _by_rows(factor) else TRANSPOSED for factor in (a, b)]
    (m, n), k = out.shape, a.shape[1]
    gemm(
        ROW_MAJOR, *transposes, m, n, k, 1.0, a.ctypes.data, _leading(a), b.ctypes.data,
        _leading(b), float(accumulate), out.ctypes.data, _leading(out),
    )  # fmt: skip


def _fits(array: AnyArray) -> bool:
    """Whether the routine takes an array as it is: rows or columns without gaps, in order."""
    row, column = array.strides
    return (
        array.size > 0
        and array.flags.aligned
        and (_by_rows(array) or _by_rows(array.T))
        and max(*array.shape, abs(row), abs(column)) < 1 << 31
    )


def _by_rows(array: AnyArray) -> bool:
    """Whether rows are without gaps, and one after another."""
    (_, columns), (row, column), item = array.shape, array.strides, array.itemsize
    return (column == item or columns == 1) and _leads(row, columns * item, item, len(array))


def _leads(stride: int, size: int, item: int, count: int) -> bool:
    return count == 1 or (stride >= size and stride % item == 0)


def _leading(array: AnyArray) -> int:
    """Items from a row to the next, or from a column to the next."""
    rows = array if _by_rows(array) else array.T
    (count, length), stride = rows.shape, rows.strides[0]
    return int(max(length, stride // rows.itemsize if count > 1 else 1))
