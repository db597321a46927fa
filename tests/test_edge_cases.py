"""Section 4: every row of the contract's table of edge cases, loss and gradient."""

from typing import NamedTuple

import numpy as np
import pytest

import fastce
from fastce import rows, shards
from tests import oracle
from tests.checks import (
    FLOATS,
    assert_close,
    assert_gradient,
    assert_loss,
    draw,
    draw_targets,
    same_bits,
)

INF, NAN = np.inf, np.nan
DTYPES = [np.dtype("float32"), np.dtype("float64")]

# Short, long and strided rows take different loops: special entries go to the first row of each.
REGIMES = {
    "short": ((5, 6), -1),
    "long": ((3, 5000), -1),
    "strided": ((2, 6, 9), 1),
}


class Problem(NamedTuple):
    """Layout and dtype of the logits."""

    shape: tuple[int, ...]
    axis: int
    dtype: np.dtype


PROBLEMS = {name: Problem(*where, DTYPES[0]) for name, where in REGIMES.items()}
PROBLEMS["short float64"] = Problem(*REGIMES["short"], DTYPES[1])


@pytest.fixture(params=PROBLEMS)
def problem(request):
    return PROBLEMS[request.param]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def case(problem, entries, target=0):
    """Logits and targets whose first row starts with `entries` (or is filled by a number)."""
    logits = draw(problem.shape, problem.dtype)
    rows = np.moveaxis(logits, problem.axis, -1)
    first = (0,) * (rows.ndim - 1)
    if np.isscalar(entries):
        rows[first] = entries
    else:
        rows[(*first, slice(len(entries)))] = entries
    targets = draw_targets(rows.shape[:-1], rows.shape[-1])
    targets[first] = target
    return logits, targets, first


def evaluate(logits, targets, axis, **options):
    """Loss and gradient with the class axis last, checked against the oracle in every row."""
    loss, grad = fastce.cross_entropy_and_grad(
        logits, targets, axis=axis, reduction="none", **options
    )
    want = oracle.cross_entropy(logits, targets, axis=axis, reduction="none", **options)
    assert_loss(loss, want.loss, logits.dtype)
    assert_gradient(grad, want.grad, logits.dtype)
    alone = fastce.cross_entropy(logits, targets, axis=axis, reduction="none", **options)
    assert_loss(alone, want.loss, logits.dtype)
    return loss, np.moveaxis(grad, axis, -1)


def others_untouched(loss, grad, first):
    """Only the first row is anything but finite."""
    loss, grad = loss.copy(), grad.copy()
    loss[first] = grad[first] = 0
    return np.isfinite(loss).all() and np.isfinite(grad).all()


def test_weighted_mean_of_integer_targets():
    logits, targets, weight = (
        draw((4, 3), "f8"),
        np.array([0, 2, -100, 1]),
        np.array([1.0, 2.0, 4.0]),
    )
    rows = fastce.cross_entropy(logits, targets, reduction="none")
    want = (rows[0] * 1 + rows[1] * 4 + rows[3] * 2) / 7
    assert fastce.cross_entropy(logits, targets, weight=weight) == pytest.approx(want, rel=1e-15)


def test_weighted_mean_of_soft_targets_is_per_row():
    logits, weight, hot = draw((3, 3), "f8"), np.array([1.0, 2.0, 4.0]), np.eye(3)
    rows = fastce.cross_entropy(logits, np.arange(3), reduction="none")
    want = (rows * weight).sum()
    assert fastce.cross_entropy(logits, hot, weight=weight) == pytest.approx(want / 3, rel=1e-15)
    got = fastce.cross_entropy(logits, hot, weight=weight, normalizer=7.0)
    assert got == pytest.approx(want / 7, rel=1e-15)
    assert got == pytest.approx(
        fastce.cross_entropy(logits, np.arange(3), weight=weight), rel=1e-15
    )


def test_smoothing_with_weight_and_ignore_index():
    logits, targets, weight = (
        draw((4, 3), "f8"),
        np.array([0, 2, -100, 1]),
        np.array([1.0, 2.0, 4.0]),
    )
    lp, e, valid = fastce.log_softmax(logits), 0.3, [0, 1, 3]
    nll = sum(-weight[targets[i]] * lp[i, targets[i]] for i in valid)
    smooth = sum(-(weight * lp[i]).sum() for i in valid)
    want = ((1 - e) * nll + e / 3 * smooth) / 7
    got = fastce.cross_entropy(logits, targets, weight=weight, label_smoothing=e)
    assert got == pytest.approx(want, rel=1e-14)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}], ids=str)
