"""How arrays of any strides lie in memory as rows of classes, and which kernel suits them.

Nothing is copied: an array is seen as (outer, inner, classes), each axis with its own stride in
bytes.  Row axes that follow each other evenly are merged; where more than two remain, the leading
ones are gone through one by one.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

AnyArray = npt.NDArray[Any]

# Below this many classes lanes run across rows even where the classes lie side by side: measured,
# the row-wise kernel's fixed cost per row outweighs its faster loads.
FEW_CLASSES = 32


class Place(NamedTuple):
    """Where an array lies: its first element, bytes between outer and inner rows and classes."""

    base: AnyArray
    strides: tuple[int, int]
    class_stride: int
    size: int


class Block(NamedTuple):
    """A part of a call that one kernel launch does: rows from `first` on."""

    shape: tuple[int, int, int]
    first: int
    columns: bool
    places: tuple[Place | None, ...]

    @property
    def width(self) -> int:
        """Numbers in a vector of the logits' compute type."""
        place = self.places[0]
        assert place is not None
        return 16 if place.size == 8 else 32

    @property
    def elements(self) -> int:
        """Logits in the block."""
        return math.prod(self.shape)

    def kernel_arguments(self, place: Place | None) -> tuple[Any, ...]:
        """A place as kernels take it: base, row strides, (class stride,) step.

        The step is None where the numbers of a vector lie side by side, which is compiled apart.
        """
        if self.columns:
            if place is None:
                return None, None, None, None
            step: int | None = place.strides[1]
            if self.shape[1] < self.width:
                step = 0  # too few rows to fill a vector: all lanes do the same one
            elif step == place.size:
                step = None
            return place.base, place.strides, place.class_stride, step
        return self.row_arguments(place)

    def row_arguments(self, place: Place | None) -> tuple[Any, ...]:
        """A place as kernels take it whose lanes run along the classes."""
        if place is None:
            return None, None, None
        step = None if place.class_stride == place.size else place.class_stride
        return place.base, place.strides, step


def blocks(axis: int, *arrays: AnyArray | None) -> Iterator[Block]:
    """Divide arrays of one shape (None for an absent one) into blocks; the first one decides."""
    assert arrays[0] is not None
    axis %= arrays[0].ndim
    if all(a is None or a.flags.c_contiguous for a in arrays):
        yield from _contiguous(axis, arrays)
    else:
        yield from _strided(axis, arrays)


def _contiguous(axis: int, arrays: tuple[AnyArray | None, ...]) -> Iterator[Block]:
    """The one block of arrays without gaps; what `_strided` would find, in a tenth of the time."""
    first = arrays[0]
    assert first is not None
    if first.size == 0:
        return
    classes = first.shape[axis]
    outer, inner = math.prod(first.shape[:axis]), math.prod(first.shape[axis + 1 :])
    if inner == 1:
        outer, inner, row, apart = 1, outer, classes, 1
    else:
        row, apart = 1, inner
    places: list[Place | None] = []
    for a in arrays:
        if a is None:
            places.append(None)
            continue
        size = a.itemsize
        strides = (0 if outer == 1 else classes * inner * size, 0 if inner == 1 else row * size)
        places.append(Place(_base(a), strides, apart * size, size))
    yield Block((outer, inner, classes), 0, _across_rows(first, axis), tuple(places))


def _strided(axis: int, arrays: tuple[AnyArray | None, ...]) -> Iterator[Block]:
    """Merge the row axes that follow each other evenly; go through those that are too many."""
    moved = [None if a is None else np.moveaxis(a, axis, -1) for a in arrays]
    present = [a for a in moved if a is not None]
    shape = present[0].shape[:-1]
    classes = present[0].shape[-1]
    if 0 in shape:
        return
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
    columns = _across_rows(np.moveaxis(present[0], -1, axis), axis)
    rows = outer * inner
    for number, index in enumerate(itertools.product(*map(range, shape[:leading]))):
        strides_of = iter(zip(outer_strides, inner_strides, strict=True))
        places = tuple(
            None
            if a is None
            else Place(_base(a[index]), next(strides_of), a.strides[-1], a.itemsize)
            for a in moved
        )
        yield Block((outer, inner, classes), number * rows, columns, places)


def _across_rows(array: AnyArray, axis: int) -> bool:
    """Whether lanes should run across rows: few classes, or rows that lie closer than classes.

    The numbers of rows must not matter, or a row's last bits would depend on its batch; hence the
    look at the strides of the axes behind the class axis even if they have but one element.
    """
    apart = abs(array.strides[axis])
    return array.shape[axis] < FEW_CLASSES or any(
        (k > axis and 0 < abs(stride) <= apart) or (size > 1 and 0 < abs(stride) < apart)
        for k, (stride, size) in enumerate(zip(array.strides, array.shape, strict=True))
        if k != axis
    )


class _Writable:
    """Shows memory to NumPy as writable, so that read-only input needs no kernels of its own."""

    def __init__(self, array: AnyArray) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": array.dtype.str,
            "shape": array.shape,
            "data": (array.__array_interface__["data"][0], False),
        }


_FIRST = (slice(0, 1),) * 64  # NumPy has no more dimensions


def _base(array: AnyArray) -> AnyArray:
    """The first element of an array, 16-bit floats as their bits (see `cpu.vector`)."""
    first = array[_FIRST[: array.ndim]].reshape(1)
    if array.itemsize == 2:
        first = first.view(np.uint16 if array.dtype == np.float16 else np.int16)
    return writable(first)


def writable(array: AnyArray) -> AnyArray:
    """The array itself, or a writable view of it that lives no longer than it does."""
    return array if array.flags.writeable else np.asarray(_Writable(array))
