"""What a fresh process pays: importing, and the first call with an empty or a filled cache."""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import fastce

_PROGRAM = """
import json, time
times = [time.perf_counter()]
import numpy as np
times.append(time.perf_counter())
import fastce
times.append(time.perf_counter())
fastce.cross_entropy_and_grad(np.zeros((4, 1000), np.float32), np.zeros(4, np.int64))
times.append(time.perf_counter())
print(json.dumps([after - before for before, after in zip(times, times[1:])]))
"""


class Startup(NamedTuple):
    """Seconds to import NumPy, to import fastce after it, and for the first loss and gradient."""

    numpy: float
    fastce: float
    first_call: float


def first_call(cache: str | Path) -> Startup:
    """Start a process that keeps machine code in the folder `cache`."""
    environment = os.environ | {
        "FASTCE_CACHE_DIR": str(cache),
        "PYTHONPATH": str(Path(fastce.__file__).parent.parent),  # the same fastce as here
    }
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, check=True, capture_output=True
    )
    return Startup(*json.loads(done.stdout))


@functools.cache
def startup(repeats: int) -> tuple[Startup, Startup]:
    """(one start with an empty cache, medians of `repeats` starts with that cache filled)."""
    with tempfile.TemporaryDirectory() as cache:
        cold = first_call(cache)
        warm = [first_call(cache) for _ in range(repeats)]
    return cold, Startup(*map(statistics.median, zip(*warm, strict=True)))
