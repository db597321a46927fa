"""Arguments that are dask arrays: their checks, and where their blocks lie."""

import itertools
from collections.abc import Iterator
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt

from fastce import _arguments as arguments
from fastce.dask._graph import Chunks, Graph, Index, Key


def chunked(name: str, value: Any) -> Any:
    """A dask array whose chunks have known sizes."""
    if not isinstance(value, da.Array):
        raise TypeError(f"{name}: expected a dask array, got {type(value).__name__}")
    arguments.refuse_mask(name, value._meta)
    if any(np.isnan(size) for size in value.shape):
        raise ValueError(f"{name}: expected chunks of known sizes; see compute_chunk_sizes of dask")
    return value


def any_array(name: str, value: Any) -> Any:
    """A dask array of known chunks, or whatever else is an array in memory."""
    return chunked(name, value) if isinstance(value, da.Array) else arguments.any_array(name, value)


def in_memory(name: str, value: Any) -> Any:
    """What is small, and looked at when the graph is built; a dask array is not to be computed."""
    if isinstance(value, da.Array):
        raise TypeError(f"{name}: expected an array in memory, got a dask array")
    return value


def in_chunks(array: Any, chunks: Chunks) -> Any:
    """An array in the chunks of another one of its shape."""
    if isinstance(array, da.Array):
        return array.rechunk(chunks) if array.ndim else array
    return da.from_array(array, chunks, name=False)  # unnamed, or its content would be read


def key_of(array: Any, block: Index) -> Key:
    """The task that makes a block of a dask array."""
    return (array.name, *block)


def whole(name: str, array: Any, axis: int) -> None:
    """Refuse an array that is divided along an axis where a function needs all of it."""
    if len(array.chunks[axis]) > 1:
        raise ValueError(
            f"{name}: expected one chunk along axis {axis}, got {array.chunks[axis]}; "
            f"{name}.rechunk({{{axis}: -1}}) makes it one"
        )


class Grid:
    """Where the blocks of an array lie: in rows of blocks, one after another by their classes."""

    def __init__(self, chunks: Chunks, axis: int) -> None:
        self.chunks, self.axis = chunks, axis
        self.row_chunks = chunks[:axis] + chunks[axis + 1 :]
        self._starts = [list(itertools.accumulate(sizes, initial=0)) for sizes in chunks]

    def rows(self) -> Iterator[Index]:
        """The rows of blocks."""
        return np.ndindex(*map(len, self.row_chunks))

    def along(self, row: Index) -> Iterator[Index]:
        """The blocks in a row of blocks that have a class."""
        for k, size in enumerate(self.chunks[self.axis]):
            if size:
                yield (*row[: self.axis], k, *row[self.axis :])

    def start(self, block: Index) -> Index:
        """Where a block starts."""
        return tuple(starts[k] for starts, k in zip(self._starts, block, strict=True))

    def start_of_row(self, row: Index) -> Index:
        """Where a row of blocks starts."""
        start = self.start((*row[: self.axis], 0, *row[self.axis :]))
        return start[: self.axis] + start[self.axis + 1 :]

    def classes(self, block: Index) -> slice:
        """The classes of a block."""
        starts, k = self._starts[self.axis], block[self.axis]
        return slice(starts[k], starts[k + 1])

    def without_classes(self, graph: Graph, dtype: npt.DTypeLike) -> dict[Index, Key]:
        """The blocks of a result that are empty because they have no class."""
        return {
            block: graph.task(
                np.empty, shape=tuple(c[k] for c, k in zip(self.chunks, block, strict=True)),
                dtype=dtype,
            )
            for block in np.ndindex(*map(len, self.chunks))
            if not self.chunks[self.axis][block[self.axis]]
        }  # fmt: skip


class Upstream:
    """The upstream gradient: a number, times what is in chunks or not known yet."""

    def __init__(self, value: Any, rows: Index, reduction: str, row_chunks: Chunks) -> None:
        self.scalar, self._array = 1.0, None
        if isinstance(value, da.Array):
            array = chunked("grad_output", value)
            arguments.check_upstream(array.dtype, array.shape, rows, reduction)
            self._array = in_chunks(array, row_chunks)
        else:
            self.scalar, per_row = arguments.upstream(value, rows, reduction)
            if per_row is not None:
                self._array = in_chunks(per_row.reshape(rows), row_chunks)
        self.sources = () if self._array is None else (self._array,)

    def key(self, row: Index) -> Key | None:
        """The factors of a row of blocks."""
        if self._array is None:
            return None
        return key_of(self._array, row if self._array.ndim else ())
