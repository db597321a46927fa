"""Cross-entropy of logits or log-probabilities with integer or soft labels, and its gradient."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastce import _arguments as arguments
from fastce._arguments import AnyArray, Reduction


class CrossEntropyStats(NamedTuple):
    """Per-row numbers of `cross_entropy_stats`."""

    loss: AnyArray
    lse: AnyArray
    entropy: AnyArray
    predicted: npt.NDArray[np.int64]
    total_weight: float


class Call:
    """One checked call: arrays, options, and what its mean is divided by."""

    def __init__(
        self, name: str, logits: npt.ArrayLike, targets: npt.ArrayLike, axis: int,
        weight: npt.ArrayLike | None, ignore_index: int, reduction: str = "none",
        normalizer: float | None = None,
    ) -> None:  # fmt: skip
        self.logits = arguments.float_array(name, logits)
        self.axis = arguments.class_axis(name, self.logits, axis)
        self.classes = self.logits.shape[self.axis]
        self.rows = self.logits.shape[: self.axis] + self.logits.shape[self.axis + 1 :]
        self.dtype = arguments.compute_dtype(self.logits.dtype)
        self.ignore_index = arguments.integer("ignore_index", ignore_index)
        self.hard, self.soft = arguments.targets(
            targets, self.logits, self.axis, self.ignore_index
        )
        self.weight = arguments.class_weight("weight", weight, self.classes, self.logits.dtype)
        self.reduction = arguments.reduction(reduction)
        self.normalizer = arguments.normalizer(normalizer, reduction)
        self.count = self.total_weight = float(np.prod(self.rows, dtype=np.int64))
        if self.hard is not None:
            from fastce.cpu import calls

            mass = calls.check_targets(self.hard, self.classes, self.ignore_index, self.weight)
            if mass.bad_row >= 0:
                raise arguments.bad_target(targets, mass.bad_row, self.classes)
            self.count, self.total_weight = mass.count, mass.weight
        self.losses = np.empty(self.rows, self.dtype) if reduction == "none" else None

    def divisors(self) -> tuple[float, float]:
        """What the weighted losses and the z-loss terms are divided by."""
        if self.reduction != "mean":
            return 1.0, 1.0
        if self.normalizer is not None:
            return self.normalizer, self.normalizer
        return self.total_weight, self.count

    @property
    def labels(self) -> AnyArray | None:
        """The labels of either kind."""
        return self.soft if self.hard is None else self.hard

    def loss(self, nll: float, z: float = 0.0) -> Any:
        """The reduced loss as a NumPy scalar, or the array of losses."""
        if self.losses is not None:
            return self.losses
        weight, count = self.divisors()
        with np.errstate(all="ignore"):
            total = np.float64(nll) / weight + (np.float64(z) / count if z != 0.0 else 0.0)
            return self.dtype(total)


def inverse(divisor: float) -> float:
    """1 / divisor; 0 where nothing counts, so that the gradient is exactly zero there."""
    return 1.0 / divisor if divisor else 0.0


def _flat(array: AnyArray | None) -> AnyArray | None:
    return None if array is None else array.reshape(-1)


def _cross_entropy(
    call: Call, label_smoothing: float, z_loss: float, softcap: float | None,
    grad_output: npt.ArrayLike | None, out: AnyArray | None,
) -> Any:  # fmt: skip
    from fastce.cpu import calls

    options = calls.Options(
        call.ignore_index,
        arguments.label_smoothing(label_smoothing),
        arguments.z_loss(z_loss),
        arguments.softcap(softcap),
    )
    scalar, per_row = arguments.upstream(grad_output, call.rows, call.reduction)
    weight, count = call.divisors()
    totals = calls.cross_entropy(
        call.axis, call.logits, call.hard, call.soft, call.weight, options,
        upstream=per_row, nll_scale=scalar * inverse(weight), z_scale=scalar * inverse(count),
        losses=_flat(call.losses), out=out,
    )  # fmt: skip
    return call.loss(*totals)


def cross_entropy(
    logits: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    normalizer: float | None = None,
) -> Any:
    """Cross-entropy between labels and the softmax of logits: the negative log likelihood.

    doc
    """
    call = Call("logits", logits, targets, axis, weight, ignore_index, reduction, normalizer)
    return _cross_entropy(call, label_smoothing, z_loss, softcap, None, None)


def cross_entropy_and_grad(
    logits: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    normalizer: float | None = None,
    grad_output: npt.ArrayLike | None = None,
    out: AnyArray | None = None,
) -> tuple[Any, AnyArray]:
    """Cross-entropy and its gradient with respect to the logits."""
    call = Call("logits", logits, targets, axis, weight, ignore_index, reduction, normalizer)
    grad = arguments.output(out, call.logits, targets=call.labels, weight=call.weight)
    return _cross_entropy(call, label_smoothing, z_loss, softcap, grad_output, grad), grad


def cross_entropy_stats(
    logits: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
) -> CrossEntropyStats:
    """Per-row loss, log-sum-exp, entropy and prediction."""
    from fastce.cpu import calls

    call = Call("logits", logits, targets, axis, weight, ignore_index)
    assert call.losses is not None
    lse, entropy = np.empty(call.rows, call.dtype), np.empty(call.rows, call.dtype)
    predicted = np.empty(call.rows, np.int64)
    calls.cross_entropy(
        call.axis, call.logits, call.hard, call.soft, call.weight,
        calls.Options(call.ignore_index),
        losses=call.losses.reshape(-1),
        statistics=(lse.reshape(-1), entropy.reshape(-1), predicted.reshape(-1)),
    )  # fmt: skip
    return CrossEntropyStats(call.losses, lse, entropy, predicted, float(call.total_weight))
