"""How kernels run on several threads, safely in other people's programs.

Kernels are serial machine code that claims chunks of work from a shared counter and holds no
interpreter lock, so that running one on more threads is calling it more than once.  The helpers are
plain Python threads, made anew in a forked child.  There is no OpenMP and no numba threading layer:
nothing to abort when two threads call at once, nothing that a fork could leave behind, no spinning
that would fight with the threads of a BLAS.  A call never waits for a helper that has not begun, so
that a busy machine costs speed and nothing else; for those that have begun, see `fastce.cpu.gate`.
"""

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import numpy as np

from fastce._arguments import integer
from fastce.cpu import processors

_local = threading.local()

# More threads than any machine has processors are a mistake, and would take its memory.
MOST = 4096


def _own_variable() -> int | None:
    """What FASTCE_NUM_THREADS asks for, if anything."""
    value = os.environ.get("FASTCE_NUM_THREADS", "").strip()
    if not value:
        return None
    threads = _count(value)
    if threads is None or threads > MOST:
        raise ValueError(f"FASTCE_NUM_THREADS: expected an integer in [1, {MOST}], got {value:.40}")
    return threads


def _variables_of_others() -> int | None:
    """What variables of numba and OpenMP ask for; nonsense is theirs to complain about."""
    for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):
        # OpenMP has a list of numbers, one for each level of nested regions.
        threads = _count(os.environ.get(name, "").partition(",")[0].strip())
        if threads is not None:
            return min(threads, MOST)
    return None


def _count(value: str) -> int | None:
    """A number of threads, or None for what is none."""
    if not value.isdecimal() or len(value) > len(str(sys.maxsize)):
        return None
    return int(value) or None


@functools.cache
def _default() -> int:
    """Threads to use: what the environment asks for, else the processors this process may use."""
    return _own_variable() or _variables_of_others() or processors.available()


_threads: int | None = None  # as set


def set_num_threads(n: int) -> None:
    """Set how many threads a call uses, the calling one included.

    Results do not depend on it, to the last bit.

    Parameters
    ----------
    n : int
        At least 1, at most 4096.  It may exceed the number of processors; of a call as many threads
        are used as it has pieces of work.

    Raises
    ------
    TypeError, ValueError
        If `n` is not an integer, or not in that range.

    Examples
    --------
    >>> import fastce
    >>> fastce.set_num_threads(2)
    >>> fastce.get_num_threads()
    2
    """
    global _threads
    _threads = _checked(n)


def _checked(n: int) -> int:
    n = integer("n", n)
    if not 1 <= n <= MOST:
        raise ValueError(f"n: expected a number of threads in [1, {MOST}], got {n}")
    return n


def get_num_threads() -> int:
    """Return how many threads a call from this thread uses at most.

    Unless it is set that is ``FASTCE_NUM_THREADS``, else ``NUMBA_NUM_THREADS``, else the first
    number of ``OMP_NUM_THREADS``, as they are at the first call that asks; else the number of
    processors that this process may use by its affinity and the CPU quotas of its control groups.

    Raises
    ------
    ValueError
        If ``FASTCE_NUM_THREADS`` is not an integer in [1, 4096], until the number is set.

    Examples
    --------
    >>> import fastce
    >>> fastce.get_num_threads() >= 1
    True
    """
    return getattr(_local, "threads", None) or _threads or _default()


@contextlib.contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Use `n` threads for the calls made within a block, by the thread that entered it.

    Parameters
    ----------
    n : int
        As for `set_num_threads`.

    Examples
    --------
    >>> import fastce
    >>> with fastce.num_threads(1):
    ...     fastce.get_num_threads()
    1
    """
    n = _checked(n)
    before = getattr(_local, "threads", None)
    _local.threads = n
    try:
        yield
    finally:
        _local.threads = before


class _Job:
    """A kernel to run by as many as come before its gate is closed."""

    __slots__ = ("args", "error", "gate", "kernel")

    def __init__(self, kernel: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.kernel = kernel
        self.args = args
        self.error: BaseException | None = None
        self.gate = np.array([0, 0, _forks[0]])

    def help(self) -> None:
        """Run it, unless it is over."""
        gate = _gate()
        if gate.pass_gate(self.gate, _forks, gate.ENTER):
            try:
                self.kernel(*self.args)
            except BaseException as error:
                self.error = error
            finally:
                gate.pass_gate(self.gate, _forks, gate.LEAVE)


class _Helpers:
    """Threads that wait for jobs: 15 microseconds to and fro, by a ThreadPoolExecutor 20.

    They are daemons, so that a program ends without waiting for them.  There is no lock: a signal
    handler may call while the same thread starts helpers.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._threads: dict[int, threading.Thread] = {}

    def offer(self, job: _Job, count: int) -> None:
        """Put a job where so many helpers will find it."""
        for _ in range(count):
            self._jobs.put(job)
        for number in range(count if len(self._threads) < count else 0):
            if number in self._threads:
                continue
            thread = threading.Thread(target=self._work, name=f"fastce-{number}", daemon=True)
            if self._threads.setdefault(number, thread) is thread:
                try:
                    thread.start()
                except BaseException:
                    if thread.ident is None:
                        del self._threads[number]
                    raise

    def _work(self) -> None:
        while True:
            self._jobs.get().help()


_helpers = _Helpers()
_forks = np.zeros(1, np.int64)


def _forget() -> None:
    """In a forked child, whose copies of the helpers do not run."""
    global _helpers
    _helpers = _Helpers()
    _forks[0] += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@functools.cache
def _gate() -> Any:
    """The module, whose function is compiled: compiling can be interrupted, waiting must not be."""
    from fastce.cpu import gate

    gate.pass_gate(np.zeros(3, np.int64), _forks, gate.CLOSE)
    return gate


def launch(
    kernel: Callable[..., None], args: tuple[Any, ...], parallel: bool, chunks: int = MOST
) -> None:
    """Run `kernel(*args, counter)` here and, if `parallel`, on helpers as well.

    Returns when every chunk is done, of which there are `chunks` at most; nobody touches the arrays
    any more then, nor if it is left by an exception.
    """
    args = (*args, np.zeros(1, np.int64))
    helpers = min(get_num_threads(), chunks) - 1 if parallel else 0
    if helpers < 1:
        kernel(*args)
        return
    job, gate = _Job(kernel, args), _gate()
    close, words, forks, what = gate.pass_gate, job.gate, _forks, gate.CLOSE
    try:
        # The interpreter may be shutting down, or no thread to be had: this one then does it all.
        with contextlib.suppress(RuntimeError):
            _helpers.offer(job, helpers)
        kernel(*args)
    finally:
        # The first call after whatever has raised: handlers of signals run between calls.
        close(words, forks, what)
    if job.error is not None:
        raise job.error
