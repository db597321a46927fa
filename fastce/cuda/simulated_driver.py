"""The names of `driver` for numba's simulator: one device, whose memory is the host's."""

import ctypes
import functools
import sys
from typing import Any

import numpy as np
from numba import cuda

from fastce.cuda import simulated
from fastce.cuda.kernels import Kernel, source
from fastce.cuda.plan import Launch, Limits, choose

NOTE_WORDS = 5
_SWITCH_INTERVAL = 5e-5  # seconds


class Device:
    """The simulated device."""

    capability = (9, 0)
    stream = 5
    limits = Limits(232_448, 233_472, 132, 16)

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        self.note = (ctypes.c_int64 * NOTE_WORDS)()
        self.note_address = ctypes.addressof(self.note)

    def synchronize(self) -> None:
        """A simulated launch has ended when it returns."""

    def possible(self, *rows: Any, **options: Any) -> Launch:
        """The launch that the table has for rows."""
        return choose(*rows, limits=self.limits, **options)

    def order(self, first: int, then: int) -> None:
        """Launches have ended when they return."""

    def keep(self, value: object, stream: int) -> None:
        """Nothing is using it any more."""

    def launch(
        self, kernel: Kernel, grid: int, shared: int, stream: int,
        integers: tuple[int, ...], floats: tuple[float, ...] = (), cluster: int = 1,
    ) -> None:  # fmt: skip
        """Run a kernel."""
        assert grid % cluster == 0
        of = source(kernel)
        assert (len(integers), len(floats)) == (of.integers, of.floats)
        arguments = [*map(np.int64, integers), *map(np.float64, floats)]
        # The simulator polls its threads, and with Python's own interval of 5 ms each would wait
        # that long for its turn.
        interval = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_INTERVAL)
        try:
            simulated.launched[:] = of.block, cluster, shared
            blocks, threads = grid // cluster, cluster * of.block
            cuda.jit(of.function)[blocks, threads, 0, cluster * shared](*arguments)
        finally:
            sys.setswitchinterval(interval)
            simulated.forget_warps()  # type: ignore[no-untyped-call]


@functools.cache
def device(ordinal: int) -> Device:
    """The simulated device."""
    return Device(ordinal)
