"""Negative log likelihood of log-probabilities."""

from typing import Any

import numpy as np
import numpy.typing as npt

from fastce import _arguments as arguments
from fastce import _outputs as outputs
from fastce._arguments import AnyArray, Reduction
from fastce._call import Call, inverse
from fastce._mode import in_default_mode


@in_default_mode
def nll_loss(
    log_probs: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | None = None,
) -> Any:
    """Negative log likelihood of labels under given log-probabilities.

    For a row lp of C log-probabilities with the class y, or the soft target h, and class weights
    w::

        loss   = -w[y] * lp[y]        or        -sum_c w_c * h_c * lp_c
        "mean" = sum of losses / sum of w[y], rows ignored left out; soft targets: / number of rows

    Parameters
    ----------
    log_probs : array_like of float64, float32, float16 or bfloat16
        Log-probabilities, of any number of dimensions and any strides. They are taken as they are:
        not normalised, and not checked to be at most 0, so that log-densities will do.
    targets, axis, weight, ignore_index, reduction, normalizer
        As in `cross_entropy`, with `log_probs` for its logits.

    Returns
    -------
    numpy.float64 or numpy.float32, or numpy.ndarray
        The loss in nats: float64 for float64 `log_probs`, else float32. For "none" an array shaped
        like `log_probs` without the class axis.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `cross_entropy` does.

    See Also
    --------
    nll_loss_and_grad : The gradient as well.
    cross_entropy : From logits in one pass, faster and with no digits lost on the way.
    log_softmax : Log-probabilities of logits.

    Notes
    -----
    Edge cases are those of `cross_entropy` where they apply. Only the classes that the label names
    count: NaN or infinities elsewhere in a row have no effect, and -inf where the label or the
    weight is 0 adds 0. -inf at the target gives a loss of +inf, and an ignored row 0. "mean" over
    nothing is NaN.

    Products and sums are taken in float64. Memory: a few numbers per row; with soft targets a few
    float64 arrays of their shape.

    Examples
    --------
    The log of the product of the probabilities of independent draws is minus the summed loss:

    >>> import numpy as np
    >>> import fastce
    >>> probabilities = np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    >>> targets = np.array([0, 1])
    >>> loss = fastce.nll_loss(np.log(probabilities), targets, reduction="sum")
    >>> print(f"{loss:.4f} {-np.log(0.5 * 0.8):.4f}")
    0.9163 0.9163
    >>> print(fastce.nll_loss(np.log(probabilities), targets, reduction="none").round(4))
    [0.6931 0.2231]
    """
    options = arguments.options(ignore_index, 0.0, 0.0, None, reduction, normalizer)
    call = Call("log_probs", log_probs, targets, axis, weight, options)
    return _loss(call, *labels(call))


@in_default_mode
def nll_loss_and_grad(
    log_probs: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | None = None,
    grad_output: npt.ArrayLike | None = None,
    out: AnyArray | None = None,
) -> tuple[Any, AnyArray]:
    """Negative log likelihood and its gradient with respect to the log-probabilities.

    With g the upstream gradient and W the divisor of "mean" (else 1)::

        grad_c = -g * w[y] / W  at c = y, else 0        or        -g * w_c * h_c / W

    Parameters
    ----------
    log_probs, targets, axis, weight, ignore_index, reduction, normalizer
        As in `nll_loss`.
    grad_output, out
        As in `cross_entropy_and_grad`, with `log_probs` for its logits.

    Returns
    -------
    loss : numpy.float64 or numpy.float32, or numpy.ndarray
        As from `nll_loss`.
    grad : numpy.ndarray
        Shaped and typed like `log_probs`; `out` itself if given.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `cross_entropy_and_grad` does.

    See Also
    --------
    nll_loss : The loss alone; conventions and edge cases.
    cross_entropy_and_grad : The gradient with respect to logits.

    Notes
    -----
    The log-probabilities are free variables here: the gradient does not know that they sum to one.
    It does not depend on their values either, and is finite where the loss is not. It is 0 for
    ignored rows, for zero weights, and where W is 0.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> log_probs = np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    >>> loss, grad = fastce.nll_loss_and_grad(log_probs, np.array([0, 1]), weight=[1.0, 3.0, 1.0])
    >>> print(f"{loss:.4f}")
    0.3406
    >>> print(grad)
    [[-0.25  0.    0.  ]
     [ 0.   -0.75  0.  ]]
    """
    options = arguments.options(ignore_index, 0.0, 0.0, None, reduction, normalizer)
    call = Call("log_probs", log_probs, targets, axis, weight, options)
    scalar, per_row = arguments.upstream(grad_output, call.rows, reduction)
    grad = outputs.gradient(
        out, call.logits, "log_probs", targets=targets, weight=weight, grad_output=grad_output
    )
    index, u = labels(call)
    loss = _loss(call, index, u)
    slope = 0.0 - scalar * inverse(call.divisors()[0]) * u  # no negative zeros
    if per_row is not None:
        slope *= np.expand_dims(per_row.reshape(call.rows), call.axis)
    if index is None:
        grad[...] = slope
    else:
        grad[...] = 0
        np.put_along_axis(grad, index, slope.astype(grad.dtype), call.axis)
    return loss, grad


def labels(call: Call) -> tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.float64]]:
    """Where the labels lie along the class axis (None: everywhere), and how much they weigh."""
    if call.hard is None:
        assert call.soft is not None
        u = call.soft.astype(np.float64)
        if call.weight is not None:
            u *= np.moveaxis(call.weight[(None,) * (u.ndim - 1)], -1, call.axis)
        return None, u
    valid = call.hard != call.options.ignore_index
    index = np.where(valid, call.hard, 0)
    weight = np.ones(1) if call.weight is None else call.weight[index].astype(np.float64)
    return (
        np.expand_dims(index.reshape(call.rows), call.axis),
        np.expand_dims(np.where(valid, weight, 0.0).reshape(call.rows), call.axis),
    )


def row_losses(
    call: Call, index: npt.NDArray[np.int64] | None, u: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """-sum u log p over the class axis, zero where u is zero even if log p is -inf."""
    picked = call.logits if index is None else np.take_along_axis(call.logits, index, call.axis)
    with np.errstate(all="ignore"):
        terms = np.where(u == 0.0, 0.0, -u * picked.astype(np.float64))
        return np.asarray(terms.sum(axis=call.axis))


def _loss(call: Call, index: npt.NDArray[np.int64] | None, u: npt.NDArray[np.float64]) -> Any:
    losses = row_losses(call, index, u)
    with np.errstate(all="ignore"):
        if call.losses is not None:
            call.losses[...] = losses
        return call.loss(float(losses.sum()))
