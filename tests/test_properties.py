"""Laws for every input: sums, shifts, subsets, finite differences, merges, random bits."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastce
from tests import oracle
from tests.checks import assert_gradient, assert_loss, draw_weight, same_bits

seeds = st.integers(0, 2**32 - 1)
rows = st.integers(1, 7)
classes = st.integers(1, 40) | st.sampled_from([64, 127, 129, 1000])
scales = st.sampled_from([0.1, 1.0, 10.0, 300.0])
INFINITE = {"allow_nan": False, "allow_infinity": False}


@st.composite
def problems(draw, dtype=np.float64, classes=classes):
    """Logits and integer targets."""
    n, c, rng = draw(rows), draw(classes), np.random.default_rng(draw(seeds))
    logits = (
        rng.normal(size=(n, c)) * draw(scales) + draw(st.sampled_from([0, -100, 1e4]))
    ).astype(dtype)
    return logits, rng.integers(0, c, n)


@given(problems())
def test_the_gradient_of_a_row_sums_to_zero(problem):
    _, grad = fastce.cross_entropy_and_grad(*problem, reduction="sum")
    assert np.all(np.abs(grad.sum(axis=-1)) <= 1e-13)


@given(problems(np.float32))
def test_fused_equals_separate(problem):
    logits, targets = problem
    for reduction in ("none", "sum", "mean"):
        loss, _ = fastce.cross_entropy_and_grad(logits, targets, reduction=reduction)
        assert same_bits(loss, fastce.cross_entropy(logits, targets, reduction=reduction))
    loss, grad = fastce.cross_entropy_and_grad(logits, targets, reduction="none")
    stats = fastce.cross_entropy_stats(logits, targets)
    assert same_bits(stats.loss, loss)
    assert same_bits(stats.lse, fastce.logsumexp(logits))
    assert same_bits(stats.predicted, logits.argmax(axis=-1))
    np.testing.assert_allclose(
        grad, fastce.softmax(logits) - np.eye(logits.shape[1], dtype="f4")[targets], atol=1e-6
    )


@given(problems())
def test_separate_steps_give_the_same(problem):
    logits, targets = problem
    steps = fastce.nll_loss(fastce.log_softmax(logits), targets, reduction="none")
    fused = fastce.cross_entropy(logits, targets, reduction="none")
    np.testing.assert_allclose(steps, fused, rtol=1e-12, atol=1e-300)


OPTIONS = st.fixed_dictionaries(
    {
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "z_loss": st.sampled_from([0.0, 0.01]),
        "softcap": st.sampled_from([None, 3.0]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
    }
)


@given(seeds, OPTIONS, st.booleans(), st.booleans())
def test_the_gradient_is_that_of_the_loss(seed, options, soft, weighted):
    """Central differences of fourth order in float64."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(3, 5)) * 2
    targets = rng.dirichlet(np.ones(5), 3) if soft else rng.integers(0, 5, 3)
    if weighted:
        options = options | {"weight": draw_weight(5, "f8")}
    _, grad = fastce.cross_entropy_and_grad(logits, targets, **options)
    direction, step = rng.normal(size=logits.shape), 1e-3

    def total(t):
        return np.sum(fastce.cross_entropy(logits + t * step * direction, targets, **options))

    slope = (8 * (total(1) - total(-1)) - (total(2) - total(-2))) / (12 * step)
    assert slope == pytest.approx((grad * direction).sum(), rel=1e-8, abs=1e-9)


@given(seeds, st.floats(-3, 3, **INFINITE))
def test_the_upstream_gradient_multiplies(seed, upstream):
    rng = np.random.default_rng(seed)
    logits, targets = rng.normal(size=(4, 6)), rng.integers(0, 6, 4)
    _, grad = fastce.cross_entropy_and_grad(logits, targets)
    _, scaled = fastce.cross_entropy_and_grad(logits, targets, grad_output=upstream)
    np.testing.assert_allclose(scaled, upstream * grad, rtol=1e-14, atol=1e-300)


@given(problems(), st.floats(-1e3, 1e3, **INFINITE))
def test_a_common_shift_changes_nothing(problem, shift):
    logits, targets = problem
    grid = 2.0**-20  # a coarse grid, so that the shift is exact
    logits, shift = np.round(logits / grid) * grid, np.round(shift / grid) * grid
    for got, want in zip(
        fastce.cross_entropy_and_grad(logits + shift, targets, reduction="none"),
        fastce.cross_entropy_and_grad(logits, targets, reduction="none"),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-300)
    np.testing.assert_allclose(
        fastce.logsumexp(logits + shift) - shift, fastce.logsumexp(logits), rtol=1e-13, atol=1e-10
    )


