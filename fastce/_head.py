"""The classifier head cut to pieces: some of its logits at a time, and the products they enter.

Gradients need all logits of a row before the next product. A loss alone does not: where few whole
rows would fit, its pieces have more rows and some of the classes, and partial results are merged.
The pieces depend on shapes and dtypes alone, never on the number of threads, and sums over them are
taken in order, so that every call adds up the same numbers in the same order.
"""

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastce import _arguments as arguments
from fastce import _blas
from fastce._arguments import AnyArray
from fastce._blas import add, multiply
from fastce._call import Call, inverse
from fastce.cpu.threads import launch
from fastce.losses import cross_entropy, cross_entropy_and_grad

if TYPE_CHECKING:
    from fastce.shards import Partial

# Bytes that a call may need beside its results: this many, or this share of the logits if more.
# Fewer rows at a time make slower products, and dweight is read and written once for all of them.
MEMORY = 64_000_000
SHARE = 0.048
# Rows are taken in multiples of this: measured, products are 5% slower with 400 than with 448.
TILE = 64
# Rows that a loss alone takes at least, if need be with some of the classes. Every chunk of rows
# packs `weight` anew: the product took 1.08 of the whole one with 512 rows, 1.03 with 2048.
ROWS = 2048
# Share of the classes up to which it pays to gather them: measured, gathering one costs as much as
# a quarter of its two products.
GATHERED = 0.7
# Classes whose gradients one thread looks through at a time.
COLUMNS = 2048

Rows = slice | npt.NDArray[np.intp]
Upstream = float | npt.NDArray[np.float64]


