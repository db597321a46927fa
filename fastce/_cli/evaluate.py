"""``fastce eval``: loss, perplexity and accuracy of stored logits, of any size."""

import argparse
import contextlib
import dataclasses
import json
import math
import time
from typing import IO, Any, NamedTuple

import numpy as np

import fastce

from . import npy, output, spool, terminal
from .npy import Array, Rows, Stored
from .terminal import Failure

_LOGITS = ("float64", "float32", "float16", "bfloat16")


class Result(NamedTuple):
    """What `eval` finds; the names are those of its JSON."""

    loss: float
    perplexity: float
    accuracy: float
    rows: int
    ignored: int
    total_weight: float
    seconds: float
    rows_per_second: float


def run(options: argparse.Namespace) -> int:
    """Evaluate the files and print the result."""
    if (options.targets is None) == (options.target is None):
        raise Failure("TARGETS: expected a file, or --target COLUMN in its place")
    inputs = [path for path in (options.logits, options.targets, options.weight) if path]
    if options.grad:
        output.check({"--grad": options.grad}, inputs)
    with contextlib.ExitStack() as stack:
        logits, *targets = stack.enter_context(spool.logits(options.logits, options.target))
        if options.targets:
            targets = [stack.enter_context(spool.targets(options.targets))]
        weight = stack.enter_context(npy.opened(options.weight)) if options.weight else None
        data = _Data.checked(
            _as_bfloat16(logits) if options.dtype else logits, targets[0], weight, options
        )
        gradient = None
        if options.grad:
            file = stack.enter_context(output.written(options.grad))
            stored = data.logits.stored
            dtype = stored.dtype.newbyteorder("=")
            gradient = file, npy.write_header(file, dtype, stored.shape, stored.fortran_order)
        result, notes = _evaluated(data, gradient)
    for note in notes:
        terminal.say(f"fastce eval: {note}")
    if options.json:
        values = {k: v if math.isfinite(v) else None for k, v in result._asdict().items()}
        print(json.dumps(values | {"warnings": notes}))
        return 0
    terminal.pairs(
        [
            ("loss", f"{result.loss:.9g}"),
            ("perplexity", f"{result.perplexity:.9g}"),
            ("accuracy", f"{result.accuracy:.4%}"),
            ("rows", f"{result.rows} ({result.ignored} ignored)"),
            ("total weight", f"{result.total_weight:.9g}"),
            ("rows per second", f"{result.rows_per_second:.4g}"),
        ]
    )
    if options.grad:
        print(f"gradient written to {options.grad}")
    return 0


@dataclasses.dataclass(frozen=True)
class _Data:
    """The files and options, known to belong together, and the denominator of the mean."""

    logits: Rows
    hard: Stored | None
    soft: Rows | None
    weight: Array | None
    ignore_index: int
    label_smoothing: float
    reduction: str
    total_weight: float

    @classmethod
    def checked(
        cls, logits: Stored, targets: Stored, weight: Stored | None, options: argparse.Namespace
    ) -> "_Data":
        rank = len(logits.shape)
        if logits.dtype.name not in _LOGITS:
            hint = "; is it --dtype bfloat16?" if logits.dtype == np.dtype("V2") else ""
            raise Failure(
                f"{logits.name}: expected logits of {', '.join(_LOGITS)}, got {logits.dtype}{hint}"
            )
        if not -rank <= options.axis < rank:
            raise Failure(f"--axis: expected an integer in [{-rank}, {rank}), got {options.axis}")
        rows = Rows.along(logits, options.axis)
        if not rows.classes:
            raise Failure(f"{logits.name}: expected at least one class, got shape {logits.shape}")
        class_weight = None
        if weight is not None:
            if weight.shape != (rows.classes,) or weight.dtype.kind not in "iuf":
                raise Failure(
                    f"{weight.name}: expected numbers of shape ({rows.classes},), "
                    f"got {weight.dtype} of shape {weight.shape}"
                )
            class_weight = weight.flat(0, rows.classes)
        hard, soft = _targets(targets, rows, options.axis)
        return cls(
            rows,
            hard,
            soft,
            class_weight,
            options.ignore_index,
            options.label_smoothing,
            options.reduction,
            len(rows)
            if hard is None
            else _total_weight(hard, rows.classes, class_weight, options.ignore_index),
        )


