"""logsumexp, softmax and log_softmax in chunks."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import fastce
from fastce import _arguments as arguments
from fastce import _softmax_slice as slices
from fastce import shards
from fastce._arguments import AnyArray
from fastce.dask._chunks import chunked, key_of
from fastce.dask._graph import Graph, Index, Key
from fastce.softmax import apart, joined


def logsumexp(x: Any, *, axis: int | tuple[int, ...] | None = -1, keepdims: bool = False) -> Any:
    """log(sum(exp(x))) of chunks, lazily.

    Parameters
    ----------
    x : dask.array.Array
        As in `fastce.logsumexp`, in any chunks of known sizes.
    axis, keepdims
        As there.

    Returns
    -------
    dask.array.Array
        In the chunks of `x` along the axes that are left.

    Raises
    ------
    TypeError, ValueError
        At once, as `fastce.logsumexp` does; ValueError also if sizes of chunks are unknown.

    Notes
    -----
    A chunk that is divided along none of `axis` is given to `fastce.logsumexp`. Of the others each
    becomes a record of 64 bytes per row (see `fastce.shards`).

    Examples
    --------
    >>> import dask.array as da
    >>> import fastce.dask
    >>> x = da.from_array([[0.0, 1.0, 2.0], [1000.0, 1000.0, 0.0]], chunks=(1, 2))
    >>> print(fastce.dask.logsumexp(x).compute().round(4))
    [   2.4076 1000.6931]
    >>> print(f"{fastce.dask.logsumexp(x, axis=None).compute():.4f}")
    1000.6931
    """
    chunked("x", x)
    dtype = np.dtype(arguments.compute_dtype(_dtype(x)))
    axes = arguments.reduced_axes("x", x.shape, axis)
    classes = math.prod(x.shape[k] for k in axes)
    graph = Graph("logsumexp", x)
    keepdims = bool(keepdims)
    given: dict[str, Any] = {"axes": axes, "keepdims": keepdims}
    blocks: dict[Index, Key] = {}
    for kept, along in _rows_of_blocks(x, axes):
        along = [block for block in along if _size(x, block, axes)]
        if len(along) > 1:
            parts = _partials(graph, x, along, axes, classes)
            key = graph.task(_finished, graph.tree(shards.merge, parts), **given)
        else:  # a single one or, where there is nothing to sum over, none
            key = graph.task(
                fastce.logsumexp, key_of(x, along[0] if along else kept), axis=axes,
                keepdims=keepdims,
            )  # fmt: skip
        blocks[tuple(n for k, n in enumerate(kept) if keepdims or k not in axes)] = key
    chunks = tuple(
        (1,) if k in axes else sizes
        for k, sizes in enumerate(x.chunks)
        if keepdims or k not in axes
    )
    return graph.array(blocks, chunks, dtype)


def softmax(x: Any, *, axis: int | tuple[int, ...] | None = -1) -> Any:
    """exp(x) / sum(exp(x)) of chunks, lazily.

    Parameters
    ----------
    x : dask.array.Array
        As in `fastce.softmax`, in any chunks of known sizes.
    axis
        As there.

    Returns
    -------
    dask.array.Array
        Shaped, typed and chunked like `x`; float64 for integers and booleans.

    Raises
    ------
    TypeError, ValueError
        At once, as `fastce.softmax` does; ValueError also if sizes of chunks are unknown.

    Notes
    -----
    Where the classes are divided, every chunk is read twice, and kept or made again in between.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastce.dask
    >>> x = da.from_array([[2.0, 1.0, 0.0], [5.0, 1.0, 5.0]], chunks=(1, 2))
    >>> print(fastce.dask.softmax(x).compute().round(4))
    [[0.6652 0.2447 0.09  ]
     [0.4955 0.0091 0.4955]]
    """
    return _softmax("softmax", fastce.softmax, x, axis, logarithm=False)


def log_softmax(x: Any, *, axis: int | tuple[int, ...] | None = -1) -> Any:
    """x - log(sum(exp(x))) of chunks, lazily.

    Parameters
    ----------
    x, axis
        As in `softmax`.

    Returns
    -------
    dask.array.Array
        As from `softmax`.

    Raises
    ------
    TypeError, ValueError
        As `softmax` does.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastce.dask
    >>> x = da.from_array([0.0, 40.0], chunks=1)
    >>> print(", ".join(f"{lp:.4e}" for lp in fastce.dask.log_softmax(x).compute()))
    -4.0000e+01, -4.2484e-18
    """
    return _softmax("log-softmax", fastce.log_softmax, x, axis, logarithm=True)


def _softmax(
    label: str,
    whole: Callable[..., AnyArray],
    x: Any,
    axis: int | tuple[int, ...] | None,
    *,
    logarithm: bool,
) -> Any:
    chunked("x", x)
    dtype = _dtype(x)
    axes = arguments.reduced_axes("x", x.shape, axis)
    classes = math.prod(x.shape[k] for k in axes)
    graph = Graph(label, x)
    blocks: dict[Index, Key] = {}
    for _, along in _rows_of_blocks(x, axes):
        divided = [block for block in along if _size(x, block, axes)]
        if len(divided) > 1:
            total = graph.tree(shards.merge, _partials(graph, x, divided, axes, classes))
            for block in divided:
                blocks[block] = graph.task(
                    _slice, key_of(x, block), total, axes=axes, logarithm=logarithm
                )
        for block in along:
            if block not in blocks:
                blocks[block] = graph.task(whole, key_of(x, block), axis=axes)
    return graph.array(blocks, x.chunks, dtype)


def _rows_of_blocks(x: Any, axes: tuple[int, ...]) -> Iterator[tuple[Index, list[Index]]]:
    """Blocks whose rows are the same; with the first one's index, as far as it is not of `axes`."""
    for kept in itertools.product(
        *([0] if k in axes else range(count) for k, count in enumerate(x.numblocks))
    ):
        yield kept, list(itertools.product(
            *(range(x.numblocks[k]) if k in axes else [kept[k]] for k in range(x.ndim))
        ))  # fmt: skip


