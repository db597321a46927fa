"""Second derivatives of the cross-entropy of logits in chunks of rows."""

from typing import Any, Literal

import numpy as np

import fastce
from fastce import _arguments as arguments
from fastce.dask._chunks import Grid, Upstream, any_array, chunked, in_chunks, key_of, whole
from fastce.dask._graph import Graph, in_chunk, pick


def gradient_hessian(
    logits: Any,
    targets: Any,
    *,
    axis: int = -1,
    sample_weight: Any = None,
    hessian: Literal["diag", "xgboost", "lightgbm", "abs_residual"] = "diag",
) -> tuple[Any, Any]:
    """Gradient and diagonal Hessian of the summed cross-entropy of chunks of rows, lazily.

    Parameters
    ----------
    logits : dask.array.Array
        As in `fastce.gradient_hessian`, in chunks of known sizes, one along the classes.
    targets, sample_weight : dask.array.Array or array_like
        As there; rechunked to fit the logits.
    axis, hessian
        As there.

    Returns
    -------
    grad : dask.array.Array
        Shaped, typed and chunked like `logits`.
    hess : dask.array.Array
        Likewise.

    Raises
    ------
    TypeError, ValueError
        At once, as `fastce.gradient_hessian` does; ValueError also if the classes are divided.
    IndexError
        When computed, if a target is out of range; the message says in which chunk.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastce.dask
    >>> logits = da.from_array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]], chunks=(1, 3))
    >>> print(fastce.dask.gradient_hessian(logits, [0, 2])[1].compute().round(4))
    [[0.2227 0.1848 0.0819]
     [0.0402 0.1318 0.1012]]
    """
    z, y = chunked("logits", logits), any_array("targets", targets)
    arguments.check_integers(y.dtype)
    fit = arguments.signature("logits", z.dtype, z.shape, axis, y.dtype, y.shape, -1)
    whole("logits", z, fit.axis)
    # Asked about no rows, the function itself says whether it knows the Hessian.
    fastce.gradient_hessian(np.empty((0, 1)), np.empty(0, int), hessian=hessian)
    grid = Grid(z.chunks, fit.axis)
    arrays = [z, in_chunks(y, grid.row_chunks)]
    if sample_weight is not None:
        weight = any_array("sample_weight", sample_weight)
        arguments.check_row_weight("sample_weight", weight.dtype, weight.shape, fit.rows)
        arrays.append(in_chunks(weight, grid.row_chunks))
    graph = Graph("gradient-hessian", *arrays)
    both = {}
    for row in grid.rows():
        (block,) = grid.along(row)
        both[block] = graph.task(
            in_chunk(grid.start(block), _gradient_hessian), key_of(z, block),
            *(key_of(a, row) for a in arrays[1:]), axis=fit.axis, hessian=hessian,
        )  # fmt: skip
    grad, hess = (
        graph.array(
            {block: graph.task(pick, key, item=item) for block, key in both.items()},
            z.chunks, z.dtype,
        )
        for item in range(2)
    )  # fmt: skip
    return grad, hess


def hessian_vector_product(logits: Any, v: Any, *, axis: int = -1, grad_output: Any = None) -> Any:
    """Exact product of the Hessian of each row's cross-entropy with a vector, lazily.

    Parameters
    ----------
    logits : dask.array.Array
        As in `fastce.hessian_vector_product`, in chunks of known sizes, one along the classes.
    v : dask.array.Array or array_like
        As there; rechunked to fit the logits.
    axis : int, default -1
        The class axis.
    grad_output : float, array_like or dask.array.Array, optional
        As there.

    Returns
    -------
    dask.array.Array
        Shaped, typed and chunked like `logits`.

    Raises
    ------
    TypeError, ValueError
        At once, as `fastce.hessian_vector_product` does; ValueError also if the classes are
        divided.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastce.dask
    >>> logits = da.from_array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]], chunks=(1, 3))
    >>> v = [[1.0, 0.0, 0.0], [1.0, 2.0, 3.0]]
    >>> print(fastce.dask.hessian_vector_product(logits, v).compute().round(4))
    [[ 0.2227 -0.1628 -0.0599]
     [-0.045  -0.0609  0.106 ]]
    """
    z, vector = chunked("logits", logits), any_array("v", v)
    arguments.check_float("logits", z.dtype)
    axis = arguments.class_axis("logits", z.shape, axis)
    like, other = (np.broadcast_to(np.zeros((), a.dtype), a.shape) for a in (z, vector))
    arguments.same_shape("v", other, "logits", like)
    whole("logits", z, axis)
    grid = Grid(z.chunks, axis)
    rows = z.shape[:axis] + z.shape[axis + 1 :]
    upstream = Upstream(grad_output, rows, "none", grid.row_chunks)
    vector = in_chunks(vector, z.chunks)
    graph = Graph("hessian-vector-product", z, vector, *upstream.sources)
    blocks = {}
    for row in grid.rows():
        (block,) = grid.along(row)
        blocks[block] = graph.task(
            _hessian_vector_product, key_of(z, block), key_of(vector, block), upstream.key(row),
            axis=axis, scalar=upstream.scalar,
        )  # fmt: skip
    return graph.array(blocks, z.chunks, z.dtype)


def _gradient_hessian(z: Any, y: Any, sample_weight: Any = None, **given: Any) -> Any:
    return fastce.gradient_hessian(z, y, sample_weight=sample_weight, **given)


def _hessian_vector_product(z: Any, v: Any, g: Any, *, axis: int, scalar: float) -> Any:
    return fastce.hessian_vector_product(
        z, v, axis=axis, grad_output=scalar * (1.0 if g is None else g)
    )
