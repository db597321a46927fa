"""Whether there is a maximum of the likelihood at all: whether the classes can be separated.

There is none if some direction of the coefficients makes no observation less likely and one more
(Albert and Anderson, 1984): where its label is y and delta is the direction, delta_y x >= delta_c x
for all classes c, for all observations, with > for one. The separation is complete if it can be >
for all, else quasi-complete. Labels that are distributions count for every class that they have.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.sparse

from fastce._fit.coordinates import Coordinates, Vector
from fastce._fit.information import information, inverse
from fastce._fit.objective import Objective
from fastce._fit.passes import Array, Data

Kind = Literal["complete", "partial", None]

# Coefficients, and multiplications, up to which the information about them is computed.
COEFFICIENTS, WORK = 1000, 2e8
# Share of a feature's second moment, not explained by others, that is rounding.
DEPENDENT = 1e-13
# Numbers of data in chunks that are fetched, numbers of a linear program, and its seconds.
FETCHED, NUMBERS, SECONDS = 1 << 22, 1 << 21, 10.0
# Largest coefficients of a direction that makes differences of 1: beyond, it is rounding.
STEEP = 1e5
# Slopes at which Newton's method is stopped, and how far apart logits are there if there is no
# maximum: a probability that has only to be small is smaller by as much at each of its steps.
NEAR, NEARER, APART = 1e-5, 1e-8, 1.0


def find(
    data: Any, objective: Objective, theta: Vector, newton: Callable[[Vector, float], Vector]
) -> Kind:
    """How the classes are separated, as far as is told by the end of a fit without a penalty.

    `newton` minimises from some model until the slope is no larger than it is told.
    """
    split = objective.coordinates.split
    if data.separated(*split(theta)):
        return "complete"
    size = data.x.shape[0] * data.x.shape[1]
    whole = data if isinstance(data, Data) else data.whole() if size <= FETCHED else None
    if whole is not None:
        if has_maximum(whole, objective, theta):
            return None
        separable = program(whole, objective)
        if separable is not None:
            return "partial" if separable else None
    near = newton(theta / 2, NEAR)  # half as far, as the solver may have gone much too far
    step = newton(near, NEARER) - near
    return "partial" if data.range(*split(step)) > APART else None


def has_maximum(data: Data, objective: Objective, theta: Vector) -> bool:
    """Whether it is certain, from the derivatives at theta, that there is a maximum.

    Along any direction the third derivative of the loss is at most R times the second, R the
    largest difference of two logits that the direction makes in the data. If R of directions of
    length 1 in the norm of the Hessian, times the Newton decrement, is at most 1 / 2, there is a
    minimum near (Bach, 2010, proposition 2). In other words: the step that is left is small against
    what the data leave open. Never certain where the classes are separable.
    """
    classes, size = theta.shape
    count = (classes - 1) * size
    if count > COEFFICIENTS or data.x.shape[0] * count**2 > WORK:
        return False
    coordinates = objective.coordinates
    used = _independent(data, coordinates, size)
    known = information(data.x, coordinates.from_theta(theta), coordinates, data.weight, 0)
    kept = (np.arange(classes - 1)[:, None] * size + used).ravel()
    covariance = inverse(known[np.ix_(kept, kept)])
    if covariance is None:
        return False
    objective(objective.from_theta(theta))
    gradient = (objective.gradient[1:, used] * objective.weight).ravel()
    decrement = np.sqrt(gradient @ covariance @ gradient)
    blocks = [
        covariance[k : k + len(used), k : k + len(used)] for k in range(0, len(kept), len(used))
    ]
    largest = 0.0  # variance of the difference of a logit and that of the reference
    for part in _designs(data, coordinates):
        for block in blocks:
            variances = np.einsum("nf,nf->n", part[:, used] @ block, part[:, used])
            largest = max(largest, float(variances.max(initial=0)))
    return bool(4 * decrement * np.sqrt(largest) <= 1)  # two logits differ by twice as much


def _designs(data: Data, coordinates: Coordinates) -> Iterator[Vector]:
    """The standardised rows that count, some at a time."""
    for rows in data.blocks(2 * data.x.shape[1]):
        part = coordinates.design(data.x[rows])
        yield part[np.broadcast_to(np.asarray(data.weights(rows)) > 0, len(part))]


def _independent(data: Data, coordinates: Coordinates, size: int) -> npt.NDArray[np.intp]:
    """Standardised features of which the others are combinations: a Cholesky factor with pivots."""
    moments = np.zeros((size, size))
    for part in _designs(data, coordinates):
        moments += part.T @ part
    moments /= max(1.0, float(np.diag(moments).max()))
    _, pivots, rank, _ = scipy.linalg.lapack.dpstrf(moments, tol=DEPENDENT)
    return np.sort(pivots[:rank] - 1)


def program(data: Data, objective: Objective) -> bool | None:
    """Whether some direction separates, by a linear program; None if that is too large.

    The differences delta_y x - delta_c x are to be as large as possible within [0, 1]. As any
    direction may be made longer, one of them is 1, or all are 0.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    coordinates = objective.coordinates
    classes, rows = data.classes, data.x.shape[0]
    features = len(coordinates.centre) + coordinates.intercept
    if rows * (classes - 1) * 2 * features > NUMBERS:
        return None
    x = coordinates.design(data.x[:])
    allowed = _allowed(data)
    counted = allowed.any(axis=1) & np.broadcast_to(np.asarray(data.weights(slice(None))) > 0, rows)
    x, index = np.unique(np.column_stack([x, allowed])[counted], axis=0, return_index=True)
    x, allowed = x[:, :features], allowed[counted][index]
    mine = allowed.argmax(axis=1)
    blocks, most = [], []
    for c in range(classes):
        other = np.flatnonzero(mine != c)
        block = _differences(x[other], mine[other], c, classes)
        blocks.append(block)
        most.append(np.where(allowed[other, c], 0.0, 1.0))
    matrix = scipy.sparse.vstack(blocks, format="csr")
    matrix = matrix[:, features:]  # the direction of the first class is 0
    upper = np.concatenate(most)
    found = milp(
        -np.asarray(matrix[upper > 0].sum(axis=0)).ravel(),
        constraints=LinearConstraint(matrix, np.zeros(len(upper)), upper),
        bounds=Bounds(-STEEP, STEEP), options={"time_limit": SECONDS},
    )  # fmt: skip
    return None if found.status != 0 else bool(-found.fun > 0.5)


def _allowed(data: Data) -> Array:
    """Which classes the label of each row has."""
    if data.hard is None:
        assert data.soft is not None
        return np.asarray(data.soft > 0)
    return np.asarray(data.hard[:, None] == np.arange(data.classes))


def _differences(x: Vector, mine: Array, other: int, classes: int) -> Any:
    """Rows of (direction of one's own class less that of another) times x, sparse."""
    rows, features = x.shape
    columns = np.arange(features)
    own = (mine[:, None] * features + columns).ravel()
    others = np.broadcast_to(other * features + columns, x.shape).ravel()
    index = np.repeat(np.arange(rows), features)
    values = np.concatenate([x.ravel(), -x.ravel()])
    where = np.concatenate([index, index]), np.concatenate([own, others])
    return scipy.sparse.csr_array((values, where), shape=(rows, classes * features))
