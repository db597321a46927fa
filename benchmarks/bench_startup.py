"""What a fresh process pays, for asv."""

from benchmarks.startup import startup

REPEATS = 3


class Startup:
    params = ("import", "first call, filled cache", "first call, empty cache")
    param_names = ("what",)
    timeout = 120.0

    def track_seconds(self, what: str) -> float:
        cold, warm = startup(REPEATS)
        return {
            "import": warm.fastce,
            "first call, filled cache": warm.first_call,
            "first call, empty cache": cold.first_call,
        }[what]

    track_seconds.unit = "seconds"  # type: ignore[attr-defined]
