"""Negative log likelihood of log-probabilities."""

from typing import Any

import numpy as np
import numpy.typing as npt

from fastce import _arguments as arguments
from fastce._arguments import AnyArray, Reduction
from fastce.losses import Call, inverse


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
    """Negative log likelihood of labels under given log-probabilities."""
    call = Call("log_probs", log_probs, targets, axis, weight, ignore_index, reduction, normalizer)
    return _loss(call, *_labels(call))


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
    """Negative log likelihood and its gradient with respect to the log-probabilities."""
    call = Call("log_probs", log_probs, targets, axis, weight, ignore_index, reduction, normalizer)
    grad = arguments.output(out, call.logits, "log_probs", targets=call.labels)
    scalar, per_row = arguments.upstream(grad_output, call.rows, reduction)
    index, u = _labels(call)
    loss = _loss(call, index, u)
    slope = -scalar * inverse(call.divisors()[0]) * u
    if per_row is not None:
        slope *= np.expand_dims(per_row.reshape(call.rows), call.axis)
    if index is None:
        grad[...] = slope
    else:
        grad[...] = 0
        np.put_along_axis(grad, index, slope.astype(grad.dtype), call.axis)
    return loss, grad


def _labels(call: Call) -> tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.float64]]:
    """Where the labels lie along the class axis (None: everywhere), and how much they weigh."""
    if call.hard is None:
        assert call.soft is not None
        u = call.soft.astype(np.float64)
        if call.weight is not None:
            u *= np.moveaxis(call.weight[(None,) * (u.ndim - 1)], -1, call.axis)
        return None, u
    valid = call.hard != call.ignore_index
    index = np.where(valid, call.hard, 0)
    weight = np.ones(1) if call.weight is None else call.weight[index].astype(np.float64)
    return (
        np.expand_dims(index.reshape(call.rows), call.axis),
        np.expand_dims(np.where(valid, weight, 0.0).reshape(call.rows), call.axis),
    )


def _loss(call: Call, index: npt.NDArray[np.int64] | None, u: npt.NDArray[np.float64]) -> Any:
    """-sum u log p over the class axis, zero where u is zero even if log p is -inf; reduced."""
    picked = call.logits if index is None else np.take_along_axis(call.logits, index, call.axis)
    with np.errstate(all="ignore"):
        terms = np.where(u == 0.0, 0.0, -u * picked.astype(np.float64))
        losses = terms.sum(axis=call.axis)
        if call.losses is not None:
            call.losses[...] = losses
        return call.loss(float(losses.sum()))
