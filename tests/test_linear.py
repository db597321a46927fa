"""The classifier head: the loss and gradients of logits that are never held whole."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import fastce
from fastce import _blas, _head, shards
from fastce.cpu import jit, threads
from fastce.cpu.matrix import mark_beyond
from tests import oracle
from tests.checks import FLOATS, draw, draw_soft, draw_targets, draw_weight, loss_dtype, same_bits

N, D, C = 37, 19, 23
# Unit in the last place of what is computed with, and of what is stored.
EPS = {dtype: float(np.finfo(loss_dtype(dtype)).eps) for dtype in FLOATS}
STORED = {dtype: float(ml_dtypes.finfo(dtype).eps) for dtype in FLOATS}


@pytest.fixture(params=["whole", "pieces"])
def pieces(request, monkeypatch):
    """Small problems whole, and cut into several chunks of rows and blocks of classes."""
    if request.param == "pieces":
        monkeypatch.setattr(_head, "MEMORY", 20 * C * 8)
        monkeypatch.setattr(_head, "SHARE", 0.0)
        monkeypatch.setattr(_blas, "BLOCK", 5 * D * 4)
        monkeypatch.setattr(_head, "TILE", 2)
        monkeypatch.setattr(_head, "ROWS", 30)
        monkeypatch.setattr(_head, "COLUMNS", 4)
        monkeypatch.setattr(_blas, "PARALLEL", 16)
        monkeypatch.setattr(_blas, "ADDITIONS", 2 * D)
    return request.param


def problem(dtype=np.float64, *, bias=True, ignored=False):
    x, weight = draw((N, D), dtype, seed=1), draw((C, D), dtype, scale=0.4, seed=2)
    y = draw_targets((N,), C)
    if ignored:
        y[::3] = -100
    return x, weight, y, draw((C,), dtype, seed=3) if bias else None


def expected(x, matrix, targets, bias, **options):
    """Loss and gradients with their scales, in extended precision."""
    x, weight = oracle.exact(x), oracle.exact(matrix)
    z = x @ weight.T + (0 if bias is None else oracle.exact(bias))
    # The oracle takes float64: what this rounds is below the bounds of float32 and 16 bits, and is
    # counted in that of float64.
    found = oracle.cross_entropy(z.astype(np.float64), targets, **options)
    g, size = found.grad.value, np.maximum(np.abs(found.grad.value), found.grad.scale)
    return found.loss, (
        (g @ weight, size @ np.abs(weight)),
        (g.T @ x, size.T @ np.abs(x)),
        (g.sum(axis=0), size.sum(axis=0)),
    )


def check(x, weight, targets, bias, *, class_weight=None, **options):
    """Compare loss and gradients with the oracle."""
    loss, gradients = expected(x, weight, targets, bias, weight=class_weight, **options)
    got, found = fastce.linear_cross_entropy_and_grad(
        x, weight, targets, bias=bias, class_weight=class_weight, **options
    )
    unit = EPS[x.dtype]
    assert np.asarray(got).dtype == loss_dtype(x.dtype)
    # Every logit is a sum of D products, and so is its error.
    spread = 4 * D * unit
    assert np.all(np.abs(got - loss.value) <= spread * (1 + np.maximum(loss.scale, 0)))
    for array, like, (value, scale) in zip(found, (x, weight, bias), gradients, strict=True):
        if like is None:
            assert array is None
            continue
        assert array.dtype == like.dtype
        error = np.abs(array.astype(np.float64) - value)
        assert np.all(error <= (16 * spread) * scale + STORED[x.dtype] * np.abs(value) + 1e-40)
    options.pop("grad_output", None)
    alone = fastce.linear_cross_entropy(
        x, weight, targets, bias=bias, class_weight=class_weight, **options
    )
    # Of more rows and fewer classes at a time: not the same bits, but as near as the parts can be.
    np.testing.assert_allclose(alone, got, rtol=4 * EPS[np.asarray(got).dtype], atol=0)


OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "class weights": {"class_weight": draw_weight(C, np.float64)},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.01},
    "z-loss and class weights": {"z_loss": 0.01, "class_weight": draw_weight(C, np.float64)},
    "softcap": {"softcap": 2.0},
    "normalizer": {"normalizer": 5.5, "z_loss": 0.01},
    "upstream": {"grad_output": -2.5},
    "upstream per row": {"reduction": "none", "grad_output": draw((N,), np.float64, seed=9)},
    "everything": {
        "label_smoothing": 0.2, "z_loss": 0.01, "softcap": 5.0, "grad_output": 3.0,
        "class_weight": draw_weight(C, np.float64),
    },
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", ["hard", "ignored", "soft"])
def test_every_option(option, kind, pieces):
    x, weight, y, bias = problem(ignored=kind == "ignored")
    targets = draw_soft((N, C), np.float64) if kind == "soft" else y
    check(x, weight, targets, bias, **OPTIONS[option])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_every_dtype(dtype, bias, pieces):
    x, weight, y, b = problem(dtype, bias=bias, ignored=True)
    check(x, weight, y, b)


def test_mixed_dtypes_compute_with_the_wider_one(pieces):
    x, weight, y, bias = problem(np.float64)
    narrow = weight.astype(ml_dtypes.bfloat16)
    loss, (dx, dw, db) = fastce.linear_cross_entropy_and_grad(x, narrow, y, bias=bias.astype("f4"))
    assert (loss.dtype, dx.dtype, dw.dtype, db.dtype) == ("f8", "f8", narrow.dtype, "f4")
    same = fastce.linear_cross_entropy(x, narrow.astype("f8"), y, bias=bias.astype("f4"))
    assert loss == pytest.approx(same, rel=1e-14)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_accumulating_adds_to_what_is_there(dtype, pieces):
    x, weight, y, bias = problem(dtype, ignored=True)
    _, fresh = fastce.linear_cross_entropy_and_grad(x, weight, y, bias=bias)
    there = [np.full_like(a, 0.5) for a in fresh]
    _, out = fastce.linear_cross_entropy_and_grad(
        x, weight, y, bias=bias, out=tuple(there), accumulate=True
    )
    for one, given, first in zip(out, there, fresh, strict=True):
        assert one is given
        want = first.astype(np.float64) + 0.5
        assert np.abs(one.astype(np.float64) - want).max() <= 2 * STORED[np.dtype(dtype)]


def test_parts_of_a_batch_add_up_to_the_whole(pieces):
    x, weight, y, bias = problem()
    loss, whole = fastce.linear_cross_entropy_and_grad(x, weight, y, bias=bias)
    dw, db, total = np.zeros_like(weight), np.zeros_like(bias), 0.0
    dx = np.zeros_like(x)
    for part in (slice(0, 20), slice(20, None)):
        value, _ = fastce.linear_cross_entropy_and_grad(
            x[part], weight, y[part], bias=bias, normalizer=N,
            out=(dx[part], dw, db), accumulate=True,
        )  # fmt: skip
        total += value
    assert total == pytest.approx(loss, rel=1e-14)
    for got, want in zip((dx, dw, db), whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)


def test_bfloat16_gradients_are_not_rounded_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr(_head, "MEMORY", 0)
    monkeypatch.setattr(_head, "SHARE", 0.0)  # a chunk per row
    bf16 = ml_dtypes.bfloat16
    x, weight, y = np.ones((1000, 1), bf16), np.zeros((2, 1), bf16), np.zeros(1000, int)
    _, (_, dw, db) = fastce.linear_cross_entropy_and_grad(
        x, weight, y, bias=np.zeros(2, bf16), reduction="sum"
    )
    assert dw.astype(float).ravel().tolist() == [-500, 500]
    assert db.astype(float).tolist() == [-500, 500]


@pytest.mark.parametrize("strided", ["x", "weight", "out"])
def test_any_strides(strided, pieces):
    x, weight, y, bias = problem()
    want = fastce.linear_cross_entropy_and_grad(x, weight, y, bias=bias)
    out = tuple(np.empty_like(a) for a in (x, weight, bias))
    if strided == "x":
        x = np.asfortranarray(x)
    if strided == "weight":
        weight = np.repeat(weight, 2, axis=1)[:, ::2]
    if strided == "out":
        out = tuple(np.repeat(a, 2, axis=-1)[..., ::2] for a in out)
    loss, gradients = fastce.linear_cross_entropy_and_grad(x, weight, y, bias=bias, out=out)
    assert loss == pytest.approx(want[0], rel=1e-14)
    for got, first in zip(gradients, want[1], strict=True):
        np.testing.assert_allclose(got, first, rtol=1e-12, atol=1e-15)


def test_read_only_inputs_are_left_alone(pieces):
    arrays = [a.copy() for a in problem()]
    for array in arrays:
        array.flags.writeable = False
    x, weight, y, bias = arrays
    fastce.linear_cross_entropy_and_grad(x, weight, y, bias=bias)


# Rows that do not count ---------------------------------------------------------------------------


def test_ignored_rows_are_never_read(pieces):
    x, weight, y, bias = problem(ignored=True)
    loss, (dx, dw, db) = fastce.linear_cross_entropy_and_grad(x, weight, y, bias=bias)
    bad = x.copy()
    bad[y == -100] = np.nan
    again, (dx2, dw2, db2) = fastce.linear_cross_entropy_and_grad(bad, weight, y, bias=bias)
    assert same_bits(again, loss)
    assert all(same_bits(a, b) for a, b in ((dx, dx2), (dw, dw2), (db, db2)))
    assert not dx2[y == -100].any()


def test_ignored_rows_enter_no_product(monkeypatch):
    x, weight, y, _ = problem(ignored=True)
    rows = []
    monkeypatch.setattr(
        _head, "multiply", lambda a, b, out: rows.append(len(a)) or np.matmul(a, b, out=out)
    )
    fastce.linear_cross_entropy(x, weight, y)
    assert sum(rows) == np.count_nonzero(y != -100)


def test_nothing_that_counts(pieces):
    x, weight, y, bias = problem()
    cases = [
        (x, np.full(N, -100), {}),
        (x[:0], y[:0], {}),
        (x, y, {"class_weight": np.zeros(C)}),
        (x, y, {"normalizer": 0.0}),
    ]
    for some, targets, options in cases:
        loss, gradients = fastce.linear_cross_entropy_and_grad(
            some, weight, targets, bias=bias, **options
        )
        assert np.isnan(loss)
        assert not any(g.any() for g in gradients)
        assert gradients[0].shape == some.shape
    assert fastce.linear_cross_entropy(x[:0], weight, y[:0], reduction="sum") == 0


def test_a_nan_row_stays_alone_in_the_losses(pieces):
    x, weight, y, bias = problem()
    clean = fastce.linear_cross_entropy(x, weight, y, bias=bias, reduction="none")
    x[5, 3] = np.nan
    losses = fastce.linear_cross_entropy(x, weight, y, bias=bias, reduction="none")
    assert np.flatnonzero(np.isnan(losses)).tolist() == [5]
    np.testing.assert_allclose(np.delete(losses, 5), np.delete(clean, 5), rtol=1e-13)


def test_a_masked_class_has_no_gradient(pieces):
    x, weight, y, bias = problem()
    bias[7], y[y == 7] = -np.inf, 0
    _, (_, dw, db) = fastce.linear_cross_entropy_and_grad(x, weight, y, bias=bias)
    assert not dw[7].any()
    assert db[7] == 0


# Skipping -----------------------------------------------------------------------------------------


def peaked(dtype):
    """A head whose rows are sure of one of the first few classes."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, N)
    weight = draw((C, D), dtype, seed=2)
    x = (8 * weight[y] + draw((N, D), dtype, scale=0.1, seed=5)).astype(dtype)
    return x, weight, y, np.zeros(C, dtype)


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("targets", ["hard", "ignored"])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("skip_below", [1e-6, 0.01])
def test_skipping_keeps_its_bound(dtype, targets, accumulate, skip_below, pieces):
    x, weight, y, bias = peaked(np.dtype(dtype))
    if targets == "ignored":
        y[::5] = -100
    n = np.count_nonzero(y >= 0)
    loss, exact = fastce.linear_cross_entropy_and_grad(x, weight, y, bias=bias)
    out = tuple(np.zeros_like(a) for a in exact)
    again, got = fastce.linear_cross_entropy_and_grad(
        x, weight, y, bias=bias, skip_below=skip_below, out=out, accumulate=accumulate
    )
    assert same_bits(loss, again)
    assert same_bits(got[2], exact[2])
    rounding = 64 * EPS[np.dtype(dtype)] / n
    bounds = np.abs(weight).sum(axis=0), np.abs(x[y >= 0]).sum(axis=0)
    for one, other, bound in zip(got, exact, bounds, strict=False):
        assert np.all(np.abs(one - other) <= (skip_below / n + rounding) * bound)
    skipped = ~got[1].any(axis=1)
    assert skipped.any()
    assert exact[1][skipped].any()  # they had gradients, which were left out


