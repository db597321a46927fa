"""From columns of a table to NumPy: numbers, or labels; what is neither is named by its place."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import compute, types

from .terminal import Failure

Array = np.ndarray[Any, Any]

# How a missing value is written by R, pandas and databases, where it is not left out.
_MISSING = {"NA", "NaN", "nan", "NULL", "null", "None"}


@dataclass(frozen=True)
class Batch:
    """Some rows of a table: columns of pyarrow by their names, all of a text as text."""

    path: Path
    first: int  # rows before these
    rows: int
    columns: dict[str, Any]

    def numbers(self, names: list[str], out: Array) -> None:
        """Fill `out`, of shape (rows, columns), with the numbers in these columns."""
        for column, name in enumerate(names):
            out[:, column] = self._numbers(name, out.dtype)

    def _numbers(self, name: str, dtype: np.dtype[Any]) -> Array:
        values = _plain(self.columns[name])
        if values.null_count:
            raise self._wrong(
                "a number", "null", compute.index(values.is_null(), True).as_py(), name
            )
        if types.is_decimal(values.type):
            values = values.cast(pyarrow.float64())
        elif types.is_boolean(values.type):
            values = values.cast(pyarrow.uint8())
        try:
            if types.is_string(values.type):
                values = values.cast(pyarrow.from_numpy_dtype(dtype))
            return np.from_dlpack(values)  # Array.to_numpy imports pandas, of 40 MB
        except pyarrow.ArrowInvalid:  # Python reads more: blanks around a number, say
            numbers = np.empty(len(values), dtype)
            read = float if dtype.kind == "f" else int
            for row, cell in enumerate(values.to_pylist()):
                try:
                    numbers[row] = read(cell)
                except (ValueError, OverflowError):
                    what = "a number" if dtype.kind == "f" else "an integer"
                    raise self._wrong(what, repr(cell[:40]), row, name) from None
        return numbers

    def labels(self, name: str) -> Any:
        """A column of labels, without gaps: as text, but for integers, floats and booleans."""
        values = _plain(self.columns[name])
        kind = values.type
        if types.is_integer(kind) or types.is_boolean(kind) or types.is_floating(kind):
            absent = compute.is_null(values, nan_is_null=True)
        else:
            try:
                values = values.cast(pyarrow.string())
            except pyarrow.ArrowNotImplementedError:
                raise Failure(
                    f"{self.path}: expected labels, got {kind} in column {name}"
                ) from None
            absent = compute.equal(compute.utf8_trim_whitespace(values.fill_null("")), "")
        row = compute.index(absent, True).as_py()
        if row >= 0:
            raise self._wrong("a label", "an empty one", row, name)
        return values

    def _wrong(self, expected: str, got: str, row: int, name: str) -> Failure:
        place = f"data row {self.first + row + 1}, column {name}"
        return Failure(f"{self.path}: expected {expected}, got {got} in {place}")


def _plain(column: Any) -> Any:
    return column.dictionary_decode() if types.is_dictionary(column.type) else column


def joined(path: Path, name: str, parts: list[Any]) -> Array:
    """Labels of all rows, from those of the batches: int64 if all are written as integers.

    Text becomes an array of objects, in which a label that many rows have is kept once.
    """
    whole = pyarrow.chunked_array(parts)
    if not types.is_string(whole.type):
        return np.asarray(whole.to_numpy())
    codes = whole.dictionary_encode().combine_chunks()
    distinct = codes.dictionary.to_numpy(zero_copy_only=False)
    written = np.array([_is_integer(label) for label in distinct])
    if written.any() and _MISSING.issuperset(distinct[~written]):
        if not written.all():
            row = int(np.argmin(written[codes.indices]))
            got = distinct[codes.indices[row].as_py()]
            raise Failure(
                f"{path}: expected integers as labels, as all others are, got {got} in data row "
                f"{row + 1}, column {name}"
            )
        distinct = distinct.astype(np.int64)
    return np.asarray(distinct[codes.indices])


def _is_integer(label: str) -> bool:
    """Whether it is an integer as Python writes it, and of 64 bits."""
    try:
        return str(np.int64(label)) == label
    except (ValueError, OverflowError):
        return False


def dtype_of(path: Path, kinds: dict[str, Any]) -> np.dtype[Any]:
    """The dtype of the numbers in columns of these types: float64, or narrower if all are."""
    found: list[Any] = []
    for name, kind in kinds.items():
        if types.is_dictionary(kind):
            kind = kind.value_type
        if types.is_floating(kind):
            found.append(np.dtype(kind.to_pandas_dtype()))
        elif (
            types.is_integer(kind) or types.is_boolean(kind)
            or types.is_decimal(kind) or types.is_null(kind)
        ):  # fmt: skip
            found.append(np.dtype(np.float64))
        else:
            raise Failure(f"{path}: expected numbers, got {kind} in column {name}")
    return np.result_type(*found or [np.float64])


def integer_dtype_of(path: Path, name: str, kind: Any) -> np.dtype[Any]:
    """The dtype of the integers in a column of this type."""
    if types.is_dictionary(kind):
        kind = kind.value_type
    if not types.is_integer(kind):
        raise Failure(f"{path}: expected integers, got {kind} in column {name}")
    dtype: np.dtype[Any] = np.dtype(kind.to_pandas_dtype())
    return dtype
