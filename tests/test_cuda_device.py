"""The contract on a CUDA device: a real one where there is one, else numba's simulator of one.

``python -m pytest tests/test_cuda_device.py`` runs all of it on the card at hand, with PyTorch's
tensors; with NUMBA_ENABLE_CUDASIM=1 in the environment, and ``-n 0``, in the simulator, for which
launch parameters are small enough that every regime comes with a few hundred classes.
"""

import importlib.util
import os
import re
from pathlib import Path

import numpy as np
import pytest

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


def _torch_has_one() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


if not SIMULATED and not _torch_has_one():
    pytest.skip("there is no CUDA device", allow_module_level=True)

if SIMULATED:
    from fastce.cuda import simulated_driver
    from tests.cuda_simulator import forget_arrays, to_device, to_host
else:
    from tests.cuda_torch import forget_arrays, to_device, to_host

import fastce  # noqa: E402
from fastce import cuda  # noqa: E402
from tests import oracle  # noqa: E402
from tests.checks import (  # noqa: E402
    FLOATS,
    ONE_CLASS,
    assert_close,
    assert_gradient,
    assert_loss,
    draw,
    draw_soft,
    draw_targets,
    draw_weight,
    labels_on_one_class,
    loss_dtype,
    same_bits,
)
from tests.test_cross_entropy import INTEGERS, OPTIONS  # noqa: E402

F32 = np.dtype(np.float32)
INF, NAN = np.inf, np.nan

# Bytes of a row for each regime: of the simulator's table, or of the real one.
REGIMES = (
    {"tile": 40, "lanes": 140, "registers": 300, "warps": 604, "shared": 1076,
     "cluster": 1684, "memory": 2620}
    if SIMULATED
    else {"tile": 40, "lanes": 1004, "registers": 4000, "warps": 16388, "blocks": 65540,
          "shared": 100_012, "cluster": 400_012, "wide cluster": 1_500_012, "memory": 5_000_012}
)  # fmt: skip
ROWS = 3 if SIMULATED else 200


@pytest.fixture(autouse=True)
def _arrays():
    forget_arrays()


def classes_of(regime, dtype):
    return REGIMES[regime] // dtype.itemsize


def device(value):
    return to_device(value) if isinstance(value, np.ndarray) and value.ndim else value


def run(logits, targets, *, alone=not SIMULATED, in_place=False, out=None, **options):
    """Loss and gradient on the device; the loss `alone` has the same bits."""
    given = {name: device(value) for name, value in options.items()}
    z, y = to_device(logits.copy() if in_place else logits), to_device(np.asarray(targets))
    out = z if in_place else out
    loss, grad = fastce.cross_entropy_and_grad(z, y, out=out, **given)
    assert out is None or grad is out
    loss, grad = to_host(loss), to_host(grad)
    given.pop("grad_output", None)
    if alone:
        assert same_bits(to_host(fastce.cross_entropy(to_device(logits), y, **given)), loss)
    return loss, grad


def check(logits, targets, *, anywhere=False, alone=not SIMULATED, **options):
    want = oracle.cross_entropy(logits, targets, **options)
    loss, grad = run(logits, targets, alone=alone, **options)
    assert_loss(loss, want.loss, logits.dtype, anywhere=anywhere)
    assert_gradient(grad, want.grad, logits.dtype)
    return loss, grad


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_every_dtype_in_every_regime(dtype, regime):
    classes = classes_of(regime, dtype)
    logits, targets = draw((ROWS, classes), dtype, scale=1.5), draw_targets((ROWS,), classes)
    targets[1] = -100
    loss, grad = check(logits, targets, reduction="none", alone=True)
    one, its_grad = run(logits[2:3].copy(), targets[2:3], reduction="none")
    assert same_bits(one[0], loss[2])
    assert same_bits(its_grad[0], grad[2])
    _, in_place = run(logits, targets, in_place=True, reduction="none")
    assert same_bits(in_place, grad)


OPTION_REGIMES = ["tile", "lanes", "shared", "cluster"] if SIMULATED else list(REGIMES)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("regime", OPTION_REGIMES)
def test_every_option(option, regime):
    rows, classes = (ROWS,), classes_of(regime, F32)
    targets, options = OPTIONS[option](rows, classes, F32)
    options.pop("normalizer", None)
    alone = regime == "tile"
    check(draw((*rows, classes), scale=1.5), targets, reduction="none", alone=alone, **options)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_option_with_every_reduction(option, reduction):
    rows, classes = (26,), 5  # several parts of a sum
    targets, options = OPTIONS[option](rows, classes, np.float64)
    if reduction == "sum":
        options.pop("normalizer", None)
    logits = draw((*rows, classes), np.float64, scale=1.5)
    check(logits, targets, reduction=reduction, grad_output=-2.5, **options)


