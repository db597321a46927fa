"""Cross-entropy of logits on a device, and its gradient."""

from typing import Any

from fastce import _arguments as arguments
from fastce import _outputs as outputs
from fastce._arguments import Reduction
from fastce._devices import on_device
from fastce.cuda import calls
from fastce.cuda.arrays import (
    Array,
    device_array,
    float_array,
    in_row_order,
    new,
    new_like,
    overlap,
    same_memory,
)
from fastce.losses import CrossEntropyStats


class Call:
    """One checked call: arrays on one device, options, and what its mean is divided by."""

    def __init__(
        self, logits: Any, targets: Any, axis: int, weight: Any, options: arguments.Options
    ) -> None:
        self.logits = z = calls.begin("logits", logits)
        labels = device_array("targets", targets, z)
        fit = arguments.signature(
            "logits", z.dtype, z.shape, axis, labels.dtype, labels.shape, options.ignore_index
        )
        self.options, self.axis, self.rows, self.classes = options, fit.axis, fit.rows, fit.classes
        self.count = fit.row_count
        self.dtype = fit.dtype.__name__
        self.weight = None
        if weight is not None:
            given = float_array("weight", weight, z)
            arguments.check_class_weight("weight", given.dtype, given.shape, self.classes)
            self.weight = given
        self.targets = in_row_order("targets", labels) if fit.hard else None
        self.soft = None if fit.hard else labels

    def run(
        self, task: str, results: calls.Results, out: Array | None = None,
        upstream: tuple[float, Array | None] = (1.0, None), total: Array | None = None,
    ) -> tuple[calls.Divisors, Array]:  # fmt: skip
        """Launch everything but the sum of the losses."""
        z, options = self.logits, self.options
        weight = calls.compute_weight(self.weight, z, self.dtype)
        memory = calls.scratch(z, self.count)
        divisors = calls.Divisors()
        mean = options.reduction == "mean"
        if self.targets is not None or total is not None:
            calls.weigh_targets(
                self.targets, self.count, self.classes, options, weight, memory, total
            )
        if mean and self.targets is not None:
            divisors = calls.Divisors(scales=memory.address)
        elif mean:
            by = self.count if options.normalizer is None else options.normalizer
            divisors = calls.Divisors(0, float(by), float(by))
        scalar, per_row = upstream
        nll_scale = scalar / divisors.weight if divisors.weight else 0.0
        z_scale = scalar / divisors.rows if divisors.weight else 0.0
        calls.rows(
            task, self.axis, z, out=out, targets=self.targets, soft=self.soft, weight=weight,
            options=options, upstream=per_row, scales=divisors.scales,
            nll_scale=nll_scale, z_scale=z_scale, results=results,
        )  # fmt: skip
        return divisors, memory

    def loss(
        self, task: str, out: Array | None = None,
        upstream: tuple[float, Array | None] = (1.0, None),
    ) -> Any:  # fmt: skip
        """The reduced loss or the array of losses, and the gradient in `out`."""
        losses = new(self.logits, self.rows, self.dtype)
        reduced = self.options.reduction != "none"
        z_terms = losses if reduced and self.options.z_loss else None
        if z_terms is not None:
            z_terms = new(self.logits, self.rows, self.dtype)
        divisors, memory = self.run(task, calls.Results(losses, z_terms), out, upstream)
        if not reduced:
            return losses.result
        return calls.reduce(losses, z_terms, divisors, memory, self.dtype)


def upstream(
    value: Any, logits: Array, rows: tuple[int, ...], reduction: str
) -> tuple[float, Array | None]:
    """The upstream gradient as a number, or an array of one number or one per row."""
    if value is None:
        return 1.0, None
    if not on_device(value):
        scalar, per_row = arguments.upstream(value, (), reduction)
        assert per_row is None
        return scalar, None
    array = float_array("grad_output", value, logits)
    arguments.check_upstream(array.dtype, array.shape, rows, reduction)
    return 1.0, in_row_order("grad_output", array)


