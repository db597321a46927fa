"""Learning from a stream of batches, each seen once."""

from typing import Any

import numpy as np

import fastce
from fastce._fit.coordinates import Coordinates, Moments, Vector
from fastce._fit.objective import CORRELATED
from fastce._fit.passes import Array, Data

# Information about intercepts, and about weights without a penalty, before there is any data: that
# of so many rows, for features of mean 0 and spread 1.
PRIOR = 1e-2


class Stream:
    """Newton steps with the information gathered so far; no step size to choose.

    theta, with its information A, stands for all batches before as a quadratic would.  A batch adds
    to A the second moments of its features, row i times the mean curvature of the softmax there,
    (1 - sum_c p_ic**2) / (C - 1), and moves theta by its gradient divided by A: the extended Kalman
    filter of this model, with one information for all classes.

    Both are kept for standardised features, phi for theta, by the means and spreads of all rows so
    far. As these move so do the coordinates: neither units nor offsets make a difference.
    """

    def __init__(self, theta: Array, intercept: bool, l2: float) -> None:
        features = theta.shape[1] - intercept
        none = np.zeros(features)
        self.moments = Moments(0.0, none, none)
        self._coordinates = Coordinates(none, none, intercept)
        self._phi = np.array(theta, float)
        self._l2 = l2
        gathered = _Diagonal if theta.shape[1] > CORRELATED else _Full
        self._information: _Diagonal | _Full = gathered(features)

    @property
    def theta(self) -> Vector:
        """The model of the features as they are."""
        return self._coordinates.to_theta(self._phi)

    def update(self, data: Data) -> float:
        """Learn from a batch; returns the mean loss before."""
        moments = self.moments.merged(data.moments())
        moments.check()
        self._move(moments)
        coordinates = self._coordinates
        x, shift = _standardised(data.x, coordinates)
        features = x.shape[1]
        weight, bias = self._phi[:, :features], np.zeros(data.classes)
        if coordinates.intercept:
            bias = self._phi[:, -1]
        z = np.asarray(x @ weight.T) + (bias - weight @ shift)
        p = fastce.softmax(z)
        s = np.broadcast_to(data.weights(slice(0, len(z))), len(z)).astype(float)
        losses, g = fastce.cross_entropy_and_grad(
            z, data.labels(slice(0, len(z))), ignore_index=-1, reduction="none", grad_output=s
        )
        curvature = s * (1 - np.sum(p * p, axis=1)) / max(data.classes - 1, 1)
        sums = g.sum(axis=0)
        gradient = np.asarray((x.T @ g).T) - np.outer(sums, shift)
        if coordinates.intercept:
            gradient = np.column_stack([gradient, sums])
        self._information.add(x, shift, curvature)
        prior = np.full(gradient.shape[1], PRIOR)
        penalty = np.minimum(np.sqrt(self._l2) * coordinates.inverse, 1e100) ** 2
        prior[:features] = np.maximum(PRIOR, penalty)
        self._phi -= self._information.solve(gradient, prior)
        return float(np.sum(s * losses) / data.total_weight)

    def _move(self, moments: Moments) -> None:
        """Change over to the coordinates of these moments."""
        old, new = self._coordinates, Coordinates.of(moments, self._coordinates.intercept)
        if self.moments.weight:
            # What was constant so far has no weight, and lay where the centre was.
            varied = old.inverse > 0
            ratio = np.divide(new.inverse, old.inverse, where=varied, out=np.ones(len(varied)))
            step = new.centre - old.centre
            self._information.move(ratio, step * new.inverse)
            if new.intercept:
                self._phi[:, -1] += self._phi[:, :-1] @ (old.inverse * step)
            self._phi[:, : len(ratio)] /= ratio
        self.moments, self._coordinates = moments, new


def _standardised(x: Any, coordinates: Coordinates) -> tuple[Any, Vector]:
    """A batch, in float64, and what all its rows have too much: sparse ones are not centred."""
    if isinstance(x, np.ndarray):
        return (x - coordinates.centre) * coordinates.inverse, np.zeros(x.shape[1])
    scaled = x.astype(np.float64)
    scaled.sum_duplicates()
    scaled.data *= coordinates.inverse[scaled.indices]
    return scaled, coordinates.centre * coordinates.inverse


class _Full:
    """Information as a matrix, with the intercept last, whether there is one or not."""

    def __init__(self, features: int) -> None:
        self._matrix = np.zeros((features + 1, features + 1))

    def add(self, x: Any, shift: Vector, curvature: Array) -> None:
        part = (x if isinstance(x, np.ndarray) else x.toarray()) - shift
        part = np.column_stack([part, np.ones(len(part))])
        self._matrix += part.T @ (curvature[:, None] * part)

    def move(self, ratio: Vector, step: Vector) -> None:
        """Change over to features times `ratio`, less `step`."""
        factors = np.append(ratio, 1.0)
        self._matrix *= factors
        self._matrix *= factors[:, None]
        self._matrix[:-1] -= np.outer(step, self._matrix[-1])
        self._matrix[:, :-1] -= np.outer(self._matrix[:, -1], step)

    def solve(self, gradient: Vector, prior: Vector) -> Vector:
        size = len(prior)
        matrix = self._matrix[:size, :size].copy()
        matrix[np.arange(size), np.arange(size)] += prior
        return np.asarray(np.linalg.solve(matrix, gradient.T).T)


class _Diagonal:
    """Its diagonal alone; and what lies beside the intercept, without which it cannot be moved."""

    def __init__(self, features: int) -> None:
        self._squares, self._beside, self._sum = np.zeros(features), np.zeros(features), 0.0

    def add(self, x: Any, shift: Vector, curvature: Array) -> None:
        total = curvature.sum()
        if isinstance(x, np.ndarray):
            self._squares += curvature @ (x * x)
            self._beside += curvature @ x
        else:  # what is stored, and what is not: the shift, which is large where all is stored
            features = len(shift)
            part, weights = x.data - shift[x.indices], np.repeat(curvature, np.diff(x.indptr))
            rest = total - np.bincount(x.indices, weights, features)
            rest[np.bincount(x.indices, minlength=features) == x.shape[0]] = 0
            self._squares += np.bincount(x.indices, weights * part**2, features) + rest * shift**2
            self._beside += np.bincount(x.indices, weights * part, features) - rest * shift
        self._sum += total

    def move(self, ratio: Vector, step: Vector) -> None:
        """Change over to features times `ratio`, less `step`."""
        squares = ratio**2 * self._squares - 2 * step * ratio * self._beside + step**2 * self._sum
        self._squares = np.maximum(squares, 0)
        self._beside = ratio * self._beside - step * self._sum

    def solve(self, gradient: Vector, prior: Vector) -> Vector:
        diagonal = np.append(self._squares, self._sum)[: len(prior)]
        return np.asarray(gradient / (diagonal + prior))