@pytest.mark.parametrize("regime", ["tile", "lanes", "warps"])
@pytest.mark.parametrize("upstream", ["number", "without axes", "per row"])
def test_upstream_gradient(regime, upstream):
    classes = classes_of(regime, F32)
    targets, options = OPTIONS["smoothing, weight, ignored"]((ROWS,), classes, F32)
    factor = {"number": 3.0, "without axes": np.array(-0.5, np.float32)}.get(upstream)
    factor = draw((ROWS,), seed=9) if factor is None else factor
    reduction = "none" if upstream == "per row" else "mean"
    logits = draw((ROWS, classes), scale=1.5)
    want = oracle.cross_entropy(logits, targets, grad_output=factor, reduction=reduction, **options)
    z, y, weight = to_device(logits), to_device(targets), to_device(options.pop("weight"))
    given = factor if upstream == "number" else to_device(factor)
    loss, grad = cuda.cross_entropy_and_grad(
        z, y, weight=weight, grad_output=given, reduction=reduction, **options
    )
    assert_loss(to_host(loss), want.loss, F32)
    assert_gradient(to_host(grad), want.grad, F32)


@pytest.mark.parametrize(
    "lead, offset", [(0.0, 1e4), (5.0, 0.0), (9.9, 1e4), (25.0, 0.0), (60.0, 1e4)]
)
@pytest.mark.parametrize("regime", ["tile", "lanes", "memory"])
def test_confident_rows(lead, regime, offset):
    classes = classes_of(regime, F32)
    logits = draw((ROWS, classes), scale=2.0)
    logits[:, 4] = logits.max() + lead
    check(logits + np.float32(offset), np.full(ROWS, 4), anywhere=lead >= 9.9, reduction="none")


