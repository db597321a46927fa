"""Binary cross-entropy of logits: the sigmoid form, element by element."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fastce import _arguments as arguments
from fastce._arguments import AnyArray, Reduction


def binary_cross_entropy(
    logits: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    weight: npt.ArrayLike | None = None,
    pos_weight: npt.ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> Any:
    """Cross-entropy of independent yes-or-no labels and the sigmoid of logits."""
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
    """Binary cross-entropy and its gradient with respect to the logits."""
    return _binary_cross_entropy(
        logits, targets, weight, pos_weight, reduction, grad_output, out, gradient=True
    )


def _binary_cross_entropy(
    logits: npt.ArrayLike, targets: npt.ArrayLike,
    weight: npt.ArrayLike | None, pos_weight: npt.ArrayLike | None, reduction: str,
    grad_output: npt.ArrayLike | None = None, out: AnyArray | None = None, gradient: bool = False,
) -> Any:  # fmt: skip
    from fastce.cpu import calls

    z = arguments.float_array("logits", logits)
    t = arguments.float_or_integer_array("targets", targets)
    t = arguments.same_shape("targets", t, "logits", z)
    w = arguments.broadcastable("weight", weight, z)
    positive = arguments.broadcastable("pos_weight", pos_weight, z)
    arguments.reduction(reduction)
    dtype = arguments.compute_dtype(z.dtype)
    upstream, per_element = arguments.upstream(grad_output, z.shape, reduction)
    grad = (
        arguments.output(out, z, targets=t, weight=w, pos_weight=positive) if gradient else None
    )
    losses = np.empty(z.shape, dtype) if reduction == "none" else None
    scale = upstream / z.size if reduction == "mean" and z.size else upstream
    arrays = [None if a is None else a.reshape(1) if z.ndim == 0 else a for a in (z, t, w, positive)]
    total = calls.binary_cross_entropy(
        *arrays, upstream=per_element, scale=scale,
        losses=None if losses is None else losses.reshape(-1),
        out=None if grad is None else grad.reshape(1) if z.ndim == 0 else grad,
    )  # fmt: skip
    if losses is not None:
        loss: Any = losses
    elif reduction == "mean":
        loss = dtype(total / z.size if z.size else math.nan)
    else:
        loss = dtype(total)
    return loss, grad
