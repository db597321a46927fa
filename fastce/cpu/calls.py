"""From checked arguments to kernel launches: which kernel, in what chunks, on how many threads."""

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastce._arguments import Options
from fastce.cpu import binary, curvature, loops
from fastce.cpu import softmax as softmaxes
from fastce.cpu.layout import CHUNK, Layout, blocks, element_blocks, passes, writable
from fastce.cpu.threads import launch

AnyArray = npt.NDArray[Any]

_NO_STATISTICS = (None, None, None)
# Bytes of a result from which it is written past the caches: measured, that saves a third of the
# time of copying beyond the last-level cache and costs half of it within.
STREAMED = 32 << 20
# Bytes of a row from which it pays: the ends of a row are written the ordinary way, and a line
# that is written in both ways costs a trip to memory (57 classes took five times as long, 813
# twice, 3000 as long, 11000 four fifths).
STREAMED_ROW = 16 << 10


class Curve(NamedTuple):
    """max(curved * p (1 - p) + straight * p, floor); |p - y| at the target if asked for."""

    curved: float = 0.0
    straight: float = 0.0
    floor: float = 0.0
    at_target: bool = False


class Targets(NamedTuple):
    """Integer targets as they were when they were checked, in memory that nobody else writes to."""

    checked: npt.NDArray[np.int64]
    bad_row: int  # the first whose target is no class, or -1
    valid: int  # rows that are not ignored
    weight: float  # of these


def check_targets(
    targets: npt.NDArray[np.int64], classes: int, ignore_index: int, weight: AnyArray | None
) -> Targets:
    """Copy and check: kernels go where a target sends them, so it must not change in between."""
    checked = np.empty_like(targets)
    return Targets(
        checked, *loops.check_targets(writable(targets), checked, classes, ignore_index, weight)
    )


def cross_entropy(
    axis: int,
    logits: AnyArray,
    hard: npt.NDArray[np.int64] | None,
    soft: AnyArray | None,
    weight: AnyArray | None,
    options: Options,
    *,
    upstream: npt.NDArray[np.float64] | None = None,
    nll_scale: float = 1.0,
    z_scale: float = 1.0,
    losses: AnyArray | None = None,
    statistics: tuple[AnyArray, AnyArray, AnyArray] | None = None,
    out: AnyArray | None = None,
) -> tuple[float, float]:
    """Fill `losses`, `statistics` (lse, entropy, predicted) and `out` where given.

    Returns the sums over rows of the weighted losses and of the z-loss terms.

    The gradient is that of the sum over rows of upstream * (nll_scale * nll + z_scale * z term).
    The order of the sums does not depend on where it goes.
    """
    shared = (axis, logits, hard, soft, weight, options, upstream, nll_scale, z_scale, statistics)
    divide = functools.partial(blocks, axis)
    sums = [_cross_entropy(*shared, *to) for to in passes(divide, (logits, soft), losses, out)]
    return sums[0]


def _cross_entropy(
    axis: int, logits: AnyArray, hard: AnyArray | None, soft: AnyArray | None,
    weight: AnyArray | None, options: Options, upstream: AnyArray | None, nll_scale: float,
    z_scale: float, statistics: tuple[AnyArray, AnyArray, AnyArray] | None,
    losses: AnyArray | None, out: AnyArray | None,
) -> tuple[float, float]:  # fmt: skip
    ignore_index, smoothing, z_loss, softcap = options[:4]
    keep = 1.0 - smoothing
    spread = smoothing / logits.shape[axis]
    hard_weight = weight if soft is None else None
    spread_weight = weight if soft is not None or spread > 0.0 else None
    per_row = (hard, upstream, losses, *(statistics or _NO_STATISTICS))
    streaming = _streaming(out, logits, axis)
    nll = z = 0.0
    for first, (z_base, soft_base, out_base), layout in blocks(axis, logits, soft, out):
        outer, inner, classes, chunk, parts, columns, _, strides = layout
        y, g, *results = _rows(first, outer * inner, *per_row)
        sums = np.empty((parts, 2))
        args = (
            z_base, y, soft_base, hard_weight, spread_weight, g, *results, out_base, sums,
            nll_scale, z_scale, streaming, ignore_index, keep, spread, z_loss, softcap,
            outer, inner, classes, chunk, *strides[0], *strides[1], *strides[2],
        )  # fmt: skip
        kernel = loops.cross_entropy_columns if columns else loops.cross_entropy_rows
        launch(kernel, args, layout.parallel, layout.parts)
        if parts == 1:  # small calls; a sum of one number is ten times slower as a reduction
            nll += sums.item(0)
            z += sums.item(1)
        else:
            nll += _sum(sums[:, 0])
            z += _sum(sums[:, 1])
    return nll, z


