"""What ``fastce eval`` reads, as stored arrays: .npy files, and copies of tables."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import npy, output, table
from .npy import Stored
from .terminal import Failure

if TYPE_CHECKING:
    from .columns import Columns


@contextlib.contextmanager
def logits(path: Path, target: str | None) -> Iterator[list[Stored]]:
    """Open logits; of a table, `target` is no class but comes as a second array."""
    if path.suffix.lower() in table.COLUMNAR:
        with contextlib.ExitStack() as stack:
            with table.opened(path) as found:
                classes = [name for name in found.names if name != target]
                parts = {str(path): (classes, found.dtype(classes))}
                if target is not None:
                    name = f"{path}, column {target}"
                    parts[name] = ([target], found.integer_dtype(target))
                copies = _copied(found, parts, stack)
            yield copies
    elif target is not None:
        raise Failure(f"--target: expected logits in a table with that column, got {path}")
    else:
        with npy.opened(path) as stored:
            yield [stored]


@contextlib.contextmanager
def targets(path: Path) -> Iterator[Stored]:
    """Open targets; a table of one column is of integers, of more it is of probabilities."""
    if path.suffix.lower() in table.COLUMNAR:
        with contextlib.ExitStack() as stack:
            with table.opened(path) as found:
                names = found.names
                dtype = found.dtype(names) if len(names) != 1 else found.integer_dtype(names[0])
                (copy,) = _copied(found, {str(path): (names, dtype)}, stack)
            yield copy
    else:
        with npy.opened(path) as stored:
            yield stored


def _copied(
    found: "Columns",
    parts: dict[str, tuple[list[str], np.dtype[Any]]],
    stack: contextlib.ExitStack,
) -> list[Stored]:
    """Copy columns, named for messages, into files that are gone with the stack."""
    files = [output.temporary(stack) for _ in parts]
    rows = 0
    for batch in found.read([name for names, _ in parts.values() for name in names]):
        rows += batch.rows
        for file, (names, dtype) in zip(files, parts.values(), strict=True):
            block = np.empty((batch.rows, len(names)), dtype)
            batch.numbers(names, block)
            try:
                file.write(block.data)
                file.flush()
            except OSError as error:
                raise Failure(f"{tempfile.gettempdir()}: {error.strerror}") from None
    return [
        Stored(name, file, dtype, (rows,) if dtype.kind in "iu" else (rows, len(names)), False, 0)
        for file, (name, (names, dtype)) in zip(files, parts.items(), strict=True)
    ]
