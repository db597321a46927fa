"""Reading and writing ``.npy`` files by pieces, never more than a piece in memory.

A stored array is seen in the order of its bytes as ``(outer, classes, inner)``: the axes before
the class axis, the class axis, and those after it.  Its rows, one per observation, are numbered
along ``(outer, inner)``.  Where the classes of a row lie apart, files are mapped, to be read in
part.  Pages count as memory of the process for as long as they are mapped, so every piece is mapped
on its own and unmapped with the last reference to it.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from .terminal import Failure

# A few copies of a piece are in memory at a time, together below 300 MB even where kernels have to
# be compiled first, which takes 50 MB.  Larger pieces are read faster where the classes of a row
# lie far apart: 600 MB of 50257 x 3000 float32 along axis 0 in 2.6 s with pieces of 8 MiB, in 1.6 s
# with 16, in 1.4 s with 20, in 1.2 s with 24.
PIECE_BYTES = 20 << 20
# Linux maps up to this much of a cached file around a page that is touched.
_FAULT_AROUND = 64 << 10

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Stored:
    """An array in an open ``.npy`` file: its header, and its pieces when asked for."""

    name: str
    file: IO[bytes]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran_order: bool
    offset: int

    def flat(self, start: int, stop: int) -> Array:
        """Read the elements start to stop in the order of the file, as native numbers.

        They are a copy: what is checked stays so, even where another program writes the file.
        """
        self.file.seek(self.offset + start * self.dtype.itemsize)
        elements = np.fromfile(self.file, self.dtype, stop - start)
        if len(elements) < stop - start:
            raise Failure(f"{self.name}: truncated while it was read")
        return elements.astype(self.dtype.newbyteorder("="), copy=False)

    def mapped(self, start: int, stop: int) -> Array:
        """Map the elements start to stop, of which only a part is read."""
        return np.memmap(
            self.file,
            dtype=self.dtype,
            mode="r",
            offset=self.offset + start * self.dtype.itemsize,
            shape=(stop - start,),
        )

    def index(self, place: int) -> tuple[int, ...]:
        """Index of an element from its place in the order of the file."""
        order: Literal["C", "F"] = "F" if self.fortran_order else "C"
        return tuple(map(int, np.unravel_index(place, self.shape, order)))


@dataclass(frozen=True)
class Rows:
    """The rows of a stored array along its class axis."""

    stored: Stored
    axis: int
    outer: int
    classes: int
    inner: int

    @classmethod
    def along(cls, stored: Stored, axis: int) -> "Rows":
        """See `stored` as rows whose classes lie along `axis`."""
        shape, place = stored.shape, range(len(stored.shape))[axis]
        if stored.fortran_order:
            shape, place = shape[::-1], len(shape) - 1 - place
        before, after = math.prod(shape[:place]), math.prod(shape[place + 1 :])
        return cls(stored, axis, before, shape[place], after)

    def __len__(self) -> int:
        return self.outer * self.inner

    def index(self, row: int) -> tuple[int, ...]:
        """Index of a row, in the shape without the class axis, from its number."""
        shape = list(self.stored.shape)
        del shape[self.axis]
        order: Literal["C", "F"] = "F" if self.stored.fortran_order else "C"
        return tuple(map(int, np.unravel_index(row, shape, order)))

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Row numbers (start, stop) of pieces of about `PIECE_BYTES`, at least one row each.

        A piece is either whole outer blocks, or a part of a single one.
        """
        row_bytes = max(1, self.classes * self.stored.dtype.itemsize)
        at_once = max(1, PIECE_BYTES // row_bytes)
        if at_once >= self.inner:
            step = at_once - at_once % max(1, self.inner)
            for start in range(0, len(self), max(1, step)):
                yield start, min(start + step, len(self))
        else:
            for block in range(0, len(self), self.inner):
                for start in range(block, block + self.inner, at_once):
                    yield start, min(start + at_once, block + self.inner)

    def read(self, start: int, stop: int) -> Array:
        """Rows start to stop, one of `pieces`, shaped (outer, classes, inner)."""
        block, first = divmod(start, self.inner)
        if self._whole(start, stop):
            flat = self.stored.flat(start * self.classes, stop * self.classes)
            return flat.reshape(-1, self.classes, self.inner)
        width = stop - start
        tile = np.empty((1, self.classes, width), self.stored.dtype.newbyteorder("="))
        step = max(1, PIECE_BYTES // (width * tile.itemsize + _FAULT_AROUND))
        for low in range(0, self.classes, step):
            high = min(low + step, self.classes)
            origin = block * self.classes + low
            window = self.stored.mapped(origin * self.inner, (origin + high - low) * self.inner)
            tile[0, low:high] = window.reshape(-1, self.inner)[:, first : first + width]
        return tile

    def write(self, file: IO[bytes], offset: int, start: int, values: Array) -> None:
        """Store `values`, shaped as `read` gives them, where rows from `start` on belong."""
        stop = start + values.shape[0] * values.shape[2]
        if self._whole(start, stop):
            file.seek(offset + start * self.classes * values.itemsize)
            file.write(_bytes(values))
            return
        block, first = divmod(start, self.inner)
        for number, row in enumerate(values[0]):
            place = (block * self.classes + number) * self.inner + first
            file.seek(offset + place * values.itemsize)
            file.write(_bytes(row))

    def _whole(self, start: int, stop: int) -> bool:
        return start % self.inner == 0 and stop % self.inner == 0


def _bytes(values: Array) -> memoryview:
    # By way of uint8, as the protocol of buffers has no name for bfloat16.
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Stored]:
    """Open a ``.npy`` file and check that it holds what its header says."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from None
    with file:
        shape, fortran_order, dtype = _header(path, file)
        expected = file.tell() + math.prod(shape) * dtype.itemsize
        found = os.fstat(file.fileno()).st_size
        if found < expected:
            raise Failure(f"{path}: truncated: expected {expected} bytes, got {found}")
        # A vector is stored the same way in both orders, and so is a column.
        fortran_order = fortran_order and sum(extent != 1 for extent in shape) > 1
        yield Stored(str(path), file, dtype, shape, fortran_order, file.tell())


def _header(path: Path, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    npy = np.lib.format
    try:
        version = npy.read_magic(file)
    except (ValueError, OSError):
        raise Failure(f"{path}: expected a .npy file, got something else") from None
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:  # 3.0 holds names of fields that are not ASCII: no array of plain numbers
        raise Failure(f"{path}: expected .npy format 1.0 or 2.0, got {version[0]}.{version[1]}")
    try:
        shape, fortran_order, dtype = read(file)
    except Exception:  # what a damaged header raises is not documented: ValueError, TokenError, ...
        raise Failure(f"{path}: expected a .npy header, got a damaged one") from None
    if dtype.hasobject:
        raise Failure(f"{path}: expected numbers, got pickled Python objects, which are not loaded")
    if any(extent < 0 for extent in shape):
        raise Failure(f"{path}: expected a shape without negative extents, got {shape}")
    return shape, fortran_order, dtype


def write_header(
    file: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...], fortran_order: bool = False
) -> int:
    """Begin a ``.npy`` file and return the offset of its first element."""
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": fortran_order,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()
