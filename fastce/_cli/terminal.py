"""What the commands show: tables, a progress bar, and the one line of a failure.

Uses rich where it is installed and plain text where it is not.
"""

import contextlib
import importlib.util
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence

_HAVE_RICH = importlib.util.find_spec("rich") is not None


class Failure(Exception):  # noqa: N818 (an answer to the user, not a fault of the program)
    """Something the user can mend, said in one line; the program ends with status 2."""


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Have a standard output and an error output that take any text.

    What a closed one is given is lost.  What the encoding does not have is written as an escape.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed; the next file to be opened would get its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 (for good)
    stdout = sys.stdout
    if not isinstance(stdout, io.TextIOWrapper):
        yield
        return
    errors = stdout.errors
    stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stdout.reconfigure(errors=errors)


def abandon_output() -> None:
    """Let the standard output lose what it could not pass on, or exiting would fail too."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """Tell the error output something in one line, whatever a file has put into it."""
    line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)
    with contextlib.suppress(OSError):  # of nobody who could be told
        print(line, file=sys.stderr)


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