def _size(x: Any, block: Index, axes: tuple[int, ...]) -> int:
    """The number of classes of a block."""
    return math.prod(x.chunks[k][block[k]] for k in axes)


def _slice(
    x: AnyArray, total: shards.Partial, *, axes: tuple[int, ...], logarithm: bool
) -> AnyArray:
    """softmax of a block, or its logarithm."""
    if len(axes) == 1:
        return slices.softmax(x, total, axes[0], logarithm)
    rows = joined(x, axes)
    return apart(slices.softmax(rows, total, rows.ndim - 1, logarithm), axes, x.shape)


def _dtype(x: Any) -> np.dtype[Any]:
    """That of softmax."""
    return arguments.float_or_integer_array("x", np.empty(0, x.dtype)).dtype


def _partials(
    graph: Graph, x: Any, blocks: list[Index], axes: tuple[int, ...], classes: int
) -> list[Key]:
    """The partials of blocks; their elements along `axes` are the classes, block after block."""
    parts, start = [], 0
    for block in blocks:
        parts.append(
            graph.task(_partial, key_of(x, block), axes=axes, class_offset=start, classes=classes)
        )
        start += _size(x, block, axes)
    return parts


def _partial(
    x: AnyArray, *, axes: tuple[int, ...], class_offset: int, classes: int
) -> shards.Partial:
    if len(axes) == 1:
        return slices.partial(x, axes[0], class_offset, classes)
    x = joined(x, axes)
    return slices.partial(x, x.ndim - 1, class_offset, classes)


def _finished(total: shards.Partial, *, axes: tuple[int, ...], keepdims: bool) -> Any:
    lse = shards.finish(total, reduction="none").lse
    return np.expand_dims(lse, axes) if keepdims else lse
