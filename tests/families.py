"""How far off kernel families are on the rows of `sweep`, whatever way their lanes run."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numba
import numpy as np

import fastce
import fastce.capi
import fastce.rows
import fastce.shards
from tests.checks import GRADIENT_BOUND, LOSS_BOUND, LOSS_BOUND_ANYWHERE
from tests.sweep import CLASSES, Batch, padded, right, worst

FLOAT32, FLOAT16 = np.dtype(np.float32), np.dtype(np.float16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


# Ways to lie --------------------------------------------------------------------------------------


class Lying:
    """Rows of four classes in an array that makes a kernel take them in a certain way."""

    def __init__(self, logits, classes, axis, seed):
        self.axis = axis
        self.place = None
        if classes > CLASSES:
            logits, self.place = padded(logits, classes, seed)
        self.logits = np.ascontiguousarray(logits.T) if axis == 0 else logits

    def classes(self, targets):
        """The target classes."""
        if self.place is None:
            return targets
        return np.take_along_axis(self.place, targets[:, None], axis=1)[:, 0]

    def back(self, results):
        """What belongs to the four classes of each row."""
        results = results.T if self.axis == 0 else results
        return results if self.place is None else np.take_along_axis(results, self.place, axis=1)

    def spread(self, values, dtype):
        """Numbers of the four classes, where the logits lie; others get 0."""
        if self.place is not None:
            wide = np.zeros((len(values), self.logits.shape[self.axis]), dtype)
            np.put_along_axis(wide, self.place, values.astype(dtype), axis=1)
            values = wide
        values = values.astype(dtype)
        return np.ascontiguousarray(values.T) if self.axis == 0 else values


# Name: classes, and their axis.
WAYS = {
    "few classes": (4, -1),
    "another axis": (4, 0),
    "many classes": (70, -1),
    "many, another axis": (70, 0),
}


# Families -----------------------------------------------------------------------------------------


def hot(targets):
    return (np.arange(CLASSES) == targets[:, None]).astype(np.float64)


def loss(rows, batch):
    losses, grad = fastce.cross_entropy_and_grad(
        rows.logits, rows.classes(batch.targets), axis=rows.axis, reduction="none"
    )
    return {"loss": losses, "grad": rows.back(grad)}


def soft(rows, batch):
    labels = rows.spread(hot(batch.targets), np.float32)
    losses, grad = fastce.cross_entropy_and_grad(
        rows.logits, labels.astype(rows.logits.dtype), axis=rows.axis, reduction="none"
    )
    return {"loss": losses, "grad": rows.back(grad)}


def stats(rows, batch):
    found = fastce.cross_entropy_stats(rows.logits, rows.classes(batch.targets), axis=rows.axis)
    return {"loss": found.loss, "lse": found.lse, "entropy": found.entropy}


def softmax(rows, batch):
    return {
        "p": rows.back(fastce.softmax(rows.logits, axis=rows.axis)),
        "log_p": rows.back(fastce.log_softmax(rows.logits, axis=rows.axis)),
        "lse": fastce.logsumexp(rows.logits, axis=rows.axis),
    }


def curvature(rows, batch):
    targets = rows.classes(batch.targets)
    grad, hess = fastce.gradient_hessian(rows.logits, targets, axis=rows.axis)
    along = rows.spread(hot(batch.targets), rows.logits.dtype)
    product = fastce.hessian_vector_product(rows.logits, along, axis=rows.axis)
    return {"grad": rows.back(grad), "hess": rows.back(hess), "product": rows.back(product)}


def shards(rows, batch):
    """Of two slices of the classes."""
    targets, axis = rows.classes(batch.targets), rows.axis
    classes = rows.logits.shape[axis]
    half = classes // 2
    slices = [
        (np.take(rows.logits, range(start, stop), axis=axis), start)
        for start, stop in ((0, half), (half, classes))
    ]
    total = fastce.shards.merge(*(
        fastce.shards.partial(
            z, targets, class_offset=start, classes=classes, axis=axis, entropy=True
        )
        for z, start in slices
    ))  # fmt: skip
    found = fastce.shards.finish(total, reduction="none")
    grads = [
        fastce.shards.grad(z, targets, total, class_offset=start, axis=axis, reduction="none")
        for z, start in slices
    ]
    return {
        "loss": found.loss, "lse": found.lse, "entropy": found.entropy,
        "grad": rows.back(np.concatenate(grads, axis=axis)),
    }  # fmt: skip


@numba.njit
def _by_rows(logits, targets, losses, lses, out):
    for i in range(len(logits)):
        lses[i] = fastce.rows.logsumexp(logits[i])
        losses[i] = fastce.rows.cross_entropy_and_grad(logits[i], targets[i], out[i])


BITS = {FLOAT16: np.uint16, BFLOAT16: np.int16}  # what numba reads as numbers of 16 bits


def compiled_rows(rows, batch):
    grad = np.empty_like(rows.logits)
    bits = BITS.get(grad.dtype, grad.dtype)
    losses, lses = np.empty(len(grad)), np.empty(len(grad))
    targets = rows.classes(batch.targets)
    _by_rows(rows.logits.view(bits), targets, losses, lses, grad.view(bits))
    with np.errstate(over="ignore"):
        return {
            "loss": losses.astype(np.float32), "lse": lses.astype(np.float32),
            "grad": rows.back(grad),
        }  # fmt: skip


def c_functions(rows, batch):
    targets = rows.classes(batch.targets)
    losses, grad = np.empty(len(targets), np.float32), np.empty_like(rows.logits)
    strides = rows.logits.strides
    row, step = strides if rows.axis == -1 else strides[::-1]
    call = fastce.capi.Call(
        logits=rows.logits.ctypes.data, rows=len(targets), classes=rows.logits.shape[rows.axis],
        row_stride=row, class_stride=step, targets=targets.ctypes.data,
        losses=losses.ctypes.data, grad=grad.ctypes.data,
        grad_row_stride=row, grad_class_stride=step,
    )  # fmt: skip
    assert fastce.capi.function(np.float32, grad=True)(call) == 0
    return {"loss": losses, "grad": rows.back(grad)}


ALL = (FLOAT32, FLOAT16, BFLOAT16)
# Name: on which dtypes, and on which ways to lie.  A row of compiled code is brought to the stack
# or read where it lies, so that its axis makes no difference to what is computed.
FAMILIES = {
    loss: (ALL, WAYS),
    soft: (ALL, WAYS),
    stats: (ALL, WAYS),
    softmax: (ALL, WAYS),
    curvature: ((FLOAT32,), WAYS),
    shards: (ALL, WAYS),
    compiled_rows: (ALL, ("few classes", "many classes")),
    c_functions: ((FLOAT32,), WAYS),
}


# Errors -------------------------------------------------------------------------------------------


class Error(NamedTuple):
    """The worst error of a result, what is promised, and the row."""

    name: str
    error: float
    bound: float
    row: int


def errors(got: dict[str, Any], batch: Batch, dtype: np.dtype[Any]) -> Iterator[Error]:
    """Of every result of a family; of the loss also of the rows where no logit leads by 10."""
    want = right(batch.logits, batch.targets)
    unit = float(ml_dtypes.finfo(dtype).eps) / 2 if dtype.itemsize == 2 else 0.0
    gradient = GRADIENT_BOUND[4] + unit
    bounds = {
        "loss": LOSS_BOUND_ANYWHERE[4], "entropy": 1e-5, "lse": 4e-6, "log_p": 4e-6 + unit,
        "p": gradient, "grad": gradient, "hess": gradient, "product": gradient,
    }  # fmt: skip
    all_rows = np.ones(len(batch.logits), bool)
    for name, values in got.items():
        # What the rounding error of a result is relative to, where that is not the result.
        scale = np.zeros(len(all_rows))
        if name == "lse":
            scale = np.nan_to_num(np.abs(want.top))
        elif name == "log_p":
            scale = np.ones(len(all_rows))
        elif name == "product":
            scale = np.nan_to_num(np.abs(want.product).max(axis=1))
        error, row = worst(values, getattr(want, name), scale, all_rows)
        yield Error(name, error, bounds[name], row)
        if name == "loss":
            error, row = worst(values, want.loss, scale, want.lead < 10)
            yield Error("loss, no lead of 10", error, LOSS_BOUND[4], row)


def faults(got: dict[str, Any], batch: Batch, dtype: np.dtype[Any]) -> list[str]:
    """What is further from the truth than is promised, in words."""
    found = []
    for name, error, bound, row in errors(got, batch, dtype):
        if error > bound:
            result = name.partition(",")[0]
            truth = getattr(right(*(part[row : row + 1] for part in batch)), result)[0]
            found.append(
                f"{name}: error {error:.3g} > {bound:.3g} at logits {batch.logits[row]!r}, target "
                f"{batch.targets[row]}: got {got[result][row]!r}, right {truth!r}"
            )
    return found
