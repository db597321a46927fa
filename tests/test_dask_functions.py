"""`fastce.dask`: each function does what the one of the same name does, however it is chunked."""

import dask
import dask.array as da
import numpy as np
import pytest

import fastce
import fastce.dask
from tests import oracle
from tests.checks import (
    FLOATS,
    assert_close,
    assert_loss,
    draw,
    draw_soft,
    draw_targets,
    draw_weight,
    gradient_bound,
    loss_dtype,
    same_bits,
)

INF, NAN = np.inf, np.nan
LSE_BOUND = {8: 4e-16, 4: 3e-7}
ENTROPY_BOUND = {8: 1e-13, 4: 4e-6}
SHAPE = (12, 150)
# Blocks of many classes and of few are different kernels; some blocks are empty.
CHUNKS = {
    "one": SHAPE, "rows": (5, 150), "classes": (12, (70, 70, 10)),
    "both": ((7, 0, 5), (1, 70, 0, 79)),
}  # fmt: skip
DTYPES = [np.dtype("float32"), np.dtype("float64")]


def computed(array):
    """The result, which is what the lazy array promised to be."""
    result = array.compute(scheduler="sync")
    assert (result.shape, result.dtype) == (array.shape, array.dtype)
    return result


def unread(shape, chunks, dtype=np.float32):
    """An array whose chunks must not be made."""

    def make():
        raise AssertionError("computed early")

    return da.map_blocks(
        make, chunks=da.core.normalize_chunks(chunks, shape), dtype=dtype,
        meta=np.empty((0,) * len(shape), dtype),
    )  # fmt: skip


# logsumexp, softmax, log_softmax ------------------------------------------------------------------


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("dtype", [*DTYPES, FLOATS[3]], ids=str)
def test_softmax_and_its_logarithm(chunks, dtype):
    x = draw(SHAPE, dtype, scale=3.0)
    x[3] += 40 * (np.arange(150) == 77)  # a confident row keeps its digits
    z = da.from_array(x, chunks=CHUNKS[chunks])
    for name in ("softmax", "log_softmax"):
        found = getattr(fastce.dask, name)(z)
        assert found.chunks == z.chunks
        got = computed(found)
        assert got.dtype == dtype
        assert_close(got, getattr(oracle, name)(x), gradient_bound(dtype))
    assert_close(computed(fastce.dask.logsumexp(z)), oracle.logsumexp(x),
                 LSE_BOUND[loss_dtype(dtype).itemsize])  # fmt: skip


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 1), (0, 2), (2, 1), (0, 1, 2), ()], ids=str)
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("chunks", [(4, 5, 6), (2, 5, 6), (3, (2, 0, 3), 4)], ids=str)
def test_axes_of_logsumexp(axis, keepdims, chunks):
    x = draw((4, 5, 6), np.float64, scale=3.0)
    z = da.from_array(x, chunks=chunks)
    found = fastce.dask.logsumexp(z, axis=axis, keepdims=keepdims)
    assert_close(computed(found), oracle.logsumexp(x, axis=axis, keepdims=keepdims), 4e-16)
    axes = range(3) if axis is None else np.atleast_1d(np.array(axis, int)) % 3
    kept = [z.chunks[k] if k not in axes else (1,) for k in range(3) if keepdims or k not in axes]
    assert found.chunks == tuple(kept)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_softmax_along_any_axis(axis):
    x = draw((4, 5, 6), np.float64, scale=3.0)
    z = da.from_array(x, chunks=(3, 2, 4))
    got = computed(fastce.dask.softmax(z, axis=axis))
    assert_close(got, oracle.softmax(x, axis=axis), 1e-13)


