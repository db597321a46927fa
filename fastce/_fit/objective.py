"""What is minimised, in coordinates where it is easy to minimise."""

import numpy as np
import scipy.linalg

from fastce._fit.coordinates import Coordinates, Vector
from fastce._fit.passes import Array, Data, passes

# Features up to which the coordinates take account of how they are correlated, not of their scales
# alone: a square matrix of so many.
CORRELATED = 2048
# Rows per feature that correlations are estimated from, at least; multiplications, and numbers,
# that more rows are used for.
SAMPLE, WORK, NUMBERS = 8, 1 << 26, 1 << 22
# Bytes of rows that are weighted at a time.
BLOCK = 2 << 20
# Weight of uncorrelated features in that estimate, which keeps it well conditioned: where it is a
# sample's, or gradients are of float32; else features may be as good as dependent.
SHRINK, SHRINK_EXACT = 1e-3, 1e-10


class Objective:
    """Mean loss with penalty: (sum_i s_i loss_i + l2 / 2 |W|**2) / sum_i s_i.

    There are three kinds of coordinates. `theta` has a row per class: its weights, then, if there
    are intercepts, its own. phi is the same of standardised features: those less their means,
    divided by their spreads (by the root of the second derivative of the objective, so that the
    penalty counts), which makes neither units nor offsets matter. Solvers see v = phi L with
    L L^T the Hessian with respect to one class where all probabilities are alike, 1 / C times the
    second moments of the standardised features plus the penalty. There the Hessian starts as the
    identity (on what changes the softmax at all), so that L-BFGS starts as Newton's method, and
    conjugate gradients take few steps.
    """

    def __init__(self, data: Data, l2: float, intercept: bool, *, curved: bool) -> None:
        self.weight = data.total_weight
        self._l2 = l2 / self.weight
        self.shape = data.classes, data.x.shape[1] + intercept
        moments = data.moments()
        moments.check()
        self.lies_well = moments.lie_well(data.x.dtype)
        self.coordinates = Coordinates.of(moments, intercept, self._l2 * data.classes)
        if intercept:  # which stands for constants: exactly, whatever they are folded into
            self.coordinates.inverse[(moments.spread == 0) & (moments.mean != 0)] = 0
        seen, self._left = data.seen(moments, self.coordinates)
        self._passes = passes(seen, curved=curved)
        self.needs_blas = self._passes.needs_blas
        single = seen.x.dtype == np.float32
        self.noise = 1e-9 if single else 1e-15
        self._inverse = _inverse_root(data, self.coordinates, self._l2, single)
        self.theta = np.zeros(self.shape)
        self.value = np.inf
        self.gradient = np.zeros(self.shape)
        self.slope = np.inf
        self._at: Vector | None = None

    def to_theta(self, v: Vector) -> Vector:
        """The model at solver's coordinates."""
        return self.coordinates.to_theta(self._apply(v))

    def from_theta(self, theta: Vector) -> Vector:
        """Solver's coordinates of a model."""
        phi = self.coordinates.from_theta(theta)
        if self._inverse.ndim == 1:
            return (phi / self._inverse).ravel()
        return np.asarray(np.linalg.solve(self._inverse.T, phi.T).T.ravel(), np.float64)

    def _apply(self, v: Vector) -> Vector:
        v = v.reshape(self.shape)
        return v * self._inverse if self._inverse.ndim == 1 else v @ self._inverse

    def _apply_transposed(self, g: Vector) -> Vector:
        return (g * self._inverse if self._inverse.ndim == 1 else g @ self._inverse.T).ravel()

    def _seen(self, phi: Vector) -> tuple[Vector, Vector]:
        """Weights and intercepts of the model for what the passes see."""
        return self._left.split(self._left.to_theta(phi))

    def _gradient(self, weight: Array, bias: Array, penalised: Vector) -> Vector:
        """Derivatives by phi, of sums over the rows and the penalty of weights."""
        found = self._left.gradient(weight, bias) / self.weight
        if self._l2:
            weights, _ = self._left.split(found)
            weights += self._l2 * penalised * self.coordinates.inverse
        return found

    def __call__(self, v: Vector) -> tuple[float, Vector]:
        """Value and gradient in the solver's coordinates.

        Kept are the model, the gradient by phi, and the slope: the largest component of the
        gradient by coefficients of features that are standardised and decorrelated.
        """
        phi = self._apply(v)
        self.theta = self.coordinates.to_theta(phi)
        weight, _ = self.coordinates.split(self.theta)
        found = self._passes.gradient(*self._seen(phi))
        self.value = found.loss / self.weight
        if self._l2:
            self.value += self._l2 / 2 * float(np.vdot(weight, weight))
        self.gradient = self._gradient(found.weight, found.bias, weight)
        self._at = v.copy()
        gradient = self._apply_transposed(self.gradient)
        self.slope = float(abs(gradient).max(initial=0)) / np.sqrt(self.shape[0])
        return self.value, gradient

    def hessian_product(self, v: Vector, to: Vector) -> Vector:
        """Hessian at v times a direction, both in the solver's coordinates."""
        direction = self._apply(to)
        found = self._passes.curvature(*self._seen(self._apply(v)), self._seen(direction))
        penalised, _ = self.coordinates.split(self.coordinates.to_theta(direction))
        return self._apply_transposed(self._gradient(found.weight, found.bias, penalised))

    def look(self, v: Vector) -> None:
        """Make `theta`, `value`, `gradient` and `slope` those at v."""
        if self._at is None or not np.array_equal(self._at, v):
            self(v)


def _inverse_root(data: Data, coordinates: Coordinates, l2: float, single: bool) -> Vector:
    """L^-1 as a matrix, or as a vector where L is diagonal."""
    features = len(coordinates.centre)
    size = features + coordinates.intercept
    root = np.sqrt(data.classes)
    if features > CORRELATED or not features:
        return np.full(size, root)  # second moments are 1 / C, which is what standardising is for
    least = max(SAMPLE * features, 1024, min(WORK // features**2, NUMBERS // features))
    step = max(1, data.x.shape[0] // least)
    some, weights = data.sample(step)
    moments = np.zeros((size, size))
    rows = max(1, BLOCK // (8 * size))
    for start in range(0, some.shape[0], rows):
        part = coordinates.design(some[start : start + rows])
        part *= np.sqrt(weights[start : start + rows])[:, None]
        moments += part.T @ part
    moments /= max(float(weights.sum()), np.finfo(float).tiny)
    penalised = np.arange(features)
    moments[penalised, penalised] += (np.sqrt(l2 * data.classes) * coordinates.inverse) ** 2
    # Their scales are those of all rows, so that no feature is lost that the sample lacks.
    own = np.sqrt(np.maximum(np.diag(moments), 1e-300))
    moments *= 1 - (SHRINK_EXACT if step == 1 and not single else SHRINK)
    moments /= own
    moments /= own[:, None]
    np.fill_diagonal(moments, 1.0)
    # In place: beside the data this matrix is most of the memory of a fit.
    lower = scipy.linalg.cholesky(moments.T, lower=True, overwrite_a=True, check_finite=False)
    inverse, _ = scipy.linalg.lapack.dtrtri(lower, lower=True, overwrite_c=True)
    inverse *= root
    return np.asarray(inverse)
