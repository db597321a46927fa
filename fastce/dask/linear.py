"""The classifier head of observations in chunks of rows, its classes divided or not."""

from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt

from fastce import _arguments as arguments
from fastce import shards
from fastce._arguments import AnyArray, Reduction
from fastce._head import Head, Products
from fastce._linear_slice import LinearSlice
from fastce.dask._chunks import any_array, chunked, in_chunks, key_of, whole
from fastce.dask._graph import Index, Key, add, in_chunk, pick
from fastce.dask._labelled import Labelled, Logits

# Gradients of weights that are held until they are added: they are large.
BRANCHES = 2


def linear_cross_entropy(
    x: Any,
    weight: Any,
    targets: Any,
    *,
    bias: Any = None,
    class_weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    normalizer: float | None = None,
) -> Any:
    """Cross-entropy of a linear layer of chunks of rows, lazily.

    Parameters
    ----------
    x : dask.array.Array, of shape (N, D)
        As in `fastce.linear_cross_entropy`, in chunks of rows with all features.
    weight : dask.array.Array or array_like, of shape (C, D)
        As there, with all features in a chunk; the classes may be divided.
    targets : dask.array.Array or array_like
        As there; rechunked to fit the rows.
    bias : dask.array.Array or array_like, of shape (C,), optional
        As there; rechunked to fit `weight`.
    class_weight, ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer
        As there. `class_weight` is an ordinary array.

    Returns
    -------
    dask.array.Array
        The loss: of no dimension, or for "none" in the chunks of the rows.

    Raises
    ------
    TypeError, ValueError
        At once, as `fastce.linear_cross_entropy` does; ValueError also if the features are divided
        or sizes of chunks unknown.
    IndexError
        When computed, if a target is out of range; the message says in which chunk.

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> import fastce.dask
    >>> x = da.from_array([[1.0, 2.0], [0.5, -1.0]], chunks=(1, 2))
    >>> weight = np.array([[0.2, 0.1], [0.0, -0.3], [0.5, 0.5]])
    >>> print(f"{fastce.dask.linear_cross_entropy(x, weight, [2, 0]).compute():.6f}")
    0.757918
    """
    options = arguments.options(
        ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer
    )
    return _Linear(x, weight, targets, bias, class_weight, options).loss()


def linear_cross_entropy_and_grad(
    x: Any,
    weight: Any,
    targets: Any,
    *,
    bias: Any = None,
    class_weight: npt.ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    normalizer: float | None = None,
    grad_output: Any = None,
    skip_below: float = 0.0,
) -> tuple[Any, tuple[Any, Any, Any]]:
    """Cross-entropy of a linear layer of chunks of rows and its gradients, lazily.

    Parameters
    ----------
    x, weight, targets, bias, class_weight, ignore_index, label_smoothing, z_loss, softcap
        As in `linear_cross_entropy`.
    reduction, normalizer
        As in `linear_cross_entropy`.
    grad_output : float, array_like or dask.array.Array, optional
        As in `fastce.linear_cross_entropy_and_grad`.
    skip_below : float in [0, 1), default 0.0
        As there. Where the classes are divided, nothing is left out.

    Returns
    -------
    loss : dask.array.Array
        As from `linear_cross_entropy`.
    (dx, dweight, dbias) : tuple of dask.array.Array
        The gradients, in the chunks of `x`, `weight` and `bias`, or one chunk where these are in
        memory; dbias is None without `bias`.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `linear_cross_entropy` does.

    Notes
    -----
    Where the classes are not divided, a chunk of rows is one task, which does what
    `fastce.linear_cross_entropy_and_grad` does. Else the logits of a block of rows and classes are
    computed twice: for its record (see `fastce.shards`), and for its gradients when the records of
    all classes are merged.

    dweight and dbias are added up in the dtype that is computed with, two at a time, along a tree
    that depends on the chunks alone. Every bit is the same whatever the workers, as far as it is
    with the BLAS of NumPy on them.

    Examples
    --------
    >>> import dask
    >>> import dask.array as da
    >>> import numpy as np
    >>> import fastce.dask
    >>> x = da.from_array([[1.0, 2.0], [0.5, -1.0]], chunks=(1, 2))
    >>> weight = np.array([[0.2, 0.1], [0.0, -0.3], [0.5, 0.5]])
    >>> found = fastce.dask.linear_cross_entropy_and_grad(x, weight, [2, 0])
    >>> loss, (dx, dweight, _) = dask.compute(*found)
    >>> print(dweight.round(4))
    [[-0.0557  0.5689]
     [ 0.1499 -0.1316]
     [-0.0942 -0.4373]]
    """
    options = arguments.options(
        ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer
    )
    skip_below = arguments.skip_below(skip_below)
    layer = _Linear(x, weight, targets, bias, class_weight, options, grad_output, skip_below)
    return layer.loss(), layer.grad()


