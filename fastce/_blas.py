"""Matrix products: large ones by SciPy's BLAS, which can add to what is there, else by NumPy's.

`matmul` writes a product apart from the sum that it is added to, and reads it again: measured, that
is a tenth of the time of dweight, to which a few hundred rows are added at once.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from fastce._arguments import AnyArray

# Bytes of a product that is added once it is whole: smaller ones pack their operands too often
# (2 MiB took a quarter longer), larger ones leave the caches.
BLOCK = 8 << 20
# Multiplications from which SciPy is asked. Each of the two libraries has threads of its own, which
# spin for some 25 ms after a product and slow down the other's: short products, which are likely
# to lie between NumPy's, stay with NumPy.
LARGE = 1 << 33
# Additions in a piece that one thread claims, and those from which more threads are worth waking.
ADDITIONS, PARALLEL = 1 << 16, 1 << 17


def multiply(a: AnyArray, b: AnyArray, out: AnyArray, *, accumulate: bool = False) -> None:
    """``out = a @ b``, or ``out += a @ b``; all of one dtype, float32 or float64."""
    gemm = _gemm(out.dtype.char) if out.size * a.shape[1] >= LARGE else None
    if gemm is not None and out.flags.c_contiguous and all(map(_plain, (a, b, out))):
        # Columns are what BLAS has one after another: out^T = b^T a^T.
        (left, turn_left), (right, turn_right) = map(_columns, (b.T, a.T))
        gemm(
            1.0, left, right, float(accumulate), out.T, turn_left, turn_right, overwrite_c=True
        )  # fmt: skip
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
    from fastce.cpu.linear import add as kernel
    from fastce.cpu.threads import launch

    launch(kernel, (target, addend, max(1, ADDITIONS // target.shape[1])), parallel=True)


@functools.cache
def _gemm(char: str) -> Callable[..., Any] | None:
    """SciPy's routine for a dtype, where there is SciPy."""
    try:
        from scipy.linalg import blas
    except ImportError:
        return None
    routine: Callable[..., Any] = {"f": blas.sgemm, "d": blas.dgemm}[char]
    return routine


def _plain(array: AnyArray) -> bool:
    """Whether the routines take an array as it is; of others they make copies, and fill those."""
    flags = array.flags
    return bool(array.size and flags.aligned and (flags.c_contiguous or flags.f_contiguous))


def _columns(array: AnyArray) -> tuple[AnyArray, bool]:
    """An array by columns, and whether it is the transpose that is meant."""
    return (array, False) if array.flags.f_contiguous else (array.T, True)