def _as_bfloat16(logits: Stored) -> Stored:
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise Failure("--dtype bfloat16: expected ml_dtypes to be installed") from None
    if logits.dtype != np.dtype("V2"):
        raise Failure(f"{logits.name}: expected two-byte records for bfloat16, got {logits.dtype}")
    return dataclasses.replace(logits, dtype=np.dtype(bfloat16))


def _targets(targets: Stored, logits: Rows, axis: int) -> tuple[Stored | None, Rows | None]:
    """Targets as classes or as probabilities, whichever they are; the other is None."""
    shape = list(logits.stored.shape)
    del shape[axis]
    hard = targets.shape == tuple(shape) and targets.dtype.kind in "iu"
    soft = targets.shape == logits.stored.shape and targets.dtype.kind == "f"
    if not (hard or soft):
        raise Failure(
            f"{targets.name}: expected integers of shape {tuple(shape)} or floats of shape "
            f"{logits.stored.shape}, got {targets.dtype} of shape {targets.shape}"
        )
    # With a single axis of rows both orders number them alike; with more they must agree.
    if len(shape) > 1 and targets.fortran_order != logits.stored.fortran_order:
        orders = ("C", "Fortran")
        raise Failure(
            f"{targets.name}: expected {orders[logits.stored.fortran_order]} order like the "
            f"logits, got {orders[targets.fortran_order]} order"
        )
    return (targets, None) if hard else (None, Rows.along(targets, axis))


def _total_weight(targets: Stored, classes: int, weight: Array | None, ignore_index: int) -> float:
    """Sum the weights of the rows that count, having checked every target."""
    total = 0.0
    size, step = math.prod(targets.shape), npy.PIECE_BYTES // targets.dtype.itemsize
    for start in range(0, size, step):
        piece = targets.flat(start, min(start + step, size))
        counts = piece != ignore_index
        wrong = counts & ((piece < 0) | (piece >= classes))
        if wrong.any():
            first = int(wrong.argmax())
            raise Failure(
                f"{targets.name}: expected integers in [0, {classes}), got {piece[first]} "
                f"at index {targets.index(start + first)}"
            )
        valid = piece[counts]
        total += len(valid) if weight is None else weight[valid].sum(dtype=np.float64)
    return float(total)


def _evaluated(data: _Data, gradient: tuple[IO[bytes], int] | None) -> tuple[Result, list[str]]:
    """Return the result, and what there is to be said about the targets."""
    rows = data.logits
    sums = np.zeros(4)
    faults = [_Fault("of at least 0"), _Fault("that sum to 1 in each row")]
    with terminal.progress("eval", len(rows)) as advance:
        if len(rows):  # once without a clock, so that compiling does not count
            start, stop = next(rows.pieces())
            _piece(data, start, stop, gradient is not None)
        began = time.perf_counter()
        for start, stop in rows.pieces():
            piece = _piece(data, start, stop, gradient is not None)
            sums += piece.sums
            for fault, wrong in zip(faults, piece.improper, strict=True):
                fault.add(start, wrong)
            if gradient is not None and piece.gradient is not None:
                rows.write(*gradient, start, piece.gradient)
            advance(stop - start)
        seconds = time.perf_counter() - began
    loss, nll, valid, correct = sums.tolist()
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        result = Result(
            loss=float(np.divide(loss, data.total_weight)) if data.reduction == "mean" else loss,
            perplexity=float(np.exp(np.divide(nll, data.total_weight))),
            accuracy=float(np.divide(correct, valid)),
            rows=len(rows),
            ignored=len(rows) - int(valid),
            total_weight=data.total_weight,
            seconds=seconds,
            rows_per_second=float(np.divide(len(rows), seconds)),
        )
    return result, [fault.told(data.soft) for fault in faults if data.soft and fault.rows]


