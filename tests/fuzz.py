"""Random calls of the public functions, in every form that can be drawn, against the oracle.

    python -m tests.fuzz --seconds 60 --seed 1
    python -m tests.fuzz --seed 1 --case 4711     # that case again

A case draws a function, dtype, shape (sizes on both sides of every boundary of the code), layout,
values (special ones among them), labels, options and number of threads.  Looked at are the result;
that nothing but the result was written, neither beside `out` nor in what was given; that another
number of threads gives the same bits; and that a call with something wrong in it raises, having
written nothing.  What kernels are compiled for is drawn seldom, since compiling takes seconds.
Exits with 1 where a case failed, and says how to see it again.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
import pytest
from ml_dtypes import finfo

import fastce
import fastce.rows
from fastce import boosting, capi, shards
from tests import oracle
from tests.checks import (
    FLOATS,
    GRADIENT_BOUND,
    LOSS_BOUND_ANYWHERE,
    gradient_bound,
    loss_dtype,
    relative_errors,
    same_bits,
)

Array = np.ndarray[Any, Any]

CASES_A_KIND = 40  # of calls that need the same compiled code
MOST = 60_000  # numbers in an array: the oracle takes a microsecond for each
CLASSES = (
    1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 62, 63, 64, 65, 66, 95, 96, 127, 128, 129, 255,
    256, 511, 512, 513, 544, 1023, 1024, 1025, 2049, 4097, 8191, 8192, 8193, 20_001,
)  # fmt: skip
ROWS = (0, 1, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 100, 257, 1025)
SPECIAL = (np.nan, np.inf, -np.inf, "max", "-max", "tiny", "-tiny", "smallest", 0.0, -0.0)
INTEGERS = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i4", ">i8")
THREADS = (1, 2, 3, 7)
GUARD = 64  # bytes on each side of an array


class Draw:
    """One case's choices."""

    def __init__(self, *seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.said: dict[str, Any] = {}

    def one(self, choices: Any) -> Any:
        """One of some things, all as likely."""
        return choices[int(self.rng.integers(len(choices)))]

    def maybe(self, chance: float) -> bool:
        """True with some probability."""
        return bool(self.rng.random() < chance)

    def shape(self, most: int = MOST) -> tuple[int, tuple[int, ...], int]:
        """(classes, shape, class axis): one or two row axes, sometimes none or three."""
        classes = self.one(CLASSES)
        rows = []
        for _ in range(self.one((1, 1, 1, 2, 2, 3, 0))):
            most = max(1, most // max(1, *rows, classes if not rows else 1))
            rows.append(min(self.one(ROWS), most))
        axis = self.one(range(len(rows) + 1)) if self.maybe(0.5) else len(rows)
        shape = (*rows[:axis], classes, *rows[axis:])
        return classes, shape, axis if self.maybe(0.5) else axis - len(shape)

    def room(self, shape: tuple[int, ...], dtype: Any) -> "Room":
        """Memory for an array: side by side, or with axes in any order, steps, backwards."""
        if self.maybe(0.4):
            return Room(shape, dtype, range(len(shape)), [1] * len(shape), 0)
        order = self.rng.permutation(len(shape)).tolist()
        steps = [self.one((1, 1, 1, 2, 3, -1, -2)) for _ in shape]
        return Room(shape, dtype, order, steps, self.one((0, 0, 0, 8, 4, 1)))

    def laid(self, values: Array, swap: bool = False) -> "Room":
        """The values somewhere in memory, sometimes read-only."""
        dtype = values.dtype.newbyteorder() if swap and self.maybe(0.05) else values.dtype
        room = self.room(values.shape, dtype)
        room.array[...] = values
        room.remember()
        if self.maybe(0.2):
            room.array.flags.writeable = False
        return room

    def values(self, shape: tuple[int, ...], axis: int, dtype: np.dtype[Any]) -> Array:
        """Logits: normal ones, with leads, ties, far from zero, and special numbers among them."""
        scale = self.one((1e-30, 1e-3, 1.0, 1.0, 3.0, 30.0, 300.0))
        shift = self.one((0.0, 0.0, 0.0, 10.0, -700.0, 5e3, -1e6))
        z = self.rng.normal(size=shape) * scale + shift
        if self.maybe(0.2):
            z = np.round(z)
        rows = np.moveaxis(z, axis, -1)
        if self.maybe(0.3) and rows.size:
            lead = self.one((5.0, 20.0, 41.0, 90.0, 120.0))
            at = self.rng.integers(0, rows.shape[-1], rows.shape[:-1])[..., None]
            np.put_along_axis(rows, at, rows.max(axis=-1, keepdims=True) + lead, -1)
        with np.errstate(all="ignore"):
            z = z.astype(dtype)
        info = named(dtype)
        if self.maybe(0.35) and z.size:
            for _ in range(self.one((1, 2, 5, 1 + z.size // 8))):
                what = self.one(SPECIAL)
                z.flat[self.rng.integers(z.size)] = info.get(what, what)
        if self.maybe(0.1) and z.size:  # a row of nothing but one number
            rows = np.moveaxis(z, axis, -1)
            what = self.one(SPECIAL)
            rows[tuple(int(self.rng.integers(n)) for n in rows.shape[:-1])] = info.get(what, what)
        return z

    def hard(self, rows: tuple[int, ...], classes: int, ignore_index: int) -> Array:
        """Integer targets, some of them ignored."""
        dtype = np.dtype(self.one(INTEGERS) if self.maybe(0.5) else "i8")
        most = min(classes, np.iinfo(dtype).max + 1)
        y = self.rng.integers(0, most, rows)
        holds = np.iinfo(dtype).min <= ignore_index <= np.iinfo(dtype).max
        if self.maybe(0.5) and holds:
            y = np.where(self.rng.random(rows) < self.one((0.1, 0.5, 1.0)), ignore_index, y)
        return np.asarray(y).astype(dtype)

    def soft(self, shape: tuple[int, ...], axis: int, dtype: np.dtype[Any]) -> Array:
        """Distributions, some with zeros, some that do not sum to one."""
        h = self.rng.gamma(self.one((0.1, 1.0, 50.0)), size=shape)
        if self.maybe(0.3):
            h = np.where(self.rng.random(shape) < 0.5, 0.0, h)
        if self.maybe(0.8):
            total = h.sum(axis=axis, keepdims=True)
            h = h / np.where(total > 0, total, 1)
        with np.errstate(all="ignore"):
            return h.astype(dtype)


def named(dtype: np.dtype[Any]) -> dict[Any, float]:
    """The numbers of a dtype that have names in SPECIAL.

    The largest of float64 is one whose sums and squares have float64 results.
    """
    info = finfo(dtype)
    largest = 1e150 if dtype == np.float64 else float(info.max)
    return {
        "max": largest, "-max": -largest, "tiny": float(info.smallest_normal),
        "-tiny": -float(info.smallest_normal), "smallest": float(info.smallest_subnormal),
    }  # fmt: skip


class Room:
    """An array within memory of its own, and what lay there."""

    def __init__(
        self, shape: tuple[int, ...], dtype: Any, order: Any, steps: list[int], offset: int
    ) -> None:
        sizes = [max(1, shape[k]) * abs(steps[k]) for k in order]
        dtype = np.dtype(dtype)
        count = int(np.prod(sizes, dtype=np.int64))
        self.memory = np.full(count * dtype.itemsize + 2 * GUARD + offset, 0x5A, np.uint8)
        whole = np.ndarray(sizes, dtype, self.memory.data, GUARD + offset)
        whole = whole.transpose(np.argsort(list(order)))
        self.array = whole[
            *(
                slice(0, n * step, step) if step > 0 else slice(n * -step - 1, None, step)
                for n, step in zip(shape, steps, strict=True)
            ),
            ...,  # a view, even of a single number
        ]
        if self.array.shape != shape:  # an axis without elements
            self.array = self.array[tuple(slice(0, n) for n in shape)]
        self.remember()

    def remember(self) -> None:
        """Take down what lies here."""
        self.before = self.memory.copy()

    def taken(self) -> Array:
        """The array's elements, having put back what lay in their place."""
        result = self.array.copy()
        then = np.ndarray(
            self.array.shape, self.array.dtype, self.before.data,
            address(self.array) - address(self.memory), self.array.strides,
        )  # fmt: skip
        self.array[...] = then
        return result

    def untouched(self) -> bool:
        """Whether every byte is what it was."""
        return np.array_equal(self.memory, self.before)


def address(array: Array) -> int:
    """Where the first element is."""
    return int(array.__array_interface__["data"][0])


# Calls --------------------------------------------------------------------------------------------


class Case:
    """What a case calls, with what, and what should come out."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.given: list[Room] = []

    def laid(self, values: Array, swap: bool = False) -> Array:
        """An argument somewhere in memory, known to be left alone."""
        room = self.draw.laid(values, swap)
        self.given.append(room)
        return room.array

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The result on some number of threads, the same on another, nothing given changed."""
        first, second = self.draw.rng.choice(THREADS, 2).tolist()
        with fastce.num_threads(first):
            found = function(*arguments, **options)
        with fastce.num_threads(second):
            again = function(*arguments, **options)
        for a, b in zip(flat(found), flat(again), strict=True):
            assert same_bits(a, b), f"other bits on {second} threads than on {first}"
        self.unchanged()
        return found

    def unchanged(self) -> None:
        """Fail where something given was written to."""
        assert all(room.untouched() for room in self.given), "an argument was written to"


def flat(result: Any) -> Iterator[Array]:
    """The arrays of a result."""
    if isinstance(result, shards.Partial):
        yield result.records
    elif isinstance(result, tuple):
        for part in result:
            yield from flat(part)
    elif result is not None:
        yield np.asarray(result)


def assert_close(got: Any, want: oracle.Expected, bound: float, factor: float = 1.0) -> None:
    """Fail where an error is larger; nothing is promised of numbers below the normal ones.

    Nor of what a factor makes of them.
    """
    array, value = np.asarray(got), np.asarray(want.value)
    assert array.shape == value.shape, f"expected shape {value.shape}, got {array.shape}"
    if not array.size:
        return
    tiny = factor * float(finfo(array.dtype).smallest_normal)
    small = (np.abs(value) < tiny) & (np.abs(oracle.exact(array)) <= tiny)
    errors = np.where(small, 0, relative_errors(array, want))
    worst = np.unravel_index(int(np.argmax(errors)), errors.shape)
    assert errors[worst] <= bound, (
        f"relative error {float(errors[worst]):.3g} > {bound:.3g} at "
        f"{tuple(map(int, worst))}: got {array[worst]!r}, expected {value[worst]!r}"
    )


def loss_bound(dtype: Any) -> float:
    """Of losses, wherever they are."""
    return LOSS_BOUND_ANYWHERE[loss_dtype(dtype).itemsize]


def options_of(draw: Draw, kind: Draw, classes: int, rows: tuple[int, ...]) -> dict[str, Any]:
    """Options of a loss; those that kernels are compiled for come from `kind`."""
    options: dict[str, Any] = {"reduction": draw.one(("mean", "sum", "none"))}
    if kind.maybe(0.3):
        weight = draw.rng.uniform(0, 2, classes)
        if draw.maybe(0.3):
            weight[draw.rng.random(classes) < 0.5] = 0
        if draw.maybe(0.1):
            weight = -weight
        options["weight"] = weight.astype(draw.one(("f4", "f8")))
    if kind.maybe(0.3):
        options["label_smoothing"] = draw.one((0.1, 0.5, 1.0, 1e-9))
    if draw.maybe(0.2):
        options["z_loss"] = draw.one((1e-4, 0.5, 3.0))
    if kind.maybe(0.2):
        options["softcap"] = draw.one((0.5, 30.0, 1e4))
    if options["reduction"] == "mean" and draw.maybe(0.2):
        options["normalizer"] = draw.one((0.5, 7.0, 1000))
    return options


def labels_of(case: Case, kind: Draw, classes: int, shape: Any, axis: int, dtype: Any) -> Any:
    """(targets, ignore_index) of either kind."""
    draw = case.draw
    if kind.maybe(0.3):
        return case.laid(draw.soft(shape, axis, dtype)), -100
    ignore = draw.one((-100, -100, -1, 0, classes, 255))
    rows = tuple(np.delete(shape, axis))
    return case.laid(draw.hard(rows, classes, ignore)), ignore


def cross_entropy(case: Case, kind: Draw) -> None:
    """The loss; with its gradient, in memory of its own or in place."""
    draw, dtype = case.draw, kind.one(FLOATS)
    classes, shape, axis = draw.shape()
    rows = tuple(np.delete(shape, axis))
    logits = case.laid(draw.values(shape, axis, dtype), swap=True)
    targets, ignore = labels_of(case, kind, classes, shape, axis, dtype)
    options = {"axis": axis, "ignore_index": ignore, **options_of(draw, kind, classes, rows)}
    where = draw.one(("fresh", "room", "in place")) if logits.dtype.isnative else "fresh"
    room = draw.room(shape, dtype)
    if where == "in place":
        room.array[...] = logits
        room.remember()
        logits = room.array
    loss = case.call(fastce.cross_entropy, logits, targets, **options)
    upstream = {}
    if draw.maybe(0.5):
        per_row = options["reduction"] == "none" and draw.maybe(0.8)
        upstream["grad_output"] = draw.rng.normal(size=rows if per_row else None)
    want = oracle.cross_entropy(logits, targets, **options, **upstream)
    assert loss.dtype == loss_dtype(dtype)
    assert_close(loss, want.loss, loss_bound(dtype))
    out = None if where == "fresh" else room.array
    again, grad = fastce.cross_entropy_and_grad(logits, targets, out=out, **options, **upstream)
    if out is not None:
        assert grad is out, "another array than out came back"
        grad = room.taken()
        assert room.untouched(), "something beside out was written"
    case.unchanged()
    assert same_bits(again, loss), "another loss with a gradient than without"
    assert_close(grad, want.grad, gradient_bound(dtype))


def stats(case: Case, kind: Draw) -> None:
    """Loss, log-sum-exp, entropy, prediction."""
    draw, dtype = case.draw, kind.one(FLOATS)
    classes, shape, axis = draw.shape()
    logits = case.laid(draw.values(shape, axis, dtype), swap=True)
    targets, ignore = labels_of(case, kind, classes, shape, axis, dtype)
    options: dict[str, Any] = {"axis": axis, "ignore_index": ignore}
    found = case.call(fastce.cross_entropy_stats, logits, targets, **options)
    want = oracle.cross_entropy_stats(logits, targets, **options)
    assert_close(found.loss, want.loss, loss_bound(dtype))
    assert_close(found.lse, want.lse, loss_bound(dtype))
    assert_close(found.entropy, want.entropy, 1e-5 if loss_dtype(dtype) == np.float32 else 1e-12)
    assert np.array_equal(found.predicted, want.predicted)
    assert found.total_weight == want.total_weight


def softmax(case: Case, kind: Draw) -> None:
    """softmax, its logarithm, log-sum-exp."""
    draw, dtype = case.draw, kind.one(FLOATS)
    _, shape, axis = draw.shape()
    x = case.laid(draw.values(shape, axis, dtype), swap=True)
    if draw.maybe(0.3):
        axes = draw.one([axis, None, tuple(range(len(shape))), (axis,)])
        found = case.call(fastce.logsumexp, x, axis=axes, keepdims=True)
        want = oracle.logsumexp(x, axis=axes, keepdims=True) if x.size else None
        if want is not None:
            assert_close(found, want, loss_bound(dtype))
        return
    function, right = draw.one(
        [(fastce.softmax, oracle.softmax), (fastce.log_softmax, oracle.log_softmax)]
    )
    room = draw.room(shape, dtype) if x.dtype.isnative and draw.maybe(0.6) else None
    found = function(x, axis=axis, out=None if room is None else room.array)
    if room is not None:
        found = room.taken()
        assert room.untouched(), "something beside out was written"
    case.unchanged()
    assert_close(found, right(x, axis=axis), gradient_bound(dtype))


def nll(case: Case, kind: Draw) -> None:
    """The loss of log-probabilities."""
    draw, dtype = case.draw, kind.one(FLOATS)
    classes, shape, axis = draw.shape()
    with np.errstate(all="ignore"):
        log_probs = case.laid((-np.abs(draw.values(shape, axis, dtype))).astype(dtype))
    targets, ignore = labels_of(case, kind, classes, shape, axis, dtype)
    options = {"axis": axis, "ignore_index": ignore}
    options["reduction"] = draw.one(("mean", "sum", "none"))
    found = case.call(fastce.nll_loss_and_grad, log_probs, targets, **options)
    want = oracle.nll_loss(log_probs, targets, **options)
    assert_close(found[0], want.loss, loss_bound(dtype))
    assert_close(found[1], want.grad, gradient_bound(dtype))


def binary(case: Case, kind: Draw) -> None:
    """The sigmoid form."""
    draw, dtype = case.draw, kind.one(FLOATS)
    _, shape, axis = draw.shape()
    logits = case.laid(draw.values(shape, axis, dtype))
    targets = case.laid(draw.rng.uniform(0, 1, shape).round(draw.one((0, 3))).astype(dtype))
    options: dict[str, Any] = {"reduction": draw.one(("mean", "sum", "none"))}
    for name in ("weight", "pos_weight"):
        if kind.maybe(0.4):
            options[name] = draw.rng.uniform(0.1, 2, shape[-1:] if draw.maybe(0.5) else shape)
    room = draw.room(shape, dtype) if draw.maybe(0.6) else None
    out = None if room is None else room.array
    loss, grad = fastce.binary_cross_entropy_and_grad(logits, targets, out=out, **options)
    if room is not None:
        grad = room.taken()
        assert room.untouched(), "something beside out was written"
    again = case.call(fastce.binary_cross_entropy, logits, targets, **options)
    assert same_bits(again, loss), "another loss with a gradient than without"
    if all(name not in options for name in ("weight", "pos_weight")) or dtype == np.float64:
        want = oracle.binary_cross_entropy(logits, targets, **options)
        assert_close(loss, want.loss, loss_bound(dtype), 4.0)
        assert_close(grad, want.grad, gradient_bound(dtype), 4.0)


def curvature(case: Case, kind: Draw) -> None:
    """Gradient and diagonal, and the product with the Hessian."""
    draw, dtype = case.draw, kind.one(FLOATS[:2])
    classes, shape, axis = draw.shape()
    rows = tuple(np.delete(shape, axis))
    logits = case.laid(draw.values(shape, axis, dtype))
    bound = GRADIENT_BOUND[loss_dtype(dtype).itemsize]
    if kind.maybe(0.4):
        v = case.laid(draw.rng.normal(size=shape).astype(dtype))
        product = case.call(fastce.hessian_vector_product, logits, v, axis=axis)
        assert_close(product, oracle.hessian_vector_product(logits, v, axis=axis), bound)
        return
    targets = case.laid(draw.rng.integers(0, classes, rows))
    weight = draw.rng.uniform(0.1, 3, rows) if kind.maybe(0.5) else None
    options = {"axis": axis, "sample_weight": weight, "hessian": draw.one(("diag", "xgboost"))}
    found = case.call(fastce.gradient_hessian, logits, targets, **options)
    for got, want in zip(found, oracle.gradient_hessian(logits, targets, **options), strict=True):
        assert_close(got, want, bound)


def slices(case: Case, kind: Draw) -> None:
    """Classes in slices, merged, against all classes at once."""
    draw, dtype = case.draw, kind.one(FLOATS)
    classes, shape, axis = draw.shape()
    axis %= len(shape)
    values = draw.values(shape, axis, dtype)
    cuts = sorted({0, classes, *draw.rng.integers(0, classes + 1, draw.one((1, 2, 4))).tolist()})
    targets, ignore = labels_of(case, kind, classes, shape, axis, dtype)
    options = options_of(draw, kind, classes, ())
    reduction = options.pop("reduction")
    z_loss, normalizer = options.pop("z_loss", 0.0), options.pop("normalizer", None)
    weight = options.pop("weight", None)
    if targets.dtype.kind == "f" or targets.dtype.name == "bfloat16":
        options.pop("label_smoothing", None) if draw.maybe(0.5) else None
    parts = []
    for start, stop in itertools.pairwise(cuts):
        inside = (slice(None),) * axis + (slice(start, stop),)
        own = {"axis": axis, "class_offset": start}
        soft = targets.shape == shape and targets.dtype.kind not in "iu"
        parts.append((
            case.laid(values[inside]), targets[inside] if soft else targets, own,
            None if weight is None else weight[start:stop],
        ))  # fmt: skip
    partials = [
        case.call(
            shards.partial, z, y, weight=w, classes=classes, ignore_index=ignore, **own, **options
        )
        for z, y, own, w in parts
    ]  # fmt: skip
    total = shards.merge(*partials)
    finish = {"z_loss": z_loss, "reduction": reduction, "normalizer": normalizer}
    found = shards.finish(total, **finish)
    grads = [
        case.call(shards.grad, z, y, total, weight=w, **own, **finish) for z, y, own, w in parts
    ]
    want = oracle.cross_entropy(
        values, targets, axis=axis, weight=weight, ignore_index=ignore, **options, **finish
    )
    assert_close(found.loss, want.loss, loss_bound(dtype))
    assert_close(np.concatenate(grads, axis=axis), want.grad, gradient_bound(dtype))


@numba.njit
def _compiled(logits: Array, targets: Array, losses: Array, lses: Array, out: Array) -> None:
    for i in range(len(logits)):
        lses[i] = fastce.rows.logsumexp(logits[i])
        losses[i] = fastce.rows.cross_entropy_and_grad(logits[i], targets[i], out[i])


def compiled_rows(case: Case, kind: Draw) -> None:
    """Single rows in compiled code."""
    draw, dtype = case.draw, kind.one(FLOATS[:2])
    classes, count = draw.one(CLASSES), draw.one(ROWS[1:9])
    logits = np.ascontiguousarray(draw.values((count, classes), 1, dtype))
    room = Room((count, classes), dtype, (0, 1), [1, 1], 0)
    targets = draw.rng.integers(0, classes, count)
    losses, lses = np.empty(count), np.empty(count)
    _compiled(logits, targets, losses, lses, room.array)
    want = oracle.cross_entropy(logits, targets, reduction="none")
    kept = loss_dtype(dtype)
    with np.errstate(all="ignore"):
        assert_close(losses.astype(kept), want.loss, loss_bound(dtype))
        assert_close(lses.astype(kept), oracle.logsumexp(logits), loss_bound(dtype))
    assert_close(room.taken(), oracle.cross_entropy(logits, targets, reduction="sum").grad,
                 gradient_bound(dtype))  # fmt: skip
    assert room.untouched(), "something beside out was written"


def c_function(case: Case, kind: Draw) -> None:
    """The same by C functions, whatever the strides."""
    draw, dtype = case.draw, kind.one(FLOATS[:2])
    classes, count = draw.one(CLASSES), draw.one(ROWS[1:12])
    logits = case.laid(draw.values((count, classes), 1, dtype))
    room = draw.room((count, classes), dtype)
    targets, losses = draw.rng.integers(0, classes, count), np.empty(count, dtype)
    (row, step), (out_row, out_step) = logits.strides, room.array.strides
    filled = capi.Call(
        logits=address(logits), rows=count, classes=classes, row_stride=row, class_stride=step,
        targets=targets.ctypes.data, losses=losses.ctypes.data, grad=address(room.array),
        grad_row_stride=out_row, grad_class_stride=out_step,
    )  # fmt: skip
    assert capi.function(dtype, grad=True)(filled) == 0
    want = oracle.cross_entropy(logits, targets, reduction="none")
    assert_close(losses, want.loss, loss_bound(dtype))
    assert_close(room.taken(), want.grad, gradient_bound(dtype))
    assert room.untouched(), "something beside out was written"
    case.unchanged()


def linear(case: Case, kind: Draw) -> None:
    """The head without logits in memory, against logits in memory."""
    draw, dtype = case.draw, kind.one(FLOATS[:2])
    classes, count = draw.one(CLASSES[:-5]), draw.one(ROWS)
    features = draw.one((1, 2, 3, 8, 17, 64))
    x = case.laid(draw.rng.normal(size=(count, features)).astype(dtype))
    w = case.laid(draw.rng.normal(size=(classes, features)).astype(dtype))
    bias = draw.rng.normal(size=classes).astype(dtype) if kind.maybe(0.5) else None
    targets, ignore = labels_of(case, kind, classes, (count, classes), 1, dtype)
    options = options_of(draw, kind, classes, (count,))
    weight = options.pop("weight", None)
    found = case.call(
        fastce.linear_cross_entropy_and_grad, x, w, targets, bias=bias, class_weight=weight,
        ignore_index=ignore, **options,
    )  # fmt: skip
    logits = oracle.exact(x) @ oracle.exact(w).T + (0 if bias is None else oracle.exact(bias))
    want = oracle.cross_entropy(
        logits.astype(np.float64), targets, weight=weight, ignore_index=ignore, **options
    )
    eps = 300 * (features + 8) * float(np.finfo(dtype).eps)
    reach = float(np.abs(np.asarray(x, "f8")).max(initial=1) * 8)
    near = lambda got, right, size: np.testing.assert_allclose(  # noqa: E731
        np.asarray(got, "f8"), np.asarray(right, "f8"), rtol=eps, atol=eps * size
    )
    near(found[0], want.loss.value, float(np.nanmax(want.loss.scale, initial=1)) * reach)
    g = np.asarray(want.grad.value, "f8")
    size = float(np.abs(want.grad.scale).sum(initial=1)) * reach * reach
    near(found[1][0], g @ np.asarray(w, "f8"), size)
    near(found[1][1], g.T @ np.asarray(x, "f8"), size)
    if bias is not None:
        near(found[1][2], g.sum(axis=0), size)


def boosted(case: Case, kind: Draw) -> None:
    """The objective of gradient boosting."""
    draw = case.draw
    classes, count = draw.one(CLASSES[1:20]), draw.one(ROWS[1:])
    scores = draw.rng.normal(size=(count, classes)).astype(np.float32) * 3
    labels = draw.rng.integers(0, classes, count)
    objective = boosting.softmax_objective("xgboost")
    grad, hess = objective(labels, scores)
    want = oracle.gradient_hessian(scores, labels, hessian="xgboost")
    for got, right in zip((grad, hess), want, strict=True):
        assert_close(np.asarray(got, np.float32).reshape(scores.shape), right, 1e-5)


# What is wrong, and the errors that may say so.
WRONG: dict[str, Callable[[Draw, Array, Array], dict[str, Any]]] = {
    "a target": lambda d, z, y: {"targets": _spoilt(d, y, (-1, z.shape[-1], 2**40, -(2**60)))},
    "shape of targets": lambda d, z, y: {"targets": np.append(y, 0)},
    "kind of targets": lambda d, z, y: {"targets": y.astype(d.one(("f8", "?", "O", "c16")))},
    "kind of logits": lambda d, z, y: {"logits": z.astype(d.one(("i8", "?", "O", "c16")))},
    "axis": lambda d, z, y: {"axis": d.one((2, -3, 0.0, None, "a", 2**70))},
    "smoothing": lambda d, z, y: {"label_smoothing": d.one((-0.1, 1.1, np.nan, "0.1", 1j))},
    "softcap": lambda d, z, y: {"softcap": d.one((0.0, -1.0, np.nan, np.inf))},
    "reduction": lambda d, z, y: {"reduction": d.one(("avg", None, 0))},
    "weight": lambda d, z, y: {"weight": np.ones(z.shape[-1] + d.one((1, 2)))},
    "masked": lambda d, z, y: {"targets": np.ma.masked_equal(y, 0)},
    "upstream": lambda d, z, y: {"grad_output": np.ones(len(y) + 1)},
    "classes": lambda d, z, y: {"logits": z[:, :0]},
    "out of another shape": lambda d, z, y: {"out": np.zeros_like(z, shape=z.T.shape)},
    "out of another dtype": lambda d, z, y: {"out": np.zeros(z.shape, np.float16)},
    "out that overlaps": lambda d, z, y: {"out": z[::-1]},
    "out that is targets": lambda d, z, y: {"targets": z, "out": z},
}  # fmt: skip


def _spoilt(draw: Draw, targets: Array, bad: tuple[int, ...]) -> Array:
    targets = targets.astype(np.int64)
    targets[draw.rng.integers(len(targets))] = draw.one(bad)
    return targets


def wrong(case: Case, kind: Draw) -> None:
    """A call with one thing wrong: an error, and nothing written."""
    draw, dtype = case.draw, kind.one(FLOATS[:2])
    classes, count = draw.one(CLASSES[1:]), draw.one(ROWS[3:])
    logits = draw.values((count, classes), 1, dtype)
    targets = draw.rng.integers(0, classes, count)
    name = draw.one(list(WRONG))
    draw.said["wrong"] = name
    out = np.full(logits.shape, 7, dtype)
    arguments = {"logits": logits, "targets": targets, "out": out}
    arguments |= WRONG[name](draw, logits, targets)
    arrays = {k: a for k, a in arguments.items() if isinstance(a, np.ndarray)}
    before = {k: a.copy() for k, a in arrays.items()}
    with pytest.raises((TypeError, ValueError, IndexError), match=r"\w: "):
        fastce.cross_entropy_and_grad(**arguments)
    for name, array in arrays.items():
        assert array.tobytes() == before[name].tobytes(), f"{name} was written to"


CALLS = (
    cross_entropy, cross_entropy, cross_entropy, cross_entropy, stats, softmax, nll, binary,
    curvature, slices, compiled_rows, c_function, linear, boosted, wrong,
)  # fmt: skip


# Driver -------------------------------------------------------------------------------------------


def tried(seed: int, number: int) -> str | None:
    """Run one case; None, or what is wrong with it."""
    kind = Draw(seed, number // CASES_A_KIND)
    call = kind.one(CALLS)
    case = Case(Draw(seed, number // CASES_A_KIND, number))
    try:
        with np.errstate(all="ignore"):
            call(case, kind)
    except (Exception, pytest.fail.Exception) as error:
        return f"{call.__name__}: {type(error).__name__}: {error} {case.draw.said or ''}"
    return None


def run(seconds: float, seed: int, most: int | None = None) -> tuple[int, dict[int, str]]:
    """(cases, what is wrong by the number of the case) within about so many seconds."""
    end = time.monotonic() + seconds
    found: dict[int, str] = {}
    for number in itertools.count():
        if time.monotonic() > end or number == most:
            return number, found
        said = tried(seed, number)
        if said is not None:
            found[number] = said
            print(f"--seed {seed} --case {number}: {said}", file=sys.stderr, flush=True)
    raise AssertionError


def main() -> int:
    """Run for a time, or one case again."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--case", type=int, help="only this one, with the error as it comes")
    options = parser.parse_args()
    seed = int(np.random.SeedSequence().entropy) % 2**32 if options.seed is None else options.seed
    if options.case is not None:
        said = tried(seed, options.case)
        print(said or "nothing wrong")
        return said is not None
    cases, found = run(options.seconds, seed)
    print(f"seed {seed}: {cases} cases, {len(found)} failed")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
