"""Every number as a logit: rows in which it plays each part, and the right results for them.

A fault of one number in a million is not found by drawing thousands of rows.  A row here has a few
classes, one or all of which are made from the number to try; there are 2^32 float32 numbers, and
the kernels do 10^8 rows a second.  Right results are the formulas of the contract by the C
library's exp and log1p in float64, good to 1e-15 for logits of at most 32 bits.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

CLASSES = 4

# Numbers ------------------------------------------------------------------------------------------


def every_number(dtype: np.dtype[Any]) -> Array:
    """All 65536 numbers of a 16-bit dtype, NaN and infinities included."""
    return np.arange(1 << 16, dtype=np.uint16).view(dtype)


def patterns(start: int, step: int, count: int) -> Array:
    """`count` float32 numbers whose bit patterns are `step` apart."""
    return ((start + step * np.arange(count, dtype=np.uint64)) & 0xFFFFFFFF).astype("u4").view("f4")


def boundaries(dtype: np.dtype[Any]) -> Array:
    """Numbers on both sides of where the code does something else.

    Where x log2(e), or that of an eighth or a sixteenth of it, is rounded to another integer; the
    LEAD of a maximum over its reference; 1024, where a shift begins; powers of two; the ends of the
    range, normal and not; zeros; and three neighbours on each side.
    """
    info = ml_dtypes.finfo(dtype)
    wide = [k * math.log(2) / 2 for k in range(-3100, 3101)]
    wide += [k * math.log(2) / 16 for k in range(-1800, 1801)]
    wide += [
        sign * x for sign in (1, -1) for x in (0.0, 10.0, 40.0, 41.0, 1024.0, 87.5, 103.5, 708)
    ]
    wide += [sign * 2.0**k for sign in (1, -1) for k in range(-150, 128)]
    wide += [sign * float(x) for sign in (1, -1) for x in (
        info.max, info.smallest_normal, info.smallest_subnormal,
    )]  # fmt: skip
    with np.errstate(over="ignore", under="ignore"):
        x = np.array(wide).astype(dtype)
    x = np.unique(x[np.isfinite(x.astype(np.float64))])
    around = [x]
    for toward in (np.inf, -np.inf):
        neighbour = x
        for _ in range(3):
            with np.errstate(over="ignore"):
                neighbour = np.nextafter(neighbour, np.array(toward, dtype))
            around.append(neighbour)
    return np.concatenate(around)


# Rows ---------------------------------------------------------------------------------------------

BESIDE = (0.0, 1.5, -2.0)  # everyday logits beside a number to try
# Name: whether the others are BESIDE (0), a little below (1) or the same (2), and the target.
PARTS = {
    "the maximum, and the target": (1, 0),
    "the maximum, not the target": (1, 1),
    "the target": (0, 0),
    "another class": (0, 1),
    "all classes": (2, 2),
}


class Batch(NamedTuple):
    """Rows (N, 4) and their targets."""

    logits: Array
    targets: NDArray[np.int64]


@numba.njit(nogil=True)
def _fill(x, gaps, others, logits):
    for i in range(len(x)):
        for k in range(4):
            z = x[i]
            if k > 0 and others == 0:
                z = np.float32(BESIDE[k - 1])
            if k > 0 and others == 1:
                z = x[i] - gaps[(3 * i + k) % len(gaps)]
            logits[i, (k + i) % 4] = z


def batches(x: Array, seed: int) -> Iterator[tuple[str, Batch]]:
    """Rows of all PARTS for the numbers x; the classes are rotated from row to row."""
    gaps = np.random.default_rng(seed).random(4093, dtype=np.float32) * np.float32(12)
    turn = np.arange(len(x))
    with np.errstate(invalid="ignore"):  # a signalling NaN
        single = x.astype(np.float32)
    for part, (others, target) in PARTS.items():
        logits = np.empty((len(x), CLASSES), np.float32)
        _fill(single, gaps, others, logits)
        with np.errstate(invalid="ignore", over="ignore"):
            yield part, Batch(logits.astype(x.dtype), (turn + target) % CLASSES)


def padded(logits: Array, classes: int, seed: int) -> tuple[Array, NDArray[np.int64]]:
    """The rows with masked classes between theirs, and where each class has gone."""
    rng = np.random.default_rng(seed)
    place = np.sort(rng.permuted(np.tile(np.arange(classes), (257, 1)), axis=1)[:, :CLASSES])
    place = np.resize(place, (len(logits), CLASSES))
    wide = np.full((len(logits), classes), -np.inf, logits.dtype)
    np.put_along_axis(wide, place, logits, axis=1)
    return wide, place


# Right results ------------------------------------------------------------------------------------


class Right(NamedTuple):
    """Of every row: results in float64, and by how much its maximum leads."""

    loss: NDArray[np.float64]
    lse: NDArray[np.float64]
    entropy: NDArray[np.float64]
    lead: NDArray[np.float64]
    top: NDArray[np.float64]
    p: NDArray[np.float64]
    log_p: NDArray[np.float64]
    grad: NDArray[np.float64]
    hess: NDArray[np.float64]  # p (1 - p)
    product: NDArray[np.float64]  # of the Hessian and the target's unit vector


@numba.njit(nogil=True, error_model="numpy")
def _right(z, targets, loss, lse, entropy, lead, tops, p, log_p, grad, hess, product):
    for i in range(len(z)):
        y = targets[i]
        top = 0
        nan = z[i, 0] != z[i, 0]
        for j in range(1, 4):
            nan = nan or z[i, j] != z[i, j]
            if z[i, j] > z[i, top]:
                top = j
        m = z[i, top]
        bad = nan or not abs(m) < np.inf
        rest = 0.0
        gap = 0.0
        second = -np.inf
        for j in range(4):
            p[i, j] = 1.0 if j == top else math.exp(z[i, j] - m)
            if j != top:
                second = max(second, z[i, j])
                rest += p[i, j]
                if p[i, j] > 0.0:
                    gap += p[i, j] * (m - z[i, j])
        tail = np.nan if bad else math.log1p(rest)
        lead[i] = m - second
        tops[i] = np.nan if nan else m
        lse[i] = tops[i] if bad else m + tail
        entropy[i] = gap / (1.0 + rest) + tail
        loss[i] = (m - z[i, y]) + tail
        for j in range(4):
            others = 0.0
            for k in range(4):
                if k != j:
                    others += p[i, k]
            hess[i, j] = np.nan if bad else (p[i, j] / (1.0 + rest)) * (others / (1.0 + rest))
            grad[i, j] = -others / (1.0 + rest) if j == y else p[i, j] / (1.0 + rest)
            log_p[i, j] = (z[i, j] - m) - tail
        for j in range(4):
            p[i, j] = np.nan if bad else p[i, j] / (1.0 + rest)
            grad[i, j] = np.nan if bad else grad[i, j]
        for j in range(4):
            product[i, j] = hess[i, j] if j == y else -p[i, j] * p[i, y]


def right(logits: Array, targets: NDArray[np.int64]) -> Right:
    """What the contract says of rows of four classes, in float64."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        z = logits.astype(np.float64)
    n = len(z)
    results = Right(*(np.empty(n) for _ in range(5)), *(np.empty((n, CLASSES)) for _ in range(5)))
    _right(z, targets, *results)
    return results


