"""Rows of a matrix for callers that are not Python: C functions that touch no Python object.

They run the kernels of `loops` in the same chunks as calls from NumPy do, so that a matrix gets the
same bits, and its machine code is the same.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from fastce.cpu import loops
from fastce.cpu.calls import STREAMED, STREAMED_ROW
from fastce.cpu.jit import device
from fastce.cpu.layout import CHUNK, FEW_CLASSES
from fastce.cpu.memory import array_at, item_size, pointer_at, position, zeros
from fastce.cpu.tiles import count_tiles
from fastce.cpu.vector import lanes

BAD_ARGUMENT = -1  # what C functions return beside 0 and, for a bad target, 1 + its row


@device
def across(base, classes, class_stride, soft, soft_class_stride, out, out_class_stride):
    """Whether lanes run across rows: few classes, or classes that do not lie side by side."""
    apart = class_stride != item_size(base)
    if soft is not None:
        apart |= soft_class_stride != item_size(base)
    if out is not None:
        apart |= out_class_stride != item_size(base)
    return classes < FEW_CLASSES or apart


@device
def chunks(base, outer, inner, classes, columns):
    """Rows, or tiles of rows, in a chunk, and the number of chunks."""
    if not columns:
        chunk = max(1, CHUNK // classes)
        return chunk, (outer * inner + chunk - 1) // chunk
    width = lanes(zeros(base))
    chunk = max(1, CHUNK // (classes * width))
    return chunk, (count_tiles(outer, inner, width) + chunk - 1) // chunk


@device
def _streaming(base, out, rows, classes, columns):
    """Whether to write past the caches, as `calls` decides; only whole rows of memory apart."""
    if out is None:
        return False
    size = item_size(base)
    large = rows * classes * size >= STREAMED and classes * size >= STREAMED_ROW
    apart = abs(position(out) - position(base)) >= rows * classes * size
    return large and apart and not columns and position(out) % size == 0


@intrinsic
def _base(typingctx, pointer):
    """A pointer as kernels take it, a one-element array; None stays None."""
    if pointer is types.none:
        return pointer(pointer), lambda context, builder, sig, args: context.get_dummy_value()
    array = types.Array(pointer.dtype, 1, "C")

    def codegen(context, builder, sig, args):
        return context.compile_internal(builder, lambda p: carray(p, (1,)), sig, args)

    return array(pointer), codegen


@device
def cross_entropy(
    logits, targets, soft, weight, spread_weight, upstream, losses, out, scale, ignore_index,
    smoothing, z_loss, softcap, outer, inner, classes, strides, soft_strides, out_strides,
    columns, chunk, sums, counter,
):  # fmt: skip
    """Claim chunks of rows until none is left; strides are of outer rows, inner rows, classes."""
    logits_base, soft_base, out_base = _base(logits), _base(soft), _base(out)
    streaming = _streaming(logits, out, outer * inner, classes, columns)
    keep = 1.0 - smoothing
    spread = smoothing / classes
    if columns:
        loops.cross_entropy_columns(
            logits_base, targets, soft_base, weight, spread_weight, upstream,
            losses, None, None, None, out_base, sums, scale, scale, streaming,
            ignore_index, keep, spread, z_loss, softcap,
            outer, inner, classes, chunk, strides[0], strides[1], strides[2],
            soft_strides[0], soft_strides[1], soft_strides[2],
            out_strides[0], out_strides[1], out_strides[2], counter,
        )  # fmt: skip
    else:
        loops.cross_entropy_rows(
            logits_base, targets, soft_base, weight, spread_weight, upstream,
            losses, None, None, None, out_base, sums, scale, scale, streaming,
            ignore_index, keep, spread, z_loss, softcap,
            outer, inner, classes, chunk, strides[0], strides[1], None,
            soft_strides[0], soft_strides[1], None, out_strides[0], out_strides[1], None, counter,
        )  # fmt: skip


@intrinsic
def _given(typingctx, value, item):
    """The value; None for no type."""
    if item is types.none:
        return item(value, item), lambda context, builder, sig, args: context.get_dummy_value()
    return value(value, item), lambda context, builder, sig, args: args[0]


@device
def _checked(given, classes, ignore_index):
    """(targets that nobody else writes to, the first row whose target is no class or -1)."""
    if given is None:
        return given, -1
    targets = np.empty(len(given), np.int64)
    return targets, loops.check_targets(given, targets, classes, ignore_index, None)[0]


@device
def _upstream(given, address, rows):
    """One upstream gradient per row: those that are given, or 1."""
    if given is not None and address == 0:
        return np.ones(rows)
    return given


@device
def _compute(c, logits, soft, out, targets, weight, spread_weight, upstream, losses, softcap):
    """All rows of a call that was checked."""
    strides = (0, c.row_stride, c.class_stride)
    soft_strides = (0, c.probability_row_stride, c.probability_class_stride)
    out_strides = (0, c.grad_row_stride, c.grad_class_stride)
    columns = across(logits, c.classes, strides[2], soft, soft_strides[2], out, out_strides[2])
    chunk, parts = chunks(logits, 1, c.rows, c.classes, columns)
    cross_entropy(
        logits, targets, soft, weight, spread_weight, upstream, losses, out, 1.0,
        c.ignore_index, c.label_smoothing, c.z_loss, softcap, 1, c.rows, c.classes,
        strides, soft_strides, out_strides, columns, chunk, np.empty((parts, 2)),
        np.zeros(1, np.int64),
    )  # fmt: skip


def matrix(
    kind: type[np.generic], size: int, *, grad: bool, soft: bool, weight: bool, softcap: bool
) -> Callable[..., Any]:
    """The body of a C function that takes a `capi.Call`, whose size is known.

    What it is not made for is None and compiled away.
    """
    out_kind, upstream_kind = (kind, np.float64) if grad else (None, None)
    soft_kind, target_kind = (kind, None) if soft else (None, np.int64)
    hard_kind = kind if weight and not soft else None
    weight_kind = kind if weight else None
    soft_weight_kind = kind if weight and soft else None
    cap_kind = np.float64 if softcap else None

    def compute(call):
        c = carray(call, (1,))[0]
        if c.size != size or c.rows < 0 or c.classes < 1:
            return BAD_ARGUMENT
        if not 0.0 <= c.label_smoothing <= 1.0 or not abs(c.z_loss) < np.inf:
            return BAD_ARGUMENT
        if not 0.0 <= c.softcap < np.inf or (c.softcap != 0.0) != softcap:
            return BAD_ARGUMENT
        if c.rows == 0:
            return 0
        if c.logits == 0 or c.losses == 0 or (c.grad != 0) != grad or (c.weight != 0) != weight:
            return BAD_ARGUMENT
        if (c.targets == 0) != soft or (c.probabilities != 0) != soft:
            return BAD_ARGUMENT
        given = array_at(c.targets, target_kind, c.rows)
        targets, bad_row = _checked(given, c.classes, c.ignore_index)
        if bad_row >= 0:
            return 1 + bad_row
        logits, losses = pointer_at(c.logits, kind), array_at(c.losses, kind, c.rows)
        labels, grads = pointer_at(c.probabilities, soft_kind), pointer_at(c.grad, out_kind)
        factors = array_at(c.weight, hard_kind, c.classes)
        of_rows = array_at(c.grad_output, upstream_kind, c.rows)
        upstream = _upstream(of_rows, c.grad_output, c.rows)
        cap = _given(c.softcap, cap_kind)
        if c.label_smoothing > 0.0:
            spread = array_at(c.weight, weight_kind, c.classes)
            _compute(c, logits, labels, grads, targets, factors, spread, upstream, losses, cap)
        else:  # no label but the target's, as `calls` has it
            spread = array_at(c.weight, soft_weight_kind, c.classes)
            _compute(c, logits, labels, grads, targets, factors, spread, upstream, losses, cap)
        return 0

    compute.__qualname__ = (
        f"matrix_{kind.__name__}_{grad}_{soft}_{weight}_{softcap}"  # for the cache
    )
    return compute
