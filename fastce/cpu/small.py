"""Small plain calls as one compiled function: what is wrong with the values, loss, and gradient.

Of the time of a small call most passes between compiled functions, not in them. These two do what
`calls` does for rows side by side without options, by its kernels and in its pieces: every bit is
the same.
"""

import numpy as np

from fastce.cpu.jit import device, kernel
from fastce.cpu.layout import CHUNK
from fastce.cpu.loops import cross_entropy_columns, cross_entropy_rows
from fastce.cpu.memory import address, zeros
from fastce.cpu.tiles import count_tiles
from fastce.cpu.vector import lanes

REFUSED = -1
# Numba compiles a kernel anew for a literal. With numbers, that of `calls` serves here as well.
NO = np.bool_(False)
ZERO, ONE = np.int64(0), np.int64(1)


@device
def _first_byte(array):
    return array.ctypes.data


@device
def _overlap(a, b):
    """Whether two arrays without gaps have memory in common."""
    return (
        _first_byte(a) < _first_byte(b) + b.size * b.itemsize
        and _first_byte(b) < _first_byte(a) + a.size * a.itemsize
    )


@device
def _rows_that_count(logits, targets, checked, classes, ignore_index, out):
    """Their number, or -1 if a target is bad or `out` lies where it must not.

    The targets that have been looked at go to `checked`: the caller's may change (see `loops`).
    """
    if out is not None:
        if _first_byte(out) != _first_byte(logits) and _overlap(out, logits):
            return -1
        if _overlap(out, targets):
            return -1
    count = 0
    bad = 0
    for i in range(len(targets)):
        y = targets[i]
        checked[i] = y
        valid = y != ignore_index
        count += valid
        bad += valid & ((y < 0) | (y >= classes))
    return -1 if bad > 0 else count


@device
def _total(sums):
    nll = 0.0
    for part in range(len(sums)):
        nll += sums[part, 0]
    return nll


@device
def _reduce(sums, mean, count, loss):
    """The loss in its own dtype: what Python rounds, it rounds as the caller has chosen."""
    total = _total(sums)
    if mean:
        total = total / count if count > 0 else np.nan
    loss[0] = total


@device
def _scale(mean, count):
    return 1.0 / count if mean and count > 0 else 1.0


@kernel
def small_rows(logits, targets, classes, ignore_index, mean, out, loss):
    """Rows that count, or REFUSED; the reduced loss to `loss`, the gradient to `out` (or None)."""
    rows = len(targets)
    checked = np.empty(rows, np.int64)
    count = _rows_that_count(logits, targets, checked, classes, ignore_index, out)
    if count < 0:
        return REFUSED
    size = logits.itemsize
    chunk = max(1, CHUNK // classes)
    sums = np.empty(((rows + chunk - 1) // chunk, 2))
    cross_entropy_rows(
        logits, checked, None, None, None, None, None, None, None, None, out, sums,
        _scale(mean, count), 1.0, NO, ignore_index, 1.0, 0.0, 0.0, None,
        ONE, rows, classes, chunk, ZERO, classes * size, None, ZERO, ZERO, None, ZERO,
        classes * size, None,
        np.zeros(1, np.int64),
    )  # fmt: skip
    _reduce(sums, mean, count, loss)
    return count


@kernel
def small_columns(logits, targets, classes, ignore_index, mean, out, loss):
    """`small_rows` for few classes."""
    rows = len(targets)
    checked = np.empty(rows, np.int64)
    count = _rows_that_count(logits, targets, checked, classes, ignore_index, out)
    if count < 0:
        return REFUSED
    size = logits.itemsize
    width = lanes(zeros(address(logits)))
    chunk = max(1, CHUNK // (classes * width))
    sums = np.empty(((count_tiles(1, rows, width) + chunk - 1) // chunk, 2))
    cross_entropy_columns(
        logits, checked, None, None, None, None, None, None, None, None, out, sums,
        _scale(mean, count), 1.0, NO, ignore_index, 1.0, 0.0, 0.0, None,
        ONE, rows, classes, chunk, ZERO, classes * size, size, ZERO, ZERO, ZERO, ZERO,
        classes * size, size,
        np.zeros(1, np.int64),
    )  # fmt: skip
    _reduce(sums, mean, count, loss)
    return count
