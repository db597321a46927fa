"""`fastce.shards` of arrays on a CUDA device: however the classes are divided, the loss of all.

As `test_cuda_device.py` is run: on the card at hand, or with NUMBA_ENABLE_CUDASIM=1 in numba's
simulator.
"""

import dataclasses
import itertools

import numpy as np
import pytest

from tests.test_cuda_device import ROWS, SIMULATED, classes_of, forget_arrays, to_device, to_host

# isort: split
import fastce
from fastce import cuda, shards
from fastce.cuda.shards import merge_gathered
from tests import oracle
from tests.checks import (
    FLOATS,
    ONE_CLASS,
    assert_close,
    assert_gradient,
    assert_loss,
    draw,
    draw_soft,
    draw_targets,
    draw_weight,
    labels_on_one_class,
    loss_dtype,
    same_bits,
)
from tests.test_cross_entropy import OPTIONS

F32 = np.dtype(np.float32)
INF, NAN = np.inf, np.nan
REDUCED = ("z_loss", "reduction", "normalizer")
# Bytes of a slice of a row, one for each line of the launch tables that the two kernels use.
REGIMES = ["tile", "lanes", "registers", "warps", "shared", "cluster", "memory"]
if not SIMULATED:
    REGIMES = ["tile", "lanes", "registers", "warps", "blocks", "shared", "cluster", "wide cluster"]


@pytest.fixture(autouse=True)
def _arrays():
    forget_arrays()


class Split:
    """Logits and labels whose classes are divided at `cuts`, each slice an array of its own."""

    def __init__(self, logits, targets, cuts, axis=-1, weight=None, copy=np.ascontiguousarray):
        self.axis, self.classes = axis, logits.shape[axis]
        soft = targets.dtype.kind not in "iu"
        whole = to_device(targets)
        self.slices = []
        for start, stop in itertools.pairwise([0, *cuts, self.classes]):
            index = [slice(None)] * logits.ndim
            index[axis] = slice(start, stop)
            given = {"class_offset": start, "axis": axis}
            if weight is not None:
                given["weight"] = to_device(weight[start:stop].copy())
            y = to_device(copy(targets[tuple(index)])) if soft else whole
            self.slices.append((to_device(copy(logits[tuple(index)])), y, given))

    def partials(self, **options):
        return [
            shards.partial(z, y, classes=self.classes, **given, **options)
            for z, y, given in self.slices
        ]

    def gradient(self, total, **options):
        parts = [shards.grad(z, y, total, **given, **options) for z, y, given in self.slices]
        return np.concatenate(list(map(to_host, parts)), self.axis)


def sharded(logits, targets, cuts, *, axis=-1, weight=None, grad_output=None, **options):
    """Loss, log-sum-exp, weight and gradient by way of slices."""
    reduced = {name: options.pop(name) for name in REDUCED if name in options}
    split = Split(logits, targets, cuts, axis, weight)
    total = shards.merge(*split.partials(**options))
    done = shards.finish(total, **reduced)
    assert done.predicted is None
    grad = split.gradient(total, grad_output=grad_output, **reduced)
    return done, grad