@pytest.mark.parametrize("laid", ONE_CLASS)
@pytest.mark.parametrize("regime", OPTION_REGIMES)
def test_all_that_labels_lay_on_the_maximum(regime, laid):
    classes = classes_of(regime, F32)
    logits = draw((ROWS, classes)) - np.float32(30)
    logits[:, classes // 2] += 60
    targets, options = labels_on_one_class(ROWS, classes, classes // 2, F32)[laid]
    check(logits, targets, anywhere=True, reduction="sum", **options)
    if laid == "soft":
        check(logits, targets, anywhere=True, reduction="none", softcap=50.0, z_loss=0.01)


@pytest.mark.parametrize("regime", REGIMES)
def test_special_values(regime):
    classes = classes_of(regime, F32)
    logits = draw((8, classes))
    targets = np.full(8, 1)
    logits[0, 0], logits[1, 2], logits[2, 1], logits[3] = NAN, INF, INF, -INF
    logits[4, 1] = logits[5, 0] = logits[5, -1] = -INF
    logits[6], targets[6] = NAN, -100
    logits[7, : classes - 1] = -INF
    loss, grad = check(logits, targets, reduction="none")
    assert np.isnan(loss[:4]).all()
    assert loss[4] == INF
    assert not grad[6].any()
    assert not grad[5, [0, -1]].any()
    if regime in ("tile", "lanes") or not SIMULATED:
        for options in ({"label_smoothing": 0.1}, {"softcap": 5.0}, {"z_loss": 0.1}):
            check(logits, targets, reduction="none", **options)


@pytest.mark.parametrize("regime", ["tile", "lanes", "warps"])
def test_a_bad_target_is_reported_later(regime):
    classes = classes_of(regime, F32)
    logits = draw((2, ROWS, classes))
    targets = draw_targets((2, ROWS), classes)
    targets[1, 1], targets[1, 2] = classes, -7
    z, y = to_device(logits), to_device(targets)
    loss, grad = cuda.cross_entropy_and_grad(z, y, reduction="none")
    match = rf"targets: expected integers in \[0, {classes}\) .*, got {classes} at index \(1, 1\)"
    with pytest.raises(IndexError, match=match):
        cuda.synchronize()
    cuda.synchronize()  # once is enough
    loss, grad = to_host(loss), to_host(grad)
    assert np.isnan(loss[1, 1:3]).all()
    assert np.isnan(grad[1, 1:3]).all()
    good = np.ones((2, ROWS), bool)
    good[1, 1:3] = False
    want = oracle.cross_entropy(logits, np.where(good, targets, -100), reduction="none")
    assert_loss(np.where(good, loss, np.float32(0)), want.loss, F32)
    cuda.cross_entropy(to_device(logits), y)
    if not SIMULATED:
        import torch

        torch.cuda.synchronize()
    with pytest.raises(IndexError, match="targets"):
        cuda.cross_entropy(to_device(logits), to_device(np.zeros((2, ROWS), int)))


def test_the_first_of_several_bad_targets_is_named():
    targets = np.zeros(30, int)
    targets[[3, 11, 15, 29]] = -1, -2, -3, -4  # one thread's, its part's, and another part's
    cuda.cross_entropy(to_device(draw((30, 2))), to_device(targets))
    with pytest.raises(IndexError, match=r"got -1 at index \(3,\)"):
        cuda.synchronize()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing_counts(dtype):
    logits, targets = draw((3, 5), dtype), np.full(3, -100)
    for reduction, want in (("mean", NAN), ("sum", 0), ("none", np.zeros(3))):
        loss, grad = run(logits, targets, reduction=reduction, z_loss=0.1)
        np.testing.assert_array_equal(loss, want)
        assert not grad.any()
    empty, nobody = np.empty((0, 5), dtype), np.empty(0, np.int64)
    for reduction, want in (("mean", NAN), ("sum", 0), ("none", np.empty(0))):
        loss, grad = run(empty, nobody, reduction=reduction)
        np.testing.assert_array_equal(loss, want)
        assert grad.shape == (0, 5)
    loss, grad = run(logits, np.array([0, 1, 2]), weight=np.zeros(5, dtype))
    assert np.isnan(loss)
    assert not grad.any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_class(dtype):
    logits = draw((5, 1), dtype)
    for targets in (np.zeros(5, int), draw((5, 1), dtype, seed=3)):
        for options in ({}, {"label_smoothing": 0.1}):
            loss, grad = run(logits, targets, reduction="none", **options)
            assert not loss.any()
            assert not grad.any()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_integer_dtype_of_targets(dtype):
    check(draw((6, 6)), draw_targets((6,), 6, dtype), ignore_index=2)


@pytest.mark.parametrize("soft_dtype", FLOATS, ids=str)
def test_soft_targets_of_every_float_dtype(soft_dtype):
    soft = draw_soft((4, 6), soft_dtype).astype(np.float32).astype(soft_dtype)
    check(draw((4, 6)), soft, reduction="none")


LAYOUTS = {
    "class axis first": ((11, 5), 0, lambda a: a),
    "class axis in the middle": ((2, 11, 3), 1, lambda a: a),
    "shifted rows": ((2, 3, 21), -1, lambda a: a[:, :-1]),
    "every other row": ((5, 21), -1, lambda a: a[::2]),
    "every other class": ((4, 40), -1, lambda a: a[:, ::2]),
    "backwards": ((4, 35), -1, lambda a: a[::-1, ::-1]),
    "one off": ((4, 22), -1, lambda a: a[:, 1:]),
    "four dimensions": ((2, 3, 4, 5), 2, lambda a: a[:, ::2]),
    "broadcast rows": ((1, 35), -1, lambda a: np.broadcast_to(a, (3, 35))),
    "a row": ((35,), 0, lambda a: a),
    "many rows": ((45, 3), -1, lambda a: a),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_layouts(layout, kind):
    shape, axis, view = LAYOUTS[layout]
    if not SIMULATED and "backwards" in layout:
        pytest.skip("PyTorch has no negative strides")
    logits = view(draw(shape, scale=1.5))
    rows = tuple(np.delete(logits.shape, axis))
    classes = logits.shape[axis]
    targets = draw_targets(rows, classes) if kind == "hard" else view(draw_soft(shape, axis=axis))
    loss, grad = check(logits, targets, axis=axis, reduction="none")
    if "broadcast" in layout:
        return
    out = view(np.zeros(shape, np.float32))
    _, given = run(logits, targets, axis=axis, reduction="none", out=to_device(out))
    assert same_bits(np.ascontiguousarray(given), np.ascontiguousarray(grad))
    straight = run(np.ascontiguousarray(np.moveaxis(logits, axis, -1)),
                   targets if kind == "hard" else np.moveaxis(targets, axis, -1),
                   reduction="none")  # fmt: skip
    assert same_bits(straight[0], loss)


@pytest.mark.parametrize(
    "classes, option, dtype",
    [
        (61, "z-loss", F32), (21, "smoothing", FLOATS[0]), (21, "softcap", F32), (21, "soft", F32),
        (421 if SIMULATED else 100_003, "soft", F32),  # a cluster's
    ],
)  # fmt: skip
def test_same_bits_at_every_place(classes, option, dtype):
    """Odd rows start at every alignment."""
    targets, options = OPTIONS[option]((3,), classes, dtype)
    logits = np.repeat(draw((3, classes), dtype, scale=3.0), 4, axis=0)
    loss, grad = run(logits, np.repeat(targets, 4, axis=0), reduction="none", **options)
    for row in range(12):
        assert same_bits(loss[row], loss[row - row % 4])
        assert same_bits(grad[row], grad[row - row % 4])


@pytest.mark.skipif(not SIMULATED, reason="a device has clusters or not")
def test_same_bits_without_clusters(monkeypatch):
    logits, targets = draw((3, 421), scale=3.0), draw_targets((3,), 421)
    with_clusters = run(logits, targets, reduction="none")
    limits = simulated_driver.Device.limits
    monkeypatch.setattr(simulated_driver.Device, "limits", limits._replace(cluster=1))
    assert all(map(same_bits, run(logits, targets, reduction="none"), with_clusters))


@pytest.mark.parametrize(
    "regime, dtype",
    [*((regime, F32) for regime in REGIMES), ("tile", FLOATS[0]), ("lanes", FLOATS[3])],
)
def test_stats(regime, dtype):
    classes = classes_of(regime, dtype)
    logits = draw((ROWS, classes), dtype, scale=2.0)
    logits[0, [2, classes - 2]] = 9.0  # the first of equal maxima
    targets = draw_targets((ROWS,), classes)
    targets[1] = -100
    weight = draw_weight(classes, loss_dtype(dtype))
    got = fastce.cross_entropy_stats(
        to_device(logits), to_device(targets), weight=to_device(weight)
    )
    want = oracle.cross_entropy_stats(logits, targets, weight=weight)
    assert_loss(to_host(got.loss), want.loss, dtype)
    assert_loss(to_host(got.lse), want.lse, dtype)
    assert_close(to_host(got.entropy), want.entropy, 1e-13 if dtype.itemsize == 8 else 4e-6)
    np.testing.assert_array_equal(to_host(got.predicted), want.predicted)
    assert float(to_host(got.total_weight)) == float(want.total_weight)


def test_stats_of_soft_targets():
    logits, soft = draw((4, 7)), draw_soft((4, 7))
    got = fastce.cross_entropy_stats(to_device(logits), to_device(soft))
    want = oracle.cross_entropy_stats(logits, soft)
    assert_loss(to_host(got.loss), want.loss, F32)
    assert float(to_host(got.total_weight)) == 4.0


@pytest.mark.parametrize("regime", ["tile", "lanes", "shared"])
@pytest.mark.parametrize("dtype", [FLOATS[0], FLOATS[1], FLOATS[2]], ids=str)
def test_softmax_and_its_logarithms(regime, dtype):
    classes = classes_of(regime, dtype)
    x = draw((ROWS, classes), dtype, scale=3.0)
    x[0, 1], x[1] = -INF, -INF
    got = to_host(fastce.logsumexp(to_device(x)))
    assert_loss(got, oracle.logsumexp(x), dtype)
    kept = to_host(fastce.logsumexp(to_device(x), axis=0, keepdims=True))
    assert_loss(kept, oracle.logsumexp(x, axis=0, keepdims=True), dtype)
    assert_gradient(to_host(fastce.softmax(to_device(x))), oracle.softmax(x), dtype)
    assert_gradient(to_host(fastce.log_softmax(to_device(x))), oracle.log_softmax(x), dtype)
    z = to_device(x.copy())
    assert fastce.softmax(z, out=z) is z
    assert_gradient(to_host(z), oracle.softmax(x), dtype)


def _call(logits=None, targets=None, **options):
    logits = draw((3, 4)) if logits is None else logits
    targets = np.array([0, 1, 2]) if targets is None else targets
    options = {name: device(value) for name, value in options.items()}
    return cuda.cross_entropy_and_grad(to_device(logits), to_device(targets), **options)


ERRORS = {
    "logits on the host": (
        TypeError, "logits: expected an array on a CUDA device, got ndarray",
        lambda: cuda.cross_entropy(draw((3, 4)), np.array([0, 1, 2])),
    ),
    "targets on the host": (
        TypeError, "targets: expected an array on CUDA device 0, that of logits, got list",
        lambda: cuda.cross_entropy(to_device(draw((3, 4))), [0, 1, 2]),
    ),
    "integer logits": (TypeError, "logits: expected float64", lambda: _call(np.ones((3, 4), int))),
    "bool targets": (
        TypeError, "targets: expected integers", lambda: _call(None, np.ones(3, bool))
    ),
    "shape of targets": (
        ValueError, r"targets: expected shape \(3,\)", lambda: _call(None, np.ones(4, int))
    ),
    "no classes": (ValueError, "at least one class", lambda: _call(draw((3, 0)))),
    "axis": (ValueError, "axis", lambda: _call(axis=2)),
    "shape of weight": (
        ValueError, r"weight: expected shape \(4,\)", lambda: _call(weight=draw(3))
    ),
    "integer weight": (
        TypeError, "weight: expected float64", lambda: _call(weight=np.ones(4, int))
    ),
    "smoothing": (ValueError, "label_smoothing", lambda: _call(label_smoothing=2.0)),
    "softcap": (ValueError, "softcap", lambda: _call(softcap=-1.0)),
    "reduction": (ValueError, "reduction", lambda: _call(reduction="avg")),
    "upstream with a mean": (ValueError, "grad_output", lambda: _call(grad_output=draw(3))),
    "dtype of out": (
        ValueError, "out: expected dtype float32", lambda: _call(out=np.zeros((3, 4), np.float64))
    ),
    "shape of out": (
        ValueError, r"out: expected shape \(3, 4\)", lambda: _call(out=np.zeros((3, 5), np.float32))
    ),
    "elements of out": (
        ValueError, "out: expected every element in a place of its own",
        lambda: _call(out=np.broadcast_to(np.zeros(4, np.float32), (3, 4)).view()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    error, match, call = ERRORS[case]
    if case == "elements of out":
        match += "|read-only"
    with pytest.raises(error, match=match):
        call()


def test_out_that_overlaps():
    memory = np.zeros(16, np.float32)
    logits, out = to_device(memory[:12].reshape(3, 4)), to_device(memory[4:].reshape(3, 4))
    with pytest.raises(ValueError, match="out: expected the memory of logits itself"):
        cuda.cross_entropy_and_grad(logits, to_device(np.zeros(3, int)), out=out)


def test_device_functions_in_a_kernel_of_ones_own():
    from numba import cuda as numba_cuda

    from tests.cuda_user import losses_of_rows

    logits, targets = draw((5, 7), scale=2.0), draw_targets((5,), 7)
    logits[0, 6], logits[1, 0], logits[2, targets[2]] = -INF, -INF, 40.0
    losses = np.empty(5)
    numba_cuda.jit(losses_of_rows)[1, 8](logits, targets, losses)
    want = oracle.cross_entropy(logits, targets, reduction="none")
    assert_close(losses, want.loss, 1e-14)


def test_every_option_in_a_kernel_of_ones_own():
    from numba import cuda as numba_cuda

    from tests.cuda_user import gradients_of_rows

    logits, targets = draw((5, 7), np.float64, scale=4.0), draw_targets((5,), 7)
    logits[0, 6], logits[2, targets[2]] = 60.0, 40.0
    weight = draw_weight(7, np.float64)
    losses, grad = np.empty(5), np.empty((5, 7))
    numba_cuda.jit(gradients_of_rows)[1, 8](logits, targets, weight, 0.1, 0.01, 30.0, losses, grad)
    want = oracle.cross_entropy(
        logits, targets, weight=weight, label_smoothing=0.1, z_loss=0.01, softcap=30.0,
        reduction="none",
    )  # fmt: skip
    assert_close(losses, want.loss, 1e-13)
    assert_close(grad, want.grad, 1e-12)


@pytest.mark.skipif(SIMULATED, reason="the page speaks of a real device")
def test_the_page_runs():
    page = (Path(__file__).parents[1] / "docs" / "cuda.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        exec(block, {})
