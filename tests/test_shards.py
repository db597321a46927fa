"""`fastce.shards`: however the classes are divided and in whatever order merged, the same loss."""

import itertools
import random
from fractions import Fraction

import numpy as np
import pytest

import fastce
from fastce import shards
from fastce.cpu import binned
from fastce.cpu.jit import kernel
from tests import oracle
from tests.checks import (
    FLOATS,
    assert_close,
    assert_gradient,
    assert_loss,
    draw,
    draw_soft,
    draw_targets,
    draw_weight,
    same_bits,
)

DTYPES = [np.dtype("float32"), np.dtype("float64")]
REDUCED = ("z_loss", "reduction", "normalizer")


def slices(classes, cuts, axis, ndim):
    """(first class, index of the slice) of each slice."""
    for start, stop in itertools.pairwise([0, *cuts, classes]):
        index = [slice(None)] * ndim
        index[axis] = slice(start, stop)
        yield start, tuple(index)


def parts_of(logits, targets, cuts, *, axis=-1, weight=None, **options):
    """What `partial` makes of every slice, and what `grad` will need of it."""
    classes = logits.shape[axis]
    hard = np.asarray(targets).dtype.kind in "iu"
    found = []
    for start, index in slices(classes, cuts, axis, logits.ndim):
        z = logits[index]
        given = {
            "class_offset": start, "axis": axis,
            "weight": None if weight is None else weight[start : start + z.shape[axis]],
        }  # fmt: skip
        y = targets if hard else targets[index]
        found.append((shards.partial(z, y, classes=classes, **given, **options), (z, y), given))
    return found


def sharded(logits, targets, cuts, *, grad_output=None, **options):
    """Loss and gradient by way of slices."""
    reduced = {name: options.pop(name) for name in REDUCED if name in options}
    found = parts_of(logits, targets, cuts, **options)
    total = shards.merge(*(part for part, _, _ in found))
    pieces = [
        shards.grad(*arrays, total, **given, **reduced, grad_output=grad_output)
        for _, arrays, given in found
    ]
    result = shards.finish(total, **reduced)
    return result, np.concatenate(pieces, axis=options.get("axis", -1))


OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ignore": {"ignore_index": 3},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.01},
    "normalizer": {"normalizer": 12.5, "grad_output": -3.0},
    "weight": {"weight": True, "softcap": 50.0},
    "all smoothing": {"weight": True, "softcap": 50.0, "label_smoothing": 1.0},
    "soft": {"soft": True},
    "everything": {
        "weight": True, "ignore_index": 2, "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 7.0,
        "reduction": "none", "grad_output": True,
    },
    "everything soft": {
        "soft": True, "weight": True, "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 7.0,
    },
}  # fmt: skip


def filled(options, shape, axis, dtype):
    """The options with arrays where they say True, and targets."""
    options = dict(options)
    classes, rows = shape[axis], tuple(np.delete(shape, axis))
    targets = draw_targets(rows, classes)
    if options.pop("soft", False):
        targets = draw_soft(shape, dtype, axis=axis)
    if options.get("weight"):
        options["weight"] = draw_weight(classes)
    if options.get("grad_output") is True:
        options["grad_output"] = draw(rows, np.float64, seed=5)
    return targets, options


# Every dtype and option is a kernel to compile: float64 is the same code as float32, and 16-bit
# logits differ in loading and storing alone, which are not of this module.
CASES = [
    *((np.dtype("float32"), name) for name in OPTIONS),
    *((np.dtype("float64"), name) for name in ("plain", "smoothing", "soft")),
    (FLOATS[3], "plain"),
]


