"""One row for compiled code to call: without an array made, of any number of classes.

A row is a pointer to its first class, a number of classes and the bytes from class to class (None:
side by side).  Every bit is that of the kernels in `loops`, which have lanes run across rows below
FEW_CLASSES: such a row is brought to the stack, where each of its few vectors is computed as a
vector of their tiles is, and summed in their order.
"""

import numpy as np

from fastce.cpu import rows
from fastce.cpu.elementary import add_up, capped, exp_scale, exp_scaled
from fastce.cpu.jit import device, routine
from fastce.cpu.layout import FEW_CLASSES
from fastce.cpu.loops import capped_number
from fastce.cpu.memory import (
    copy_number,
    item_size,
    load,
    load_number,
    on_the_stack,
    store,
    store_number,
    zeros,
)
from fastce.cpu.softmax import first_nan, logsumexp
from fastce.cpu.vector import (
    convert,
    every_fourth,
    extract,
    first_lane,
    fma,
    lane_numbers,
    lanes,
    largest,
    maximum,
    splat,
    where,
)


@device
def _brought(row, count, step, room):
    """Copy a short row to `room`, what follows it to the end of a vector being -inf."""
    zero = zeros(row)
    each = rows.distance(row, step)
    size = item_size(row)
    for j in range(0, count, lanes(zero)):
        store(room, j * size, None, splat(-np.inf, zero))
    for j in range(count):
        copy_number(row, j * each, room, j * size)


@device
def _classes(room, j, softcap):
    """The vector of classes from j on, after the cap."""
    return capped(load(room, j * item_size(room), None, zeros(room)), softcap)[0]


@device
def _short_statistics(room, count, softcap):
    """(m, rest, first class of the maximum) of a row in `room`, as `columns` has them."""
    zero = zeros(room)
    width = lanes(zero)
    top = zero - np.inf
    for j in range(0, count, width):
        top = maximum(_classes(room, j, softcap), top)
    highest = np.float64(largest(top))
    first = 0
    for j in range(0, count, width):
        lane = first_lane(_classes(room, j, softcap) == highest)
        if lane < width:
            first = j + lane
            break
    shift, bias, floor, one = rows.scale_of(highest, zero)
    rest = 0.0
    lost = 0.0
    for j in range(0, count, width):
        e = exp_scaled(_classes(room, j, softcap) - shift, bias, floor)
        e = where(lane_numbers(zero) == float(first - j), 0.0, e)
        even = every_fourth(e, 0) + every_fourth(e, 1)
        spans = convert(even + (every_fourth(e, 2) + every_fourth(e, 3)), 0.0)
        for k in range(lanes(spans)):
            rest, lost = add_up(rest, lost, extract(spans, k), zero)
    return highest, (rest + lost) / one, first


@device
def _short_gaps(room, count, softcap, m, soft, weight, keep, spread):
    """Sums of u_j (m - z_j) and of u_j, u being the `rows.labels`, as `columns.gaps` has them."""
    zero = zeros(room)
    width = lanes(zero)
    top = convert(m, zero)
    gap = 0.0
    gap_lost = 0.0
    mass = 0.0
    mass_lost = 0.0
    for start in range(0, count, width):
        u = rows.labels(soft, 0, None, weight, start, keep, spread, zero)
        gaps = convert(rows.short_gap(u, top, _classes(room, start, softcap)), 0.0)
        masses = convert(u, 0.0)
        for j in range(start, min(start + width, count)):
            gap, gap_lost = add_up(gap, gap_lost, extract(gaps, j - start), zero)
            mass, mass_lost = add_up(mass, mass_lost, extract(masses, j - start), zero)
    return (gap + gap_lost) / rows.SHORT, mass + mass_lost


@device
def _short_gradient(room, count, softcap, m, rest, a, soft, weight, keep, spread):
    """Turn every z_j in `room` into a p_j - u_j, u being the `rows.labels`."""
    zero = zeros(room)
    shift, bias, floor, factor = rows.gradient_scale(m, rest, a, zero)
    for j in range(0, count, lanes(zero)):
        place = j * item_size(room)
        u = rows.labels(soft, 0, None, weight, j, keep, spread, zero)
        z, slope = capped(load(room, place, None, zero), softcap)
        e = exp_scaled(z - shift, bias, floor)
        g = fma(e, splat(factor, zero), -1.0 * u)
        store(room, place, None, g if softcap is None else g * slope)


@device
def _statistics(row, count, step, softcap):
    """(m, rest) of a row."""
    if count >= FEW_CLASSES:
        return rows.statistics(row, 0, count, step, softcap)
    room = on_the_stack(row, FEW_CLASSES)
    _brought(row, count, step, room)
    m, rest, _ = _short_statistics(room, count, softcap)
    return m, rest


@routine
def row_logsumexp(row, count, step):
    """log of the sum of exp."""
    m, rest = _statistics(row, count, step, None)
    return logsumexp(row, 0, count, rows.distance(row, step), m, rest)


@routine
def row_partial(row, count, step):
    """(m, rest), so that they merge: rest is 0 where all is -inf, m is NaN where anything is."""
    m, rest = _statistics(row, count, step, None)
    if rest == rest:
        return m, rest
    if first_nan(row, 0, count, rows.distance(row, step)) >= 0:
        return np.nan, np.nan
    return m, 0.0


