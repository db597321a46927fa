"""Data in chunks of dask arrays: every pass is one task per chunk of rows and a tree of sums."""

import copy
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
import scipy.sparse
from sklearn.utils import check_array, check_consistent_length
from sklearn.utils.multiclass import check_classification_targets

from fastce._arguments import any_array, refuse_mask
from fastce._fit import labels
from fastce._fit.coordinates import Coordinates, Moments, Standardised
from fastce._fit.passes import FEW, Array, Data, Gradient, masses, passes
from fastce.dask._chunks import key_of
from fastce.dask._graph import Graph, Key

_FLOATS = [np.float64, np.float32]


def arrays(x: Any, y: Any, weight: Any) -> tuple[Any, Any, Any]:
    """Dask arrays in chunks of the same rows, of arrays and of data frames of dask."""
    x = _array("X", x)
    if x.ndim != 2:
        raise ValueError(f"X: expected two dimensions, got shape {x.shape}")
    x = x if x.dtype in _FLOATS else x.astype(np.float64)
    if y is None:
        raise ValueError("y: expected an array, got None")
    x, y, weight = x.rechunk({1: -1}), _alongside("y", y, x), _alongside("sample_weight", weight, x)
    return x, y.rechunk({1: -1}) if y.ndim > 1 else y, weight


