"""logsumexp, softmax and log_softmax."""

from typing import Any

import numpy as np
import numpy.typing as npt

from fastce import _arguments as arguments
from fastce._arguments import AnyArray


def logsumexp(
    x: npt.ArrayLike, *, axis: int | tuple[int, ...] | None = -1, keepdims: bool = False
) -> Any:
    """log(sum(exp(x)))."""
    from fastce.cpu import calls

    array = arguments.float_or_integer_array("x", x)
    axes = arguments.reduced_axes("x", array, axis)
    kept = tuple(1 if k in axes else size for k, size in enumerate(array.shape))
    if len(axes) != 1:
        array = np.moveaxis(array, axes, range(-len(axes), 0))
        array = array.reshape(*array.shape[: array.ndim - len(axes)], -1)
    result = np.empty(kept, arguments.compute_dtype(array.dtype))
    axis = axes[0] if len(axes) == 1 else -1
    if array.shape[axis] == 0:
        result.fill(-np.inf)
    else:
        calls.logsumexp(axis, array, result.reshape(-1))
    return result if keepdims else result.squeeze(axes)[()]


def softmax(x: npt.ArrayLike, *, axis: int = -1, out: AnyArray | None = None) -> AnyArray:
    """exp(x) / sum(exp(x))."""
    return _softmax(x, axis, out, logarithm=False)


def log_softmax(x: npt.ArrayLike, *, axis: int = -1, out: AnyArray | None = None) -> AnyArray:
    """x - log(sum(exp(x)))."""
    return _softmax(x, axis, out, logarithm=True)


def _softmax(x: npt.ArrayLike, axis: int, out: AnyArray | None, logarithm: bool) -> AnyArray:
    from fastce.cpu import calls

    array = arguments.float_or_integer_array("x", x)
    axis = arguments.class_axis("x", array, axis)
    out = arguments.output(out, array, "x")
    calls.softmax(axis, array, out, logarithm)
    return out
