"""The classifier head where the classes are divided: some of its weights, for all rows."""

from collections.abc import Iterator
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


class LinearSlice:
    """Some classes of a linear layer and all of its rows.

    Logits that fit into MEMORY are kept from `partial` to the first `gradients`, others computed
    twice.
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
        self._targets = np.asarray(targets)
        shape = (len(self.x), len(self._weight))
        if self._targets.shape not in (shape[:1], shape):
            raise ValueError(
                f"targets: expected shape {shape[:1]}, or {shape} if they are probabilities, "
                f"got {self._targets.shape}"
            )
        self._slice: Any = {"class_offset": class_offset, "weight": class_weight}
        step = max(1, MEMORY // (len(self._weight) * compute.itemsize))
        self._chunks = [slice(k, k + step) for k in range(0, max(1, len(self.x)), step)]
        self._kept: AnyArray | None = None

    def _logits(self, keep: bool) -> Iterator[tuple[slice, AnyArray, AnyArray]]:
        """Rows, their x, their logits, which may be written to by who does not `keep` them."""
        kept, self._kept = self._kept, None
        for rows in self._chunks:
            x = self.x[rows].astype(self._wide.dtype, copy=False)
            z = kept
            if z is None:
                z = x @ self._wide.T
                if self._bias is not None:
                    z += self._bias.astype(z.dtype, copy=False)
            if keep and len(self._chunks) == 1:
                self._kept = z
            yield rows, x, z

    def partial(self, classes: int, options: arguments.Options) -> shards.Partial:
        """The partial of all rows."""
        if self._targets.ndim == 1:  # a bad one is named by its place in all rows
            shards.target_sums(self._targets, classes, None, options.ignore_index)
        parts = [
            shards.partial(
                z, self._targets[rows], **self._slice, classes=classes,
                ignore_index=options.ignore_index, label_smoothing=options.label_smoothing,
                softcap=options.softcap,
            )
            for rows, _, z in self._logits(keep=True)
        ]  # fmt: skip
        records = np.concatenate([*(p.records[:-1] for p in parts), parts[0].records[-1:]])
        return shards.Partial(records, (len(self.x),), parts[0].terms)

    def gradients(
        self, total: shards.Partial, options: arguments.Options, upstream: arguments.Upstream
    ) -> Gradients:
        """dx of the slice's classes, dweight and dbias, in the dtype that is computed with."""
        factor, z_loss = shards.weighed(total).scales(options)
        scalar, per_row = factor * upstream[0], upstream[1]
        dx, dweight = np.empty(self.x.shape, self._wide.dtype), np.zeros_like(self._wide)
        dbias = None if self._bias is None else np.zeros(len(dweight))
        for rows, x, z in self._logits(keep=False):
            g = shards.grad(
                z, self._targets[rows], total.select(rows), **self._slice, z_loss=z_loss,
                reduction="none", grad_output=scalar if per_row is None else per_row[rows], out=z,
            )  # fmt: skip
            np.matmul(g, self._wide, out=dx[rows])
            multiply(g.T, x, dweight, accumulate=True)
            if dbias is not None:
                dbias += g.sum(axis=0, dtype=np.float64)
        return dx, dweight, dbias

    def as_given(self, dx: AnyArray, dweight: AnyArray, dbias: AnyArray | None) -> Gradients:
        """The gradients in the dtypes of what they belong to."""
        if dbias is not None and self._bias is not None:
            dbias = dbias.astype(self._bias.dtype)
        return (
            dx.astype(self.x.dtype, copy=False),
            dweight.astype(self._weight.dtype, copy=False),
            dbias,
        )