def test_classes_that_count_are_kept_in_every_kind_of_gradient(pieces):
    x, weight, y, bias = peaked(np.dtype("f8"))
    x[3, 0] = np.nan  # NaN counts as well
    for options in ({"label_smoothing": 0.5}, {"grad_output": -1.0}, {}):
        _, (dx, dw, _) = fastce.linear_cross_entropy_and_grad(
            x, weight, y, bias=bias, skip_below=1e-3, **options
        )
        assert np.isnan(dx[3]).all()
        assert np.isnan(dw).all()


@pytest.mark.parametrize("upstream", [2.0, -2.0])
def test_exactly_the_classes_below_the_bound_are_skipped(upstream):
    x, weight, y, _ = problem(bias=False)
    p = fastce.softmax(3 * x @ weight.T)
    counts = np.abs(p - np.eye(C)[y]).max(axis=0)
    bound = float(np.quantile(counts, 0.6))
    assert (counts[counts > bound] < 100 * bound).all()
    _, (_, dw, _) = fastce.linear_cross_entropy_and_grad(
        3 * x, weight, y, grad_output=upstream, skip_below=bound
    )
    assert dw.any(axis=1).tolist() == (counts > bound).tolist()


def test_skipping_multiplies_less(monkeypatch):
    x, weight, y, _ = peaked(np.dtype("f8"))
    sizes = []
    multiply = _blas.multiply

    def counted(a, b, out, **given):
        sizes.append(a.size * b.shape[1])
        multiply(a, b, out, **given)

    monkeypatch.setattr(_head, "multiply", counted)
    fastce.linear_cross_entropy_and_grad(x, weight, y)
    plain = sum(sizes)
    sizes.clear()
    fastce.linear_cross_entropy_and_grad(x, weight, y, skip_below=1e-6)
    assert sum(sizes) < plain * 0.7


