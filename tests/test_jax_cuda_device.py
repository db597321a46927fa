"""`fastce.jax` on a CUDA device: a real one, or in its place JAX's own CPU and numba's simulator.

As `test_cuda_device.py` is run: on the card at hand, for which JAX needs its CUDA plugin; or with
NUMBA_ENABLE_CUDASIM=1.  Then XLA calls the handler for CUDA devices with arrays of the host, and
what that launches runs in the simulator: all is real but XLA's stream and the driver.
"""

import contextlib
import ctypes
import functools
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.interpreters import mlir

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


def _why_not():
    try:
        jax.devices("cpu" if SIMULATED else "cuda")
    except RuntimeError:
        return "JAX has no CUDA device, which takes a card and the package jax[cuda12] or later"
    return ""


if reason := _why_not():
    pytest.skip(reason, allow_module_level=True)

if SIMULATED:
    import tests.cuda_simulator  # noqa: F401 (small launch parameters)
    from fastce.cuda import simulated, simulated_driver

import fastce.jax  # noqa: E402
from fastce import _jax_primitive as primitive  # noqa: E402
from fastce.cuda import kernels  # noqa: E402
from tests import oracle, xla_frames  # noqa: E402
from tests.checks import (  # noqa: E402
    FLOATS,
    assert_gradient,
    assert_loss,
    draw,
    draw_soft,
    draw_targets,
)

INF, NAN = np.inf, np.nan
F32 = np.dtype(np.float32)
STREAM = 0x57
# Bytes of a row for each regime, as in `test_cuda_device`.
REGIMES = (
    {"tile": 40, "lanes": 140, "warps": 604, "shared": 1076, "cluster": 1684}
    if SIMULATED
    else {"tile": 40, "lanes": 1004, "warps": 16388, "blocks": 65540, "shared": 100_012,
          "cluster": 400_012, "wide cluster": 1_500_012}
)  # fmt: skip
ROWS = 3 if SIMULATED else 200


class Simulated:
    """The driver and XLA, where they are not real."""

    def __init__(self, patch):
        from fastce.cuda import xla

        self.driver = xla_frames.Driver(self.run)
        self.kernels, self.launched = [], 0
        names = {
            "context": 7, "function": lambda device, kernel: self.handle_of(kernel),
            "entry": lambda device, name: self.driver.entry(name),
            "failure": lambda device, status: RuntimeError(f"CUDA_ERROR_{status}"),
            "while_recording": lambda device: contextlib.nullcontext(),
        }  # fmt: skip
        for name, value in names.items():
            patch.setattr(simulated_driver.Device, name, value, raising=False)
        patch.setattr(simulated, "memory", None)  # nothing is known of XLA's
        self.handler = xla_frames.Function(xla.handler().address)
        self.of_xla = xla_frames.table(stream=STREAM)
        self.trampoline = xla_frames.Function(self.call)
        address = ctypes.cast(self.trampoline, ctypes.c_void_p).value
        jax.ffi.register_ffi_target(primitive.NAME, primitive._capsule(address), platform="cpu")
        mlir.register_lowering(primitive._kernels, primitive._on_cuda, platform="cpu")

    def handle_of(self, kernel):
        if kernel not in self.kernels:
            self.kernels.append(kernel)
        return 1 + self.kernels.index(kernel)

    def call(self, address):
        """Call the handler with XLA's own frame, but for the stream, which CPUs have none of."""
        given = xla_frames.Frame.from_address(address)
        if given.more:
            return self.handler(address)
        frame = xla_frames.Frame.from_buffer_copy(given)
        api = xla_frames.Api.from_buffer_copy(xla_frames.Api.from_address(given.api))
        get_stream = xla_frames.Function(self.get_stream)
        api.Stream_Get = ctypes.cast(get_stream, ctypes.c_void_p)
        frame.api = ctypes.addressof(api)
        return self.handler(ctypes.addressof(frame))

    def get_stream(self, where):
        xla_frames.Got.from_address(where).value = STREAM

    def run(self, launch):
        assert launch.stream == STREAM
        kernel = self.kernels[launch.function - 1]
        of = kernels.source(kernel)
        assert launch.block == of.block
        numbers = struct.unpack(f"{of.integers}q{of.floats}d", launch.arguments)
        self.launched += 1
        simulated_driver.device(0).launch(
            kernel, launch.grid, launch.shared, STREAM, numbers[: of.integers],
            numbers[of.integers :], launch.cluster,
        )  # fmt: skip


