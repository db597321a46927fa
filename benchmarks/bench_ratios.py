"""Ratios to the limits of the machine and to the peers, measured in the same process, for asv."""

from benchmarks.cases import CASES, DTYPES, LARGE, LOSSES
from benchmarks.measure import Effort, measure

EFFORT = Effort(turns=10, seconds=0.01)


class Ratios:
    params = ([*LARGE, *DTYPES], LOSSES[:2])
    param_names = ("case", "work")
    timeout = 300.0

    def track_time_over_limit(self, case: str, work: str) -> float | None:
        (result,) = measure(CASES[case], [work], EFFORT, rivals=False)
        return result.over_limit

    track_time_over_limit.unit = "times the limit"  # type: ignore[attr-defined]

    def track_best_peer_over_time(self, case: str, work: str) -> float | None:
        (result,) = measure(CASES[case], [work], EFFORT)
        return result.speedup

    track_best_peer_over_time.unit = "times as fast"  # type: ignore[attr-defined]