@numba.njit(nogil=True, error_model="numpy")
def _worst(got, want, scale, chosen, smallest, largest):
    worst = 0.0
    at = -1
    for i in range(len(want)):
        if not chosen[i]:
            continue
        for j in range(want.shape[1]):
            g = got[i, j]
            w = want[i, j]
            error = abs(g - w)
            size = max(abs(w), scale[i])
            if error <= worst * size or (g != g and w != w):
                continue
            if abs(w) >= largest and abs(g) >= largest and (g > 0) == (w > 0):
                continue
            if size >= smallest:
                error = error / size
            elif error <= smallest:
                error = 0.0
            else:
                error = np.inf
            if not error <= worst:
                worst = error if error == error else np.inf
                at = i
    return worst, at


def worst(
    got: Array, want: NDArray[np.float64], scale: NDArray[np.float64], chosen: NDArray[np.bool_]
) -> tuple[float, int]:
    """The largest error of the chosen rows relative to what is right or the scale, and its row.

    Nothing counts below the smallest normal number; NaN and infinities must be where they are right
    and only there.
    """
    info = ml_dtypes.finfo(got.dtype)
    largest, smallest = float(info.max), float(info.smallest_normal)
    if got.dtype.itemsize == 2:
        got = got.astype(np.float32)
    shape = len(want), want.size // len(want)
    return _worst(got.reshape(shape), want.reshape(shape), scale, chosen, smallest, largest)