# Pieces, threads, memory --------------------------------------------------------------------------


def test_same_bits_on_any_number_of_threads():
    x, weight = draw((700, 64)), draw((5000, 64), scale=0.2, seed=2)
    y, bias = draw_targets((700,), 5000), draw((5000,), seed=3)
    results = []
    for n in (1, 2, 5):
        with fastce.num_threads(n):
            results.append(fastce.linear_cross_entropy_and_grad(x, weight, y, bias=bias))
    for loss, gradients in results[1:]:
        assert same_bits(loss, results[0][0])
        assert all(map(same_bits, gradients, results[0][1]))


def test_memory_stays_within_its_bound():
    x, weight = draw((4096, 32)), draw((20000, 32), scale=0.2, seed=2)
    y, bias = draw_targets((4096,), 20000), draw((20000,), seed=3)
    logits = 4096 * 20000 * 4
    assert logits * 0.05 < 64e6 < logits
    out = tuple(np.zeros_like(a) for a in (x, weight, bias))
    calls = [
        lambda: fastce.linear_cross_entropy(x, weight, y, bias=bias),
        lambda: fastce.linear_cross_entropy_and_grad(x, weight, y, bias=bias, out=out),
    ]
    for call in calls:
        call()
        tracemalloc.start()
        try:
            call()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= 64e6


