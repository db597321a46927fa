"""Time per call, for asv."""

import functools
from collections.abc import Callable
from typing import Any

from benchmarks.cases import (
    CASES,
    DTYPES,
    LARGE,
    LATENCY,
    LOSSES,
    OPTIONED,
    SOFTMAX,
    WORKS,
    data,
)
from benchmarks.timing import Contestant


@functools.cache
def ready(case: str, work: str) -> Contestant:
    """A call whose data are made and whose kernels are compiled: asv sets up before every call."""
    contestant = WORKS[work].contestant(data(CASES[case]))
    contestant.call()
    return contestant


class _Calls:
    param_names = ("case", "work")
    repeat = (5, 40, 1.0)  # samples at least, at most, and seconds
    timeout = 120.0
    call: Callable[[], Any]

    def setup(self, case: str, work: str) -> None:
        self.call, prepare = ready(case, work)
        if prepare is not None:
            prepare()

    def time_call(self, case: str, work: str) -> None:
        self.call()


class Shapes(_Calls):
    params = (LARGE, LOSSES)


class Latency(_Calls):
    params = (LATENCY, [work for work in LOSSES if work != "in place"])
    number = 1000


class Dtypes(_Calls):
    params = (DTYPES, LOSSES[:3])


class Options(_Calls):
    params = (OPTIONED, LOSSES[:2])


class Softmax(_Calls):
    params = (LARGE, SOFTMAX)


class Functions(_Calls):
    params = (["4096 x 1000"], [work for work in WORKS if work not in (*LOSSES, *SOFTMAX)])
