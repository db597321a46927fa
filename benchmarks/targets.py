"""What fastce sets out to reach, beside what a report has measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks.cases import CASES, DTYPES, LARGE, OPTIONED, SOFTMAX
from benchmarks.measure import Result
from benchmarks.startup import Startup

BIG = ["1024 x 32000", "256 x 128256", "8 x 1048576"]
ROWS_OF = {name: case for name, case in CASES.items() if case.axis == 1}


class Verdict(NamedTuple):
    """A line of the table."""

    what: str
    measured: str
    target: str
    met: bool


class Target(NamedTuple):
    """A bound on a ratio, from below if the ratio is a peer's time over ours."""

    what: str
    cases: Sequence[str]
    works: Sequence[str]
    ratio: Callable[[Result], float | None]
    bound: float
    unit: str

    @property
    def from_below(self) -> bool:
        """Whether larger is better."""
        return self.ratio is _faster

    def verdict(self, results: Mapping[tuple[str, str], Result]) -> Verdict | None:
        """The worst case decides; None where nothing was measured."""
        measured = [
            found
            for case in self.cases
            for work in self.works
            if (result := results.get((case, work))) and (found := self.ratio(result)) is not None
        ]
        if not measured:
            return None
        sign = ">=" if self.from_below else "<="
        worst = min(measured) if self.from_below else max(measured)
        met = worst >= self.bound if self.from_below else worst <= self.bound
        numbers = ", ".join(f"{value:.3g}" for value in measured)
        return Verdict(self.what, numbers, f"{sign} {self.bound:g} {self.unit}", met)


def _limit(result: Result) -> float | None:
    return result.over_limit


def _plain(result: Result) -> float | None:
    return result.over_plain


def _faster(result: Result) -> float | None:
    return result.speedup


def _microseconds(result: Result) -> float:
    return result.times.minimum * 1e6


LOSS, GRADIENT = "loss", "loss and gradient"
FREE = [name for name in OPTIONED if "soft cap" not in name and "targets" not in name]
LIMIT, PLAIN, PEER, TIME = "x limit", "x plain", "x faster than the best peer", "microseconds"
TARGETS = (
    Target("loss, large", BIG, [LOSS], _limit, 1.05, LIMIT),
    Target("loss and gradient, large", BIG, [GRADIENT], _limit, 1.05, LIMIT),
    Target("in place, large", BIG, ["in place"], _limit, 1.05, LIMIT),
    Target("fresh gradient, large", BIG, ["fresh gradient"], _limit, 1.10, LIMIT),
    Target("4096 x 1000", ["4096 x 1000"], [LOSS, GRADIENT], _faster, 3, PEER),
    Target("65536 x 10", ["65536 x 10"], [LOSS, GRADIENT], _faster, 3, PEER),
    Target("1 x 50257, loss and gradient", ["1 x 50257"], [GRADIENT], _microseconds, 25, TIME),
    Target("32 x 10, loss", ["32 x 10"], [LOSS], _microseconds, 5, TIME),
    Target("32 x 10, loss and gradient", ["32 x 10"], [GRADIENT], _microseconds, 7, TIME),
    Target("classes along axis 1", list(ROWS_OF), [LOSS, GRADIENT], _limit, 1.3, LIMIT),
    Target("float64", [d for d in DTYPES if "64" in d], [LOSS, GRADIENT], _limit, 1.05, LIMIT),
    Target("options", FREE, [LOSS, GRADIENT], _plain, 1.10, PLAIN),
    Target(
        "soft targets", [n for n in OPTIONED if "targets" in n], [LOSS, GRADIENT], _limit, 1.10,
        LIMIT,
    ),
    Target("logsumexp", LARGE, SOFTMAX[:1], _limit, 1.05, LIMIT),
    Target("softmax, log_softmax", LARGE, SOFTMAX[1:], _limit, 1.05, LIMIT),
)  # fmt: skip


def verdicts(
    results: Sequence[Result], startup: Mapping[str, Startup], growth: Sequence[float]
) -> Iterator[Verdict]:
    """Every target that something was measured for."""
    found = {(result.case.name, result.work): result for result in results}
    for target in TARGETS:
        verdict = target.verdict(found)
        if verdict is not None:
            yield verdict
    for dtype in ("float16", "bfloat16"):
        ratios = [
            found[half].times.minimum / found[full].times.minimum
            for work in (LOSS, GRADIENT)
            if (half := (f"1024 x 32000, {dtype}", work)) in found
            and (full := ("1024 x 32000", work)) in found
        ]
        if ratios:
            numbers = ", ".join(f"{ratio:.3g}" for ratio in ratios)
            yield Verdict(dtype, numbers, "<= 0.6 x float32", max(ratios) <= 0.6)
    spread = max(growth) / min(growth) - 1
    yield Verdict("growth with size", f"{spread:.0%}", "<= 15% spread", spread <= 0.15)
    for name, kind, bound in (
        ("import fastce", "filled cache", 0.06),
        ("first call, filled cache", "filled cache", 0.5),
        ("first call, empty cache", "empty cache", 4.0),
    ):
        start = startup[kind]
        seconds = start.fastce if name.startswith("import") else start.first_call
        yield Verdict(name, f"{seconds:.3g}", f"<= {bound:g} seconds", seconds <= bound)
