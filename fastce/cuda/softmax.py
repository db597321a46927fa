"""logsumexp, softmax and log_softmax of arrays on a device."""

from typing import Any

from fastce import _arguments as arguments
from fastce.cuda import calls
from fastce.cuda.arrays import new
from fastce.cuda.losses import output


def logsumexp(x: Any, *, axis: Any = -1, keepdims: bool = False) -> Any:
    """`fastce.logsumexp` of an array on a device, over one axis.

    Parameters
    ----------
    x : array of float64, float32, float16 or bfloat16
        Of at least one dimension, any shape and strides.
    axis : int, default -1
        The axis to sum over.
    keepdims : bool, default False
        Whether it stays, with size one.

    Returns
    -------
    array
        Of the library of `x`: float64 for float64, else float32.

    Raises
    ------
    TypeError, ValueError
        As there; ValueError also if the axis is empty.
    """
    array = calls.begin("x", x)
    axis = arguments.class_axis("x", array.shape, axis)
    kept = (1,) if keepdims else ()
    shape = array.shape[:axis] + kept + array.shape[axis + 1 :]
    made = new(array, shape, arguments.compute_dtype(array.dtype).__name__)
    calls.rows("logsumexp", axis, array, results=calls.Results(lse=made))
    return made.result


def softmax(x: Any, *, axis: int = -1, out: Any = None) -> Any:
    """`fastce.softmax` of an array on a device.

    Parameters
    ----------
    x : array of float64, float32, float16 or bfloat16
        Of at least one dimension, any shape and strides.
    axis : int, default -1
        The class axis.
    out : array, optional
        As there; ``out=x`` computes in place.

    Returns
    -------
    array
        Shaped and typed like `x`; `out` itself if given.

    Raises
    ------
    TypeError, ValueError
        As there.
    """
    return _softmax("softmax", x, axis, out)


def log_softmax(x: Any, *, axis: int = -1, out: Any = None) -> Any:
    """`fastce.log_softmax` of an array on a device.

    Parameters
    ----------
    x, axis, out
        As in `softmax`.

    Returns
    -------
    array
        Shaped and typed like `x`; `out` itself if given.

    Raises
    ------
    TypeError, ValueError
        As there.
    """
    return _softmax("log_softmax", x, axis, out)


def _softmax(task: str, x: Any, axis: int, out: Any) -> Any:
    array = calls.begin("x", x)
    arguments.reduced_axes("x", array.shape, axis)
    made = output(out, array, "x")
    if 0 not in array.shape:  # else there is nothing to compute, and the result as empty
        calls.rows(task, arguments.class_axis("x", array.shape, axis), array, out=made)
    return made.result if out is None else out
