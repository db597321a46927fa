"""What a slice of the classes knows of a row, how two slices merge, what follows from all.

A record is a row of float64: the maximum m, the first class where it is, the logit and the weight
of the target (zero in all slices but one), and binned sums (see `binned`), exact and the same in
any order:

    REST   exp(z_j) over all classes but one where the maximum is, in absolute terms
    MASS   u_j, what the labels lay on the classes                    (with labels on all classes)
    GAP    u_j (m' - z_j) - u_j m', m' being the maximum of the slice           (ditto)
    SPREAD exp(z_j) (m' - z_j) - exp(z_j) m' over the classes of REST           (for the entropy)

As in `rows`, one maximum is left out, so that rest = REST / exp(m) keeps the digits of small
losses; where two slices merge, that of the loser enters REST and SPREAD.  With the m of all
classes, sum u_j (m - z_j) = GAP + m MASS, and sum exp(z_j) (m - z_j) = SPREAD + m REST, which the
many digits of GAP and SPREAD leave exact at any common offset.

An ignored row has the first class -1.  m is NaN where a logit is, and the first class then its own.
"""

import math

import numpy as np

from fastce.cpu import binned, columns, rows
from fastce.cpu.constants import constant
from fastce.cpu.elementary import exp_scale, exp_scaled, log1p, two_sum
from fastce.cpu.jit import device, kernel
from fastce.cpu.loops import capped_number
from fastce.cpu.memory import (
    address,
    address_as,
    claim,
    drain,
    hold,
    load,
    load_number,
    store,
    store_number,
    zeros,
)
from fastce.cpu.softmax import first_nan
from fastce.cpu.tiles import allocate, count_tiles, gather, scatter, start_of, tile_rows
from fastce.cpu.vector import convert, lanes, where

MAXIMUM, FIRST, LOGIT, WEIGHT, REST = range(5)
_FEW, _MANY = 1 + binned.FEW, 1 + binned.MANY  # numbers of a sum
PLAIN, LABELS, ENTROPY = REST + _FEW, _FEW + _MANY, 1 + _MANY  # numbers of a record, and more of it

LN2_LOW = 2.3190468138462996e-17  # ln(2) less its float64
# Logits beyond this size differ by 16 at least, or not at all: only the largest count.
HUGE = 2.0**56
# Share of GAP below which its sum with m MASS is what has been dropped: 97 bits of 2**13 slices.
DROPPED = 2.0**-84


@device
def exponential(m, like):
    """exp(m) as a number and an integer of bins (see `binned`), in float64.

    It shares the rounding error of ln(2) of the vectors like `like`, as `rows.exp_of` does. Beyond
    HUGE it is relative to exp(m) itself.
    """
    if abs(m) > HUGE:
        return 1.0, 0.0
    excess = constant("LN2_EXCESS", like)
    bins = np.floor(m / (binned.WIDTH * (constant("LN2", m) + excess)) + 0.5)
    power = binned.WIDTH * bins
    high, low = binned.two_product(power, constant("LN2", m))
    r = ((m - high) - low) - power * (LN2_LOW + excess)
    bias, floor = exp_scale(0.0, r)
    return exp_scaled(r, bias, floor), bins


def places(size: int) -> tuple[int, int, int, int]:
    """Digits of REST, then where MASS, GAP and SPREAD start; 0 for what such a record lacks.

    m REST is added to SPREAD, which takes digits for m, too.
    """
    entropy = size == PLAIN + ENTROPY or size == PLAIN + LABELS + ENTROPY
    digits = binned.MANY if entropy else binned.FEW
    mass = REST + 1 + digits if size >= PLAIN + LABELS else 0
    gap = mass + _FEW if mass > 0 else 0
    return digits, mass, gap, size - _MANY if entropy else 0


_places = device(places)