def check(logits, targets, cuts, *, anywhere=False, **options):
    want = oracle.cross_entropy(logits, targets, **options)
    done, grad = sharded(logits, targets, cuts, **options)
    assert_loss(to_host(done.loss), want.loss, logits.dtype, anywhere=anywhere)
    assert_gradient(grad, want.grad, logits.dtype)
    return done, grad


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_every_dtype_in_every_regime(dtype, regime):
    """Also in place, and the same row alone has the same bits."""
    size = classes_of(regime, dtype)
    logits = draw((ROWS, size + 3), dtype, scale=1.5)
    targets = draw_targets((ROWS,), size + 3)
    targets[:3] = size + 1, -100, size - 2
    _, grad = check(logits, targets, [size], reduction="none")
    split = Split(logits[2:3], targets[2:3], [size])
    total = shards.merge(*split.partials())
    assert same_bits(split.gradient(total, reduction="none")[0], grad[2])
    for z, y, given in split.slices:
        assert shards.grad(z, y, total, **given, reduction="none", out=z) is z
    in_place = np.concatenate([to_host(z) for z, _, _ in split.slices], -1)
    assert same_bits(in_place[0], grad[2])


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("regime", ["tile", "lanes", "shared"] if SIMULATED else REGIMES)
def test_every_option(option, regime):
    classes = classes_of(regime, F32) + 5
    targets, options = OPTIONS[option]((ROWS,), classes, F32)
    options.pop("normalizer", None)
    logits = draw((ROWS, classes), scale=1.5)
    cuts = [5] if regime != "tile" else [2, 3]
    _, grad = check(logits, targets, cuts, reduction="none", **options)
    if "softcap" not in options or regime != "lanes":
        return
    weight = options.pop("weight", None)  # the target's logit is read before it is written to
    split = Split(logits, targets, cuts, weight=weight)
    z_loss = options.pop("z_loss", 0.0)
    total = shards.merge(*split.partials(**options))
    for z, y, given in split.slices:
        shards.grad(z, y, total, **given, z_loss=z_loss, reduction="none", out=z)
    assert same_bits(np.concatenate([to_host(z) for z, _, _ in split.slices], -1), grad)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_option_with_every_reduction(option, reduction):
    rows, classes = (26,), 5  # several blocks of rows
    targets, options = OPTIONS[option](rows, classes, np.float64)
    if reduction == "sum":
        options.pop("normalizer", None)
    logits = draw((*rows, classes), np.float64, scale=1.5)
    done, _ = check(logits, targets, [2], reduction=reduction, grad_output=-2.5, **options)
    counted = np.ones(rows) if targets.ndim == 2 else targets != options.get("ignore_index", -100)
    if targets.ndim == 1 and "weight" in options:
        counted = counted * options["weight"][np.where(counted, targets, 0)]
    assert float(to_host(done.total_weight)) == counted.sum()


@pytest.mark.parametrize("upstream", ["without axes", "per row"])
def test_upstream_gradient(upstream):
    targets, options = OPTIONS["smoothing, weight, ignored"]((ROWS,), 9, F32)
    factor = np.array(-0.5, np.float32) if upstream == "without axes" else draw((ROWS,), seed=9)
    reduction = "none" if upstream == "per row" else "mean"
    logits = draw((ROWS, 9), scale=1.5)
    want = oracle.cross_entropy(logits, targets, grad_output=factor, reduction=reduction, **options)
    _, grad = sharded(
        logits, targets, [4], grad_output=to_device(factor), reduction=reduction, **options
    )
    assert_gradient(grad, want.grad, F32)


@pytest.mark.parametrize("lead, offset", [(0.0, 1e4), (9.9, 1e4), (25.0, 0.0), (60.0, 1e4)])
@pytest.mark.parametrize("kind", ["hard", "smoothing"])
def test_confident_rows(lead, offset, kind):
    """Whichever slice has the target, and however many there are."""
    options = {"label_smoothing": 0.1} if kind == "smoothing" else {}
    logits = draw((ROWS, 12), scale=2.0)
    logits[:, 4] = logits.max() + lead
    logits += np.float32(offset)
    for cuts in ([3], [4, 5], range(1, 12)):
        check(logits, np.full(ROWS, 4), cuts, anywhere=lead >= 9.9, reduction="none", **options)


@pytest.mark.parametrize("laid", ONE_CLASS)
def test_all_that_labels_lay_on_the_maximum(laid):
    logits = draw((ROWS, 12)) - np.float32(30)
    logits[:, 4] += 60
    targets, options = labels_on_one_class(ROWS, 12, 4, F32)[laid]
    for cuts in ([3], [4, 5]):
        check(logits, targets, cuts, anywhere=True, reduction="sum", **options)


