"""Logits with labels in blocks: what every loss of them is made of."""

import functools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastce import _arguments as arguments
from fastce import shards
from fastce.dask._chunks import Grid, Upstream, any_array, in_chunks, in_memory, key_of
from fastce.dask._graph import Chunks, Graph, Index, Key, in_chunk


class Logits(NamedTuple):
    """What is known of logits that are not an array yet."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunks: Chunks


class Labelled:
    """Chunked logits and their labels, checked, and what a mean over them divides by."""

    def __init__(
        self, label: str, name: str, logits: Any, targets: Any, axis: int,
        weight: npt.ArrayLike | None, options: arguments.Options, grad_output: Any = None,
        weight_name: str = "weight", sources: tuple[Any, ...] = (),
    ) -> None:  # fmt: skip
        y = any_array("targets", targets)
        self.fit = fit = arguments.signature(
            name, logits.dtype, logits.shape, axis, y.dtype, y.shape, options.ignore_index
        )
        self.options, self.dtype = options, np.dtype(fit.dtype)
        self.weight = arguments.class_weight(
            weight_name, in_memory(weight_name, weight), fit.classes, logits.dtype
        )
        self.logits, self.grid = logits, Grid(logits.chunks, fit.axis)
        self.targets = in_chunks(y, self.grid.row_chunks if fit.hard else logits.chunks)
        self.upstream = Upstream(grad_output, fit.rows, options.reduction, self.grid.row_chunks)
        self.graph = Graph(label, self.targets, *self.upstream.sources, *sources)

    def labels(self, row: Index, block: Index) -> Key:
        """The labels of a block in a row of blocks."""
        return key_of(self.targets, row if self.fit.hard else block)

    def part(self, block: Index) -> dict[str, Any]:
        """Which classes a block has, and their weights."""
        classes = self.grid.classes(block)
        weight = None if self.weight is None else self.weight[classes]
        return {"class_offset": classes.start, "axis": self.fit.axis, "weight": weight}

    @functools.cached_property
    def sums(self) -> Key:
        """Weights and number of the rows, which targets alone tell."""
        if not self.fit.hard:
            rows = float(self.fit.row_count)
            return self.graph.task(shards.Sums, nll=0.0, z=0.0, weight=rows, rows=rows)
        parts = [
            self.graph.task(
                in_chunk(self.grid.start_of_row(row), shards.target_sums),
                key_of(self.targets, row), classes=self.fit.classes, weight=self.weight,
                ignore_index=self.options.ignore_index,
            )
            for row in self.grid.rows()
        ]  # fmt: skip
        return self.graph.tree(_add_sums, parts)

    @functools.cached_property
    def divisors(self) -> Key:
        """`sums` if the losses are divided by them; else something that is not looked at."""
        if self.options.reduction == "mean" and self.options.normalizer is None:
            return self.sums
        return self.graph.task(shards.Sums, nll=0.0, z=0.0, weight=0.0, rows=0.0)

    def mean(self, nll: Key) -> Any:
        """The reduced loss, from the sum of the losses of all rows."""
        key = self.graph.task(_divided, nll, self.divisors, options=self.options, dtype=self.dtype)
        return self.graph.number(key, self.dtype)

    def loss(self, totals: dict[Index, Key]) -> Any:
        """The loss, from the merged `shards.Partial` of each row of blocks."""
        given: dict[str, Any] = {"z_loss": self.options.z_loss}
        graph = self.graph
        if self.options.reduction == "none":
            blocks = {row: graph.task(_losses, total, **given) for row, total in totals.items()}
            return graph.array(blocks, self.grid.row_chunks, self.dtype)
        sums = [graph.task(shards.row_sums, total, **given) for total in totals.values()]
        key = graph.task(
            shards.Sums.loss, graph.tree(_add_sums, sums), options=self.options, dtype=self.dtype
        )
        return graph.number(key, self.dtype)


def _divided(nll: float, sums: shards.Sums, **given: Any) -> Any:
    return sums._replace(nll=nll).loss(**given)


def _add_sums(*parts: shards.Sums) -> shards.Sums:
    return shards.Sums(*map(sum, zip(*parts, strict=True)))


def _losses(total: shards.Partial, *, z_loss: float) -> Any:
    return shards.finish(total, z_loss=z_loss, reduction="none").loss