@device
def _record(records, i, m, rest, first, z_y, w_y, gap, mass, entropy, mean_gap, like):
    """Write what a slice knows; an infinite m comes with no rest.

    With `entropy`, `mean_gap` is the mean of m - z_j under the slice's own softmax.
    """
    digits, mass_at, gap_at, spread_at = _places(records.shape[1])
    records[i, MAXIMUM] = m
    records[i, FIRST] = first
    records[i, LOGIT] = z_y
    records[i, WEIGHT] = w_y
    e, bins = 0.0, 0.0
    binned.clear(records, i, REST, digits)
    if abs(m) < np.inf:
        e, bins = exponential(m, like)
        binned.add_product(records, i, REST, digits, rest, e, bins)
    if entropy is not None:
        binned.clear(records, i, spread_at, binned.MANY)
        if abs(m) < np.inf:
            own = mean_gap * (1.0 + rest)
            binned.add_product(records, i, spread_at, binned.MANY, own, e, bins)
            binned.add_product_of_three(records, i, spread_at, binned.MANY, -m, rest, e, bins)
    if mass_at > 0:
        binned.clear(records, i, mass_at, binned.FEW)
        binned.clear(records, i, gap_at, binned.MANY)
        binned.add(records, i, mass_at, binned.FEW, mass, 0.0)
        binned.add(records, i, gap_at, binned.MANY, gap, 0.0)
        if abs(m) < np.inf:
            binned.add_product(records, i, gap_at, binned.MANY, -mass, m, 0.0)


@device
def _known_maximum(base, offset, count, advance, m, rest, first):
    """The maximum and its first class; those of the first NaN if there is one."""
    if rest != rest:
        nan = first_nan(base, offset, count, advance)
        if nan >= 0:
            return np.nan, nan
    return m, min(first, count - 1)


@kernel
def partial_rows(
    logits_base, targets, soft_base, weight, spread_weight_base, records, entropy, class_offset,
    ignore_index, keep, spread, softcap, outer, inner, classes, chunk, parts,
    outer_stride, inner_stride, step, soft_outer_stride, soft_inner_stride, soft_step, counter,
):  # fmt: skip
    """Records of rows with at least a vector of classes."""
    logits = address(logits_base)
    soft = address(soft_base)
    spread_weight = address(spread_weight_base)
    zero = zeros(logits)
    each = rows.distance(logits, step)
    while True:
        part = claim(counter)
        if part >= parts:
            return
        for i in range(part * chunk, min((part + 1) * chunk, outer * inner)):
            offset = start_of(i, inner, outer_stride, inner_stride)
            z_y = 0.0
            w_y = 0.0
            if targets is not None:
                if targets[i] == ignore_index:
                    _record(records, i, -np.inf, 0.0, -1, 0.0, 0.0, 0.0, 0.0, entropy, 0.0, zero)
                    continue
                y = targets[i] - class_offset
                if 0 <= y < classes:
                    z_y = capped_number(load_number(logits, offset + y * each), softcap, zero)[0]
                    w_y = 1.0 if weight is None else np.float64(weight[y])
            soft_offset = 0
            if soft_base is not None:
                soft_offset = start_of(i, inner, soft_outer_stride, soft_inner_stride)
            m, rest, gap, mass = rows.labelled_statistics(
                logits, offset, classes, step, softcap,
                soft, soft_offset, soft_step, spread_weight, keep, spread,
            )  # fmt: skip
            first = rows.first_maximum(logits, offset, 0, classes, step, softcap, m)
            mean_gap = 0.0
            if entropy is not None:
                mean_gap = rows.entropy_gap(logits, offset, classes, step, softcap, m, rest)
            m, first = _known_maximum(logits, offset, classes, each, m, rest, first)
            _record(
                records, i, m, rest, first + class_offset, z_y, w_y, gap, mass,
                entropy, mean_gap, zero,
            )  # fmt: skip


