"""softmax, log_softmax and logsumexp of many rows; kernels claim chunks as those of `loops` do.

Where the classes are divided, a row of `known` has the maximum and the rest of all of them.
"""

import numpy as np

from fastce.cpu import columns, rows
from fastce.cpu.elementary import log1p
from fastce.cpu.jit import device, kernel
from fastce.cpu.memory import address, address_as, claim, drain, hold, load_number, zeros
from fastce.cpu.tiles import (
    allocate,
    count_tiles,
    gather,
    scatter,
    start_of,
    tile_rows,
    write_results,
)
from fastce.cpu.vector import any_lane, convert, extract, insert, lanes


@device
def first_nan(base, offset, classes, advance):
    """The first class whose logit is NaN, or -1."""
    for j in range(classes):
        if np.isnan(load_number(base, offset + j * advance)):
            return j
    return -1


@device
def logsumexp(x, offset, classes, advance, m, rest):
    """logsumexp of a row from its statistics; -inf, +inf and NaN as SciPy has them."""
    if rest == rest:
        return m + log1p(rest)
    # Rare: an infinite maximum, which stands unless there is NaN.
    return m if first_nan(x, offset, classes, advance) < 0 else np.nan


@device
def _known_columns(known, i, count, wide):
    """The maxima and rests of the rows from i on, one in each lane."""
    m = wide
    rest = wide
    for lane in range(lanes(wide)):
        row = min(i + lane, count - 1)
        m = insert(m, lane, known[row, 0])
        rest = insert(rest, lane, known[row, 1])
    return m, rest


@kernel
def softmax_rows(
    logits_base, out_base, known, streaming, logarithm, outer, inner, classes, chunk, parts,
    outer_stride, inner_stride, step, out_outer_stride, out_inner_stride, out_step, counter,
):  # fmt: skip
    """softmax, or its logarithm where `logarithm` is not None."""
    logits = address(logits_base)
    out = address(out_base)
    while True:
        part = claim(counter)
        if part >= parts:
            drain()
            return
        for i in range(part * chunk, min((part + 1) * chunk, outer * inner)):
            offset = start_of(i, inner, outer_stride, inner_stride)
            out_offset = start_of(i, inner, out_outer_stride, out_inner_stride)
            if known is None:
                m, rest = rows.statistics(logits, offset, classes, step, None)
            else:
                m, rest = known[i, 0], known[i, 1]
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
    logits_base, out_base, known, streaming, logarithm, outer, inner, classes, chunk, parts,
    outer_stride, inner_stride, class_stride,
    out_outer_stride, out_inner_stride, out_class_stride, counter,
):  # fmt: skip
    """`softmax_rows` with the lanes across rows."""
    logits = address(logits_base)
    out = address(out_base)
    zero = zeros(logits)
    wide = convert(zero, 0.0)
    width = lanes(zero)
    tiles = count_tiles(outer, inner, width)
    memory, place = allocate(classes, width)
    tile = address_as(memory, logits_base)
    while True:
        part = claim(counter)
        if part >= parts:
            drain()
            hold(memory)
            return
        for number in range(part * chunk, min((part + 1) * chunk, tiles)):
            i, skip, stop = tile_rows(number, outer, inner, width)
            gather(
                logits, outer_stride, inner_stride, class_stride, i, outer, inner, classes,
                tile, place, zero,
            )  # fmt: skip
            if known is None:
                m, rest, _ = columns.statistics(tile, place, classes, None)
            else:
                m, rest = _known_columns(known, i, outer * inner, wide)
            if logarithm is None:
                columns.to_gradient(
                    tile, place, classes, None, m, rest, wide + 1.0, wide == 0.0,
                    None, 0, None, zero, zero,
                )  # fmt: skip
            else:
                columns.to_log_softmax(tile, place, classes, m, rest)
            scatter(
                tile, place, out, out_outer_stride, out_inner_stride, out_class_stride,
                i, skip, stop, outer, inner, classes, streaming, zero,
            )  # fmt: skip


@kernel
def logsumexp_rows(
    x_base, result, outer, inner, classes, chunk, parts, outer_stride, inner_stride, step, counter
):
    """log of the sum of exp of each row."""
    x = address(x_base)
    while True:
        part = claim(counter)
        if part >= parts:
            return
        for i in range(part * chunk, min((part + 1) * chunk, outer * inner)):
            offset = start_of(i, inner, outer_stride, inner_stride)
            m, rest = rows.statistics(x, offset, classes, step, None)
            result[i] = logsumexp(x, offset, classes, rows.distance(x, step), m, rest)


@kernel
def logsumexp_columns(
    x_base, result, outer, inner, classes, chunk, parts,
    outer_stride, inner_stride, class_stride, counter,
):  # fmt: skip
    """`logsumexp_rows` with the lanes across rows."""
    x = address(x_base)
    zero = zeros(x)
    width = lanes(zero)
    tiles = count_tiles(outer, inner, width)
    memory, place = allocate(classes, width)
    tile = address_as(memory, x_base)
    while True:
        part = claim(counter)
        if part >= parts:
            hold(memory)
            return
        for number in range(part * chunk, min((part + 1) * chunk, tiles)):
            i, skip, stop = tile_rows(number, outer, inner, width)
            gather(
                x, outer_stride, inner_stride, class_stride, i, outer, inner, classes,
                tile, place, zero,
            )  # fmt: skip
            m, rest, _ = columns.statistics(tile, place, classes, None)
            lse = m + log1p(rest)
            if any_lane(lse != lse):
                for lane in range(width):
                    value = logsumexp(
                        tile, columns.number(tile, place, 0, lane, zero), classes,
                        columns.number(tile, 0, 1, 0, zero), extract(m, lane), extract(rest, lane),
                    )  # fmt: skip
                    lse = insert(lse, lane, value)
            write_results(lse, result, i, skip, stop)
