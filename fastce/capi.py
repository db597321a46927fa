"""Cross-entropy as C functions: for C, C++, Rust or anything else that can call an address.

Python compiles a function and gives its address; from then on nothing of Python is needed or
touched: no object, no interpreter lock. Any threads may call at once, each with rows of its own.
`header` declares the functions. They live as long as the process.

A matrix gets, to the last bit, what `fastce.cross_entropy_and_grad` gives it where classes lie side
by side; its accuracy and edge cases in any case.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

_FLOATS = {"f32": "float32", "f64": "float64"}
_FUNCTIONS = ("fastce_cross_entropy", "fastce_cross_entropy_and_grad")

names = tuple(f"{function}_{kind}" for function in _FUNCTIONS for kind in _FLOATS)
"""The functions that there are."""


def address(name: str) -> int:
    """Address of a C function, which is compiled at the first call.

    Parameters
    ----------
    name : str
        One of `names`: ``fastce_cross_entropy_f32``, ``fastce_cross_entropy_f64``,
        ``fastce_cross_entropy_and_grad_f32`` or ``fastce_cross_entropy_and_grad_f64``.

    Returns
    -------
    int
        To be cast to the type ``<name>_t`` of the header.

    Raises
    ------
    ValueError
        If there is no such function.

    Examples
    --------
    >>> import fastce.capi
    >>> fastce.capi.address("fastce_cross_entropy_f64") > 0
    True
    """
    return int(_compiled(name).address)


def function(name: str) -> Any:
    """A C function as ctypes calls it, without the interpreter lock.

    Parameters
    ----------
    name : str
        One of `names`.

    Returns
    -------
    ctypes function
        Pointers are passed as addresses, such as ``array.ctypes.data``; None is NULL.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce.capi
    >>> logits = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    >>> targets, losses = np.array([0, 1]), np.empty(2)
    >>> fastce.capi.function("fastce_cross_entropy_f64")(
    ...     logits.ctypes.data, *logits.shape, *logits.strides, targets.ctypes.data, -100, 0.0, 0.0,
    ...     losses.ctypes.data)
    0
    >>> print(losses.round(4))
    [0.4076 0.1698]
    """
    from numba import types

    signature = _signature(name)
    simple = {types.float64: ctypes.c_double, types.int64: ctypes.c_int64}
    arguments: list[Any] = [simple.get(ty, ctypes.c_void_p) for ty in signature.args]
    return ctypes.CFUNCTYPE(ctypes.c_int64, *arguments)(address(name))


def header() -> Path:
    """Path of the header ``fastce.h``, which declares the functions; its folder is for ``-I``.

    Examples
    --------
    >>> import fastce.capi
    >>> fastce.capi.header().name
    'fastce.h'
    """
    return Path(__file__).parent / "include" / "fastce.h"


def _signature(name: str) -> Any:
    from numba import types

    if name not in names:
        raise ValueError(f"name: expected one of {', '.join(names)}, got {name!r}")
    stem, _, kind = name.rpartition("_")
    number, size = getattr(types, _FLOATS[kind]), types.int64
    pointer, double = types.CPointer(number), types.float64
    arguments = [
        pointer, size, size, size, size, types.CPointer(size), size, double, double, pointer,
    ]  # fmt: skip
    if stem == "fastce_cross_entropy_and_grad":
        arguments += [types.CPointer(double), pointer, size, size]
    return size(*arguments)


@functools.cache
def _compiled(name: str) -> Any:
    from fastce.cpu import foreign
    from fastce.cpu.jit import c_function

    signature = _signature(name)
    with_grad = name.startswith("fastce_cross_entropy_and_grad")
    body = foreign.matrix_loss_and_grad if with_grad else foreign.matrix_loss
    return c_function(body, signature)
