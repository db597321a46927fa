"""Section 3: loss and gradient keep relative accuracy down to the smallest normal number."""

import numpy as np
import pytest

import fastce
from fastce import rows, shards
from tests import oracle
from tests.checks import (
    FLOATS,
    ONE_CLASS,
    assert_close,
    assert_gradient,
    assert_loss,
    draw,
    draw_targets,
    labels_on_one_class,
)

DTYPES = [np.dtype("float32"), np.dtype("float64")]
CLASSES = [2, 3, 10, 33, 1000, 32000]


def check(logits, targets, *, anywhere=True, axis=-1):
    want = oracle.cross_entropy(logits, targets, reduction="none", axis=axis)
    loss, grad = fastce.cross_entropy_and_grad(logits, targets, reduction="none", axis=axis)
    assert_loss(loss, want.loss, logits.dtype, anywhere=anywhere)
    assert_gradient(grad, want.grad, logits.dtype)
    if np.asarray(targets).dtype.kind == "i":
        alone = fastce.cross_entropy(logits, targets, reduction="none", axis=axis)
        assert_loss(alone, want.loss, logits.dtype, anywhere=anywhere)
    return loss, grad


def leads(logits):
    """By how much each row's largest logit leads the next."""
    top = np.partition(logits.astype(np.float64), -2, axis=-1)[..., -2:]
    return top[..., 1] - top[..., 0]


