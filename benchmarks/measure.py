"""One case timed against the limits of the machine, its plain form and the peers, in one run."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks import limits
from benchmarks.cases import WORKS, Case, data
from benchmarks.peers import peers
from benchmarks.timing import Contestant, Times, alternately

# Logits smaller than this have no limit: waking a thread takes longer than reading them.
SMALL = 1_000_000


class Effort(NamedTuple):
    """How long to measure: turns, and seconds for each contestant in a turn."""

    turns: int
    seconds: float


class Named(NamedTuple):
    """Times and whose they are."""

    name: str
    times: Times


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured of one work on one case; ratios are medians over turns."""

    case: Case
    work: str
    times: Times
    bytes_moved: int | None
    limit: Named | None
    plain: Times | None
    peer: Named | None

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second."""
        return self.bytes_moved / self.times.minimum if self.bytes_moved else None

    @property
    def over_limit(self) -> float | None:
        """Time over the limit's."""
        return self.times.over(self.limit.times) if self.limit else None

    @property
    def over_plain(self) -> float | None:
        """Time over that without the option."""
        return self.times.over(self.plain) if self.plain else None

    @property
    def speedup(self) -> float | None:
        """The best peer's time over ours."""
        return self.peer.times.over(self.times) if self.peer else None


class Rival(NamedTuple):
    """A peer's name and its work."""

    name: str
    work: str


class Ours(NamedTuple):
    """Our work, with the option of the case or without."""

    work: str
    plain: bool


def measure(
    case: Case, works: Sequence[str], effort: Effort, *, rivals: bool = True, compiled: bool = False
) -> Iterator[Result]:
    """Time some works on a case."""
    arrays = data(case)
    contestants: dict[limits.Way | Rival | Ours, Contestant] = {}
    moves = {"read", *(WORKS[work].move for work in works)}
    if case.size >= SMALL:
        contestants |= {w: c for w, c in limits.ways(case.size).items() if w.move in moves}
    for work in works:
        contestants[Ours(work, False)] = WORKS[work].contestant(arrays)
        if case.option != "plain":
            contestants[Ours(work, True)] = WORKS[work].contestant(data(case.plain()))
        if rivals:
            for name, call in peers(case, arrays, work, compiled=compiled).items():
                contestants[Rival(name, work)] = Contestant(call)
    times = alternately(contestants, turns=effort.turns, seconds=effort.seconds)
    for work in works:
        yield Result(
            case,
            work,
            times[Ours(work, False)],
            *_limit(case, arrays.option_bytes, work, times),
            times.get(Ours(work, True)),
            _best_peer(work, times),
        )


def _limit(
    case: Case, option_bytes: int, work: str, times: dict[limits.Way | Rival | Ours, Times]
) -> tuple[int | None, Named | None]:
    """Bytes moved, and the least time to move them; what an option reads counts as reading."""
    move = WORKS[work].move
    measured = {way: t for way, t in times.items() if isinstance(way, limits.Way)}
    if move is None or not measured:
        return None, None
    way, best = limits.best(measured, move)
    reading = limits.best(measured, "read")[1]
    moved = limits.MOVES[move][1] * case.size + option_bytes
    name = f"{move}, {way.code}"
    return moved, Named(name, best.plus(reading, option_bytes / case.size))


def _best_peer(work: str, times: dict[limits.Way | Rival | Ours, Times]) -> Named | None:
    # Nobody else has the gradient in place or a choice of fresh memory.
    same = "loss and gradient" if work in ("in place", "fresh gradient") else work
    found = [
        Named(key.name, t)
        for key, t in times.items()
        if isinstance(key, Rival) and key.work == same
    ]
    return min(found, key=lambda named: named.times.median, default=None)
