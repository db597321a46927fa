"""Negative log likelihood of log-probabilities in chunks."""

from typing import Any

import numpy as np
import numpy.typing as npt

import fastce
from fastce import _arguments as arguments
from fastce import likelihood, shards
from fastce._arguments import AnyArray, Reduction
from fastce._call import Call, inverse
from fastce.dask._chunks import chunked, key_of
from fastce.dask._graph import Index, Key, add, in_chunk
from fastce.dask._labelled import Labelled


def nll_loss(
    log_probs: Any,
    targets: Any,
    *,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | None = None,
) -> Any:
    """Negative log likelihood of labels under chunked log-probabilities, lazily.

    Parameters
    ----------
    log_probs : dask.array.Array
        As in `fastce.nll_loss`, in any chunks of known sizes.
    targets, axis, weight, ignore_index, reduction, normalizer
        As in `fastce.dask.cross_entropy`.

    Returns
    -------
    dask.array.Array
        As from `fastce.dask.cross_entropy`.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `fastce.dask.cross_entropy` does.

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> import fastce.dask
    >>> log_probs = da.from_array(np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]), chunks=(1, 2))
    >>> print(fastce.dask.nll_loss(log_probs, [0, 1], reduction="none").compute().round(4))
    [0.6931 0.2231]
    """
    return _NLL(log_probs, targets, axis, weight, ignore_index, reduction, normalizer).loss()


def nll_loss_and_grad(
    log_probs: Any,
    targets: Any,
    *,
    axis: int = -1,
    weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | None = None,
    grad_output: Any = None,
) -> tuple[Any, Any]:
    """Negative log likelihood of chunked log-probabilities and its gradient, lazily.

    Parameters
    ----------
    log_probs, targets, axis, weight, ignore_index, reduction, normalizer
        As in `nll_loss`.
    grad_output : float, array_like or dask.array.Array, optional
        As in `fastce.dask.cross_entropy_and_grad`.

    Returns
    -------
    loss : dask.array.Array
        As from `nll_loss`.
    grad : dask.array.Array
        Shaped, typed and chunked like `log_probs`.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `nll_loss` does.

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> import fastce.dask
    >>> log_probs = da.from_array(np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]), chunks=(1, 2))
    >>> print(fastce.dask.nll_loss_and_grad(log_probs, [0, 1])[1].compute())
    [[-0.5  0.   0. ]
     [ 0.  -0.5  0. ]]
    """
    call = _NLL(log_probs, targets, axis, weight, ignore_index, reduction, normalizer, grad_output)
    return call.loss(), call.grad()


class _NLL:
    """One checked call."""

    def __init__(
        self, log_probs: Any, targets: Any, axis: int, weight: npt.ArrayLike | None,
        ignore_index: int, reduction: str, normalizer: float | None, grad_output: Any = None,
    ) -> None:  # fmt: skip
        options = arguments.options(ignore_index, 0.0, 0.0, None, reduction, normalizer)
        chunked("log_probs", log_probs)
        self._call = Labelled(
            "nll-loss", "log_probs", log_probs, targets, axis, weight, options, grad_output,
            sources=(log_probs,),
        )  # fmt: skip

    def _arrays(self, row: Index, block: Index) -> tuple[Key, Key]:
        """Log-probabilities and labels of a block."""
        return key_of(self._call.logits, block), self._call.labels(row, block)

    def loss(self) -> Any:
        call, graph, grid = self._call, self._call.graph, self._call.grid
        losses: dict[Index, Key] = {}
        for row in grid.rows():
            parts = [
                graph.task(
                    in_chunk(grid.start(block), _losses), *self._arrays(row, block),
                    classes=call.fit.classes, ignore_index=call.options.ignore_index,
                    **call.part(block),
                )
                for block in grid.along(row)
            ]  # fmt: skip
            losses[row] = graph.tree(add, parts)
        if call.options.reduction == "none":
            rounded = {row: graph.task(_rounded, x, dtype=call.dtype) for row, x in losses.items()}
            return graph.array(rounded, grid.row_chunks, call.dtype)
        return call.mean(graph.tree(add, [graph.task(_sum, x) for x in losses.values()]))

    def grad(self) -> Any:
        call, graph, grid = self._call, self._call.graph, self._call.grid
        sums = call.divisors
        blocks = grid.without_classes(graph, call.logits.dtype)
        for row in grid.rows():
            for block in grid.along(row):
                blocks[block] = graph.task(
                    in_chunk(grid.start(block), _grad), *self._arrays(row, block), sums,
                    call.upstream.key(row), options=call.options, scalar=call.upstream.scalar,
                    classes=call.fit.classes, **call.part(block),
                )  # fmt: skip
        return graph.array(blocks, grid.chunks, call.logits.dtype)


def _own(y: AnyArray, size: int, class_offset: int, classes: int, ignore_index: int) -> AnyArray:
    """The labels counted from the first class of a slice; -1 for those of other slices."""
    if y.dtype.kind not in "iu":
        return y
    shards.target_sums(y, classes, None, ignore_index)  # refuses a bad one
    own = y.astype(np.int64) - class_offset
    return np.where((y == ignore_index) | (own < 0) | (own >= size), -1, own)


def _losses(
    lp: AnyArray, y: AnyArray, *, axis: int, weight: AnyArray | None, class_offset: int,
    classes: int, ignore_index: int,
) -> npt.NDArray[np.float64]:  # fmt: skip
    own = _own(y, lp.shape[axis], class_offset, classes, ignore_index)
    call = Call("log_probs", lp, own, axis, weight, arguments.Options(ignore_index=-1))
    return likelihood.row_losses(call, *likelihood.labels(call))


def _grad(
    lp: AnyArray, y: AnyArray, sums: shards.Sums, g: Any, *, options: arguments.Options,
    scalar: float, axis: int, weight: AnyArray | None, class_offset: int, classes: int,
) -> AnyArray:  # fmt: skip
    own = _own(y, lp.shape[axis], class_offset, classes, options.ignore_index)
    by = inverse(sums.divisors(options)[0])
    return fastce.nll_loss_and_grad(
        lp, own, axis=axis, weight=weight, ignore_index=-1, reduction="none",
        grad_output=scalar * by * (1.0 if g is None else g),
    )[1]  # fmt: skip


def _rounded(losses: npt.NDArray[np.float64], *, dtype: np.dtype[Any]) -> AnyArray:
    with np.errstate(over="ignore"):
        return losses.astype(dtype)


def _sum(losses: npt.NDArray[np.float64]) -> float:
    with np.errstate(all="ignore"):
        return float(losses.sum())
