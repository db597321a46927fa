"""Cross-entropy of logits in chunks."""

from typing import Any

import numpy as np
import numpy.typing as npt

from fastce import _arguments as arguments
from fastce import shards
from fastce._arguments import Reduction
from fastce.dask._chunks import chunked, key_of
from fastce.dask._graph import Index, Key, in_chunk, pick
from fastce.dask._labelled import Labelled
from fastce.losses import CrossEntropyStats


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
    return _CrossEntropy(logits, targets, axis, weight, options).loss()


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
    grad_output: Any = None,
) -> tuple[Any, Any]:
    """Cross-entropy of chunked logits and its gradient, lazily.

    Parameters
    ----------
    logits, targets, axis, weight, ignore_index, label_smoothing, z_loss, softcap
        As in `cross_entropy`.
    reduction, normalizer
        As in `cross_entropy`.
    grad_output : float, array_like or dask.array.Array, optional
        As in `fastce.cross_entropy_and_grad`; an array is rechunked to fit the logits.

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
    call = _CrossEntropy(logits, targets, axis, weight, options, grad_output)
    return call.loss(), call.grad()


def cross_entropy_stats(
    logits: Any,
    targets: Any,
    *,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
) -> CrossEntropyStats:
    """Loss, log-sum-exp, entropy and prediction of each row of chunked logits, lazily.

    Parameters
    ----------
    logits, targets, axis, weight, ignore_index
        As in `cross_entropy`.

    Returns
    -------
    CrossEntropyStats
        Of dask arrays, those of rows in the chunks of the rows; `total_weight`, of no dimension,
        needs the targets alone.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `cross_entropy` does.

    Notes
    -----
    One look at each chunk of the logits tells all. What is kept of a row and chunk until all
    classes are known is 112 bytes; 184 with probabilities as targets.

    Examples
    --------
    >>> import dask
    >>> import dask.array as da
    >>> import fastce.dask
    >>> logits = da.from_array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 1.0, 1.0]], chunks=(2, 2))
    >>> (stats,) = dask.compute(fastce.dask.cross_entropy_stats(logits, [0, 2, -100]))
    >>> print(stats.entropy.round(4), stats.predicted, stats.total_weight)
    [0.8324 0.5243 0.    ] [ 0  1 -1] 2.0
    """
    options = arguments.options(ignore_index, 0.0, 0.0, None, "none", None)
    return _CrossEntropy(logits, targets, axis, weight, options, entropy=True).stats()


class _CrossEntropy:
    """The partials of all classes for each row of blocks, and what follows from them."""

    def __init__(
        self, logits: Any, targets: Any, axis: int, weight: npt.ArrayLike | None,
        options: arguments.Options, grad_output: Any = None, entropy: bool = False,
    ) -> None:  # fmt: skip
        chunked("logits", logits)
        self._call = call = Labelled(
            "cross-entropy", "logits", logits, targets, axis, weight, options, grad_output,
            sources=(logits,),
        )  # fmt: skip
        self._options, self._graph, self._grid = options, call.graph, call.grid
        self._totals: dict[Index, Key] = {}
        for row in call.grid.rows():
            parts = [
                call.graph.task(
                    in_chunk(call.grid.start(block), shards.partial),
                    *self._arrays(row, block), classes=call.fit.classes,
                    ignore_index=options.ignore_index, label_smoothing=options.label_smoothing,
                    softcap=options.softcap, entropy=entropy, **call.part(block),
                )
                for block in call.grid.along(row)
            ]  # fmt: skip
            self._totals[row] = call.graph.tree(shards.merge, parts)

    def _arrays(self, row: Index, block: Index) -> tuple[Key, Key]:
        """Logits and labels of a block."""
        return key_of(self._call.logits, block), self._call.labels(row, block)

    def loss(self) -> Any:
        return self._call.loss(self._totals)

    def stats(self) -> CrossEntropyStats:
        call, graph, grid = self._call, self._graph, self._grid
        finished = {
            row: graph.task(shards.finish, total, reduction="none")
            for row, total in self._totals.items()
        }

        def of_rows(name: str, dtype: npt.DTypeLike = call.dtype) -> Any:
            """One field of `shards.ShardedLoss`."""
            item = shards.ShardedLoss._fields.index(name)
            blocks = {row: graph.task(pick, key, item=item) for row, key in finished.items()}
            return graph.array(blocks, grid.row_chunks, dtype)

        weight = graph.number(graph.task(_weight, call.sums), np.float64)
        return CrossEntropyStats(
            of_rows("loss"), of_rows("lse"), of_rows("entropy"), of_rows("predicted", np.int64),
            weight,
        )  # fmt: skip

    def grad(self) -> Any:
        call, graph, grid = self._call, self._graph, self._grid
        sums = call.divisors
        blocks = grid.without_classes(graph, call.logits.dtype)
        for row, total in self._totals.items():
            for block in grid.along(row):
                blocks[block] = graph.task(
                    _grad, *self._arrays(row, block), total, sums, call.upstream.key(row),
                    options=self._options, scalar=call.upstream.scalar, **call.part(block),
                )  # fmt: skip
        return graph.array(blocks, grid.chunks, call.logits.dtype)


def _weight(sums: shards.Sums) -> np.float64:
    return np.float64(sums.weight)


def _grad(
    z: Any, y: Any, total: shards.Partial, sums: shards.Sums, g: Any, *,
    options: arguments.Options, scalar: float, **part: Any,
) -> Any:  # fmt: skip
    factor, z_loss = sums.scales(options)
    return shards.grad(
        z, y, total, z_loss=z_loss, reduction="none",
        grad_output=scalar * factor * (1.0 if g is None else g), **part,
    )  # fmt: skip
