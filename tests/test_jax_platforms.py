"""What `fastce.jax` becomes on each platform: lowered here for machines that are elsewhere."""

import functools
import importlib.util
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.interpreters import mlir

import fastce.jax
from fastce import _jax_primitive as primitive
from tests import oracle
from tests.checks import (
    FLOATS,
    assert_gradient,
    assert_loss,
    draw,
    draw_soft,
    draw_targets,
    loss_dtype,
)

INF, NAN = np.inf, np.nan
needs_numba_cuda = pytest.mark.needs("test-cuda")


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


ON_CPU = f"{primitive.NAME}_and_grad_hard_float32"


def exported(function, *arguments, platforms):
    """StableHLO of a function for machines that need not be this one."""
    checks = [jax.export.DisabledSafetyCheck.custom_call(n) for n in (primitive.NAME, ON_CPU)]
    return jax.export.export(jax.jit(function), platforms=platforms, disabled_checks=checks)(
        *arguments
    ).mlir_module()


def calls(text):
    """Names, attributes, operands and results of the calls of kernels in StableHLO."""
    found = re.findall(
        r"custom_call @(fastce\w+)\(.*mhlo.backend_config = \{(.*?)\}.* : \((.*?)\) -> (.*?) loc",
        text,
    )
    return [
        (name, dict(re.findall(r"(\w+) = (\S+)", config)),
         *(re.findall(r"tensor<(\S+?)>", part) for part in (operands, results)))
        for name, config, operands, results in found
    ]  # fmt: skip


# With kernels on CUDA devices ---------------------------------------------------------------------

SHORT = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@pytest.fixture
def devices(monkeypatch):
    """The CUDA devices that JAX knows of, by their compute capabilities; and numba-cuda."""
    at_hand = []
    find = importlib.util.find_spec

    def local_devices(*, backend):
        assert backend == "cuda"
        if not at_hand:
            raise RuntimeError("Unknown backend cuda")
        return [SimpleNamespace(compute_capability=capability) for capability in at_hand]

    monkeypatch.setattr(jax, "local_devices", local_devices)
    monkeypatch.setattr(
        importlib.util, "find_spec",
        lambda name: find(name) if name != "numba_cuda" or at_hand != ["no package"] else None,
    )  # fmt: skip
    jax.clear_caches()
    yield at_hand
    jax.clear_caches()


@needs_numba_cuda
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("with_grad", [False, True])
def test_calls_of_the_kernels_on_cuda_devices(devices, dtype, soft, with_grad):
    logits = draw((3, 7, 4), dtype)
    labels = draw_soft((3, 7, 4), dtype) if soft else draw_targets((3, 4), 7)
    loss = functools.partial(
        fastce.jax.cross_entropy, axis=1, label_smoothing=0.25, z_loss=0.5, reduction="sum"
    )
    text = exported(
        jax.value_and_grad(loss) if with_grad else loss, logits, labels, platforms=["cuda"]
    )
    short, real = SHORT[dtype.name], SHORT[loss_dtype(dtype).name]
    operands = [f"3x7x4x{short}", f"3x7x4x{short}" if soft else "3x4xi32"]
    results = [f"3x4x{real}"]
    if with_grad:
        operands.append(f"3x4x{real}")
        results.append(f"3x7x4x{short}")
    attributes = {"label_smoothing": "2.500000e-01", "trailing": "1", "z_loss": "5.000000e-01"}
    assert calls(text) == [(primitive.NAME, attributes, operands, results)]
    row_order = r"operand_layouts = \[dense<\[2, 1, 0\]>.*result_layouts = \[dense<\[1, 0\]>"
    assert re.search(row_order, text)


@needs_numba_cuda
def test_vmap_is_one_call(devices):
    logits, labels = draw((5, 2, 9)), draw_targets((5, 2), 9)
    text = exported(
        jax.vmap(jax.grad(fastce.jax.cross_entropy), (0, None)), logits, labels[0],
        platforms=["cuda"],
    )  # fmt: skip
    ((_, _, operands, results),) = calls(text)
    assert operands == ["5x2x9xf32", "5x2xi32", "5x2xf32"]
    assert results == ["5x2xf32", "5x2x9xf32"]


@needs_numba_cuda
def test_one_program_for_both_platforms(devices):
    text = exported(
        jax.grad(fastce.jax.cross_entropy), draw((4, 7)), draw_targets((4,), 7),
        platforms=["cpu", "cuda", "tpu"],
    )  # fmt: skip
    names = {name for name, *_ in calls(text)}
    assert names == {primitive.NAME, ON_CPU}
    assert "exponential" in text  # for tpu


