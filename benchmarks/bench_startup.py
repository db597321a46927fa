"""What a fresh process pays, for asv."""

from benchmarks.startup import Startup as Start
from benchmarks.startup import startup

REPEATS = 3


class Startup:
    params = ("import", "first call, filled cache", "first call, empty cache")
    param_names = ("what",)
    timeout = 300.0  # of a start that compiles, on a busy machine

    def setup_cache(self) -> tuple[Start, Start]:
        return startup(REPEATS)

    def track_seconds(self, found: tuple[Start, Start], what: str) -> float:
        cold, warm = found
        return {
            "import": warm.fastce,
            "first call, filled cache": warm.first_call,
            "first call, empty cache": cold.first_call,
        }[what]

    track_seconds.unit = "seconds"  # type: ignore[attr-defined]