class Head(NamedTuple):
    """One checked call."""

    x: AnyArray
    weight: AnyArray
    bias: AnyArray | None
    call: Call
    options: dict[str, Any]

    @classmethod
    def checked(
        cls, x: npt.ArrayLike, weight: npt.ArrayLike, targets: npt.ArrayLike,
        bias: npt.ArrayLike | None, class_weight: npt.ArrayLike | None, ignore_index: int,
        label_smoothing: float, z_loss: float, softcap: float | None, reduction: str,
        normalizer: float | None,
    ) -> "Head":  # fmt: skip
        """Check everything; raises as the public functions say."""
        x, weight, bias = arguments.linear_layer(x, weight, bias)
        compute = np.result_type(*(arguments.compute_dtype(a.dtype) for a in (x, weight)))
        # In place of the logits a single number: their shape and dtype are all that is looked at.
        logits = np.broadcast_to(compute.type(0), (len(x), len(weight)))
        given = arguments.options(
            ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer
        )
        call = Call("logits", logits, targets, -1, class_weight, given, "class_weight")
        options = {"weight": call.weight, **given._asdict(), "reduction": "none"}
        del options["normalizer"]
        weights, rows = call.divisors()
        if weights != rows:  # the mean divides the terms of z-loss by the number of rows
            options["z_loss"] *= weights * inverse(rows)
        return cls(x, weight, None if bias is None else bias.astype(compute), call, options)

    @property
    def compute(self) -> np.dtype[Any]:
        """The dtype that is computed with."""
        return np.dtype(self.call.dtype)

    def total(self, upstream: Upstream = 1.0, products: "Products | None" = None) -> float:
        """Sum the losses; with `products`, also give those the gradient of the logits."""
        memory, total = None, 0.0
        if self.call.losses is not None:
            self.call.losses[...] = 0
        for rows, step in self.chunks(divided=products is None):
            x = self.x[rows].astype(self.compute, copy=False)
            if memory is None:  # no later chunk is larger
                memory = np.empty(len(x) * step, self.compute)
            assert self.call.labels is not None
            targets = self.call.labels[rows]
            if products is None:
                losses = self._losses(x, targets, memory, step)
            else:
                logits = self.logits(x, slice(0, step), memory)
                g = upstream if isinstance(upstream, float) else upstream[rows]
                losses, _ = cross_entropy_and_grad(
                    logits, targets, **self.options, grad_output=g, out=logits
                )
                products.add(rows, x, logits)
            if self.call.losses is not None:
                self.call.losses[rows] = losses
            with np.errstate(invalid="ignore", over="ignore"):
                total += float(losses.sum(dtype=np.float64))
        return total

    def _losses(self, x: AnyArray, targets: AnyArray, memory: AnyArray, step: int) -> AnyArray:
        """Losses of some rows, `step` classes at a time."""
        if step == len(self.weight):
            logits = self.logits(x, slice(0, step), memory)
            losses: AnyArray = cross_entropy(logits, targets, **self.options)
        else:
            from fastce import shards

            parts = (
                self._partial(x, targets, part, memory) for part in pieces(len(self.weight), step)
            )
            merged = functools.reduce(shards.merge, parts)
            losses = shards.finish(merged, z_loss=self.options["z_loss"], reduction="none").loss
        return losses

    def _partial(
        self, x: AnyArray, targets: AnyArray, classes: slice, memory: AnyArray
    ) -> "Partial":
        from fastce import shards

        weight: AnyArray | None = self.options["weight"]
        given = {key: self.options[key] for key in ("ignore_index", "label_smoothing", "softcap")}
        return shards.partial(
            self.logits(x, classes, memory), targets[:, classes] if targets.ndim > 1 else targets,
            class_offset=classes.start, classes=len(self.weight),
            weight=None if weight is None else weight[classes], **given,
        )  # fmt: skip

    def chunks(self, *, divided: bool, arrays: int = 1) -> Iterator[tuple[Rows, int]]:
        """The rows that count, a few at a time, and how many classes at a time.

        There is room for so many arrays of their logits.
        """
        classes, features = self.weight.shape
        valid = None
        if self.call.hard is not None and self.call.count < len(self.x):
            valid = np.flatnonzero(self.call.hard != self.call.options.ignore_index)
        count = len(self.x) if valid is None else len(valid)
        item, step = self.compute.itemsize, classes
        memory = MEMORY
        if not divided:
            memory = max(memory, int(SHARE * len(self.x) * classes * item))
        memory -= _blas.BLOCK
        # Beside its logits a row may have itself, its gradient and a part of that once more.
        rows = max(1, memory // ((arrays * classes + 3 * features) * item))
        if rows > TILE:
            rows -= rows % TILE
        if divided and rows < min(ROWS, count):
            rows = max(rows, min(ROWS, count, memory // (2 * max(1, features) * item)))
            step = min(classes, max(1, memory // (rows * item) - features))
        for part in pieces(count, rows):
            yield part if valid is None else valid[part], step

    def blocks(self) -> Iterator[slice]:
        """All classes, so many at a time that their weights are copied within BLOCK."""
        return pieces(len(self.weight), self._block)

    @property
    def _block(self) -> int:
        size: int = max(1, self.weight.shape[1]) * self.compute.itemsize
        return max(1, _blas.BLOCK // size)

    def logits(self, x: AnyArray, classes: slice, memory: AnyArray) -> AnyArray:
        """The logits of some classes, in the given memory."""
        weight = self.weight[classes]
        out: AnyArray = memory[: len(x) * len(weight)].reshape(len(x), len(weight))
        if weight.dtype == self.compute:
            multiply(x, weight.T, out)
        else:
            for block in pieces(len(weight), self._block):
                multiply(x, weight[block].astype(self.compute).T, out[:, block])
        if self.bias is not None:
            add(out, self.bias[None, classes])
        return out


def pieces(count: int, step: int) -> Iterator[slice]:
    """Slices of `step` numbers that make up range(count)."""
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


class Products:
    """The gradients with respect to x, weight and bias, added up over chunks of rows."""

    def __init__(
        self, head: Head, dx: AnyArray, dweight: AnyArray, dbias: AnyArray | None,
        accumulate: bool, negligible: float,
    ) -> None:  # fmt: skip
        self._head, self._accumulate, self._negligible = head, accumulate, negligible
        self._dx, self._dweight, self._dbias = dx, dweight, dbias
        classes = len(head.weight)
        # 16-bit gradients would lose what is added to them chunk by chunk.
        self._wide = dweight.dtype != head.compute
        self._sum = np.zeros(dweight.shape, head.compute) if self._wide else dweight
        self._bias_sum = np.zeros(classes)
        self._untouched = not (self._wide or accumulate)
        if not accumulate and head.call.count < len(head.x):
            dx[...] = 0  # where rows are ignored

    def add(self, rows: Rows, x: AnyArray, gradient: AnyArray) -> None:
        """Add what some rows contribute; `gradient` is that of their logits."""
        if self._dbias is not None:
            self._bias_sum += np.matmul(np.ones(len(x), x.dtype), gradient)
        kept = self._not_negligible(gradient)
        self._add_dx(rows, gradient, kept)
        if kept is None:
            multiply(gradient.T, x, self._sum, accumulate=not self._untouched)
        else:
            if self._untouched:
                self._sum[...] = 0
            for classes in self._pieces(kept):
                part = self._sum[classes]
                multiply(gradient[:, classes].T, x, part, accumulate=True)
                self._sum[classes] = part
        self._untouched = False

    def finish(self) -> None:
        """Bring the sums to where they belong."""
        if self._untouched:
            self._sum[...] = 0
        if self._wide:
            for block in self._head.blocks():
                if self._accumulate:
                    self._sum[block] += self._dweight[block]
                self._dweight[block] = self._sum[block]
        if self._dbias is not None:
            if self._accumulate:
                self._bias_sum += self._dbias
            self._dbias[...] = self._bias_sum

    def _not_negligible(self, gradient: AnyArray) -> npt.NDArray[np.intp] | None:
        """The classes where some row has a gradient that counts; None for all."""
        if self._negligible <= 0.0:
            return None
        from fastce.cpu.matrix import mark_beyond

        marks = np.zeros(gradient.shape[1], np.bool_)
        chunks = -(-len(marks) // COLUMNS)
        args = (gradient, self._negligible, marks, COLUMNS)
        launch(mark_beyond, args, parallel=True, chunks=chunks)
        kept = np.flatnonzero(marks)
        return kept if len(kept) <= GATHERED * gradient.shape[1] else None

    def _pieces(self, kept: npt.NDArray[np.intp] | None) -> Iterator[Rows]:
        for block in self._head.blocks():
            if kept is None:
                yield block
            elif len(part := kept[block]):
                yield part

    def _add_dx(self, rows: Rows, gradient: AnyArray, kept: npt.NDArray[np.intp] | None) -> None:
        weight, dtype = self._head.weight, gradient.dtype
        direct = isinstance(rows, slice) and self._dx.dtype == dtype
        target = self._dx[rows] if direct else np.empty((len(gradient), weight.shape[1]), dtype)
        adding = direct and self._accumulate
        if kept is None and weight.dtype == dtype:
            multiply(gradient, weight, target, accumulate=adding)
        else:
            if not adding:
                target[...] = 0
            for classes in self._pieces(kept):
                some = weight[classes].astype(dtype, copy=False)
                multiply(gradient[:, classes], some, target, accumulate=True)
        if direct:
            return
        if self._accumulate:
            target += self._dx[rows]
        self._dx[rows] = target
