"""Binary cross-entropy of logits: the sigmoid form, element by element."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fastce import _arguments as arguments
from fastce import _outputs as outputs
from fastce import cpu
from fastce._arguments import AnyArray, Reduction
from fastce._devices import on_device
from fastce._mode import in_default_mode


def binary_cross_entropy(
    logits: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    weight: npt.ArrayLike | None = None,
    pos_weight: npt.ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> Any:
    """Cross-entropy between yes-or-no labels and the sigmoid of logits, element by element.

    For a logit z with the target t, with softplus(z) = log(1 + exp(z))::

        loss = weight * (pos_weight * t * softplus(-z) + (1 - t) * softplus(z))

    that is -log(sigmoid(z)) for t = 1 and -log(1 - sigmoid(z)) for t = 0.

    Parameters
    ----------
    logits : array_like of float64, float32, float16 or bfloat16
        Log-odds of yes, of any shape (also a single number) and any strides.
    targets : array_like
        Shaped like `logits`: the probability of yes, 0 or 1 as a rule. Floats of the dtypes of
        `logits`, integers or booleans; values outside [0, 1] do what the formula says.
    weight : array_like, optional
        Factor of each loss, of a shape that broadcasts to that of `logits`. None means 1.
    pos_weight : array_like, optional
        Factor of the share of yes, of a shape that broadcasts to that of `logits`: above 1 it
        raises recall, below 1 precision. None means 1.
    reduction : {"mean", "sum", "none"}, default "mean"
        "mean" divides the sum by the number of elements, whatever the weights.

    Returns
    -------
    numpy.float64 or numpy.float32, or numpy.ndarray
        The loss in nats: float64 for float64 logits, else float32. For "none" an array shaped like
        `logits`.

    Raises
    ------
    TypeError
        If an argument does not consist of numbers of the kinds above.
    ValueError
        If shapes do not fit, or `reduction` is none of the three.

    See Also
    --------
    binary_cross_entropy_and_grad : The gradient as well.
    cross_entropy : One label out of many. For two classes with the logits (0, z) it is this loss.

    Notes
    -----
    Edge cases: infinite logits give the limits, 0 where the label agrees (+inf with t = 1, -inf
    with t = 0) and +inf where it does not. NaN in an element makes that element NaN. Without
    elements "mean" is NaN and "sum" 0.

    softplus(z) is computed as max(z, 0) + log1p(exp(-|z|)) [1]_: for t in [0, 1] no term is
    negative, nothing cancels, and confident predictions keep their small losses. All of it, and the
    sum, is in float64, in a fixed order; no array of the size of the logits is made, except from
    integer or boolean arguments.

    References
    ----------
    .. [1] M. Mächler, "Accurately computing log(1 - exp(-|a|))", vignette of the R package Rmpfr,
       2012.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([0.0, 2.0, -3.0])
    >>> targets = np.array([1, 1, 0])
    >>> print(fastce.binary_cross_entropy(logits, targets, reduction="none").round(4))
    [0.6931 0.1269 0.0486]
    >>> print(f"{fastce.binary_cross_entropy(logits, targets):.4f}")
    0.2896
    >>> print(f"{fastce.binary_cross_entropy(logits, targets, pos_weight=3.0):.4f}")
    0.8363

    Confident and right:

    >>> print(f"{fastce.binary_cross_entropy(np.array([100.0]), [1.0]):.4e}")
    3.7201e-44
    """
    if on_device(logits):
        from fastce import cuda

        return cuda.binary_cross_entropy(
            logits, targets, weight=weight, pos_weight=pos_weight, reduction=reduction
        )
    return _binary_cross_entropy(logits, targets, weight, pos_weight, reduction)[0]


def binary_cross_entropy_and_grad(
    logits: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    weight: npt.ArrayLike | None = None,
    pos_weight: npt.ArrayLike | None = None,
    reduction: Reduction = "mean",
    grad_output: npt.ArrayLike | None = None,
    out: AnyArray | None = None,
) -> tuple[Any, AnyArray]:
    """Binary cross-entropy and its gradient with respect to the logits.

    For a logit z with the target t, with g the upstream gradient, n the number of elements for
    "mean" and else 1::

        grad = g / n * weight * ((1 - t) * sigmoid(z) - pos_weight * t * sigmoid(-z))

    which is sigmoid(z) - t for a single element without options.

    Parameters
    ----------
    logits, targets, weight, pos_weight, reduction
        As in `binary_cross_entropy`.
    grad_output : float or array_like, optional
        As in `cross_entropy_and_grad`; with "none" it may be an array shaped like `logits`.
    out : numpy.ndarray, optional
        As in `cross_entropy_and_grad`; ``out=logits`` computes in place.

    Returns
    -------
    loss : numpy.float64 or numpy.float32, or numpy.ndarray
        As from `binary_cross_entropy`.
    grad : numpy.ndarray
        Shaped and typed like `logits`; `out` itself if given.

    Raises
    ------
    TypeError, ValueError
        As `binary_cross_entropy` does, before anything is written; also if `out` or `grad_output`
        does not fit.

    See Also
    --------
    binary_cross_entropy : The loss alone; conventions and edge cases.

    Notes
    -----
    sigmoid(z) and sigmoid(-z) are each computed without subtracting from 1, so that the gradient of
    a confident prediction keeps its digits for t = 0 and t = 1. At infinite logits it is finite: 0
    where the label agrees, 1 or -1 times its factors where it does not.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([0.0, 2.0, -3.0])
    >>> loss, grad = fastce.binary_cross_entropy_and_grad(logits, [1, 1, 0], reduction="sum")
    >>> print(f"{loss:.4f}")
    0.8687
    >>> print(grad.round(4))
    [-0.5    -0.1192  0.0474]
    """
    if on_device(logits):
        from fastce import cuda

        return cuda.binary_cross_entropy_and_grad(
            logits, targets, weight=weight, pos_weight=pos_weight, reduction=reduction,
            grad_output=grad_output, out=out,
        )  # fmt: skip
    loss, grad = _binary_cross_entropy(
        logits, targets, weight, pos_weight, reduction, grad_output, out, gradient=True
    )
    assert grad is not None
    return loss, grad


@in_default_mode
def _binary_cross_entropy(
    logits: npt.ArrayLike, targets: npt.ArrayLike,
    weight: npt.ArrayLike | None, pos_weight: npt.ArrayLike | None, reduction: str,
    grad_output: npt.ArrayLike | None = None, out: AnyArray | None = None, gradient: bool = False,
) -> tuple[Any, AnyArray | None]:  # fmt: skip
    z = arguments.float_array("logits", logits)
    total, losses, grad = evaluate(
        z, targets, weight, pos_weight, reduction, grad_output, out, gradient
    )
    loss = losses
    if losses is None:
        loss = reduced(total, z.size, reduction, arguments.compute_dtype(z.dtype))
    return loss, grad


@in_default_mode
def evaluate(
    z: AnyArray, targets: npt.ArrayLike, weight: npt.ArrayLike | None,
    pos_weight: npt.ArrayLike | None, reduction: str, grad_output: npt.ArrayLike | None = None,
    out: AnyArray | None = None, gradient: bool = False,
) -> tuple[float, AnyArray | None, AnyArray | None]:  # fmt: skip
    """The sum of the losses in float64, for "none" each of them, and if asked for the gradient."""
    t = arguments.float_or_integer_array("targets", targets)
    t = arguments.same_shape("targets", t, "logits", z)
    w = arguments.broadcastable("weight", weight, z)
    positive = arguments.broadcastable("pos_weight", pos_weight, z)
    arguments.check_reduction(reduction)
    upstream, per_element = arguments.upstream(grad_output, z.shape, reduction)
    grad = (
        outputs.gradient(
            out, z, targets=targets, weight=weight, pos_weight=pos_weight, grad_output=grad_output
        )
        if gradient
        else None
    )
    dtype = arguments.compute_dtype(z.dtype)
    losses = np.empty(z.shape, dtype) if reduction == "none" else None
    scale = upstream / z.size if reduction == "mean" and z.size else upstream
    total = cpu.calls.binary_cross_entropy(
        np.atleast_1d(z), np.atleast_1d(t),
        None if w is None else np.atleast_1d(w),
        None if positive is None else np.atleast_1d(positive),
        upstream=per_element, scale=scale,
        losses=None if losses is None else losses.reshape(-1),
        out=None if grad is None else np.atleast_1d(grad),
    )  # fmt: skip
    return total, losses, grad


def reduced(
    total: float, count: int, reduction: str, dtype: type[np.float32] | type[np.float64]
) -> Any:
    """The loss of so many elements from the sum over them."""
    if reduction == "mean":
        total = total / count if count else math.nan
    return arguments.scalar(total, dtype)
