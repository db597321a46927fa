"""The mathematics of `rows`, 32 rows (16 of float64) at a time, one in each lane.

For few classes, and for class axes that are not the last.  Class j of the rows lies `offset + j *
advance` bytes from the base, the rows `step` bytes from each other (None: side by side).
"""

import numpy as np

from fastce.cpu.constants import (
    constant,
)
from fastce.cpu.elementary import capped, exp_scale, exp_scaled, log1p
from fastce.cpu.jit import device
from fastce.cpu.memory import (
    load,
    store,
    store_number,
    zeros,
)
from fastce.cpu.rows import (
    distance,
    gradient_scale,
    lifted_scale,
    reference,
    scaled_maximum,
    weighted_gap,
)
from fastce.cpu.vector import (
    convert,
    extract,
    fma,
    lanes,
    maximum,
    splat,
    where,
)

SPAN = 16  # float32 additions a lane before the sum moves on to float64


@device
def statistics(base, offset, count, advance, step, softcap):
    """(m, rest, first class of the maximum) of the rows; m and the class typed like the logits."""
    zero = zeros(base)
    m = zero - np.inf
    first = zero
    for j in range(count):
        z = capped(load(base, offset + j * advance, step, zero), softcap)[0]
        first = where(z > m, float(j), first)
        m = maximum(z, m)
    shift, power = reference(m)
    bias, floor = lifted_scale(power, zero)
    rest = convert(zero, 0.0)
    for start in range(0, count, SPAN):
        part = zero
        for j in range(start, min(start + SPAN, count)):
            z = capped(load(base, offset + j * advance, step, zero), softcap)[0]
            part = part + where(first == float(j), 0.0, exp_scaled(z - shift, bias, floor))
        rest = rest + convert(part, 0.0)
    m_wide = convert(m, 0.0)
    rest = rest / (scaled_maximum(m_wide, zero) * constant("LIFTED", zero))
    return m_wide, rest, first  # NaN for rest where the maximum is infinite


@device
def labels(soft, soft_offset, soft_advance, soft_step, weight, j, keep, spread, like):
    """What the labels lay on class j: (keep * h_j + spread) * w_j, keep and spread lane by lane."""
    u = spread
    if soft is not None:
        h = load(soft, soft_offset + j * soft_advance, soft_step, like)
        u = fma(h, keep, spread)
    if weight is not None:
        u = u * weight[j]
    return u


@device
def gaps(
    base, offset, count, advance, step, softcap, m,
    soft, soft_offset, soft_advance, soft_step, weight, keep, spread,
):  # fmt: skip
    """Sums of u_j * (m - z_j) and of u_j, u being the `labels` of each row."""
    zero = zeros(base)
    top = convert(m, zero)
    gap = convert(zero, 0.0)
    mass = gap
    for j in range(count):
        u = labels(
            soft, soft_offset, soft_advance, soft_step, weight, j,
            splat(keep, zero), splat(spread, zero), zero,
        )  # fmt: skip
        z = capped(load(base, offset + j * advance, step, zero), softcap)[0]
        gap = gap + convert(weighted_gap(u, top, z), 0.0)
        mass = mass + convert(u, 0.0)
    return gap, mass


@device
def entropy_gap(base, offset, count, advance, step, softcap, m, rest):
    """Mean of m - z_j under each row's softmax."""
    zero = zeros(base)
    top = convert(m, zero)
    shift, power = reference(top)
    bias, floor = exp_scale(power, zero)
    gap = convert(zero, 0.0)
    for j in range(count):
        z = capped(load(base, offset + j * advance, step, zero), softcap)[0]
        u = exp_scaled(z - shift, bias, floor)
        gap = gap + convert(weighted_gap(u, top, z), 0.0)
    return gap / (scaled_maximum(m, zero) * (1.0 + rest))


@device
def write_gradient(
    base, offset, count, advance, step, softcap, m, rest, a, valid,
    out, out_offset, out_advance, out_step, skip,
    soft, soft_offset, soft_advance, soft_step, weight, keep, spread,
):  # fmt: skip
    """Write a p_j - u_j for every class of the rows, exact zeros where `valid` is false."""
    zero = zeros(base)
    shift = convert(reference(m)[0], zero)
    bias, floor, factor = gradient_scale(m, rest, a, zero)
    factor = convert(factor, zero)
    for j in range(count):
        u = labels(soft, soft_offset, soft_advance, soft_step, weight, j, keep, spread, zero)
        z, slope = capped(load(base, offset + j * advance, step, zero), softcap)
        g = fma(exp_scaled(z - shift, bias, floor), factor, -1.0 * u)
        put(out, out_offset + j * out_advance, out_step, where(valid, g * slope, 0.0), skip)


@device
def write_log_softmax(
    base, offset, count, advance, step, m, rest, out, out_offset, out_advance, out_step, skip
):  # fmt: skip
    """Write (z_j - m) - log1p(rest) for every class of the rows."""
    zero = zeros(base)
    top = convert(m, zero)
    tail = convert(log1p(rest), zero)
    for j in range(count):
        z = load(base, offset + j * advance, step, zero)
        put(out, out_offset + j * out_advance, out_step, (z - top) - tail, skip)


@device
def put(out, offset, step, values, skip):
    """Store the lanes from `skip` on."""
    if skip == 0:
        store(out, offset, step, values)
    else:
        for lane in range(skip, lanes(values)):
            store_number(out, offset + lane * distance(out, step), extract(values, lane))
