"""`fastce.jax`: the kernels under JAX's transformations, and in the place of optax's losses."""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fastce
import fastce.jax
from tests.checks import draw, draw_soft, draw_targets, same_bits
from tests.families import faults
from tests.sweep import batches, boundaries


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def numpy_result(logits, targets, **options):
    return fastce.cross_entropy_and_grad(np.asarray(logits), np.asarray(targets), **options)


def result(logits, targets, **options):
    options.setdefault("reduction", "mean")
    loss = functools.partial(fastce.jax.cross_entropy, **options)

    @jax.jit
    def both(z, y):
        return loss(z, y), jax.grad(lambda z: loss(z, y).sum())(z)

    return both(logits, targets)


SHAPES = {"few classes": ((9, 7), -1), "many classes": ((9, 300), -1), "images": ((2, 5, 3, 4), 1)}
OPTIONS = {
    "plain": {}, "ignored": {"ignore_index": 3}, "smoothing": {"label_smoothing": 0.2},
    "all": {"ignore_index": 3, "label_smoothing": 0.2, "z_loss": 0.01},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_the_bits_of_numpy(shape, option):
    """Losses and gradients per row; with reductions all but the last bits."""
    (shape, axis), options = SHAPES[shape], OPTIONS[option]
    rows = tuple(n for k, n in enumerate(shape) if k != axis % len(shape))
    logits = jnp.asarray(draw(shape, np.float32, scale=3))
    targets = draw_targets(rows, shape[axis], np.int32)
    for reduction in ("none", "sum", "mean"):
        got = result(logits, targets, axis=axis, reduction=reduction, **options)
        want = numpy_result(logits, targets, axis=axis, reduction=reduction, **options)
        if reduction == "none":
            assert all(map(same_bits, got, want))
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


def test_half_precision():
    logits = jnp.asarray(draw((5, 70))).astype(jnp.bfloat16)
    targets = jnp.arange(5)
    assert all(
        map(same_bits, result(logits, targets, reduction="none"),
            numpy_result(logits, targets, reduction="none"))
    )  # fmt: skip


def test_soft_targets():
    for shape in ((6, 9), (6, 100)):
        logits = jnp.asarray(draw(shape, np.float64))
        targets = jnp.asarray(draw_soft(shape, np.float64))
        got = result(logits, targets, reduction="none", label_smoothing=0.1)
        want = numpy_result(logits, targets, reduction="none", label_smoothing=0.1)
        assert all(map(same_bits, got, want))
        of_labels = jax.grad(fastce.jax.cross_entropy, 1)(logits, targets)
        np.testing.assert_allclose(of_labels, -jax.nn.log_softmax(logits) / 6)


def test_large_arrays_are_shared_with_the_pool():
    logits, targets = draw((700, 1000)), draw_targets((700,), 1000)
    assert all(
        map(same_bits, result(jnp.asarray(logits), targets, reduction="none"),
            numpy_result(logits, targets, reduction="none"))
    )  # fmt: skip
    few = draw((70000, 10)), draw_targets((70000,), 10)
    assert all(
        map(same_bits, result(jnp.asarray(few[0]), few[1], reduction="none"),
            numpy_result(*few, reduction="none"))
    )  # fmt: skip


def test_many_calls_at_once():
    logits, targets = draw((300, 1000)), draw_targets((300,), 1000)
    function = functools.partial(result, reduction="none")
    want = numpy_result(logits, targets, reduction="none")
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: function(jnp.asarray(logits), targets), range(20)):
            assert all(map(same_bits, got, want))


@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 0), (1, 0)])
def test_vmap(in_axes):
    shape = (3, 4, 5) if in_axes[0] == 0 else (4, 5) if in_axes[0] is None else (4, 3, 5)
    logits = draw(shape, np.float64)
    targets = draw_targets((3, 4) if in_axes[1] == 0 else (4,), 5)
    got = jax.vmap(jax.value_and_grad(fastce.jax.cross_entropy), in_axes)(logits, targets)
    for k in range(3):
        z = logits if in_axes[0] is None else logits.take(k, in_axes[0])
        y = targets if in_axes[1] is None else targets[k]
        loss, grad = numpy_result(z, y)
        np.testing.assert_allclose(got[0][k], loss, rtol=1e-15)
        np.testing.assert_allclose(got[1][k], grad, rtol=1e-14)


def plain(logits, targets, options):
    """The loss in JAX alone."""
    smoothing = options.get("label_smoothing", 0.0)
    log_p = jax.nn.log_softmax(logits)
    valid = targets != options.get("ignore_index", -100)
    chosen = jnp.take_along_axis(log_p, jnp.where(valid, targets, 0)[:, None], 1)[:, 0]
    nll = -(1 - smoothing) * chosen - smoothing * log_p.mean(1)
    z_term = options.get("z_loss", 0.0) * jax.nn.logsumexp(logits, 1) ** 2
    return jnp.where(valid, nll + z_term, 0).sum() / valid.sum()


