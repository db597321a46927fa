"""Binary cross-entropy of logits on a device, and its gradient."""

import math
from typing import Any

import numpy as np

from fastce import _arguments as arguments
from fastce._arguments import Reduction
from fastce._devices import on_device
from fastce.cuda import calls
from fastce.cuda.arrays import Array, broadcast, device_array, new
from fastce.cuda.calls import Factor
from fastce.cuda.losses import output, upstream


def binary_cross_entropy(
    logits: Any, targets: Any, *, weight: Any = None, pos_weight: Any = None,
    reduction: Reduction = "mean",
) -> Any:  # fmt: skip
    """`fastce.binary_cross_entropy` of arrays on a device.

    Parameters
    ----------
    logits, targets
        Arrays on one device; otherwise as there.
    weight, pos_weight : float or array, optional
        Numbers, or arrays on the device of a shape that broadcasts to that of `logits`.
    reduction
        As there.

    Returns
    -------
    array
        Of the library of `logits`, on its device: without axes, or for "none" shaped like `logits`;
        float64 for float64 logits, else float32.

    Raises
    ------
    TypeError, ValueError
        As there; TypeError also for arrays that are not on the device.

    Notes
    -----
    Losses of single elements are computed in float32, for float64 logits in float64, and added up
    in float64.
    """
    return _binary_cross_entropy(logits, targets, weight, pos_weight, reduction)[0]


def binary_cross_entropy_and_grad(
    logits: Any, targets: Any, *, weight: Any = None, pos_weight: Any = None,
    reduction: Reduction = "mean", grad_output: Any = None, out: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """`fastce.binary_cross_entropy_and_grad` of arrays on a device.

    Parameters
    ----------
    logits, targets, weight, pos_weight, reduction
        As in `binary_cross_entropy`.
    grad_output, out
        As in `cross_entropy_and_grad`; for "none" `grad_output` may be shaped like `logits`.

    Returns
    -------
    loss : array
        As from `binary_cross_entropy`, to the last bit.
    grad : array
        Shaped and typed like `logits`; `out` itself if given.

    Raises
    ------
    TypeError, ValueError
        As `binary_cross_entropy` does; also if `grad_output` or `out` does not fit.
    """
    return _binary_cross_entropy(
        logits, targets, weight, pos_weight, reduction, grad_output, out, "gradient"
    )


def _binary_cross_entropy(
    logits: Any, targets: Any, weight: Any, pos_weight: Any, reduction: Reduction,
    grad_output: Any = None, out: Any = None, task: str = "loss",
) -> tuple[Any, Any]:  # fmt: skip
    z = calls.begin("logits", logits)
    labels = device_array("targets", targets, z)
    arguments.check_number("targets", labels.dtype)
    arguments.check_same_shape("targets", labels.shape, "logits", z.shape)
    weighing = _factor("weight", weight, z), _factor("pos_weight", pos_weight, z)
    arguments.check_reduction(reduction)
    dtype, count = arguments.compute_dtype(z.dtype).__name__, math.prod(z.shape)
    up, per_element = upstream(grad_output, z, z.shape, reduction)
    grad = None
    if task == "gradient":
        grad = output(
            out, z, targets=labels, weight=weighing[0].array, pos_weight=weighing[1].array,
            grad_output=per_element,
        )  # fmt: skip
    of, positive, factor = (_spread(f, z, dtype) for f in (*weighing, Factor(up, per_element)))
    divisor = float(count) if reduction == "mean" else 1.0
    factor = factor._replace(number=factor.number / divisor if divisor else 0.0)
    losses = new(z, z.shape, dtype) if reduction == "none" else None
    sums = calls.elements(
        task, z, labels, weight=of, positive=positive, upstream=factor, out=grad,
        losses=losses, dtype=dtype,
    )  # fmt: skip
    if losses is not None:
        loss = losses.result
    else:
        memory = calls.scratch(z, math.prod(sums.shape))
        loss = calls.reduce(sums, None, calls.Divisors(0, divisor, divisor), memory, dtype)
    return loss, None if grad is None else grad.result if out is None else out


def _factor(name: str, value: Any, z: Array) -> Factor:
    """A number, or an array of a shape that broadcasts to that of the logits."""
    if value is None:
        return Factor()
    if not on_device(value) and np.ndim(value) == 0:
        number = arguments.any_array(name, value)
        arguments.check_number(name, number.dtype)
        return Factor(float(number))
    array = device_array(name, value, z)
    arguments.check_number(name, array.dtype)
    arguments.check_broadcastable(name, array.shape, z.shape)
    return Factor(1.0, array)


def _spread(factor: Factor, z: Array, dtype: str) -> Factor:
    """The array of a factor in the dtype that is computed with, in the shape of the logits."""
    array = calls.compute_weight(factor.array, z, dtype)
    return factor if array is None else factor._replace(array=broadcast(array, z.shape))
