"""The oracle itself, against 60-digit arithmetic."""

import mpmath
import numpy as np
import pytest

from tests import oracle

ROWS = {
    "ordinary": [0.5, -1.25, 3.0, 2.0],
    "leading target": [90.0, 1.0, -3.0, 2.0],
    "trailing target": [-90.0, 1.0, -3.0, 2.0],
    "offset": [1e6 + 0.25, 1e6, 1e6 - 2.5, 1e6 + 1],
    "ties": [2.0, 2.0, 2.0, 2.0],
    "two classes": [700.0, 0.0],
    "one class": [3.0],
    "masked": [1.0, -np.inf, 2.0],
}


def close(got: object, want: mpmath.mpf, bound: float = 1e-17) -> bool:
    # repr of a longdouble has all its digits
    return bool(abs(mpmath.mpf(str(got)) - want) <= bound * abs(want))


@pytest.fixture(autouse=True)
def _digits():
    with mpmath.workdps(60 + 320):
        yield


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_softmax_family_and_cross_entropy(row):
    z = [mpmath.mpf(x) for x in row]
    e = [mpmath.exp(x) for x in z]
    total = mpmath.fsum(e)
    p = [x / total for x in e]
    result = oracle.cross_entropy([row], [0], reduction="sum")
    assert close(result.loss.value, mpmath.log(total) - z[0])
    for j, got in enumerate(result.grad.value[0]):
        assert close(got, mpmath.fsum(e[1:]) / -total if j == 0 else p[j])
    assert close(oracle.logsumexp(row).value, mpmath.log(total))
    for j, (q, lq) in enumerate(
        zip(oracle.softmax(row).value, oracle.log_softmax(row).value, strict=True)
    ):
        assert close(q, p[j])
        assert close(lq, z[j] - mpmath.log(total)) if p[j] else lq == -np.inf
    entropy = -mpmath.fsum(x * mpmath.log(x) for x in p if x)
    assert close(oracle.cross_entropy_stats([row], [0]).entropy.value[0], entropy)


def test_every_option_at_once():
    rng = np.random.default_rng(3)
    z, weight = rng.normal(size=(5, 4)) * 3, np.array([0.5, 2.0, 1.5, 0.25])
    y = np.array([0, 3, 7, 1, 2])
    e, zl, cap, upstream = 0.125, 0.25, 4.0, 3.0
    got = oracle.cross_entropy(
        z, y, weight=weight, ignore_index=7, label_smoothing=e, z_loss=zl, softcap=cap,
        grad_output=upstream,
    )  # fmt: skip

    def loss(entries):
        nll = smooth = square = mpmath.mpf(0)
        for i, target in enumerate(y):
            if target == 7:
                continue
            capped = [cap * mpmath.tanh(x / cap) for x in entries[i]]
            lse = mpmath.log(mpmath.fsum(map(mpmath.exp, capped)))
            nll += weight[target] * (lse - capped[target])
            smooth += mpmath.fsum(w * (lse - x) for w, x in zip(weight, capped, strict=True))
            square += lse**2
        total = weight[y[y != 7]].sum()
        return ((1 - e) * nll + e / mpmath.mpf(4) * smooth) / total + zl * square / 4

    entries = [[mpmath.mpf(float(x)) for x in row] for row in z]
    assert close(got.loss.value, loss(entries))
    for i, j in ((0, 0), (1, 2), (3, 3), (4, 2)):
        step = mpmath.mpf(10) ** -60
        up, down = ([list(row) for row in entries] for _ in range(2))
        up[i][j] += step
        down[i][j] -= step
        assert close(got.grad.value[i, j], upstream * (loss(up) - loss(down)) / (2 * step), 1e-15)
    assert not got.grad.value[2].any()


@pytest.mark.parametrize("x", [-800.0, -40.0, -1.5, 0.0, 2.25, 40.0, 800.0])
@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_binary_form(x, t):
    got = oracle.binary_cross_entropy([x], [t], pos_weight=2.0, weight=0.5, reduction="sum")
    s = 1 / (1 + mpmath.exp(-mpmath.mpf(x)))
    want = -0.5 * (2 * t * mpmath.log(s) + (1 - t) * mpmath.log(1 - s))
    assert close(got.loss.value, want)
    assert close(got.grad.value[0], 0.5 * ((1 - t) * s - 2 * t * (1 - s)))


def test_curvature():
    z, v = [0.5, -2.0, 60.0], [1.0, -0.5, 2.0]
    e = [mpmath.exp(mpmath.mpf(x)) for x in z]
    p = [x / mpmath.fsum(e) for x in e]
    mean = mpmath.fsum(a * b for a, b in zip(p, v, strict=True))
    product = oracle.hessian_vector_product([z], [v])
    for j in range(3):
        error = abs(mpmath.mpf(str(product.value[0, j])) - p[j] * (v[j] - mean))
        assert error <= 1e-17 * float(product.scale[0, j])
    want = {
        "diag": [x * (1 - x) for x in p],
        "xgboost": [max(2 * x * (1 - x), mpmath.mpf(1e-16)) for x in p],
        "lightgbm": [mpmath.mpf(3) / 2 * x * (1 - x) for x in p],
        "abs_residual": [p[0], p[1], 1 - p[2]],
    }
    for name, diagonal in want.items():
        grad, hess = oracle.gradient_hessian([z], [2], sample_weight=[2.0], hessian=name)
        for j in range(3):
            assert close(grad.value[0, j], 2 * (p[j] if j < 2 else p[j] - 1))
            assert close(hess.value[0, j], 2 * diagonal[j])
