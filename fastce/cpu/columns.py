"""The mathematics of `rows`, 32 rows (16 of float64) at a time, one in each lane of a tile.

A tile (see `tiles`) is a base and the offset where class 0 of the rows starts.
"""

import numpy as np

from fastce.cpu.elementary import add_up, capped, exp_scaled, log1p
from fastce.cpu.jit import device
from fastce.cpu.memory import item_size, load, store, zeros
from fastce.cpu.rows import SHORT, gradient_scale, scale_of, short_gap, weighted_gap
from fastce.cpu.vector import convert, fma, lanes, maximum, splat, where

SPAN = 4  # classes that are added up, in pairs, before the sum moves on to float64 (see `rows`)


@device
def number(base, offset, j, lane, like):
    """Byte offset of the number of class j in a lane of a tile of vectors like `like`."""
    return offset + (j * lanes(like) + lane) * item_size(base)


@device
def class_of(base, offset, j, like):
    """The vector of class j."""
    return load(base, number(base, offset, j, 0, like), None, like)


@device
def statistics(base, offset, count, softcap):
    """(m, rest, first class of the maximum) of the rows; the class typed like the logits."""
    zero = zeros(base)
    m = zero - np.inf
    first = zero
    for j in range(count):
        z = capped(class_of(base, offset, j, zero), softcap)[0]
        first = where(z > m, float(j), first)
        m = maximum(z, m)
    m_wide = convert(m, 0.0)
    shift, bias, floor, one = scale_of(m_wide, zero)
    rest = convert(zero, 0.0)
    lost = rest
    whole = count - count % SPAN
    for j in range(0, whole, SPAN):
        e = _term(base, offset, j, softcap, first, shift, bias, floor)
        e = e + _term(base, offset, j + 1, softcap, first, shift, bias, floor)
        f = _term(base, offset, j + 2, softcap, first, shift, bias, floor)
        f = f + _term(base, offset, j + 3, softcap, first, shift, bias, floor)
        rest, lost = add_up(rest, lost, convert(e + f, 0.0), zero)
    e = zero
    for j in range(whole, count):
        e = e + _term(base, offset, j, softcap, first, shift, bias, floor)
    rest, lost = add_up(rest, lost, convert(e, 0.0), zero)
    return m_wide, (rest + lost) / one, first  # NaN for rest where the maximum is infinite


@device
def _term(base, offset, j, softcap, skipped, shift, bias, floor):
    """Scaled exponentials of class j, zero in the lanes where it is the class `skipped`."""
    z = capped(class_of(base, offset, j, zeros(base)), softcap)[0]
    return where(skipped == float(j), 0.0, exp_scaled(z - shift, bias, floor))


@device
def labels(soft, soft_offset, weight, j, keep, spread, like):
    """What the labels lay on class j: (keep * h_j + spread) * w_j, keep and spread lane by lane."""
    u = spread
    if soft is not None:
        h = class_of(soft, soft_offset, j, like)
        u = fma(h, keep, spread)
    if weight is not None:
        u = u * weight[j]
    return u


@device
def gaps(base, offset, count, softcap, m, soft, soft_offset, weight, keep, spread):
    """Sums of u_j * (m - z_j) and of u_j, u being the `labels` of each row."""
    zero = zeros(base)
    top = convert(m, zero)
    gap = convert(zero, 0.0)
    gap_lost = gap
    mass = gap
    mass_lost = gap
    for j in range(count):
        u = labels(soft, soft_offset, weight, j, splat(keep, zero), splat(spread, zero), zero)
        z = capped(class_of(base, offset, j, zero), softcap)[0]
        gap, gap_lost = add_up(gap, gap_lost, convert(short_gap(u, top, z), 0.0), zero)
        mass, mass_lost = add_up(mass, mass_lost, convert(u, 0.0), zero)
    return (gap + gap_lost) / SHORT, mass + mass_lost


@device
def entropy_gap(base, offset, count, softcap, m, rest):
    """Mean of m - z_j under each row's softmax."""
    zero = zeros(base)
    top = convert(m, zero)
    shift, bias, floor, one = scale_of(m, zero)
    gap = convert(zero, 0.0)
    for j in range(count):
        z = capped(class_of(base, offset, j, zero), softcap)[0]
        u = exp_scaled(z - shift, bias, floor)
        gap = gap + convert(weighted_gap(u, top, z), 0.0)
    return gap / (one * (1.0 + rest))


@device
def to_gradient(
    base, offset, count, softcap, m, rest, a, valid, soft, soft_offset, weight, keep, spread
):
    """Turn every z_j of the tile into a p_j - u_j, exact zeros where `valid` is false."""
    zero = zeros(base)
    shift, bias, floor, factor = gradient_scale(m, rest, a, zero)
    for j in range(count):
        u = labels(soft, soft_offset, weight, j, keep, spread, zero)
        z, slope = capped(class_of(base, offset, j, zero), softcap)
        g = fma(exp_scaled(z - shift, bias, floor), factor, -1.0 * u)
        if softcap is not None:
            g = g * slope
        store(base, number(base, offset, j, 0, zero), None, where(valid, g, 0.0))


@device
def to_log_softmax(base, offset, count, m, rest):
    """Turn every z_j of the tile into (z_j - m) - log1p(rest)."""
    zero = zeros(base)
    top = convert(m, zero)
    tail = convert(log1p(rest), zero)
    for j in range(count):
        z = class_of(base, offset, j, zero)
        store(base, number(base, offset, j, 0, zero), None, (z - top) - tail)