@pytest.mark.parametrize("dtype, name", CASES, ids=str)
@pytest.mark.parametrize(
    "shape, axis, cuts",
    [
        ((9, 230), -1, [70, 71]),  # lanes along the classes, across rows for a single class
        ((40, 7), -1, [2, 3, 4]),
        ((3, 12, 35), 1, [5]),
        ((5, 6), 0, [3]),
    ],
    ids=str,
)
def test_slices_make_the_whole(dtype, name, shape, axis, cuts):
    logits = draw(shape, dtype, scale=3.0)
    targets, options = filled(OPTIONS[name], shape, axis, dtype)
    want = oracle.cross_entropy(logits, targets, axis=axis, **options)
    got, grad = sharded(logits, targets, cuts, axis=axis, **options)
    anywhere = "cap" in name or "everything" in name
    assert_loss(got.loss, want.loss, dtype, anywhere=anywhere)
    assert_gradient(grad, want.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, -1e3, 1020.0, 1e6, 2.0**23])
@pytest.mark.parametrize("scale", [0.01, 3.0, 100.0])
@pytest.mark.parametrize("kind", ["hard", "smoothing", "soft"])
def test_accuracy_does_not_depend_on_the_split(dtype, offset, scale, kind):
    for classes, cuts in ((10, range(1, 10)), (257, [1, 90]), (5000, [1000, 4999])):
        logits = (draw((24, classes), np.float64, scale=scale) + offset).astype(dtype)
        targets = draw_targets((24,), classes)
        targets[::2] = logits[::2].argmax(axis=-1)
        if kind == "soft":
            targets = draw_soft(logits.shape, dtype)
        options = {"label_smoothing": 0.1 if kind == "smoothing" else 0.0, "reduction": "none"}
        want = oracle.cross_entropy(logits, targets, **options)
        got, grad = sharded(logits, targets, cuts, **options)
        assert_loss(got.loss, want.loss, dtype, anywhere=True)
        assert_gradient(grad, want.grad, dtype)
        near = np.diff(np.sort(logits.astype(float))[:, -2:])[:, 0] < 10
        close = oracle.Expected(want.loss.value[near], want.loss.scale[near])
        assert_loss(got.loss[near], close, dtype)