def test_a_loss_of_all_classes_at_a_time_has_the_bits_of_that_with_gradients():
    x, weight, y, bias = problem()
    loss, _ = fastce.linear_cross_entropy_and_grad(x, weight, y, bias=bias)
    assert same_bits(loss, fastce.linear_cross_entropy(x, weight, y, bias=bias))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_when_classes_are_divided(value, monkeypatch):
    """The same NaN and infinities as of all classes at a time."""
    x, weight, y, bias = problem()
    bias[3] = value
    weight[:, 0] = 0  # so that no sum becomes NaN
    x[7, 0] = np.nan
    whole = fastce.linear_cross_entropy(x, weight, y, bias=bias, reduction="none")
    monkeypatch.setattr(_head, "MEMORY", 20 * C * 8)
    monkeypatch.setattr(_head, "ROWS", 30)
    monkeypatch.setattr(_blas, "BLOCK", 5 * D * 4)
    partial, slices = shards.partial, []
    monkeypatch.setattr(
        shards, "partial", lambda z, *a, **k: slices.append(z.shape) or partial(z, *a, **k)
    )
    divided = fastce.linear_cross_entropy(x, weight, y, bias=bias, reduction="none")
    assert len(slices) > N // 30
    assert all(shape[1] < C for shape in slices)
    np.testing.assert_allclose(divided, whole, rtol=1e-14)


