"""From checked arguments to kernel launches: which kernel, in what chunks, on how many threads."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastce.cpu import binary, curvature, loops
from fastce.cpu.layout import Block, blocks, writable
from fastce.cpu.threads import launch

AnyArray = npt.NDArray[Any]

# Logits per chunk: what a thread claims at a time, some ten microseconds of work.  Results depend
# on it (the order of the final sum), so that it must not depend on the number of threads.
CHUNK = 32768
# Logits from which more threads are worth waking: measured, waking one costs some 40 microseconds.
PARALLEL = 131072
# Bytes of a result from which it is written past the caches: measured, that saves a third of the
# time of copying beyond the last-level cache and costs half of it within.
STREAMED = 32 << 20


class Totals(NamedTuple):
    """Sums over rows: of the weighted losses, of the z-loss terms."""

    nll: float
    z: float


class Options(NamedTuple):
    """The numbers that shape a loss."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None


class Curve(NamedTuple):
    """max(curved * p (1 - p) + straight * p, floor); |p - y| at the target if asked for."""

    curved: float = 0.0
    straight: float = 0.0
    floor: float = 0.0
    at_target: bool = False


class Mass(NamedTuple):
    """What hard targets amount to: the first row with a bad one or -1, rows that count, weight."""

    bad_row: int
    rows: int
    weight: float


def check_targets(
    targets: npt.NDArray[np.int64], classes: int, ignore_index: int, weight: AnyArray | None
) -> Mass:
    """Look at every target once."""
    return Mass(*loops.check_targets(writable(targets), classes, ignore_index, weight))


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
) -> Totals:
    """Fill `losses`, `statistics` (lse, entropy, predicted) and `out` where given; sum the losses.

    The gradient is that of the sum over rows of upstream * (nll_scale * nll + z_scale * z term).
    """
    keep = 1.0 - options.label_smoothing
    nll = z = 0.0
    for block in blocks(axis, logits, soft, out):
        spread = options.label_smoothing / block.shape[2]
        spread_weight = weight if soft is not None or spread > 0.0 else None
        chunk, parts = _chunks(block)
        sums = np.empty((parts, 2))
        streaming = () if block.columns else (_streaming(out, logits),)
        z_place, soft_place, out_place = map(block.kernel_arguments, block.places)
        args = (
            block.shape, *z_place, _part(hard, block), *soft_place,
            weight if soft is None else None, spread_weight, options.ignore_index, keep, spread,
            options.z_loss, options.softcap, _part(upstream, block), nll_scale, z_scale,
            _part(losses, block), *(_part(a, block) for a in statistics or (None, None, None)),
            *out_place, *streaming, sums, chunk,
        )  # fmt: skip
        kernel = loops.cross_entropy_columns if block.columns else loops.cross_entropy_rows
        launch(kernel, args, _parallel(block))
        nll += _sum(sums[:, 0])
        z += _sum(sums[:, 1])
    return Totals(nll, z)


def softmax(axis: int, x: AnyArray, out: AnyArray, logarithm: bool) -> None:
    """softmax of x, or its logarithm, into `out`."""
    for block in blocks(axis, x, out):
        chunk, parts = _chunks(block)
        x_place, out_place = map(block.kernel_arguments, block.places)
        streaming = () if block.columns else (_streaming(out, x),)
        args = (block.shape, *x_place, *out_place, *streaming, logarithm or None, parts, chunk)
        kernel = loops.softmax_columns if block.columns else loops.softmax_rows
        launch(kernel, args, _parallel(block))


def logsumexp(axis: int, x: AnyArray, result: AnyArray) -> None:
    """log of the sum of exp into `result`, one number per row."""
    for block in blocks(axis, x):
        chunk, parts = _chunks(block)
        place = block.kernel_arguments(block.places[0])
        args = (block.shape, *place, _part(result, block), parts, chunk)
        kernel = loops.logsumexp_columns if block.columns else loops.logsumexp_rows
        launch(kernel, args, _parallel(block))


def _sum(sums: npt.NDArray[np.float64]) -> float:
    # A sum of one number, which small calls have, is ten times slower as a reduction.
    if sums.size == 1:
        return float(sums[0])
    with np.errstate(invalid="ignore", over="ignore"):
        return float(sums.sum())


def _chunks(block: Block) -> tuple[int, int]:
    """(pieces per chunk, number of chunks); a piece is a row, or a tile of rows across lanes."""
    outer, inner, classes = block.shape
    tiles = inner if inner < block.width else -(-inner // block.width)
    pieces = outer * tiles if block.columns else outer * inner
    each = classes * block.width if block.columns else classes
    chunk = max(1, CHUNK // each)
    return chunk, -(-pieces // chunk)


def _part(array: AnyArray | None, block: Block) -> AnyArray | None:
    """The rows of a per-row array that belong to a block."""
    if array is None:
        return None
    outer, inner, _ = block.shape
    return writable(array[block.first : block.first + outer * inner])


def _streaming(out: AnyArray | None, source: AnyArray) -> bool:
    """Whether to write past the caches: a large result in memory of its own."""
    return (
        out is not None
        and out.nbytes >= STREAMED
        and out.flags.aligned
        and not np.may_share_memory(out, source)
    )


def _parallel(block: Block) -> bool:
    return block.elements >= PARALLEL


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
    for block in blocks(axis, logits, grad, hess):
        chunk, parts = _chunks(block)
        z_place, grad_place, hess_place = map(block.kernel_arguments, block.places)
        args = (
            block.shape, *z_place, _part(targets, block), _part(weight, block), *curve,
            *grad_place, *hess_place, parts, chunk,
        )  # fmt: skip
        kernel = (
            curvature.gradient_hessian_columns if block.columns else curvature.gradient_hessian_rows
        )
        launch(kernel, args, _parallel(block))


def hessian_vector_product(
    axis: int,
    logits: AnyArray,
    v: AnyArray,
    upstream: npt.NDArray[np.float64] | None,
    scale: float,
    out: AnyArray,
) -> None:
    """The Hessian of each row's loss times v, into `out`."""
    for block in blocks(axis, logits, v, out):
        chunk, parts = _chunks(block)
        z_place, v_place, out_place = map(block.kernel_arguments, block.places)
        args = (
            block.shape, *z_place, *v_place, _part(upstream, block), scale, *out_place,
            parts, chunk,
        )  # fmt: skip
        kernel = (
            curvature.hessian_vector_columns if block.columns else curvature.hessian_vector_rows
        )
        launch(kernel, args, _parallel(block))


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
    total = 0.0
    for block in blocks(-1, logits, targets, weight, positive, out):
        outer, inner, count = block.shape
        sums = np.empty(outer * inner * -(-count // CHUNK))
        places = [block.row_arguments(place) for place in block.places]
        first = block.first * count
        part = slice(first, first + block.elements)
        args = (
            block.shape, *places[0], *places[1], *places[2], *places[3],
            None if upstream is None else upstream[part], scale,
            None if losses is None else losses[part], *places[4], sums, min(count, CHUNK),
        )  # fmt: skip
        launch(binary.binary_cross_entropy, args, _parallel(block))
        total += _sum(sums)
    return total