@needs_numba_cuda
@pytest.mark.parametrize(
    "at_hand, kernels",
    [(["9.0"], True), (["8.0", "12.0"], True), (["7.5"], False), (["9.0", "7.0"], False),
     (["no package"], False)],
)  # fmt: skip
def test_devices_that_have_kernels(devices, at_hand, kernels):
    """From compute capability 8.0 on, with the package; others have the formula, and no error."""
    devices[:] = at_hand
    text = exported(
        jax.grad(fastce.jax.cross_entropy), draw((4, 7)), draw_targets((4,), 7), platforms=["cuda"]
    )
    assert bool(calls(text)) == kernels
    assert ("exponential" in text) != kernels


# Without kernels ----------------------------------------------------------------------------------


@pytest.fixture
def without_kernels(monkeypatch):
    """This machine counts as one of those that have none."""
    mlir.register_lowering(primitive._rows, primitive._elsewhere, platform="cpu")
    jax.clear_caches()
    yield
    mlir.register_lowering(primitive._rows, primitive._by_kernels, platform="cpu")
    jax.clear_caches()


@pytest.mark.parametrize("platform", ["tpu", "rocm"])
@pytest.mark.parametrize("what", ["loss", "gradient", "soft", "optax"])
def test_every_platform_has_something(platform, what):
    logits, labels = draw((4, 7)), draw_targets((4,), 7)
    loss = fastce.jax.cross_entropy
    function, labels = {
        "loss": (loss, labels),
        "gradient": (jax.grad(loss), labels),
        "soft": (jax.vmap(jax.value_and_grad(loss)), draw_soft((4, 7))),
        "optax": (fastce.jax.softmax_cross_entropy_with_integer_labels, labels),
    }[what]
    text = exported(function, logits, labels, platforms=[platform])
    assert "@fastce" not in text
    assert "exponential" in text


OPTIONS = {
    "plain": {}, "ignored": {"ignore_index": 3}, "smoothing": {"label_smoothing": 0.2},
    "all": {"ignore_index": 3, "label_smoothing": 0.2, "z_loss": 0.01},
}  # fmt: skip


def check(logits, targets, *, anywhere=False, **options):
    """Both functions of the primitive in plain JAX, against the oracle."""
    want = oracle.cross_entropy(logits, targets, reduction="none", **options)
    loss = functools.partial(fastce.jax.cross_entropy, reduction="none", **options)
    z = jax.numpy.asarray(logits)
    losses, grad = jax.jit(
        lambda z: (loss(z, targets), jax.grad(lambda z: loss(z, targets).sum())(z))
    )(z)
    assert "@fastce" not in jax.jit(loss).lower(z, targets).as_text()
    assert_loss(np.asarray(losses), want.loss, logits.dtype, anywhere=anywhere)
    assert_gradient(np.asarray(grad), want.grad, logits.dtype)
    return losses, grad


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_the_formula_is_as_accurate(without_kernels, dtype, option):
    for shape, axis in (((5, 9), -1), ((3, 300, 2), 1)):
        rows = tuple(np.delete(shape, axis))
        logits, options = draw(shape, dtype, scale=2.0), {"axis": axis, **OPTIONS[option]}
        check(logits, draw_targets(rows, shape[axis]), **options)
        if option != "ignored":
            options.pop("ignore_index", None)
            check(logits, draw_soft(shape, dtype, axis=axis), **options)


@pytest.mark.parametrize("lead", [5.0, 25.0, 60.0])
def test_the_formula_keeps_digits_in_confident_rows(without_kernels, lead):
    """Not all of them: exponentials and logarithms are as good as XLA's."""
    logits = draw((20, 30), scale=2.0)
    logits[:, 4] = logits.max() + lead
    check(logits, np.full(20, 4), anywhere=True)


def test_special_values_of_the_formula(without_kernels):
    logits = draw((9, 5))
    targets = np.full(9, 1)
    logits[0, 0], logits[1, 2], logits[2, 1], logits[3] = NAN, INF, INF, -INF
    logits[4, 1] = logits[5, 0] = logits[5, -1] = -INF
    logits[6], targets[6] = NAN, -100
    logits[7, :4] = -INF
    for options in ({}, {"label_smoothing": 0.1}, {"z_loss": 0.1}):
        losses, grad = check(logits, targets, **options)
    assert np.isnan(losses[:4]).all()
    targets[8] = 5
    losses, grad = jax.value_and_grad(
        lambda z: fastce.jax.cross_entropy(z[6:], targets[6:], reduction="sum")
    )(jax.numpy.asarray(logits))
    assert np.isnan(losses)
    assert np.isnan(grad[8]).all()
    assert not np.asarray(grad[6]).any()
    assert loss_dtype(np.float32) == losses.dtype


def test_no_rows_without_kernels(without_kernels):
    loss, grad = jax.value_and_grad(fastce.jax.cross_entropy)(
        jax.numpy.zeros((0, 3)), jax.numpy.zeros(0, int)
    )
    assert np.isnan(loss)
    assert grad.shape == (0, 3)
