"""The short way for small plain calls, where the checks of the long way are most of the time.

A function returns None, with nothing written, for the long way to take a call: that has large ones,
options, other layouts and types than plain arrays of rows with int64 labels, and all that is wrong.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from fastce import _arguments as arguments
from fastce import cpu
from fastce._arguments import AnyArray
from fastce.cpu.layout import FEW_CLASSES, PARALLEL

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_LABELS = np.dtype(np.int64)
_PLAIN = arguments.Options()[1:4]


def small_loss(
    logits: Any,
    targets: Any,
    axis: int,
    weight: npt.ArrayLike | None,
    options: arguments.Options,
) -> Any:
    """The reduced loss, or None."""
    if not _is_small_and_plain(logits, targets, axis, weight, options):
        return None
    return _loss(logits, targets, options, None)


def small_loss_and_grad(
    logits: Any,
    targets: Any,
    axis: int,
    weight: npt.ArrayLike | None,
    options: arguments.Options,
    out: AnyArray | None,
) -> tuple[Any, AnyArray] | None:
    """The reduced loss and its gradient in `out`, or None."""
    if not _is_small_and_plain(logits, targets, axis, weight, options):
        return None
    grad = np.empty_like(logits) if out is None else out
    if (
        type(grad) is not np.ndarray
        or grad.dtype is not logits.dtype
        or grad.shape != logits.shape
        or not grad.flags.carray
    ):
        return None
    loss = _loss(logits, targets, options, grad)
    return None if loss is None else (loss, grad)


def _is_small_and_plain(
    logits: Any, targets: Any, axis: int, weight: npt.ArrayLike | None, options: arguments.Options
) -> bool:
    return (
        type(logits) is np.ndarray
        and type(targets) is np.ndarray
        and weight is None
        and options[1:4] == _PLAIN
        and options.reduction != "none"
        and options.normalizer is None
        and type(axis) is int
        and (axis == -1 or axis == 1)
        and logits.ndim == 2
        and 0 < logits.size < PARALLEL
        and targets.shape == logits.shape[:1]
        and targets.dtype is _LABELS
        and (logits.dtype is _FLOATS[0] or logits.dtype is _FLOATS[1])
        and logits.flags.carray
        and targets.flags.carray
    )


def _loss(logits: Any, targets: Any, options: arguments.Options, out: AnyArray | None) -> Any:
    classes = logits.shape[1]
    small = cpu.small
    kernel = small.small_columns if classes < FEW_CLASSES else small.small_rows
    loss = np.empty(1, logits.dtype)
    count = kernel(
        logits.reshape(-1), targets, classes, options.ignore_index, options.reduction == "mean",
        None if out is None else out.reshape(-1), loss,
    )  # fmt: skip
    return None if count < 0 else loss[0]
