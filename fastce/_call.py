"""A call whose arguments have been checked, and what its losses are divided by."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fastce import _arguments as arguments
from fastce import cpu
from fastce._arguments import AnyArray


class Call:
    """One checked call: arrays, options, and what its mean is divided by."""

    __slots__ = (
        "axis", "classes", "count", "dtype", "hard", "logits", "losses", "options", "rows", "soft",
        "total_weight", "weight",
    )  # fmt: skip

    def __init__(
        self, name: str, logits: npt.ArrayLike, targets: npt.ArrayLike, axis: int,
        weight: npt.ArrayLike | None, options: arguments.Options, weight_name: str = "weight",
    ) -> None:  # fmt: skip
        self.logits = z = arguments.native(arguments.any_array(name, logits))
        labels = arguments.any_array("targets", targets)
        self.axis, self.classes, self.rows, rows, self.dtype, hard = arguments.signature(
            name, z.dtype, z.shape, axis, labels.dtype, labels.shape, options.ignore_index
        )
        self.options = options
        self.weight = arguments.class_weight(weight_name, weight, self.classes, z.dtype)
        self.hard: npt.NDArray[np.int64] | None = None
        self.soft: AnyArray | None = None
        self.count: float = rows
        self.total_weight: float = rows
        if hard:
            self.hard, bad_row, self.count, self.total_weight = cpu.calls.check_targets(
                arguments.hard_labels(labels, self.classes, options.ignore_index),
                self.classes, options.ignore_index, self.weight,
            )  # fmt: skip
            if bad_row >= 0:
                raise arguments.bad_target(self.hard[bad_row], bad_row, labels.shape, self.classes)
        else:
            self.soft = arguments.float_array("targets", labels)
        self.losses = np.empty(self.rows, self.dtype) if options.reduction == "none" else None

    def divisors(self) -> tuple[float, float]:
        """What the weighted losses and the z-loss terms are divided by."""
        if self.options.reduction != "mean":
            return 1.0, 1.0
        if self.options.normalizer is not None:
            return self.options.normalizer, self.options.normalizer
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
        if not weight:
            return self.dtype(math.nan)
        return arguments.scalar(nll / weight + (z / count if z else 0.0), self.dtype)


def inverse(divisor: float) -> float:
    """1 / divisor; 0 where nothing counts, so that the gradient is exactly zero there."""
    return 1.0 / divisor if divisor else 0.0
