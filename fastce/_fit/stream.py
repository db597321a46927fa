"""Learning from a stream of batches, each seen once."""

from typing import Any

import numpy as np

import fastce
from fastce._fit.objective import CORRELATED
from fastce._fit.passes import Array, Data

# Information about intercepts, and about weights without a penalty, before there is any data.
PRIOR = 1e-2


class Stream:
    """Newton steps with the information gathered so far; no step size to choose.

    theta, with its information A, stands for all batches before as a quadratic would.  A batch adds
    to A the second moments of its features, row i times the mean curvature of the softmax there,
    (1 - sum_c p_ic**2) / (C - 1), and moves theta by its gradient divided by A: the extended Kalman
    filter of this model, with one information for all classes.
    """

    def __init__(self, theta: Array, intercept: bool, l2: float) -> None:
        self.theta = np.array(theta, float)
        self._intercept = intercept
        features = theta.shape[1]
        prior = np.full(features, max(l2, PRIOR))
        if intercept:
            prior[-1] = PRIOR
        self._information = prior if features > CORRELATED else np.diag(prior)

    def update(self, data: Data) -> float:
        """Learn from a batch; returns the mean loss before."""
        x: Any = data.x
        rows = slice(0, x.shape[0])
        weight = self.theta[:, :-1] if self._intercept else self.theta
        z = np.asarray(x @ weight.T, float)
        if self._intercept:
            z += self.theta[:, -1]
        p = fastce.softmax(z)
        s = np.broadcast_to(data.weights(rows), len(z))
        losses, g = fastce.cross_entropy_and_grad(
            z, data.labels(rows), ignore_index=-1, reduction="none", grad_output=s.astype(float)
        )
        curvature = s * (1 - np.sum(p * p, axis=1)) / max(data.classes - 1, 1)
        gradient = np.asarray(g.T @ x) if isinstance(x, np.ndarray) else (x.T @ g).T
        if self._intercept:
            gradient = np.column_stack([gradient, g.sum(axis=0)])
        self._add(x, curvature)
        if self._information.ndim == 1:
            self.theta -= gradient / self._information
        else:
            self.theta -= np.linalg.solve(self._information, gradient.T).T
        return float(np.sum(s * losses) / data.total_weight)

    def _add(self, x: Any, curvature: Array) -> None:
        dense = isinstance(x, np.ndarray)
        features = x.shape[1]
        if self._information.ndim == 1:
            squares = x * x if dense else x.multiply(x).tocsr()
            self._information[:features] += squares.T @ curvature
            if self._intercept:
                self._information[-1] += curvature.sum()
            return
        part = x if dense else x.toarray()
        if self._intercept:
            part = np.column_stack([part, np.ones(len(part))])
        self._information += part.T @ (curvature[:, None] * part)
