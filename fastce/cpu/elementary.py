"""exp, log1p and tanh of numbers or vectors, branch-free, to about one unit in the last place.

`exp` comes with its power of two apart: the exponent of the result is chosen by the caller, so that
sums relative to any reference neither overflow nor vanish.
"""

import numpy as np

from fastce.cpu.constants import (
    STEPS,
    constant,
    exponent,
    fractional_power_of_two,
    less_ln2,
    polynomial,
    power_of_two,
)
from fastce.cpu.jit import device
from fastce.cpu.vector import convert, fma, maximum, splat, where


@device
def round_to_integer(x):
    """Nearest integer to x, ties to even; |x| at most 2**22 in float32."""
    return (x + constant("ROUND", x)) - constant("ROUND", x)


@device
def exp_scale(power, like):
    """What makes `exp_scaled` divide by 2**power: the rounding constant and the cut-off."""
    k = convert(power, like)
    bias = constant("ROUND", like) + STEPS * (constant("BIAS", like) - k)
    floor = (k - constant("BIAS", like)) * constant("LN2", like)
    return bias, floor


@device
def exp_scaled(d, bias, floor):
    """exp(d) / 2**power; exactly zero where d is below the cut-off, as -inf is.

    d = k ln2 / STEPS + r with |r| <= ln2 / (2 STEPS), and exp(d) = 2**(k/STEPS) exp(r).  At the
    cut-off the power of two is exactly zero; results just above it, below the smallest normal
    number, have no accuracy.  NaN passes.
    """
    clamped = maximum(splat(floor, d), d)
    rounded = fma(clamped, constant("STEPS_LOG2E", d), bias)
    power = fractional_power_of_two(rounded)
    r = less_ln2(clamped, rounded - bias)
    return fma(power * r, polynomial("EXP", r), power)


@device
def log1p(x):
    """log(1 + x) of a float64 x >= 0, with its relative accuracy for the smallest x."""
    u = 1.0 + x
    k = exponent(u)
    f = u * power_of_two((constant("ROUND", x) + constant("BIAS", x)) - k) - 1.0
    s = f / (2.0 + f)
    z = s * s
    lost = (x - (u - 1.0)) / u  # what rounding 1 + x has dropped; NaN and inf come through here
    near_one = fma(2.0 * s * z, polynomial("ATANH", z), 2.0 * s)
    return fma(k, constant("LN2", x), lost + near_one)


@device
def two_sum(x, y):
    """x + y rounded, and what rounding has dropped."""
    s = x + y
    other = s - x
    return s, (x - (s - other)) + (y - other)


@device
def add_up(sums, lost, x, like):
    """One more float64 x in a long sum: (sums, lost), which are to be added at the end.

    What rounding drops is kept where numbers of the dtype of `like` are as exact as their sums:
    that of 5000 float64 terms could be wrong by 3e-14.
    """
    if constant("DIGITS", like) < 53.0:
        return sums + x, lost
    sums, dropped = two_sum(sums, x)
    return sums, lost + where(dropped == dropped, dropped, 0.0)  # NaN where the sum is infinite


@device
def capped(z, softcap):
    """softcap * tanh(z / softcap) and its derivative; -inf stays itself, as None leaves all z."""
    if softcap is None:
        return z, splat(1.0, z)
    logit = convert(z, 0.0)
    x = logit / softcap  # which may be infinite where the logit is not
    y = -2.0 * maximum(x, -1.0 * x)
    bias, floor = exp_scale(0.0, x)
    e = exp_scaled(y, bias, floor)
    # exp(y) - 1 without cancellation: the polynomial less its leading one where k = 0
    e_minus_1 = where(y > -0.34, y * polynomial("EXPM1", y), e - 1.0)
    t = where(x > 0.0, -1.0, 1.0) * e_minus_1 / (2.0 + e_minus_1)
    slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    masked = logit == -np.inf
    value = where(masked, -np.inf, softcap * t)
    return convert(value, z), convert(where(masked, 1.0, slope), z)
