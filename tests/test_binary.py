"""Section 2 and 4: the binary form, of any shape, with its limits at the infinities."""

import numpy as np
import pytest

import fastce
from tests import oracle
from tests.checks import FLOATS, assert_gradient, assert_loss, draw, same_bits

INF, NAN = np.inf, np.nan


def check(logits, targets, *, anywhere=False, **options):
    want = oracle.binary_cross_entropy(logits, targets, **options)
    loss, grad = fastce.binary_cross_entropy_and_grad(logits, targets, **options)
    assert_loss(loss, want.loss, logits.dtype, anywhere=anywhere)
    assert_gradient(grad, want.grad, logits.dtype)
    options.pop("grad_output", None)
    assert same_bits(fastce.binary_cross_entropy(logits, targets, **options), loss)
    return loss, grad


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (7, 3), (20_001,), (2, 0, 3), (2, 3, 4, 5)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_every_dtype_and_shape(dtype, shape, reduction):
    logits = np.asarray(draw(shape, dtype, scale=3)) if shape else np.array(0.75, dtype)
    targets = np.random.default_rng(1).integers(0, 5, shape) / np.float32(4)
    check(logits, np.asarray(targets).astype(dtype), reduction=reduction)


OPTIONS = {
    "weight": {"weight": np.arange(1, 6, dtype="f4") / 4},
    "weight per row": {"weight": np.arange(1, 41, dtype="f4")[:, None] / 4},
    "weight per entry": {"weight": np.arange(1, 201, dtype="f4").reshape(40, 5) / 8},
    "scalar weight": {"weight": 0.5},
    "pos_weight": {"pos_weight": np.arange(1, 6, dtype="f4")},
    "both": {"weight": np.ones((40, 1), "f4"), "pos_weight": np.array([4.0], "f4")},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_broadcast(option, dtype):
    logits = draw((40, 5), dtype, scale=2)
    targets = (draw((40, 5), seed=2) > 0).astype(dtype)
    for reduction in ("mean", "sum", "none"):
        check(logits, targets, reduction=reduction, **OPTIONS[option])
    check(logits, targets, grad_output=-3.0, **OPTIONS[option])
    upstream = draw((40, 5), dtype, seed=7)
    check(logits, targets, reduction="none", grad_output=upstream, **OPTIONS[option])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_confident_predictions_keep_their_digits(dtype):
    largest = 87 if dtype == "float32" else 708
    logits = np.linspace(-largest, largest, 1001).astype(dtype)
    for target in (0.0, 1.0):
        loss, grad = check(logits, np.full(1001, target, dtype), reduction="none", anywhere=True)
        assert np.all(loss > 0)
        assert np.all(grad != 0)


LIMITS = [
    # logit, target, loss, gradient
    (INF, 1, 0, 0),
    (-INF, 0, 0, 0),
    (INF, 0, INF, 1),
    (-INF, 1, INF, -1),
    (INF, 0.5, INF, 0.5),
    (NAN, 0, NAN, NAN),
    (NAN, 1, NAN, NAN),
    (3e38, 1, 0, 0),
    (-3e38, 0, 0, 0),
]


@pytest.mark.parametrize(("logit", "target", "loss", "gradient"), LIMITS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_limits(logit, target, loss, gradient, dtype):
    with np.errstate(over="ignore"):
        logits = np.array([0.5, logit, -0.5] * 20).astype(dtype)
    targets = np.array([1, target, 0] * 20, dtype)
    got_loss, got_grad = fastce.binary_cross_entropy_and_grad(logits, targets, reduction="none")
    np.testing.assert_array_equal(got_loss[1::3], np.full(20, loss))
    np.testing.assert_array_equal(got_grad[1::3].astype("f8"), np.full(20, gradient))
    assert np.isfinite(got_loss[::3]).all()
    assert np.isfinite(got_grad[::3].astype("f4")).all()


def test_zero_weight_at_an_infinite_loss():
    loss, grad = fastce.binary_cross_entropy_and_grad(
        np.array([-INF, 1.0]), np.array([1.0, 1.0]), weight=np.array([0.0, 1.0]), reduction="none"
    )
    assert loss[0] == 0
    assert grad[0] == 0


@pytest.mark.parametrize("dtype", ["bool", "int64", "uint8"])
def test_integer_and_bool_targets(dtype):
    logits, targets = draw((30,)), np.arange(30) % 2
    want = fastce.binary_cross_entropy_and_grad(logits, targets.astype("f4"))
    got = fastce.binary_cross_entropy_and_grad(logits, targets.astype(dtype))
    assert same_bits(got[0], want[0])
    assert same_bits(got[1], want[1])


@pytest.mark.parametrize("layout", ["Fortran", "strided", "reversed", "broadcast"])
def test_layouts_and_out(layout):
    z, t = draw((12, 10)), (draw((12, 10), seed=1) > 0).astype("f4")
    want = fastce.binary_cross_entropy_and_grad(z, t)
    lay = {
        "Fortran": np.asfortranarray,
        "strided": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
        "reversed": lambda a: a[::-1].copy()[::-1],
        "broadcast": lambda a: a,
    }[layout]
    targets = np.broadcast_to(t[:1], t.shape) if layout == "broadcast" else lay(t)
    if layout == "broadcast":
        want = fastce.binary_cross_entropy_and_grad(z, targets.copy())
    out = lay(np.zeros_like(z))
    loss, grad = fastce.binary_cross_entropy_and_grad(lay(z), targets, out=out)
    assert grad is out
    np.testing.assert_allclose(loss, want[0], rtol=1e-6)
    np.testing.assert_allclose(grad, want[1], rtol=1e-6)
    logits = z.copy()
    _, grad = fastce.binary_cross_entropy_and_grad(logits, t, out=logits)
    assert grad is logits
    assert same_bits(logits, fastce.binary_cross_entropy_and_grad(z, t)[1])


@pytest.mark.parametrize("shape", [(3, 50), (2, 70_001)])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_rows_that_lie_apart(shape, reduction):
    """Each with its own losses and upstream gradients, long ones in several pieces."""
    logits, padded = draw(shape, scale=3), draw((*shape[:1], shape[1] + 3), scale=3)[:, :-3]
    targets = (draw(shape, seed=1) > 0).astype("f4")
    rows = np.arange(1, len(logits) + 1, dtype="f4")[:, None]
    options = {"weight": rows / 4, "pos_weight": 2.0 + rows[::-1]}
    if reduction == "none":
        options["grad_output"] = draw(shape, seed=7)
    for z in (logits, padded):
        check(z, targets, reduction=reduction, **options)


def test_a_masked_element_counts_for_nothing():
    """Of weight zero, whatever its logit."""
    logits = np.array([NAN, INF, -INF, 1.0] * 20)
    weight = np.array([0.0, 0.0, 0.0, 1.0] * 20)
    for size in (80, 7):  # as many as vectors take, and some beside
        for target in (0.0, 1.0):
            loss, grad = fastce.binary_cross_entropy_and_grad(
                logits[:size], np.full(size, target), weight=weight[:size], reduction="none"
            )
            assert not loss[weight[:size] == 0].any()
            assert not grad[weight[:size] == 0].any()
            assert (grad[3::4] != 0).all()


def test_equals_the_two_class_form():
    z, y = draw((50,), np.float64, scale=5), np.arange(50) % 2
    binary = fastce.binary_cross_entropy(z, y, reduction="none")
    two = fastce.cross_entropy(np.stack([np.zeros(50), z], axis=-1), y, reduction="none")
    np.testing.assert_allclose(binary, two, rtol=1e-14)


def test_nothing_to_average():
    loss, grad = fastce.binary_cross_entropy_and_grad(np.empty(0), np.empty(0))
    assert np.isnan(loss)
    assert grad.shape == (0,)
    assert fastce.binary_cross_entropy(np.empty(0), np.empty(0), reduction="sum") == 0
