"""Cross-entropy of dask arrays, chunked along rows, classes or both. Needs ``fastce[dask]``.

`cross_entropy` and `cross_entropy_and_grad` are lazy: they read shapes and dtypes, and return dask
arrays. Each chunk of logits is summarised where it is, in one short record per row (see
`fastce.shards`); records of one row of chunks are merged along a tree, and what is small, sums over
rows, along another. No chunk is joined to another, none is kept, and a gradient has the chunks of
the logits.

Results do not depend on workers, their number, or on tasks that are done twice, to the last bit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import delayed

from fastce import _arguments as arguments
from fastce import shards
from fastce._arguments import Reduction

# Results that one task merges: a tree of few levels, and little to hold at a time.
BRANCHES = 8


def cross_entropy(
    logits: Any,
    targets: Any,
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
    """Cross-entropy of chunked logits, lazily.

    Parameters
    ----------
    logits : dask.array.Array
        As in `fastce.cross_entropy`, in any chunks of known sizes.
    targets : dask.array.Array or array_like
        As there; rechunked to fit the logits.
    axis, weight, ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer
        As there. `weight` is an ordinary array.

    Returns
    -------
    dask.array.Array
        The loss: of no dimension, or for "none" shaped and chunked like the rows.

    Raises
    ------
    TypeError, ValueError
        At once, as `fastce.cross_entropy` does; ValueError also if sizes of chunks are unknown.
    IndexError
        When computed, if a target is out of range; the message says in which chunk.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastce.dask
    >>> logits = da.from_array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 1.0, 1.0]], chunks=(2, 2))
    >>> loss = fastce.dask.cross_entropy(logits, [0, 1, 2])
    >>> print(f"{loss.compute():.4f}")
    0.5587
    """
    options = arguments.options(
        ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer
    )
    return _Chunks(logits, targets, axis, weight, options).loss()


def cross_entropy_and_grad(
    logits: Any,
    targets: Any,
    *,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    normalizer: float | None = None,
    grad_output: float | None = None,
) -> tuple[Any, Any]:
    """Cross-entropy of chunked logits and its gradient, lazily.

    Parameters
    ----------
    logits, targets, axis, weight, ignore_index, label_smoothing, z_loss, softcap
        As in `cross_entropy`.
    reduction, normalizer
        As in `cross_entropy`.
    grad_output : float, optional
        Upstream gradient, one number.

    Returns
    -------
    loss : dask.array.Array
        As from `cross_entropy`.
    grad : dask.array.Array
        Shaped, typed and chunked like `logits`.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `cross_entropy` does.

    Notes
    -----
    What the mean divides by is known from the targets alone, so that the gradient of a row of
    chunks waits for this row of chunks and not for all logits: these need not fit into memory, nor
    be computed twice if both results are computed together.

    Examples
    --------
    >>> import dask
    >>> import dask.array as da
    >>> import fastce.dask
    >>> logits = da.from_array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]], chunks=(1, 2))
    >>> loss, grad = dask.compute(*fastce.dask.cross_entropy_and_grad(logits, [0, 1]))
    >>> print(grad.round(4))
    [[-0.1674  0.1224  0.045 ]
     [ 0.021  -0.0781  0.0571]]
    """
    options = arguments.options(
        ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer
    )
    scalar, per_row = arguments.upstream(grad_output, (), reduction)
    if per_row is not None:
        raise ValueError("grad_output: expected a single number, got an array")
    chunks = _Chunks(logits, targets, axis, weight, options)
    return chunks.loss(), chunks.grad(scalar)


class _Chunks:
    """Logits and targets block by block, and the partials of all classes for each row of blocks."""

    def __init__(
        self, logits: Any, targets: Any, axis: int, weight: npt.ArrayLike | None,
        options: arguments.Options,
    ) -> None:  # fmt: skip
        if not isinstance(logits, da.Array):
            raise TypeError(f"logits: expected a dask array, got {type(logits).__name__}")
        if not isinstance(targets, da.Array):
            targets = da.from_array(np.asarray(targets))
        if any(np.isnan(size) for a in (logits, targets) for size in a.shape):
            raise ValueError(
                "logits, targets: expected chunks of known sizes; see compute_chunk_sizes of dask"
            )
        arguments.float_array("logits", np.empty(0, logits.dtype))
        fit = arguments.signature(
            "logits", logits.dtype, logits.shape, axis, targets.dtype, targets.shape,
            options.ignore_index,
        )  # fmt: skip
        self._options, self._fit, self._dtype = options, fit, np.dtype(fit.dtype)
        self._chunks, self._logits_dtype = logits.chunks, logits.dtype
        self._weight = arguments.class_weight("weight", weight, fit.classes, logits.dtype)
        self._row_chunks = tuple(c for k, c in enumerate(logits.chunks) if k != fit.axis)
        self._blocks = blocks_of(logits)
        like = self._row_chunks if fit.hard else logits.chunks
        self._targets = blocks_of(targets.rechunk(like) if targets.ndim else targets)
        self._totals = np.empty(tuple(len(c) for c in self._row_chunks), object)
        for index in np.ndindex(self._totals.shape):
            parts = [
                task(
                    _in_chunk, _start(logits.chunks, whole), _partial, self._blocks[whole],
                    self._labels(whole, index), options, classes=fit.classes,
                    **self._slice(whole),
                )
                for whole in self._along(index)
            ]  # fmt: skip
            self._totals[index] = tree(shards.merge, parts)

    def _along(self, index: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Blocks of logits in a row of blocks."""
        at = self._fit.axis
        return [(*index[:at], k, *index[at:]) for k in range(len(self._chunks[at]))]

    def _labels(self, whole: tuple[int, ...], index: tuple[int, ...]) -> Any:
        return self._targets[index if self._fit.hard else whole]

    def _slice(self, whole: tuple[int, ...]) -> dict[str, Any]:
        """Where the classes of a block are, and their weights."""
        sizes, k = self._chunks[self._fit.axis], whole[self._fit.axis]
        start = sum(sizes[:k])
        weight = None if self._weight is None else self._weight[start : start + sizes[k]]
        return {"class_offset": start, "axis": self._fit.axis, "weight": weight}

    def loss(self) -> Any:
        options = self._options
        if options.reduction == "none":
            blocks = np.empty(self._totals.shape, object)
            for index, total in np.ndenumerate(self._totals):
                shape = tuple(c[k] for c, k in zip(self._row_chunks, index, strict=True))
                blocks[index] = da.from_delayed(task(_losses, total, options), shape, self._dtype)
            return _joined(blocks)
        sums = tree(_add, [task(_sums, total, options) for total in self._totals.ravel()])
        loss = task(_reduce, sums, options, self._dtype)
        return da.from_delayed(loss, (), self._dtype)

    def grad(self, scalar: float) -> Any:
        weigh = self._options.reduction == "mean" and self._options.normalizer is None
        sums: Any = shards.Sums(0.0, 0.0, 0.0, 0.0)
        if weigh and self._fit.hard:
            given = (self._fit.classes, self._weight, self._options.ignore_index)
            parts = [
                task(_in_chunk, _start(self._row_chunks, k), shards.target_sums, y, *given)
                for k, y in np.ndenumerate(self._targets)
            ]
            sums = tree(_add, parts)
        elif weigh:
            sums = shards.Sums(0.0, 0.0, *[float(self._fit.row_count)] * 2)
        blocks = np.empty(self._blocks.shape, object)
        for index, total in np.ndenumerate(self._totals):
            for whole in self._along(index):
                shape = tuple(c[k] for c, k in zip(self._chunks, whole, strict=True))
                part = task(
                    _grad, self._blocks[whole], self._labels(whole, index), total, sums,
                    self._options, scalar, **self._slice(whole),
                )  # fmt: skip
                blocks[whole] = da.from_delayed(part, shape, self._logits_dtype)
        return _joined(blocks)


