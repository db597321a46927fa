"""Slices of the classes on a device: what `fastce.shards` does for arrays there.

A slice is read once for its records, of 40 bytes per row or 56; they are merged, in the order in
which they are given, and finished by kernels of one thread per row; and a slice is read once more
and its gradient written, by blocks that need not meet.  Nothing waits for the device.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from fastce import _arguments as arguments
from fastce._arguments import Reduction
from fastce.cuda import calls, plan
from fastce.cuda.arrays import Array, device_array, new
from fastce.cuda.losses import Call, output, upstream
from fastce.cuda.records import LABELLED, PLAIN, SUMMED
from fastce.shards import (
    ShardedLoss,
    Terms,
    check_alike,
    check_covered,
    check_total,
    first_class,
)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Partial:
    """What some of the classes know of each row.

    Attributes
    ----------
    records : array of float64, of shape (N, 5) or (N, 7)
        One record per row, in row order, on the device: all that is sent and merged.
    rows, terms
        As in `fastce.shards.Partial`.
    covered : int
        How many classes have been looked at.
    """

    records: Any
    rows: tuple[int, ...]
    terms: Terms
    covered: int


class Finished(NamedTuple):
    """Losses and log-sum-exps of rows, where they are wanted, and what the rows add up to.

    The sums are those of losses, z-loss terms, weights, rows that count, and bad targets.
    """

    losses: Array | None
    lse: Array | None
    sums: Array


class Settled(NamedTuple):
    """What follows from the sums of all rows, on the device."""

    loss: Array
    scales: Array  # of the gradient: of the labels, of the z-loss
    weight: Array  # what "mean" divides by, without `normalizer`


def partial(
    logits: Any, targets: Any, *, class_offset: int, classes: int, axis: int = -1,
    weight: Any = None, ignore_index: int = -100, label_smoothing: float = 0.0,
    softcap: float | None = None,
) -> Partial:  # fmt: skip
    """`fastce.shards.partial` of arrays on a device.

    Parameters
    ----------
    logits, targets, weight
        Arrays on one device; otherwise as there.
    class_offset, classes, axis, ignore_index, label_smoothing, softcap
        As there.

    Returns
    -------
    Partial
        Whose records lie on the device.

    Raises
    ------
    TypeError, ValueError
        As there; TypeError also for arrays that are not on the device.
    IndexError
        If an earlier call had a bad target; see `fastce.cuda.synchronize`.
    """
    classes = arguments.integer("classes", classes)
    options = arguments.options(ignore_index, label_smoothing, 0.0, softcap, "none", None)
    call = Call(logits, targets, axis, weight, options)
    class_offset = first_class(class_offset, call.classes, classes)
    terms = Terms(
        classes, np.dtype(call.dtype), call.targets is not None, options.ignore_index,
        options.label_smoothing, options.softcap, False,
    )  # fmt: skip
    records = new(call.logits, (call.count, _record_size(terms)), "float64")
    _rows("partial", call, calls.Slice(records, class_offset, classes), options)
    if call.targets is not None:  # to note the first bad one, with its place
        memory = calls.scratch(call.logits, call.count)
        calls.weigh_targets(call.targets, call.count, classes, options, None, memory, None)
    return Partial(records.result, call.rows, terms, call.classes)


def merge(first: Partial, *others: Partial) -> Partial:
    """`fastce.shards.merge` of partials on a device, in the order in which they are given.

    Parameters
    ----------
    first, *others : Partial
        Partials of the same rows on one device, from calls with the same options.

    Returns
    -------
    Partial
        The same bits for the same order, however grouped from the left.

    Raises
    ------
    TypeError, ValueError
        As there; also if records are elsewhere.
    """
    check_alike(first, others)
    found = records = _records(first)
    for other in others:
        there = _records(other, records)
        found = _merged(first, found, there.address, 1)
    if not others:
        found = _merged(first, found, 0, 0)
    return dataclasses.replace(
        first, records=found.result, covered=first.covered + sum(o.covered for o in others)
    )


def merge_gathered(total: Partial, gathered: Any, covered: int) -> Partial:
    """Merge the records of several slices, of shape (slices, N, 5 or 7), that look at `covered`."""
    every = device_array("records", gathered)
    step = every.strides[0]
    merged = _merged(total, every, every.address + step, every.shape[0] - 1, step)
    return dataclasses.replace(total, records=merged.result, covered=covered)


def finish(
    total: Partial, *, z_loss: float = 0.0, reduction: Reduction = "mean",
    normalizer: float | None = None,
) -> ShardedLoss:  # fmt: skip
    """`fastce.shards.finish` of a partial on a device.

    Parameters
    ----------
    total : Partial
        Merged from slices that make up all classes.
    z_loss, reduction, normalizer
        As there.

    Returns
    -------
    ShardedLoss
        Its fields are arrays on the device; `loss` of a reduction and `total_weight` have no axes.
        `predicted` is None: records on a device do not know it.

    Raises
    ------
    TypeError, ValueError
        As there.
    """
    options = _options(total, z_loss, reduction, normalizer)
    check_covered(total)
    done = finish_rows(total, options.z_loss, losses=reduction == "none", lse=True)
    settled = settle(done.sums, total.terms, options)
    loss = settled.loss if done.losses is None else done.losses
    assert done.lse is not None
    return ShardedLoss(loss.result, done.lse.result, None, settled.weight.result, None)


def grad(
    logits: Any, targets: Any, total: Partial, *, class_offset: int, axis: int = -1,
    weight: Any = None, z_loss: float = 0.0, reduction: Reduction = "mean",
    normalizer: float | None = None, grad_output: Any = None, out: Any = None,
    scales: Array | None = None,
) -> Any:  # fmt: skip
    """`fastce.shards.grad` of arrays on a device.

    Parameters
    ----------
    logits, targets, weight, out
        Arrays on one device; otherwise as there.
    total, class_offset, axis, z_loss, reduction, normalizer
        As there.
    grad_output : float or array, optional
        As in `fastce.cuda.cross_entropy_and_grad`.
    scales : Array, optional
        Those of `Settled`, for rows of which others are elsewhere. None means those of `total`.

    Returns
    -------
    array
        Shaped and typed like `logits`; `out` itself if given.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `partial` does; also if `total`, `grad_output` or `out` does not fit.
    """
    options = _options(total, z_loss, reduction, normalizer)
    call = Call(logits, targets, axis, weight, options)
    terms = total.terms
    class_offset = first_class(class_offset, call.classes, terms.classes)
    check_total(total, call.rows, np.dtype(call.dtype), call.targets is not None)
    check_covered(total)
    records = _records(total, call.logits)
    factor = upstream(grad_output, call.logits, call.rows, reduction)
    made = output(
        out, call.logits, targets=call.targets or call.soft, weight=call.weight,
        grad_output=factor[1], total=records,
    )  # fmt: skip
    if scales is None and reduction == "mean":
        scales = settle(finish_rows(total, 0.0).sums, terms, options).scales
    part = calls.Slice(records, class_offset, terms.classes)
    _rows("slice_gradient", call, part, options, made, factor, scales)
    return made.result if out is None else out


def finish_rows(total: Partial, z_loss: float, losses: bool = False, lse: bool = False) -> Finished:
    """Finish each row."""
    records, terms = _records(total), total.terms
    count, dtype = math.prod(total.rows), terms.dtype.name
    by_row = new(records, total.rows, dtype) if losses else None
    by_row_lse = new(records, total.rows, dtype) if lse else None
    blocks = -(-count // plan.SUM_THREADS)
    parts = new(records, (blocks, SUMMED), "float64")
    if blocks:
        integers = (
            records.address, count, int(terms.hard), calls.address(by_row),
            calls.address(by_row_lse), parts.address,
        )  # fmt: skip
        calls.of_records(
            "finish", records, blocks, integers, (1.0 - terms.label_smoothing, z_loss),
            labelled=terms.labelled, double=dtype == "float64",
        )  # fmt: skip
    return Finished(by_row, by_row_lse, add(parts))


def add(sums: Array) -> Array:
    """What several parts of the rows add up to, of shape (parts, 5); always in the same order."""
    total = new(sums, (SUMMED,), "float64")
    calls.of_records("total", sums, 1, (sums.address, sums.shape[0], total.address))
    return total


def settle(sums: Array, terms: Terms, options: arguments.Options) -> Settled:
    """Reduced loss and scales of all rows; targets that are no class are noted."""
    dtype = terms.dtype.name
    found = Settled(new(sums, (), dtype), new(sums, (2,), "float64"), new(sums, (), "float64"))
    divisor = 1.0
    if options.reduction == "mean":
        divisor = -1.0 if options.normalizer is None else options.normalizer
    integers = (
        sums.address, found.scales.address, found.weight.address, found.loss.address,
        calls.device(sums.device).note_address, terms.classes,
    )  # fmt: skip
    calls.of_records("settle", sums, 1, integers, (divisor,), double=dtype == "float64")
    return found


def _options(
    total: Partial, z_loss: float, reduction: Reduction, normalizer: float | None
) -> arguments.Options:
    terms = total.terms
    return arguments.options(
        terms.ignore_index, terms.label_smoothing, z_loss, terms.softcap, reduction, normalizer
    )


def _record_size(terms: Terms) -> int:
    return LABELLED if terms.labelled else PLAIN


def _records(total: Partial, like: Array | None = None) -> Array:
    """The records of a partial, as kernels read them."""
    records = device_array("records", total.records, like)
    shape = (math.prod(total.rows), _record_size(total.terms))
    if records.shape != shape or records.dtype.name != "float64" or not records.contiguous:
        raise ValueError(
            f"records: expected float64 of shape {shape} in row order, got {records.dtype} of "
            f"shape {records.shape}"
        )
    return records


def _merged(total: Partial, first: Array, other: int, parts: int, step: int = 0) -> Array:
    """Records merged with those of further parts, so many bytes apart, from an address on."""
    shape = first.shape[-2:]
    merged = new(first, shape, "float64")
    if shape[0]:
        integers = (first.address, other, step, parts, shape[0], merged.address)
        blocks = -(-shape[0] // plan.SUM_THREADS)
        calls.of_records("merge", first, blocks, integers, labelled=total.terms.labelled)
    return merged


def _rows(
    task: str, call: Call, part: calls.Slice, options: arguments.Options, out: Array | None = None,
    factor: tuple[float, Array | None] = (1.0, None), scales: Array | None = None,
) -> None:  # fmt: skip
    """Launch what computes `task` for every row of a slice."""
    scalar, per_row = factor
    calls.rows(
        task, call.axis, call.logits, out=out, targets=call.targets, soft=call.soft,
        weight=calls.compute_weight(call.weight, call.logits, call.dtype), options=options,
        upstream=per_row, scales=calls.address(scales), nll_scale=scalar, z_scale=scalar, part=part,
    )  # fmt: skip
