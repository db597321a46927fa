"""How a fit is going, for who watches."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator

from fastce._fit.solvers import Report


@contextlib.contextmanager
def shown(verbose: bool, most: int) -> Iterator[Report]:
    """A report to the standard error: a bar where rich is installed and somebody looks, else lines.

    Lines come at iterations 1, 2, 5, 10, 20, 50, ..., and for the last.
    """
    if not verbose:
        yield lambda iteration, value, gradient: None
        return
    if importlib.util.find_spec("rich") is not None and sys.stderr.isatty():
        with _bar(most) as report:
            yield report
        return
    last = ""

    def tell(iteration: int, value: float, gradient: float) -> None:
        nonlocal last
        last = f"iteration {iteration:4}  objective {value:.9f}  gradient {gradient:.1e}"
        if str(iteration).rstrip("0") in ("", "1", "2", "5"):
            print(last, file=sys.stderr)
            last = ""

    yield tell
    if last:
        print(last, file=sys.stderr)


@contextlib.contextmanager
def _bar(most: int) -> Iterator[Report]:
    import rich.console
    import rich.progress as rp

    columns = (
        rp.TextColumn("iteration"), rp.MofNCompleteColumn(), rp.BarColumn(),
        rp.TextColumn("objective {task.fields[value]:.9f}  gradient {task.fields[gradient]:.1e}"),
        rp.TimeElapsedColumn(),
    )  # fmt: skip
    with rp.Progress(*columns, console=rich.console.Console(stderr=True)) as bar:
        task = bar.add_task("", total=most, value=float("nan"), gradient=float("nan"))
        yield lambda iteration, value, gradient: bar.update(
            task, completed=iteration, value=value, gradient=gradient
        )
