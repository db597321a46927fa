"""What the commands show: tables, a progress bar, and the one line of a failure.

Uses rich where it is installed and plain text where it is not.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence

_HAVE_RICH = importlib.util.find_spec("rich") is not None


class Failure(Exception):  # noqa: N818 (an answer to the user, not a fault of the program)
    """Something the user can mend, said in one line; the program ends with status 2."""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: the first column to the left, all others to the right."""
    if _HAVE_RICH and sys.stdout.isatty():
        import rich.box
        import rich.console
        import rich.table

        grid = rich.table.Table(box=rich.box.SIMPLE_HEAD)
        for number, column in enumerate(columns):
            grid.add_column(column, justify="right" if number else "left")
        for row in rows:
            grid.add_row(*row)
        rich.console.Console(highlight=False).print(grid)
        return
    cells = [list(columns), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        first, *others = [
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join([first, *others]).rstrip())


def pairs(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and what belongs to them, aligned."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name.ljust(width)}  {value}".rstrip())


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show how far a long work is; yields the function that is told how much was done.

    Nothing is shown without rich, or where nobody is looking at standard error.
    """
    if not (_HAVE_RICH and sys.stderr.isatty()):
        yield lambda done: None
        return
    import rich.console
    import rich.progress

    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)
