"""Section 1 and 2: the negative log likelihood of given log-probabilities."""

import numpy as np
import pytest

import fastce
from tests import oracle
from tests.checks import (
    FLOATS,
    assert_gradient,
    assert_loss,
    draw,
    draw_targets,
    draw_weight,
    same_bits,
)


def log_probs(shape, dtype, axis=-1):
    return fastce.log_softmax(draw(shape, np.float64, scale=2), axis=axis).astype(dtype)


def check(lp, targets, **options):
    want = oracle.nll_loss(lp, targets, **options)
    loss, grad = fastce.nll_loss_and_grad(lp, targets, **options)
    assert_loss(loss, want.loss, lp.dtype)
    assert_gradient(grad, want.grad, lp.dtype)
    options.pop("grad_output", None)
    assert same_bits(fastce.nll_loss(lp, targets, **options), loss)
    return loss, grad


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("shape", "axis"), [((40, 9), -1), ((1, 5000), -1), ((3, 9, 11), 1), ((0, 4), 1), ((6,), 0)]
)
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"reduction": "none"}], ids=str)
def test_every_dtype_axis_and_reduction(dtype, shape, axis, options):
    rows = tuple(np.delete(shape, axis))
    check(log_probs(shape, dtype, axis), draw_targets(rows, shape[axis]), axis=axis, **options)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weight_ignore_normalizer_and_upstream(dtype):
    lp, targets, weight = log_probs((40, 9), dtype), draw_targets((40,), 9), draw_weight(9, dtype)
    targets[::3] = -100
    check(lp, targets, weight=weight)
    check(lp, targets, weight=weight, grad_output=-2.0)
    check(lp, targets, weight=weight, normalizer=5.0)
    check(lp, targets, reduction="none", grad_output=draw((40,), dtype, seed=3))


def test_another_ignore_index():
    targets = draw_targets((40,), 9)
    assert (targets == 4).any()
    check(log_probs((40, 9), np.float32), targets, ignore_index=4)


def test_edge_cases():
    lp = np.array([[-np.inf, 0.0], [np.nan, np.nan], [-np.inf, 0.0], [-1.0, -0.5]], np.float32)
    loss, grad = fastce.nll_loss_and_grad(lp, np.array([1, -100, 0, 0]), reduction="none")
    np.testing.assert_array_equal(loss, np.array([0, 0, np.inf, 1], np.float32))
    np.testing.assert_array_equal(grad, [[0, -1], [0, 0], [-1, 0], [-1, 0]])
    loss, grad = fastce.nll_loss_and_grad(
        lp, np.array([1, -100, 0, 1]), reduction="none", weight=np.array([0.0, 1.0], np.float32)
    )
    assert loss[2] == 0
    assert not grad[2].any()
    loss, grad = fastce.nll_loss_and_grad(lp, np.full(4, -100))
    assert np.isnan(loss)
    assert not grad.any()
    assert np.isnan(fastce.nll_loss(np.empty((0, 3)), np.empty(0, int)))
    with pytest.raises(ValueError, match="class"):
        fastce.nll_loss(np.empty((3, 0)), np.empty(3, int))


def test_the_log_likelihood_of_independent_draws():
    """Section 1: the log of the product of the probabilities is minus the summed loss."""
    lp, targets = log_probs((30, 4), np.float64), draw_targets((30,), 4)
    likelihood = np.prod(np.exp(lp[np.arange(30), targets]))
    assert -fastce.nll_loss(lp, targets, reduction="sum") == pytest.approx(
        np.log(likelihood), rel=1e-13
    )


def test_out_and_in_place():
    lp, targets = log_probs((6, 5), np.float32), draw_targets((6,), 5)
    _, want = fastce.nll_loss_and_grad(lp, targets)
    out = np.full((5, 6), 7, np.float32).T
    _, grad = fastce.nll_loss_and_grad(lp, targets, out=out)
    assert grad is out
    np.testing.assert_array_equal(out, want)
    _, grad = fastce.nll_loss_and_grad(lp, targets, out=lp)
    assert grad is lp
    assert same_bits(lp, want)
