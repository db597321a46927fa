"""Reading a data set for ``fastce fit`` and ``fastce predict``: features, and what to learn."""

import csv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .terminal import Failure

Array = np.ndarray[Any, Any]


class Table(NamedTuple):
    """Features (dense or CSR) with their names where the file has some; the target if asked for."""

    x: Any
    y: Array | None
    names: list[str] | None


class Wanted(NamedTuple):
    """What to read: the target by its name, or all but it; of a .csv only some features."""

    target: str | None
    learn: bool
    features: list[str] | None = None


def read(paths: list[Path], wanted: Wanted) -> Table:
    """Read one data set: .csv, .npz, .svmlight, or two .npy files of features and target."""
    kind = paths[0].suffix.lower()
    if len(paths) > 1 and (kind != ".npy" or len(paths) > 2):
        raise Failure(f"DATA: expected one file, or X.npy and y.npy, got {len(paths)} files")
    readers = {".csv": _csv, ".npz": _npz, ".npy": _npy}
    for suffix in (".svmlight", ".svm", ".libsvm"):
        readers[suffix] = _svmlight
    if kind not in readers:
        raise Failure(
            f"{paths[0]}: expected .csv, .npz, .npy or .svmlight, got {kind or 'no'} file"
        )
    try:
        found = readers[kind](paths, wanted)
    except OSError as error:
        raise Failure(f"{error.filename or paths[0]}: {error.strerror or error}") from None
    return _checked(paths[0], found)


def _checked(path: Path, table: Table) -> Table:
    x, y = table.x, table.y
    if x.ndim != 2:
        raise Failure(f"{path}: expected features of shape (rows, features), got {x.shape}")
    if x.dtype.kind not in "fiub":
        raise Failure(f"{path}: expected numbers as features, got {x.dtype}")
    if not x.shape[0]:
        raise Failure(f"{path}: expected at least one row, got none")
    if y is not None and len(y) != x.shape[0]:
        raise Failure(f"{path}: expected a target for each of {x.shape[0]} rows, got {len(y)}")
    values = x if isinstance(x, np.ndarray) else x.data
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        where = ""
        if isinstance(x, np.ndarray):
            row, column = np.argwhere(~np.isfinite(x))[0].tolist()
            where = f" at row {row}, column {table.names[column] if table.names else column}"
        raise Failure(f"{path}: expected finite features, got NaN or inf{where}")
    return table


def _csv(paths: list[Path], wanted: Wanted) -> Table:
    path = paths[0]
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            header = next(lines, None)
            rows = [line for line in lines if line]
    except (csv.Error, UnicodeDecodeError) as error:
        raise Failure(f"{path}: expected a table of text, got something else: {error}") from None
    if header is None:
        raise Failure(f"{path}: expected a line of column names, got an empty file")
    target = wanted.target
    if wanted.learn and target not in header:
        raise Failure(f"--target: expected one of {', '.join(header[:20])}, got {target}")
    names = wanted.features
    if names is None:
        names = [name for name in header if name != target]
    for name in names:
        if name not in header:
            raise Failure(f"{path}: expected a column {name}, got {', '.join(header[:20])}")
    places = [header.index(name) for name in names]
    x = np.empty((len(rows), len(names)))
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise Failure(
                f"{path}: expected {len(header)} fields, got {len(row)} in data row {number + 1}"
            )
        for column, place in enumerate(places):
            try:
                x[number, column] = float(row[place])
            except ValueError:
                raise Failure(
                    f"{path}: expected a number, got {row[place]!r} in data row {number + 1}, "
                    f"column {names[column]}"
                ) from None
    y = None
    if wanted.learn and target is not None:
        y = _as_numbers(np.array([row[header.index(target)] for row in rows], str))
    return Table(x, y, names)


def _as_numbers(labels: Array) -> Array:
    """Labels as integers where all of them are."""
    try:
        numbers = labels.astype(np.int64)
    except ValueError:
        return labels
    return numbers if np.array_equal(numbers.astype(str), labels) else labels


def _load(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r" if path.suffix == ".npy" else None)
    except OSError:
        raise
    except Exception:  # what damaged files raise is not documented: ValueError, BadZipFile, ...
        raise Failure(
            f"{path}: expected arrays of numbers, got a damaged or pickled file"
        ) from None


def _npz(paths: list[Path], wanted: Wanted) -> Table:
    path = paths[0]
    archive = _load(path)
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
    try:
        return Table(archive[chosen], archive[target] if wanted.learn else None, None)
    except ValueError:
        raise Failure(f"{path}: expected arrays of numbers, got pickled Python objects") from None


def _npy(paths: list[Path], wanted: Wanted) -> Table:
    if wanted.learn and len(paths) != 2:
        raise Failure("DATA: expected two files, X.npy and y.npy, got one")
    return Table(_load(paths[0]), np.array(_load(paths[1])) if len(paths) > 1 else None, None)


def _svmlight(paths: list[Path], wanted: Wanted) -> Table:
    from sklearn.datasets import load_svmlight_file

    try:
        x, y = load_svmlight_file(str(paths[0]))
    except ValueError as error:
        raise Failure(f"{paths[0]}: expected svmlight format, got: {error}") from None
    whole = y.astype(np.int64)
    return Table(x, whole if np.array_equal(whole, y) else y, None)
