"""The mathematics of one row of logits on a GPU; device functions for anybody's `cuda.jit` code.

A row z is known by its maximum m and by

    rest = sum of exp(z_j - m) over all classes but one where the maximum is,

from which   logsumexp = m + log1p(rest)   and   p_j = exp(z_j - m) / (1 + rest).
Every term is non-negative, so nothing cancels: a loss of 1e-30 keeps its digits.

How rest is summed.  Exponentials are taken relative to the second largest logit, the `reference`,
so that the largest of the others counts as exactly 1, and so does the maximum itself, which is then
taken off again without an error.  They are added as integers, in fixed point.  Integer addition is
associative: any split over threads, warps and blocks, and any alignment of the row in memory, gives
the same bits.  The price is five instructions per element for one, of some forty that a
memory-bound kernel has to spare.

Numbers of single elements have the precision of the logits (at least float32), those of a row
float64.
"""

import math

import numpy as np
from numba import types

from fastce.cpu.constants import CONSTANTS
from fastce.cuda.machine import (
    add,
    as_bits,
    convert,
    device,
    exponential,
    from_bits,
    maximum,
    minimum,
    reciprocal,
)

_MINUS_INF = np.float32(-np.inf)
# (atanh(s) / s - 1) / s**2 in s**2
_C1, _C2, _C3, _C4, _C5, _C6, _C7 = CONSTANTS[types.float64]["ATANH"]
# What lifts the bit pattern of sqrt(2) to that of 2.
_TO_NEXT_POWER = 0x3FF0000000000000 - 0x3FE6A09E667F3BCD


@device
def top_two(m, second, z):
    """The two largest of the logits so far, (m, second), and one more; NaN stays in m."""
    return maximum(m, z), maximum(second, minimum(m, z))


@device
def merge_top_two(m, second, other_m, other_second):
    """The two largest of two parts of a row."""
    return maximum(m, other_m), maximum(maximum(second, other_second), minimum(m, other_m))


@device
def reference(m, second):
    """What exponentials are taken relative to."""
    return second if second > _MINUS_INF else m


@device
def term(z, reference):
    """exp(z - reference), 1 for the maximum too."""
    return exponential(minimum(z, reference) - reference, convert(0.0, z))


@device
def accumulate(high, low, e, coarse, minus_coarse, fine, minus_fine):
    """Add e in [0, 1] to a sum in fixed point, in two integers.

    Adding `coarse` rounds e to a multiple of its unit in the last place, which the bit pattern
    counts; what was rounded off is exact, and counted in units of `fine`.
    """
    rounded = e + coarse
    remainder = e - (rounded - coarse)
    high = add(add(high, as_bits(rounded)), minus_coarse)
    low = add(add(low, as_bits(remainder + fine)), minus_fine)
    return high, low


@device
def log1p(x):
    """log(1 + x) of 0 <= x < 2**1000 in float64, with its relative accuracy for the smallest x.

    Unlike libdevice's it has no division and no branch, which cost the registers that a row needs.
    """
    u = 1.0 + x
    k = ((as_bits(u) + _TO_NEXT_POWER) >> 52) - 1023
    f = u * from_bits((1023 - k) << 52) - 1.0
    lost = (x - (u - 1.0)) * reciprocal(u)  # what rounding 1 + x has dropped; NaN comes through
    s = f * reciprocal(2.0 + f)
    z = s * s
    w = z * z
    series = (_C1 + z * _C2) + w * ((_C3 + z * _C4) + w * ((_C5 + z * _C6) + w * _C7))
    near_one = (2.0 * s * z) * series + 2.0 * s
    return k * 0.6931471805599453 + (lost + near_one)


@device
def rest_of_sum(m, reference, others):
    """The rest from the sum of the terms but the maximum's; NaN where the row has no softmax."""
    top = np.float64(m)
    if not abs(top) < np.inf:
        return np.nan
    return math.exp(np.float64(reference) - top) * others


@device
def merge(m, rest, other_m, other_rest):
    """(m, rest) of a row from those of two parts of it, in float64; a part may be all -inf."""
    if other_m == -np.inf:
        return m, rest
    if m == -np.inf:
        return other_m, other_rest
    if other_m > m:
        return other_m, other_rest + (1.0 + rest) * math.exp(m - other_m)
    return maximum(m, other_m), rest + (1.0 + other_rest) * math.exp(other_m - m)


@device
def capped(x, cap):
    """cap * tanh(x / cap); -inf stays -inf."""
    return convert(_MINUS_INF, x) if x == _MINUS_INF else cap * convert(math.tanh(x / cap), x)


@device
def cap_slope(x, cap):
    """The derivative of `capped`."""
    one = convert(1.0, x)
    e = convert(math.exp(convert(-2.0, x) * abs(x / cap)), x)
    return one if x == _MINUS_INF else convert(4.0, x) * e / ((one + e) * (one + e))


@device
def weighted_gap(u, gap):
    """u * gap, zero where u is zero even if the gap is infinite."""
    return 0.0 if u == 0.0 else u * gap


@device
def cross_entropy(m, rest, z_y, t, gap, mass):
    """The loss t * (lse - z_y) + sum u_j (lse - z_j) of a row.

    t is the weight of the target class y, zero if the labels are soft; gap is sum u_j (m - z_j) and
    mass sum u_j.  The gradient is (t + mass) p_j - u_j - t [j = y].
    """
    return weighted_gap(t, m - z_y) + gap + (t + mass) * log1p(rest)


@device
def target_gradient(m, rest, z_y, a, b):
    """a p_y - b, without cancellation where p_y is near one and a near b."""
    if z_y == m:
        return (a - b) - a * (rest * reciprocal(1.0 + rest))
    return a * (math.exp(z_y - m) * reciprocal(1.0 + rest)) - b


@device
def gradient_scale(m, rest, a):
    """(factor, power) with a p_j = factor * exp(z_j - m) * 2**power, 1 <= |factor| < 2.

    The power joins the argument of the exponential, so that a p_j underflows once, at its own size.
    """
    scale = a * reciprocal(1.0 + rest)
    power = ((as_bits(scale) >> 52) & 0x7FF) - 1023
    if power < -120 or power > 120:  # zero, NaN, or beyond what float32 takes in one step
        power = 0 if power < 0 else 120 if power < 1024 else 0
    return scale * from_bits((1023 - power) << 52), power


@device
def scaled(z, m, factor, power):
    """A p_j from `gradient_scale`: factor * exp(z - m) * 2**power."""
    return factor * exponential(z - m, power)