def test_every_row_ignored(dtype, options):
    logits, targets = draw((3, 4), dtype), np.full(3, -100)
    for reduction, want in (("mean", NAN), ("sum", 0), ("none", np.zeros(3))):
        loss, grad = fastce.cross_entropy_and_grad(logits, targets, reduction=reduction, **options)
        np.testing.assert_array_equal(loss, want)
        assert not grad.any()
        assert grad.dtype == dtype
        np.testing.assert_array_equal(
            fastce.cross_entropy(logits, targets, reduction=reduction, **options), want
        )


def test_every_weight_zero(dtype):
    logits, targets = draw((3, 4), dtype), np.array([0, 1, 2])
    for weight in (np.zeros(4, dtype), np.array([0, 0, 0, 1], dtype)):
        loss, grad = fastce.cross_entropy_and_grad(logits, targets, weight=weight)
        assert np.isnan(loss)
        assert not grad.any()
        assert np.isnan(fastce.cross_entropy(logits, targets, weight=weight))


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_ignored_row_is_never_read(problem, poison, reduction):
    logits, targets, first = case(problem, poison, target=-100)
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"grad_output": None}):
        loss, grad = fastce.cross_entropy_and_grad(
            logits, targets, axis=problem.axis, reduction=reduction, **options
        )
        assert np.isfinite(loss).all()
        assert np.isfinite(grad).all()
        assert same_bits(
            np.moveaxis(grad, problem.axis, -1)[first],
            np.zeros(logits.shape[problem.axis], problem.dtype),
        )
        if reduction == "none":
            assert same_bits(loss[first], problem.dtype.type(0))


def test_upstream_nan_at_an_ignored_row():
    _, grad = fastce.cross_entropy_and_grad(
        draw((2, 3)), np.array([-100, 1]), reduction="none", grad_output=np.array([NAN, 1.0], "f4")
    )
    assert not grad[0].any()
    assert np.isfinite(grad).all()


def test_zero_weight_target_at_minus_infinity(problem):
    logits, targets, first = case(problem, [-INF])
    weight = np.ones(logits.shape[problem.axis], problem.dtype)
    weight[0] = 0
    loss, grad = evaluate(logits, targets, problem.axis, weight=weight)
    assert loss[first] == 0
    assert not grad[first].any()


def test_minus_infinity_elsewhere(problem):
    logits, targets, first = case(problem, [-INF, -INF], target=2)
    loss, grad = evaluate(logits, targets, problem.axis)
    assert np.isfinite(loss[first])
    assert same_bits(np.abs(grad[first][:2]), np.zeros(2, problem.dtype))
    p = np.moveaxis(fastce.softmax(logits, axis=problem.axis), problem.axis, -1)
    assert same_bits(p[first][:2], np.zeros(2, problem.dtype))


@pytest.mark.parametrize("fill", ["half of the row", "all but one"])
def test_long_runs_of_minus_infinity(dtype, fill):
    """A fully masked block must not turn -inf minus -inf into NaN."""
    logits = draw((4, 6000), dtype)
    logits[0, : 3000 if fill == "half of the row" else 5999] = -INF
    logits[1, 3000 if fill == "half of the row" else 1 :] = -INF
    loss, grad = evaluate(logits, np.array([5999, 0, 1, 2]), -1)
    assert np.isfinite(loss).all()
    assert not grad[0, :3000].any()


def test_minus_infinity_at_the_target(problem):
    logits, targets, first = case(problem, [-INF])
    loss, grad = evaluate(logits, targets, problem.axis)
    assert loss[first] == INF
    assert grad[first][0] == -1
    assert np.isfinite(grad).all()
    mean, _ = fastce.cross_entropy_and_grad(logits, targets, axis=problem.axis)
    assert mean == INF


def test_all_logits_minus_infinity(problem):
    logits, targets, first = case(problem, -INF)
    loss, grad = evaluate(logits, targets, problem.axis)
    assert np.isnan(loss[first])
    assert np.isnan(grad[first]).all()
    assert others_untouched(loss, grad, first)
    assert fastce.logsumexp(logits, axis=problem.axis)[first] == -INF


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("place", [0, 1, -1])
@pytest.mark.parametrize("target", [0, 1])
def test_nan_or_infinity(problem, value, place, target):
    logits, targets, first = case(problem, [], target=target)
    np.moveaxis(logits, problem.axis, -1)[(*first, place)] = value
    loss, grad = evaluate(logits, targets, problem.axis)
    assert np.isnan(loss[first])
    assert np.isnan(grad[first]).all()
    assert others_untouched(loss, grad, first)
    lse = fastce.logsumexp(logits, axis=problem.axis)
    assert np.isnan(lse[first]) if np.isnan(value) else lse[first] == INF