@pytest.fixture(scope="module")
def machine():
    if not SIMULATED:
        yield None
        return
    with pytest.MonkeyPatch.context() as patch:
        yield Simulated(patch)
        mlir.register_lowering(primitive._kernels, primitive._on_cpu, platform="cpu")


@pytest.fixture(autouse=True)
def _double(machine):
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu" if SIMULATED else "cuda")[0]):
        yield


def run(logits, targets, **options):
    """Losses and gradients of rows under `jit`, by the kernels."""
    loss = functools.partial(fastce.jax.cross_entropy, reduction="none", **options)

    @jax.jit
    def both(z, y):
        return loss(z, y), jax.grad(lambda z: loss(z, y).sum())(z)

    z, y = jnp.asarray(logits), jnp.asarray(targets)
    assert both.lower(z, y).as_text().count(f"@{primitive.NAME}(") == 2
    return tuple(map(np.asarray, both(z, y)))


def check(logits, targets, *, anywhere=False, **options):
    want = oracle.cross_entropy(logits, targets, reduction="none", **options)
    losses, grad = run(logits, targets, **options)
    assert_loss(losses, want.loss, logits.dtype, anywhere=anywhere)
    assert_gradient(grad, want.grad, logits.dtype)
    return losses, grad


@pytest.mark.parametrize(
    "regime, dtype",
    [
        (regime, dtype)
        for regime in REGIMES
        for dtype in FLOATS
        # in the simulator the kernels are tested elsewhere
        if not SIMULATED or dtype == F32 or regime in ("tile", "lanes")
    ],
    ids=str,
)
def test_every_dtype_in_every_regime(machine, regime, dtype):
    before = machine.launched if SIMULATED else 0
    classes = REGIMES[regime] // dtype.itemsize
    targets = draw_targets((ROWS,), classes)
    targets[1] = -100
    check(draw((ROWS, classes), dtype, scale=1.5), targets)
    assert not SIMULATED or machine.launched == before + 2


OPTIONS = {
    "ignored": {"ignore_index": 3}, "smoothing": {"label_smoothing": 0.2},
    "z-loss": {"z_loss": 0.01},
    "all": {"ignore_index": 3, "label_smoothing": 0.2, "z_loss": 0.01},
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape, axis", [((4, 9), -1), ((9, 4), 0), ((2, 7, 3, 2), 1)])
def test_options_and_axes(option, shape, axis):
    rows, options = tuple(np.delete(shape, axis)), OPTIONS[option]
    logits = draw(shape, scale=1.5)
    check(logits, draw_targets(rows, shape[axis], np.int32), axis=axis, **options)
    if "ignore_index" not in options:
        check(logits, draw_soft(shape, axis=axis), axis=axis, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(reduction):
    logits, targets = draw((7, 6), np.float64), draw_targets((7,), 6)
    targets[2] = -100
    want = oracle.cross_entropy(logits, targets, reduction=reduction)
    loss = functools.partial(fastce.jax.cross_entropy, reduction=reduction)
    got, grad = jax.jit(jax.value_and_grad(loss))(jnp.asarray(logits), jnp.asarray(targets))
    np.testing.assert_allclose(got, want.loss.value.astype(float), rtol=1e-14)
    np.testing.assert_allclose(grad, want.grad.value.astype(float), rtol=1e-12)


def test_special_values():
    logits = draw((9, 5))
    targets = np.full(9, 1)
    logits[0, 0], logits[1, 2], logits[2, 1], logits[3] = NAN, INF, INF, -INF
    logits[4, 1] = logits[5, 0] = logits[5, -1] = -INF
    logits[6], targets[6] = NAN, -100
    logits[7, :4] = -INF
    losses, grad = check(logits, targets)
    assert np.isnan(losses[:4]).all()
    assert not grad[6].any()


@pytest.mark.parametrize("dtype", [np.int8, np.uint64])
def test_targets_that_are_no_class_give_nan(dtype):
    targets = np.array([3, 10, np.iinfo(dtype).max, np.iinfo(dtype).min], object).astype(dtype)
    losses, grad = run(draw((4, 10)), targets)
    bad = np.array([False, True, True, dtype == np.int8])
    np.testing.assert_array_equal(np.isnan(losses), bad)
    np.testing.assert_array_equal(np.isnan(grad), np.broadcast_to(bad[:, None], grad.shape))


def test_no_rows():
    losses, grad = run(draw((0, 5)), np.zeros(0, int))
    assert (losses.shape, grad.shape) == ((0,), (0, 5))


@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (1, 0)])
def test_vmap(in_axes):
    shape = (3, 4, 5) if in_axes[0] == 0 else (4, 3, 5)
    logits = draw(shape, np.float64)
    targets = draw_targets((3, 4) if in_axes[1] == 0 else (4,), 5)
    got = jax.vmap(jax.value_and_grad(fastce.jax.cross_entropy), in_axes)(logits, targets)
    for k in range(3):
        y = targets if in_axes[1] is None else targets[k]
        want = oracle.cross_entropy(logits.take(k, in_axes[0]), y)
        np.testing.assert_allclose(got[0][k], want.loss.value.astype(float), rtol=1e-14)
        np.testing.assert_allclose(got[1][k], want.grad.value.astype(float), rtol=1e-12)