@kernel
def partial_columns(
    logits_base, targets, soft_base, weight, spread_weight_base, records, entropy, class_offset,
    ignore_index, keep, spread, softcap, outer, inner, classes, chunk, parts,
    outer_stride, inner_stride, class_stride, soft_outer_stride, soft_inner_stride,
    soft_class_stride, counter,
):  # fmt: skip
    """`partial_rows` with the lanes across rows."""
    logits = address(logits_base)
    soft = address(soft_base)
    spread_weight = address(spread_weight_base)
    zero = zeros(logits)
    wide = convert(zero, 0.0)
    width = lanes(zero)
    row_bytes = width * 8
    tiles = count_tiles(outer, inner, width)
    scratch = np.zeros((6, width))
    tile_memory, z_tile = allocate(classes, width)
    tile = address_as(tile_memory, logits_base)
    soft_memory, h_tile = allocate(0 if soft_base is None else classes, width)
    soft_tile = address_as(soft_memory, soft_base)
    advance = columns.number(tile, 0, 1, 0, zero)
    while True:
        part = claim(counter)
        if part >= parts:
            hold(tile_memory)
            hold(soft_memory)
            return
        for number in range(part * chunk, min((part + 1) * chunk, tiles)):
            i, skip, stop = tile_rows(number, outer, inner, width)
            gather(
                logits, outer_stride, inner_stride, class_stride, i, outer, inner, classes,
                tile, z_tile, zero,
            )  # fmt: skip
            m, rest, first = columns.statistics(tile, z_tile, classes, softcap)
            store(scratch, 0, None, m + wide)
            store(scratch, row_bytes, None, rest)
            store(scratch, 2 * row_bytes, None, convert(first, 0.0))
            if soft_base is not None or spread != 0.0:
                if soft_base is not None:
                    gather(
                        soft, soft_outer_stride, soft_inner_stride, soft_class_stride, i, outer,
                        inner, classes, soft_tile, h_tile, zero,
                    )  # fmt: skip
                gap, mass = columns.gaps(
                    tile, z_tile, classes, softcap, where(m == -np.inf, 0.0, m),
                    soft_tile, h_tile, spread_weight, keep, spread,
                )  # fmt: skip
                store(scratch, 3 * row_bytes, None, gap)
                store(scratch, 4 * row_bytes, None, mass)
            if entropy is not None:
                mean_gap = columns.entropy_gap(tile, z_tile, classes, softcap, m, rest)
                store(scratch, 5 * row_bytes, None, mean_gap)
            for lane in range(skip, stop):
                place = columns.number(tile, z_tile, 0, lane, zero)
                z_y = 0.0
                w_y = 0.0
                if targets is not None:
                    if targets[i + lane] == ignore_index:
                        _record(
                            records, i + lane, -np.inf, 0.0, -1, 0.0, 0.0, 0.0, 0.0,
                            entropy, 0.0, zero,
                        )  # fmt: skip
                        continue
                    y = targets[i + lane] - class_offset
                    if 0 <= y < classes:
                        raw = load_number(tile, place + y * advance)
                        z_y = capped_number(raw, softcap, zero)[0]
                        w_y = 1.0 if weight is None else np.float64(weight[y])
                top, at = _known_maximum(
                    tile, place, classes, advance,
                    scratch[0, lane], scratch[1, lane], int(scratch[2, lane]),
                )  # fmt: skip
                _record(
                    records, i + lane, top, scratch[1, lane], at + class_offset, z_y, w_y,
                    scratch[3, lane], scratch[4, lane],
                    entropy, scratch[5, lane], zero,
                )  # fmt: skip


@kernel
def merge(records, others, like):
    """Merge other records into records, row by row."""
    for i in range(len(records)):
        _merge_maximum(records, others, i, like)
        records[i, LOGIT] += others[i, LOGIT]
        records[i, WEIGHT] += others[i, WEIGHT]
        _, mass_at, gap_at, _ = _places(records.shape[1])
        if mass_at > 0:
            binned.merge(records, others, i, mass_at, binned.FEW)
            binned.merge(records, others, i, gap_at, binned.MANY)


