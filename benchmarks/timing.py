"""Timing contestants alternately, so that what else the machine does hits all of them alike."""

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

K = TypeVar("K", bound=Hashable)

# Seconds between contestants: the threads of torch spin for milliseconds after their work and would
# take a processor from whoever comes next (measured: twice the time).
PAUSE = 0.008
# A batch of calls is timed as one where a call is shorter: reading the clock costs some 50 ns.
BATCH_SECONDS = 5e-5


def asked_for_quick() -> bool:
    """Whether the command line has ``--quick``: tiny inputs, to see that a script runs at all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="tiny inputs; the numbers say nothing")
    return bool(parser.parse_args().quick)


class Contestant(NamedTuple):
    """A call, and what must be done before each time without being timed."""

    call: Callable[[], Any]
    prepare: Callable[[], Any] | None = None


class Times(NamedTuple):
    """Seconds per call: the fastest one of each turn."""

    turns: tuple[float, ...]

    @property
    def minimum(self) -> float:
        """The fastest of all."""
        return min(self.turns)

    @property
    def median(self) -> float:
        """The median of the turns."""
        return statistics.median(self.turns)

    def over(self, other: "Times") -> float:
        """Median of the ratios to what another contestant took in the same turn.

        Bandwidth drifts by half within seconds, so that minima of different turns do not compare.
        """
        return statistics.median(a / b for a, b in zip(self.turns, other.turns, strict=True))

    def plus(self, other: "Times", share: float) -> "Times":
        """Turn by turn, this and a share of another."""
        return Times(tuple(a + share * b for a, b in zip(self.turns, other.turns, strict=True)))


def alternately(
    contestants: Mapping[K, Contestant], *, turns: int, seconds: float, pause: float = PAUSE
) -> dict[K, Times]:
    """Time every contestant in every turn, each time for at least `seconds` and one call.

    They are `pause` seconds apart.
    """
    numbers = {key: _calls_per_batch(c) for key, c in contestants.items()}
    minima: dict[K, list[float]] = {key: [] for key in contestants}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(turns):
            for key, contestant in contestants.items():
                time.sleep(pause)
                minima[key].append(_fastest(contestant, numbers[key], seconds))
    finally:
        if collecting:
            gc.enable()
    return {key: Times(tuple(fastest)) for key, fastest in minima.items()}


def _calls_per_batch(contestant: Contestant) -> int:
    _fastest(contestant, 1, 0.0)  # compiles, touches fresh memory
    if contestant.prepare is not None:
        return 1
    return max(1, math.ceil(BATCH_SECONDS / _fastest(contestant, 1, 0.0)))


def _fastest(contestant: Contestant, number: int, seconds: float) -> float:
    call, prepare = contestant
    best = math.inf
    end = time.perf_counter() + seconds
    while True:
        if prepare is not None:
            prepare()
        began = time.perf_counter()
        for _ in range(number):
            call()
        now = time.perf_counter()
        best = min(best, (now - began) / number)
        if now >= end:
            return best