def rows_for(classes):
    return min(400, max(2, 100_000 // classes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 100.0])
def test_random_logits(dtype, classes, scale):
    logits = draw((rows_for(classes), classes), dtype, scale=scale)
    near = logits[leads(logits) < 10]
    check(near, draw_targets((len(near),), classes), anywhere=False)
    check(near, near.argmax(axis=-1), anywhere=False)
    check(logits, logits.argmax(axis=-1))
    check(logits, draw_targets((len(logits),), classes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("offset", [-1e4, 1e3, 1e4, 1e6, 2.0**23])
def test_common_offset(dtype, classes, offset):
    logits = (draw((rows_for(classes), classes), np.float64, scale=1.5) + offset).astype(dtype)
    near = logits[leads(logits) < 10]
    assert len(near) > len(logits) // 2
    check(near, near.argmax(axis=-1), anywhere=False)
    check(near, draw_targets((len(near),), classes), anywhere=False)


GAPS = {
    "float32": [10, 12.5, 16, 17, 20, 30, 40, 55, 60, 61, 64, 70, 80, 85, 86.5],
    "float64": [10, 20, 36, 37, 40, 80, 120, 300, 500, 650, 700, 707.5],
}


@pytest.mark.parametrize(
    ("dtype", "gap"), [(np.dtype(d), g) for d in GAPS for g in GAPS[d]], ids=str
)
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_confident_target(dtype, gap, offset):
    for classes in (2, 10, 100, 4097):
        for place in {0, 1, classes // 2, classes - 1}:
            spread = draw((2, classes), np.float64, scale=0.01, seed=classes)
            logits = spread + offset
            logits[:, place] = offset + gap
            loss, grad = check(logits.astype(dtype), np.full(2, place))
            assert np.all(loss > 0)
            assert np.all(grad[:, place] < 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gap", [0, 1, 9.5, 15, 40, 85])
@pytest.mark.parametrize("classes", [2, 10, 1000, 50257])
def test_equal_background(dtype, gap, classes):
    """A constant row but for one entry, the padded vocabulary: nothing is random, errors add up."""
    logits = np.full((3, classes), 0.1, dtype)
    logits[:, 0] += gap
    lead = np.log(classes) <= gap
    loss, grad = check(logits, np.array([0, 1, classes - 1]), anywhere=gap >= 10)
    rest = oracle.exact(logits[0, 1:]) - oracle.exact(logits[0, 0])
    rest = np.exp(rest).sum()
    target = oracle.Expected(-rest / (1 + rest), rest / (1 + rest))
    assert_close(grad[0, 0], target, 1e-5 if dtype.itemsize == 4 else 1e-13)
    assert not lead or loss[0] < loss[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gap", [0.5, 12, 40, 80])
def test_one_hot_soft_targets_are_as_accurate_as_indices(dtype, gap):
    for classes in (2, 10, 1000):
        logits = draw((20, classes), dtype)
        logits[:, 1] += gap
        hot = np.zeros_like(logits)
        hot[:, 1] = 1
        check(logits, hot, anywhere=gap >= 5)


def at_once(z, labels, axis, options):
    return fastce.cross_entropy_and_grad(z, labels, axis=axis, reduction="sum", **options)[1]


def in_slices(z, labels, axis, options):
    """The gradient of two slices of the classes."""
    classes = z.shape[axis]
    weight, half = options.pop("weight", None), classes // 2 + 1
    slices = []
    for part in (range(half), range(half, classes)):
        if part:
            own = {"weight": None if weight is None else weight[part], "class_offset": part.start}
            of_part = labels if labels.ndim == 1 else labels.take(part, axis)
            slices.append(((z.take(part, axis), of_part), {"axis": axis, **own}))
    total = shards.merge(
        *(shards.partial(*of, **own, classes=classes, **options) for of, own in slices)
    )
    grads = [shards.grad(*of, total, **own, reduction="sum") for of, own in slices]
    return np.concatenate(grads, axis=axis)


def row_by_row(z, labels, axis, options):
    z = np.moveaxis(z, axis, -1)
    labels = labels if labels.ndim == 1 else np.moveaxis(labels, axis, -1)
    grad, weight = np.empty(z.shape, z.dtype), options.pop("weight", None)
    smoothing = options.pop("label_smoothing", 0.0)
    for row, label, out in zip(z, labels, grad, strict=True):
        rows.cross_entropy_and_grad(row, label, out, 1.0, weight, smoothing)
    return np.moveaxis(grad, -1, axis)


LAID = [
    pytest.param(
        gradient, dtype, classes, axis, laid, id=f"{gradient.__name__} {laid} {classes} {dtype}"
    )
    for gradient, dtypes, names in [
        (at_once, DTYPES, ONE_CLASS), (in_slices, DTYPES, ONE_CLASS),
        (row_by_row, DTYPES[:1], ("hard, smoothing", "soft, smoothing")),  # it compiles long
    ]
    for dtype in dtypes
    for classes, axis in ((2, -1), (10, -1), (70, 0), (1000, -1))
    for laid in names
]  # fmt: skip


@pytest.mark.parametrize("gradient, dtype, classes, axis, laid", LAID)
def test_all_that_labels_lay_on_the_maximum(gradient, dtype, classes, axis, laid):
    """What is added up of the labels and what is taken off at the class must be the same number.

    Where one of them is rounded to float32 and the other is not, the gradient is 1e-9, not -rest.
    """
    logits = draw((9, classes), dtype) - 30
    logits[:, classes // 2] += 60
    labels, options = labels_on_one_class(9, classes, classes // 2, dtype)[laid]
    want = oracle.cross_entropy(logits, labels, reduction="sum", **options)
    if axis == 0:
        logits = np.ascontiguousarray(logits.T)
        labels = np.ascontiguousarray(labels.T)
    grad = np.moveaxis(gradient(logits, labels, axis, options), axis, -1)
    assert_gradient(grad, want.grad, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_million_classes(dtype):
    logits = draw((2, 1 << 20), dtype, scale=2.0)
    logits[1, 77_777] = 60
    check(logits, np.array([5, 77_777]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["rising", "falling", "leader last", "leader in the middle"])
def test_order_of_the_logits_does_not_matter(dtype, order):
    """The running reference of a one-pass sum is renewed often, seldom, or at the very end."""
    limit = 80 if dtype.itemsize == 4 else 600
    for classes in (64, 5000):
        row = np.linspace(-limit, limit, classes)
        row = {
            "rising": row,
            "falling": row[::-1],
            "leader last": np.r_[np.zeros(classes - 1), limit],
            "leader in the middle": np.r_[np.zeros(classes // 2), limit, np.zeros(classes // 2)],
        }[order]
        logits = np.tile(row, (3, 1)).astype(dtype)
        check(logits, np.array([int(row.argmax()), 0, classes // 3]))


LENGTHS = [*range(2, 70), *range(126, 132), *range(250, 292), *range(508, 546), 1023, 1024, 1025]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gap", [0.5, 25.0])
def test_every_length_with_the_leader_everywhere(dtype, gap):
    """No lane, no last vector and no block edge counts a class twice or not at all."""
    for classes in LENGTHS:
        places = np.unique(np.linspace(0, classes - 1, 9).astype(int))
        logits = draw((len(places), classes), dtype, scale=0.5, seed=classes)
        logits[np.arange(len(places)), places] = logits.max() + gap
        check(logits, places)
        check(logits, (places + 1) % classes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length_of_the_axis_beside_the_classes(dtype):
    for inner in range(1, 40):
        for classes in (1, 2, 5, 17):
            logits = draw((2, classes, inner), dtype, scale=3, seed=inner)
            check(logits, draw_targets((2, inner), classes, seed=inner), axis=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("low, high", [(-1100, -950), (950, 1100), (-3000, 3000), (1e5, 3e5)])
def test_large_logits_of_large_spread(dtype, low, high):
    for classes in (40, 3000):
        row = np.linspace(low, high, classes)
        rows = [row, row[::-1], np.random.default_rng(0).permutation(row)]
        logits = np.array(rows).astype(dtype)
        check(logits, logits.argmax(axis=-1))
        check(logits, np.array([classes // 2, 3, 5]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_strided_class_axis_is_as_accurate(dtype):
    logits = draw((4, 21, 19), dtype, scale=5.0)
    logits[:, 3, ::2] += 35
    check(logits, np.full((4, 19), 3), axis=1)
    check(logits, draw_targets((4, 19), 21), axis=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_logits(dtype):
    huge = float(np.finfo(dtype).max)
    logits = np.array([[huge, -huge, 0], [huge, huge, -huge], [-huge, -huge, -huge]], dtype)
    loss, grad = fastce.cross_entropy_and_grad(logits, np.array([0, 1, 2]), reduction="none")
    np.testing.assert_allclose(loss, [0, np.log(2), np.log(3)], rtol=1e-6)
    np.testing.assert_allclose(grad[1:], [[0.5, -0.5, 0], [1 / 3, 1 / 3, -2 / 3]], rtol=1e-6)
    assert not grad[0].any()
    loss, grad = fastce.cross_entropy_and_grad(logits[:1], [1], reduction="none")
    assert loss[0] == np.inf  # 2 * huge
    assert grad.tolist() == [[1, -1, 0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, axis", [((3, 40), -1), ((3, 700), -1), ((3, 7), -1), ((40, 3), 0)])
def test_rows_of_nothing_but_huge_numbers(dtype, shape, axis):
    classes = shape[axis]
    for value in (1e5, 1e30, float(np.finfo(dtype).max)):
        for logit in (value, -value):
            logits = np.full(shape, logit, dtype)
            loss, grad = fastce.cross_entropy_and_grad(logits, [0, 1, 2], axis=axis)
            np.testing.assert_allclose(loss, np.log(classes), rtol=1e-6)
            want = (1 / classes - np.eye(3, classes)) / 3
            np.testing.assert_allclose(np.moveaxis(grad, axis, -1), want, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_denormal_probabilities_are_kept(dtype):
    gap = 95.0 if dtype.itemsize == 4 else 730.0
    logits = np.array([[0, -gap]], dtype)
    want = np.exp(np.longdouble(logits[0, 1]))
    _, grad = fastce.cross_entropy_and_grad(logits, [0])
    for got in (grad[0, 1], -grad[0, 0], fastce.softmax(logits)[0, 1]):
        assert abs(got - want) <= 4 * np.finfo(dtype).smallest_subnormal


@pytest.mark.parametrize(
    "dtype, factor",  # what is lost of the sum of float64 exponentials no factor brings back
    [(DTYPES[0], f) for f in (1e6, -1e6, -1.0, -1e-6)] + [(DTYPES[1], f) for f in (-1.0, -1e-6)],
    ids=str,
)
@pytest.mark.parametrize("classes, axis", [(3, -1), (70, -1), (70, 0)])
def test_a_factor_reaches_denormal_probabilities(dtype, factor, classes, axis):
    """Whatever its sign: the product is rounded once, where it underflows."""
    gap = 95.0 if dtype.itemsize == 4 else 730.0
    logits = np.full((2, classes), -gap, dtype)
    logits[:, 1] = 0
    want = oracle.cross_entropy(logits, [1, 1], reduction="sum", grad_output=factor)
    if axis == 0:
        logits = np.ascontiguousarray(logits.T)
    options = {"axis": axis, "reduction": "sum", "grad_output": factor}
    _, grad = fastce.cross_entropy_and_grad(logits, [1, 1], **options)
    assert_gradient(np.moveaxis(grad, axis, -1), want.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_keeps_tiny_losses(dtype):
    logits = np.zeros((1000, 2), dtype)
    logits[:, 0] = 60
    want = oracle.cross_entropy(logits, np.zeros(1000, int))
    loss, grad = fastce.cross_entropy_and_grad(logits, np.zeros(1000, int))
    assert_loss(loss, want.loss, dtype, anywhere=True)
    assert_gradient(grad, want.grad, dtype)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes, axis", [
    (10, -1), (21, -1), (33, -1), (64, -1), (100, -1), (1000, -1), (40_000, -1),
    (21, 0), (64, 0), (200, 0), (5000, 0),
])  # fmt: skip
def test_sums_of_one_large_and_many_tiny_terms(dtype, classes, axis, options):
    """Each tiny term is a little more than half a unit of the sum, which rounding makes a whole."""
    rng = np.random.default_rng(classes)
    rows = max(100, 400_000 // classes)
    second = rng.uniform(5, 9.9, rows)
    digits = 24 if dtype.itemsize == 4 else 53
    # ... alone, or two, four or eight of them together
    share = rng.uniform(0.6, 1.3, rows) / rng.choice([1, 2, 4, 8], rows)
    tiny = second + digits * np.log(2) - np.log(share)
    for offset in (0.0, -1e6):
        logits = np.repeat((offset - tiny)[:, None], classes, axis=1)
        logits[:, 0] = offset
        logits[:, classes * 5 // 9] = offset - second  # of many classes, in another block
        logits = logits.astype(dtype)
        if axis == 0:
            logits = np.ascontiguousarray(logits.T)
        targets = np.zeros(rows, int)
        want = oracle.cross_entropy(logits, targets, axis=axis, reduction="none", **options)
        loss = fastce.cross_entropy(logits, targets, axis=axis, reduction="none", **options)
        assert_loss(loss, want.loss, dtype)


@pytest.mark.parametrize("classes, axis", [(33, -1), (5000, -1), (1 << 20, -1), (33, 0), (8191, 0)])
def test_sums_of_many_equal_labels(classes, axis):
    """Whose rounding errors are all of one sign: thousands would add up to 1e-13 of the sum."""
    rows = min(39, max(2, 300_000 // classes))
    labels = np.repeat((39 - np.arange(rows))[:, None] / 7 / classes, classes, axis=1)
    logits = np.zeros(labels.shape)
    logits[:, 1] = 5.0
    want = oracle.cross_entropy(logits, labels, reduction="none")
    if axis == 0:
        logits, labels = np.ascontiguousarray(logits.T), np.ascontiguousarray(labels.T)
    loss = fastce.cross_entropy(logits, labels, axis=axis, reduction="none")
    assert_loss(loss, want.loss, np.float64)
