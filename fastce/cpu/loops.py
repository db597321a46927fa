"""Losses of many rows.

Each kernel claims chunks of rows until none is left, alone or beside other threads.

Rows are numbered outer axis first.  An array comes as its base, a one-element array that marks the
first number, the bytes from row to row along the outer and the inner row axis, and the bytes from
class to class: in `*_rows`, whose lanes run along the classes, None where classes lie side by side.
In `*_columns` lanes run across the rows of `tiles`.
"""

import numpy as np

from fastce.cpu import columns, rows
from fastce.cpu.elementary import capped, log1p
from fastce.cpu.jit import device, kernel
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
from fastce.cpu.softmax import first_nan, logsumexp
from fastce.cpu.tiles import (
    allocate,
    count_tiles,
    gather,
    scatter,
    start_of,
    tile_rows,
    write_results,
)
from fastce.cpu.vector import (
    both,
    convert,
    lane_numbers,
    lanes,
    total,
    where,
)

# Rows of the scratch that takes numbers to and from the lanes of vectors: for each row the class
# whose gradient is written apart (the target, or the maximum of a soft-labelled row), its logit,
# the target's weight, all that the labels lay on the class, whether the row counts, and a result.
SPECIAL, LOGIT, TARGET, LABEL, VALID, RESULT = range(6)


@device
def capped_number(z, softcap, like):
    """Cap logits held in float64, rounded as the vectors like `like` are, and its derivative."""
    value, slope = capped(z, softcap)
    return convert(convert(value, like), 0.0), slope


@device
def _predicted(base, offset, classes, advance, rest, first):
    """The first maximum, or the first NaN if there is one, as `numpy.argmax` has it."""
    if rest == rest:
        return first
    nan = first_nan(base, offset, classes, advance)
    return nan if nan >= 0 else first


@kernel
def check_targets(targets, checked, classes, ignore_index, weight):
    """(first bad row or -1, rows that count, sum of their weights) of what `checked` will hold.

    Every target is read once: `targets` may be memory that somebody else writes to meanwhile.
    """
    count = 0
    bad = 0
    for i in range(targets.size):
        y = targets[i]
        checked[i] = y
        outside = (y < 0) | (y >= classes)
        ignored = y == ignore_index
        count += not ignored
        bad += outside & (not ignored)
    if bad > 0:
        for i in range(checked.size):
            y = checked[i]
            if (y < 0 or y >= classes) and y != ignore_index:
                return i, count, 0.0
    mass = float(count)
    if weight is not None:
        mass = 0.0
        for i in range(checked.size):
            y = checked[i]
            if y != ignore_index:
                mass += weight[y]
    return -1, count, mass


@kernel
def cross_entropy_rows(
    logits_base, targets, soft_base, weight, spread_weight_base, upstream,
    losses, lses, entropies, predicted, out_base, sums, nll_scale, z_scale, streaming,
    ignore_index, keep, spread, z_loss, softcap, outer, inner, classes, chunk,
    outer_stride, inner_stride, step, soft_outer_stride, soft_inner_stride, soft_step,
    out_outer_stride, out_inner_stride, out_step, counter,
):  # fmt: skip
    """Loss and gradient of rows with at least a vector of classes."""
    logits = address(logits_base)
    soft = address(soft_base)
    out = address(out_base)
    spread_weight = address(spread_weight_base)
    zero = zeros(logits)
    each = rows.distance(logits, step)
    while True:
        part = claim(counter)
        if part >= len(sums):
            if out_base is not None:
                drain()
            return
        nll_sum = 0.0
        z_sum = 0.0
        for i in range(part * chunk, min((part + 1) * chunk, outer * inner)):
            offset = start_of(i, inner, outer_stride, inner_stride)
            soft_offset = 0
            out_offset = 0
            if soft_base is not None:
                soft_offset = start_of(i, inner, soft_outer_stride, soft_inner_stride)
            if out_base is not None:
                out_offset = start_of(i, inner, out_outer_stride, out_inner_stride)
            y = 0
            t = 0.0
            z_y = 0.0
            slope_y = 1.0
            if targets is not None:
                y = targets[i]
                if y == ignore_index:
                    if losses is not None:
                        losses[i] = 0.0
                    if lses is not None:
                        lses[i] = 0.0
                        entropies[i] = 0.0
                        predicted[i] = -1
                    if out_base is not None:
                        rows.write_zeros(logits, classes, out, out_offset, out_step)
                    continue
                t = keep if weight is None else keep * weight[y]
                raw = load_number(logits, offset + y * each)
                z_y, slope_y = capped_number(raw, softcap, zero)
            m, rest, gap, mass = rows.labelled_statistics(
                logits, offset, classes, step, softcap,
                soft, soft_offset, soft_step, spread_weight, keep, spread,
            )  # fmt: skip
            nll, lse, everything = rows.cross_entropy(m, rest, z_y, t, gap, mass)
            penalty = 0.0
            if z_loss != 0.0:
                penalty = z_loss * lse * lse
            nll_sum += nll
            z_sum += penalty
            if losses is not None:
                losses[i] = nll + penalty
            if lses is not None:
                lses[i] = logsumexp(logits, offset, classes, each, m, rest)
                gap = rows.entropy_gap(logits, offset, classes, step, softcap, m, rest)
                entropies[i] = gap + log1p(rest)
                first = rows.first_maximum(logits, offset, 0, classes, step, softcap, m)
                predicted[i] = _predicted(logits, offset, classes, each, rest, first)
            if out_base is not None:
                g = 1.0 if upstream is None else upstream[i]
                scale = g * nll_scale
                a = scale * everything
                if z_loss != 0.0:
                    a += g * z_scale * 2.0 * z_loss * lse
                if targets is not None:
                    w = None if spread_weight_base is None else spread_weight[y]
                    b = rows.label_of(None, w, keep, spread, zero)
                    special = y
                    value = slope_y * rows.target_gradient(m, rest, z_y, a, scale * (t + b))
                else:
                    special, value = _soft_maximum(
                        logits, offset, classes, step, softcap, m, rest, a, scale,
                        soft, soft_offset, soft_step, spread_weight, keep, spread,
                    )  # fmt: skip
                rows.write_gradient(
                    logits, offset, classes, step, softcap, m, rest, a,
                    out, out_offset, out_step, streaming, soft, soft_offset, soft_step,
                    spread_weight, scale * keep, scale * spread,
                )  # fmt: skip
                if special >= 0:
                    store_number(out, out_offset + special * rows.distance(out, out_step), value)
        sums[part, 0] = nll_sum
        sums[part, 1] = z_sum