@given(seeds, st.integers(2, 200), st.data())
def test_a_mask_equals_the_subset(seed, count, data):
    """Classes at -inf are as good as absent."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(3, count)) * 4
    keep = rng.random(count) < data.draw(st.sampled_from([0.1, 0.5, 0.9]))
    keep[0] = True
    masked = np.where(keep, logits, -np.inf)
    targets = rng.integers(0, keep.sum(), 3)
    loss, grad = fastce.cross_entropy_and_grad(
        masked, np.flatnonzero(keep)[targets], reduction="none"
    )
    want_loss, want_grad = fastce.cross_entropy_and_grad(
        np.ascontiguousarray(logits[:, keep]), targets, reduction="none"
    )
    np.testing.assert_allclose(loss, want_loss, rtol=1e-13, atol=1e-300)
    np.testing.assert_allclose(grad[:, keep], want_grad, rtol=1e-12, atol=1e-300)
    assert not grad[:, ~keep].any()


@given(problems(classes=st.integers(2, 300)), st.data())
def test_parts_of_the_classes_merge(problem, data):
    """The log-sum-exp of the parts' log-sum-exps is that of the whole."""
    logits, _targets = problem
    cut = data.draw(st.integers(1, logits.shape[1] - 1))
    parts = [fastce.logsumexp(logits[:, :cut]), fastce.logsumexp(logits[:, cut:])]
    whole = fastce.logsumexp(logits)
    np.testing.assert_allclose(fastce.logsumexp(parts, axis=0), whole, rtol=1e-14, atol=1e-13)


@given(problems(), st.data())
def test_parts_of_the_rows_merge(problem, data):
    logits, targets = problem
    cut = data.draw(st.integers(0, len(targets)))
    mean, grad = fastce.cross_entropy_and_grad(logits, targets)
    parts = [
        fastce.cross_entropy_and_grad(logits[s], targets[s], normalizer=len(targets))
        for s in (slice(0, cut), slice(cut, None))
    ]
    assert parts[0][0] + parts[1][0] == pytest.approx(mean, rel=1e-14, abs=1e-300)
    np.testing.assert_allclose(np.concatenate([g for _, g in parts]), grad, rtol=1e-14)


@given(problems())
def test_permuting_the_classes_permutes_the_gradient(problem):
    logits, targets = problem
    order = np.random.default_rng(0).permutation(logits.shape[1])
    place = np.argsort(order)
    loss, grad = fastce.cross_entropy_and_grad(logits, targets, reduction="none")
    got_loss, got_grad = fastce.cross_entropy_and_grad(
        logits[:, order], place[targets], reduction="none"
    )
    np.testing.assert_allclose(got_loss, loss, rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(got_grad, grad[:, order], rtol=1e-12, atol=1e-300)


@given(problems(np.float32))
def test_one_hot_soft_targets_equal_indices(problem):
    logits, targets = problem
    hot = np.eye(logits.shape[1], dtype=np.float32)[targets]
    loss, grad = fastce.cross_entropy_and_grad(logits, targets, reduction="none")
    soft_loss, soft_grad = fastce.cross_entropy_and_grad(logits, hot, reduction="none")
    np.testing.assert_allclose(soft_loss, loss, rtol=8e-6, atol=1e-37)
    np.testing.assert_allclose(soft_grad, grad, rtol=2e-5, atol=1e-37)


@given(problems(np.float64), st.floats(0.1, 10, **INFINITE))
def test_a_class_weight_scales_the_rows(problem, factor):
    logits, targets = problem
    weight = np.full(logits.shape[1], factor)
    loss = fastce.cross_entropy(logits, targets, weight=weight, reduction="none")
    np.testing.assert_allclose(
        loss, factor * fastce.cross_entropy(logits, targets, reduction="none"), rtol=1e-14
    )
    mean = fastce.cross_entropy(logits, targets, weight=weight)
    assert mean == pytest.approx(fastce.cross_entropy(logits, targets), rel=1e-13, abs=1e-300)


BITS = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32, "float64": np.uint64}


