"""Fisher information of a softmax regression, and the covariance of its estimate."""

from typing import Any

import numpy as np
import scipy.linalg

import fastce
from fastce._fit.coordinates import Coordinates, Moments, Vector
from fastce._fit.passes import Array

# Free parameters up to which their covariance is computed, a square matrix of so many.
MOST = 10_000
# Numbers of a block of rows.
BLOCK = 1 << 20
# Reciprocal condition below which an information matrix of unit diagonal is as good as singular.
SINGULAR = 1e-14


def information(
    x: Any, phi: Vector, coordinates: Coordinates, weight: Array | None, reference: int
) -> Vector:
    """Fisher information about a model of standardised features, less the row of a reference class.

    With the reference fixed, the information about the other classes a and b is the matrix

        sum_i s_i p_ia ([a = b] - p_ib) x_i x_i^T          (x_i with a 1 for the intercept)
    """
    classes, features = phi.shape
    free = np.delete(np.arange(classes), reference)
    found = np.zeros((len(free), features, len(free), features))
    rows = max(1, BLOCK // (features + classes))
    for start in range(0, x.shape[0], rows):
        part = coordinates.design(x[start : start + rows])
        p = fastce.softmax(part @ phi.T)[:, free]
        s = np.ones(len(part)) if weight is None else weight[start : start + rows]
        for a in range(len(free)):
            for b in range(a + 1):
                scale = s * p[:, a] * ((a == b) - p[:, b])
                block = part.T @ (scale[:, None] * part)
                found[a, :, b] += block
                if a != b:
                    found[b, :, a] += block
    return found.reshape(2 * (len(free) * features,))


def inverse(matrix: Vector) -> Vector | None:
    """The inverse of a positive definite matrix, None where rounding makes it singular."""
    size = np.sqrt(np.diag(matrix))
    if not np.all(size > 0):
        return None
    scaled = matrix / size / size[:, None]
    norm = float(abs(scaled).sum(axis=0).max())
    factor, failed = scipy.linalg.lapack.dpotrf(scaled, lower=True)
    if failed or scipy.linalg.lapack.dpocon(factor, norm, uplo="L")[0] < SINGULAR:
        return None
    found, _ = scipy.linalg.lapack.dpotri(factor, lower=True)
    found = np.tril(found) + np.tril(found, -1).T
    return np.asarray(found / size / size[:, None])


def covariance(
    x: Any, theta: Array, intercept: bool, weight: Array | None, l2: float, reference: int
) -> tuple[Vector, Vector]:
    """Covariance of theta, a row per class, less the row of a reference class; standard errors.

    It is the inverse of the information, to which a penalty on all rows of theta adds its own
    second derivative. All is computed for standardised features, where units and offsets make no
    difference, and standard errors change their units without being squared. These have a row of
    zeros for the reference, the covariance has none.
    """
    classes, features = theta.shape
    count = (classes - 1) * features
    if count > MOST:
        raise ValueError(
            f"X: expected at most {MOST} free coefficients for standard errors, got {count}"
        )
    moments = Moments.of(x, weight)
    moments.check()
    coordinates = Coordinates.of(moments, intercept, l2 / max(moments.weight, 1e-300) * classes)
    phi = coordinates.from_theta(theta)
    known = information(x, phi, coordinates, weight, reference)
    # The penalty l2 / 2 |W|**2 in terms of differences to the reference, whose own weights are
    # those that minimise it: the differences less their mean.
    penalty = np.eye(classes - 1) - 1 / classes
    blocks = known.reshape(classes - 1, features, classes - 1, features)
    for feature in range(features - intercept):
        blocks[:, feature, :, feature] += (
            np.sqrt(l2) * coordinates.inverse[feature]
        ) ** 2 * penalty
    found = inverse(known)
    if found is None:
        raise np.linalg.LinAlgError(
            f"X: expected data that determine the coefficients, got {_culprit(coordinates)}"
        )
    units = np.append(coordinates.inverse, 1.0) if intercept else coordinates.inverse
    found = found.reshape(classes - 1, features, classes - 1, features)
    if intercept:  # b = b of the centred features less W centre, for columns and rows
        way = coordinates.centre * coordinates.inverse
        found[:, -1] -= np.einsum("f,afbg->abg", way, found[:, :-1])
        found[..., -1] -= np.einsum("afbg,g->afb", found[..., :-1], way)
    found = found.reshape(count, count)
    errors = np.sqrt(np.diag(found)).reshape(classes - 1, features) * units
    units = np.tile(units, classes - 1)
    found *= units
    found *= units[:, None]
    return (found + found.T) / 2, np.insert(errors, reference, 0.0, axis=0)


def _culprit(coordinates: Coordinates) -> str:
    constant = np.flatnonzero(coordinates.inverse == 0)
    if len(constant):
        return f"a constant, feature {constant[0]}"
    return "features that depend on each other, or classes that are separable"