def softmax(
    axis: int, x: AnyArray, out: AnyArray, logarithm: bool,
    known: npt.NDArray[np.float64] | None = None,
) -> None:  # fmt: skip
    """softmax of x, or its logarithm, into `out`.

    Where x has not all classes, a row of `known` has the maximum and the rest of all.
    """
    streaming = _streaming(out, x, axis)
    for first, bases, layout in blocks(axis, x, out):
        rows = _rows(first, layout.outer * layout.inner, known)
        kernel = softmaxes.softmax_columns if layout.columns else softmaxes.softmax_rows
        args = (*bases, *rows, streaming, logarithm or None, *_pieces(layout))
        launch(kernel, args, layout.parallel, layout.parts)


def logsumexp(axis: int, x: AnyArray, result: AnyArray) -> None:
    """log of the sum of exp into `result`, one number per row."""
    for first, bases, layout in blocks(axis, x):
        rows = _rows(first, layout.outer * layout.inner, result)
        kernel = softmaxes.logsumexp_columns if layout.columns else softmaxes.logsumexp_rows
        launch(kernel, (*bases, *rows, *_pieces(layout)), layout.parallel, layout.parts)


def _pieces(layout: Layout) -> tuple[Any, ...]:
    """What kernels take of a layout, in their order."""
    return (*layout[:5], *itertools.chain.from_iterable(layout.strides))


def _sum(sums: npt.NDArray[np.float64]) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        return float(sums.sum())


def _rows(first: int, count: int, *arrays: AnyArray | None) -> list[AnyArray | None]:
    """The rows of per-row arrays that belong to a block."""
    found: list[AnyArray | None] = []
    for a in arrays:
        if a is not None:
            a = writable(a if a.size == count else a[first : first + count])
        found.append(a)
    return found


def _streaming(out: AnyArray | None, source: AnyArray, axis: int) -> bool:
    """Whether to write past the caches: a large result in memory of its own."""
    return (
        out is not None
        and out.nbytes >= STREAMED
        and (axis % out.ndim < out.ndim - 1 or out.shape[-1] * out.itemsize >= STREAMED_ROW)
        and out.flags.aligned
        and not np.may_share_memory(out, source)
    )


def gradient_hessian(
    axis: int,
    logits: AnyArray,
    targets: npt.NDArray[np.int64],
    weight: npt.NDArray[np.float64] | None,
    curve: Curve,
    grad: AnyArray,
    hess: AnyArray,
) -> None:
    """Gradient and diagonal curvature of the summed loss into `grad` and `hess`."""
    for first, bases, layout in blocks(axis, logits, grad, hess):
        rows = _rows(first, layout.outer * layout.inner, targets, weight)
        kernel = (
            curvature.gradient_hessian_columns
            if layout.columns
            else curvature.gradient_hessian_rows
        )
        args = (*bases, *rows, *curve, *_pieces(layout))
        launch(kernel, args, layout.parallel, layout.parts)


def hessian_vector_product(
    axis: int,
    logits: AnyArray,
    v: AnyArray,
    upstream: npt.NDArray[np.float64] | None,
    scale: float,
    out: AnyArray,
) -> None:
    """The Hessian of each row's loss times v, into `out`."""
    for first, bases, layout in blocks(axis, logits, v, out):
        rows = _rows(first, layout.outer * layout.inner, upstream)
        kernel = (
            curvature.hessian_vector_columns if layout.columns else curvature.hessian_vector_rows
        )
        args = (*bases, *rows, scale, *_pieces(layout))
        launch(kernel, args, layout.parallel, layout.parts)


def binary_cross_entropy(
    logits: AnyArray,
    targets: AnyArray,
    weight: AnyArray | None,
    positive: AnyArray | None,
    *,
    upstream: npt.NDArray[np.float64] | None = None,
    scale: float = 1.0,
    losses: AnyArray | None = None,
    out: AnyArray | None = None,
) -> float:
    """Fill `losses` and `out` where given; return the sum of the losses of all elements."""
    read = (logits, targets, weight, positive)
    shared = (read, upstream, scale)
    to = passes(element_blocks, read, losses, out)
    sums = [_binary_cross_entropy(*shared, *arrays) for arrays in to]
    return sums[0]


def _binary_cross_entropy(
    read: tuple[AnyArray | None, ...], upstream: AnyArray | None, scale: float,
    losses: AnyArray | None, out: AnyArray | None,
) -> float:  # fmt: skip
    total = 0.0
    for first, bases, layout in element_blocks(*read, out):
        outer, inner, count = layout[:3]
        sums = np.empty(outer * inner * -(-count // CHUNK))
        rows = _rows(first * count, outer * inner * count, upstream, losses)
        args = (
            *bases, *rows, sums, scale, outer, inner, count,
            min(count, CHUNK), *itertools.chain.from_iterable(layout.strides),
        )  # fmt: skip
        launch(binary.binary_cross_entropy, args, layout.parallel, len(sums))
        total += _sum(sums)
    return total