@pytest.mark.parametrize("dtype", [FLOATS[0], F32], ids=str)
def test_no_split_costs_digits(dtype):
    """The error is that of one call; they differ by a rounding for each of the slices."""
    logits, targets = draw((20, 60), dtype, scale=3.0), draw_targets((20,), 60)
    whole = to_host(fastce.cross_entropy(to_device(logits), to_device(targets), reduction="none"))
    for cuts in ([30], range(1, 60, 9)):
        done, _ = sharded(logits, targets, cuts, reduction="none")
        ulps = 4 if dtype == F32 else 8
        np.testing.assert_allclose(
            to_host(done.loss), whole, rtol=ulps * np.finfo(dtype).eps, atol=0
        )


@pytest.mark.parametrize("cuts", [[1], [3], [2, 5]], ids=str)
def test_special_values(cuts):
    logits = draw((10, 7))
    targets = np.full(10, 1)
    logits[0, 0], logits[1, 2], logits[2, 1], logits[3] = NAN, INF, INF, -INF
    logits[4, 1] = logits[5, 0] = logits[5, -1] = -INF
    logits[6], targets[6] = NAN, -100
    logits[7, :6] = -INF
    logits[8, [0, 6]] = INF
    logits[9, 3:], targets[9] = -INF, 2
    done, grad = check(logits, targets, cuts, reduction="none")
    loss = to_host(done.loss)
    assert np.isnan(loss[[0, 1, 2, 3, 8]]).all()
    assert loss[4] == INF
    assert not grad[6].any()
    assert not grad[5, [0, -1]].any()
    whole = fastce.cross_entropy_stats(to_device(logits), to_device(targets))
    np.testing.assert_allclose(to_host(done.lse), to_host(whole.lse), rtol=1e-6)
    for options in ({"label_smoothing": 0.1}, {"softcap": 5.0}, {"z_loss": 0.1}):
        check(logits, targets, cuts, reduction="none", **options)
    soft = draw_soft((10, 7))
    soft[:, [0, 3, 6]] = 0.0
    check(logits, soft, cuts, reduction="none")


@pytest.mark.parametrize("name", ["plain", "smoothing"])
def test_in_one_order_the_same_bits(name):
    options = {"label_smoothing": 0.1} if name == "smoothing" else {}
    logits, targets = draw((ROWS, 30), scale=2.0), draw_targets((ROWS,), 30)
    parts = Split(logits, targets, [4, 9, 22]).partials(**options)
    whole = shards.merge(*parts)
    step_by_step = shards.merge(shards.merge(shards.merge(*parts[:2]), parts[2]), parts[3])
    every = np.stack([to_host(part.records) for part in parts])
    gathered = merge_gathered(parts[0], to_device(every), 30)
    for other in (step_by_step, gathered):
        assert same_bits(to_host(whole.records), to_host(other.records))
        assert other.covered == whole.covered == 30
    backwards = shards.finish(shards.merge(*parts[::-1])).loss
    assert_close(to_host(backwards), oracle.cross_entropy(logits, targets, **options).loss, 3e-7)
    alone = shards.merge(parts[0])
    assert alone.records is not parts[0].records
    assert same_bits(to_host(alone.records), every[0])