def output(out: Any, logits: Array, name: str = "logits", **read: Array | None) -> Array:
    """Where a result shaped and typed like the logits goes: `out` if it fits, or a new array."""
    if out is None:
        return new_like(logits)
    array = device_array("out", out, logits)
    outputs.check(array, logits, name, not array.read_only, array.contiguous)
    same = same_memory(array, logits)
    outputs.check_apart(array, None if same else logits, name, overlap, read)
    return array


def synchronize(device: int = 0) -> None:
    """Wait for a device; raise IndexError if a target so far was neither a class nor ignored.

    Parameters
    ----------
    device : int, default 0
        Its number.

    Raises
    ------
    IndexError
        If a call since the last error had a target outside [0, C) that is not `ignore_index`; names
        the first of the first such call.
    """
    calls.synchronize(device)


def cross_entropy(
    logits: Any, targets: Any, *, axis: int = -1, weight: Any = None, ignore_index: int = -100,
    label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None,
    reduction: Reduction = "mean", normalizer: float | None = None,
) -> Any:  # fmt: skip
    """`fastce.cross_entropy` of arrays on a device.

    Parameters
    ----------
    logits, targets, weight
        Arrays on one device; otherwise as there.
    axis, ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer
        As there.

    Returns
    -------
    array
        Of the library of `logits`, on its device: without axes, or for "none" with one number per
        row; float64 for float64 logits, else float32.

    Raises
    ------
    TypeError, ValueError
        As there; TypeError also for arrays that are not on the device.
    IndexError
        If an earlier call had a bad target; see `synchronize`.

    Notes
    -----
    Exponentials are taken relative to the second largest logit and added up in fixed point, so that
    the same row gives the same bits at any place in any batch and in every kernel.
    """
    options = arguments.options(
        ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer
    )
    return Call(logits, targets, axis, weight, options).loss("loss")


def cross_entropy_and_grad(
    logits: Any, targets: Any, *, axis: int = -1, weight: Any = None, ignore_index: int = -100,
    label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None,
    reduction: Reduction = "mean", normalizer: float | None = None,
    grad_output: Any = None, out: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """`fastce.cross_entropy_and_grad` of arrays on a device.

    Parameters
    ----------
    logits, targets, axis, weight, ignore_index, label_smoothing, z_loss, softcap
        As in `cross_entropy`.
    reduction, normalizer
        As in `cross_entropy`.
    grad_output : float or array, optional
        A number; or an array on the device without axes, which is not waited for; or for "none" one
        with a number per row.
    out : array, optional
        As there; ``out=logits`` computes in place. Memory that is merely interleaved with that of
        an array that is read counts as overlapping it.

    Returns
    -------
    loss : array
        As from `cross_entropy`, to the last bit.
    grad : array
        Shaped and typed like `logits`; `out` itself if given.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `cross_entropy` does; also if `grad_output` or `out` does not fit.
    """
    options = arguments.options(
        ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer
    )
    call = Call(logits, targets, axis, weight, options)
    factor = upstream(grad_output, call.logits, call.rows, reduction)
    grad = output(
        out, call.logits, targets=call.targets or call.soft, weight=call.weight,
        grad_output=factor[1],
    )  # fmt: skip
    return call.loss("gradient", grad, factor), grad.result if out is None else out


def cross_entropy_stats(
    logits: Any, targets: Any, *, axis: int = -1, weight: Any = None, ignore_index: int = -100
) -> CrossEntropyStats:
    """`fastce.cross_entropy_stats` of arrays on a device.

    Parameters
    ----------
    logits, targets, axis, weight, ignore_index
        As in `cross_entropy`.

    Returns
    -------
    CrossEntropyStats
        Its fields are arrays on the device; `total_weight` is one without axes, of float64.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `cross_entropy` does.
    """
    options = arguments.options(ignore_index, 0.0, 0.0, None, "none", None)
    call = Call(logits, targets, axis, weight, options)
    names = {"losses": call.dtype, "lse": call.dtype, "entropy": call.dtype, "predicted": "int64"}
    made = {name: new(call.logits, call.rows, dtype) for name, dtype in names.items()}
    total = new(call.logits, (), "float64")
    call.run("stats", calls.Results(**made), total=total)
    loss, lse, entropy, predicted = (array.result for array in made.values())
    return CrossEntropyStats(loss, lse, entropy, predicted, total.result)
