"""`fastce.rows`: the bits of the NumPy functions, row by row, inside the user's own code."""

import shutil

import ml_dtypes
import numba
import numpy as np
import pytest
from numba.core.errors import TypingError

import fastce
from fastce import rows
from tests.checks import draw, draw_soft, draw_targets, loss_dtype, same_bits
from tests.conftest import PACKAGE

# Below, at and above a vector, 64 classes (from where lanes run along the row) and a block.
SIZES = [1, 2, 3, 7, 8, 9, 16, 31, 32, 33, 50, 63, 64, 65, 100, 511, 1000]

ROWS = {
    "NaN": [0.0, np.nan, 1.0],
    "NaN first": [np.nan, 0.0, 1.0],
    "all NaN": [np.nan, np.nan, np.nan],
    "+inf": [0.0, 1.0, np.inf],
    "+inf, NaN": [np.inf, 1.0, np.nan],
    "-inf": [0.0, -np.inf, 1.0],
    "-inf, NaN": [-np.inf, np.nan, -np.inf],
    "all -inf": [-np.inf, -np.inf, -np.inf],
    "ties": [1.0, 1.0, 1.0],
    "far": [1e6, 1e6 + 1, 1e6 + 2],
    "confident": [0.0, 60.0, 1.0],
    "negative zero": [-0.0, 0.0, -0.0],
}


@numba.njit
def logsumexp(z):
    return rows.logsumexp(z)


@numba.njit
def cross_entropy(z, y):
    return rows.cross_entropy(z, y)


@numba.njit
def with_grad(z, y, out, g):
    return rows.cross_entropy_and_grad(z, y, out, g)


@numba.njit
def with_options(z, y, out, g, weight, smoothing, z_loss, softcap):
    return rows.cross_entropy_and_grad(z, y, out, g, weight, smoothing, z_loss, softcap)


@numba.njit
def weighted(z, y, weight, smoothing):
    return rows.cross_entropy(z, y, weight=weight, label_smoothing=smoothing)


@numba.njit
def in_two_parts(z, k):
    return rows.merge(rows.partial(z[:k]), rows.partial(z[k:]))


def bits(array):
    """The array as numba takes it."""
    if array.dtype.itemsize > 2:
        return array
    return array.view(np.uint16 if array.dtype == np.float16 else np.int16)


def row(values, classes, dtype):
    """A row that starts with `values` and goes on with small logits."""
    z = draw((classes,), dtype)
    z[: len(values)] = np.array(values[:classes]).astype(dtype)
    return z


def same(got, want):
    """The same bits, but for which NaN it is."""
    got, want = np.asarray(got), np.asarray(want)
    number = want == want
    return np.array_equal(number, got == got) and same_bits(got[number], want[number])


def assert_same(z, y, **options):
    """The loss and the gradient that compiled code gets are those of the NumPy function."""
    dtype = loss_dtype(z.dtype).type
    want, want_grad = fastce.cross_entropy_and_grad(
        z, y, reduction="sum", grad_output=0.37, **options
    )
    out = np.empty_like(z)
    if options:
        values = [options.get(k) for k in ("weight", "label_smoothing", "z_loss", "softcap")]
        target = y if isinstance(y, int) else bits(y)
        loss = with_options(bits(z), target, bits(out), 0.37, *values)
    else:
        loss = with_grad(bits(z), y, bits(out), 0.37)
        in_place = z.copy()
        with_grad(bits(in_place), y, bits(in_place), 0.37)
        assert same(in_place, want_grad)
    assert same(dtype(loss), want)
    assert same(out, want_grad)