class _Linear:
    """One checked call: tasks for the rows of blocks, or if the classes are divided, for blocks."""

    def __init__(
        self, x: Any, weight: Any, targets: Any, bias: Any, class_weight: npt.ArrayLike | None,
        options: arguments.Options, grad_output: Any = None, skip_below: float | None = None,
    ) -> None:  # fmt: skip
        chunked("x", x)
        w, b = any_array("weight", weight), None if bias is None else any_array("bias", bias)
        arguments.linear_layer(_like(x), _like(w), None if b is None else _like(b))
        if not isinstance(w, da.Array):
            w = in_chunks(w, tuple((size,) for size in w.shape))
        whole("x", x, 1)
        whole("weight", w, 1)
        b = None if b is None else in_chunks(b, w.chunks[:1])
        self._x, self._weight, self._bias = x, w, b
        compute = np.result_type(*(arguments.compute_dtype(a.dtype) for a in (x, w)))
        logits = Logits(compute, (len(x), len(w)), (x.chunks[0], w.chunks[0]))
        self._call = call = Labelled(
            "linear-cross-entropy", "logits", logits, targets, -1, class_weight, options,
            grad_output, "class_weight", (x, w) if b is None else (x, w, b),
        )  # fmt: skip
        self._graph, self._grid, self._options = call.graph, call.grid, options
        self._divided = len(w.chunks[0]) > 1
        self._results: dict[Index, Key] = {}
        for row in call.grid.rows():
            if self._divided:
                self._results[row] = self._partials(row)
                continue
            block = (*row, 0)
            self._results[row] = call.graph.task(
                in_chunk(call.grid.start(block), _whole_layer), *self._arrays(row, block),
                call.divisors, call.upstream.key(row), options=options,
                class_weight=call.weight, scalar=call.upstream.scalar, skip_below=skip_below,
            )  # fmt: skip

    def _arrays(self, row: Index, block: Index) -> tuple[Key | None, ...]:
        """x, weight, bias and labels of a block of the logits."""
        rows, classes = block
        return (
            key_of(self._x, (rows, 0)), key_of(self._weight, (classes, 0)),
            None if self._bias is None else key_of(self._bias, (classes,)),
            self._call.labels(row, block),
        )  # fmt: skip

    def _part(self, block: Index) -> dict[str, Any]:
        part = self._call.part(block)
        return {"class_weight": part["weight"], "class_offset": part["class_offset"]}

    def _partials(self, row: Index) -> Key:
        parts = [
            self._graph.task(
                in_chunk(self._grid.start(block), _partial), *self._arrays(row, block),
                classes=self._call.fit.classes, options=self._options, **self._part(block),
            )
            for block in self._grid.along(row)
        ]  # fmt: skip
        return self._graph.tree(shards.merge, parts)

    def loss(self) -> Any:
        if self._divided:
            return self._call.loss(self._results)
        if self._options.reduction == "none":
            return self._graph.array(self._picked(1), self._grid.row_chunks, self._call.dtype)
        return self._call.mean(self._graph.tree(add, list(self._picked(0).values())))

    def _picked(self, item: int) -> dict[Index, Key]:
        return {row: self._graph.task(pick, k, item=item) for row, k in self._results.items()}

    def grad(self) -> tuple[Any, Any, Any]:
        """Gradients of blocks, added up along the classes, and the rows."""
        graph, grid, call = self._graph, self._grid, self._call
        if self._divided:
            blocks = {
                block: graph.task(
                    _slice_gradients, *self._arrays(row, block), total, call.divisors,
                    call.upstream.key(row), options=self._options,
                    scalar=call.upstream.scalar, **self._part(block),
                )
                for row, total in self._results.items()
                for block in grid.along(row)
            }  # fmt: skip
        else:
            blocks = {(*row, 0): key for row, key in self._results.items()}
        gradients: list[Any] = []
        for item, (array, axis) in enumerate(
            ((self._x, 0), (self._weight, 1), (self._bias, 1)), start=-3
        ):
            if array is None:
                gradients.append(None)
                continue
            parts: dict[int, list[Key]] = {}
            for block, key in blocks.items():
                parts.setdefault(block[axis], []).append(graph.task(pick, key, item=item))
            sums = {
                (k, 0)[: array.ndim]: graph.task(
                    _typed, graph.tree(add, keys, BRANCHES), dtype=array.dtype
                )
                for k, keys in parts.items()
            }
            for k in range(array.numblocks[0]):  # without classes, hence without elements
                index = (k, 0)[: array.ndim]
                sums.setdefault(index, key_of(array, index))
            gradients.append(graph.array(sums, array.chunks, array.dtype))
        dx, dweight, dbias = gradients
        return dx, dweight, dbias