@pytest.mark.parametrize("classes, cuts", [(10, [3]), (1000, [1, 500]), (32000, [8000, 16000])])
def test_float32_losses_are_within_a_unit_of_the_unsplit_ones(classes, cuts):
    for scale in (0.1, 1.0, 5.0):
        logits = draw((50, classes), np.float32, scale=scale)
        targets = draw_targets((50,), classes)
        got, _ = sharded(logits, targets, cuts, reduction="none")
        whole = fastce.cross_entropy(logits, targets, reduction="none")
        assert np.all(np.abs(got.loss - whole) <= np.spacing(whole))
        lse = fastce.logsumexp(logits)
        assert np.all(np.abs(got.lse - lse) <= np.spacing(np.abs(lse)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_slice_is_the_whole(dtype):
    logits, targets = draw((60, 500), dtype), draw_targets((60,), 500)
    got, grad = sharded(logits, targets, [], reduction="none")
    loss, whole = fastce.cross_entropy_and_grad(logits, targets, reduction="none")
    assert same_bits(got.loss, loss)
    assert same_bits(grad, whole)


GAPS = {"float32": [10, 40, 60, 86.5], "float64": [10, 40, 500, 707.5]}


@pytest.mark.parametrize("dtype, gap", [(np.dtype(d), g) for d in GAPS for g in GAPS[d]], ids=str)
def test_a_confident_row_keeps_its_loss(dtype, gap):
    for classes, cuts in ((4, [1, 2, 3]), (100, [50]), (4097, [1, 4000])):
        for place in (0, classes // 2, classes - 1):
            logits = draw((2, classes), np.float64, scale=0.01).astype(dtype)
            logits[:, place] = gap
            targets = np.full(2, place)
            want = oracle.cross_entropy(logits, targets, reduction="none")
            got, grad = sharded(logits, targets, cuts, reduction="none")
            assert_loss(got.loss, want.loss, dtype, anywhere=True)
            assert_gradient(grad, want.grad, dtype)
            assert np.all(got.loss > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e5, 1e15, 1e30, -1e30, None])
def test_labels_on_every_class_of_a_constant_row(dtype, soft, value):
    """The gaps that the labels weigh cancel to nothing, however large the logits."""
    logits = np.full((3, 50), float(np.finfo(dtype).max) if value is None else value, dtype)
    targets = draw_soft((3, 50), dtype) if soft else np.array([0, 20, 49])
    got, grad = sharded(logits, targets, [7, 30], label_smoothing=0.3, reduction="none")
    labels = 0.7 * (targets if soft else np.eye(50)[targets]) + 0.3 / 50
    np.testing.assert_allclose(got.loss, labels.sum(axis=1) * np.log(50), rtol=1e-6)
    want = labels.sum(axis=1, keepdims=True) / 50 - labels
    np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-7)


def rows_with_everything(dtype):
    """Rows of ordinary, large, masked, infinite and missing numbers, 41 classes each."""
    logits = draw((30, 41), dtype, scale=4.0)
    logits[1] += 1e6
    logits[2, 5:30] = -np.inf
    logits[3, 20:] = -np.inf
    logits[4] = -np.inf
    logits[5, 7] = np.nan
    logits[6, 9] = logits[6, 33] = np.inf
    logits[7, 3], logits[7, 30] = np.inf, np.nan
    logits[8] = 2.5
    logits[9] = 1e30
    logits[10, 40] = 700
    logits[11, [2, 38]] = 90
    logits[12, [6, 37]] = np.nan
    logits[14] = logits[15] = np.nan
    targets = draw_targets((30,), 41)
    targets[[2, 3]] = 25
    targets[[10, 11]] = 40, 2
    targets[14] = -100
    return logits, targets


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}, {"soft": True}], ids=str
)
def test_the_order_of_merging_changes_no_bit(dtype, options):
    logits, targets = rows_with_everything(dtype)
    options = dict(options)
    if options.pop("soft", False):
        targets = draw_soft(logits.shape, dtype)
    z_loss = options.pop("z_loss", 0.0)
    found = parts_of(logits, targets, [1, 6, 10, 11, 28, 36], **options)
    parts = [part for part, _, _ in found]
    seen = set()
    chance = random.Random(0)
    for _ in range(60):
        pool = list(parts)
        while len(pool) > 1:  # a random tree
            chance.shuffle(pool)
            pool.append(shards.merge(pool.pop(), pool.pop()))
        total = shards.finish(pool[0], z_loss=z_loss, reduction="none")
        grads = [
            shards.grad(*arrays, pool[0], **given, z_loss=z_loss) for _, arrays, given in found
        ]
        results = (total.loss, total.lse, total.predicted, *grads)
        seen.add(b"".join(np.asarray(a).tobytes() for a in results))
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("cuts", [[1, 6, 10, 28], [20], []], ids=str)
@pytest.mark.parametrize("kind", ["hard", "smoothing", "soft"])
def test_edge_cases_are_those_of_the_whole(dtype, axis, cuts, kind):
    logits, targets = rows_with_everything(dtype)
    options = {"reduction": "none", "label_smoothing": 0.1 if kind == "smoothing" else 0.0}
    if kind == "soft":
        targets = draw_soft(logits.shape, dtype)
        targets[2, 5:30] = 0
    if axis == 0:
        logits = np.ascontiguousarray(logits.T)
        targets = np.ascontiguousarray(targets.T)
    got, grad = sharded(logits, targets, cuts, axis=axis, **options)
    loss, whole = fastce.cross_entropy_and_grad(logits, targets, axis=axis, **options)
    tight = 1e-6 if dtype.itemsize == 4 else 1e-14
    np.testing.assert_allclose(got.loss, loss, rtol=tight)
    np.testing.assert_allclose(grad, whole, rtol=10 * tight, atol=1e-30)
    stats = fastce.cross_entropy_stats(logits, targets, axis=axis)
    np.testing.assert_allclose(got.lse, stats.lse, rtol=tight)
    np.testing.assert_array_equal(got.predicted, stats.predicted)
    assert got.total_weight == stats.total_weight


# The entropy --------------------------------------------------------------------------------------


