"""Data in chunks of dask arrays: every pass is one task per chunk of rows and a tree of sums."""

from collections.abc import Callable
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from sklearn.utils import check_array, check_consistent_length
from sklearn.utils.multiclass import check_classification_targets

from fastce._fit import labels
from fastce._fit.passes import FEW, Array, Data, Gradient, passes
from fastce.dask._chunks import key_of
from fastce.dask._graph import Graph, Key

_FLOATS = [np.float64, np.float32]


class ChunkedData:
    """What `fastce._fit.passes.Data` is, the rows being spread over chunks.

    A chunk is read, checked and encoded anew in every pass; what the arrays hold persisted is not
    computed again.
    """

    def __init__(self, x: Any, y: Any, weight: Any, class_weight: Any) -> None:
        if any(np.isnan(size) for size in x.shape):
            raise ValueError("X: expected chunks of known sizes; see compute_chunk_sizes of dask")
        if x.ndim != 2:
            raise ValueError(f"X: expected two dimensions, got shape {x.shape}")
        self.x = x = x if x.dtype in _FLOATS else x.astype(np.float64)
        y, weight = _alongside("y", y, x), _alongside("sample_weight", weight, x)
        if not isinstance(y, da.Array):
            raise ValueError("y: expected an array, got None")
        x, y = x.rechunk({1: -1}), y.rechunk({1: -1}) if y.ndim > 1 else y
        sources = [x, y] if weight is None else [x, y, weight]
        self._graph = graph = Graph("softmax-regression", *sources)
        xs, ys, weights = (
            [None if a is None else key_of(a, (k, 0)[: a.ndim]) for k in range(x.numblocks[0])]
            for a in (x, y, weight)
        )
        self._soft = y.ndim == 2 and y.shape[1] > 1 and y.dtype.kind == "f"
        parts = [graph.task(_classes_of, part, soft=self._soft) for part in ys]
        self.labels, counts = graph.compute(graph.tree(_unite, parts))
        labels.check_classes(self.labels)
        self.classes = len(self.labels)
        if isinstance(class_weight, str) and class_weight == "balanced":
            factors = counts.sum() / (self.classes * np.maximum(counts, 1e-300))
            class_weight = dict(zip(self.labels.tolist(), factors.tolist(), strict=True))
        self._parts = [
            graph.task(_data, *part, classes=self.labels, class_weight=class_weight)
            for part in zip(xs, ys, weights, strict=True)
        ]
        self.total_weight = float(self._merged(_add, _weigh))

    def _merged(self, merge: Callable[..., Any], of_part: Callable[..., Any], **given: Any) -> Any:
        """What parts of the data come to when merged."""
        graph = Graph("sum", self._graph)
        return graph.compute(
            graph.tree(merge, [graph.task(of_part, part, **given) for part in self._parts])
        )

    def squares(self) -> npt.NDArray[np.float64]:
        """Weighted sum over the rows of the square of each feature."""
        return np.asarray(self._merged(_add, Data.squares))

    def sample(self, step: int) -> tuple[Any, npt.NDArray[np.float64]]:
        """About every so manieth row, one of each chunk at least, and its weight."""
        return self._merged(_concatenated, Data.sample, step=step)  # type: ignore[no-any-return]

    def separated(self, weight: Array, bias: Array) -> bool:
        """Whether a model gives every row its own class the largest logit."""
        if self._soft:
            return False
        return not self._merged(_add, _not_separated, model=(weight, bias))

    def passes(self, *, curved: bool) -> "Chunks":
        """Passes over all chunks."""
        return Chunks(self._graph, self._parts, needs_blas=self.classes > FEW)


class Chunks:
    """Sums over chunks of what `fastce._fit.passes` makes of each."""

    def __init__(self, data: Graph, parts: list[Key], *, needs_blas: bool) -> None:
        self._data, self._parts, self.needs_blas = data, parts, needs_blas

    def gradient(self, weight: Array, bias: Array) -> Gradient:
        """Loss and gradient of a model."""
        return self._pass(weight, bias, None)

    def curvature(self, weight: Array, bias: Array, to: tuple[Array, Array]) -> Gradient:
        """Hessian at a model times a direction; the loss is 0."""
        return self._pass(weight, bias, to)

    def _pass(self, weight: Array, bias: Array, to: tuple[Array, Array] | None) -> Gradient:
        graph = Graph("pass", self._data)
        model = graph.task(_both, weight=weight, bias=bias)  # one copy for all chunks
        direction = None if to is None else graph.task(_both, weight=to[0], bias=to[1])
        parts = [graph.task(_part_of_pass, part, model, direction) for part in self._parts]
        return Gradient(*graph.compute(graph.tree(_add_each, parts)))


def _alongside(name: str, array: Any, x: Any) -> Any:
    """An array of the rows of x, in chunks of the same rows."""
    if array is None:
        return None
    if not isinstance(array, da.Array):
        array = da.from_array(np.asarray(array))
    if array.shape[:1] != x.shape[:1]:
        raise ValueError(f"{name}: expected {x.shape[0]} rows, as many as X, got {array.shape}")
    return array.rechunk({0: x.chunks[0]})


def _classes_of(y: Array, *, soft: bool) -> tuple[Array, Array]:
    """The classes of a chunk and how often they occur."""
    if soft:
        return np.arange(y.shape[1]), y.sum(axis=0, dtype=np.float64)
    check_classification_targets(y)
    found, counts = np.unique(y, return_counts=True)
    return found, counts.astype(np.float64)


def _unite(*parts: tuple[Array, Array]) -> tuple[Array, Array]:
    """All classes of some chunks and how often they occur."""
    found, index = np.unique(np.concatenate([c for c, _ in parts]), return_inverse=True)
    return found, np.bincount(index, np.concatenate([n for _, n in parts]), len(found))


def _data(x: Any, y: Any, weight: Any, *, classes: Array, class_weight: Any) -> Data:
    """A chunk, checked and encoded."""
    x = check_array(x, accept_sparse="csr", dtype=_FLOATS, order="C", input_name="X")
    y = np.asarray(y)
    check_consistent_length(x, y)
    if weight is not None:
        weight = check_array(weight, ensure_2d=False, dtype=np.float64, input_name="sample_weight")
        if np.any(weight < 0):
            raise ValueError(f"sample_weight: expected at least 0, got {weight.min()}")
    if y.dtype.kind == "f":
        y = check_array(y, ensure_2d=False, dtype=_FLOATS, input_name="y")
    return labels.data(x, y, weight, classes, class_weight)


def _weigh(data: Data) -> float:
    return data.total_weight


def _concatenated(*parts: tuple[Any, Array]) -> tuple[Any, Array]:
    xs, weights = zip(*parts, strict=True)
    if isinstance(xs[0], np.ndarray):
        return np.concatenate(xs), np.concatenate(weights)
    from scipy.sparse import vstack

    return vstack(xs, format="csr"), np.concatenate(weights)


def _not_separated(data: Data, *, model: tuple[Array, Array]) -> int:
    return not data.separated(*model)


def _both(weight: Array, bias: Array) -> tuple[Array, Array]:
    return weight, bias


def _part_of_pass(
    data: Data, model: tuple[Array, Array], to: tuple[Array, Array] | None
) -> tuple[Any, ...]:
    way = passes(data, curved=to is not None)
    return tuple(way.gradient(*model) if to is None else way.curvature(*model, to))


def _add(*parts: Any) -> Any:
    return sum(parts[1:], start=parts[0])


def _add_each(*parts: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_add(*same) for same in zip(*parts, strict=True))
