"""The binary form on a CUDA device, real or simulated, held to the tables of the CPU's."""

import numpy as np
import pytest

import fastce
from fastce import cuda
from tests import oracle
from tests.checks import FLOATS, assert_gradient, assert_loss, draw, same_bits
from tests.test_binary import LIMITS, OPTIONS
from tests.test_cuda_device import SIMULATED, _arrays, device, to_device, to_host  # noqa: F401

F32 = np.dtype(np.float32)


def run(logits, targets, *, out=None, **options):
    given = {name: device(np.asarray(v)) if np.ndim(v) else v for name, v in options.items()}
    loss, grad = fastce.binary_cross_entropy_and_grad(
        to_device(logits), to_device(targets), out=out, **given
    )
    return to_host(loss), to_host(grad)


def check(logits, targets, *, anywhere=False, **options):
    want = oracle.binary_cross_entropy(logits, targets, **options)
    loss, grad = run(logits, targets, **options)
    assert_loss(loss, want.loss, logits.dtype, anywhere=anywhere)
    assert_gradient(grad, want.grad, logits.dtype)
    return loss, grad


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (7, 3), (301,), (2, 3, 4, 5)], ids=str)
def test_every_dtype_and_shape(dtype, shape):
    logits = np.asarray(draw(shape, dtype, scale=3)) if shape else np.array(0.75, dtype)
    targets = np.asarray(np.random.default_rng(1).integers(0, 5, shape) / np.float32(4))
    for reduction in ("none", "sum", "mean"):
        loss, _ = check(logits, targets.astype(dtype), reduction=reduction)
        alone = fastce.binary_cross_entropy(
            to_device(logits), to_device(targets.astype(dtype)), reduction=reduction
        )
        assert same_bits(to_host(alone), loss)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_broadcast(option, dtype):
    logits = draw((40, 5), dtype, scale=2)
    targets = (draw((40, 5), seed=2) > 0).astype(dtype)
    check(logits, targets, grad_output=-3.0, **OPTIONS[option])
    upstream = draw((40, 5), dtype, seed=7)
    check(logits, targets, reduction="none", grad_output=upstream, **OPTIONS[option])


def test_upstream_gradient_without_axes_and_weights_of_other_dtypes():
    logits, targets = draw((9, 7), scale=2), (draw((9, 7), seed=2) > 0).astype("f4")
    up = np.array(-0.5, np.float64)
    options = {"weight": np.arange(7), "pos_weight": draw((9, 7), FLOATS[2], seed=3) ** 2}
    want = oracle.binary_cross_entropy(logits, targets, grad_output=up, **options)
    given = {name: to_device(value) for name, value in options.items()}
    _, grad = fastce.binary_cross_entropy_and_grad(
        to_device(logits), to_device(targets), grad_output=to_device(up), **given
    )
    assert_gradient(to_host(grad), want.grad, F32)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_confident_predictions_keep_their_digits(dtype):
    largest, count = 87 if dtype == "float32" else 708, 201 if SIMULATED else 100_001
    logits = np.linspace(-largest, largest, count).astype(dtype)
    for target in (0.0, 1.0):
        targets = np.full(count, target, dtype)
        loss, grad = check(logits, targets, reduction="none", anywhere=True)
        assert np.all(loss > 0)
        assert np.all(grad != 0)
    # a weight brings back what is below the smallest normal number
    far = np.array([-95.0, 110.0], dtype)
    check(far, np.array([0, 1], dtype), reduction="none", weight=1e12, anywhere=True)


def test_the_bound_holds_everywhere_between():
    """Closer than the contract asks of single numbers: at most four units in the last place."""
    logits = draw((800 if SIMULATED else 1_000_000,), scale=6)
    targets = np.random.default_rng(1).random(logits.shape).astype("f4")
    want = oracle.binary_cross_entropy(logits, targets, reduction="none")
    assert_loss(run(logits, targets, reduction="none")[0], want.loss, F32)
    targets = (targets > 0.5).astype("f4")
    want = oracle.binary_cross_entropy(logits, targets, reduction="none", pos_weight=3.0)
    assert_loss(run(logits, targets, reduction="none", pos_weight=3.0)[0], want.loss, F32)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_limits(dtype):
    logit, target, loss, gradient = (np.array(column) for column in zip(*LIMITS, strict=True))
    with np.errstate(over="ignore"):
        logits = np.repeat(logit, 3).astype(dtype)
    got_loss, got_grad = run(logits, np.repeat(target, 3).astype(dtype), reduction="none")
    np.testing.assert_array_equal(got_loss, np.repeat(loss, 3))
    np.testing.assert_array_equal(got_grad.astype("f8"), np.repeat(gradient, 3))
    nothing = np.zeros(len(logits), dtype)
    got_loss, got_grad = run(logits[:3], nothing[:3] + 1, weight=nothing[:3], reduction="none")
    assert not got_loss.any()
    assert not got_grad.any()