@device
def _merge_maximum(records, others, i, like):
    """Merge the maxima, their classes, and what the other classes add up to."""
    m = records[i, MAXIMUM]
    other = others[i, MAXIMUM]
    if m != m or other != other:
        if other != other and (m == m or others[i, FIRST] < records[i, FIRST]):
            records[i, FIRST] = others[i, FIRST]
        records[i, MAXIMUM] = np.nan
        return
    if other > m or (other == m and others[i, FIRST] < records[i, FIRST]):
        records[i, FIRST] = others[i, FIRST]
    records[i, MAXIMUM] = max(m, other)
    digits, _, _, spread_at = _places(records.shape[1])
    if m != other and max(abs(m), abs(other)) > HUGE:
        if other > m:
            binned.clear(records, i, REST, digits)
            binned.merge(records, others, i, REST, digits)
            if spread_at > 0:
                binned.clear(records, i, spread_at, binned.MANY)
                binned.merge(records, others, i, spread_at, binned.MANY)
        return
    binned.merge(records, others, i, REST, digits)
    if spread_at > 0:
        binned.merge(records, others, i, spread_at, binned.MANY)
    if abs(m) < np.inf:
        loser = min(m, other)
        e, bins = exponential(loser, like)
        binned.add(records, i, REST, digits, e, bins)
        if spread_at > 0:
            binned.add_product(records, i, spread_at, binned.MANY, -loser, e, bins)


@device
def _known(records, i, like):
    """(m, rest, gap, mass) of a row, as `rows` has them."""
    m = records[i, MAXIMUM]
    rest = np.nan
    gap = 0.0
    mass = 0.0
    digits, mass_at, gap_at, _ = _places(records.shape[1])
    if abs(m) < np.inf:
        e, unit = exponential(m, like)
        high, low, bins = binned.value(records, i, REST, digits)
        rest = binned.shifted(binned.quotient(high, low, e), bins - unit, 0)
        if mass_at > 0:
            mass, mass_low, bins = binned.value(records, i, mass_at, binned.FEW)
            mass = binned.shifted(mass, bins, 0)
            mass_low = binned.shifted(mass_low, bins, 0)
            gap, m_power = _gap(records, i, gap_at, m, mass, mass_low, 0.0)
            gap = math.ldexp(gap, m_power)
    return m, rest, gap, mass


@device
def _gap(records, i, at, m, mass, mass_low, unit):
    """The sum at `at` + m mass, all in units of bins, as a number and the exponent of its scale.

    Terms that cancel are added with all their digits.
    """
    gap, gap_low, bins = binned.value(records, i, at, binned.MANY)
    if records[i, at] == np.inf:
        return gap, 0
    # Relative to the power of two of m, where nothing overflows.
    m, m_power = math.frexp(m)
    gap = binned.shifted(gap, bins - unit, -m_power)
    gap_low = binned.shifted(gap_low, bins - unit, -m_power)
    high, low = binned.two_product(mass, m)
    both, lost = two_sum(high, gap)
    both += ((lost + low) + gap_low) + mass_low * m
    if abs(both) <= DROPPED * abs(gap):
        return 0.0, 0
    return both, m_power


@device
def _entropy(records, i, m, rest, like):
    """Entropy of the softmax of a row."""
    if rest != rest:
        return np.nan
    e, unit = exponential(m, like)
    digits, _, _, spread_at = _places(records.shape[1])
    high, low, bins = binned.value(records, i, REST, digits)
    gap, power = _gap(records, i, spread_at, m, high, low, bins)
    return log1p(rest) + binned.shifted(gap / e, bins - unit, power) / (1.0 + rest)


@kernel
def statistics(records, like, known):
    """The maximum and the rest of each row; NaN for the rest of an ignored one."""
    for i in range(len(records)):
        m, rest, _, _ = _known(records, i, like)
        known[i, 0] = m
        known[i, 1] = rest


@kernel
def totals(records):
    """Rows that count and the sum of the weights of their targets."""
    count = 0
    mass = 0.0
    for i in range(len(records)):
        if records[i, FIRST] >= 0.0:
            count += 1
            mass += records[i, WEIGHT]
    return count, mass