def test_nan_beats_infinity_in_logsumexp():
    assert np.isnan(fastce.logsumexp(np.array([INF, NAN, 0.0])))
    assert np.isnan(fastce.logsumexp(np.array([NAN, INF, 0.0])))


def test_soft_target_zero_at_minus_infinity(problem):
    logits, _, first = case(problem, [-INF])
    soft = np.zeros(logits.shape, problem.dtype)
    np.moveaxis(soft, problem.axis, -1)[..., 1:3] = 0.5
    loss, grad = evaluate(logits, soft, problem.axis)
    assert np.isfinite(loss).all()
    assert grad[first][0] == 0
    np.moveaxis(soft, problem.axis, -1)[..., 0] = 0.5
    loss, grad = evaluate(logits, soft, problem.axis)
    assert loss[first] == INF
    assert np.isfinite(grad).all()


def test_soft_targets_of_a_bad_row(problem):
    for entries in (-INF, [NAN], [INF]):
        logits, _, first = case(problem, entries)
        soft = np.zeros(logits.shape, problem.dtype)
        np.moveaxis(soft, problem.axis, -1)[..., 1] = 1
        loss, grad = evaluate(logits, soft, problem.axis)
        assert np.isnan(loss[first])
        assert others_untouched(loss, grad, first)


def test_soft_targets_that_do_not_sum_to_one(dtype):
    logits, soft = draw((2, 3), dtype), np.array([[2, 0, 1], [0.25, 0, -0.5]], dtype)
    loss, grad = evaluate(logits, soft, -1)
    lp, p = fastce.log_softmax(logits), fastce.softmax(logits)
    rtol = 1e-5 if dtype.itemsize == 4 else 1e-13
    np.testing.assert_allclose(loss, -(soft * lp).sum(axis=-1), rtol=rtol)
    np.testing.assert_allclose(grad, soft.sum(axis=-1, keepdims=True) * p - soft, rtol=rtol)


def test_smoothing_with_a_masked_class(problem):
    logits, targets, first = case(problem, [-INF], target=1)
    loss, grad = evaluate(logits, targets, problem.axis, label_smoothing=0.1)
    assert loss[first] == INF
    assert np.isfinite(grad).all()
    weight = np.ones(logits.shape[problem.axis], problem.dtype)
    weight[0] = 0
    loss, grad = evaluate(logits, targets, problem.axis, label_smoothing=0.1, weight=weight)
    assert np.isfinite(loss).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_no_rows(dtype, soft):
    logits = np.empty((0, 5), dtype)
    targets = np.empty((0, 5), np.float32) if soft else np.empty(0, np.int64)
    for reduction, want in (("mean", NAN), ("sum", 0), ("none", np.empty(0))):
        loss, grad = fastce.cross_entropy_and_grad(logits, targets, reduction=reduction)
        np.testing.assert_array_equal(loss, want)
        assert grad.shape == (0, 5)
        assert grad.dtype == dtype
        np.testing.assert_array_equal(
            fastce.cross_entropy(logits, targets, reduction=reduction), want
        )


@pytest.mark.parametrize(("shape", "axis"), [((0, 3, 4), 1), ((2, 3, 0), 1), ((2, 0, 3), -1)])
def test_no_rows_in_more_dimensions(shape, axis):
    targets = np.empty(np.delete(shape, axis), np.int64)
    loss, grad = fastce.cross_entropy_and_grad(
        np.empty(shape), targets, axis=axis, reduction="none"
    )
    assert loss.shape == targets.shape
    assert grad.shape == shape


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((5, 1), -1), ((2, 1, 7), 1)])
def test_one_class(dtype, shape, axis):
    logits = draw(shape, dtype)
    targets = np.zeros(np.delete(shape, axis), int)
    weight = np.full(1, 0.7)
    for options in ({}, {"label_smoothing": 0.1}, {"weight": weight},
                    {"weight": weight, "label_smoothing": 0.3}):  # fmt: skip
        for labels in (targets, np.full(shape, 0.3, dtype)):
            loss, grad = fastce.cross_entropy_and_grad(
                logits, labels, axis=axis, reduction="none", **options
            )
            assert not loss.any()
            assert not grad.any()
            assert grad.dtype == dtype


