"""Measure fastce, the limits of the machine and the peers in one run, and report.

    python -m benchmarks.report [--quick] [--peers] [--output DIR] [--json]

With ``--output``, report.md, report.json and two pictures are written to that folder.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastce
from benchmarks.cases import (
    CASES,
    DTYPES,
    LARGE,
    LATENCY,
    LOSSES,
    OPTIONED,
    SOFTMAX,
    WORKS,
    Case,
    data,
)
from benchmarks.measure import Effort, Named, Result, measure
from benchmarks.memory import Extra, extra
from benchmarks.startup import Startup, startup
from benchmarks.targets import verdicts
from benchmarks.timing import Contestant, alternately
from fastce._cli import terminal


class Group(NamedTuple):
    """A table: works on cases."""

    title: str
    cases: Sequence[str]
    works: Sequence[str]
    quick: int  # how many of the cases a quick run measures


GROUPS = (
    Group("Shapes", LARGE, LOSSES, 3),
    Group("Small calls", LATENCY, ["loss", "loss and gradient", "fresh gradient"], 2),
    Group("Dtypes", DTYPES, LOSSES[:3], 0),
    Group("Options", OPTIONED, LOSSES[:2], 0),
    Group("Softmax and its kin", LARGE, SOFTMAX, 1),
)
BY_CLASSES = "Numbers of classes, float32"


class Plan(NamedTuple):
    """How much is measured: `quick` fewer cases, and how many logits divided in how many ways."""

    effort: Effort
    quick: bool
    logits: int
    steps: int
    starts: int
    rows: Sequence[int]  # of 32000 classes


FULL = Plan(
    Effort(turns=12, seconds=0.02), quick=False, logits=1 << 25, steps=13, starts=5,
    rows=(32, 320, 3200, 32000),
)  # fmt: skip
QUICK = Plan(
    Effort(turns=3, seconds=0.005), quick=True, logits=1 << 22, steps=4, starts=1, rows=(32, 320)
)

CAPTION = """\
Times are minima over all calls, in milliseconds, with the median over turns of the minimum of a
turn beside them; limits and peers are given by that median. All contestants of a row took turns in
one run, with as many threads; ratios are medians of the ratios within a turn. The limit is the
fastest of several ways to move the same bytes: for the loss and logsumexp reading the
logits; for loss and gradient, softmax and log_softmax, which write into memory used before
(`out=`), copying them; in place, multiplying them in place; for a fresh gradient, copying them to
newly allocated memory. What an option reads besides (soft targets) is added to the limit at the
speed of reading. GB/s are those bytes over the minimum. "x limit" is time over limit; "x plain"
time over that of the same call without the option; "x faster" the time of the best installed peer
over ours (for the gradient in place or fresh, the peer's loss and gradient)."""

MEMORY_CAPTION = """\
Megabytes that one call needs at its peak beyond what was there before it, after a first call:
traced are the allocations of Python and NumPy (the returned arrays among them), resident is the
growth of the process in physical memory."""

TARGETS_CAPTION = """\
What fastce sets out to reach; where several numbers were measured, the worst of them decides.
The names are those of the tables below; "options" are weights, smoothing, z-loss, confident rows,
half the classes -inf and half the rows ignored, the loss and the gradient of each."""

GROWTH_CAPTION = """\
Nanoseconds for each logit, loss and gradient with `out=`, rows of 32000 float32; medians of turns.
The smallest fit the last-level cache, the largest are 4 GB."""

STARTUP_CAPTION = """\
Seconds in fresh processes: importing NumPy; importing fastce after it; the first call of
cross_entropy_and_grad, 4 x 1000 float32. Empty cache: one process; filled cache: medians."""


@dataclasses.dataclass
class Report:
    """Everything that was measured."""

    machine: dict[str, str]
    tables: dict[str, list[Result]]
    memory: dict[str, Extra]
    startup: dict[str, Startup]
    growth: dict[int, float]  # rows of 32000 logits, and seconds for each logit


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    import numba

    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "processor": _processor(),
        "threads": str(fastce.get_num_threads()),
        "load before": load,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
        "numba": numba.__version__,
        "fastce": fastce.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def run(plan: Plan, *, compiled: bool = False) -> Report:
    """Measure everything; `compiled` adds torch.compile to the peers."""
    before = machine()
    tables = {}
    for group in GROUPS:
        names = group.cases[: group.quick] if plan.quick else group.cases
        rows: list[Result] = []
        for name in names:
            print(f"{group.title}: {name}", file=sys.stderr)
            rows.extend(measure(CASES[name], group.works, plan.effort, compiled=compiled))
        if rows:
            tables[group.title] = rows
    print("numbers of classes, memory, start-up", file=sys.stderr)
    tables[BY_CLASSES] = list(by_classes(plan))
    large = data(CASES[LARGE[0]])
    return Report(
        before,
        tables,
        {work: extra(WORKS[work].contestant(large).call) for work in LOSSES},
        dict(zip(("empty cache", "filled cache"), startup(plan.starts), strict=True)),
        growth(plan),
    )


def growth(plan: Plan) -> dict[int, float]:
    """Seconds for each logit, by number of rows, whose first ones are the same."""
    rng = np.random.default_rng(0)
    logits = rng.random((max(plan.rows), 32000), np.float32)
    targets, out = rng.integers(0, 32000, len(logits)), np.zeros_like(logits)
    times = alternately(
        {
            rows: Contestant(
                functools.partial(
                    fastce.cross_entropy_and_grad, logits[:rows], targets[:rows], out=out[:rows]
                )
            )
            for rows in plan.rows
        },
        turns=plan.effort.turns, seconds=plan.effort.seconds,
    )  # fmt: skip
    return {rows: t.median / (rows * 32000) for rows, t in times.items()}


def by_classes(plan: Plan) -> Iterator[Result]:
    """About as many logits, with 4 classes and up to one row."""
    for classes in np.geomspace(4, plan.logits, plan.steps).round().astype(int).tolist():
        case = Case((plan.logits // classes, classes))
        yield from measure(case, LOSSES[:2], plan.effort, rivals=False)


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else format(value * scale, form)


def _named_time(named: Named | None) -> str:
    return f"{named.times.median * 1e3:.4g} ({named.name})" if named else ""


Column = tuple[str, Callable[[Result], str]]
COLUMNS: tuple[Column, ...] = (
    ("case", lambda r: r.case.name),
    ("work", lambda r: r.work),
    ("minimum, ms", lambda r: _number(r.times.minimum, ".4g", 1e3)),
    ("median, ms", lambda r: _number(r.times.median, ".4g", 1e3)),
    ("GB/s", lambda r: _number(r.bandwidth, ".1f", 1e-9)),
    (
        "limit, ms",
        lambda r: f"{r.limit.times.median * 1e3:.4g} ({r.limit.name})" if r.limit else "",
    ),
    ("x limit", lambda r: _number(r.over_limit, ".2f")),
    ("x plain", lambda r: _number(r.over_plain, ".2f")),
    (
        "best peer, ms",
        lambda r: f"{r.peer.times.median * 1e3:.4g} ({r.peer.name})" if r.peer else "",
    ),
    ("x faster", lambda r: _number(r.speedup, ".1f")),
)


class Table(NamedTuple):
    """A table as text."""

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def text_tables(report: Report) -> Iterator[Table]:
    """What is printed and written."""
    measured = [result for results in report.tables.values() for result in results]
    yield Table(
        "Targets",
        TARGETS_CAPTION,
        ("", "measured", "target", "met"),
        [
            (v.what, v.measured, v.target, "yes" if v.met else "no")
            for v in verdicts(measured, report.startup, list(report.growth.values()))
        ],
    )
    caption = CAPTION
    for title, results in report.tables.items():
        columns = [c for c in COLUMNS if any(c[1](r) for r in results)]
        rows = [[show(r) for _, show in columns] for r in results]
        yield Table(title, caption, [name for name, _ in columns], rows)
        caption = "As above."
    yield Table(
        "Growth",
        GROWTH_CAPTION,
        ("logits", "ns each"),
        [(f"{rows * 32000:.3g}", f"{s * 1e9:.4f}") for rows, s in report.growth.items()],
    )
    yield Table(
        f"Extra memory at {LARGE[0]} float32 ({CASES[LARGE[0]].size / 1e6:.0f} MB)",
        MEMORY_CAPTION,
        ("work", "traced", "resident"),
        [(w, _mb(e.traced), _mb(e.resident)) for w, e in report.memory.items()],
    )
    yield Table(
        "Start-up",
        STARTUP_CAPTION,
        ("", "import numpy", "import fastce", "first call"),
        [(name, *(f"{s:.3f}" for s in times)) for name, times in report.startup.items()],
    )


_mb = functools.partial(_number, form=".2f", scale=1e-6)


def as_json(report: Report) -> str:
    """Everything measured, with the ratios."""
    ratios = ("bandwidth", "over_limit", "over_plain", "speedup")
    content = dataclasses.asdict(report)
    for title, results in report.tables.items():
        for result, entry in zip(results, content["tables"][title], strict=True):
            entry |= {name: getattr(result, name) for name in ratios}
    return json.dumps(_named(content), indent=1)


def _named(value: Any) -> Any:
    """Named tuples as objects, as JSON would not have them."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _named(value._asdict())
    if isinstance(value, dict):
        return {key: _named(item) for key, item in value.items()}
    return [_named(item) for item in value] if isinstance(value, list | tuple) else value


def as_markdown(report: Report) -> Iterator[str]:
    """The same as a page."""
    yield "# fastce against the limits of the machine and its peers\n"
    yield ", ".join(f"{key} {value}" for key, value in report.machine.items()) + "\n"
    for table in text_tables(report):
        yield f"## {table.title}\n\n{table.caption}\n"
        yield f"| {' | '.join(table.columns)} |"
        yield "|---" * len(table.columns) + "|"
        yield from (f"| {' | '.join(row)} |" for row in table.rows)
        yield ""
    yield "![Time over limit](limits.png)\n\n![Bandwidth by number of classes](classes.png)"


def draw_limits(report: Report, path: Path) -> None:
    """Time over limit by shape, a bar for each work."""
    from matplotlib.figure import Figure

    results = [
        r
        for title, rows in report.tables.items()
        for r in rows
        if r.over_limit and not r.plain and title != BY_CLASSES
    ]
    cases = list(dict.fromkeys(r.case for r in results))
    works = [w for w in WORKS if any(r.work == w for r in results)]
    figure = Figure(figsize=(9, 1.5 + 0.7 * len(cases)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(works)
    for number, work in enumerate(works):
        chosen = [r for r in results if r.work == work]
        places = [cases.index(r.case) + (number - (len(works) - 1) / 2) * height for r in chosen]
        axes.barh(places, [r.over_limit or 0.0 for r in chosen], height, label=work)
    axes.axvline(1.0, color="k", linewidth=0.8)
    axes.set_yticks(range(len(cases)), [case.name for case in cases])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set(xlabel="time over the time to move the same bytes", title="fastce over the limit")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw_classes(report: Report, path: Path) -> None:
    """Bytes per second by number of classes, and what the machine can move at best."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for color, work in enumerate(LOSSES[:2]):
        results = [r for r in report.tables[BY_CLASSES] if r.work == work]
        classes = [r.case.shape[-1] for r in results]
        ours = [(r.bandwidth or 0.0) / 1e9 for r in results]
        limit = [(r.over_limit or 1.0) * speed for r, speed in zip(results, ours, strict=True)]
        axes.semilogx(classes, ours, "o-", color=f"C{color}", label=work)
        axes.semilogx(classes, limit, ":", color=f"C{color}", label=f"limit of {work}")
    axes.set(xlabel="classes", ylabel="GB/s", title="Bytes moved per second")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)


def write(report: Report, folder: Path) -> None:
    """The page, its pictures and the numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text("\n".join(as_markdown(report)) + "\n", encoding="utf-8")
    (folder / "report.json").write_text(as_json(report) + "\n", encoding="utf-8")
    draw_limits(report, folder / "limits.png")
    draw_classes(report, folder / "classes.png")


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Measure fastce, the limits of the machine and the peers in one run.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases, within a minute")
    parser.add_argument("--peers", action="store_true", help="compile torch's functions as well")
    parser.add_argument("--output", type=Path, help="folder for report.md, report.json, pictures")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    report = run(QUICK if options.quick else FULL, compiled=options.peers)
    if options.output is not None:
        write(report, options.output)
    if options.json:
        print(as_json(report))
        return
    terminal.pairs(list(report.machine.items()))
    for table in text_tables(report):
        print(f"\n{table.title}\n{'-' * len(table.title)}\n{table.caption}\n")
        terminal.table(table.columns, table.rows)


if __name__ == "__main__":
    main()