@kernel
def finish(records, like, keep, z_loss, losses, lses, predicted, entropies):
    """Fill the results of each row; returns the sums of the losses and of the z-loss terms."""
    nll_sum = 0.0
    z_sum = 0.0
    for i in range(len(records)):
        predicted[i] = int(records[i, FIRST])
        if records[i, FIRST] < 0.0:
            losses[i] = 0.0
            lses[i] = 0.0
            if entropies is not None:
                entropies[i] = 0.0
            continue
        m, rest, gap, mass = _known(records, i, like)
        t = keep * records[i, WEIGHT]
        nll, lse, _ = rows.cross_entropy(m, rest, records[i, LOGIT], t, gap, mass)
        penalty = 0.0
        if z_loss != 0.0:
            penalty = z_loss * lse * lse
        nll_sum += nll
        z_sum += penalty
        losses[i] = nll + penalty
        lses[i] = lse if rest == rest else m
        if entropies is not None:
            entropies[i] = _entropy(records, i, m, rest, like)
    return nll_sum, z_sum


@device
def _row_gradient(records, i, g, nll_scale, z_scale, keep, z_loss, like):
    """(m, rest, a, scale): the factor of the softmax in the gradient, and that of the labels."""
    m, rest, gap, mass = _known(records, i, like)
    t = keep * records[i, WEIGHT]
    _, lse, everything = rows.cross_entropy(m, rest, records[i, LOGIT], t, gap, mass)
    scale = g * nll_scale
    a = scale * everything
    if z_loss != 0.0:
        a += g * z_scale * 2.0 * z_loss * lse
    return m, rest, a, scale


@device
def _special(
    records, i, targets, base, offset, each, classes, class_offset, softcap, m, rest, a, scale,
    soft, soft_offset, soft_each, weight, keep, spread, like,
):  # fmt: skip
    """The class of the slice whose gradient is written apart, or -1, and that gradient.

    The target, or in a soft-labelled row the class with more than half the probability.
    """
    z = m
    u = 0.0
    if targets is not None:
        j = targets[i] - class_offset
        z = records[i, LOGIT]
        u = keep * records[i, WEIGHT]
    else:
        j = int(records[i, FIRST]) - class_offset
        if not rest < 1.0:
            return -1, 0.0
    if not 0 <= j < classes:
        return -1, 0.0
    h = None if soft is None else load_number(soft, soft_offset + j * soft_each)
    label = rows.label_of(h, None if weight is None else weight[j], keep, spread, like)
    slope = capped_number(load_number(base, offset + j * each), softcap, like)[1]
    return j, slope * rows.target_gradient(m, rest, z, a, scale * (u + label))


@kernel
def gradient_rows(
    logits_base, targets, soft_base, spread_weight_base, upstream, records, out_base,
    nll_scale, z_scale, streaming, class_offset, keep, spread, z_loss, softcap,
    outer, inner, classes, chunk, parts,
    outer_stride, inner_stride, step, soft_outer_stride, soft_inner_stride, soft_step,
    out_outer_stride, out_inner_stride, out_step, counter,
):  # fmt: skip
    """Gradient of rows with at least a vector of classes, from the records of all slices."""
    logits = address(logits_base)
    soft = address(soft_base)
    out = address(out_base)
    spread_weight = address(spread_weight_base)
    zero = zeros(logits)
    each = rows.distance(logits, step)
    while True:
        part = claim(counter)
        if part >= parts:
            drain()
            return
        for i in range(part * chunk, min((part + 1) * chunk, outer * inner)):
            offset = start_of(i, inner, outer_stride, inner_stride)
            out_offset = start_of(i, inner, out_outer_stride, out_inner_stride)
            if records[i, FIRST] < 0.0:
                rows.write_zeros(logits, classes, out, out_offset, out_step)
                continue
            soft_offset = 0
            soft_each = 0
            if soft_base is not None:
                soft_offset = start_of(i, inner, soft_outer_stride, soft_inner_stride)
                soft_each = rows.distance(soft, soft_step)
            g = 1.0 if upstream is None else upstream[i]
            m, rest, a, scale = _row_gradient(records, i, g, nll_scale, z_scale, keep, z_loss, zero)
            special, value = _special(
                records, i, targets, logits, offset, each, classes, class_offset, softcap,
                m, rest, a, scale, soft, soft_offset, soft_each, spread_weight, keep, spread, zero,
            )  # fmt: skip
            rows.write_gradient(
                logits, offset, classes, step, softcap, m, rest, a,
                out, out_offset, out_step, streaming, soft, soft_offset, soft_step,
                spread_weight, scale * keep, scale * spread,
            )  # fmt: skip
            if special >= 0:
                store_number(out, out_offset + special * rows.distance(out, out_step), value)