@dataclasses.dataclass
class _Fault:
    """Rows of soft targets that are no distributions: what they should be, how many, the first."""

    expected: str
    rows: int = 0
    first: int = 0

    def add(self, start: int, wrong: Array) -> None:
        """Count rows from `start` on."""
        if not self.rows and wrong.any():
            self.first = start + int(wrong.argmax())
        self.rows += int(wrong.sum())

    def told(self, soft: Rows) -> str:
        return (
            f"{soft.stored.name}: expected probabilities {self.expected}, got {self.rows} rows "
            f"of others, the first at index {soft.index(self.first)}"
        )


def _improper(targets: Array) -> tuple[Array, Array]:
    """Which rows of soft targets have negative ones, and which do not sum to 1."""
    # The square root as scikit-learn has it; 1e-4 for what has been float32, or been written with
    # six digits, before it was float64.
    tolerance = max(1e-4, float(np.finfo(targets.dtype).eps) ** 0.5)
    with np.errstate(invalid="ignore"):  # of infinite ones
        excess = targets.sum(axis=1, dtype=np.float64) - 1
    return (targets < 0).any(axis=1).ravel(), ~(np.abs(excess) <= tolerance).ravel()


class _Piece(NamedTuple):
    """Of some rows: sums of loss, NLL, valid and correct rows; the gradient; `_improper` ones."""

    sums: Array
    gradient: Array | None
    improper: tuple[Array, Array]


def _piece(data: _Data, start: int, stop: int, with_gradient: bool) -> _Piece:
    try:
        logits = data.logits.read(start, stop)
        if data.hard is not None:
            targets = data.hard.flat(start, stop).reshape(logits.shape[0], logits.shape[2])
        else:
            assert data.soft is not None  # one of the two, for the type checker
            targets = data.soft.read(start, stop)
            if targets.shape != logits.shape:  # a matrix stored in the other order
                targets = targets.swapaxes(0, 2)
        shared: dict[str, Any] = {
            "axis": 1,
            "weight": data.weight,
            "ignore_index": data.ignore_index,
        }
        stats = fastce.cross_entropy_stats(logits, targets, **shared)
        shared["label_smoothing"] = data.label_smoothing
        loss = stats.loss
        if data.label_smoothing:
            loss = fastce.cross_entropy(logits, targets, reduction="none", **shared)
        gradient = None
        if with_gradient:
            # The gradient is that of the whole, so it is divided by the weight of the whole; with
            # a weight of zero nothing counts, and the gradient of the sum is the zero it should be.
            whole: dict[str, Any] = {"reduction": "sum"}
            if data.reduction == "mean" and data.total_weight:
                whole = {"reduction": "mean", "normalizer": data.total_weight}
            _, gradient = fastce.cross_entropy_and_grad(logits, targets, **shared, **whole)
    except IndexError:
        assert data.hard is not None
        raise Failure(
            f"{data.hard.name}: expected targets that stay as they are, got new ones since a check"
        ) from None
    except (TypeError, ValueError) as error:  # a weight or a smoothing that is out of its range
        raise Failure(str(error)) from None
    valid = stats.predicted >= 0
    label = targets if data.hard is not None else targets.argmax(axis=1)
    correct = valid & (stats.predicted == label)
    sums = [
        loss.sum(dtype=np.float64),
        stats.loss.sum(dtype=np.float64),
        valid.sum(),
        correct.sum(),
    ]
    proper = np.zeros(0, bool)
    return _Piece(
        np.array(sums), gradient, (proper, proper) if data.soft is None else _improper(targets)
    )
