"""exp, log1p and tanh of numbers or vectors, branch-free, to about one unit in the last place.

`exp` comes with its power of two apart: the exponent of the result is chosen by the caller, so that
sums relative to any reference neither overflow nor vanish.
"""

import numpy as np

from fastce.cpu.jit import device
from fastce.cpu.vector import (
    constant,
    convert,
    exponent,
    fma,
    less_ln2,
    maximum,
    polynomial,
    power_of_two,
    splat,
    where,
)


@device
def round_to_integer(x):
    """Nearest integer to x, ties to even; |x| at most 2**22 in float32."""
    return (x + constant("ROUND", x)) - constant("ROUND", x)


@device
def exp_scale(power, like):
    """What makes `exp_scaled` divide by 2**power: the rounding constant and the cut-off."""
    bias = (constant("ROUND", like) + constant("BIAS", like)) - power
    floor = (power - constant("BIAS", like)) * constant("LN2", like)
    return bias, floor


@device
def exp_scaled(d, bias, floor):
    """exp(d) / 2**power; exactly zero where that is below the smallest normal number.

    d = k ln2 + r with |r| <= ln2 / 2, and exp(d) = 2**k exp(r).  The cut-off makes the exponent
    bits zero, so that -inf gives exactly 0 at the cost of one instruction; NaN passes it.
    """
    clamped = maximum(splat(floor, d), d)
    rounded = fma(clamped, constant("LOG2E", d), bias)
    k = rounded - bias
    r = less_ln2(clamped, k)
    return polynomial("EXP", r) * power_of_two(rounded)


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
def capped(z, softcap):
    """softcap * tanh(z / softcap) and its derivative; -inf stays itself, as None leaves all z."""
    if softcap is None:
        return z, splat(1.0, z)
    x = convert(z, 0.0) / softcap
    y = -2.0 * maximum(x, -1.0 * x)
    bias, floor = exp_scale(0.0, x)
    e = exp_scaled(y, bias, floor)
    # exp(y) - 1 without cancellation: the polynomial less its leading one where k = 0
    e_minus_1 = where(y > -0.34, y * polynomial("EXPM1", y), e - 1.0)
    t = where(x > 0.0, -1.0, 1.0) * e_minus_1 / (2.0 + e_minus_1)
    slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    masked = x == -np.inf
    value = where(masked, -np.inf, softcap * t)
    return convert(value, z), convert(where(masked, 1.0, slope), z)
