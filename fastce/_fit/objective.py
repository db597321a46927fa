"""What is minimised, in coordinates where it is easy to minimise."""

import numpy as np
import numpy.typing as npt
import scipy.linalg

from fastce._fit.passes import Array, Data, passes

Vector = npt.NDArray[np.float64]

# Features up to which the coordinates take account of how they are correlated, not of their scales
# alone: a square matrix of so many.
CORRELATED = 2048
# Rows per feature that correlations are estimated from: what they are for needs no digits.
SAMPLE = 8
# Bytes of rows that are weighted at a time.
BLOCK = 2 << 20
# Weight of uncorrelated features in that estimate, which keeps it well conditioned.
SHRINK = 1e-3


class Objective:
    """Mean loss with penalty: (sum_i s_i loss_i + l2 / 2 |W|**2) / sum_i s_i.

    `theta` has a row per class: its weights, then, if there are intercepts, its own.  Solvers see
    it in other coordinates, v = theta L with L L^T the Hessian with respect to one class where all
    probabilities are alike, 1 / C times the second moments of the features plus the penalty.
    There the Hessian starts as the identity (on what changes the softmax at all), so that
    L-BFGS starts as Newton's method, and conjugate gradients take few steps.
    """

    def __init__(self, data: Data, l2: float, intercept: bool, *, curved: bool) -> None:
        self._passes = passes(data, curved=curved)
        self.needs_blas = self._passes.needs_blas
        self.noise = 1e-9 if data.x.dtype == np.float32 else 1e-15
        self._weight = data.total_weight
        self._l2 = l2 / self._weight
        self._intercept = intercept
        self.shape = data.classes, data.x.shape[1] + intercept
        self._inverse = _inverse_root(data, self._l2, intercept, self._weight)
        self.theta = np.zeros(self.shape)
        self.value = np.inf
        self.gradient = np.zeros(self.shape)
        self._at: Vector | None = None

    def to_theta(self, v: Vector) -> Vector:
        """The model at solver's coordinates."""
        return self._apply(v.reshape(self.shape))

    def from_theta(self, theta: Vector) -> Vector:
        """Solver's coordinates of a model."""
        if self._inverse.ndim == 1:
            return (theta / self._inverse).ravel()
        return np.asarray(np.linalg.solve(self._inverse.T, theta.T).T.ravel(), np.float64)

    def _apply(self, v: Vector) -> Vector:
        return v * self._inverse if self._inverse.ndim == 1 else v @ self._inverse

    def _apply_transposed(self, g: Vector) -> Vector:
        return (g * self._inverse if self._inverse.ndim == 1 else g @ self._inverse.T).ravel()

    def _split(self, theta: Vector) -> tuple[Vector, Vector]:
        if self._intercept:
            return theta[:, :-1], theta[:, -1]
        return theta, np.zeros(len(theta))

    def _joined(self, weight: Array, bias: Array, penalised: Vector) -> Vector:
        weight = weight / self._weight + self._l2 * penalised
        return np.column_stack([weight, bias / self._weight]) if self._intercept else weight

    def __call__(self, v: Vector) -> tuple[float, Vector]:
        """Value and gradient in the solver's coordinates; kept in those of the model."""
        self.theta = self.to_theta(v)
        weight, bias = self._split(self.theta)
        found = self._passes.gradient(weight, bias)
        self.value = found.loss / self._weight + self._l2 / 2 * float(np.vdot(weight, weight))
        self.gradient = self._joined(found.weight, found.bias, weight)
        self._at = v.copy()
        return self.value, self._apply_transposed(self.gradient)

    def hessian_product(self, v: Vector, to: Vector) -> Vector:
        """Hessian at v times a direction, both in the solver's coordinates."""
        direction = self._split(self.to_theta(to))
        found = self._passes.curvature(*self._split(self.to_theta(v)), direction)
        return self._apply_transposed(self._joined(found.weight, found.bias, direction[0]))

    def look(self, v: Vector) -> None:
        """Make `theta`, `value` and `gradient` those at v."""
        if self._at is None or not np.array_equal(self._at, v):
            self(v)


def _inverse_root(data: Data, l2: float, intercept: bool, total: float) -> Vector:
    """L^-1 as a matrix, or as a vector where L is diagonal."""
    x = data.x
    features = x.shape[1]
    squares = data.squares() / (total * data.classes) + l2
    if intercept:
        squares = np.append(squares, 1 / data.classes)
    typical = squares.mean() or 1.0
    squares = np.maximum(squares, 1e-12 * typical)  # features that are always 0
    scales = np.sqrt(squares)
    if features > CORRELATED or not features:
        return np.asarray(1 / scales)
    step = max(1, x.shape[0] // max(SAMPLE * features, 1024))
    some, weights = data.sample(step)
    share = max(float(weights.sum()), np.finfo(float).tiny) * data.classes
    dense = isinstance(some, np.ndarray)
    moments = np.zeros((features + intercept,) * 2)
    rows = max(1, BLOCK // (8 * features))
    for start in range(0, some.shape[0], rows):
        part = some[start : start + rows]
        root = np.sqrt(weights[start : start + rows])
        part = (part if dense else part.toarray()) * root[:, None].astype(x.dtype)
        moments[:features, :features] += part.T @ part
        if intercept:
            moments[features, :features] += root @ part
            moments[features, features] += root @ root
    if intercept:
        moments[:features, features] = moments[features, :features]
    moments /= share
    moments[np.arange(features), np.arange(features)] += l2
    # Their scales are those of all rows, so that no feature is lost that the sample lacks.
    own = np.sqrt(np.maximum(np.diag(moments), 1e-300))
    moments *= 1 - SHRINK
    moments /= own
    moments /= own[:, None]
    np.fill_diagonal(moments, 1.0)
    # In place: beside the data this matrix is most of the memory of a fit.
    root = scipy.linalg.cholesky(moments.T, lower=True, overwrite_a=True, check_finite=False)
    inverse, _ = scipy.linalg.lapack.dtrtri(root, lower=True, overwrite_c=True)
    inverse /= scales
    return np.asarray(inverse)
