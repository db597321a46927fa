"""Where the features lie, and coordinates in which it makes no difference: centred and scaled."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

# Numbers of a block of rows, dense or sparse.
BLOCK = 1 << 16
# Spreads in whose units coefficients, variances of them and sums over rows are held by float64.
LEAST, MOST = 2.0**-1000, 2.0**1000
# How far from 0 features may lie, in spreads, and which spreads they may have, for products with
# them as they are to keep the digits of products with centred ones.
FAR = {np.dtype(np.float64): 1e4, np.dtype(np.float32): 32.0}
WIDE = {np.dtype(np.float64): 2.0**400, np.dtype(np.float32): 2.0**40}


class Moments(NamedTuple):
    """Weight of some rows, and the weighted mean and standard deviation of each feature.

    A feature that is the same in all rows has exactly the spread 0. Rows of weight 0 do not count.
    """

    weight: float
    mean: Vector
    spread: Vector

    @classmethod
    def of(cls, x: Any, weights: Vector | None) -> "Moments":
        """Moments of rows, dense or CSR, some at a time."""
        numbers = x.shape[1] if isinstance(x, np.ndarray) else x.nnz // max(x.shape[0], 1)
        rows = max(1, BLOCK // max(1, numbers))
        if not isinstance(x, np.ndarray):  # whose moments are vectors as long as many of its rows
            rows = max(rows, 16 * BLOCK)
        found = cls(0.0, np.zeros(x.shape[1]), np.zeros(x.shape[1]))
        of = _of_dense if isinstance(x, np.ndarray) else _of_sparse
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, x.shape[0], rows):
                part = x[start : start + rows]
                s = np.ones(part.shape[0])
                if weights is not None:
                    s = weights[start : start + rows]
                    if not s.all():
                        part, s = part[s > 0], s[s > 0]
                if len(s):
                    found = found.merged(cls(float(s.sum()), *of(part, s)))
        return found

    def merged(self, other: "Moments") -> "Moments":
        """Moments of the rows of both (Chan, Golub and LeVeque, 1979), without overflow."""
        if not other.weight or not self.weight:
            return self if self.weight else other
        weight = self.weight + other.weight
        share, rest = other.weight / weight, self.weight / weight
        with np.errstate(over="ignore", invalid="ignore"):
            step = other.mean - self.mean
            unit = np.maximum(np.maximum(self.spread, other.spread), abs(step))
            unit[unit == 0] = 1
            squares = rest * (self.spread / unit) ** 2 + share * (other.spread / unit) ** 2
            squares += rest * share * (step / unit) ** 2
            return Moments(weight, self.mean + share * step, unit * np.sqrt(squares))

    def check(self) -> None:
        """Refuse features whose coefficients float64 cannot hold."""
        wrong = ~np.isfinite(self.mean) | ~np.isfinite(self.spread)
        wrong |= (self.spread > 0) & ((self.spread < LEAST) | (self.spread > MOST))
        if wrong.any():
            first = int(np.argmax(wrong))
            raise ValueError(
                f"X: expected features that vary by {LEAST:.0e} to {MOST:.0e}, or are constant, "
                f"got {self.spread[first]:.2g} in feature {first}; scale it"
            )

    def lie_well(self, dtype: np.dtype[Any]) -> bool:
        """Whether products with the features as they are keep the digits of this dtype."""
        varies = self.spread > 0
        far = abs(self.mean) > FAR[dtype] * self.spread
        wide = np.maximum(self.spread, 1 / np.maximum(self.spread, LEAST)) > WIDE[dtype]
        return not np.any(varies & (far | wide))


def _of_dense(x: npt.NDArray[Any], s: Vector) -> tuple[Vector, Vector]:
    # Relative to the first row, a constant is exactly 0; and relative to the furthest from it,
    # no square is too large or small. The first row is one of them, hence no further from the mean
    # than the square root of their number: few digits are lost.
    first = x[0].astype(np.float64)
    from_first = x - first
    unit = np.maximum(from_first.max(axis=0), -from_first.min(axis=0))
    from_first /= np.where(unit > 0, unit, 1)
    mean = s @ from_first / s.sum()
    np.square(from_first, out=from_first)
    variance = np.maximum(s @ from_first / s.sum() - mean**2, 0)
    return first + unit * mean, unit * np.sqrt(variance)


def _of_sparse(x: Any, s: Vector) -> tuple[Vector, Vector]:
    # The same where what is not stored is 0, and has the weight that the stored leave.
    if not x.has_canonical_format:
        x = x.copy()
        x.sum_duplicates()
    features, total = x.shape[1], s.sum()
    columns, weights = x.indices, np.repeat(s, np.diff(x.indptr))
    gaps = np.bincount(columns, minlength=features) < x.shape[0]
    rest = np.where(gaps, np.maximum(total - np.bincount(columns, weights, features), 0), 0.0)
    first = np.asarray(x[[0]].toarray(), np.float64)[0]
    stored = x.data - first[columns]
    unit = np.where(gaps, abs(first), 0.0)
    np.maximum.at(unit, columns, abs(stored))
    safe = np.where(unit > 0, unit, 1)
    stored /= safe[columns]
    gap = np.where(gaps, -first / safe, 0.0)
    mean = (np.bincount(columns, weights * stored, features) + rest * gap) / total
    squares = np.bincount(columns, weights * (stored - mean[columns]) ** 2, features)
    squares += rest * (gap - mean) ** 2
    return first + unit * mean, unit * np.sqrt(squares / total)


class Coordinates(NamedTuple):
    """Standardised features, (x - centre) inverse; inverse is 0 for one that is not to count.

    Models have a row per class: weights and, if there are intercepts, its own last. Without an
    intercept there is nothing that a centre could be made up by, and it is 0.
    """

    centre: Vector
    inverse: Vector
    intercept: bool

    @classmethod
    def of(cls, moments: Moments, intercept: bool, penalty: float = 0.0) -> "Coordinates":
        """Coordinates where the second moment of each feature plus its penalty is 1.

        `penalty` is the second derivative of the penalty with respect to a coefficient.
        """
        centre = moments.mean if intercept else np.zeros(len(moments.mean))
        size = moments.spread if intercept else np.hypot(moments.mean, moments.spread)
        scale = np.hypot(size, np.sqrt(penalty))
        return cls(centre, np.where(scale > 0, 1 / np.where(scale > 0, scale, 1), 0.0), intercept)

    def split(self, model: Vector) -> tuple[Vector, Vector]:
        """Weights and intercepts of a model, zeros if it has none."""
        if self.intercept:
            return model[:, :-1], model[:, -1]
        return model, np.zeros(len(model))

    def to_theta(self, phi: Vector) -> Vector:
        """The model of the features as they are, from that of the standardised ones."""
        if not self.intercept:
            return phi * self.inverse
        weight = phi[:, :-1] * self.inverse
        return np.column_stack([weight, phi[:, -1] - weight @ self.centre])

    def from_theta(self, theta: Vector) -> Vector:
        """The model of the standardised features."""
        scale = np.where(self.inverse > 0, 1 / np.where(self.inverse > 0, self.inverse, 1), 0.0)
        if not self.intercept:
            return theta * scale
        weight = theta[:, :-1]
        return np.column_stack([weight * scale, theta[:, -1] + weight @ self.centre])

    def gradient(self, weight: Vector, bias: Vector) -> Vector:
        """Derivatives by the model of the standardised features, from those by the other's."""
        if not self.intercept:
            return weight * self.inverse
        return np.column_stack([(weight - np.outer(bias, self.centre)) * self.inverse, bias])

    @property
    def identity(self) -> "Coordinates":
        """The coordinates of what is standardised already."""
        features = len(self.centre)
        return Coordinates(np.zeros(features), np.ones(features), self.intercept)

    def design(self, x: Any) -> Vector:
        """Standardised rows, dense, with a 1 for the intercept."""
        x = x if isinstance(x, np.ndarray) else x.toarray()
        found = np.ones((len(x), x.shape[1] + self.intercept))
        standardised = found[:, : x.shape[1]]
        np.subtract(x, self.centre, out=standardised)
        standardised *= self.inverse
        return found


class Standardised:
    """Rows that are standardised when they are asked for.

    Differences are taken in float64. Sparse rows are scaled, but not centred: `shift` is what all
    of them have too much.
    """

    def __init__(self, x: Any, coordinates: Coordinates) -> None:
        self._x, self._coordinates, self.shape = x, coordinates, x.shape
        centred = isinstance(x, np.ndarray) and coordinates.intercept
        self.dtype = x.dtype if centred else np.dtype(np.float64)
        self.shift = None if centred else coordinates.centre * coordinates.inverse

    def __getitem__(self, rows: slice) -> Any:
        part = self._x[rows]
        if isinstance(part, np.ndarray):
            found = part - self._coordinates.centre
            found *= self._coordinates.inverse
            return found.astype(self.dtype, copy=False)
        found = part.astype(np.float64)
        found.data *= self._coordinates.inverse[found.indices]
        return found
