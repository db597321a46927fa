"""SciPy and scikit-learn give the same results where they agree with the contract."""

import numpy as np
import pytest
import scipy.special
import sklearn.metrics

import fastce
from tests.checks import draw, draw_targets, draw_weight


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scipy(axis):
    x = draw((8, 9), np.float64, scale=3)
    x[2, 3] = -np.inf
    for name in ("logsumexp", "softmax", "log_softmax"):
        want = getattr(scipy.special, name)(x, axis=axis)
        np.testing.assert_allclose(
            getattr(fastce, name)(x, axis=axis), want, rtol=1e-13, atol=1e-15
        )
    for axes in (None, (0, 1)):
        for keepdims in (False, True):
            want = scipy.special.logsumexp(x, axis=axes, keepdims=keepdims)
            got = fastce.logsumexp(x, axis=axes, keepdims=keepdims)
            assert np.shape(got) == np.shape(want)
            np.testing.assert_allclose(got, want, rtol=1e-14)


def test_sklearn_log_loss():
    logits, y, weight = draw((50, 4), np.float64), draw_targets((50,), 4), draw_weight(4, "f8")
    p = fastce.softmax(logits)
    want = sklearn.metrics.log_loss(y, p, labels=range(4), sample_weight=weight[y])
    assert fastce.cross_entropy(logits, y, weight=weight) == pytest.approx(want, rel=1e-12)


def test_sklearn_multinomial_loss():
    from sklearn._loss import HalfMultinomialLoss

    logits, y = draw((50, 4), np.float64), draw_targets((50,), 4)
    sample_weight = (np.arange(50) % 5 + 1).astype("f8")
    peer = HalfMultinomialLoss(n_classes=4)
    loss, grad = peer.loss_gradient(y.astype("f8"), logits, sample_weight=sample_weight)
    got_loss, got_grad = fastce.cross_entropy_and_grad(
        logits, y, reduction="none", grad_output=sample_weight
    )
    np.testing.assert_allclose(got_loss * sample_weight, loss, rtol=1e-12)
    np.testing.assert_allclose(got_grad, grad, rtol=1e-11, atol=1e-15)
    grad, hess = peer.gradient_hessian(y.astype("f8"), logits, sample_weight=sample_weight)
    for a, b in zip(
        fastce.gradient_hessian(logits, y, sample_weight=sample_weight), (grad, hess), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-15)
