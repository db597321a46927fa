"""Sums that have the same bits in whatever order they are added up, in a few numbers each.

A number is cut at the powers of 2**32 into integers, its digits, one per bin.  A sum consists of
its top, the highest bin it has met, and of a fixed number of digits, those of the top and of the
bins below it; digits are added up apart and never carried, which is exact for 2**21 numbers.
Digits further below are dropped.  The top of all numbers is at least that of any part of them, so
that no digit is dropped early that would count in the end: what is left depends on the numbers and
not on their order [Demmel and Nguyen, "Parallel reproducible summation", IEEE Transactions on
Computers 64(7), 2015].

A sum lies in row i of an array of float64: the top at `at`, the digits after it.  Infinities and
NaN are in a bin of their own above all others.
"""

import math

import numpy as np

from fastce.cpu.elementary import two_sum
from fastce.cpu.jit import device

WIDTH = 32  # bits of a bin
BASE = 2.0**WIDTH
FEW, MANY = 3, 4  # digits: at least 65 and 97 bits below the largest number


@device
def _halves(x):
    """The leading 26 bits of x and the others; |x| below 2**996."""
    shifted = x * 134217729.0
    high = shifted - (shifted - x)
    return high, x - high


@device
def two_product(x, y):
    """x * y rounded, and what rounding has dropped; without `fma`, which some would round twice."""
    p = x * y
    a, b = _halves(x)
    c, d = _halves(y)
    return p, ((a * c - p) + a * d + b * c) + b * d


@device
def shifted(x, bins, power):
    """x * 2**(WIDTH * bins + power); bins may be out of all proportion."""
    return math.ldexp(x, WIDTH * int(min(max(bins, -200.0), 200.0)) + power)


@device
def quotient(high, low, divisor):
    """(high + low) / divisor, rounded once nearly always."""
    q = high / divisor
    product, lost = two_product(q, divisor)
    return q + (((high - product) - lost) + low) / divisor


@device
def clear(sums, i, at, digits):
    """The sum of nothing."""
    sums[i, at] = -np.inf
    for k in range(digits):
        sums[i, at + 1 + k] = 0.0


@device
def _raise_top(sums, i, at, digits, top):
    """Make the top at least `top`; returns by how many bins it is higher."""
    here = sums[i, at]
    if here == top:
        return 0.0
    if here > top:
        return here - top
    down = top - here  # infinite for the sum of nothing
    for k in range(digits - 1, -1, -1):
        sums[i, at + 1 + k] = sums[i, at + 1 + k - int(down)] if k >= down else 0.0
    sums[i, at] = top
    return 0.0


@device
def add(sums, i, at, digits, x, bins):
    """Add x * 2**(WIDTH * bins); bins is an integer held in float64, up to 2**52."""
    _add(sums, i, at, digits, x, 0, bins)


@device
def _add(sums, i, at, digits, x, power, bins):
    """Add x * 2**(power + WIDTH * bins)."""
    if x == 0.0:
        return
    if not np.isfinite(x):
        if _raise_top(sums, i, at, digits, np.inf) == 0.0:
            sums[i, at + 1] += x
        return
    fraction, exponent = math.frexp(x)
    exponent += power
    up = (exponent - 1) // WIDTH
    value = math.ldexp(fraction, exponent - WIDTH * up)
    k = _raise_top(sums, i, at, digits, bins + up)
    while value != 0.0 and k < digits:
        digit = np.trunc(value)
        sums[i, at + 1 + int(k)] += digit
        value = (value - digit) * BASE
        k += 1.0


@device
def add_product(sums, i, at, digits, x, y, bins):
    """Add x * y * 2**(WIDTH * bins), the product exact."""
    if not np.isfinite(x * 0.0 + y * 0.0):
        add(sums, i, at, digits, x * y, 0.0)
        return
    x, x_power = math.frexp(x)
    y, y_power = math.frexp(y)
    high, low = two_product(x, y)
    _add(sums, i, at, digits, high, x_power + y_power, bins)
    _add(sums, i, at, digits, low, x_power + y_power, bins)


@device
def add_product_of_three(sums, i, at, digits, x, y, z, bins):
    """Add x * y * z * 2**(WIDTH * bins), the product exact; all are finite."""
    x, x_power = math.frexp(x)
    y, y_power = math.frexp(y)
    z, z_power = math.frexp(z)
    power = x_power + y_power + z_power
    for part in two_product(x, y):
        high, low = two_product(part, z)
        _add(sums, i, at, digits, high, power, bins)
        _add(sums, i, at, digits, low, power, bins)


@device
def merge(sums, others, i, at, digits):
    """Add the sum in row i of `others`."""
    top = others[i, at]
    if top == -np.inf:
        return
    down = _raise_top(sums, i, at, digits, top)
    for k in range(digits):
        if k + down < digits:
            sums[i, at + 1 + k + int(down)] += others[i, at + 1 + k]


@device
def value(sums, i, at, digits):
    """The sum as (high + low) * 2**(WIDTH * bins)."""
    top = sums[i, at]
    if top == -np.inf:
        return 0.0, 0.0, 0.0
    if top == np.inf:
        return sums[i, at + 1], 0.0, 0.0
    high = 0.0
    low = 0.0
    for k in range(digits - 1, -1, -1):
        high, lost = two_sum(sums[i, at + 1 + k], high / BASE)
        low = low / BASE + lost
    return high, low, top