def batches(x: Any, y: Any, weight: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Chunk after chunk, each in memory when it is its turn."""
    x, y, weight = arrays(x, y, weight)
    starts = np.cumsum([0, *x.chunks[0]])
    for start, stop in itertools.pairwise(starts):
        if stop > start:
            part = (None if a is None else a[start:stop] for a in (x, y, weight))
            yield dask.base.compute(*part)


class ChunkedData:
    """What `fastce._fit.passes.Data` is, the rows being spread over chunks.

    A chunk is read, checked and encoded anew in every pass; what the arrays hold persisted is not
    computed again.
    """

    def __init__(self, x: Any, y: Any, weight: Any, class_weight: Any) -> None:
        x, y, weight = arrays(x, y, weight)
        self.x = x
        sources = [x, y] if weight is None else [x, y, weight]
        self._graph = graph = Graph("softmax-regression", *sources)
        filled = [k for k, rows in enumerate(x.chunks[0]) if rows]  # empty ones have nothing to say
        if not filled:
            raise ValueError(f"X: expected at least one row, got shape {x.shape}")
        rows = [
            tuple(None if a is None else key_of(a, (k, 0)[: a.ndim]) for a in (x, y, weight))
            for k in filled
        ]
        self._soft = y.ndim == 2 and y.shape[1] > 1 and y.dtype.kind == "f"
        parts = [graph.task(_classes_of, given, s, soft=self._soft) for _, given, s in rows]
        self.labels, counts = graph.compute(graph.tree(_unite, parts))
        labels.check_classes(self.labels)
        self.classes = len(self.labels)
        if isinstance(class_weight, str) and class_weight == "balanced":
            factors = labels.balanced(counts)
            class_weight = dict(zip(self.labels.tolist(), factors.tolist(), strict=True))
        self._parts = [
            graph.task(_data, *part, classes=self.labels, class_weight=class_weight)
            for part in rows
        ]
        self.total_weight = float(self._merged(_add, _weigh))

    def _merged(self, merge: Callable[..., Any], of_part: Callable[..., Any], **given: Any) -> Any:
        """What parts of the data come to when merged."""
        graph = Graph("sum", self._graph)
        return graph.compute(
            graph.tree(merge, [graph.task(of_part, part, **given) for part in self._parts])
        )

    def moments(self) -> Moments:
        """Weighted mean and spread of each feature."""
        return self._merged(_merged_moments, Data.moments)  # type: ignore[no-any-return]

    def seen(self, moments: Moments, coordinates: Coordinates) -> "tuple[ChunkedData, Coordinates]":
        """Chunks to pass over such that no digits are lost, and what is left to be standardised."""
        if moments.lie_well(self.x.dtype):
            return self, coordinates
        found = copy.copy(self)
        found._graph = graph = Graph("standardised", self._graph)
        given = graph.task(_given, value=coordinates)  # one copy for all chunks
        found._parts = [graph.task(_standardised, part, given) for part in self._parts]
        return found, coordinates.identity

    def masses(self) -> Array:
        """What the labels of each class weigh."""
        return np.asarray(self._merged(_add, Data.masses))

    def sample(self, step: int) -> tuple[Any, npt.NDArray[np.float64]]:
        """About every so manieth row, one of each chunk at least, and its weight."""
        return self._merged(_concatenated, Data.sample, step=step)  # type: ignore[no-any-return]

    def separated(self, weight: Array, bias: Array) -> bool:
        """Whether a model gives every row its own class the largest logit."""
        if self._soft:
            return False
        return not self._merged(_add, _not_separated, model=(weight, bias))

    def range(self, weight: Array, bias: Array) -> float:
        """The largest difference of two logits of a row, where it counts."""
        return float(self._merged(max, _range, model=(weight, bias)))

    def whole(self) -> Data:
        """All rows, in memory."""
        return self._merged(_whole, _itself)  # type: ignore[no-any-return]

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
        model = graph.task(_given, value=(weight, bias))  # one copy for all chunks
        direction = None if to is None else graph.task(_given, value=to)
        parts = [graph.task(_part_of_pass, part, model, direction) for part in self._parts]
        return Gradient(*graph.compute(graph.tree(_add_each, parts)))


def _array(name: str, value: Any) -> Any:
    """A dask array of chunks of known sizes; the lengths of a data frame's parts are computed."""
    if hasattr(value, "to_dask_array"):
        with warnings.catch_warnings():  # strings become objects, which is as well
            warnings.filterwarnings("ignore", "Dask currently has limited support", UserWarning)
            value = value.to_dask_array(lengths=True)
    if not isinstance(value, da.Array):
        value = any_array(name, value)
        value = da.from_array(value, chunks=value.shape)
    if any(np.isnan(size) for size in value.shape):
        raise ValueError(f"{name}: expected chunks of known sizes; see compute_chunk_sizes of dask")
    return value


def _alongside(name: str, array: Any, x: Any) -> Any:
    """An array of the rows of x, in chunks of the same rows."""
    if array is None:
        return None
    array = _array(name, array)
    if array.shape[:1] != x.shape[:1]:
        raise ValueError(f"{name}: expected {x.shape[0]} rows, as many as X, got {array.shape}")
    return array.rechunk({0: x.chunks[0]})


def _classes_of(y: Array, weight: Array | None, *, soft: bool) -> tuple[Array, Array]:
    """The classes of a chunk and what they weigh."""
    weight = None if weight is None else np.asarray(weight, np.float64)
    if soft:
        return np.arange(y.shape[1]), masses(None, y, weight, y.shape[1])
    check_classification_targets(y)
    found, index = np.unique(y, return_inverse=True)
    return found, masses(index.ravel(), None, weight, len(found))


def _unite(*parts: tuple[Array, Array]) -> tuple[Array, Array]:
    """All classes of some chunks and what they weigh."""
    found, index = np.unique(np.concatenate([c for c, _ in parts]), return_inverse=True)
    return found, np.bincount(index, np.concatenate([n for _, n in parts]), len(found))


def _data(x: Any, y: Any, weight: Any, *, classes: Array, class_weight: Any) -> Data:
    """A chunk, checked and encoded."""
    refuse_mask("X", x)
    refuse_mask("sample_weight", weight)
    x = check_array(x, accept_sparse="csr", dtype=_FLOATS, order="C", input_name="X")
    y = any_array("y", y)
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


def _merged_moments(*parts: Moments) -> Moments:
    return functools.reduce(Moments.merged, parts)


def _standardised(data: Data, coordinates: Coordinates) -> Data:
    return data._replace(x=Standardised(data.x, coordinates))


def _itself(data: Data) -> Data:
    return data


def _whole(*parts: Data) -> Data:
    *arrays, classes = zip(*parts, strict=True)
    x, hard, soft, weight = (None if same[0] is None else _stacked(same) for same in arrays)
    return Data(x, hard, soft, weight, classes[0])


def _stacked(arrays: tuple[Any, ...]) -> Any:
    if all(isinstance(array, np.ndarray) for array in arrays):
        return np.concatenate(arrays)
    return scipy.sparse.vstack(arrays, format="csr")


def _range(data: Data, *, model: tuple[Array, Array]) -> float:
    return data.range(*model)


def _concatenated(*parts: tuple[Any, Array]) -> tuple[Any, Array]:
    xs, weights = zip(*parts, strict=True)
    return _stacked(xs), np.concatenate(weights)


def _not_separated(data: Data, *, model: tuple[Array, Array]) -> int:
    return not data.separated(*model)


def _given(*, value: Any) -> Any:
    return value


def _part_of_pass(
    data: Data, model: tuple[Array, Array], to: tuple[Array, Array] | None
) -> tuple[Any, ...]:
    way = passes(data, curved=to is not None)
    return tuple(way.gradient(*model) if to is None else way.curvature(*model, to))


def _add(*parts: Any) -> Any:
    return sum(parts[1:], start=parts[0])


def _add_each(*parts: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_add(*same) for same in zip(*parts, strict=True))
