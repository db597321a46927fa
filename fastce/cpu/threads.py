"""How kernels run on several threads, safely in other people's programs.

Kernels are serial machine code that claims chunks of work from a shared counter and holds no
interpreter lock, so that running one on more threads is calling it more than once.  The helpers are
plain Python threads, made anew in a forked child.  There is no OpenMP and no numba threading layer:
nothing to abort when two threads call at once, nothing that a fork could leave behind, no spinning
that would fight with the threads of a BLAS.  A helper that comes late finds no work left and a call
never waits for one that has not begun, so that a busy machine costs speed and nothing else.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import numpy as np

_local = threading.local()


def _available() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _default() -> int:
    """Threads to use: what the environment asks for, else the processors this process may use."""
    for name in ("FASTCE_NUM_THREADS", "NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 0:
            return int(value)
    return _available()


_threads = _default()


def set_num_threads(n: int) -> None:
    """Set how many threads a call uses, the calling one included.

    Results do not depend on it, to the last bit.

    Parameters
    ----------
    n : int
        At least 1.  It may exceed the number of processors.

    Raises
    ------
    TypeError, ValueError
        If `n` is not an integer, or less than 1.

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
    if isinstance(n, bool) or not isinstance(n, int | np.integer):
        raise TypeError(f"n: expected a number of threads, got {n!r}")
    if n < 1:
        raise ValueError(f"n: expected at least 1 thread, got {n}")
    return int(n)


def get_num_threads() -> int:
    """Return how many threads a call from this thread uses.

    Examples
    --------
    >>> import fastce
    >>> fastce.get_num_threads() >= 1
    True
    """
    return getattr(_local, "threads", None) or _threads


@contextlib.contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Use `n` threads for the calls made within a block, by the thread that entered it.

    Parameters
    ----------
    n : int
        At least 1.

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


class _Task:
    """A kernel to run, whose first taker may run it or leave it, and how it ended."""

    __slots__ = ("args", "done", "error", "kernel", "taken")

    def __init__(self, kernel: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.kernel = kernel
        self.args = args
        self.error: BaseException | None = None
        self.taken = threading.Lock()
        self.done = threading.Lock()
        self.done.acquire()

    def run(self) -> None:
        """Run it unless somebody has taken it."""
        if self.taken.acquire(blocking=False):
            try:
                self.kernel(*self.args)
            except BaseException as error:
                self.error = error
            self.done.release()

    def settle(self) -> None:
        """Take it back if nobody has begun it, else wait for its end."""
        if not self.taken.acquire(blocking=False):
            self.done.acquire()
            if self.error is not None:
                raise self.error


class _Helpers:
    """Threads that wait for tasks: 15 microseconds to and fro, by a ThreadPoolExecutor 20.

    They are daemons, so that a program ends without waiting for them.
    """

    def __init__(self) -> None:
        self._tasks: SimpleQueue[_Task] = SimpleQueue()
        self._lock = threading.Lock()
        self._count = 0

    def offer(self, tasks: list[_Task]) -> None:
        """Put tasks where as many helpers will find them."""
        if self._count < len(tasks):
            with self._lock:
                while self._count < len(tasks):
                    name = f"fastce-{self._count}"
                    threading.Thread(target=self._work, name=name, daemon=True).start()
                    self._count += 1
        for task in tasks:
            self._tasks.put(task)

    def _work(self) -> None:
        while True:
            self._tasks.get().run()


_helpers = _Helpers()


def _forget() -> None:
    """In a forked child, whose copies of the helpers do not run."""
    global _helpers
    _helpers = _Helpers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def launch(kernel: Callable[..., None], args: tuple[Any, ...], parallel: bool) -> None:
    """Run `kernel(*args, counter)` here and, if `parallel`, on the helpers as well.

    Returns when every chunk is done.
    """
    counter = np.zeros(1, np.int64)
    if not parallel:
        kernel(*args, counter)
        return
    args = (*args, counter)
    tasks = [_Task(kernel, args) for _ in range(get_num_threads() - 1)]
    # The interpreter may be shutting down, or no thread to be had: this one then does it all.
    with contextlib.suppress(RuntimeError):
        _helpers.offer(tasks)
    try:
        kernel(*args)
    finally:
        for task in tasks:
            task.settle()