def merged(logits, targets, cuts, **options):
    parts = parts_of(logits, targets, cuts, entropy=True, **options)
    return shards.finish(shards.merge(*(part for part, _, _ in parts)), reduction="none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, -1e6, 2.0**23, 1e15])
@pytest.mark.parametrize("scale", [0.01, 3.0, 30.0])
def test_entropy_does_not_depend_on_the_split(dtype, offset, scale):
    for classes, cuts in ((10, range(1, 10)), (257, [1, 90]), (5000, [1000, 4999])):
        logits = (draw((24, classes), np.float64, scale=scale) + offset).astype(dtype)
        targets = draw_targets((24,), classes)
        want = oracle.cross_entropy_stats(logits, targets)
        got = merged(logits, targets, cuts).entropy
        if offset < 1e9:
            assert_loss(got, want.entropy, dtype)
        else:
            assert_close(got, want.entropy, 3e-7 if dtype.itemsize == 4 else 1e-14)


@pytest.mark.parametrize(
    "dtype, gap", [(np.dtype(d), g) for d in GAPS for g in GAPS[d][:3]], ids=str
)
def test_a_confident_row_keeps_its_entropy(dtype, gap):
    for classes, cuts in ((4, [1, 2, 3]), (100, [50])):
        for place in (0, classes - 1):
            logits = draw((2, classes), np.float64, scale=0.01).astype(dtype)
            logits[:, place] = gap
            want = oracle.cross_entropy_stats(logits, np.full(2, place))
            got = merged(logits, np.full(2, place), cuts).entropy
            assert_loss(got, want.entropy, dtype, anywhere=True)
            assert np.all(got > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_entropies_of_special_rows(dtype, axis):
    logits, targets = rows_with_everything(dtype)
    if axis == 0:
        logits = np.ascontiguousarray(logits.T)
    got = merged(logits, targets, [1, 6, 10, 28], axis=axis).entropy
    want = oracle.cross_entropy_stats(logits, targets, axis=axis)
    assert_loss(got, want.entropy, dtype, anywhere=True)
    whole = fastce.cross_entropy_stats(logits, targets, axis=axis).entropy
    one = merged(logits, targets, [], axis=axis).entropy
    np.testing.assert_allclose(one, whole, rtol=1e-6 if dtype.itemsize == 4 else 1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_order_of_merging_changes_no_bit_of_the_entropy(dtype, smoothing):
    """Nor does the entropy change what else is in a record, but for the digits of its sums."""
    logits, targets = rows_with_everything(dtype)
    cuts = [1, 6, 10, 11, 28, 36]
    options = {"label_smoothing": smoothing}
    parts = [part for part, _, _ in parts_of(logits, targets, cuts, entropy=True, **options)]
    seen = set()
    chance = random.Random(0)
    for _ in range(60):
        pool = list(parts)
        while len(pool) > 1:
            chance.shuffle(pool)
            pool.append(shards.merge(pool.pop(), pool.pop()))
        total = shards.finish(pool[0], reduction="none")
        seen.add(total.entropy.tobytes() + total.loss.tobytes() + total.lse.tobytes())
    assert len(seen) == 1
    without, _ = sharded(logits, targets, cuts, reduction="none", **options)
    assert without.entropy is None
    np.testing.assert_allclose(total.loss, without.loss, rtol=4 * np.finfo(dtype).eps)


def test_entropy_after_a_cap_and_in_16_bits():
    logits, targets = draw((20, 100), FLOATS[3], scale=9.0), draw_targets((20,), 100)
    want = oracle.cross_entropy_stats(logits, targets)
    assert_loss(merged(logits, targets, [30]).entropy, want.entropy, FLOATS[3])
    z = draw((20, 100), np.float64, scale=9.0)
    want = oracle.cross_entropy_stats(5 * np.tanh(z / 5), targets)
    got = merged(z, targets, [30], softcap=5.0).entropy
    assert_loss(got, want.entropy, z.dtype, anywhere=True)


def test_an_ignored_row_is_never_read_and_its_gradient_is_zero():
    logits = np.full((3, 40), np.nan)
    got, grad = sharded(logits, np.full(3, -100), [10])
    assert np.isnan(got.loss)
    assert not grad.any()
    assert shards.finish(parts_of(logits, [5, 5, 5], [], ignore_index=5)[0][0]).predicted[0] == -1


@pytest.mark.parametrize("shape, axis", [((20, 100), -1), ((20, 6), -1), ((6, 50), 0)])
@pytest.mark.parametrize("order", ["C", "F", "reversed"])
def test_in_place_and_any_strides(shape, axis, order):
    logits = np.array(draw(shape), order="F" if order == "F" else "C")
    if order == "reversed":
        logits = logits[::-1, ::-1]
    rows = np.delete(shape, axis)
    targets = draw_targets(tuple(rows), shape[axis])
    part = shards.partial(logits, targets, class_offset=0, classes=shape[axis], axis=axis)
    expected = fastce.cross_entropy_and_grad(logits, targets, axis=axis)[1]
    found = shards.grad(logits, targets, part, class_offset=0, axis=axis, out=logits)
    assert found is logits
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_threads_change_no_bit(kind):
    logits = draw((700, 400))
    targets = draw_targets((700,), 400) if kind == "hard" else draw_soft((700, 400))
    results = []
    for threads in (1, 3):
        with fastce.num_threads(threads):
            got, grad = sharded(logits, targets, [150], label_smoothing=0.1)
        results.append((got.loss.tobytes(), got.lse.tobytes(), grad.tobytes()))
    assert results[0] == results[1]


def test_no_rows():
    got, grad = sharded(np.empty((0, 5)), np.empty(0, int), [2], reduction="sum")
    assert got.loss == 0
    assert grad.shape == (0, 5)
    assert np.isnan(sharded(np.empty((0, 5)), np.empty(0, int), [2])[0].loss)


Z = np.zeros((3, 4))
Y = np.array([0, 5, 9])
WHOLE = shards.partial(np.zeros((3, 10)), Y, class_offset=0, classes=10)
ERRORS = [
    (lambda: shards.partial(Z, Y, class_offset=7, classes=10), ValueError, r"class_offset: .* 4"),
    (lambda: shards.partial(Z, Y, class_offset=-1, classes=10), ValueError, "got -1"),
    (lambda: shards.partial(Z, Y, class_offset=0.0, classes=10), TypeError, "class_offset"),
    (lambda: shards.partial(Z, Y, class_offset=0, classes=10.0), TypeError, "classes"),
    (
        lambda: shards.partial(Z, Y, class_offset=0, classes=9),
        IndexError,
        r"targets: expected integers in \[0, 9\) or ignore_index, got 9 at index \(2,\)",
    ),
    (lambda: shards.partial(Z, Y[:2], class_offset=0, classes=10), ValueError, "targets"),
    (
        lambda: shards.partial(Z, Y, class_offset=0, classes=10, weight=np.ones(10)),
        ValueError,
        r"weight: expected shape \(4,\)",
    ),
    (
        lambda: shards.finish(shards.partial(Z, Y, class_offset=0, classes=10)),
        ValueError,
        "total: expected partials of all 10 classes merged, got 4",
    ),
    (lambda: shards.merge(WHOLE, WHOLE), ValueError, "without common classes, got 20 of 10"),
    (
        lambda: shards.merge(WHOLE, shards.partial(Z[:2], [1, 1], class_offset=0, classes=10)),
        ValueError,
        "same rows",
    ),
    (
        lambda: shards.merge(
            WHOLE, shards.partial(Z, Y, class_offset=0, classes=10, label_smoothing=0.5)
        ),
        ValueError,
        "same terms",
    ),
    (
        lambda: shards.merge(WHOLE, shards.partial(Z, Y, class_offset=0, classes=10, entropy=True)),
        ValueError,
        "same terms",
    ),
    (lambda: shards.grad(Z[:2], Y[:2], WHOLE, class_offset=0), ValueError, "total: expected rows"),
    (lambda: shards.grad(Z.astype("f4"), Y, WHOLE, class_offset=0), ValueError, "float32"),
    (lambda: shards.grad(Z, Z, WHOLE, class_offset=0), ValueError, "soft targets"),
    (lambda: shards.grad(Z, Y, WHOLE, class_offset=0, out=Z[:2]), ValueError, "out: expected"),
    (lambda: shards.finish(WHOLE, reduction="median"), ValueError, "reduction"),
    (lambda: shards.finish(WHOLE, z_loss=np.inf), ValueError, "z_loss"),
    (
        lambda: shards.merge_records(np.zeros((2, 8)), np.zeros((2, 17)), np.float32),
        ValueError,
        r"others: expected shape \(2, 8\), got \(2, 17\)",
    ),
]


@pytest.mark.parametrize("call, error, message", ERRORS)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# The sums of `fastce.cpu.binned` ------------------------------------------------------------------


@kernel
def _sum_into(sums, row, numbers, factors, bins):
    for i in range(len(numbers)):
        binned.add_product(sums, row, 0, binned.MANY, numbers[i], factors[i], bins[i])


@kernel
def _merge_rows(sums, others):
    for i in range(len(sums)):
        binned.merge(sums, others, i, 0, binned.MANY)


@kernel
def _value(sums):
    return binned.value(sums, 0, 0, binned.MANY)


def empty_sums(rows):
    sums = np.zeros((rows, 1 + binned.MANY))
    sums[:, 0] = -np.inf
    return sums


def test_binned_sums_are_exact_where_their_digits_reach():
    rng = np.random.default_rng(0)
    for spread in (0, 20, 40):
        numbers = rng.standard_normal(300) * 2.0 ** rng.integers(-spread, 1, 300)
        factors = rng.standard_normal(300)
        bins = rng.integers(0, 2, 300) + 2.0**50
        sums = empty_sums(1)
        _sum_into(sums, 0, numbers, factors, bins)
        high, low, top = _value(sums)
        exact = sum(
            Fraction(x) * Fraction(y) * Fraction(2) ** int(32 * (b - 2.0**50))
            for x, y, b in zip(numbers.tolist(), factors.tolist(), bins.tolist(), strict=True)
        )
        got = (Fraction(high) + Fraction(low)) * Fraction(2) ** int(32 * (top - 2.0**50))
        size = max(abs(numbers * factors * 2.0 ** (32 * (bins - 2.0**50))))
        assert abs(got - exact) <= Fraction(size) * Fraction(1, 2**85)


@pytest.mark.parametrize("kind", ["wide", "overflowing digits"])
def test_binned_sums_do_not_depend_on_order_or_grouping(kind):
    rng = np.random.default_rng(1)
    numbers = rng.standard_normal(64) * 2.0 ** rng.integers(-200, 200, 64)
    if kind != "wide":  # a carry out of the top would push the lowest digit out
        numbers = rng.random(64) * 2.0 ** -rng.integers(0, 100, 64).astype(float)
        numbers[:8] = 2.0**32 - 1
    single = np.ones(1)
    seen = set()
    for _ in range(40):
        pool = []
        for number in numbers:
            sums = empty_sums(1)
            _sum_into(sums, 0, np.array([number]), single, single)
            pool.append(sums)
        while len(pool) > 1:  # a random tree
            first, second = (pool.pop(int(rng.integers(len(pool)))) for _ in range(2))
            _merge_rows(first, second)
            pool.append(first)
        seen.add(pool[0].tobytes())
    assert len(seen) == 1


@pytest.mark.parametrize(
    "numbers, want",
    [
        ([1.0, np.inf], np.inf), ([np.inf, 1e300, np.inf], np.inf), ([-np.inf, 2.0], -np.inf),
        ([np.inf, -np.inf], np.nan), ([np.nan, 1.0], np.nan), ([0.0], 0.0), ([], 0.0),
        ([1e308, 1e307, -1e308], 1e307), ([5e-324, 5e-324], 1e-323),
    ],
)  # fmt: skip
def test_binned_sums_of_special_numbers(numbers, want):
    for order in itertools.permutations(numbers):
        sums = empty_sums(1)
        count = len(order)
        _sum_into(sums, 0, np.array(order, float), np.ones(count), np.zeros(count))
        high, low, top = _value(sums)
        np.testing.assert_array_equal(np.ldexp(high + low, int(32 * top)), want)
