"""Rows of a matrix for callers that are not Python: C functions that touch no Python object.

They run the kernels of `loops` in the same chunks as calls from NumPy do, so that a matrix gets the
same bits, and its machine code is the same.
"""

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from fastce.cpu import loops
from fastce.cpu.calls import STREAMED, STREAMED_ROW
from fastce.cpu.jit import device
from fastce.cpu.layout import CHUNK, FEW_CLASSES
from fastce.cpu.memory import item_size, position, zeros
from fastce.cpu.tiles import count_tiles
from fastce.cpu.vector import lanes

BAD_ARGUMENT = -1  # what C functions return beside 0 and, for a bad target, 1 + its row


@device
def across(base, classes, class_stride, out, out_class_stride):
    """Whether lanes run across rows: few classes, or classes that do not lie side by side."""
    apart = class_stride != item_size(base)
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
    logits, targets, soft, upstream, losses, out, scale, ignore_index, smoothing, z_loss,
    outer, inner, classes, strides, soft_strides, out_strides, columns, chunk, sums, counter,
):  # fmt: skip
    """Claim chunks of rows until none is left; strides are of outer rows, inner rows, classes."""
    logits_base, soft_base, out_base = _base(logits), _base(soft), _base(out)
    streaming = _streaming(logits, out, outer * inner, classes, columns)
    keep = 1.0 - smoothing
    spread = smoothing / classes
    if columns:
        loops.cross_entropy_columns(
            logits_base, targets, soft_base, None, None, upstream, losses, None, None, None,
            out_base, sums, scale, scale, streaming, ignore_index, keep, spread, z_loss, None,
            outer, inner, classes, chunk, strides[0], strides[1], strides[2],
            soft_strides[0], soft_strides[1], soft_strides[2],
            out_strides[0], out_strides[1], out_strides[2], counter,
        )  # fmt: skip
    else:
        loops.cross_entropy_rows(
            logits_base, targets, soft_base, None, None, upstream, losses, None, None, None,
            out_base, sums, scale, scale, streaming, ignore_index, keep, spread, z_loss, None,
            outer, inner, classes, chunk, strides[0], strides[1], None,
            soft_strides[0], soft_strides[1], None, out_strides[0], out_strides[1], None, counter,
        )  # fmt: skip


@device
def _matrix(
    logits, rows, classes, row_stride, class_stride, targets, ignore_index, smoothing, z_loss,
    losses, upstream, scale, out, out_row_stride, out_class_stride,
):  # fmt: skip
    """Check the arguments of a C function, then compute."""
    if rows < 0 or classes < 1 or not 0.0 <= smoothing <= 1.0 or not abs(z_loss) < np.inf:
        return BAD_ARGUMENT
    if rows == 0:
        return 0
    hard = carray(targets, (rows,))
    bad_row = loops.check_targets(hard, classes, ignore_index, None)[0]
    if bad_row >= 0:
        return 1 + bad_row
    columns = across(logits, classes, class_stride, out, out_class_stride)
    chunk, parts = chunks(logits, 1, rows, classes, columns)
    cross_entropy(
        logits, hard, None, upstream, carray(losses, (rows,)), out, scale, ignore_index, smoothing,
        z_loss, 1, rows, classes, (0, row_stride, class_stride), (0, 0, 0),
        (0, out_row_stride, out_class_stride), columns, chunk, np.empty((parts, 2)),
        np.zeros(1, np.int64),
    )  # fmt: skip
    return 0


def matrix_loss(
    logits, rows, classes, row_stride, class_stride, targets, ignore_index, smoothing, z_loss,
    losses,
):  # fmt: skip
    """The C function without a gradient."""
    return _matrix(
        logits, rows, classes, row_stride, class_stride, targets, ignore_index, smoothing, z_loss,
        losses, None, 1.0, None, 0, 0,
    )  # fmt: skip


def matrix_loss_and_grad(
    logits, rows, classes, row_stride, class_stride, targets, ignore_index, smoothing, z_loss,
    losses, grad_output, grad, grad_row_stride, grad_class_stride,
):  # fmt: skip
    """The C function with a gradient."""
    upstream = np.ones(max(rows, 0))
    if position(grad_output) != 0:
        upstream = carray(grad_output, (max(rows, 0),))
    return _matrix(
        logits, rows, classes, row_stride, class_stride, targets, ignore_index, smoothing, z_loss,
        losses, upstream, 1.0, grad, grad_row_stride, grad_class_stride,
    )  # fmt: skip
