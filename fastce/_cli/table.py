"""Reading a data set for ``fastce fit`` and ``fastce predict``: features, and what to learn."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import npy
from .npy import Array
from .terminal import Failure

if TYPE_CHECKING:
    from .columns import Columns

COLUMNAR = (".csv", ".tsv", ".parquet", ".feather")
_SVMLIGHT = (".svmlight", ".svm", ".libsvm")
WITH_TARGET = (".npy", *_SVMLIGHT)  # which need no name to know what the target is


class Table(NamedTuple):
    """Features (dense or CSR) with their names where the file has some; the target if asked for."""

    x: Any
    y: Array | None
    names: list[str] | None


class Wanted(NamedTuple):
    """What to read: the target by its name, or all but it; of named columns only some features."""

    target: str | None
    learn: bool
    features: list[str] | None = None


def read(paths: list[Path], wanted: Wanted) -> Table:
    """Read one data set: named columns, .npz, .svmlight, or .npy files of features and target."""
    kind = paths[0].suffix.lower()
    if len(paths) > 1 and (kind != ".npy" or len(paths) > 2):
        raise Failure(f"DATA: expected one file, or X.npy and y.npy, got {len(paths)} files")
    readers = dict.fromkeys(COLUMNAR, _columns) | dict.fromkeys(_SVMLIGHT, _svmlight)
    readers |= {".npz": _npz, ".npy": _npy}
    if kind not in readers:
        *most, last = readers
        raise Failure(f"{paths[0]}: expected {', '.join(most)} or {last}, got {kind or 'no'} file")
    return _checked(paths, readers[kind](paths, wanted))


def _checked(paths: list[Path], table: Table) -> Table:
    path, x, y = paths[0], table.x, table.y
    if x.ndim != 2:
        raise Failure(f"{path}: expected features of shape (rows, features), got {x.shape}")
    if x.dtype.kind not in "fiub":
        raise Failure(f"{path}: expected numbers as features, got {x.dtype}")
    if not x.shape[0]:
        raise Failure(f"{path}: expected at least one row, got none")
    if not x.shape[1]:
        raise Failure(f"{path}: expected at least one feature, got none")
    if y is not None:
        _check_target(paths[-1], y, x.shape[0])
    if x.dtype.kind == "f":
        _check_finite(path, x if isinstance(x, np.ndarray) else x.data, table.names)
    return table


def _check_finite(path: Path, values: Array, names: list[str] | None) -> None:
    step = max(1, npy.PIECE_BYTES // values[:1].nbytes) if values.size else 1
    for start in range(0, len(values), step):
        finite = np.isfinite(values[start : start + step])
        if not finite.all():
            where = ""
            if values.ndim == 2:
                row, column = np.argwhere(~finite)[0].tolist()
                where = f" at row {start + row}, column {column}"
                if names is not None:
                    where = f" in data row {start + row + 1}, column {names[column]}"
            raise Failure(f"{path}: expected finite features, got NaN or inf{where}")


def _check_target(path: Path, y: Array, rows: int) -> None:
    if y.ndim not in (1, 2) or len(y) != rows:
        raise Failure(f"{path}: expected a target for each of {rows} rows, got shape {y.shape}")
    if y.dtype.kind not in "iubfUO":  # objects are those that `cells.joined` makes of text
        raise Failure(f"{path}: expected a target of numbers or text, got {y.dtype}")
    absent = np.isnan(y) if y.dtype.kind == "f" else y == "" if y.dtype.kind == "U" else None
    if absent is not None and absent.any():
        row = int(np.argwhere(absent)[0, 0])
        raise Failure(f"{path}: expected a label, got an empty one or NaN at row {row}")


def opened(path: Path) -> contextlib.AbstractContextManager["Columns"]:
    """Open a table of named columns."""
    try:
        from . import columns
    except ImportError:
        raise Failure(f"{path}: needs pyarrow: python -m pip install pyarrow") from None
    return columns.opened(path)


def _columns(paths: list[Path], wanted: Wanted) -> Table:
    with opened(paths[0]) as table:
        target, labels = [], []
        if wanted.learn:
            if wanted.target not in table.names:
                known = ", ".join(table.names[:20])
                raise Failure(f"--target: expected one of {known}, got {wanted.target}")
            target = [wanted.target]
        names = wanted.features
        if names is None:
            names = [name for name in table.names if name != wanted.target]
        x = np.empty((0, len(names)), table.dtype(names))
        rows = 0
        for batch in table.read([*names, *target]):
            rows += batch.rows
            if rows > len(x):  # in place where the system can; else a copy now and then
                x.resize((max(rows, len(x) * 9 // 8), len(names)), refcheck=False)
            batch.numbers(names, x[batch.first : rows])
            labels += [batch.labels(name) for name in target]
        x.resize((rows, len(names)), refcheck=False)
        y = table.joined(target[0], labels) if labels else None
    return Table(x, y, names)


def _npz(paths: list[Path], wanted: Wanted) -> Table:
    path = paths[0]
    # Opened here, for of what is no archive NumPy leaves the file open.
    with _reading(path, "arrays of numbers"), path.open("rb") as file:
        archive = np.load(file)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise Failure(f"{path}: expected an archive of arrays, got a single one")
        names = list(archive.files)
        target = wanted.target
        if wanted.learn and target not in names:
            raise Failure(f"--target: expected one of {', '.join(names)}, got {target}")
        others = [name for name in names if name != target]
        chosen = "X" if "X" in others else others[0] if len(others) == 1 else None
        if chosen is None:
            raise Failure(
                f"{path}: expected an array X, or one beside the target, got {', '.join(names)}"
            )
        arrays = []
        for name in [chosen, *([target] if target and wanted.learn else [])]:
            arrays.append(archive[name])
            if not isinstance(arrays[-1], np.ndarray):  # the bytes of what is no .npy
                raise Failure(f"{path}: expected an array {name}, got something else")
    x, *y = arrays
    return Table(x, y[0] if y else None, None)


def _npy(paths: list[Path], wanted: Wanted) -> Table:
    if wanted.learn and len(paths) != 2:
        raise Failure("DATA: expected two files, X.npy and y.npy, got one")
    arrays = []
    for path in paths:
        with _reading(path, "an array of numbers"):
            arrays.append(np.load(path, mmap_mode="r"))
        if not isinstance(arrays[-1], np.ndarray):
            raise Failure(f"{path}: expected a single array, got an archive")
    x, *y = arrays
    return Table(x, np.array(y[0]) if y else None, None)


def _svmlight(paths: list[Path], wanted: Wanted) -> Table:
    from sklearn.datasets import load_svmlight_file

    with _reading(paths[0], "svmlight format"):
        x, y = load_svmlight_file(str(paths[0]))
    if not wanted.learn:
        return Table(x, None, None)
    with np.errstate(invalid="ignore"):  # of NaN, which is no label
        whole = y.astype(np.int64)
    return Table(x, whole if np.array_equal(whole, y) else y, None)


@contextlib.contextmanager
def _reading(path: Path, expected: str) -> Iterator[None]:
    """Say in one line what is wrong with a file."""
    try:
        yield
    except (Failure, MemoryError):
        raise
    except Exception as error:  # what damaged files raise is not documented: BadZipFile, EOFError
        if isinstance(error, OSError) and error.errno:
            raise Failure(f"{path}: {error.strerror}") from None
        found = str(error).partition("\n")[0]
        raise Failure(f"{path}: expected {expected}, got damaged or other data: {found}") from None