@pytest.mark.parametrize("axis", [None, (), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_over_several_axes(name, axis):
    x = draw((4, 5, 6), np.float64, scale=3.0)
    for chunks in (6, 3, (2, 5, 4), (4, (0, 2, 3), 6)):
        got = computed(getattr(fastce.dask, name)(da.from_array(x, chunks=chunks), axis=axis))
        np.testing.assert_allclose(got, getattr(fastce, name)(x, axis=axis), rtol=1e-13)
    assert computed(getattr(fastce.dask, name)(da.zeros((3, 0), chunks=2))).shape == (3, 0)


@pytest.mark.parametrize("name", ["logsumexp", "softmax", "log_softmax"])
def test_what_is_not_divided_has_the_bits_of_the_undivided(name):
    x = draw((20, 90))
    got = computed(getattr(fastce.dask, name)(da.from_array(x, chunks=(6, 90))))
    assert same_bits(got, getattr(fastce, name)(x))


@pytest.mark.parametrize("name", ["logsumexp", "softmax", "log_softmax"])
@pytest.mark.parametrize("dtype", ["int8", "int64", "uint64", "bool"])
def test_integers_compute_in_float64(name, dtype):
    x = np.array([[0, 1, 3], [1, 1, 0]], dtype)
    got = computed(getattr(fastce.dask, name)(da.from_array(x, chunks=(1, 2))))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, getattr(fastce, name)(x), rtol=1e-15)


SPECIAL = np.array([
    [-INF, -INF, -INF, -INF],
    [INF, 0, 1, 2],
    [INF, INF, -INF, 0],
    [0, INF, NAN, 0],
    [0, 0, 1, NAN],
    [-INF, -INF, 2.0, -INF],
    [-INF, 0, -INF, 0],
    [1e30, 0, 1e30, -1e30],
    [0, 1, 2, 3],
])  # fmt: skip


@pytest.mark.parametrize("name", ["logsumexp", "softmax", "log_softmax"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", [0, 100])
def test_special_values(name, dtype, padding):
    x = np.concatenate([SPECIAL, np.full((len(SPECIAL), padding), -INF)], axis=1).astype(dtype)
    for chunks in ((2, 2), (4, (1, 1, 2 + padding)), (9, (3, 1 + padding))):
        got = computed(getattr(fastce.dask, name)(da.from_array(x, chunks=chunks)))
        np.testing.assert_allclose(got, getattr(fastce, name)(x), rtol=1e-6)


def test_nothing_to_sum_over_and_no_rows():
    nothing = da.zeros((3, 0), chunks=(2, 1))
    assert np.all(computed(fastce.dask.logsumexp(nothing)) == -INF)
    assert np.all(computed(fastce.dask.logsumexp(nothing, axis=None, keepdims=True)) == -INF)
    no_rows = da.zeros((0, 5), chunks=(1, 2))
    assert computed(fastce.dask.logsumexp(no_rows)).shape == (0,)
    assert computed(fastce.dask.softmax(no_rows)).shape == (0, 5)


# cross_entropy_stats ------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "weight", "soft"])
def test_stats(chunks, dtype, kind):
    logits = draw(SHAPE, dtype, scale=3.0)
    logits[5] += 20 * (np.arange(150) == 9)  # certain, so that its entropy is small
    targets = draw_soft(SHAPE, dtype) if kind == "soft" else draw_targets((12,), 150)
    options = {"weight": draw_weight(150), "ignore_index": 3} if kind == "weight" else {}
    if kind != "soft":
        targets[[2, 4]] = 3
    z = da.from_array(logits, chunks=CHUNKS[chunks])
    got = fastce.dask.cross_entropy_stats(z, targets, **options)
    want = oracle.cross_entropy_stats(logits, targets, **options)
    assert isinstance(got, fastce.CrossEntropyStats)
    size = dtype.itemsize
    assert_loss(computed(got.loss), want.loss, dtype, anywhere=True)
    assert_close(computed(got.lse), want.lse, LSE_BOUND[size])
    assert_close(computed(got.entropy), want.entropy, ENTROPY_BOUND[size])
    np.testing.assert_array_equal(computed(got.predicted), want.predicted)
    assert computed(got.total_weight) == pytest.approx(float(want.total_weight), rel=1e-15)
    for field in got[:4]:
        assert field.dtype == (np.int64 if field is got.predicted else dtype)
        assert field.chunks == z.chunks[:1]


@pytest.mark.parametrize("axis", [0, 1])
def test_stats_of_special_rows(axis):
    logits = np.array([[NAN, 0, 1, 2], [0, 1, NAN, 3], *SPECIAL])
    targets = np.full(len(logits), 1)
    targets[0] = -100
    if axis == 0:
        logits = np.ascontiguousarray(logits.T)
    want = fastce.cross_entropy_stats(logits, targets, axis=axis)
    got = fastce.dask.cross_entropy_stats(da.from_array(logits, chunks=2), targets, axis=axis)
    known = ~np.isnan(logits).any(axis=axis) | (targets == -100)
    for name in ("loss", "lse", "entropy"):
        np.testing.assert_allclose(computed(getattr(got, name)), getattr(want, name), rtol=1e-14)
    np.testing.assert_array_equal(computed(got.predicted)[known], want.predicted[known])


def test_what_needs_no_logits_computes_none():
    stats = fastce.dask.cross_entropy_stats(unread((6, 4), (2, 3)), np.array([0, 1, 2, 3, -100, 0]))
    assert computed(stats.total_weight) == 5
    with pytest.raises(AssertionError, match="computed early"):
        stats.loss.compute(scheduler="sync")


# nll_loss -----------------------------------------------------------------------------------------

REDUCTIONS = {
    "mean": {},
    "sum": {"reduction": "sum", "grad_output": 2.0},
    "none": {"reduction": "none", "grad_output": "rows"},
    "normalizer": {"normalizer": 7.0},
    "weight": {"weight": draw_weight(150), "ignore_index": 3},
}


def filled(options, rows, chunks=None):
    """The options, with one upstream gradient per row where they say so."""
    options = dict(options)
    if options.get("grad_output") == "rows":
        options["grad_output"] = draw(rows, np.float64, seed=5)
    lazy = dict(options)
    if chunks is not None and np.ndim(options.get("grad_output")):
        lazy["grad_output"] = da.from_array(options["grad_output"], chunks=chunks)
    return options, lazy


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, FLOATS[3]], ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_nll_loss(chunks, name, dtype, soft):
    lp = fastce.log_softmax(draw(SHAPE, np.float64, scale=3.0)).astype(dtype)
    lp[1, 5] = -INF
    targets = draw_soft(SHAPE, dtype) if soft else draw_targets((12,), 150, np.uint8)
    options, lazy = filled(REDUCTIONS[name], (12,), chunks=5)
    if soft:
        targets[1, 5] = 0
        options.pop("ignore_index", None)
        lazy.pop("ignore_index", None)
    else:
        targets[[1, 4]] = 5, 3
    want = oracle.nll_loss(lp, targets, **options)
    z = da.from_array(lp, chunks=CHUNKS[chunks])
    loss, grad = fastce.dask.nll_loss_and_grad(z, da.from_array(targets, chunks=4), **lazy)
    assert grad.chunks == z.chunks
    assert_loss(computed(loss), want.loss, dtype)
    assert_close(computed(grad), want.grad, gradient_bound(dtype))
    lazy.pop("grad_output", None)
    assert same_bits(computed(fastce.dask.nll_loss(z, targets, **lazy)), computed(loss))


@pytest.mark.parametrize("soft", [False, True])
def test_what_no_label_names_is_not_looked_at(soft):
    lp = np.full((4, 7), NAN)
    targets = np.array([0, 6, -100, 3])
    lp[[0, 1, 3], targets[[0, 1, 3]]] = -1.0, -INF, -3.0
    if soft:
        lp = np.where(np.isnan(lp), -INF, lp)
        targets = np.eye(7)[[0, 6, 6, 3]]
    z = da.from_array(lp, chunks=(3, 2))
    got = computed(fastce.dask.nll_loss(z, targets, reduction="none"))
    np.testing.assert_array_equal(got, fastce.nll_loss(lp, targets, reduction="none"))
    mean = computed(fastce.dask.nll_loss(z, targets if soft else np.full(4, -100)))
    assert mean == INF if soft else np.isnan(mean)


# binary_cross_entropy -----------------------------------------------------------------------------

BINARY = {
    "plain": {},
    "targets of integers": {"targets": np.int8},
    "everything": {"weight": (150,), "pos_weight": (12, 1), "reduction": "sum", "grad_output": 3.0},
    "none": {"weight": (12, 150), "pos_weight": (), "reduction": "none", "grad_output": "all"},
}


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lazily", [False, True])
def test_binary_cross_entropy(chunks, name, dtype, lazily):
    logits = draw(SHAPE, dtype, scale=3.0)
    logits[0, :3] = INF, -INF, 50
    options = dict(BINARY[name])
    kind = options.pop("targets", dtype)
    targets = (np.random.default_rng(1).random(SHAPE) < 0.4).astype(kind)
    targets[0, :3] = 1, 0, 1
    for factor in ("weight", "pos_weight"):
        if factor in options:
            options[factor] = draw_weight(12 * 150)[: int(np.prod(options[factor]))].reshape(
                options[factor]
            )
    if options.get("grad_output") == "all":
        options["grad_output"] = draw(SHAPE, np.float64, seed=5)
    want = oracle.binary_cross_entropy(logits, targets, **options)
    z = da.from_array(logits, chunks=CHUNKS[chunks])
    if lazily:
        options = {k: da.from_array(v) if isinstance(v, np.ndarray) else v
                   for k, v in options.items()}  # fmt: skip
        targets = da.from_array(targets, chunks=(2, 40))
    loss, grad = fastce.dask.binary_cross_entropy_and_grad(z, targets, **options)
    assert grad.chunks == z.chunks
    assert_loss(computed(loss), want.loss, dtype)
    assert_close(computed(grad), want.grad, gradient_bound(dtype))
    options.pop("grad_output", None)
    assert same_bits(computed(fastce.dask.binary_cross_entropy(z, targets, **options)),
                     computed(loss))  # fmt: skip


def test_a_single_number_and_none():
    loss, grad = fastce.dask.binary_cross_entropy_and_grad(da.from_array(np.float64(2.0)), 1)
    want = fastce.binary_cross_entropy_and_grad(2.0, 1)
    assert (computed(loss), computed(grad)) == want
    empty = da.zeros((0, 3), chunks=2)
    assert np.isnan(computed(fastce.dask.binary_cross_entropy(empty, np.zeros((0, 3)))))
    assert computed(fastce.dask.binary_cross_entropy(empty, empty, reduction="sum")) == 0


# gradient_hessian, hessian_vector_product ---------------------------------------------------------


@pytest.mark.parametrize("chunks", ["one", "rows"])
@pytest.mark.parametrize("hessian", ["diag", "xgboost", "lightgbm", "abs_residual"])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_hessian(chunks, hessian, weighted):
    logits, targets = draw(SHAPE, scale=3.0), draw_targets((12,), 150)
    weight = draw((12,), np.float64) if weighted else None
    want = fastce.gradient_hessian(logits, targets, sample_weight=weight, hessian=hessian)
    z = da.from_array(logits, chunks=CHUNKS[chunks])
    for lazily in (False, True):
        found = fastce.dask.gradient_hessian(
            z, da.from_array(targets) if lazily else targets,
            sample_weight=da.from_array(weight, chunks=5) if lazily and weighted else weight,
            hessian=hessian,
        )  # fmt: skip
        for got, one in zip(found, want, strict=True):
            assert got.chunks == z.chunks
            assert same_bits(computed(got), one)


@pytest.mark.parametrize("chunks", ["one", "rows"])
@pytest.mark.parametrize("g", [None, 0.5, "rows"])
def test_hessian_vector_product(chunks, g):
    logits, v = draw(SHAPE, scale=3.0), draw(SHAPE, seed=3)
    g = draw((12,), np.float64) if g == "rows" else g
    want = fastce.hessian_vector_product(logits, v, grad_output=g)
    z = da.from_array(logits, chunks=CHUNKS[chunks])
    for vector in (v, da.from_array(v, chunks=(12, 7))):
        found = fastce.dask.hessian_vector_product(z, vector, grad_output=g)
        assert found.chunks == z.chunks
        assert same_bits(computed(found), want)


# linear_cross_entropy -----------------------------------------------------------------------------

LINEAR = {
    "plain": {},
    "bias": {"bias": True, "reduction": "sum", "grad_output": 2.0},
    "none": {"bias": True, "reduction": "none", "grad_output": "rows"},
    "normalizer": {"normalizer": 7.0, "z_loss": 0.1},
    "everything": {
        "bias": True, "class_weight": draw_weight(50), "label_smoothing": 0.1, "z_loss": 0.1,
        "softcap": 5.0, "ignore_index": 3,
    },
}  # fmt: skip
LAYERS = {"one": (31, 50), "rows": (9, 50), "classes": (31, (20, 0, 29, 1)), "both": (9, (20, 30))}


@pytest.mark.parametrize("chunks", LAYERS)
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("soft", [False, True])
def test_linear_cross_entropy(chunks, name, soft):
    x, weight, bias = draw((31, 8)), draw((50, 8), seed=1), draw((50,), seed=2)
    targets = draw_soft((31, 50)) if soft else draw_targets((31,), 50)
    options, lazy = filled(LINEAR[name], (31,), chunks=4)
    if soft:
        options.pop("ignore_index", None)
        lazy.pop("ignore_index", None)
    else:
        targets[[2, 17]] = 3
    rows, classes = LAYERS[chunks]
    if options.pop("bias", False):
        options["bias"], lazy["bias"] = bias, bias
    lazily = da.from_array(x, chunks=(rows, 8)), da.from_array(weight, chunks=(classes, 8))
    want, gradients = fastce.linear_cross_entropy_and_grad(x, weight, targets, **options)
    loss, found = fastce.dask.linear_cross_entropy_and_grad(*lazily, targets, **lazy)
    np.testing.assert_allclose(computed(loss), want, rtol=2e-6)
    for got, expected, of in zip(found, gradients, (*lazily, lazily[1][:, 0]), strict=True):
        if expected is None:
            assert got is None
            continue
        assert got.chunks == of.chunks
        np.testing.assert_allclose(computed(got), expected, rtol=2e-5, atol=1e-6)
    lazy.pop("grad_output", None)
    alone = fastce.dask.linear_cross_entropy(*lazily, targets, **lazy)
    assert same_bits(computed(alone), computed(loss))


@pytest.mark.parametrize("classes", [50, 20])
def test_linear_cross_entropy_in_other_dtypes(classes):
    targets = draw_targets((31,), 50)
    for dtypes in (("f8", "f4"), (FLOATS[3], FLOATS[3]), ("f2", "f2")):
        x, weight = draw((31, 8), dtypes[0]), draw((50, 8), dtypes[1], seed=1)
        bias = draw((50,), dtypes[1])
        want, gradients = fastce.linear_cross_entropy_and_grad(x, weight, targets, bias=bias)
        loss, found = fastce.dask.linear_cross_entropy_and_grad(
            da.from_array(x, chunks=(5, 8)), da.from_array(weight, chunks=(classes, 8)), targets,
            bias=da.from_array(bias, chunks=7),
        )  # fmt: skip
        assert computed(loss) == pytest.approx(float(want), rel=1e-6)
        for got, expected in zip(found, gradients, strict=True):
            assert got.dtype == expected.dtype
            unit = 2.0**-7 if expected.itemsize == 2 else 1e-6
            np.testing.assert_allclose(computed(got).astype(float), expected.astype(float),
                                       rtol=unit, atol=1e-4 * unit)  # fmt: skip


def test_the_weights_may_be_in_memory_and_skipping_is_passed_on():
    x, weight, targets = draw((30, 4), scale=4), draw((80, 4), scale=4), draw_targets((30,), 80)
    z = da.from_array(x, chunks=(10, 4))
    loss, (dx, dweight, _) = fastce.dask.linear_cross_entropy_and_grad(
        z, weight, targets, skip_below=0.01
    )
    assert dweight.chunks == ((80,), (4,))
    exact, (_, all_of_it, _) = fastce.linear_cross_entropy_and_grad(x, weight, targets)
    assert computed(loss) == pytest.approx(float(exact), rel=1e-6)
    skipped = computed(dweight)
    assert np.count_nonzero(skipped) < np.count_nonzero(all_of_it)
    bound = 0.01 / 30 * np.abs(x).sum(axis=0)
    assert np.all(np.abs(skipped - all_of_it) <= bound + 1e-6)
    assert computed(dx).shape == x.shape


def _unaligned(block):
    """A block as it comes from another worker: anywhere in memory."""
    memory = np.empty(block.nbytes + 1, np.uint8)[1:]
    moved = memory.view(block.dtype).reshape(block.shape)
    moved[...] = block
    return moved


@pytest.mark.parametrize("classes", [40, 30])
def test_where_a_chunk_lies_changes_no_bit(classes):
    x = da.from_array(draw((50, 300)), chunks=(25, 300))
    weight = da.from_array(draw((40, 300), seed=1), chunks=(classes, 300))
    targets = draw_targets((50,), 40)
    results = []
    for arrays in ((x, weight), (x.map_blocks(_unaligned), weight.map_blocks(_unaligned))):
        loss, gradients = fastce.dask.linear_cross_entropy_and_grad(*arrays, targets)
        results.append([computed(a).tobytes() for a in (loss, *gradients[:2])])
    assert results[0] == results[1]


def test_no_rows_of_a_linear_layer():
    x = da.zeros((0, 3), chunks=(2, 3))
    for weight in (np.ones((5, 3)), da.ones((5, 3), chunks=(2, 3))):
        loss, (dx, dweight, _) = fastce.dask.linear_cross_entropy_and_grad(
            x, weight, np.empty(0, int)
        )
        assert np.isnan(computed(loss))
        assert computed(dx).shape == (0, 3)
        assert not computed(dweight).any()


# All of them --------------------------------------------------------------------------------------

Y = np.array([0, 1, 2, 3, 4, 0])
W = np.ones((5, 4))
CALLS = {
    "cross_entropy": lambda z, f=fastce.dask: f.cross_entropy(z, Y),
    "cross_entropy_and_grad": lambda z, f=fastce.dask: f.cross_entropy_and_grad(z, Y),
    "cross_entropy_stats": lambda z, f=fastce.dask: tuple(f.cross_entropy_stats(z, Y)),
    "logsumexp": lambda z, f=fastce.dask: f.logsumexp(z, axis=None),
    "softmax": lambda z, f=fastce.dask: f.softmax(z),
    "log_softmax": lambda z, f=fastce.dask: f.log_softmax(z),
    "nll_loss_and_grad": lambda z, f=fastce.dask: f.nll_loss_and_grad(z, Y),
    "binary_cross_entropy_and_grad": lambda z, f=fastce.dask: f.binary_cross_entropy_and_grad(z, z),
    "gradient_hessian": lambda z, f=fastce.dask: f.gradient_hessian(z, Y),
    "hessian_vector_product": lambda z, f=fastce.dask: f.hessian_vector_product(z, z),
    "linear_cross_entropy_and_grad": lambda z, f=fastce.dask: f.linear_cross_entropy_and_grad(
        z, np.ones((5, z.shape[1])), Y
    )[0],
}
ROW_WISE = ("gradient_hessian", "hessian_vector_product", "linear_cross_entropy_and_grad")


def test_every_public_function_is_there():
    threads = {"get_num_threads", "set_num_threads", "num_threads", "CrossEntropyStats"}
    assert set(fastce.dask.__all__) == set(fastce.__all__) - threads
    assert {name.removesuffix("_and_grad") for name in fastce.dask.__all__} == {
        name.removesuffix("_and_grad") for name in CALLS
    }


def arrays_of(name, z):
    """The lazy results of a call."""
    found = CALLS[name](z)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize(
    "name, classes",
    [
        (name, classes)
        for name in CALLS
        for classes in (5, 2)
        if classes == 5 or name not in ROW_WISE
    ],
)
def test_nothing_is_computed_before_it_is_asked_for(name, classes):
    arrays = arrays_of(name, unread((6, 5), (2, classes)))
    assert all(isinstance(array, da.Array) for array in arrays)
    with pytest.raises(AssertionError, match="computed early"):
        arrays[0].compute(scheduler="sync")


@pytest.mark.parametrize("name", CALLS)
def test_every_bit_is_the_same_in_any_schedule(name):
    z = da.from_array(draw((6, 5)), chunks=(1, 5 if name in ROW_WISE else 2))
    arrays = arrays_of(name, z)
    seen = {
        tuple(a.tobytes() for a in dask.compute(*arrays, scheduler=scheduler))
        for scheduler in ("sync", "threads", "threads")
    }
    assert len(seen) == 1


@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_the_wrong_kind(name):
    with pytest.raises(TypeError, match="expected a dask array, got ndarray"):
        CALLS[name](np.zeros((6, 5)))
    with pytest.raises(ValueError, match="expected chunks of known sizes"):
        CALLS[name](da.zeros((6, 5))[da.zeros(6) == 0])
    with pytest.raises(TypeError, match="expected float64"):
        CALLS[name](da.zeros((6, 5), dtype=complex))


@pytest.mark.parametrize("name", ROW_WISE[:2])
def test_what_needs_all_classes_says_how_to_get_them(name):
    z = da.from_array(draw((6, 5)), chunks=(2, 2))
    with pytest.raises(ValueError, match=r"got \(2, 2, 1\); logits.rechunk\({1: -1}\) makes it"):
        CALLS[name](z)
    CALLS[name](z.rechunk({1: -1}))


Z = da.zeros((6, 5), chunks=(2, 2))
X = da.zeros((6, 4), chunks=(2, 4))
BAD = [
    (lambda f: f.softmax(Z, axis=2), ValueError, "axis: expected integers in"),
    (lambda f: f.logsumexp(Z, axis=(0, 0)), ValueError, "each axis once"),
    (lambda f: f.cross_entropy_stats(Z, Y[:2]), ValueError, "targets: expected shape"),
    (lambda f: f.cross_entropy_stats(Z, Z, ignore_index=1), ValueError, "ignore_index"),
    (lambda f: f.cross_entropy(Z, Y, weight=da.ones(5)), TypeError, "weight: .* array in memory"),
    (
        lambda f: f.cross_entropy(Z, da.from_array(Y)[da.zeros(6) == 0]),
        ValueError,
        "targets: .* known sizes",
    ),
    (lambda f: f.nll_loss(Z, Y, weight=np.ones(4)), ValueError, "weight: expected shape"),
    (lambda f: f.nll_loss(Z, Y * 1.0), TypeError, "targets: expected integers"),
    (lambda f: f.binary_cross_entropy(Z, Y), ValueError, "targets: expected the shape"),
    (lambda f: f.binary_cross_entropy(Z, Z, weight=np.ones(4)), ValueError, "weight: .* broadcast"),
    (lambda f: f.binary_cross_entropy(Z, Z, pos_weight="3"), TypeError, "pos_weight"),
    (lambda f: f.binary_cross_entropy(Z, Z, reduction="max"), ValueError, "reduction"),
    (
        lambda f: f.binary_cross_entropy_and_grad(Z, Z, grad_output=np.ones((6, 5))),
        ValueError,
        "grad_output",
    ),
    (
        lambda f: f.cross_entropy_and_grad(Z, Y, grad_output=da.ones(6)),
        ValueError,
        "grad_output: expected a single number",
    ),
    (lambda f: f.gradient_hessian(Z.rechunk(6), Y, hessian="full"), ValueError, "hessian"),
    (lambda f: f.gradient_hessian(Z.rechunk(6), Z), TypeError, "targets: expected integers"),
    (
        lambda f: f.gradient_hessian(Z.rechunk(6), Y, sample_weight=np.ones(5)),
        ValueError,
        "sample_weight: expected shape",
    ),
    (lambda f: f.hessian_vector_product(Z.rechunk(6), Y), TypeError, "v: expected float64"),
    (lambda f: f.hessian_vector_product(Z.rechunk(6), X), ValueError, "v: expected the shape"),
    (lambda f: f.linear_cross_entropy(X, W[:, :3], Y), ValueError, "weight: expected shape"),
    (lambda f: f.linear_cross_entropy(X.rechunk(2), W, Y), ValueError, r"x.rechunk\({1: -1}\)"),
    (
        lambda f: f.linear_cross_entropy(X, da.from_array(W, chunks=2), Y),
        ValueError,
        r"weight: expected one chunk along axis 1, got \(2, 2\)",
    ),
    (lambda f: f.linear_cross_entropy(X, W, Y, bias=np.ones(4)), ValueError, "bias"),
    (
        lambda f: f.linear_cross_entropy(X, W, Y, class_weight=np.ones(4)),
        ValueError,
        "class_weight: expected shape",
    ),
    (lambda f: f.linear_cross_entropy_and_grad(X, W, Y, skip_below=1), ValueError, "skip_below"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input_is_named_at_once(call, error, message):
    with pytest.raises(error, match=message):
        call(fastce.dask)


@pytest.mark.parametrize(
    "call",
    [
        lambda f, y: f.cross_entropy_stats(Z, y).total_weight,
        lambda f, y: f.cross_entropy_stats(Z, y).entropy,
        lambda f, y: f.nll_loss(Z, y, reduction="none"),
        lambda f, y: f.nll_loss_and_grad(Z, y, reduction="sum")[1],
        lambda f, y: f.gradient_hessian(Z.rechunk((2, 5)), y)[1],
        lambda f, y: f.linear_cross_entropy(X, W, y, reduction="sum"),
        lambda f, y: f.linear_cross_entropy(X, da.from_array(W, chunks=(2, 4)), y),
    ],
)
def test_a_bad_target_is_named_with_its_chunk(call):
    array = call(fastce.dask, np.array([0, 1, 2, 5, 4, 0], np.uint8))
    with pytest.raises(IndexError, match=r"got 5 at index \(1,\), in the chunk .* at \(2,"):
        array.compute(scheduler="sync")


def test_an_upstream_gradient_that_is_not_known_yet():
    logits = draw((6, 5))
    z = da.from_array(logits, chunks=2)
    g = da.from_array(np.float64(3.0)) * 2
    for options, value in (({}, 6.0), ({"reduction": "none"}, np.arange(6.0))):
        lazy = da.from_array(value, chunks=4) if np.ndim(value) else g
        found = fastce.dask.cross_entropy_and_grad(z, Y, grad_output=lazy, **options)[1]
        want = fastce.cross_entropy_and_grad(logits, Y, grad_output=value, **options)[1]
        np.testing.assert_allclose(computed(found), want, rtol=1e-5)