def test_derivatives_of_every_kind():
    logits, targets = jnp.asarray(draw((4, 5), np.float64)), draw_targets((4,), 5)
    direction = draw((4, 5), np.float64, seed=5)
    loss = functools.partial(fastce.jax.cross_entropy, targets=targets, z_loss=0.01)

    def plain(z):
        lse = jax.nn.logsumexp(z, 1)
        return (lse - z[jnp.arange(4), targets] + 0.01 * lse**2).mean()

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(f, z):
        step = lambda c, z: (c + f(z), None)  # noqa: E731
        return (
            jax.jvp(f, (z,), (direction,)),
            jax.vjp(f, z)[1](2.5),
            jax.hessian(f)(z),
            jax.grad(lambda z: jax.lax.scan(step, 0.0, jnp.stack([z, 2 * z]))[0])(z),
            jax.grad(jax.checkpoint(f))(z),
        )

    ours, theirs = (jax.tree.leaves(derivatives(f, logits)) for f in (loss, plain))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


def test_the_twins_of_optax():
    logits, labels = jnp.asarray(draw((4, 6), np.float64)), jnp.asarray(draw_targets((4,), 6))
    soft = jnp.asarray(draw_soft((4, 6), np.float64))
    for name, given in (
        ("softmax_cross_entropy_with_integer_labels", labels), ("softmax_cross_entropy", soft)
    ):  # fmt: skip
        ours, theirs = (
            jax.jit(jax.value_and_grad(lambda z, y, f=f: f(z, y).sum()))(logits, given)
            for f in (getattr(fastce.jax, name), getattr(optax, name))
        )
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


def test_new_values_each_time():
    """A program that is kept and called again, as in training."""
    both = jax.jit(jax.value_and_grad(fastce.jax.cross_entropy))
    for seed in range(4):
        logits, targets = draw((5, 9), seed=seed), draw_targets((5,), 9, seed=seed)
        want = oracle.cross_entropy(logits, targets)
        loss, grad = both(logits, targets)
        assert_loss(np.asarray(loss), want.loss, F32)
        assert_gradient(np.asarray(grad), want.grad, F32)


@pytest.mark.skipif(not SIMULATED, reason="a real driver cannot be made to fail")
def test_errors_of_the_driver_are_those_of_jax(machine):
    machine.driver.status["cuLaunchKernelEx"] = 719
    try:
        with pytest.raises(jax.errors.JaxRuntimeError, match="CUDA_ERROR_719"):
            jax.block_until_ready(jax.jit(fastce.jax.cross_entropy)(draw((4, 6)), np.zeros(4, int)))
    finally:
        machine.driver.status["cuLaunchKernelEx"] = 0


@pytest.mark.skipif(SIMULATED, reason="the simulated device is the only one")
def test_every_device():
    for device in jax.devices("cuda"):
        with jax.default_device(device):
            check(draw((50, 3000)), draw_targets((50,), 3000))


@pytest.mark.skipif(SIMULATED, reason="XLA records graphs on real devices only")
def test_in_a_graph_that_xla_records():
    """A loop of small steps, which XLA launches as a CUDA graph where it can."""
    logits, targets = draw((64, 100), np.float64), draw_targets((64,), 100)

    @jax.jit
    def descend(z):
        for _ in range(10):
            z = z - 0.5 * jax.grad(lambda z: fastce.jax.cross_entropy(z, targets, reduction="sum"))(
                z
            )
        return z

    want = logits
    for _ in range(10):
        want = want - 0.5 * oracle.cross_entropy(want, targets, reduction="sum").grad.value.astype(
            float
        )
    for _ in range(3):
        np.testing.assert_allclose(descend(jnp.asarray(logits)), want, rtol=1e-10)
