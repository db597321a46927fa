"""What is computed in Python, such as reduced losses: in the default mode, and without warnings.

An infinity or NaN is a result like others.  A warning would tell of the way there, and where
warnings are errors, leave results half written.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np

P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def _caller() -> Any:
    from fastce.cpu import caller

    caller.set_mode(caller.mode())  # compiled now, not where it has to be undone
    return caller


def in_default_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function in IEEE's default mode of arithmetic, and go back to the caller's.

    NumPy, too, is silent in it about overflow and the like, whatever the caller has asked of it.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        caller = _caller()
        restore, before = caller.set_mode, caller.mode()
        try:
            caller.set_mode(caller.DEFAULT)
            with np.errstate(all="ignore"):
                return function(*args, **kwargs)
        finally:
            restore(before)

    return run