def random_bits(seed, shape, dtype):
    """Every bit pattern equally likely: NaN payloads, infinities, denormals, both zeros."""
    rng = np.random.default_rng(seed)
    unsigned = BITS[np.dtype(dtype).name]
    bits = rng.integers(0, np.iinfo(unsigned).max, shape, dtype=unsigned, endpoint=True)
    logits = bits.view(dtype)
    chosen = rng.random(shape)
    specials = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0]).astype(dtype)
    tiny = ml_dtypes.finfo(dtype).smallest_subnormal
    logits[chosen < 0.02] = rng.choice(np.append(specials, tiny).astype(dtype), shape)[
        chosen < 0.02
    ]
    return logits


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@given(seed=seeds, count=st.sampled_from([1, 2, 3, 10, 40, 200]), n=st.integers(1, 70))
def test_random_bits(dtype, seed, count, n):
    """No crash, every row as if it were alone, and NaN exactly where the contract says."""
    logits = random_bits(seed, (n, count), dtype)
    targets = np.random.default_rng(seed).integers(0, count, n)
    targets[:: max(2, n // 3)] = -100
    loss, grad = fastce.cross_entropy_and_grad(logits, targets, reduction="none")
    assert same_bits(loss, fastce.cross_entropy(logits, targets, reduction="none"))
    wide = oracle.exact(logits)
    bad = np.isnan(wide).any(axis=1) | (wide == np.inf).any(axis=1) | (wide == -np.inf).all(axis=1)
    ignored = targets < 0
    assert np.array_equal(np.isnan(loss), bad & ~ignored)
    assert np.array_equal(np.isnan(oracle.exact(grad)).all(axis=1), bad & ~ignored)
    assert np.isfinite(oracle.exact(grad[~bad | ignored])).all()
    want = oracle.cross_entropy(logits, targets, reduction="none")
    assert_loss(loss, want.loss, dtype, anywhere=True)
    assert_gradient(grad, want.grad, dtype)
    i = seed % n
    one = fastce.cross_entropy_and_grad(logits[i : i + 1], targets[i : i + 1], reduction="none")
    for alone, among in zip(one, (loss[i : i + 1], grad[i : i + 1]), strict=True):
        assert np.array_equal(oracle.exact(alone), oracle.exact(among), equal_nan=True)


@given(seed=seeds, axis=st.sampled_from([0, 1]))
def test_random_bits_elsewhere(seed, axis):
    x = random_bits(seed, (20, 20), np.float32)
    v = random_bits(seed + 1, (20, 20), np.float32)
    targets = np.random.default_rng(seed).integers(0, 20, 20)
    lse = fastce.logsumexp(x, axis=axis)
    want = oracle.logsumexp(x, axis=axis).value
    np.testing.assert_allclose(lse, want.astype("f8"), rtol=1e-6)
    p = fastce.softmax(x, axis=axis)
    np.testing.assert_allclose(
        p, oracle.softmax(x, axis=axis).value.astype("f8"), rtol=1e-5, atol=1e-37
    )
    fastce.log_softmax(x, axis=axis)
    fastce.nll_loss_and_grad(x, targets, axis=axis)
    fastce.binary_cross_entropy_and_grad(x, v)
    fastce.gradient_hessian(x, targets, axis=axis)
    fastce.hessian_vector_product(x, v, axis=axis)
    fastce.cross_entropy_and_grad(x, v, axis=axis, label_smoothing=0.1, z_loss=0.1, softcap=2.0)
    fastce.cross_entropy_stats(x, targets, axis=axis)


@given(
    hnp.arrays(np.float64, hnp.array_shapes(max_dims=4, max_side=5), elements=st.floats(-50, 50)),
    st.data(),
)
def test_any_shape(logits, data):
    axis = data.draw(st.integers(-logits.ndim, logits.ndim - 1))
    shape = np.delete(logits.shape, axis)
    targets = np.random.default_rng(0).integers(0, logits.shape[axis], shape)
    loss, grad = fastce.cross_entropy_and_grad(logits, targets, axis=axis, reduction="none")
    want = oracle.cross_entropy(logits, targets, axis=axis, reduction="none")
    assert_loss(loss, want.loss, logits.dtype, anywhere=True)
    assert_gradient(grad, want.grad, logits.dtype)
    rank = data.draw(st.sets(st.integers(0, logits.ndim - 1), min_size=1))
    got = fastce.logsumexp(logits, axis=tuple(rank), keepdims=True)
    expected = oracle.logsumexp(logits, axis=tuple(rank), keepdims=True)
    np.testing.assert_allclose(got, expected.value.astype("f8"), rtol=1e-13, atol=1e-14)