@pytest.mark.parametrize("option", ["plain", "all"])
def test_derivatives_of_every_kind(option):
    logits, targets = jnp.asarray(draw((6, 7), np.float64)), draw_targets((6,), 7)
    direction = draw((6, 7), np.float64, seed=5)
    options = OPTIONS[option]

    def ours(z):
        return fastce.jax.cross_entropy(z, targets, **options)

    def theirs(z):
        return plain(z, targets, options)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(f, z):
        return (
            jax.jvp(f, (z,), (direction,)),
            jax.vjp(f, z)[1](2.5),
            jax.hessian(f)(z),
            jax.jacrev(jax.grad(f))(z),
            jax.grad(lambda z: jnp.vdot(jax.grad(jax.checkpoint(f))(z), direction))(z),
        )

    for a, b in zip(
        *(jax.tree.leaves(derivatives(f, logits)) for f in (ours, theirs)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


def test_second_derivatives_of_rows_that_are_ignored():
    logits = jnp.array([[np.nan, 1.0], [2.0, 1.0]])
    hessian = jax.jacrev(jax.grad(fastce.jax.cross_entropy))(logits, jnp.array([-100, 0]))
    assert np.isfinite(hessian).all()
    assert not hessian[0].any()
    assert not hessian[:, :, 0].any()
    assert hessian[1, :, 1].all()


def test_in_a_scan():
    logits, targets = jnp.asarray(draw((8, 5, 6), np.float64)), draw_targets((8, 5), 6)

    def total(z):
        step = lambda c, zy: (c + fastce.jax.cross_entropy(*zy), None)  # noqa: E731
        return jax.lax.scan(step, 0.0, (z, targets))[0]

    loss, grad = jax.jit(jax.value_and_grad(total))(logits)
    want, want_grad = numpy_result(logits, targets)
    np.testing.assert_allclose(loss, 8 * want, rtol=1e-14)
    np.testing.assert_allclose(grad, 8 * want_grad, rtol=1e-13)


def test_edge_cases():
    nan, inf = np.nan, np.inf
    logits = jnp.array([[nan, inf, 0.0], [0.0, -inf, 1.0], [0.0, 60.0, 1.0], [1.0, 2.0, 3.0]])
    targets = jnp.array([-100, 0, 1, 2])
    assert all(
        map(same_bits, result(logits, targets, reduction="none"),
            numpy_result(logits, targets, reduction="none"))
    )  # fmt: skip
    ignored = jnp.full(4, -100)
    loss, grad = result(logits, ignored)
    assert np.isnan(loss)
    assert not grad.any()
    assert result(logits, ignored, reduction="sum")[0] == 0
    loss, grad = result(logits[:0], targets[:0])
    assert np.isnan(loss)
    assert grad.shape == (0, 3)
    loss, grad = result(logits[3:], targets[3:], normalizer=4.0)
    want, want_grad = numpy_result(logits[3:], targets[3:], normalizer=4.0)
    np.testing.assert_allclose(loss, want)
    np.testing.assert_allclose(grad, want_grad)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint64])
def test_targets_that_are_no_class_give_nan(dtype):
    logits = draw((4, 100), np.float32)
    targets = np.array([3, 100, np.iinfo(dtype).max, np.iinfo(dtype).min], object).astype(dtype)
    losses, grad = result(jnp.asarray(logits), targets, reduction="none")
    bad = np.array([False, True, True, dtype in (np.int8, np.int64)])
    np.testing.assert_array_equal(np.isnan(losses), bad)
    np.testing.assert_array_equal(np.isnan(grad), np.broadcast_to(bad[:, None], grad.shape))