@pytest.mark.parametrize(
    "call",
    [
        lambda: fastce.cross_entropy(np.empty((3, 0)), np.empty(3, int)),
        lambda: fastce.cross_entropy_and_grad(np.empty((3, 0)), np.empty(3, int)),
        lambda: fastce.cross_entropy(np.empty((0, 0)), np.empty(0, int)),
        lambda: fastce.cross_entropy(np.empty((3, 0)), np.empty((3, 0))),
        lambda: fastce.cross_entropy_stats(np.empty((3, 0)), np.empty(3, int)),
        lambda: fastce.gradient_hessian(np.empty((3, 0)), np.empty(3, int)),
    ],
)
def test_no_classes(call):
    with pytest.raises(ValueError, match="class"):
        call()


def test_negative_class_weights(dtype):
    logits, targets = draw((6, 4), dtype), np.array([0, 1, 2, 3, 0, 1])
    weight = np.array([-1, 2, -0.5, 1], dtype)
    evaluate(logits, targets, -1, weight=weight)
    loss, grad = fastce.cross_entropy_and_grad(logits, targets, weight=weight)
    want = oracle.cross_entropy(logits, targets, weight=weight)
    assert_loss(loss, want.loss, dtype)
    assert_gradient(grad, want.grad, dtype)


def test_z_loss_is_not_weighted(dtype):
    logits, targets, weight = (
        draw((3, 4), dtype),
        np.array([0, 1, -100]),
        np.array([0, 3, 1, 1], dtype),
    )
    loss, _ = evaluate(logits, targets, -1, weight=weight, z_loss=0.5)
    lse = fastce.logsumexp(logits)
    np.testing.assert_allclose(loss[0], 0.5 * lse[0] ** 2, rtol=1e-6)
    assert loss[2] == 0
    without = fastce.cross_entropy(logits, targets, weight=weight)
    mean = fastce.cross_entropy(logits, targets, weight=weight, z_loss=0.5)
    np.testing.assert_allclose(mean - without, 0.5 * (lse[:2] ** 2).sum() / 2, rtol=1e-5)


def test_softcap_comes_first_and_keeps_minus_infinity(problem):
    logits, targets, first = case(problem, [-INF, INF, 1e30, -1e30], target=1)
    loss, grad = evaluate(logits, targets, problem.axis, softcap=5.0)
    assert np.isfinite(loss).all()
    assert np.isfinite(grad).all()
    assert not grad[first][:4].any()
    targets[first] = 0
    loss, grad = evaluate(logits, targets, problem.axis, softcap=5.0)
    assert loss[first] == INF
    logits, targets, first = case(problem, [NAN])
    loss, grad = evaluate(logits, targets, problem.axis, softcap=5.0)
    assert np.isnan(loss[first])
    assert others_untouched(loss, grad, first)


@pytest.mark.parametrize("dtype", FLOATS[2:], ids=str)
def test_special_values_in_16_bits(dtype):
    logits = draw((7, 8), dtype)
    logits[0, 0], logits[1, 0], logits[2] = NAN, INF, -INF
    logits[3, 0] = logits[4, 1] = -INF
    logits[5] = NAN
    loss, grad = evaluate(logits, np.array([1, 1, 1, 0, 0, -100, 2]), -1)
    assert np.isnan(loss[:3]).all()
    assert loss[3] == INF
    assert grad[4, 1] == 0
    assert not grad[5].any()


def test_mean_with_a_normalizer_and_nothing_to_count():
    for targets, logits in (([-100, -100], draw((2, 3))), (np.empty(0, int), np.empty((0, 3)))):
        loss, grad = fastce.cross_entropy_and_grad(logits, targets, normalizer=4.0)
        assert loss == 0
        assert not grad.any()


def test_the_first_of_equal_maxima_is_predicted():
    logits = np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [0.0, -1.0, 0.0]])
    stats = fastce.cross_entropy_stats(logits, np.array([0, 0, -100]))
    assert stats.predicted.tolist() == [1, 0, -1]


def test_more_than_two_to_the_31_elements():
    """Pages that are never written cost no memory, and the last rows lie beyond 32-bit offsets."""
    logits = np.zeros(((1 << 15) + 3, 1 << 16), np.float16)
    assert logits.size > 1 << 31
    logits[-3:] = draw((3, 1 << 16), np.float16)
    targets = np.full(len(logits), -100)
    targets[-3:] = 0, 5, 65_535
    loss = fastce.cross_entropy(logits, targets, reduction="none")
    want = oracle.cross_entropy(logits[-3:], targets[-3:], reduction="none")
    assert_loss(loss[-3:], want.loss, np.float16)
    assert not loss[:-3].any()