def _start(chunks: tuple[tuple[int, ...], ...], index: tuple[int, ...]) -> tuple[int, ...]:
    """Where a chunk starts."""
    return tuple(sum(c[:k]) for c, k in zip(chunks, index, strict=True))


def blocks_of(array: Any) -> npt.NDArray[Any]:
    """The blocks of an array, each as a task."""
    return np.asarray(array.to_delayed(), object)


def _joined(blocks: npt.NDArray[Any]) -> Any:
    """The array of which these are the blocks."""
    return da.block(blocks.tolist())


def tree(merge: Callable[..., Any], parts: Sequence[Any]) -> Any:
    """Merge parts, some at a time, until one is left."""
    while len(parts) > 1:
        parts = [task(merge, *parts[k : k + BRANCHES]) for k in range(0, len(parts), BRANCHES)]
    return parts[0]


def task(function: Callable[..., Any], *args: Any, **given: Any) -> Any:
    """A call to be made later, perhaps more than once."""
    return delayed(function, pure=False)(*args, **given)


def _in_chunk(
    start: tuple[int, ...], function: Callable[..., Any], *args: Any, **given: Any
) -> Any:
    """Call a function of a chunk; what it says of a bad target is said of the chunk."""
    try:
        return function(*args, **given)
    except IndexError as error:
        raise IndexError(f"{error}, in the chunk that starts at {start}") from None


def _partial(z: Any, y: Any, options: arguments.Options, **given: Any) -> shards.Partial:
    return shards.partial(
        z, y, ignore_index=options.ignore_index, label_smoothing=options.label_smoothing,
        softcap=options.softcap, **given,
    )  # fmt: skip


def _sums(total: shards.Partial, options: arguments.Options) -> shards.Sums:
    return shards.row_sums(total, options.z_loss)


def _add(*parts: shards.Sums) -> shards.Sums:
    return shards.Sums(*map(sum, zip(*parts, strict=True)))


def _reduce(sums: shards.Sums, options: arguments.Options, dtype: np.dtype[Any]) -> Any:
    return sums.loss(options, dtype)


def _losses(total: shards.Partial, options: arguments.Options) -> Any:
    return shards.finish(total, z_loss=options.z_loss, reduction="none").loss


def _grad(
    z: Any, y: Any, total: shards.Partial, sums: shards.Sums, options: arguments.Options,
    scalar: float, **given: Any,
) -> Any:  # fmt: skip
    factor, z_loss = sums.scales(options)
    return shards.grad(
        z, y, total, z_loss=z_loss, reduction="sum", grad_output=scalar * factor, **given
    )
