"""Second derivatives of the classifier head, whose logits are never held whole."""

import itertools
import tracemalloc

import numpy as np
import pytest

import fastce
from fastce import _blas, _head
from fastce._head_curvature import slopes, slopes_and_gradients
from tests.checks import draw, draw_soft, draw_targets, draw_weight

N, D, C = 37, 7, 23
STEP = np.longdouble(1e-5)
OPTIONS = {
    "plain": {},
    "weight": {"class_weight": draw_weight(C, np.float64)},
    "smoothing": {"label_smoothing": 0.1},
    "both": {"class_weight": draw_weight(C, np.float64), "label_smoothing": 0.2},
    "normalizer": {"normalizer": 5.0},
}
REDUCTIONS = ["mean", "sum", "none"]


def head(x, weight, targets, bias=None, class_weight=None, label_smoothing=0.0, z_loss=0.0,
         softcap=None, reduction="mean", normalizer=None):  # fmt: skip
    return _head.Head.checked(
        x, weight, targets, bias, class_weight, -100, label_smoothing, z_loss, softcap, reduction,
        normalizer,
    )  # fmt: skip


def problem(dtype=np.float64, soft=False):
    """x, weight and bias, a direction of them, targets."""
    shapes = (N, D), (C, D), (C,)
    point = [draw(shape, dtype, seed=k) for k, shape in enumerate(shapes)]
    direction = [draw(shape, dtype, seed=10 + k) for k, shape in enumerate(shapes)]
    y = draw_soft((N, C)).astype(dtype) if soft else draw_targets((N,), C)
    if not soft:
        y[::5] = -100
    return point, direction, y


def losses_and_gradients(point, y, upstream, class_weight=None, label_smoothing=0.0,
                         reduction="mean", normalizer=None):  # fmt: skip
    """Each row's addend and the gradients, by the formulas and in extended precision."""
    x, weight, bias = point
    z = x @ weight.T + bias
    z = z - z.max(axis=1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    w = np.ones(C, np.longdouble) if class_weight is None else class_weight.astype(np.longdouble)
    if y.ndim > 1:
        h, valid, count = y.astype(np.longdouble), np.ones(N), N
    else:
        valid = y != -100
        h = (np.arange(C) == y[:, None]).astype(np.longdouble)
        count = (h @ w).sum()
    u = w * ((1 - np.longdouble(label_smoothing)) * h + np.longdouble(label_smoothing) / C)
    u *= valid[:, None]
    if reduction == "mean":
        u /= count if normalizer is None else normalizer
    g = np.exp(log_p) * u.sum(axis=1, keepdims=True) - u
    g *= np.broadcast_to(upstream, N)[:, None]
    return -(u * log_p).sum(axis=1), g @ weight, g.T @ x, g.sum(axis=0)


def differences(point, direction, y, upstream, **options):
    """Their derivatives along a direction."""
    exact = [a.astype(np.longdouble) for a in point]
    by = [0 if a is None else STEP * a.astype(np.longdouble) for a in direction]
    up = losses_and_gradients([a + d for a, d in zip(exact, by, strict=True)], y, upstream,
                              **options)  # fmt: skip
    down = losses_and_gradients([a - d for a, d in zip(exact, by, strict=True)], y, upstream,
                                **options)  # fmt: skip
    return [(a - b) / (2 * STEP) for a, b in zip(up, down, strict=True)]


def assert_derivatives(got, want, rtol):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), rtol=rtol,
                                   atol=rtol * float(abs(b).max()))  # fmt: skip


@pytest.mark.parametrize("rows", ["all rows", "some rows", "one row"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", OPTIONS)
def test_derivatives_along_a_direction(name, dtype, soft, rows, monkeypatch):
    if rows != "all rows":
        monkeypatch.setattr(_head, "MEMORY", _blas.BLOCK + (1 if rows == "one row" else 6000))
        monkeypatch.setattr(_head, "SHARE", 0.0)
        monkeypatch.setattr(_head, "TILE", 2)
    point, direction, y = problem(dtype, soft)
    for reduction in REDUCTIONS if name != "normalizer" else ["mean"]:
        options = OPTIONS[name] | {"reduction": reduction}
        per_row = np.linspace(-0.5, 1.5, N) if reduction == "none" else None
        upstream = (1.0 if reduction == "none" else 1.5, per_row)
        want = differences(point, direction, y, 1.5 if per_row is None else per_row, **options)
        checked = head(*point[:2], y, point[2], **options)
        rtol = 1e-8 if dtype == np.float64 else 2e-5
        got = slopes_and_gradients(checked, tuple(direction), upstream)
        assert_derivatives(got, want, rtol)
        assert all(a.dtype == dtype for a in got[1:])
        assert_derivatives([slopes(checked, tuple(direction))], want[:1], rtol)


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=3)))
def test_directions_of_some_arguments(given):
    point, direction, y = problem()
    some = tuple(a if kept else None for a, kept in zip(direction, given, strict=True))
    got = slopes_and_gradients(head(*point[:2], y, point[2]), some, (1.0, None))
    assert_derivatives(got, differences(point, some, y, 1.0), 1e-8)


def test_curved_options_have_slopes():
    """The gradient is all that a slope needs."""
    point, direction, y = problem()
    options = {"z_loss": 0.1, "softcap": 2.0, "class_weight": OPTIONS["weight"]["class_weight"]}
    found = slopes(head(*point[:2], y, point[2], **options), tuple(direction))

    def loss(step):
        x, weight, bias = (a + step * d for a, d in zip(point, direction, strict=True))
        return fastce.linear_cross_entropy(x, weight, y, bias=bias, **options)

    np.testing.assert_allclose(found.sum(), (loss(1e-5) - loss(-1e-5)) / 2e-5, rtol=1e-7)


def test_nothing_counts():
    point, direction, _ = problem()
    for rows in (N, 0):
        y = np.full(rows, -100)
        checked = head(point[0][:rows], point[1], y, point[2])
        got = slopes_and_gradients(checked, (direction[0][:rows], *direction[1:]), (1.0, None))
        assert not any(a.any() for a in got)


def test_one_dtype_is_computed_with():
    point, direction, y = problem()
    narrow = [a.astype(np.float16) for a in point], [a.astype(np.float16) for a in direction]
    mixed = head(narrow[0][0], narrow[0][1].astype(np.float64), y, narrow[0][2])
    got = slopes_and_gradients(mixed, tuple(narrow[1]), (1.0, None))
    assert all(a.dtype == np.float64 for a in got)
    assert_derivatives(got, differences(*narrow, y, 1.0), 1e-8)


def test_memory(monkeypatch):
    """Three arrays of the logits of some rows, and never one of all."""
    rows, features, classes = 4096, 8, 2048
    monkeypatch.setattr(_head, "MEMORY", _blas.BLOCK + (2 << 20))
    monkeypatch.setattr(_head, "SHARE", 0.0)
    x, weight = draw((rows, features)), draw((classes, features))
    checked = head(x, weight, draw_targets((rows,), classes))
    slopes_and_gradients(checked, (x, weight, None), (1.0, None))
    tracemalloc.start()
    slopes_and_gradients(checked, (x, weight, None), (1.0, None))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20  # the logits have 32 MiB, the results 0.4