LAYOUTS = {
    "class axis first": ((11, 5), 0, lambda a: a),
    "class axis in the middle": ((2, 11, 3), 1, lambda a: a),
    "every other class": ((4, 40), -1, lambda a: a[:, ::2]),
    "one off": ((4, 22), -1, lambda a: a[:, 1:]),
    "many rows": ((23, 4), -1, lambda a: a),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_layouts(layout, kind):
    """Slices are views."""
    shape, axis, view = LAYOUTS[layout]
    logits = view(draw(shape, scale=1.5))
    rows = tuple(np.delete(logits.shape, axis))
    targets = view(draw_soft(shape, axis=axis))
    if kind == "hard":
        targets = draw_targets(rows, logits.shape[axis])
    split = Split(logits, targets, [3], axis, copy=lambda a: a)
    want = oracle.cross_entropy(logits, targets, axis=axis, reduction="none")
    total = shards.merge(*split.partials())
    assert_loss(to_host(shards.finish(total, reduction="none").loss), want.loss, F32)
    assert_gradient(split.gradient(total, reduction="none"), want.grad, F32)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing_counts(dtype):
    logits, targets = draw((3, 5), dtype), np.full(3, -100)
    for reduction, want in (("mean", NAN), ("sum", 0), ("none", np.zeros(3))):
        done, grad = sharded(logits, targets, [2], reduction=reduction, z_loss=0.1)
        np.testing.assert_array_equal(to_host(done.loss), want)
        assert not grad.any()
    empty, nobody = np.empty((0, 5), dtype), np.empty(0, np.int64)
    for reduction, want in (("mean", NAN), ("sum", 0), ("none", np.empty(0))):
        done, grad = sharded(empty, nobody, [2], reduction=reduction)
        np.testing.assert_array_equal(to_host(done.loss), want)
        assert grad.shape == (0, 5)
    weight = np.zeros(5, loss_dtype(dtype))
    done, grad = sharded(logits, np.array([0, 1, 2]), [2], weight=weight)
    assert np.isnan(to_host(done.loss))
    assert not grad.any()


def test_a_single_class_has_no_gradient():
    logits, targets = draw((3, 1)), np.zeros(3, int)
    done, grad = sharded(logits, targets, [], reduction="none", label_smoothing=0.5)
    assert not to_host(done.loss).any()
    assert not grad.any()
    one_of_two = np.array([[0.0, -INF]], np.float32)  # a slice of one class is not all classes
    _, grad = check(one_of_two, np.array([1]), [1], reduction="none")
    assert grad.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize("regime", ["tile", "lanes", "shared"])
def test_a_bad_target_is_reported_later(regime):
    classes = classes_of(regime, F32) + 2
    logits, targets = draw((ROWS, classes)), draw_targets((ROWS,), classes)
    targets[1] = classes
    split = Split(logits, targets, [2])
    parts = [shards.partial(z, y, classes=classes, **given) for z, y, given in split.slices[:1]]
    match = rf"in \[0, {classes}\) .*, got {classes} at index \(1,\)"
    with pytest.raises(IndexError, match=match):
        cuda.synchronize()
    (z, y, given) = split.slices[1]
    parts.append(shards.partial(z, y, classes=classes, **given))
    total = shards.merge(*parts)
    done = shards.finish(total, reduction="none")
    with pytest.raises(IndexError, match=match):  # noted once, by the slice that met it first
        cuda.synchronize()
    cuda.synchronize()
    grad = split.gradient(total, reduction="none")
    good = np.arange(ROWS) != 1
    assert np.isnan(to_host(done.loss)).tolist() == (~good).tolist()
    assert np.isnan(grad[1]).all()
    want = oracle.cross_entropy(logits[good], targets[good], reduction="none")
    assert_gradient(grad[good], want.grad, F32)


def test_a_bad_target_of_another_slice():
    """Who has seen nothing wrong in the targets of its own hears of it from the merged records."""
    logits, targets = draw((4, 6)), np.array([0, 5, 3, 1])
    beyond = targets.copy()
    beyond[2] = 9
    split = Split(logits, targets, [3])
    other = shards.partial(split.slices[1][0], to_device(beyond), class_offset=3, classes=6)
    with pytest.raises(IndexError, match=r"got 9 at index \(2,\)"):
        cuda.synchronize()
    total = shards.merge(split.partials()[0], other)
    done = shards.finish(total)
    with pytest.raises(IndexError, match=r"in \[0, 6\) .*, got something else elsewhere"):
        cuda.synchronize()
    assert np.isnan(to_host(done.loss))
    grad = split.gradient(total, reduction="none")
    assert np.isnan(grad[2]).all()
    assert not np.isnan(grad[[0, 1, 3]]).any()


def test_who_ignores_a_row_ignores_it_for_all():
    logits, targets = draw((3, 6)), np.array([0, 5, 3])
    ignoring = np.where(targets == 5, -100, targets)
    split = Split(logits, targets, [3])
    other = shards.partial(split.slices[1][0], to_device(ignoring), class_offset=3, classes=6)
    total = shards.merge(split.partials()[0], other)
    assert to_host(shards.finish(total, reduction="none").loss)[1] == 0
    assert not split.gradient(total, reduction="none")[1].any()


def _total(classes=(0, 2, 6), dtype=np.float32, rows=3, **options):
    logits, targets = draw((rows, 6), dtype), np.zeros(rows, int)
    split = Split(logits[:, classes[0] : classes[-1]], targets, [])
    ((z, y, _),) = split.slices
    parts = [
        shards.partial(
            to_device(logits[:, start:stop].copy()), y, class_offset=start, classes=6, **options
        )
        for start, stop in itertools.pairwise(classes)
    ]
    return shards.merge(*parts), z, y


ERRORS = {
    "logits on the host": (TypeError, "logits: expected an array on a CUDA device", lambda: (
        cuda.shards.partial(draw((3, 4)), np.zeros(3, int), class_offset=0, classes=4))),
    "targets on the host": (TypeError, "targets: expected an array on CUDA device 0", lambda: (
        shards.partial(to_device(draw((3, 4))), np.zeros(3, int), class_offset=0, classes=4))),
    "beyond the classes": (ValueError, "class_offset: .* to lie in", lambda: (
        shards.partial(_total()[1], _total()[2], class_offset=1, classes=6))),
    "other options": (ValueError, "partials: expected the same terms", lambda: (
        shards.merge(_total((0, 2))[0], _total((2, 6), softcap=3.0)[0]))),
    "other rows": (ValueError, "partials: expected the same rows", lambda: (
        shards.merge(_total((0, 2))[0], _total((2, 6), rows=4)[0]))),
    "common classes": (ValueError, "partials: expected slices without common", lambda: (
        shards.merge(_total((0, 4))[0], _total((2, 6))[0]))),
    "missing classes": (ValueError, "total: expected partials of all 6 .* got 4", lambda: (
        shards.finish(_total((2, 6))[0]))),
    "missing for the gradient": (ValueError, "total: expected partials of all 6", lambda: (
        shards.grad(*_total((2, 6))[1:], _total((2, 6))[0], class_offset=2))),
    "total of another dtype": (ValueError, "total: expected rows .* float32", lambda: (
        shards.grad(*_total()[1:], _total(dtype=np.float64)[0], class_offset=0))),
    "records of another shape": (ValueError, r"records: .* float64 of shape \(3, 5\)", lambda: (
        shards.finish(dataclasses.replace(_total()[0], records=to_device(np.zeros((3, 7))))))),
    "upstream with a mean": (ValueError, "grad_output", lambda: shards.grad(
        *_total()[1:], _total()[0], class_offset=0, grad_output=to_device(draw((3,))))),
    "shape of out": (ValueError, r"out: expected shape \(3, 6\)", lambda: shards.grad(
        *_total()[1:], _total()[0], class_offset=0, out=to_device(draw((3, 5))))),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    error, match, call = ERRORS[case]
    with pytest.raises(error, match=match):
        call()


def test_out_must_not_be_the_records():
    total, z, y = _total((0, 6))
    memory = to_host(total.records) if SIMULATED else total.records
    out = memory.reshape(-1)[:9].view(np.float32 if SIMULATED else z.dtype).reshape(3, 6)
    with pytest.raises(ValueError, match=r"out: .*total"):
        shards.grad(z, y, total, class_offset=0, out=to_device(out) if SIMULATED else out)


def test_weights_are_those_of_the_slice():
    weight = draw_weight(6)
    with pytest.raises(ValueError, match=r"weight: expected shape \(2,\)"):
        shards.partial(
            to_device(draw((3, 2))), to_device(np.zeros(3, int)), class_offset=0, classes=6,
            weight=to_device(weight),
        )  # fmt: skip
