"""Timing contestants alternately, so that what else the machine does hits all of them alike."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

K = TypeVar("K", bound=Hashable)

# A batch of calls is timed as one where a call is shorter: reading the clock costs some 50 ns.
BATCH_SECONDS = 5e-5


class Contestant(NamedTuple):
    """A call, and what must be done before each time without being timed."""

    call: Callable[[], Any]
    prepare: Callable[[], Any] | None = None


class Times(NamedTuple):
    """Seconds per call: the minimum of all, and the median over turns of the minimum of a turn."""

    minimum: float
    median: float


def alternately(
    contestants: Mapping[K, Contestant], *, turns: int, seconds: float
) -> dict[K, Times]:
    """Time every contestant in every turn, each time for at least `seconds` and one call."""
    numbers = {key: _calls_per_batch(c) for key, c in contestants.items()}
    minima: dict[K, list[float]] = {key: [] for key in contestants}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(turns):
            for key, contestant in contestants.items():
                minima[key].append(_fastest(contestant, numbers[key], seconds))
    finally:
        if collecting:
            gc.enable()
    return {key: Times(min(all_), statistics.median(all_)) for key, all_ in minima.items()}


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
