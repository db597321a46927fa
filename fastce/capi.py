"""Cross-entropy as C functions: for C, C++, Rust or anything else that can call an address.

Python compiles a function and gives its address; from then on nothing of Python is needed or
touched: no object, no interpreter lock. Any threads may call at once, each with rows of its own.
A function takes one structure, which says where everything lies; `header` declares it. Functions
live as long as the process.

A matrix gets, to the last bit, what `fastce.cross_entropy_and_grad` gives it where classes lie side
by side; its accuracy and edge cases in any case.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_POINTERS = frozenset({
    "logits", "targets", "probabilities", "weight", "losses", "grad_output", "grad",
})  # fmt: skip
_NUMBERS = frozenset({"label_smoothing", "z_loss", "softcap"})
# In the order of the header.
_FIELDS = (
    "size", "ignore_index", "logits", "rows", "classes", "row_stride", "class_stride",
    "targets", "probabilities", "probability_row_stride", "probability_class_stride",
    "weight", "label_smoothing", "z_loss", "softcap",
    "losses", "grad_output", "grad", "grad_row_stride", "grad_class_stride",
)  # fmt: skip


def _ctype(field: str) -> Any:
    if field in _POINTERS:
        return ctypes.c_void_p
    return ctypes.c_double if field in _NUMBERS else ctypes.c_int64


class Call(ctypes.Structure):
    """What a C function is called with, ``fastce_call_f32`` or ``fastce_call_f64`` of the header.

    Parameters
    ----------
    **fields
        Those of the structure, whose meaning the header tells. Pointers are addresses, such as
        ``array.ctypes.data``, of memory that the caller keeps. The others are zero, but for
        `ignore_index`, which is -100.

    Examples
    --------
    >>> from fastce.capi import Call
    >>> Call(rows=3).rows, Call().ignore_index, Call().weight
    (3, -100, None)
    """

    _fields_ = [(name, _ctype(name)) for name in _FIELDS]

    def __init__(self, **fields: Any) -> None:
        super().__init__(**({"size": ctypes.sizeof(Call), "ignore_index": -100} | fields))


def address(
    dtype: npt.DTypeLike,
    *,
    grad: bool = False,
    soft: bool = False,
    weight: bool = False,
    softcap: bool = False,
) -> int:
    """Address of a C function, which is compiled when it is first asked for.

    Parameters
    ----------
    dtype : {"float32", "float64"}
        What logits, probabilities, class weights, losses and gradients consist of.
    grad : bool, default False
        Whether the function writes the gradient too.
    soft : bool, default False
        Whether its targets are probabilities.
    weight, softcap : bool, default False
        Whether it takes class weights, and whether it caps the logits.

    Returns
    -------
    int
        To be cast to ``fastce_cross_entropy_f32`` or ``fastce_cross_entropy_f64`` of the header.
        The function refuses a call that gives what it was not asked for here, or lacks what it was.

    Raises
    ------
    ValueError
        If there is no such dtype.

    Examples
    --------
    >>> import fastce.capi
    >>> fastce.capi.address("float64") > 0
    True
    """
    return int(_compiled(_kind(dtype), grad, soft, weight, softcap).address)


def function(
    dtype: npt.DTypeLike,
    *,
    grad: bool = False,
    soft: bool = False,
    weight: bool = False,
    softcap: bool = False,
) -> Any:
    """A C function as ctypes calls it, without the interpreter lock.

    Parameters
    ----------
    dtype, grad, soft, weight, softcap
        As for `address`.

    Returns
    -------
    ctypes function
        Of a `Call`; it returns an int, see the header.

    Raises
    ------
    ValueError
        As `address` does.

    Examples
    --------
    >>> import numpy as np
    >>> from fastce import capi
    >>> logits = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    >>> targets, losses = np.array([0, 1]), np.empty(2)
    >>> call = capi.Call(
    ...     logits=logits.ctypes.data, rows=2, classes=3, row_stride=24, class_stride=8,
    ...     targets=targets.ctypes.data, losses=losses.ctypes.data)
    >>> capi.function("float64")(call)
    0
    >>> print(losses.round(4))
    [0.4076 0.1698]
    """
    found = address(dtype, grad=grad, soft=soft, weight=weight, softcap=softcap)
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.POINTER(Call))(found)


def header() -> Path:
    """Path of the header ``fastce.h``, which declares the functions; its folder is for ``-I``.

    Examples
    --------
    >>> import fastce.capi
    >>> fastce.capi.header().name
    'fastce.h'
    """
    return Path(__file__).parent / "include" / "fastce.h"


def _kind(dtype: npt.DTypeLike) -> str:
    name = np.dtype(dtype).name
    if name not in ("float32", "float64"):
        raise ValueError(f"dtype: expected float32 or float64, got {name}")
    return name


@functools.cache
def _compiled(kind: str, grad: bool, soft: bool, weight: bool, softcap: bool) -> Any:
    from numba import types
    from numba.np.numpy_support import from_dtype

    from fastce.cpu import foreign
    from fastce.cpu.jit import c_function

    # Pointers are plain numbers here, so that what is absent can be told by its 0.
    record = np.dtype([(name, "f8" if name in _NUMBERS else "i8") for name in _FIELDS])
    body = foreign.matrix(
        getattr(np, kind), ctypes.sizeof(Call), grad=grad, soft=soft, weight=weight, softcap=softcap
    )
    return c_function(body, types.int64(types.CPointer(from_dtype(record))))
