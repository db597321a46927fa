"""The classifier head where the classes are divided: some of its weights, for all rows."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fastce import _arguments as arguments
from fastce import shards
from fastce._arguments import AnyArray
from fastce._blas import multiply

# Bytes of logits that are held at a time.
MEMORY = 64 << 20

Gradients = tuple[AnyArray, AnyArray, AnyArray | None]
Merge = Callable[[shards.Partial], None]


class LinearSlice:
    """Some classes of a linear layer and all of its rows, `rows_at_once` at a time.

    Logits of all rows that fit into MEMORY are kept from `partial` to the first `gradients`, others
    computed twice, but by `partial_and_gradients`, for which others have to merge theirs meanwhile.
    """

    def __init__(
        self, x: npt.ArrayLike, weight: npt.ArrayLike, bias: npt.ArrayLike | None,
        targets: npt.ArrayLike, class_weight: npt.ArrayLike | None, class_offset: int,
    ) -> None:  # fmt: skip
        self.x, self._weight, self._bias = arguments.linear_layer(x, weight, bias)
        compute = np.result_type(
            *(arguments.compute_dtype(a.dtype) for a in (self.x, self._weight))
        )
        self._wide = self._weight.astype(compute, copy=False)
        self._targets = arguments.any_array("targets", targets)
        shape = (len(self.x), len(self._weight))
        if self._targets.shape not in (shape[:1], shape):
            raise ValueError(
                f"targets: expected shape {shape[:1]}, or {shape} if they are probabilities, "
                f"got {self._targets.shape}"
            )
        offset = arguments.integer("class_offset", class_offset)
        by_class = arguments.class_weight("class_weight", class_weight, shape[1], compute)
        self._slice: Any = {"class_offset": offset, "weight": by_class}
        self.rows_at_once = rows_at_once(len(self._weight), compute)
        self._kept: AnyArray | None = None

    def check(self, classes: int, options: arguments.Options) -> shards.Terms:
        """Raise what the partial of all rows would raise; else its terms."""
        if self._targets.ndim == 1:  # a bad one is named by its place in all rows
            shards.target_sums(self._targets, classes, None, options.ignore_index)
        none = np.empty((0, len(self._weight)), self._wide.dtype)
        return self._partial(slice(0, 0), none, classes, options).terms

    def partial(
        self, classes: int, options: arguments.Options, merge: Merge | None = None
    ) -> shards.Partial:
        """The partial of all rows; those of some are merged with those of other slices."""
        self.check(classes, options)
        parts = []
        for rows, _, z in self._logits(keep=True):
            parts.append(self._partial(rows, z, classes, options))
            if merge is not None:
                merge(parts[-1])
        return _joined(parts, len(self.x))

    def partial_and_gradients(
        self, classes: int, options: arguments.Options, merge: Merge
    ) -> tuple[shards.Partial, Gradients]:
        """The same, and the gradients of the sum of all rows' losses."""
        parts, found = [], self._zeros()
        for rows, x, z in self._logits(keep=False):
            parts.append(self._partial(rows, z, classes, options))
            merge(parts[-1])
            self._add(found, rows, x, z, parts[-1], options.z_loss, 1.0)
        return _joined(parts, len(self.x)), found

    def gradients(
        self, total: shards.Partial, scales: tuple[float, float], upstream: arguments.Upstream
    ) -> Gradients:
        """dx of the slice's classes, dweight and dbias, in the dtype that is computed with.

        `scales` are upstream gradient and z-loss of a sum over the rows.
        """
        (factor, z_loss), (scalar, per_row) = scales, upstream
        found = self._zeros()
        for rows, x, z in self._logits(keep=False):
            g = factor * scalar if per_row is None else per_row[rows]
            self._add(found, rows, x, z, total.select(rows), z_loss, g)
        return found

    def _logits(self, keep: bool) -> Iterator[tuple[slice, AnyArray, AnyArray]]:
        """Rows, their x, their logits, which may be written to by who does not `keep` them."""
        kept, self._kept = self._kept, None
        memory: AnyArray | None = None
        for start in range(0, max(1, len(self.x)), self.rows_at_once):
            rows = slice(start, start + self.rows_at_once)
            x = self.x[rows].astype(self._wide.dtype, copy=False)
            z = kept
            if z is None:
                if memory is None:  # no later chunk is larger
                    memory = np.empty((len(x), len(self._wide)), self._wide.dtype)
                z = memory[: len(x)]
                multiply(x, self._wide.T, z)
                if self._bias is not None:
                    z += self._bias.astype(z.dtype, copy=False)
            if keep and len(x) == len(self.x):
                self._kept = z
            yield rows, x, z

    def _partial(
        self, rows: slice, logits: AnyArray, classes: int, options: arguments.Options
    ) -> shards.Partial:
        return shards.partial(
            logits, self._targets[rows], **self._slice, classes=classes,
            ignore_index=options.ignore_index, label_smoothing=options.label_smoothing,
            softcap=options.softcap,
        )  # fmt: skip

    def _zeros(self) -> Gradients:
        dx = np.empty(self.x.shape, self._wide.dtype)  # written to, not added to
        dbias = None if self._bias is None else np.zeros(len(self._wide))
        return dx, np.zeros_like(self._wide), dbias

    def _add(
        self, found: Gradients, rows: slice, x: AnyArray, logits: AnyArray, total: shards.Partial,
        z_loss: float, upstream: float | AnyArray,
    ) -> None:  # fmt: skip
        """Add what some rows contribute, whose logits' gradient takes their place."""
        dx, dweight, dbias = found
        g = shards.grad(
            logits, self._targets[rows], total, **self._slice, z_loss=z_loss, reduction="none",
            grad_output=upstream, out=logits,
        )  # fmt: skip
        np.matmul(g, self._wide, out=dx[rows])
        multiply(g.T, x, dweight, accumulate=True)
        if dbias is not None:
            dbias += g.sum(axis=0, dtype=np.float64)

    def as_given(self, dx: AnyArray, dweight: AnyArray, dbias: AnyArray | None) -> Gradients:
        """The gradients in the dtypes of what they belong to."""
        if dbias is not None and self._bias is not None:
            dbias = dbias.astype(self._bias.dtype)
        return (
            dx.astype(self.x.dtype, copy=False),
            dweight.astype(self._weight.dtype, copy=False),
            dbias,
        )


def rows_at_once(classes: int, dtype: npt.DTypeLike) -> int:
    """Rows whose logits of so many classes fit into MEMORY."""
    return max(1, MEMORY // (max(1, classes) * np.dtype(dtype).itemsize))


def _joined(parts: list[shards.Partial], rows: int) -> shards.Partial:
    """One partial of the rows of several."""
    records = np.concatenate([*(p.records[:-1] for p in parts), parts[0].records[-1:]])
    return shards.Partial(records, (rows,), parts[0].terms)