BAD = {
    "shape": (lambda z, y: fastce.jax.cross_entropy(z, y[1:]), ValueError, "targets: expected"),
    "axis": (lambda z, y: fastce.jax.cross_entropy(z, y, axis=2), ValueError, "axis: expected"),
    "integers": (lambda z, y: fastce.jax.cross_entropy(y[:, None], y), TypeError, "logits: expec"),
    "float targets": (lambda z, y: fastce.jax.cross_entropy(z, z[:, 0]), TypeError, "targets: exp"),
    "smoothing": (
        lambda z, y: fastce.jax.cross_entropy(z, y, label_smoothing=2.0), ValueError,
        "label_smoothing: expected",
    ),
    "normalizer": (
        lambda z, y: fastce.jax.cross_entropy(z, y, reduction="sum", normalizer=2.0), ValueError,
        "normalizer: expected",
    ),
    "optax": (
        lambda z, y: fastce.jax.softmax_cross_entropy_with_integer_labels(z, z), TypeError,
        "labels: expected integers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        jax.jit(call)(draw((4, 5)), draw_targets((4,), 5))


# The twins of optax -------------------------------------------------------------------------------

MASK = np.array([[True, True, False, True, True]] * 3 + [[False] * 5])
AXES = {
    "last": ((4, 5), -1, None),
    "first": ((5, 4), 0, None),
    "two": ((2, 3, 4), (0, 2), None),
    "two, from the end": ((2, 3, 4), (-1, 0), None),
    "classes": ((4, 5), -1, MASK),
    "rows": ((4, 5), 1, np.array([True, False, True, True])),
}


def compare(name, arguments, options):
    """Value and gradient beside optax's."""
    ours, theirs = (getattr(module, name) for module in (fastce.jax, optax))
    for function in (ours, theirs):
        assert function(*arguments, **options).dtype == arguments[0].dtype

    @functools.partial(jax.jit, static_argnums=0)
    def both(function):
        summed = lambda *a: jnp.sum(jnp.cos(function(*a, **options)))  # noqa: E731
        return function(*arguments, **options), jax.grad(summed)(*arguments)

    for a, b in zip(*(jax.tree.leaves(both(f)) for f in (ours, theirs)), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", AXES)
def test_twin_with_integer_labels(case):
    shape, axis, where = AXES[case]
    axes = {k % len(shape) for k in ((axis,) if isinstance(axis, int) else axis)}
    rows = tuple(n for k, n in enumerate(shape) if k not in axes)
    labels = draw_targets(rows, 2)  # of which the mask leaves both
    where = None if where is None else jnp.asarray(where)
    arguments = (jnp.asarray(draw(shape, np.float64)), jnp.asarray(labels))
    compare("softmax_cross_entropy_with_integer_labels", arguments, {"axis": axis, "where": where})


@pytest.mark.parametrize("case", [*AXES, "all"])
def test_twin_with_probabilities(case):
    shape, axis, where = AXES.get(case, ((4, 5), None, None))
    where = None if where is None else jnp.asarray(where)
    arguments = (jnp.asarray(draw(shape, np.float64)), jnp.asarray(draw_soft(shape, np.float64)))
    if case == "classes":  # optax has NaN where nothing counts
        arguments, where = tuple(a[:3] for a in arguments), where[:3]
    compare("softmax_cross_entropy", arguments, {"axis": axis, "where": where})


def test_the_twin_in_half_precision():
    logits, labels = jnp.asarray(draw((4, 5))).astype(jnp.bfloat16), jnp.arange(4)
    ours, theirs = (
        module.softmax_cross_entropy_with_integer_labels(logits, labels)
        for module in (fastce.jax, optax)
    )
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(float), theirs.astype(float), rtol=0.05)


def test_a_row_without_any_class_counts_for_nothing():
    logits, labels = jnp.asarray(draw((2, 5), np.float64)), jnp.array([1, 2])
    where = jnp.array([[True] * 5, [False] * 5])
    for twin, y in (
        (fastce.jax.softmax_cross_entropy_with_integer_labels, labels),
        (fastce.jax.softmax_cross_entropy, jax.nn.one_hot(labels, 5)),
    ):
        loss, grad = jax.value_and_grad(lambda z, twin=twin, y=y: twin(z, y, where=where).sum())(
            logits
        )
        np.testing.assert_allclose(loss, fastce.cross_entropy(logits[0], 1), rtol=1e-6)
        assert not grad[1].any()


def test_without_compiling_all_is_the_same():
    """`jax.disable_jit` is for looking for faults: losses and gradients must be there then, too."""
    logits, targets = jnp.asarray(draw((9, 7), np.float32)), draw_targets((9,), 7, np.int32)

    def losses(z):
        return fastce.jax.cross_entropy(z, targets, reduction="none")

    def gradient(z):
        return jax.grad(fastce.jax.cross_entropy)(z, targets)

    def integer_labels(z):
        return fastce.jax.softmax_cross_entropy_with_integer_labels(z, targets)

    for function in (losses, gradient, integer_labels):
        want = jax.jit(function)(logits)
        with jax.disable_jit():
            assert same_bits(function(logits), want)


def test_numbers_around_which_exponentials_change_their_power():
    """The kernels of XLA's handlers on the boundaries of the sweep."""
    x = boundaries(np.dtype(np.float32))
    for part, batch in batches(x, 1):
        losses, grad = result(jnp.asarray(batch.logits), batch.targets, reduction="none")
        found = {"loss": np.asarray(losses), "grad": np.asarray(grad)}
        assert not faults(found, batch, x.dtype), part
