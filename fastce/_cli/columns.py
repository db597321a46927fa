"""Tables of named columns, by pyarrow: .csv, .tsv, .parquet and .feather, some rows at a time."""

import contextlib
import csv
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow
from pyarrow import csv as arrow_csv
from pyarrow import ipc, parquet

from . import cells, output
from .cells import Array, Batch
from .terminal import Failure

# Numbers that are made at a time, but for many columns at least some rows: each costs some
# microseconds, however few its rows are.
_BLOCK_NUMBERS = 1 << 19
_BLOCK_ROWS = 64
# Of a text that are read at a time, or as much as so many times the line of the names.
_TEXT_BYTES = 1 << 20
_TEXT_LINES = 32
_TEXT_MOST = 2**31 - 1  # that pyarrow can be told
_BUFFER_BYTES = 1 << 16


@dataclass(frozen=True)
class Columns:
    """An open table: its columns' names, in order, and what reads some of them.

    All columns of a text are text, so that no type is guessed from the first rows.
    """

    path: Path
    names: list[str]
    types: dict[str, Any] | None  # of pyarrow; None of a text
    batches: Callable[[list[str]], Iterator[Any]]  # pyarrow.RecordBatch, of columns in any order

    def read(self, names: list[str]) -> Iterator[Batch]:
        """Read these columns, some rows at a time; each name has to be that of one column."""
        there = Counter(self.names)
        for name in names:
            if there[name] != 1:
                known = ", ".join(self.names[:20])
                got = f"{there[name]} of that name" if name in there else known
                raise Failure(f"{self.path}: expected one column {name}, got {got}")
        rows = _rows(names)
        first = 0
        for batch in self.batches(names):
            for start in range(0, batch.num_rows, rows):
                some = batch.slice(start, rows)
                columns = dict(zip(some.schema.names, some.columns, strict=True))
                yield Batch(self.path, first, some.num_rows, columns)
                first += some.num_rows

    def joined(self, name: str, labels: list[Any]) -> Array:
        """The labels of all rows, from what `Batch.labels` gives of each batch."""
        return cells.joined(self.path, name, labels)

    def dtype(self, names: list[str]) -> np.dtype[Any]:
        """The dtype of the numbers in these columns: float64, or narrower if all are."""
        if self.types is None:
            return np.dtype(np.float64)
        return cells.dtype_of(self.path, {name: self.types[name] for name in names})

    def integer_dtype(self, name: str) -> np.dtype[Any]:
        """The dtype of the integers in a column."""
        if self.types is None or name not in self.types:
            return np.dtype(np.int64)
        return cells.integer_dtype_of(self.path, name, self.types[name])


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Columns]:
    """Open a table; whatever is found to be wrong with the file while it is open is a `Failure`."""
    read = {".parquet": _parquet, ".feather": _feather}.get(path.suffix.lower(), _text)
    if read is not _text and path.exists() and not path.is_file():
        raise Failure(f"{path}: expected a file, got a folder, a device or a pipe")
    with contextlib.ExitStack() as stack:
        try:
            yield read(path, stack)
        except OSError as error:
            raise Failure(f"{path}: {error.strerror or _line(error)}") from None
        except (csv.Error, UnicodeDecodeError, pyarrow.ArrowException) as error:
            raise Failure(f"{path}: expected a table, got something else: {_line(error)}") from None


def _rows(names: list[str]) -> int:
    """How many rows of so many columns are read at a time."""
    return max(_BLOCK_ROWS, _BLOCK_NUMBERS // max(1, len(names)))


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _text(path: Path, stack: contextlib.ExitStack) -> Columns:
    file: IO[bytes] = stack.enter_context(path.open("rb"))
    if not file.seekable():  # a pipe, for which pyarrow would wait where no signal is heard
        copy = output.temporary(stack)
        shutil.copyfileobj(file, copy)
        copy.seek(0)
        file = copy
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = csv.reader((line.decode("utf-8-sig") for line in file), delimiter=delimiter)
    names = next(filter(None, lines), None)
    if names is None:
        raise Failure(f"{path}: expected a line of column names, got an empty file")
    return Columns(path, names, None, lambda some: _of_text(path, file, delimiter, names, some))


def _of_text(
    path: Path, file: IO[bytes], delimiter: str, names: list[str], some: list[str]
) -> Iterator[Any]:
    begin = file.tell()
    if begin == file.seek(0, os.SEEK_END):
        return
    file.seek(begin)
    unequal = []

    def refuse(row: Any) -> str:
        unequal.append(row)
        return "error"

    numbered = [str(number) for number in range(len(names))]  # names may be repeated
    place = dict(zip(names, numbered, strict=True))
    chosen = [place[name] for name in some]
    parse = arrow_csv.ParseOptions(
        delimiter=delimiter, newlines_in_values=True, invalid_row_handler=refuse
    )
    convert = arrow_csv.ConvertOptions(
        include_columns=chosen,
        column_types=dict.fromkeys(chosen, pyarrow.string()),
        # Each column has a copy of these lists, by default of 9 kB.
        null_values=[],
        true_values=[],
        false_values=[],
    )
    size = min(max(_TEXT_BYTES, _TEXT_LINES * begin), _TEXT_MOST)
    given = 0
    while True:
        # With threads rows have no numbers, and nothing is faster.
        read = arrow_csv.ReadOptions(column_names=numbered, block_size=size, use_threads=False)
        again = given
        try:
            with arrow_csv.open_csv(file, read, parse, convert) as batches:
                for batch in batches:
                    fresh = batch.slice(min(again, batch.num_rows))
                    again -= batch.num_rows - fresh.num_rows
                    given += fresh.num_rows
                    yield pyarrow.RecordBatch.from_arrays(fresh.columns, some)
            return
        except pyarrow.ArrowInvalid as error:
            for row in unequal:
                raise Failure(
                    f"{path}: expected {row.expected_columns} fields, got {row.actual_columns} "
                    f"in data row {row.number}"
                ) from None
            if "straddling" not in str(error) or size == _TEXT_MOST:
                raise
        size = min(16 * size, _TEXT_MOST)  # for a line that is longer than a block
        file.seek(begin)


def _parquet(path: Path, stack: contextlib.ExitStack) -> Columns:
    # Columns are read by and by: of each there is a buffer, a page and a dictionary in memory, with
    # what most programs write 2 MB in all. With pre_buffer it would be the whole group of rows.
    file = stack.enter_context(
        parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    )
    schema = file.schema_arrow
    return Columns(
        path,
        _names(schema),
        dict(zip(schema.names, schema.types, strict=True)),
        lambda some: file.iter_batches(_rows(some), columns=some),
    )


def _feather(path: Path, stack: contextlib.ExitStack) -> Columns:
    file = stack.enter_context(pyarrow.memory_map(str(path)))
    schema = ipc.open_file(file).schema

    def batches(some: list[str]) -> Iterator[Any]:
        places = [schema.get_field_index(name) for name in some]
        options = ipc.IpcReadOptions(included_fields=places)
        reader = ipc.open_file(file, options=options)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            batch.validate(full=True)  # else damaged offsets would be followed out of the memory
            yield batch

    types = dict(zip(schema.names, schema.types, strict=True))
    return Columns(path, _names(schema), types, batches)


def _names(schema: Any) -> list[str]:
    """The columns of a table but for those in which pandas keeps its index, the rows' numbers."""
    about = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))
    index = about.get("index_columns", [])
    return [name for name in schema.names if name not in index]
