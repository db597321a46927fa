"""Section 2: logsumexp, softmax and log_softmax, of every dtype, axis and special value."""

import numpy as np
import pytest
import scipy.special

import fastce
from tests import oracle
from tests.checks import FLOATS, assert_close, draw, gradient_bound, loss_dtype, same_bits

INF, NAN = np.inf, np.nan
CLASSES = [1, 2, 10, 33, 1000, 4097, 50257]
LSE_BOUND = {8: 4e-16, 4: 3e-7}
BOTH = ["softmax", "log_softmax"]


def check_logsumexp(x, **options):
    want = oracle.logsumexp(x, **options)
    got = fastce.logsumexp(x, **options)
    kind = loss_dtype(x.dtype)
    assert got.dtype == kind
    assert isinstance(got, np.ndarray if want.value.ndim else np.generic)
    assert_close(got, want, LSE_BOUND[kind.itemsize])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("rows", [0, 1, 3, "many"])
def test_values(dtype, classes, rows):
    rows = min(300, max(9, 60_000 // classes)) if rows == "many" else rows
    x = draw((rows, classes), dtype, scale=3)
    check_logsumexp(x)
    for name in BOTH:
        got = getattr(fastce, name)(x)
        assert got.dtype == dtype
        assert_close(got, getattr(oracle, name)(x), gradient_bound(dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("gap", [5, 20, 80])
def test_log_softmax_of_the_leader_keeps_its_digits(dtype, gap):
    for classes in (2, 10, 1000):
        x = draw((3, classes), dtype)
        x[:, 1] += gap
        got = fastce.log_softmax(x)
        assert np.all(got[:, 1] < 0)
        assert_close(got, oracle.log_softmax(x), 4e-6 if dtype == "float32" else 1e-13)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logsumexp_at_a_common_offset(dtype, offset):
    check_logsumexp((draw((20, 300), "f8") + offset).astype(dtype))


AXES = [None, 0, 1, 2, -1, (0,), (0, 1), (0, 2), (1, 2), (2, 0), (0, 1, 2), (-1, 0)]


@pytest.mark.parametrize("axis", AXES, ids=str)
@pytest.mark.parametrize("keepdims", [False, True])
def test_axes_of_logsumexp(axis, keepdims):
    check_logsumexp(draw((4, 5, 6), np.float64, scale=3), axis=axis, keepdims=keepdims)
    check_logsumexp(draw((4, 5, 6), scale=3).transpose(2, 0, 1), axis=axis, keepdims=keepdims)


def test_logsumexp_over_no_axis_is_the_identity():
    x = draw((3, 4), np.float64)
    assert same_bits(fastce.logsumexp(x, axis=()), x)


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8", "uint64", "bool"])
def test_integers_compute_in_float64(dtype):
    x = np.array([[0, 1, 3], [1, 1, 0]], dtype)
    wide = x.astype(np.float64)
    for name in ("logsumexp", *BOTH):
        got = getattr(fastce, name)(x)
        assert got.dtype == np.float64
        assert same_bits(got, getattr(fastce, name)(wide))


SPECIAL_ROWS = [
    # row, logsumexp, softmax
    ([-INF, -INF, -INF], -INF, [NAN, NAN, NAN]),
    ([INF, 0, 1], INF, [NAN, NAN, NAN]),
    ([INF, INF, -INF], INF, [NAN, NAN, NAN]),
    ([INF, NAN, 0], NAN, [NAN, NAN, NAN]),
    ([0, NAN, 1], NAN, [NAN, NAN, NAN]),
    ([-INF, 2.0, -INF], 2.0, [0, 1, 0]),
    ([-INF, 0, 0], np.log(2), [0, 0.5, 0.5]),
]


@pytest.mark.parametrize(("row", "lse", "p"), SPECIAL_ROWS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_special_values(row, lse, p, dtype):
    """The special row stands between ordinary ones, short and long, as a row and as a column."""
    for padding in (0, 100, 5000):
        x = draw((3, 3 + padding), dtype)
        x[1] = -INF
        x[1, :3] = row
        apart = np.full((3, 2 * x.shape[1]), NAN, dtype)[:, ::2]
        apart[...] = x
        for axis, array in ((-1, x), (-1, apart), (0, np.ascontiguousarray(x.T))):
            got = fastce.logsumexp(array, axis=axis)
            np.testing.assert_allclose(got[1], lse, rtol=1e-6)
            assert np.isfinite(got[[0, 2]]).all()
            q = np.moveaxis(fastce.softmax(array, axis=axis), axis, -1).astype("f8")
            np.testing.assert_allclose(q[1, :3], p)
            assert np.isfinite(q[[0, 2]]).all()
            lp = np.moveaxis(fastce.log_softmax(array, axis=axis), axis, -1).astype("f8")
            with np.errstate(divide="ignore"):
                np.testing.assert_allclose(lp[1, :3], np.log(p), rtol=4e-3)


def test_probabilities_far_below_the_maximum_are_zero_and_not_small():
    for low in (-1e4, -1e30, -INF):
        assert fastce.softmax(np.array([0.0, low], np.float32))[1] == 0


def test_empty_arrays():
    assert fastce.logsumexp(np.empty((0, 3))).shape == (0,)
    assert fastce.logsumexp(np.empty((0, 3)), axis=()).shape == (0, 3)
    assert fastce.logsumexp(np.empty((0, 3, 4)), axis=(1, 2)).shape == (0,)
    assert np.all(fastce.logsumexp(np.empty((2, 0, 4)), axis=(1, 2)) == -INF)
    for name in BOTH:
        assert getattr(fastce, name)(np.empty((0, 3))).shape == (0, 3)


def test_out_has_the_results():
    x = draw((4, 6))
    for name in BOTH:
        out = np.empty_like(x)
        assert getattr(fastce, name)(x, out=out) is out
        assert same_bits(out, getattr(fastce, name)(x))


@pytest.mark.parametrize("axis", [None, (), (2, 3), (0, 2), (3, 0), (-1, 1, 2), (1,)], ids=str)
@pytest.mark.parametrize("name", BOTH)
def test_several_axes_are_the_classes_together(name, axis):
    x = draw((2, 3, 4, 5), np.float64, scale=3.0)
    want = getattr(scipy.special, name)(x, axis=axis)
    call = getattr(fastce, name)
    np.testing.assert_allclose(call(x, axis=axis), want, rtol=1e-13)
    # Elements that lie unevenly are copied, and the result put where it belongs.
    uneven = np.asfortranarray(x)[:, ::-1, ::2]
    out = np.zeros((5, 2, 6, 4)).transpose(1, 2, 3, 0)[:, ::2, ::2]
    want = getattr(scipy.special, name)(uneven, axis=axis)
    assert call(uneven, axis=axis, out=out) is out
    np.testing.assert_allclose(out, want, rtol=1e-13)
    in_place = x.copy().transpose(2, 0, 3, 1)
    want = call(in_place, axis=axis)
    assert same_bits(call(in_place, axis=axis, out=in_place), want)


@pytest.mark.parametrize("name", BOTH)
def test_an_array_without_elements_has_an_empty_result(name):
    call = getattr(fastce, name)
    for shape in ((0,), (3, 0), (0, 3), (2, 0, 3)):
        for axis in (0, -1, None):
            assert call(np.zeros(shape, np.float32), axis=axis).shape == shape
    assert np.all(fastce.logsumexp(np.zeros((3, 0))) == -np.inf)
    with pytest.raises(np.exceptions.AxisError, match="axis"):
        call(np.zeros((3, 0)), axis=2)