@device
def _soft_maximum(
    logits, offset, classes, step, softcap, m, rest, a, scale,
    soft, soft_offset, soft_step, weight, keep, spread,
):  # fmt: skip
    """Where a soft-labelled row has more than half its probability, and the gradient there.

    That component is a small difference of large numbers when the model agrees with the label.
    """
    if soft is None:
        return -1, 0.0
    if not rest < 1.0:
        return -1, 0.0
    j = rows.first_maximum(logits, offset, 0, classes, step, softcap, m)
    zero = zeros(logits)
    h = load_number(soft, soft_offset + j * rows.distance(soft, soft_step))
    u = rows.label_of(h, None if weight is None else weight[j], keep, spread, zero)
    raw = load_number(logits, offset + j * rows.distance(logits, step))
    slope = capped_number(raw, softcap, zero)[1]
    return j, slope * rows.target_gradient(m, rest, m, a, scale * u)


@device
def _soft_label(soft, offset, lane, y, weight, keep, spread, like):
    """What the labels of the row in a lane lay on class y."""
    if soft is None:
        return 0.0
    h = load_number(soft, columns.number(soft, offset, y, lane, like))
    return rows.label_of(h, None if weight is None else weight[y], keep, spread, like)


@kernel
def cross_entropy_columns(
    logits_base, targets, soft_base, weight, spread_weight_base, upstream,
    losses, lses, entropies, predicted, out_base, sums, nll_scale, z_scale, streaming,
    ignore_index, keep, spread, z_loss, softcap, outer, inner, classes, chunk,
    outer_stride, inner_stride, class_stride, soft_outer_stride, soft_inner_stride,
    soft_class_stride, out_outer_stride, out_inner_stride, out_class_stride, counter,
):  # fmt: skip
    """Loss and gradient with lanes across rows: few classes, or another class axis."""
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
    scratch = np.zeros((6, width))
    tile_memory, z_tile = allocate(classes, width)
    tile = address_as(tile_memory, logits_base)
    soft_memory, h_tile = allocate(0 if soft_base is None else classes, width)
    soft_tile = address_as(soft_memory, soft_base)
    while True:
        part = claim(counter)
        if part >= len(sums):
            if out_base is not None:
                drain()
            hold(tile_memory)
            hold(soft_memory)
            return
        nll_sum = 0.0
        z_sum = 0.0
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
            m, rest, first = columns.statistics(tile, z_tile, classes, softcap)
            if targets is None:
                store(scratch, SPECIAL * row_bytes, None, convert(first, 0.0))
            for lane in range(width):
                row = min(i + lane, last)
                if targets is not None:
                    y = targets[row]
                    valid = y != ignore_index
                    y = where(valid, y, 0)
                    scratch[SPECIAL, lane] = y
                    scratch[VALID, lane] = valid
                else:
                    y = int(scratch[SPECIAL, lane])
                    scratch[LABEL, lane] = _soft_label(
                        soft_tile, h_tile, lane, y, spread_weight, keep, spread, zero
                    )
                scratch[LOGIT, lane] = load_number(
                    tile, columns.number(tile, z_tile, y, lane, zero)
                )
                if weight is not None:
                    scratch[TARGET, lane] = keep * weight[y]
                if targets is not None and spread_weight_base is not None:
                    scratch[LABEL, lane] = rows.label_of(None, spread_weight[y], keep, spread, zero)
                if upstream is not None:
                    scratch[RESULT, lane] = upstream[row]
            z_y = load(scratch, LOGIT * row_bytes, None, wide)
            valid = wide == 0.0
            t = wide
            g = wide + 1.0
            if targets is not None:
                valid = load(scratch, VALID * row_bytes, None, wide) != 0.0
                t = wide + keep
                u = wide + rows.label_of(None, None, keep, spread, zero)
                if weight is not None:
                    t = load(scratch, TARGET * row_bytes, None, wide)
                if spread_weight_base is not None:
                    u = load(scratch, LABEL * row_bytes, None, wide)
                u = t + u
            else:
                u = load(scratch, LABEL * row_bytes, None, wide)
            if upstream is not None:
                g = load(scratch, RESULT * row_bytes, None, wide)
            z_y, slope_y = capped_number(z_y, softcap, zero)
            gap = wide
            mass = wide
            if soft_base is not None or spread != 0.0:
                gap, mass = columns.gaps(
                    tile, z_tile, classes, softcap, m, soft_tile, h_tile, spread_weight,
                    keep, spread,
                )  # fmt: skip
            nll, lse, everything = rows.cross_entropy(m, rest, z_y, t, gap, mass)
            nll = where(valid, nll, 0.0)
            penalty = wide
            if z_loss != 0.0:
                penalty = where(valid, z_loss * lse * lse, 0.0)
            fresh = both(lane_numbers(wide) >= float(skip), lane_numbers(wide) < float(stop))
            nll_sum += total(where(fresh, nll, 0.0))
            z_sum += total(where(fresh, penalty, 0.0))
            if losses is not None:
                write_results(nll + penalty, losses, i, skip, stop)
            if lses is not None:
                entropy = log1p(rest) + columns.entropy_gap(tile, z_tile, classes, softcap, m, rest)
                store(scratch, LABEL * row_bytes, None, rest)
                store(scratch, TARGET * row_bytes, None, convert(first, 0.0))
                store(scratch, LOGIT * row_bytes, None, m)
                for lane in range(width):
                    place = columns.number(tile, z_tile, 0, lane, zero)
                    advance = columns.number(tile, 0, 1, 0, zero)
                    scratch[LOGIT, lane] = logsumexp(
                        tile, place, classes, advance,
                        scratch[LOGIT, lane], scratch[LABEL, lane],
                    )  # fmt: skip
                    scratch[RESULT, lane] = _predicted(
                        tile, place, classes, advance,
                        scratch[LABEL, lane], int(scratch[TARGET, lane]),
                    )  # fmt: skip
                lse = load(scratch, LOGIT * row_bytes, None, wide)
                write_results(where(valid, lse, 0.0), lses, i, skip, stop)
                write_results(where(valid, entropy, 0.0), entropies, i, skip, stop)
                for lane in range(skip, stop):
                    counts = scratch[VALID, lane] != 0.0 or targets is None
                    predicted[i + lane] = int(scratch[RESULT, lane]) if counts else -1
            if out_base is not None:
                scale = g * nll_scale
                a = scale * everything
                if z_loss != 0.0:
                    a = a + g * (2.0 * z_loss * z_scale) * lse
                value = slope_y * rows.target_gradient(m, rest, z_y, a, scale * u)
                store(scratch, RESULT * row_bytes, None, where(valid, value, 0.0))
                columns.to_gradient(
                    tile, z_tile, classes, softcap, m, rest, a, valid,
                    soft_tile, h_tile, spread_weight,
                    convert(scale * keep, zero), convert(scale * spread, zero),
                )  # fmt: skip
                for lane in range(width):
                    y = int(scratch[SPECIAL, lane])
                    place = columns.number(tile, z_tile, y, lane, zero)
                    store_number(tile, place, scratch[RESULT, lane])
                scatter(
                    tile, z_tile, out, out_outer_stride, out_inner_stride, out_class_stride,
                    i, skip, stop, outer, inner, classes, streaming, zero,
                )  # fmt: skip
        sums[part, 0] = nll_sum
        sums[part, 1] = z_sum
