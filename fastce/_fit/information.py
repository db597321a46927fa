"""Fisher information of a softmax regression, and the standard errors that follow from it."""

from typing import Any

import numpy as np

import fastce
from fastce._fit.passes import Array

# Free parameters up to which their covariance is computed, a square matrix of so many.
MOST = 10_000
# Numbers of a block of rows.
BLOCK = 1 << 20


def standard_errors(
    x: Any, theta: Array, intercept: bool, weight: Array | None, l2: float, reference: int
) -> Array:
    """Standard errors of theta, a row per class, less the row of a reference class.

    With the reference fixed, the information about the other classes a and b is the matrix

        sum_i s_i p_ia ([a = b] - p_ib) x_i x_i^T          (x_i with a 1 for the intercept)

    to which a penalty on all rows of theta adds its own second derivative.  The square roots of
    the diagonal of its inverse are returned, zero for the reference.
    """
    classes, features = theta.shape
    free = [c for c in range(classes) if c != reference]
    count = len(free) * features
    if count > MOST:
        raise ValueError(
            f"X: expected at most {MOST} free coefficients for standard errors, got {count}"
        )
    information = np.zeros((len(free), features, len(free), features))
    rows = max(1, BLOCK // (features + classes))
    for start in range(0, x.shape[0], rows):
        part = x[start : start + rows]
        part = np.asarray(part if isinstance(part, np.ndarray) else part.toarray(), float)
        if intercept:
            part = np.column_stack([part, np.ones(len(part))])
        p = fastce.softmax(part @ theta.T)[:, free]
        s = np.ones(len(part)) if weight is None else weight[start : start + rows]
        for a in range(len(free)):
            for b in range(a + 1):
                scale = s * p[:, a] * ((a == b) - p[:, b])
                block = part.T @ (scale[:, None] * part)
                information[a, :, b] += block
                if a != b:
                    information[b, :, a] += block
    # The penalty l2 / 2 |W|**2 in terms of differences to the reference, whose own weights are
    # those that minimise it: the differences less their mean.
    for feature in range(features - intercept):
        information[:, feature, :, feature] += l2 * (np.eye(len(free)) - 1 / classes)
    covariance = np.linalg.inv(information.reshape(count, count))
    errors = np.zeros(theta.shape)
    errors[free] = np.sqrt(np.diag(covariance)).reshape(len(free), features)
    return errors