def _like(array: Any) -> AnyArray:
    """An array of this shape and dtype, without memory."""
    return np.broadcast_to(np.zeros((), array.dtype), array.shape)


def _aligned(x: AnyArray, weight: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Both where a product may be taken of them as they lie.

    What comes from another worker lies anywhere, and NumPy's copy is of another order: the product
    would differ in its last bits from that of what was here already.
    """
    return np.require(x, requirements="A"), np.require(weight, requirements="A")


def _scaled(
    sums: shards.Sums, options: arguments.Options, scalar: float, g: Any
) -> tuple[arguments.Options, Any]:
    """Options for a part of the rows, and the upstream gradient of its sum."""
    factor, z_loss = sums.scales(options)
    reduction: Reduction = "none" if options.reduction == "none" else "sum"
    part = options._replace(z_loss=z_loss, reduction=reduction, normalizer=None)
    return part, scalar * factor * (1.0 if g is None else g)


def _whole_layer(
    x: AnyArray, weight: AnyArray, bias: AnyArray | None, y: AnyArray, sums: shards.Sums, g: Any, *,
    options: arguments.Options, class_weight: AnyArray | None, scalar: float,
    skip_below: float | None,
) -> tuple[Any, ...]:  # fmt: skip
    """The sum of the losses, the losses for "none", and dx, dweight, dbias if they are wanted."""
    options, upstream = _scaled(sums, options, scalar, g)
    x, weight = _aligned(x, weight)
    head = Head.checked(x, weight, y, bias, class_weight, *options)
    if skip_below is None:
        return head.total(), head.call.losses
    gradients = (
        np.empty_like(head.x, subok=False), np.empty(head.weight.shape, head.compute),
        None if bias is None else np.empty(len(head.weight)),
    )  # fmt: skip
    negligible = skip_below * float(np.abs(upstream).max(initial=0.0))
    products = Products(head, *gradients, accumulate=False, negligible=negligible)
    total = head.total(upstream, products)
    products.finish()
    return total, head.call.losses, *gradients


def _partial(
    x: AnyArray, weight: AnyArray, bias: AnyArray | None, y: AnyArray, *, classes: int,
    options: arguments.Options, class_weight: AnyArray | None, class_offset: int,
) -> shards.Partial:  # fmt: skip
    layer = LinearSlice(*_aligned(x, weight), bias, y, class_weight, class_offset)
    return layer.partial(classes, options)


def _slice_gradients(
    x: AnyArray, weight: AnyArray, bias: AnyArray | None, y: AnyArray, total: shards.Partial,
    sums: shards.Sums, g: Any, *, options: arguments.Options, scalar: float,
    class_weight: AnyArray | None, class_offset: int,
) -> tuple[Any, ...]:  # fmt: skip
    layer = LinearSlice(*_aligned(x, weight), bias, y, class_weight, class_offset)
    options, upstream = _scaled(sums, options, scalar, g)
    per_row = np.ndim(upstream) > 0
    scales = shards.weighed(total).scales(options)
    return layer.gradients(total, scales, (1.0, upstream) if per_row else (upstream, None))


def _typed(array: AnyArray, *, dtype: np.dtype[Any]) -> AnyArray:
    with np.errstate(over="ignore"):
        return array.astype(dtype, copy=False)