@pytest.mark.parametrize("target_dtype", ["bool", "int64", "uint8", "float64", FLOATS[3]], ids=str)
@pytest.mark.parametrize("dtype", ["float32", FLOATS[3]], ids=str)
def test_targets_of_every_kind(target_dtype, dtype):
    logits, targets = draw((203,), dtype), np.arange(203) % 2
    loss, grad = run(logits, targets.astype(target_dtype))
    same, same_grad = run(logits, targets.astype(dtype))
    assert same_bits(loss, same)
    assert same_bits(grad, same_grad)


LAYOUTS = {
    "Fortran": np.asfortranarray,
    "every other": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "shifted": lambda a: np.pad(a, ((0, 0), (1, 0)))[:, 1:],
    "one off": lambda a: np.concatenate([a[:1, :1].ravel(), a.ravel()])[1:].reshape(a.shape),
    "three axes that do not merge": lambda a: np.pad(a, ((0, 1), (0, 2)))[:-1, :-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """Also in place; what an element gets does not depend on where it lies."""
    lay = LAYOUTS[layout]
    shape = (3, 6, 7, 5) if "three" in layout else (21, 10)
    z, t = draw(shape), (draw(shape, seed=1) > 0).astype("f4")
    if "three" in layout:
        lay = lambda a: np.pad(a, ((0, 0), (0, 1), (0, 2), (0, 3)))[:, :-1, :-2, :-3]  # noqa: E731
    want, want_grad = run(z, t, reduction="none")
    loss, grad = run(lay(z), lay(t), reduction="none")
    assert same_bits(np.ascontiguousarray(loss), want)
    assert same_bits(np.ascontiguousarray(grad), want_grad)
    logits, weight = to_device(lay(z.copy())), to_device(np.arange(1, shape[-1] + 1, dtype="f4"))
    loss, grad = fastce.binary_cross_entropy_and_grad(
        logits, to_device(lay(t)), out=logits, reduction="sum", pos_weight=weight
    )
    assert grad is logits
    expected = oracle.binary_cross_entropy(
        z, t, reduction="sum", pos_weight=np.arange(1, shape[-1] + 1, dtype="f4")
    )
    assert_loss(to_host(loss), expected.loss, F32)
    assert_gradient(np.ascontiguousarray(to_host(grad)), expected.grad, F32)


def test_the_sum_does_not_depend_on_alignment():
    z, t = draw((700,), FLOATS[3], scale=4), draw((700,), FLOATS[3], seed=1)
    want, _ = run(z, t)
    moved = np.concatenate([z[:1], z])[1:]
    assert same_bits(run(moved, t)[0], want)


def test_nothing_to_average():
    loss, grad = run(np.empty(0), np.empty(0))
    assert np.isnan(loss)
    assert grad.shape == (0,)
    assert run(np.empty(0), np.empty(0), reduction="sum")[0] == 0


def _call(logits=None, targets=None, **options):
    logits = draw((3, 4)) if logits is None else logits
    targets = draw((3, 4)) if targets is None else targets
    options = {name: device(value) for name, value in options.items()}
    return cuda.binary_cross_entropy_and_grad(to_device(logits), to_device(targets), **options)


ERRORS = {
    "targets on the host": (
        TypeError, "targets: expected an array on CUDA device 0, that of logits, got ndarray",
        lambda: cuda.binary_cross_entropy(to_device(draw((3,))), draw((3,))),
    ),
    "integer logits": (TypeError, "logits: expected float64", lambda: _call(np.ones((3, 4), int))),
    "complex targets": (
        TypeError, "targets: expected float64", lambda: _call(None, np.ones((3, 4), complex))
    ),
    "shape of targets": (
        ValueError, r"targets: expected the shape of logits \(3, 4\), got \(4,\)",
        lambda: _call(None, draw((4,))),
    ),
    "shape of weight": (
        ValueError, r"weight: expected a shape that broadcasts to that of logits \(3, 4\)",
        lambda: _call(weight=draw((3,))),
    ),
    "shape of pos_weight": (
        ValueError, r"pos_weight: .*, got \(2, 3, 4\)", lambda: _call(pos_weight=draw((2, 3, 4)))
    ),
    "text for a weight": (TypeError, "weight: expected float64", lambda: _call(weight="1")),
    "reduction": (ValueError, "reduction", lambda: _call(reduction="avg")),
    "upstream with a mean": (ValueError, "grad_output", lambda: _call(grad_output=draw((3, 4)))),
    "dtype of out": (
        ValueError, "out: expected dtype float32", lambda: _call(out=np.zeros((3, 4), np.float64))
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    error, match, call = ERRORS[case]
    with pytest.raises(error, match=match):
        call()