@pytest.mark.parametrize("classes", SIZES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16])
def test_the_bits_of_the_numpy_functions(dtype, classes):
    for scale in (1, 30):
        z = draw((classes,), dtype, scale=scale, seed=classes)
        assert_same(z, classes * 2 // 3)
        assert_same(z, int(np.argmax(z)))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("classes", [3, 40, 64, 700])
def test_edge_cases(name, classes):
    dtype = np.float32
    z = row(ROWS[name], classes, dtype)
    for y in (0, 1, classes - 1):
        assert_same(z, y)
        assert same(dtype(cross_entropy(z, y)), fastce.cross_entropy(z, y))
    want = fastce.logsumexp(z)
    assert same(dtype(logsumexp(z)), want)
    for k in (0, 1, 2, classes):
        m, rest = in_two_parts(z, k)
        np.testing.assert_allclose(m + np.log1p(rest), want, rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("classes", [3, 63, 64, 700])
@pytest.mark.parametrize("smoothing, z_loss, softcap", [(0.1, 0.0, 30.0), (0.3, 1e-2, 5.0)])
def test_options(classes, smoothing, z_loss, softcap):
    z = row([0.0, -np.inf, 4.0], classes, np.float32)
    for y in (0, 2):
        assert_same(z, y, label_smoothing=smoothing, z_loss=z_loss, softcap=softcap)


@pytest.mark.parametrize("classes", [1, 3, 33, 63, 64, 65, 700])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["class", "probabilities"])
def test_class_weights_and_probabilities(classes, smoothing, kind):
    """Also with negative weights, whose zeros have a sign, in confident and masked rows."""
    weight = np.random.default_rng(3).normal(size=classes).astype(np.float32)
    for start in ([], [0.0, 60.0, 1.0], [0.0, 200.0, -np.inf, 3.0], ROWS["NaN"]):
        z = row(start, classes, np.float32)
        y = classes // 2 if kind == "class" else draw_soft((classes,))
        options = {"label_smoothing": smoothing, "z_loss": 0.01, "softcap": 300.0}
        assert_same(z, y, weight=weight, **options)
        if kind == "probabilities":
            assert_same(z, y, **options)


@pytest.mark.parametrize("classes", [40, 700])
def test_dtypes_of_weights_and_probabilities(classes):
    """Weights are computed with in the precision of the logits, probabilities come in any."""
    weight = np.random.default_rng(3).normal(size=classes)
    soft = draw_soft((classes,), ml_dtypes.bfloat16)
    for z, y in ((draw((classes,)), 3), (draw((classes,), np.float64), bits(soft))):
        given = 3 if isinstance(y, int) else soft
        options = {"weight": weight, "label_smoothing": 0.1, "reduction": "sum"}
        want = fastce.cross_entropy(z, given, **options)
        assert same_bits(z.dtype.type(weighted(z, y, weight, 0.1)), want)


def test_strides_of_probabilities():
    for classes in (10, 100):
        z, wide = draw((classes,)), draw_soft((3, classes), axis=1).T.copy()
        want = fastce.cross_entropy(z, wide[:, 1])
        assert same_bits(np.float32(cross_entropy(z, wide[:, 1])), want)
        assert same_bits(
            np.float32(cross_entropy(z[::-1], wide[::-1, 1])),
            fastce.cross_entropy(z[::-1], wide[::-1, 1]),
        )
        z[3] += 20  # the maximum, whose gradient is written apart
        grad = np.empty_like(z)
        with_options(z, wide[:, 1], grad, 0.37, None, 0.0, 0.0, None)
        want = fastce.cross_entropy_and_grad(z, wide[:, 1].copy(), grad_output=0.37)[1]
        assert same_bits(grad, want)


@pytest.mark.parametrize("classes", [5, 63, 64, 700])
def test_strides(classes):
    wide = draw((classes, 7))
    assert_same(wide[:, 3], 1)
    assert_same(wide[::-1, 3], 1)
    assert_same(wide.T[3], 1)
    out = np.zeros_like(wide)
    with_grad(wide[:, 3], 1, out[:, 2], 1.0)
    assert same_bits(out[:, 2], fastce.cross_entropy_and_grad(wide[:, 3], 1)[1])
    assert not out[:, :2].any()
    assert not out[:, 3:].any()


def test_nothing_else_is_written():
    for classes in (5, 63, 64, 700):
        out = np.full(classes + 64, 7.0, np.float32)
        with_grad(draw((classes,)), 1, out[32:-32], 1.0)
        assert (out[:32] == 7).all()
        assert (out[-32:] == 7).all()


def test_merging_in_any_order():
    z = draw((999,), np.float64, scale=10)
    for k in (1, 10, 500, 998):
        part, other = rows.partial(z[:k]), rows.partial(z[k:])
        assert rows.merge(part, other) == rows.merge(other, part)
        m, rest = rows.merge(part, other)
        assert m == z.max()
        want = np.sum(np.exp(np.sort(z)[:-1].astype(np.longdouble) - m))
        assert abs(rest - want) <= 4e-15 * want


def test_merging_parts_with_the_same_maximum():
    for one, other in np.random.default_rng(0).random((50, 2)):
        both = rows.merge((1.0, one), (1.0, other))
        assert both == rows.merge((1.0, other), (1.0, one))
        assert both == (1.0, pytest.approx(one + other + 1, rel=1e-15))
    for infinite in (-np.inf, np.inf):  # as the partials of all of it would be
        assert rows.partial(np.array([infinite, infinite])) == (infinite, 0.0)
        assert rows.merge((infinite, 0.0), (infinite, 0.0)) == (infinite, 0.0)


def test_the_rest_of_a_confident_row_keeps_its_digits():
    z = np.array([0.0, 0.5, 700.0, -1.0])
    _, rest = in_two_parts(z, 2)
    want = np.exp(np.array([0.0, 0.5, -1.0], np.longdouble) - 700).sum()
    assert abs(rest - want) <= 1e-13 * want


@numba.njit(parallel=True)
def in_parallel(x, targets, losses, grad):
    for i in numba.prange(x.shape[0]):
        losses[i] = rows.cross_entropy(x[i] * np.float32(2), targets[i])  # of a temporary
        rows.cross_entropy_and_grad(x[i], targets[i], grad[i])


def test_in_prange():
    x, targets = draw((300, 50)), draw_targets((300,), 50)
    losses, grad = np.empty(300), np.empty((300, 50), np.float32)
    in_parallel(x, targets, losses, grad)
    want = fastce.cross_entropy(2 * x, targets, reduction="none")
    _, want_grad = fastce.cross_entropy_and_grad(x, targets, reduction="sum")
    assert same_bits(losses.astype(np.float32), want)
    assert same_bits(grad, want_grad)


def test_from_python():
    z = draw((10,), np.float64)
    assert rows.logsumexp(z) == fastce.logsumexp(z)
    assert rows.logsumexp(z[:0]) == -np.inf
    assert rows.partial(z[:0]) == (-np.inf, 0.0)
    z.flags.writeable = False
    assert rows.logsumexp(z) == fastce.logsumexp(z)


BAD_VALUES = {
    "target too large": (lambda z: rows.cross_entropy(z, 10), IndexError, "target: expected"),
    "target negative": (lambda z: rows.cross_entropy(z, -1), IndexError, "target: expected"),
    "no class": (lambda z: rows.cross_entropy(z[:0], 0), ValueError, "logits: expected at least"),
    "smoothing": (lambda z: weighted(z, 0, z, 1.5), ValueError, "label_smoothing: expected"),
    "NaN": (lambda z: weighted(z, 0, z, np.nan), ValueError, "label_smoothing: expected"),
    "weight": (lambda z: weighted(z, 0, z[1:], 0.0), ValueError, "weight: expected as many"),
    "probabilities": (
        lambda z: cross_entropy(z, z[1:]), ValueError, "target: expected as many",
    ),
    "softcap": (
        lambda z: with_options(z, 0, z, 1.0, None, 0.0, 0.0, -1.0), ValueError,
        "softcap: expected",
    ),
    "out": (lambda z: with_grad(z, 0, z[1:], 1.0), ValueError, "out: expected as many"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values(case):
    call, error, message = BAD_VALUES[case]
    z = draw((10,))
    before = z.copy()
    with pytest.raises(error, match=message):
        call(z)
    assert same_bits(z, before)


BAD_TYPES = {
    "matrix": (lambda z: logsumexp(z.reshape(2, 5)), "logits: expected a one-dimensional array"),
    "integers": (lambda z: logsumexp(z.astype(np.int64)), "logits: expected float64"),
    "dtype of out": (
        lambda z: with_grad(z, 0, z.astype(np.float64), 1.0), "out: expected float32",
    ),
    "float target": (lambda z: cross_entropy(z, 1.0), "target: expected an integer or a"),
    "boolean target": (lambda z: cross_entropy(z, True), "target: expected an integer or a"),
    "integers as target": (lambda z: cross_entropy(z, z.astype(int)), "target: expected float64"),
    "weights apart": (lambda z: weighted(z, 0, z[::2], 0.0), "weight: expected a contiguous"),
    "integer weights": (
        lambda z: weighted(z, 0, z.astype(int), 0.0), "weight: expected float64 or float32",
    ),
    "read-only out": (lambda z: with_grad(z, 0, read_only(z), 1.0), "out: expected a writable"),
}  # fmt: skip


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("case", BAD_TYPES)
def test_bad_types(case):
    call, message = BAD_TYPES[case]
    with pytest.raises(TypingError, match=message):
        call(draw((10,)))


USER = """
import numba
import numpy as np
from fastce import rows

@numba.njit
def helper(z):
    return rows.logsumexp(z)

@numba.njit(cache=True)
def cached(z):
    return helper(z)
"""
CALL = "import user; print(user.cached(user.np.zeros(2)), len(user.cached.stats.cache_hits))"


def test_the_users_own_cache_is_never_stale(tmp_path, python):
    """Editing a kernel reaches code that the user's `cache=True` has kept, through a helper."""
    copy = tmp_path / "fastce"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "user.py").write_text(USER)

    def result():
        where = {"FASTCE_CACHE_DIR": str(tmp_path / "cache"), "NUMBA_CACHE_DIR": str(tmp_path)}
        value, hits = python(CALL, package=copy, **where).stdout.split()
        return float(value), int(hits)

    assert result() == (np.log(2), 0)
    assert result() == (np.log(2), 1)
    constants = copy / "cpu" / "constants.py"
    text = constants.read_text()
    constants.write_text(text.replace("_LN2 = 0.693147", "_LN2 = 0.793147"))
    value, hits = result()
    assert (value > 0.7, hits) == (True, 0)
    assert result() == (value, 1)
    constants.write_text(text)
    assert result() == (np.log(2), 0)
    assert result() == (np.log(2), 1)
