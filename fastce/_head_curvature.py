"""How a linear layer's losses and their gradients change along a direction: second derivatives.

With logits Z = X W^T + b and G = dL / dZ the gradients are dX = G W, dW = G^T X and db = 1^T G.
Along (U, V, c) the logits change by T, the loss of each row by the inner product <G, T> of the row,
and G by G' = H T, where H has the Hessian of each row::

    T   = U W^T + X V^T + c         dX' = G' W + G V
    dW' = G'^T X + G^T U            db' = 1^T G'

A Hessian is symmetric: dX', dW' and db' are also the gradients of <dX, U> + <dW, V> + <db, c>, as a
backward pass through the backward pass needs them.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fastce import cpu
from fastce._arguments import AnyArray, Upstream
from fastce._blas import multiply
from fastce._call import inverse
from fastce._head import Head, Products, Rows
from fastce.losses import cross_entropy_and_grad

# Of x, weight and bias; None for zeros.
Direction = tuple[AnyArray | None, AnyArray | None, AnyArray | None]
Slopes = npt.NDArray[np.float64]


def slopes(head: Head, direction: Direction) -> Slopes:
    """The derivative along a direction of what each row adds to the loss."""
    head, direction = _widened(head, direction)
    found = np.zeros(len(head.x))
    for rows, _, (z, t) in _chunks(head, direction, 2):
        found[rows] = np.vecdot(_gradient(head, rows, z), t)
    return found


def slopes_and_gradients(
    head: Head, direction: Direction, upstream: Upstream
) -> tuple[Slopes, AnyArray, AnyArray, AnyArray]:
    """The slopes, and the derivatives of the gradients of x, weight and bias.

    The latter are times `upstream`, and all without z_loss and softcap, whose Hessian is another.
    They are in the dtype that is computed with, the bias's also where there is no bias.
    """
    head, direction = _widened(head, direction)
    (u, v, _), (scalar, per_row) = direction, upstream
    found = np.zeros(len(head.x))
    dx, dweight = np.empty_like(head.x), np.empty_like(head.weight)
    dbias = np.empty(len(head.weight), head.compute)
    products = Products(head, dx, dweight, dbias, accumulate=False, negligible=0.0)
    for rows, x, (z, t, curved) in _chunks(head, direction, 3):
        factor = _label_mass(head, rows)
        if per_row is not None:
            factor *= per_row[rows]
        cpu.calls.hessian_vector_product(1, z, t, factor, scalar * _share(head), curved)
        products.add(rows, x, curved)
        g = _gradient(head, rows, z)
        found[rows] = np.vecdot(g, t)
        if per_row is not None:
            g *= per_row[rows, None].astype(g.dtype)
        elif scalar != 1.0:
            g *= scalar
        if v is not None and isinstance(rows, slice):
            multiply(g, v, dx[rows], accumulate=True)
        elif v is not None:
            dx[rows] += g @ v
        if u is not None:
            multiply(g.T, u[rows], dweight, accumulate=True)
    products.finish()
    return found, dx, dweight, dbias


def _widened(head: Head, direction: Direction) -> tuple[Head, Direction]:
    """All in the dtype that is computed with."""
    x, weight = (a.astype(head.compute, copy=False) for a in (head.x, head.weight))
    u, v, c = (None if a is None else a.astype(head.compute, copy=False) for a in direction)
    return head._replace(x=x, weight=weight), (u, v, c)


def _chunks(
    head: Head, direction: Direction, arrays: int
) -> Iterator[tuple[Rows, AnyArray, list[AnyArray]]]:
    """Some rows, their x, and arrays like their logits: these, how they change, and memory."""
    u, v, c = direction
    memory: AnyArray | None = None
    for rows, classes in head.chunks(divided=False, arrays=arrays):
        x = head.x[rows]
        if memory is None:  # no later chunk is larger
            memory = np.empty((arrays, len(x) * classes), head.compute)
        z, t, *others = (m[: len(x) * classes].reshape(len(x), classes) for m in memory)
        head.logits(x, slice(0, classes), memory[0])
        if v is not None:
            multiply(x, v.T, t)
        else:
            t[...] = 0
        if u is not None:
            multiply(u[rows], head.weight.T, t, accumulate=True)
        if c is not None:
            t += c
        yield rows, x, [z, t, *others]


def _gradient(head: Head, rows: Rows, logits: AnyArray) -> AnyArray:
    """The gradient of the logits of some rows, in their place."""
    assert head.call.labels is not None
    _, gradient = cross_entropy_and_grad(
        logits, head.call.labels[rows], **head.options, grad_output=_share(head), out=logits
    )
    return gradient


def _share(head: Head) -> float:
    """What the sum over all rows is multiplied with."""
    return inverse(head.call.divisors()[0])


def _label_mass(head: Head, rows: Rows) -> Slopes:
    """What the labels of some rows, none of them ignored, lay on all classes: the factor of H."""
    weight, e = head.call.weight, head.options["label_smoothing"]
    if head.call.hard is None:
        assert head.call.soft is not None
        labels = head.call.soft[rows]
        mass = labels.sum(1, dtype=np.float64) if weight is None else labels @ weight
    elif weight is None:
        return np.ones(len(head.call.hard[rows]))
    else:
        mass = weight[head.call.hard[rows]]
    spread = 1.0 if weight is None else weight.mean(dtype=np.float64)
    found: Slopes = (1.0 - e) * mass.astype(np.float64) + e * spread
    return found