@device
def merged(m, rest, other_m, other_rest):
    """(m, rest) of two parts of a row together, in either order to the last bit."""
    if m != m or other_m != other_m:
        return np.nan, np.nan
    if m < other_m:
        m, rest, other_m, other_rest = other_m, other_rest, m, rest
    if other_m == -np.inf or m == np.inf:
        return m, rest
    if m == other_m:
        return m, (rest + other_rest) + 1.0
    bias, floor = exp_scale(0.0, m)
    return m, rest + (1.0 + other_rest) * exp_scaled(other_m - m, bias, floor)


@routine
def row_cross_entropy(
    row, count, step, out, out_step, y, soft, soft_step, weight, smoothing, z_loss, softcap, scale
):
    """The loss of a row; `scale` times its gradient goes to `out`, which may be the row itself.

    Its target is the class y, or where y is None the probabilities `soft`. Weights lie side by
    side.
    """
    if weight is not None and soft is None and smoothing == 0.0:
        return _cross_entropy(  # no label but the target's, as `calls` has it
            row, count, step, out, out_step, y, soft, soft_step, weight, None,
            smoothing, z_loss, softcap, scale,
        )  # fmt: skip
    return _cross_entropy(
        row, count, step, out, out_step, y, soft, soft_step, weight, weight,
        smoothing, z_loss, softcap, scale,
    )  # fmt: skip


@device
def _weight_of(weight, j, like):
    """The weight of a class, rounded as the vectors like `like` are; 1 without weights."""
    if weight is None:
        return 1.0
    return convert(convert(load_number(weight, j * item_size(weight)), like), 0.0)


@device
def _cross_entropy(
    row, count, step, out, out_step, y, soft, soft_step, weight, spread_weight,
    smoothing, z_loss, softcap, scale,
):  # fmt: skip
    zero = zeros(row)
    each = rows.distance(row, step)
    short = count < FEW_CLASSES
    keep = 1.0 - smoothing
    spread = smoothing / count
    t = 0.0
    special = -1  # the class whose gradient is written apart
    z_y = 0.0
    if y is not None:
        t = keep * _weight_of(weight, y, zero)
        special = y
        z_y = capped_number(load_number(row, y * each), softcap, zero)[0]
    room = on_the_stack(row, FEW_CLASSES)
    soft_room = on_the_stack(soft, FEW_CLASSES)
    weight_room = on_the_stack(spread_weight, FEW_CLASSES)
    gap = 0.0
    mass = 0.0
    if short:
        _brought(row, count, step, room)
        if soft is not None:
            _brought(soft, count, soft_step, soft_room)
        if spread_weight is not None:
            _brought(spread_weight, count, None, weight_room)
        m, rest, first = _short_statistics(room, count, softcap)
        if soft is not None or spread != 0.0:
            gap, mass = _short_gaps(room, count, softcap, m, soft_room, weight_room, keep, spread)
        if soft is not None:
            special = first
    else:
        m, rest, gap, mass = rows.labelled_statistics(
            row, 0, count, step, softcap, soft, 0, soft_step, spread_weight, keep, spread
        )
        if soft is not None and out is not None and rest < 1.0:
            special = rows.first_maximum(row, 0, 0, count, step, softcap, m)
    nll, lse, everything = rows.cross_entropy(m, rest, z_y, t, gap, mass)
    loss = nll + z_loss * lse * lse if z_loss != 0.0 else nll
    if out is not None:
        a = scale * everything
        if z_loss != 0.0:
            a += scale * 2.0 * z_loss * lse
        value = 0.0
        if special >= 0:
            value = _special_gradient(
                row, special, step, soft, soft_step, spread_weight, keep, spread, softcap,
                m, rest, t, a, scale,
            )  # fmt: skip
        if short:
            _short_gradient(
                room, count, softcap, m, rest, a, soft_room, weight_room,
                scale * keep, scale * spread,
            )  # fmt: skip
            store_number(room, special * item_size(room), value)
            for j in range(count):
                copy_number(room, j * item_size(room), out, j * rows.distance(out, out_step))
        else:
            rows.write_gradient(
                row, 0, count, step, softcap, m, rest, a, out, 0, out_step, False,
                soft, 0, soft_step, spread_weight, scale * keep, scale * spread,
            )  # fmt: skip
            if special >= 0:
                store_number(out, special * rows.distance(out, out_step), value)
    return loss


@device
def _special_gradient(
    row, j, step, soft, soft_step, weight, keep, spread, softcap, m, rest, t, a, scale
):
    """The gradient of class j, what its label lays on it being t beside the `rows.labels`."""
    zero = zeros(row)
    raw = load_number(row, j * rows.distance(row, step))
    z, slope = capped_number(raw, softcap, zero)
    h = None if soft is None else load_number(soft, j * rows.distance(soft, soft_step))
    w = None if weight is None else _weight_of(weight, j, zero)
    u = rows.label_of(h, w, keep, spread, zero)
    return slope * rows.target_gradient(m, rest, z, a, scale * (t + u))
