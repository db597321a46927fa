"""Section 2: the per-row statistics of one pass."""

import numpy as np
import pytest

import fastce
from fastce import rows, shards
from tests import oracle
from tests.checks import (
    FLOATS,
    assert_close,
    assert_loss,
    draw,
    draw_soft,
    draw_targets,
    draw_weight,
    loss_dtype,
    same_bits,
)

LSE_BOUND = {8: 4e-16, 4: 3e-7}
ENTROPY_BOUND = {8: 1e-13, 4: 4e-6}


def check(logits, targets, *, anywhere=False, **options):
    want = oracle.cross_entropy_stats(logits, targets, **options)
    got = fastce.cross_entropy_stats(logits, targets, **options)
    size = loss_dtype(logits.dtype).itemsize
    assert_loss(got.loss, want.loss, logits.dtype, anywhere=anywhere)
    assert got.lse.dtype == got.entropy.dtype == loss_dtype(logits.dtype)
    assert_close(got.lse, want.lse, LSE_BOUND[size])
    assert_close(got.entropy, want.entropy, ENTROPY_BOUND[size])
    assert got.predicted.dtype == np.int64
    np.testing.assert_array_equal(got.predicted, want.predicted)
    assert got.total_weight == pytest.approx(float(want.total_weight), rel=1e-15)
    return got


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((60, 7), -1), ((2, 50257), -1), ((3, 40, 9), 1), ((0, 4), -1), ((4, 1), -1)],
)
def test_values(dtype, shape, axis):
    targets = draw_targets(tuple(np.delete(shape, axis)), shape[axis])
    check(draw(shape, dtype, scale=1.5), targets, axis=axis)
    targets.flat[::3] = -100
    check(draw(shape, dtype, scale=1.5), targets, axis=axis)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weight_ignore_index_and_soft_targets(dtype):
    logits, weight = draw((50, 9), dtype), draw_weight(9, dtype)
    targets = draw_targets((50,), 9)
    got = check(logits, targets, weight=weight, ignore_index=3)
    mean = fastce.cross_entropy(logits, targets, weight=weight, ignore_index=3)
    assert got.loss.sum(dtype="f8") / got.total_weight == pytest.approx(float(mean), rel=1e-6)
    soft = draw_soft((50, 9), dtype)
    assert check(logits, soft).total_weight == 50
    assert check(logits, soft, weight=weight).total_weight == 50


def test_fields():
    stats = fastce.cross_entropy_stats(draw((3, 4)), np.array([0, 1, 2]))
    assert isinstance(stats, fastce.CrossEntropyStats)
    assert isinstance(stats, tuple)
    assert stats._fields == ("loss", "lse", "entropy", "predicted", "total_weight")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("gap", [12, 20, 40, 80, 84])
@pytest.mark.parametrize("classes", [10, 200])
def test_the_entropy_of_confident_rows_keeps_its_digits(dtype, gap, classes):
    logits = draw((20, classes), dtype)
    logits[:, 4] += gap
    got = check(logits, np.full(20, 4), anywhere=True)
    assert np.all(got.entropy > 0)


@pytest.mark.parametrize(("shape", "axis"), [((5, 6), -1), ((3, 5000), -1), ((2, 6, 9), 1)])
def test_ignored_and_bad_rows(shape, axis):
    logits = draw(shape)
    targets = draw_targets(tuple(np.delete(shape, axis)), shape[axis])
    of_classes = np.moveaxis(logits, axis, -1)
    last = tuple(n - 1 for n in targets.shape)
    first = (0,) * targets.ndim
    of_classes[first], targets[first] = np.nan, -100
    of_classes[last] = -np.inf
    stats = fastce.cross_entropy_stats(logits, targets, axis=axis)
    assert (stats.loss[first], stats.lse[first], stats.entropy[first]) == (0, 0, 0)
    assert stats.predicted[first] == -1
    assert np.isnan(stats.loss[last])
    assert np.isnan(stats.entropy[last])
    assert stats.lse[last] == -np.inf
    middle = np.ones(targets.shape, bool)
    middle[first] = middle[last] = False
    assert np.isfinite(stats.loss[middle]).all()
    assert np.isfinite(stats.entropy[middle]).all()


@pytest.mark.parametrize("classes", [9, 100])
def test_what_lies_between_the_classes_is_not_read(classes):
    """Not even where NaN is looked for."""
    logits = np.full((3, 2 * classes), np.nan, np.float32)[:, ::2]
    logits[...] = draw((3, classes))
    logits[1, 5] = np.inf
    stats = fastce.cross_entropy_stats(logits, [0, 1, 2])
    assert stats.lse[1] == np.inf
    assert stats.predicted[1] == 5
    total = shards.partial(logits, [0, 1, 2], class_offset=0, classes=classes)
    assert shards.finish(total).lse[1] == np.inf
    m, rest = rows.partial(logits[1])
    assert (m, rest) == (np.inf, 0.0)
    assert rows.logsumexp(logits[1]) == np.inf


def test_masked_classes_add_no_entropy():
    logits = np.array([[0.0, -np.inf, 0.0, -np.inf]])
    assert fastce.cross_entropy_stats(logits, [0]).entropy[0] == pytest.approx(np.log(2), rel=1e-15)
    uniform = fastce.cross_entropy_stats(np.zeros((1, 8)), [0]).entropy[0]
    assert uniform == pytest.approx(np.log(8), rel=1e-15)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("classes", [10, 1000, 5000])
def test_the_first_maximum_wins(dtype, classes):
    logits = np.zeros((4, classes), dtype)
    logits[1, [3, 7]] = 5
    logits[2, [classes - 2, classes - 1]] = 5
    logits[3, [classes // 2, classes - 1]] = 5
    stats = fastce.cross_entropy_stats(logits, np.zeros(4, int))
    assert stats.predicted.tolist() == [0, 3, classes - 2, classes // 2]
    strided = fastce.cross_entropy_stats(np.asfortranarray(logits), np.zeros(4, int))
    assert same_bits(strided.predicted, stats.predicted)