@kernel
def gradient_columns(
    logits_base, targets, soft_base, spread_weight_base, upstream, records, out_base,
    nll_scale, z_scale, streaming, class_offset, keep, spread, z_loss, softcap,
    outer, inner, classes, chunk, parts,
    outer_stride, inner_stride, class_stride, soft_outer_stride, soft_inner_stride,
    soft_class_stride, out_outer_stride, out_inner_stride, out_class_stride, counter,
):  # fmt: skip
    """`gradient_rows` with the lanes across rows."""
    logits = address(logits_base)
    soft = address(soft_base)
    out = address(out_base)
    spread_weight = address(spread_weight_base)
    zero = zeros(logits)
    wide = convert(zero, 0.0)
    width = lanes(zero)
    row_bytes = width * 8
    last = outer * inner - 1
    tiles = count_tiles(outer, inner, width)
    known = np.zeros((5, width))  # m, rest, a, scale, whether the row counts
    written = np.zeros((2, width))  # the class that is written apart, its gradient
    tile_memory, z_tile = allocate(classes, width)
    tile = address_as(tile_memory, logits_base)
    soft_memory, h_tile = allocate(0 if soft_base is None else classes, width)
    soft_tile = address_as(soft_memory, soft_base)
    advance = columns.number(tile, 0, 1, 0, zero)
    while True:
        part = claim(counter)
        if part >= parts:
            drain()
            hold(tile_memory)
            hold(soft_memory)
            return
        for number in range(part * chunk, min((part + 1) * chunk, tiles)):
            i, skip, stop = tile_rows(number, outer, inner, width)
            gather(
                logits, outer_stride, inner_stride, class_stride, i, outer, inner, classes,
                tile, z_tile, zero,
            )  # fmt: skip
            if soft_base is not None:
                gather(
                    soft, soft_outer_stride, soft_inner_stride, soft_class_stride, i, outer, inner,
                    classes, soft_tile, h_tile, zero,
                )  # fmt: skip
            for lane in range(width):
                row = min(i + lane, last)
                written[0, lane] = -1.0
                known[4, lane] = records[row, FIRST] >= 0.0
                if records[row, FIRST] < 0.0:
                    continue
                g = 1.0 if upstream is None else upstream[row]
                m, rest, a, scale = _row_gradient(
                    records, row, g, nll_scale, z_scale, keep, z_loss, zero
                )
                known[0, lane] = m
                known[1, lane] = rest
                known[2, lane] = a
                known[3, lane] = scale
                soft_place = 0
                soft_advance = 0
                if soft_base is not None:
                    soft_place = columns.number(soft_tile, h_tile, 0, lane, zero)
                    soft_advance = columns.number(soft_tile, 0, 1, 0, zero)
                special, value = _special(
                    records, row, targets, tile, columns.number(tile, z_tile, 0, lane, zero),
                    advance, classes, class_offset, softcap, m, rest, a, scale,
                    soft_tile, soft_place, soft_advance, spread_weight, keep, spread, zero,
                )  # fmt: skip
                written[0, lane] = special
                written[1, lane] = value
            scale = load(known, 3 * row_bytes, None, wide)
            columns.to_gradient(
                tile, z_tile, classes, softcap, load(known, 0, None, wide),
                load(known, row_bytes, None, wide), load(known, 2 * row_bytes, None, wide),
                load(known, 4 * row_bytes, None, wide) != 0.0, soft_tile, h_tile, spread_weight,
                convert(scale * keep, zero), convert(scale * spread, zero),
            )  # fmt: skip
            for lane in range(width):
                if written[0, lane] >= 0.0:
                    place = columns.number(tile, z_tile, int(written[0, lane]), lane, zero)
                    store_number(tile, place, written[1, lane])
            scatter(
                tile, z_tile, out, out_outer_stride, out_inner_stride, out_class_stride,
                i, skip, stop, outer, inner, classes, streaming, zero,
            )  # fmt: skip
