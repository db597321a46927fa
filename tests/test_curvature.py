"""Section 2: gradient and Hessian diagonals for boosting, exact Hessian-vector products."""

import numpy as np
import pytest
from scipy.special import softmax

import fastce
from tests import oracle
from tests.checks import FLOATS, assert_close, assert_gradient, draw, draw_targets, gradient_bound

KINDS = ["diag", "xgboost", "lightgbm", "abs_residual"]


def check(logits, targets, **options):
    want = oracle.gradient_hessian(logits, targets, **options)
    got = fastce.gradient_hessian(logits, targets, **options)
    assert isinstance(got, tuple)
    for part, expected in zip(got, want, strict=True):
        assert_gradient(part, expected, logits.dtype)
    return got


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("hessian", KINDS)
@pytest.mark.parametrize(
    ("shape", "axis"), [((60, 7), -1), ((2, 3000), -1), ((3, 7, 20), 1), ((0, 4), -1)]
)
def test_gradient_and_hessian(dtype, hessian, shape, axis):
    targets = draw_targets(tuple(np.delete(shape, axis)), shape[axis])
    check(draw(shape, dtype, scale=1.5), targets, axis=axis, hessian=hessian)


@pytest.mark.parametrize("hessian", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("classes", [7, 100])
def test_sample_weight(hessian, dtype, classes):
    weight = (np.arange(60) % 9 / 4).astype(dtype)
    logits, targets = draw((60, classes), dtype), draw_targets((60,), classes)
    logits[::2, 3] += 15
    check(logits, targets, sample_weight=weight, hessian=hessian)


@pytest.mark.parametrize("hessian", KINDS)
@pytest.mark.parametrize("classes", [3, 100])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_without_a_softmax_have_nan(hessian, classes, value):
    """Also where there is a floor."""
    logits = draw((3, classes))
    logits[1] = value
    for part in fastce.gradient_hessian(logits, [0, 1, 2], hessian=hessian):
        assert np.isnan(part[1]).all()
        assert np.isfinite(part[[0, 2]]).all()
    product = fastce.hessian_vector_product(logits, np.ones_like(logits))
    assert np.isnan(product[1]).all()
    assert np.isfinite(product[[0, 2]]).all()


@pytest.mark.parametrize("classes", [7, 100])
def test_logits_and_directions_lie_as_they_please(classes):
    logits, targets = draw((5, classes), scale=4.0), draw_targets((5,), classes)
    v, upstream = draw((5, classes), seed=5), draw((5,), seed=6)
    apart = np.repeat(logits, 2, axis=1)[:, ::2]
    for kind in KINDS:
        check(apart, targets, hessian=kind)
    want = oracle.hessian_vector_product(logits, v, grad_output=upstream)
    for z, direction in ((apart, v), (logits, np.repeat(v, 3, axis=1)[:, ::3])):
        got = fastce.hessian_vector_product(z, direction, grad_output=upstream)
        assert_close(got, want, gradient_bound(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("gap", [20, 40, 80])
def test_confident_rows_keep_their_digits(dtype, gap):
    """1 - p of the leader is the sum of the others, not a difference that is zero."""
    logits = draw((20, 10), dtype)
    logits[:, 4] += gap
    for kind in KINDS:
        grad, hess = check(logits, np.full(20, 4), hessian=kind)
        assert np.all(grad[:, 4] < 0)
        assert np.all(hess > 0)


def test_the_xgboost_floor():
    grad, hess = fastce.gradient_hessian(np.array([[0.0, 200.0]]), [1], hessian="xgboost")
    assert np.all(hess == 1e-16)
    assert grad[0, 1] < 0
    _, hess = fastce.gradient_hessian(
        np.array([[0.0, 200.0]]), [1], hessian="xgboost", sample_weight=[2.0]
    )
    assert np.all(hess == 2e-16)


def test_the_diagonal_is_that_of_the_second_derivative():
    logits, targets, step = draw((5, 4), np.float64), draw_targets((5,), 4), 1e-5
    _, hess = fastce.gradient_hessian(logits, targets)
    for j in range(4):
        bump = step * (np.arange(4) == j)
        up, _ = fastce.gradient_hessian(logits + bump, targets)
        down, _ = fastce.gradient_hessian(logits - bump, targets)
        np.testing.assert_allclose((up - down)[:, j] / (2 * step), hess[:, j], rtol=1e-7)


def test_no_index_is_ignored():
    with pytest.raises(IndexError, match="-100"):
        fastce.gradient_hessian(draw((2, 3)), np.array([0, -100]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("shape", "axis"), [((60, 7), -1), ((2, 3000), -1), ((3, 7, 20), 1), ((0, 4), -1)]
)
def test_hessian_vector_product(dtype, shape, axis):
    logits, v = draw(shape, dtype, scale=1.5), draw(shape, dtype, seed=5)
    want = oracle.hessian_vector_product(logits, v, axis=axis)
    got = fastce.hessian_vector_product(logits, v, axis=axis)
    assert got.dtype == dtype
    assert_close(got, want, gradient_bound(dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("classes", [4, 100])
def test_hessian_vector_product_with_an_upstream_gradient(dtype, classes):
    logits, v, upstream = (
        draw((9, classes), dtype),
        draw((9, classes), dtype, seed=2),
        draw((9,), dtype, seed=3),
    )
    for grad_output in (2.5, upstream):
        got = fastce.hessian_vector_product(logits, v, grad_output=grad_output)
        want = oracle.hessian_vector_product(logits, v, grad_output=grad_output)
        assert_close(got, want, gradient_bound(dtype))


def test_hessian_vector_product_is_the_matrix_product():
    logits, v = draw((3, 5), np.float64, scale=2), draw((3, 5), np.float64, seed=1)
    p = softmax(logits, axis=-1)
    matrix = np.eye(5) * p[:, :, None] - p[:, :, None] * p[:, None, :]
    np.testing.assert_allclose(
        fastce.hessian_vector_product(logits, v), np.einsum("nij,nj->ni", matrix, v), rtol=1e-12
    )
    constant = np.ones((3, 5))
    assert np.abs(fastce.hessian_vector_product(logits, constant)).max() < 1e-16 * 4


def test_masked_classes_have_no_curvature():
    logits, v = draw((2, 5), np.float64), draw((2, 5), np.float64, seed=1)
    logits[:, 2] = -np.inf
    assert not fastce.hessian_vector_product(logits, v)[:, 2].any()
    for kind in ("diag", "lightgbm", "abs_residual"):
        grad, hess = fastce.gradient_hessian(logits, [0, 1], hessian=kind)
        assert not grad[:, 2].any()
        assert not hess[:, 2].any()
