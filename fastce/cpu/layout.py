"""How arrays of any strides lie in memory as rows of classes, and which kernel suits them.

Nothing is copied: an array is seen as (outer, inner, classes), each axis with its own stride in
bytes.  Row axes that follow each other evenly are merged; where more than two remain, the leading
ones are gone through one by one.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

AnyArray = npt.NDArray[Any]
Strides = tuple[int, int, int | None]  # bytes between outer rows, inner rows, classes

# Below this many classes lanes run across rows even where the classes lie side by side: measured,
# the row-wise kernel's fixed cost per row outweighs what the tiles cost (57 classes: 27 ms against
# 10; 100: 15 and 13, with the gradient 21 and 26; 160: 10 and 17).
FEW_CLASSES = 64
# Above this many classes a tile of rows would not fit the second-level cache.
MOST_CLASSES = 8192
# Logits per chunk: what a thread claims at a time, some ten microseconds of work.  Results depend
# on it (the order of the final sum), so that it must not depend on the number of threads.
CHUNK = 32768
# Logits from which more threads are worth waking: measured, waking one costs some 40 microseconds.
PARALLEL = 131072


class Layout(NamedTuple):
    """What a kernel need know of how arrays lie, one launch at a time."""

    outer: int
    inner: int
    classes: int
    chunk: int  # rows, or tiles of rows
    parts: int
    columns: bool  # whether lanes run across rows
    parallel: bool
    strides: tuple[Strides, ...]  # one for each array; the last None where classes lie side by side


# A part of a call that one kernel launch does: its first row, a base for each array, the layout.
Block = tuple[int, tuple[AnyArray | None, ...], Layout]


def blocks(axis: int, *arrays: AnyArray | None) -> Iterable[Block]:
    """Divide arrays of one shape (None for an absent one) into blocks; the first one decides."""
    first = arrays[0]
    assert first is not None
    if first.size == 0:
        return ()
    bases: list[AnyArray | None] = []
    sizes = []
    for array in arrays:
        if array is None:
            bases.append(None)
            sizes.append(0)
        elif array.flags.c_contiguous:
            bases.append(_stored(array.reshape(-1)))
            sizes.append(array.itemsize)
        else:
            return _strided(axis % first.ndim, arrays)
    layout = _contiguous(axis % first.ndim, first.shape, first.strides, tuple(sizes))
    return ((0, tuple(bases), layout),)


def passes(
    divide: Callable[..., Iterable[Block]], read: tuple[AnyArray | None, ...],
    losses: AnyArray | None, out: AnyArray | None,
) -> list[tuple[AnyArray | None, AnyArray | None]]:  # fmt: skip
    """(losses, out) of one launch; of two where `out` would change how `divide` divides the rows.

    For with it would change the order of the sums, which must not depend on where a gradient goes.
    """
    if out is not None and not all(a is None or a.flags.c_contiguous for a in (*read, out)):
        sizes = [
            [(first, *layout[:6]) for first, _, layout in divide(*arrays)]
            for arrays in (read, (*read, out))
        ]
        if sizes[0] != sizes[1]:
            return [(losses, None), (None, out)]
    return [(losses, out)]


def element_blocks(*arrays: AnyArray | None) -> Iterator[Block]:
    """`blocks` of single numbers: the longest runs that can be had stand for rows of classes."""
    if all(a is None or a.flags.c_contiguous for a in arrays):
        arrays = tuple(None if a is None else a.reshape(-1) for a in arrays)
    for first, bases, layout in blocks(-1, *arrays):
        sizes = tuple(0 if base is None else base.itemsize for base in bases)
        shape = (layout.outer, layout.inner, layout.classes)
        yield first, bases, _layout(shape, False, list(layout.strides), sizes)


@functools.lru_cache(maxsize=1024)
def _contiguous(
    axis: int, shape: tuple[int, ...], strides: tuple[int, ...], sizes: tuple[int, ...]
) -> Layout:
    """The layout of arrays without gaps; what `_strided` would find, and remembered."""
    classes = shape[axis]
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    across = _across_rows(axis, shape, strides)
    if inner == 1:
        outer, inner, row, apart = 1, outer, classes, 1
    else:
        row, apart = 1, inner
    steps = (classes * outer if outer == 1 else classes * inner, row, apart)
    in_bytes = [tuple(step * size for step in steps) for size in sizes]
    return _layout((outer, inner, classes), across, in_bytes, sizes)


def _layout(
    shape: tuple[int, int, int], across: bool, strides: list[Any], sizes: tuple[int, ...]
) -> Layout:
    outer, inner, classes = shape
    columns = across and classes <= MOST_CLASSES
    if columns:
        width = 16 if sizes[0] == 8 else 32
        span = inner if inner >= width else outer * inner
        pieces = outer * inner // span * -(-span // width)
        chunk = max(1, CHUNK // (classes * width))
    else:
        strides = [
            (*s[:2], None if s[2] == size or size == 0 else s[2])
            for s, size in zip(strides, sizes, strict=True)
        ]
        pieces = outer * inner
        chunk = max(1, CHUNK // classes)
    parallel = outer * inner * classes >= PARALLEL
    parts = -(-pieces // chunk)
    return Layout(outer, inner, classes, chunk, parts, columns, parallel, tuple(strides))


def _strided(axis: int, arrays: tuple[AnyArray | None, ...]) -> Iterator[Block]:
    """Merge the row axes that follow each other evenly; go through those that are too many."""
    source = arrays[0]
    assert source is not None
    moved = [None if a is None else np.moveaxis(a, axis, -1) for a in arrays]
    present = [a for a in moved if a is not None]
    shape = present[0].shape[:-1]
    classes = present[0].shape[-1]
    merged: list[tuple[int, tuple[int, ...]]] = []  # (size, strides), innermost first
    leading = len(shape)
    for k in reversed(range(len(shape))):
        strides = tuple(a.strides[k] for a in present)
        if shape[k] > 1:
            if merged and all(
                s == merged[-1][0] * m for s, m in zip(strides, merged[-1][1], strict=True)
            ):
                merged[-1] = (merged[-1][0] * shape[k], merged[-1][1])
            elif len(merged) < 2:
                merged.append((shape[k], strides))
            else:
                break
        leading = k
    zeros = (0,) * len(present)
    inner, inner_strides = merged[0] if merged else (1, zeros)
    outer, outer_strides = merged[1] if len(merged) > 1 else (1, zeros)
    row_strides = iter(zip(outer_strides, inner_strides, strict=True))
    layout = _layout(
        (outer, inner, classes),
        _across_rows(axis, source.shape, source.strides),
        [(0, 0, 0) if a is None else (*next(row_strides), a.strides[-1]) for a in moved],
        tuple(0 if a is None else a.itemsize for a in moved),
    )
    rows = outer * inner
    for number, index in enumerate(itertools.product(*map(range, shape[:leading]))):
        bases = tuple(None if a is None else _first(a[index]) for a in moved)
        yield number * rows, bases, layout


def _across_rows(axis: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether lanes should run across rows: few classes, or rows that lie closer than classes.

    The numbers of rows must not matter, or a row's last bits would depend on its batch: a row that
    is a view of a batch has the batch's strides, even along axes of which it is all there is.
    """
    apart = abs(strides[axis])
    return shape[axis] < FEW_CLASSES or any(
        0 < abs(stride) < apart or (k > axis and abs(stride) == apart > 0)
        for k, stride in enumerate(strides)
        if k != axis
    )


class _Writable:
    """Shows memory to NumPy as writable, so that read-only input needs no kernels of its own."""

    def __init__(self, array: AnyArray) -> None:
        self._array = array  # the view holds on to it
        self.__array_interface__ = {
            "version": 3,
            "typestr": array.dtype.str,
            "shape": array.shape,
            "data": (array.__array_interface__["data"][0], False),
        }


_FIRST = (slice(0, 1),) * 64  # NumPy has no more dimensions


def _first(array: AnyArray) -> AnyArray:
    """The first element of an array, as `_stored`."""
    return _stored(array[_FIRST[: array.ndim]].reshape(1))


def _stored(flat: AnyArray) -> AnyArray:
    """A flat array as kernels take it, 16-bit floats as their bits (see `cpu.memory`)."""
    if flat.itemsize == 2:
        flat = flat.view(np.uint16 if flat.dtype == np.float16 else np.int16)
    return writable(flat)


def writable(array: AnyArray) -> AnyArray:
    """The array itself, or a writable view of it."""
    return array if array.flags.writeable else np.asarray(_Writable(array))
