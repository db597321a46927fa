"""Binary cross-entropy of logits in chunks."""

from typing import Any

import numpy as np

from fastce import _arguments as arguments
from fastce import binary
from fastce._arguments import AnyArray, Reduction
from fastce.dask._chunks import Upstream, any_array, chunked, in_chunks, key_of
from fastce.dask._graph import Graph, Index, Key, add, pick


def binary_cross_entropy(
    logits: Any,
    targets: Any,
    *,
    weight: Any = None,
    pos_weight: Any = None,
    reduction: Reduction = "mean",
) -> Any:
    """Cross-entropy between yes-or-no labels and the sigmoid of chunked logits, lazily.

    Parameters
    ----------
    logits : dask.array.Array
        As in `fastce.binary_cross_entropy`, in any chunks of known sizes.
    targets, weight, pos_weight : dask.array.Array or array_like
        As there; rechunked to fit the logits.
    reduction
        As there.

    Returns
    -------
    dask.array.Array
        The loss: of no dimension, or for "none" shaped and chunked like `logits`.

    Raises
    ------
    TypeError, ValueError
        At once, as `fastce.binary_cross_entropy` does; ValueError also if sizes of chunks are
        unknown.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastce.dask
    >>> logits = da.from_array([0.0, 2.0, -3.0], chunks=2)
    >>> print(f"{fastce.dask.binary_cross_entropy(logits, [1, 1, 0]).compute():.4f}")
    0.2896
    """
    return _Binary(logits, targets, weight, pos_weight, reduction).loss()


def binary_cross_entropy_and_grad(
    logits: Any,
    targets: Any,
    *,
    weight: Any = None,
    pos_weight: Any = None,
    reduction: Reduction = "mean",
    grad_output: Any = None,
) -> tuple[Any, Any]:
    """Binary cross-entropy of chunked logits and its gradient, lazily.

    Parameters
    ----------
    logits, targets, weight, pos_weight, reduction
        As in `binary_cross_entropy`.
    grad_output : float, array_like or dask.array.Array, optional
        As in `fastce.binary_cross_entropy_and_grad`.

    Returns
    -------
    loss : dask.array.Array
        As from `binary_cross_entropy`.
    grad : dask.array.Array
        Shaped, typed and chunked like `logits`.

    Raises
    ------
    TypeError, ValueError
        As `binary_cross_entropy` does.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastce.dask
    >>> logits = da.from_array([0.0, 2.0, -3.0], chunks=2)
    >>> loss, grad = fastce.dask.binary_cross_entropy_and_grad(logits, [1, 1, 0], reduction="sum")
    >>> print(grad.compute().round(4))
    [-0.5    -0.1192  0.0474]
    """
    call = _Binary(logits, targets, weight, pos_weight, reduction, grad_output, gradient=True)
    return call.loss(), call.grad()


class _Binary:
    """One checked call: the sum, the losses and the gradient of each block."""

    def __init__(
        self, logits: Any, targets: Any, weight: Any, pos_weight: Any, reduction: str,
        grad_output: Any = None, gradient: bool = False,
    ) -> None:  # fmt: skip
        z = chunked("logits", logits)
        arguments.check_float("logits", z.dtype)
        like = np.broadcast_to(np.zeros((), z.dtype), z.shape)
        y = any_array("targets", targets)
        arguments.same_shape("targets", _like("targets", y), "logits", like)
        factors = []
        for name, value in (("weight", weight), ("pos_weight", pos_weight)):
            array = None if value is None else any_array(name, value)
            if array is not None:
                arguments.broadcastable(name, _like(name, array), like)
            factors.append(array)
        self._reduction = arguments.check_reduction(reduction)
        upstream = Upstream(grad_output, z.shape, reduction, z.chunks)
        arrays = [z, *(a if a is None else _spread(a, z) for a in (y, *factors))]
        self._graph = Graph(
            "binary-cross-entropy", *(a for a in arrays if a is not None), *upstream.sources
        )
        self._logits = z
        # The gradient is that of a sum over blocks.
        divisor = z.size if reduction == "mean" and z.size else 1
        self._blocks = {
            block: self._graph.task(
                _evaluate, *(a if a is None else _block(a, z, block) for a in arrays),
                upstream.key(block), scalar=upstream.scalar / divisor,
                reduction="none" if reduction == "none" else "sum", gradient=gradient,
            )
            for block in np.ndindex(*z.numblocks)
        }  # fmt: skip

    def _picked(self, item: int) -> dict[Index, Key]:
        return {
            block: self._graph.task(pick, key, item=item) for block, key in self._blocks.items()
        }

    def loss(self) -> Any:
        graph, z = self._graph, self._logits
        dtype = arguments.compute_dtype(z.dtype)
        if self._reduction == "none":
            return graph.array(self._picked(1), z.chunks, dtype)
        total = graph.tree(add, list(self._picked(0).values()))
        key = graph.task(
            binary.reduced, total, count=z.size, reduction=self._reduction, dtype=dtype
        )
        return graph.number(key, dtype)

    def grad(self) -> Any:
        return self._graph.array(self._picked(2), self._logits.chunks, self._logits.dtype)


def _like(name: str, array: Any) -> AnyArray:
    """An array of the shape and dtype of another one as it is computed with, without memory."""
    number = arguments.float_or_integer_array(name, np.zeros((), array.dtype))
    return np.broadcast_to(number, array.shape)


def _spread(array: Any, z: Any) -> Any:
    """What broadcasts to the logits, in chunks of the same elements."""
    chunks = z.chunks[z.ndim - array.ndim :]
    chunks = tuple((1,) if size == 1 else c for size, c in zip(array.shape, chunks, strict=True))
    return in_chunks(array, chunks)


def _block(array: Any, z: Any, block: Index) -> Key:
    """The block of an array that belongs to one of the logits."""
    block = block[z.ndim - array.ndim :]
    return key_of(
        array, tuple(0 if size == 1 else k for size, k in zip(array.shape, block, strict=True))
    )


def _evaluate(
    z: AnyArray, y: AnyArray, weight: AnyArray | None, pos_weight: AnyArray | None, g: Any, *,
    scalar: float, reduction: str, gradient: bool,
) -> Any:  # fmt: skip
    return binary.evaluate(
        arguments.native(arguments.any_array("logits", z)), y, weight, pos_weight, reduction,
        scalar * (1.0 if g is None else g), gradient=gradient,
    )  # fmt: skip
