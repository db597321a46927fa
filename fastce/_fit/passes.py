"""Passes over the data: the summed loss of a linear model, its gradient, its Hessian.

Two ways to the same numbers: for few classes a kernel that reads every observation once, else
matrix products of NumPy or SciPy, some rows at a time.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

import fastce
from fastce._fit.coordinates import Coordinates, Moments, Standardised

Array = npt.NDArray[Any]

# Classes up to which the kernel beats the products of OpenBLAS (measured: 20000 x 200 and 60000 x
# 784, both dtypes), and bytes of a block of rows that its caches hold.
FEW, CACHED = 32, 1 << 20
# Bytes of logits that are held at a time.
MEMORY = 32 << 20
# Parts that the kernel's sums are made of: enough for many threads, and memory for their sums.
PARTS, SUMS = 64, 16 << 20


def masses(hard: Array | None, soft: Array | None, weight: Array | None, classes: int) -> Array:
    """What the labels of each class weigh: a row of weight 3 is three rows."""
    if soft is not None:
        soft = soft.astype(np.float64, copy=False)
        return soft.sum(axis=0) if weight is None else weight @ soft
    assert hard is not None
    return np.bincount(hard, weight, classes).astype(np.float64)


class Data(NamedTuple):
    """Observations (dense or CSR), labels of one kind (classes or probabilities), weights."""

    x: Any
    hard: npt.NDArray[np.int64] | None
    soft: Array | None
    weight: npt.NDArray[np.float64] | None
    classes: int

    @property
    def total_weight(self) -> float:
        """Sum of the weights of all rows, a row of probabilities counting as one."""
        return float(self.x.shape[0] if self.weight is None else self.weight.sum())

    def labels(self, rows: slice) -> Array:
        """Labels of some rows."""
        labels = self.soft if self.hard is None else self.hard
        assert labels is not None
        return labels[rows]

    def weights(self, rows: slice) -> Array | float:
        """Weights of some rows."""
        return 1.0 if self.weight is None else self.weight[rows]

    def moments(self) -> Moments:
        """Weighted mean and spread of each feature."""
        return Moments.of(self.x, self.weight)

    def seen(self, moments: Moments, coordinates: Coordinates) -> "tuple[Data, Coordinates]":
        """Data to pass over such that no digits are lost, and what is left to be standardised.

        These are the data as they are, where they lie well: a linear model of standardised features
        is one of the features. Else their rows are standardised in every pass.
        """
        if moments.lie_well(self.x.dtype):
            return self, coordinates
        return self._replace(x=Standardised(self.x, coordinates)), coordinates.identity

    def masses(self) -> Array:
        """What the labels of each class weigh."""
        return masses(self.hard, self.soft, self.weight, self.classes)

    def sample(self, step: int) -> tuple[Any, npt.NDArray[np.float64]]:
        """Every so manieth row, and its weight."""
        some = self.x[::step]
        return some, np.ones(some.shape[0]) if self.weight is None else self.weight[::step]

    def blocks(self, numbers: int) -> Iterator[slice]:
        """Slices of the rows, of so many numbers at most where a row has no more."""
        rows = max(1, MEMORY // (8 * max(1, numbers)))
        for start in range(0, self.x.shape[0], rows):
            yield slice(start, min(start + rows, self.x.shape[0]))

    def separated(self, weight: Array, bias: Array) -> bool:
        """Whether a model gives every row its own class the largest logit; not for soft labels."""
        if self.hard is None:
            return False
        for rows in self.blocks(self.classes):
            z = np.asarray(self.x[rows] @ weight.T + bias)
            own = np.arange(len(z)), self.hard[rows]
            mine = z[own]
            z[own] = -np.inf
            if np.any((mine <= z.max(axis=1)) & (self.weights(rows) > 0)):
                return False
        return True

    def range(self, weight: Array, bias: Array) -> float:
        """The largest difference of two logits of a row, where it counts."""
        found = 0.0
        for rows in self.blocks(self.classes):
            z = np.asarray(self.x[rows] @ weight.T + bias)
            found = max(found, float(np.max(np.ptp(z, axis=1) * (self.weights(rows) > 0))))
        return found


class Gradient(NamedTuple):
    """Loss, and what belongs to the weights (classes, features) and to the intercepts."""

    loss: float
    weight: Array
    bias: Array


class Passes(Protocol):
    """Ways to pass over the data."""

    needs_blas: bool

    def gradient(self, weight: Array, bias: Array) -> Gradient:
        """Loss and gradient of a model."""

    def curvature(self, weight: Array, bias: Array, to: tuple[Array, Array]) -> Gradient:
        """Hessian at a model times a direction; the loss is 0."""


def passes(data: Any, *, curved: bool) -> Passes:
    """The faster way, or that of the data; `curved` keeps what curvatures need."""
    if not isinstance(data, Data):
        return data.passes(curved=curved)  # type: ignore[no-any-return]
    if isinstance(data.x, np.ndarray) and data.classes <= FEW and data.x.flags.c_contiguous:
        few = FewClasses(data, curved=curved)
        if few.block_bytes <= CACHED:
            return few
    return Products(data)


class Products:
    """Products of NumPy's BLAS, or of SciPy for sparse data."""

    needs_blas = True

    def __init__(self, data: Data) -> None:
        self._data = data
        self._memory = np.empty(0, data.x.dtype)
        self._shift = data.x.shift if isinstance(data.x, Standardised) else None

    def _chunks(self) -> Iterator[tuple[slice, Any]]:
        x, classes = self._data.x, self._data.classes
        numbers = classes + x.shape[1] if isinstance(x, Standardised) else classes
        rows = max(1, MEMORY // (numbers * x.dtype.itemsize))
        for start in range(0, x.shape[0], rows):
            part = slice(start, min(start + rows, x.shape[0]))
            yield part, x[part]

    def _logits(self, x: Any, weight: Array, bias: Array) -> Array:
        shape = x.shape[0], self._data.classes
        if isinstance(x, np.ndarray):
            needed = shape[0] * shape[1]
            if self._memory.size < needed:
                self._memory = np.empty(needed, x.dtype)
            z = np.matmul(x, weight.T, out=self._memory[:needed].reshape(shape))
        else:
            z = x @ np.ascontiguousarray(weight.T)
        z += bias
        return z

    def gradient(self, weight: Array, bias: Array) -> Gradient:
        """Loss and gradient of a model."""
        weight, bias = self._shifted(weight, bias)
        result, loss = _zeros(weight), 0.0
        for rows, x in self._chunks():
            z = self._logits(x, weight, bias)
            s = self._data.weights(rows)
            losses, g = fastce.cross_entropy_and_grad(
                z, self._data.labels(rows), ignore_index=-1, reduction="none", grad_output=s, out=z
            )
            loss += float(np.sum(s * losses.astype(np.float64)))
            _collect(result, x, g)
        return self._unshifted(result._replace(loss=loss))

    def curvature(self, weight: Array, bias: Array, to: tuple[Array, Array]) -> Gradient:
        """Hessian at a model times a direction; logits are computed anew, not kept."""
        weight, bias = self._shifted(weight, bias)
        v, b = self._shifted(*to)
        result = _zeros(weight)
        for rows, x in self._chunks():
            z = self._logits(x, weight, bias).copy()
            u = self._logits(x, v, b)
            g = fastce.hessian_vector_product(z, u, grad_output=self._data.weights(rows))
            _collect(result, x, g)
        return self._unshifted(result)

    def _shifted(self, weight: Array, bias: Array) -> tuple[Array, Array]:
        """A model for rows that have not been shifted, in their dtype."""
        if self._shift is not None:
            bias = bias - weight @ self._shift
        return weight.astype(self._data.x.dtype), bias.astype(self._data.x.dtype)

    def _unshifted(self, found: Gradient) -> Gradient:
        if self._shift is None:
            return found
        return found._replace(weight=found.weight - np.outer(found.bias, self._shift))


def _zeros(weight: Array) -> Gradient:
    return Gradient(0.0, np.zeros(weight.shape), np.zeros(len(weight)))


def _collect(result: Gradient, x: Any, g: Array) -> None:
    # X^T G also where X is sparse, whose transposed product SciPy has in this order alone
    np.add(result.weight, g.T @ x if isinstance(x, np.ndarray) else (x.T @ g).T, out=result.weight)
    np.add(result.bias, g.sum(axis=0, dtype=np.float64), out=result.bias)


class FewClasses:
    """The kernel of `fastce.cpu.linear`."""

    needs_blas = False

    def __init__(self, data: Data, *, curved: bool) -> None:
        from fastce.cpu import linear

        self._data, self._kernel = data, linear.linear_pass
        rows, features = data.x.shape
        dtype = data.x.dtype
        lanes = 128 // dtype.itemsize
        self._padded = _up(data.classes, linear.TILE), max(_up(features, 2 * lanes), 2 * lanes)
        self.block_bytes = linear.ROWS * self._padded[1] * dtype.itemsize
        sums = self._padded[0] * self._padded[1] * dtype.itemsize
        parts = max(1, min(PARTS, SUMS // sums))
        self._rows = _up(max(1, -(-rows // parts)), linear.ROWS)
        self._parts = max(1, -(-rows // self._rows))
        self._targets = None if data.hard is None else data.hard.astype(np.float64)
        self._p = None
        if curved:
            self._p = np.empty(_up(rows, linear.ROWS) * self._padded[0], dtype)
        self._at: tuple[Array, Array] | None = None

    def gradient(self, weight: Array, bias: Array) -> Gradient:
        """Loss and gradient of a model."""
        if self._p is not None:
            self._at = weight.copy(), bias.copy()
        return self._pass(weight, bias, None)

    def curvature(self, weight: Array, bias: Array, to: tuple[Array, Array]) -> Gradient:
        """Hessian at a model times a direction, from the probabilities of the pass before."""
        same = self._at is not None and all(map(np.array_equal, self._at, (weight, bias)))
        if not same:
            self.gradient(weight, bias)
        return self._pass(*to, True)

    def _pass(self, weight: Array, bias: Array, hessian: bool | None) -> Gradient:
        from fastce.cpu.threads import launch

        data = self._data
        classes, features = weight.shape
        padded = aligned(self._padded, data.x.dtype)
        padded[:classes, :features] = weight
        intercepts = np.zeros(self._padded[0], data.x.dtype)
        intercepts[:classes] = bias
        losses, biases = np.zeros(self._parts), np.zeros((self._parts, self._padded[0]))
        sums = aligned((self._parts, *self._padded), data.x.dtype)
        args = (
            np.asarray(data.x), padded, intercepts, classes, self._targets, data.soft, data.weight,
            self._p, hessian, losses, biases, sums, self._rows,
        )  # fmt: skip
        parallel = data.x.size * classes > 1 << 17
        launch(self._kernel, args, parallel, self._parts)
        return Gradient(
            float(losses.sum()),
            sums.sum(axis=0, dtype=np.float64)[:classes, :features],
            biases.sum(axis=0)[:classes],
        )


def _up(number: int, to: int) -> int:
    return -(-number // to) * to


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Zeros that start where a cache line does: vectors are read a third faster."""
    size = int(np.prod(shape))
    memory = np.zeros(size + 64 // dtype.itemsize, dtype)
    skip = -memory.ctypes.data % 64 // dtype.itemsize
    return memory[skip : skip + size].reshape(shape)
