"""logsumexp, softmax and log_softmax."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fastce import _arguments as arguments
from fastce import _outputs as outputs
from fastce import cpu
from fastce._arguments import AnyArray
from fastce._devices import on_device


def logsumexp(
    x: npt.ArrayLike, *, axis: int | tuple[int, ...] | None = -1, keepdims: bool = False
) -> Any:
    """log(sum(exp(x))) without overflow, underflow or loss of digits.

    Parameters
    ----------
    x : array_like
        float64, float32, float16 or bfloat16, of any shape and strides; integers and booleans are
        converted to float64.
    axis : int, tuple of int or None, default -1
        The axis or axes to sum over; None means all of them, an empty tuple none.
    keepdims : bool, default False
        Whether the axes summed over stay, with size one.

    Returns
    -------
    numpy.float64 or numpy.float32, or numpy.ndarray
        float64 for float64 and integers, float32 for the other floats. A scalar where no axis is
        left.

    Raises
    ------
    TypeError
        If `x` has another dtype, or `axis` is not made of integers.
    ValueError
        If an axis is named twice, or out of range (numpy.exceptions.AxisError, an IndexError too).

    See Also
    --------
    softmax : Its gradient.
    log_softmax : x less its logsumexp.
    cross_entropy : logsumexp less the logit of the target, without the cancellation.

    Notes
    -----
    As in SciPy: NaN if there is a NaN, else +inf if there is a +inf; -inf if all is -inf or there
    is nothing to sum over. Opposite infinities are no conflict.

    The result is m + log1p(rest), m being the maximum and rest the sum of exp(x - m) over all but
    one element that attains it, computed as in `cross_entropy`. The error is about one unit in the
    last place of the larger of the two terms: logsumexp([0, -40]) is 4.2e-18, not 0.

    Nothing is copied to move one axis. Several axes are copied if their elements are not evenly
    spaced in memory.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> x = np.array([[0.0, 1.0, 2.0], [1000.0, 1000.0, -np.inf]])
    >>> print(fastce.logsumexp(x).round(4))
    [   2.4076 1000.6931]
    >>> print(fastce.logsumexp(x, axis=0, keepdims=True))
    [[1000. 1000.    2.]]
    >>> print(f"{fastce.logsumexp(np.array([0.0, -40.0]), axis=None):.4e}")
    4.2484e-18
    """
    if on_device(x):
        from fastce import cuda

        return cuda.logsumexp(x, axis=axis, keepdims=keepdims)
    array = arguments.float_or_integer_array("x", x)
    axes = arguments.reduced_axes("x", array.shape, axis)
    kept = tuple(1 if k in axes else size for k, size in enumerate(array.shape))
    if len(axes) != 1:
        array = joined(array, axes)
    result = np.empty(kept, arguments.compute_dtype(array.dtype))
    axis = axes[0] if len(axes) == 1 else -1
    if array.shape[axis] == 0:
        result.fill(-np.inf)
    else:
        cpu.calls.logsumexp(axis, array, result.reshape(-1))
    return result if keepdims else result.squeeze(axes)[()]


def joined(array: AnyArray, axes: tuple[int, ...]) -> AnyArray:
    """The array with several axes, or none, made one at the end."""
    array = np.moveaxis(array, axes, range(-len(axes), 0))
    kept = array.ndim - len(axes)
    return array.reshape(*array.shape[:kept], math.prod(array.shape[kept:]))


def apart(array: AnyArray, axes: tuple[int, ...], shape: tuple[int, ...]) -> AnyArray:
    """The array of this shape whose axes `joined` has made one."""
    kept = (size for k, size in enumerate(shape) if k not in axes)
    array = array.reshape(*kept, *(shape[k] for k in axes))
    return np.moveaxis(array, range(-len(axes), 0), axes)


def softmax(
    x: npt.ArrayLike, *, axis: int | tuple[int, ...] | None = -1, out: AnyArray | None = None
) -> AnyArray:
    """exp(x) / sum(exp(x)): the probabilities that logits stand for.

    Parameters
    ----------
    x : array_like
        As in `logsumexp`.
    axis : int, tuple of int or None, default -1
        The class axis, or several whose elements are the classes together; None means all of them,
        an empty tuple none.
    out : numpy.ndarray, optional
        Where the result goes: of the shape of `x` and the dtype of the result, any strides,
        writable. ``out=x`` computes in place; otherwise it must not overlap `x`.

    Returns
    -------
    numpy.ndarray
        Shaped and typed like `x` (float64 for integers and booleans); `out` itself if given.

    Raises
    ------
    TypeError
        If `x` is not of floats, integers or booleans, or `axis` is not made of integers, or `out`
        is not an array.
    ValueError
        If an axis is named twice, or out of range (numpy.exceptions.AxisError, an IndexError too),
        or `out` does not fit.

    See Also
    --------
    log_softmax : Its logarithm, for probabilities too small or too near one to be told apart.
    logsumexp : The logarithm of the denominator.
    cross_entropy_and_grad : The loss, and probabilities less labels, in one go.

    Notes
    -----
    -inf has probability exactly 0. A row with NaN or +inf, or all -inf, is NaN, as in SciPy; no
    other row is touched. A row of one finite number is 1. Without elements there is nothing to
    compute, and the result is as empty as `x`.

    Nothing is copied to move one axis. Several axes are copied if their elements are not evenly
    spaced in memory.

    Computed as exp(x - m) / (1 + rest) with m and rest as in `cross_entropy`. The relative error of
    results that are normal numbers is at most 1e-5 in float32 and 1e-13 in float64. 16-bit input is
    computed with in float32 and rounded once.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> x = np.array([[2.0, 1.0, 0.0], [5.0, -np.inf, 5.0]])
    >>> print(fastce.softmax(x).round(4))
    [[0.6652 0.2447 0.09  ]
     [0.5    0.     0.5   ]]
    >>> print(fastce.softmax(x, axis=None).round(4))  # of six classes
    [[0.024  0.0088 0.0032]
     [0.482  0.     0.482 ]]
    """
    return _softmax(x, axis, out, logarithm=False)


def log_softmax(
    x: npt.ArrayLike, *, axis: int | tuple[int, ...] | None = -1, out: AnyArray | None = None
) -> AnyArray:
    """x - log(sum(exp(x))): the logarithms of the probabilities that logits stand for.

    Parameters
    ----------
    x, axis, out
        As in `softmax`.

    Returns
    -------
    numpy.ndarray
        Shaped and typed like `x` (float64 for integers and booleans); `out` itself if given.

    Raises
    ------
    TypeError, ValueError
        As `softmax` does.

    See Also
    --------
    softmax : The probabilities themselves.
    nll_loss : The negative log likelihood of labels from the result.
    cross_entropy : The same from `x`, without the array of the result.

    Notes
    -----
    -inf stays -inf. A row with NaN or +inf, or all -inf, is NaN.

    Computed as (x - m) - log1p(rest) with m and rest as in `cross_entropy`, of which neither term
    is positive: the likeliest class keeps its digits however near one its probability is.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> print(fastce.log_softmax(np.array([2.0, 1.0, -np.inf])).round(4))
    [-0.3133 -1.3133    -inf]
    >>> print(", ".join(f"{lp:.4e}" for lp in fastce.log_softmax(np.array([0.0, 40.0]))))
    -4.0000e+01, -4.2484e-18
    """
    return _softmax(x, axis, out, logarithm=True)


def _softmax(
    x: npt.ArrayLike,
    axis: int | tuple[int, ...] | None,
    out: AnyArray | None,
    logarithm: bool,
) -> AnyArray:
    if on_device(x):
        from fastce import cuda

        on_the_device = cuda.log_softmax if logarithm else cuda.softmax
        return on_the_device(x, axis=axis, out=out)  # type: ignore[no-any-return, arg-type]
    array = arguments.float_or_integer_array("x", x)
    axes = arguments.reduced_axes("x", array.shape, axis)
    out = outputs.gradient(out, array, "x")
    if not array.size:
        return out
    if len(axes) == 1:
        cpu.calls.softmax(axes[0], array, out, logarithm)
        return out
    rows, results = joined(array, axes), joined(out, axes)
    cpu.calls.softmax(rows.ndim - 1, rows, results, logarithm)
    if not np.may_share_memory(results, out):  # they could not be joined where they lie
        out[...] = apart(results, axes, out.shape)
    return out
