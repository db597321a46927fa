"""How much memory a call needs beyond what was there before."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class Extra(NamedTuple):
    """Bytes at the peak of a call beyond those before it.

    `traced` is what went through Python's and NumPy's allocators; `resident` is physical memory of
    the whole process, None where the system does not tell.
    """

    traced: int
    resident: int | None


def _resident(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(kilobytes[0]) * 1024 if kilobytes else None


def _forget_peak() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def extra(call: Callable[[], Any]) -> Extra:
    """Memory of one call; the call is made once before, so that nothing is compiled."""
    call()
    before = _resident("VmRSS") if _forget_peak() else None
    result = call()
    peak = _resident("VmHWM")
    del result
    grown = None if before is None or peak is None else max(peak - before, 0)
    return Extra(traced(call), grown)  # apart: the tracing itself takes memory


def traced(call: Callable[[], Any]) -> int:
    """Bytes that Python and NumPy allocate for one call, at their peak."""
    tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        start = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - start
    finally:
        tracemalloc.stop()