def test_marks_of_columns():
    """Beyond either bound, or NaN; the bound itself is not beyond; marks are kept."""
    g = np.zeros((3, 9), np.float32)
    g[0, 1], g[1, 2], g[2, 3], g[0, 4], g[1, 5], g[2, 6] = 0.6, -0.6, np.nan, 0.5, -0.5, np.inf
    for columns in (1, 4, 100):
        marks = np.zeros(9, np.bool_)
        marks[8] = True
        threads.launch(mark_beyond, (g, 0.5, marks, columns), True)
        assert np.flatnonzero(marks).tolist() == [1, 2, 3, 6, 8]


def test_the_kernel_of_sums_is_worth_its_threads(monkeypatch):
    """What the kernel adds is what NumPy adds, by one thread or several."""
    target, addend = draw((1000, 300)), draw((1000, 300), seed=4)
    for other in (addend, addend[:1]):
        want = target + other
        for n in (1, 3):
            got = target.copy()
            with threads.num_threads(n):
                _blas.add(got, other)
            assert same_bits(got, want)
    assert jit.cache_directory() is not None


# Errors -------------------------------------------------------------------------------------------

X, W, Y, B = problem(np.dtype("f4"))
OUT = (np.zeros_like(X), np.zeros_like(W), np.zeros_like(B))
READ_ONLY = np.zeros_like(W)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    "arguments, options, kind, message",
    [
        ((X[0], W, Y), {}, ValueError, r"x: expected shape \(rows, features\), got \(19,\)"),
        ((X, W[:, :3], Y), {}, ValueError, r"weight: expected shape \(classes, 19\)"),
        ((X, W[:0], Y), {}, ValueError, "weight: expected at least one class"),
        ((X.astype(int), W, Y), {}, TypeError, "x: expected float64, .*got int64"),
        ((X, W > 0, Y), {}, TypeError, "weight: expected float64, .*got bool"),
        ((X, W, Y), {"bias": B[:4]}, ValueError, r"bias: expected shape \(23,\), got \(4,\)"),
        ((X, W, Y[:5]), {}, ValueError, r"targets: expected shape \(37,\)"),
        ((X, W, Y + C), {}, IndexError, r"targets: expected integers in \[0, 23\)"),
        ((X, W, Y), {"class_weight": B[:4]}, ValueError, r"weight: expected shape \(23,\)"),
        ((X, W, Y), {"label_smoothing": 2}, ValueError, r"label_smoothing: expected .*\[0, 1\]"),
        ((X, W, Y), {"skip_below": 1.0}, ValueError, r"skip_below: expected .*\[0, 1\), got 1.0"),
        ((X, W, Y), {"skip_below": np.nan}, ValueError, "skip_below"),
        ((X, W, Y), {"out": OUT}, ValueError, "out: expected None for dbias"),
        ((X, W, Y), {"out": OUT[:2]}, ValueError, r"out: expected \(dx, dweight, dbias\)"),
        ((X, W, Y), {"out": (X, W, None)}, ValueError, "out: dx: expected memory apart from x"),
        ((X, W, Y), {"out": (OUT[0], READ_ONLY, None)}, ValueError, "out: dweight: .*read-only"),
        ((X, W, Y), {"out": (OUT[0], OUT[1][:5], None)}, ValueError, "out: dweight: .*shape"),
        ((X, W, Y), {"out": (OUT[0].astype("f8"), None, None)}, ValueError, "out: dx: .*float32"),
        ((X, W, Y), {"out": ([1.0], None, None)}, TypeError, "out: dx: expected a NumPy array"),
        ((X, W, Y), {"accumulate": True}, ValueError, "out: expected dx to accumulate into"),
        ((X, W, Y), {"grad_output": [1.0] * N}, ValueError, "grad_output: expected a single"),
    ],
)  # fmt: skip
def test_errors(arguments, options, kind, message):
    with pytest.raises(kind, match=message):
        fastce.linear_cross_entropy_and_grad(*arguments, **options)


def test_gradients_must_lie_apart_from_each_other():
    both = np.zeros((C, D), np.float32)
    with pytest.raises(ValueError, match="out: dweight: expected memory apart from dx"):
        fastce.linear_cross_entropy_and_grad(W, W.copy(), Y[:C], out=(both, both, None))


def test_nothing_is_written_before_an_error():
    out = tuple(np.full_like(a, 7) for a in (X, W, B))
    for y, options in ((Y + C, {}), (Y, {"softcap": -1.0}), (Y, {"skip_below": 5})):
        with pytest.raises((IndexError, ValueError)):
            fastce.linear_cross_entropy_and_grad(X, W, y, bias=B, out=out, **options)
    assert all(np.all(a == 7) for a in out)
