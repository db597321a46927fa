"""Tiles: as many rows as a vector has lanes, brought together so that each class is one vector.

For few classes, and for class axes that are not the last.  A tile holds class j of the row in lane
l at number j * width + l, in the storage type of the array.  Each number is read from memory once
and written once, whatever the strides, even where classes lie so far apart (powers of two) that the
caches could not hold all of them at once.

An array comes as its base, the bytes from row to row along the outer and the inner row axis, and
the bytes from class to class.
"""

import numpy as np

from fastce.cpu.jit import device
from fastce.cpu.memory import (
    LINE,
    address,
    copy_number,
    copy_vector,
    copy_vector_streaming,
    first_line,
    item_size,
    line_aligned,
    prefetch,
    store,
    transpose,
    zeros,
)
from fastce.cpu.vector import convert, extract, lanes

# Tiles ahead of the one that is gathered whose lines are asked for, where each class lies in pages
# of its own and the processor does not foresee them: measured, a tenth of the time;
# 1 and 4 gain less.
AHEAD = 2


@device
def start_of(i, inner, outer_stride, inner_stride):
    """Byte offset of row i."""
    return (i // inner) * outer_stride + (i % inner) * inner_stride


@device
def count_tiles(outer, inner, width):
    """Tiles that cover all rows: those of each inner axis, or of all rows if that is too short."""
    if inner < width:
        return (outer * inner + width - 1) // width
    return outer * ((inner + width - 1) // width)


@device
def tile_rows(tile, outer, inner, width):
    """(row in the first lane, first and last lane that no other tile does).

    The last tile starts early enough to be full, unless there are fewer rows than lanes.
    """
    span = outer * inner if inner < width else inner
    along = (span + width - 1) // width
    wanted = (tile % along) * width
    position = max(0, min(wanted, span - width))
    return (tile // along) * span + position, wanted - position, min(width, span)


@device
def allocate(classes, width):
    """Memory for a tile of numbers of any type, to `hold`, and the offset to use it from."""
    memory = np.empty(classes * width * 8 + LINE, np.uint8)
    return memory, first_line(address(memory), 0)


@device
def _regular(i, last, inner):
    """Whether four rows from row i on exist and are evenly spaced."""
    return i + 3 <= last and i % inner + 3 < inner


@device
def _adjacent(i, inner, inner_stride, width, size):
    """Whether the rows of a tile lie side by side."""
    return inner_stride == size and i % inner + width <= inner


@device
def gather(
    base, outer_stride, inner_stride, class_stride, i, outer, inner, classes, tile, place, like
):
    """Fill the tile at `place`, its first lane with row i; lanes behind the last row repeat it."""
    size = item_size(base)
    width = lanes(like)
    last = outer * inner - 1
    offset = start_of(i, inner, outer_stride, inner_stride)
    if _adjacent(i, inner, inner_stride, width, size):
        for j in range(classes):
            copy_vector(base, offset + j * class_stride, tile, place + j * width * size, like)
            for ahead in range(AHEAD * width * size, (AHEAD + 1) * width * size, LINE):
                prefetch(base, offset + j * class_stride + ahead)
        return
    for lane in range(0, width, 4):
        offset = start_of(min(i + lane, last), inner, outer_stride, inner_stride)
        if class_stride == size and classes >= 4 and _regular(i + lane, last, inner):
            for start in range(0, classes, 4):
                j = min(start, classes - 4)
                transpose(
                    base, offset + j * size, inner_stride,
                    tile, place + (j * width + lane) * size, width * size,
                )  # fmt: skip
        else:
            for k in range(lane, lane + 4):
                offset = start_of(min(i + k, last), inner, outer_stride, inner_stride)
                for j in range(classes):
                    copy_number(
                        base, offset + j * class_stride, tile, place + (j * width + k) * size
                    )


@device
def scatter(
    tile, place, base, outer_stride, inner_stride, class_stride, i, skip, stop, outer, inner,
    classes, streaming, like,
):  # fmt: skip
    """Bring the lanes from `skip` to `stop` of a tile to where their rows lie.

    `streaming` writes past the caches where the rows lie suitably; `drain` must follow.
    """
    size = item_size(base)
    width = lanes(like)
    last = outer * inner - 1
    offset = start_of(i, inner, outer_stride, inner_stride)
    if stop - skip == width and _adjacent(i, inner, inner_stride, width, size):
        if streaming and class_stride % LINE == 0 and line_aligned(base, offset):
            for j in range(classes):
                copy_vector_streaming(
                    tile, place + j * width * size, base, offset + j * class_stride, like
                )
        else:
            for j in range(classes):
                copy_vector(tile, place + j * width * size, base, offset + j * class_stride, like)
        return
    for lane in range(skip - skip % 4, stop, 4):
        offset = start_of(i + lane, inner, outer_stride, inner_stride)
        whole = skip <= lane and lane + 4 <= stop
        if whole and class_stride == size and classes >= 4 and _regular(i + lane, last, inner):
            for start in range(0, classes, 4):
                j = min(start, classes - 4)
                transpose(
                    tile, place + (j * width + lane) * size, width * size,
                    base, offset + j * size, inner_stride,
                )  # fmt: skip
        else:
            for k in range(max(lane, skip), min(lane + 4, stop)):
                offset = start_of(i + k, inner, outer_stride, inner_stride)
                for j in range(classes):
                    copy_number(
                        tile, place + (j * width + k) * size, base, offset + j * class_stride
                    )


@device
def write_results(values, result, i, skip, stop):
    """Bring the lanes from `skip` to `stop` to an array of floats, lane 0 being that of row i."""
    if stop - skip == lanes(values):
        base = address(result)
        store(base, i * item_size(base), None, convert(values, zeros(base)))
        return
    for lane in range(skip, stop):
        result[i + lane] = extract(values, lane)
