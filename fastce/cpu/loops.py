"""Many rows: each kernel claims chunks of rows until none is left, alone or beside other threads.

Arrays come as (base, strides, step): a one-element array that marks the first number, the bytes
from row to row along the outer and the inner row axis, and the bytes from class to class (`*_rows`:
lanes run along the classes) or from row to row (`*_columns`: lanes run across the inner rows),
None where that is the size of a number.  Rows are numbered outer axis first.
"""

import numpy as np

from fastce.cpu import columns, rows
from fastce.cpu.elementary import capped, log1p
from fastce.cpu.jit import device, kernel
from fastce.cpu.memory import (
    address,
    claim,
    drain,
    load,
    load_number,
    store,
    store_number,
    zeros,
)
from fastce.cpu.vector import (
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
def start_of(i, inner, strides):
    """Byte offset of row i."""
    return (i // inner) * strides[0] + (i % inner) * strides[1]


@device
def tiling(inner, width):
    """(rows from lane to lane, tiles along the inner axis).

    A tile is as many rows as a vector has lanes.  The last one of an inner axis starts early enough
    to be full and leaves alone the rows that the tile before it has done.  An inner axis shorter
    than a tile is done row by row, all lanes doing the same.
    """
    if inner < width:
        return 0, inner
    return 1, (inner + width - 1) // width


@device
def tile_start(tile, tiles, inner, width):
    """(first row of a tile, first lane that is not done by another tile)."""
    along = tile % tiles
    first_row = (tile // tiles) * inner
    if inner < width:
        return first_row + along, width - 1
    position = min(along * width, inner - width)
    return first_row + position, along * width - position


@device
def _capped_number(z, softcap, like):
    """Cap logits held in float64, rounded as the vectors like `like` are, and its derivative."""
    value, slope = capped(z, softcap)
    return convert(convert(value, like), 0.0), slope


@device
def _first_nan(base, offset, classes, advance):
    """The first class whose logit is NaN, or -1."""
    for j in range(classes):
        if np.isnan(load_number(base, offset + j * advance)):
            return j
    return -1


@device
def _logsumexp(x, offset, classes, advance, m, rest):
    if rest == rest:
        return m + log1p(rest)
    # Rare: an infinite maximum, which stands unless there is NaN.
    return m if _first_nan(x, offset, classes, advance) < 0 else np.nan


@device
def _predicted(base, offset, classes, advance, rest, first):
    """The first maximum, or the first NaN if there is one, as `numpy.argmax` has it."""
    if rest == rest:
        return first
    nan = _first_nan(base, offset, classes, advance)
    return nan if nan >= 0 else first


@kernel
def check_targets(targets, classes, ignore_index, weight):
    """(first bad row or -1, rows that count, sum of their weights)."""
    count = 0
    bad = 0
    for i in range(targets.size):
        y = targets[i]
        outside = (y < 0) | (y >= classes)
        ignored = y == ignore_index
        count += not ignored
        bad += outside & (not ignored)
    if bad > 0:
        for i in range(targets.size):
            y = targets[i]
            if (y < 0 or y >= classes) and y != ignore_index:
                return i, count, 0.0
    mass = float(count)
    if weight is not None:
        mass = 0.0
        for i in range(targets.size):
            y = targets[i]
            if y != ignore_index:
                mass += weight[y]
    return -1, count, mass


@kernel
def cross_entropy_rows(
    shape, logits_base, strides, step, targets, soft_base, soft_strides, soft_step,
    weight, spread_weight_base, ignore_index, keep, spread, z_loss, softcap,
    upstream, nll_scale, z_scale, losses, lses, entropies, predicted,
    out_base, out_strides, out_step, streaming, sums, chunk, counter,
):  # fmt: skip
    """Loss and gradient of rows with at least a vector of classes."""
    outer, inner, classes = shape
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
            offset = start_of(i, inner, strides)
            soft_offset = 0
            out_offset = 0
            if soft_base is not None:
                soft_offset = start_of(i, inner, soft_strides)
            if out_base is not None:
                out_offset = start_of(i, inner, out_strides)
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
                z_y, slope_y = _capped_number(raw, softcap, zero)
            m, rest = rows.statistics(logits, offset, classes, step, softcap)
            gap = 0.0
            mass = 0.0
            if soft_base is not None or spread != 0.0:
                gap, mass = rows.gaps(
                    logits, offset, classes, step, softcap, m,
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
                lses[i] = _logsumexp(logits, offset, classes, each, m, rest)
                entropies[i] = rows.entropy(logits, offset, classes, step, softcap, m, rest)
                first = rows.first_maximum(logits, offset, 0, classes, step, softcap, m)
                predicted[i] = _predicted(logits, offset, classes, each, rest, first)
            if out_base is not None:
                g = 1.0 if upstream is None else upstream[i]
                scale = g * nll_scale
                a = scale * everything
                if z_loss != 0.0:
                    a += g * z_scale * 2.0 * z_loss * lse
                if targets is not None:
                    b = spread if spread_weight_base is None else spread * spread_weight[y]
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
    u = keep * load_number(soft, soft_offset + j * rows.distance(soft, soft_step)) + spread
    if weight is not None:
        u *= weight[j]
    raw = load_number(logits, offset + j * rows.distance(logits, step))
    slope = _capped_number(raw, softcap, zeros(logits))[1]
    return j, slope * rows.target_gradient(m, rest, m, a, scale * u)


@device
def _soft_label(soft, offset, advance, step, lane, y, weight, keep, spread):
    """What the labels of the row in a lane lay on class y."""
    if soft is None:
        return 0.0
    u = keep * load_number(soft, offset + y * advance + lane * rows.distance(soft, step)) + spread
    return u if weight is None else u * weight[y]


@device
def _hand_out(scratch, result, done, values, skip):
    """Bring the lanes from `skip` on to an array of results, from row `done` on."""
    store(scratch, RESULT * lanes(values) * 8, None, values)
    for lane in range(skip, lanes(values)):
        result[done + lane - skip] = scratch[RESULT, lane]


@kernel
def cross_entropy_columns(
    shape, logits_base, strides, advance, step,
    targets, soft_base, soft_strides, soft_advance, soft_step,
    weight, spread_weight_base, ignore_index, keep, spread, z_loss, softcap,
    upstream, nll_scale, z_scale, losses, lses, entropies, predicted,
    out_base, out_strides, out_advance, out_step, sums, chunk, counter,
):  # fmt: skip
    """Loss and gradient with lanes across rows: few classes, or another class axis."""
    outer, inner, classes = shape
    logits = address(logits_base)
    soft = address(soft_base)
    out = address(out_base)
    spread_weight = address(spread_weight_base)
    zero = zeros(logits)
    wide = convert(zero, 0.0)
    width = lanes(zero)
    row_bytes = width * 8
    across, tiles = tiling(inner, width)
    scratch = np.zeros((6, width))
    while True:
        part = claim(counter)
        if part >= len(sums):
            return
        nll_sum = 0.0
        z_sum = 0.0
        for tile in range(part * chunk, min((part + 1) * chunk, outer * tiles)):
            i, skip = tile_start(tile, tiles, inner, width)
            offset = start_of(i, inner, strides)
            soft_offset = 0
            out_offset = 0
            if soft_base is not None:
                soft_offset = start_of(i, inner, soft_strides)
            if out_base is not None:
                out_offset = start_of(i, inner, out_strides)
            m, rest, first = columns.statistics(logits, offset, classes, advance, step, softcap)
            store(scratch, SPECIAL * row_bytes, None, convert(first, 0.0))
            for lane in range(width):
                row = i + lane * across
                valid = 1.0
                if targets is not None:
                    y = targets[row]
                    if y == ignore_index:
                        valid = 0.0
                        y = 0
                    t = keep if weight is None else keep * weight[y]
                    u = t + (spread if spread_weight_base is None else spread * spread_weight[y])
                else:
                    y = int(scratch[SPECIAL, lane])
                    t = 0.0
                    u = _soft_label(
                        soft, soft_offset, soft_advance, soft_step, lane, y,
                        spread_weight, keep, spread,
                    )  # fmt: skip
                scratch[SPECIAL, lane] = y
                scratch[LOGIT, lane] = load_number(
                    logits, offset + y * advance + lane * rows.distance(logits, step)
                )
                scratch[TARGET, lane] = t
                scratch[LABEL, lane] = u
                scratch[VALID, lane] = valid
                scratch[RESULT, lane] = 1.0 if upstream is None else upstream[row]
            z_y = load(scratch, LOGIT * row_bytes, None, wide)
            t = load(scratch, TARGET * row_bytes, None, wide)
            u = load(scratch, LABEL * row_bytes, None, wide)
            valid = load(scratch, VALID * row_bytes, None, wide) != 0.0
            g = load(scratch, RESULT * row_bytes, None, wide)
            z_y, slope_y = _capped_number(z_y, softcap, zero)
            gap = wide
            mass = wide
            if soft_base is not None or spread != 0.0:
                gap, mass = columns.gaps(
                    logits, offset, classes, advance, step, softcap, m,
                    soft, soft_offset, soft_advance, soft_step, spread_weight, keep, spread,
                )  # fmt: skip
            nll, lse, everything = rows.cross_entropy(m, rest, z_y, t, gap, mass)
            nll = where(valid, nll, 0.0)
            penalty = wide
            if z_loss != 0.0:
                penalty = where(valid, z_loss * lse * lse, 0.0)
            fresh = lane_numbers(wide) >= float(skip)
            nll_sum += total(where(fresh, nll, 0.0))
            z_sum += total(where(fresh, penalty, 0.0))
            done = i + skip * across
            if losses is not None:
                _hand_out(scratch, losses, done, nll + penalty, skip)
            if lses is not None:
                entropy = log1p(rest) + columns.entropy_gap(
                    logits, offset, classes, advance, step, softcap, m, rest
                )
                store(scratch, LABEL * row_bytes, None, rest)
                store(scratch, TARGET * row_bytes, None, convert(first, 0.0))
                store(scratch, LOGIT * row_bytes, None, m)
                for lane in range(width):
                    place = offset + lane * rows.distance(logits, step)
                    scratch[LOGIT, lane] = _logsumexp(
                        logits, place, classes, advance,
                        scratch[LOGIT, lane], scratch[LABEL, lane],
                    )  # fmt: skip
                    scratch[RESULT, lane] = _predicted(
                        logits, place, classes, advance,
                        scratch[LABEL, lane], int(scratch[TARGET, lane]),
                    )  # fmt: skip
                maxima = load(scratch, RESULT * row_bytes, None, wide)
                lse = load(scratch, LOGIT * row_bytes, None, wide)
                _hand_out(scratch, lses, done, where(valid, lse, 0.0), skip)
                _hand_out(scratch, entropies, done, where(valid, entropy, 0.0), skip)
                _hand_out(scratch, predicted, done, where(valid, maxima, -1.0), skip)
            if out_base is not None:
                scale = g * nll_scale
                a = scale * everything
                if z_loss != 0.0:
                    a = a + g * (2.0 * z_loss * z_scale) * lse
                value = slope_y * rows.target_gradient(m, rest, z_y, a, scale * u)
                store(scratch, RESULT * row_bytes, None, where(valid, value, 0.0))
                columns.write_gradient(
                    logits, offset, classes, advance, step, softcap, m, rest, a, valid,
                    out, out_offset, out_advance, out_step, skip,
                    soft, soft_offset, soft_advance, soft_step, spread_weight,
                    convert(scale * keep, zero), convert(scale * spread, zero),
                )  # fmt: skip
                for lane in range(skip, width):
                    place = int(scratch[SPECIAL, lane]) * out_advance
                    place += out_offset + lane * rows.distance(out, out_step)
                    store_number(out, place, scratch[RESULT, lane])
        sums[part, 0] = nll_sum
        sums[part, 1] = z_sum


@kernel
def softmax_rows(
    shape, logits_base, strides, step, out_base, out_strides, out_step, streaming, logarithm,
    parts, chunk, counter,
):  # fmt: skip
    """softmax, or its logarithm where `logarithm` is not None."""
    outer, inner, classes = shape
    logits = address(logits_base)
    out = address(out_base)
    while True:
        part = claim(counter)
        if part >= parts:
            drain()
            return
        for i in range(part * chunk, min((part + 1) * chunk, outer * inner)):
            offset = start_of(i, inner, strides)
            out_offset = start_of(i, inner, out_strides)
            m, rest = rows.statistics(logits, offset, classes, step, None)
            if logarithm is None:
                rows.write_gradient(
                    logits, offset, classes, step, None, m, rest, 1.0,
                    out, out_offset, out_step, streaming, None, 0, None, None, 0.0, 0.0,
                )  # fmt: skip
            else:
                rows.write_log_softmax(
                    logits, offset, classes, step, m, rest, out, out_offset, out_step, streaming
                )


@kernel
def softmax_columns(
    shape, logits_base, strides, advance, step,
    out_base, out_strides, out_advance, out_step, logarithm, parts, chunk, counter,
):  # fmt: skip
    """`softmax_rows` with the lanes across rows."""
    outer, inner, classes = shape
    logits = address(logits_base)
    out = address(out_base)
    zero = zeros(logits)
    wide = convert(zero, 0.0)
    width = lanes(zero)
    _, tiles = tiling(inner, width)
    while True:
        part = claim(counter)
        if part >= parts:
            return
        for tile in range(part * chunk, min((part + 1) * chunk, outer * tiles)):
            i, skip = tile_start(tile, tiles, inner, width)
            offset = start_of(i, inner, strides)
            out_offset = start_of(i, inner, out_strides)
            m, rest, _ = columns.statistics(logits, offset, classes, advance, step, None)
            if logarithm is None:
                columns.write_gradient(
                    logits, offset, classes, advance, step, None, m, rest, wide + 1.0,
                    wide == 0.0, out, out_offset, out_advance, out_step, skip,
                    None, 0, 0, None, None, zero, zero,
                )  # fmt: skip
            else:
                columns.write_log_softmax(
                    logits, offset, classes, advance, step, m, rest,
                    out, out_offset, out_advance, out_step, skip,
                )  # fmt: skip


@kernel
def logsumexp_rows(shape, x_base, strides, step, result, parts, chunk, counter):
    """log of the sum of exp of each row; -inf, +inf and NaN as SciPy has them."""
    outer, inner, classes = shape
    x = address(x_base)
    while True:
        part = claim(counter)
        if part >= parts:
            return
        for i in range(part * chunk, min((part + 1) * chunk, outer * inner)):
            offset = start_of(i, inner, strides)
            m, rest = rows.statistics(x, offset, classes, step, None)
            result[i] = _logsumexp(x, offset, classes, rows.distance(x, step), m, rest)


@kernel
def logsumexp_columns(shape, x_base, strides, advance, step, result, parts, chunk, counter):
    """`logsumexp_rows` with the lanes across rows."""
    outer, inner, classes = shape
    x = address(x_base)
    zero = zeros(x)
    wide = convert(zero, 0.0)
    width = lanes(zero)
    across, tiles = tiling(inner, width)
    scratch = np.zeros((2, width))
    while True:
        part = claim(counter)
        if part >= parts:
            return
        for tile in range(part * chunk, min((part + 1) * chunk, outer * tiles)):
            i, skip = tile_start(tile, tiles, inner, width)
            offset = start_of(i, inner, strides)
            m, rest, _ = columns.statistics(x, offset, classes, advance, step, None)
            store(scratch, 0, None, m + wide)
            store(scratch, width * 8, None, rest)
            for lane in range(skip, width):
                place = offset + lane * rows.distance(x, step)
                result[i + lane * across] = _logsumexp(
                    x, place, classes, advance, scratch[0, lane], scratch[1, lane]
                )