@pytest.mark.parametrize("shape, axis", [((40, 20), 0), ((40, 20), 1), ((4, 5000), 1)])
@pytest.mark.parametrize("sign", [1, -1])
def test_offsets_beyond_32_bits(shape, axis, sign):
    """Few logits, spread over four gigabytes of which few pages are touched."""
    stride = (1 << 32) // shape[0] // 4 * 4

    def spread():
        memory = np.zeros(stride * shape[0] // 4, np.float32)
        return np.lib.stride_tricks.as_strided(memory, shape, (stride, 4))[::sign]

    logits, out = spread(), spread()
    logits[...] = draw(shape)
    targets = draw_targets(tuple(np.delete(shape, axis)), shape[axis])
    loss, grad = fastce.cross_entropy_and_grad(
        logits, targets, axis=axis, reduction="none", out=out
    )
    want = oracle.cross_entropy(logits, targets, axis=axis, reduction="none")
    assert_loss(loss, want.loss, np.float32)
    assert_gradient(grad, want.grad, np.float32)


# Logits that are finite, and caps by which their quotient is not.
FAR_BEYOND_THE_CAP = [
    ("float64", np.finfo("f8").min, 0.5), ("float64", -1e308, 0.1), ("float64", -1.0, 1e-309),
    ("float32", -1e38, 1e-280), ("float32", np.finfo("f4").min, 1e-300),
    ("float16", -1.0, 1e-309), ("bfloat16", -1.0, 1e-309),
]  # fmt: skip


@pytest.mark.parametrize("classes", [3, 100])
@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize(("dtype", "low", "softcap"), FAR_BEYOND_THE_CAP)
def test_a_mask_is_told_by_the_logit_and_not_by_its_quotient(dtype, low, softcap, axis, classes):
    """Such a logit is capped, at minus the cap; -inf beside it stays a mask."""
    z = np.zeros((2, classes))
    z[:, 0], z[:, 1] = low, -np.inf
    z = np.ascontiguousarray(np.moveaxis(z.astype(dtype), -1, axis))
    count = classes - 1
    want = np.log(1 + (count - 1) * np.exp(softcap)) if softcap < 700 else np.nan  # z_y = -cap
    found = {
        "loss": fastce.cross_entropy_and_grad(z, [0, 0], axis=axis, softcap=softcap)[0],
        "statistics": shards.finish(
            shards.partial(z, [0, 0], class_offset=0, classes=classes, axis=axis, softcap=softcap)
        ).loss,
    }
    grad = fastce.cross_entropy_and_grad(z, [0, 0], axis=axis, softcap=softcap)[1]
    for name, loss in found.items():
        assert loss == pytest.approx(want, rel=1e-6), name
    assert not np.take(grad, 0, axis).astype(float).any()  # where the cap is flat
    assert not np.take(grad, 1, axis).astype(float).any()  # where the class is masked
    if dtype in ("float64", "float32"):
        row = np.ascontiguousarray(np.moveaxis(z, axis, -1)[0])
        options = {"label_smoothing": 0.0, "z_loss": 0.0, "softcap": softcap}
        assert rows.cross_entropy(row, 0, None, *options.values()) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"weight": True}, {"soft": True}], ids=str)
@pytest.mark.parametrize("dtype, largest", [("float32", 0.0), ("float32", 1.0), ("float64", 0.0)])
@pytest.mark.parametrize("classes, axis", [(10, -1), (70, -1), (1000, -1), (70, 0)])
def test_classes_masked_by_the_smallest_number_are_far_but_not_infinite(
    dtype, largest, classes, axis, options
):
    """Also from the largest number, where their distance is more than a float32 holds."""
    logits = np.zeros((3, classes), dtype)
    logits[:, 3:] = np.finfo(dtype).min
    logits[:, 0] = largest * np.finfo(dtype).max
    targets = np.zeros(3, int) if largest else np.arange(3)
    given = {"label_smoothing": 0.1, "reduction": "none"}
    if "weight" in options:
        given["weight"] = np.ones(classes)
    if "soft" in options:
        targets = np.eye(classes, dtype=dtype)[targets]
    want = oracle.cross_entropy(logits, targets, **given)
    if axis == 0:
        logits = np.ascontiguousarray(logits.T)
        targets = targets.T if "soft" in options else targets
    loss = fastce.cross_entropy(logits, targets, axis=axis, **given)
    assert np.all(np.isfinite(loss))
    assert_close(loss, want.loss, 1e-6 if dtype == "float32" else 1e-14)
