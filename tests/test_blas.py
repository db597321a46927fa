"""Matrix products by NumPy's BLAS and by `matmul`: the same numbers, in the memory given."""

import numpy as np
import pytest

from fastce import _blas
from tests.checks import draw


@pytest.fixture(params=["blas", "matmul"])
def library(request, monkeypatch):
    """Products either way, sums taken in pieces of a few rows."""
    monkeypatch.setattr(_blas, "BLOCK", 3 * 5 * 8)
    if request.param == "matmul":
        monkeypatch.setattr(_blas, "_routine", lambda _: None)
    else:  # of the wheels that tests run with; others may have it under a name unknown here
        assert _blas._routine("f") is not None
    return request.param


def laid_out(array, layout):
    """The same numbers in other memory."""
    if layout == "F":
        return array.copy(order="F")
    if layout == "strided":
        wide = np.zeros((2 * len(array), array.shape[1] + 3), array.dtype)
        wide[::2, 1:-2] = array
        return wide[::2, 1:-2]
    if layout == "reversed":
        return array[::-1].copy()[::-1]
    if layout == "unaligned":
        memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
        result = memory.view(array.dtype).reshape(array.shape)
        result[...] = array
        return result
    return array.copy()


LAYOUTS = ("C", "F", "strided", "reversed", "unaligned")


@pytest.mark.parametrize(
    "shape", [(7, 4, 5), (1, 1, 1), (1, 6, 3), (6, 1, 1), (5, 4, 1), (0, 3, 2), (4, 0, 2)]
)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_products_and_their_sums(library, shape, dtype, accumulate):
    """Small whole numbers, whose products are exact, whatever the memory of any of the three."""
    m, k, n = shape
    rng = np.random.default_rng(0)
    a, b, start = (rng.integers(-9, 9, s).astype(dtype) for s in ((m, k), (k, n), (m, n)))
    want = a @ b + (start if accumulate else 0)
    for left in LAYOUTS:
        for right in LAYOUTS:
            for result in LAYOUTS:
                out = laid_out(start if accumulate else np.full_like(start, np.nan), result)
                _blas.multiply(
                    laid_out(a, left), laid_out(b, right), out, accumulate=accumulate
                )  # fmt: skip
                np.testing.assert_array_equal(out, want)


def test_read_only_factors(library):
    a, b = np.arange(6.0).reshape(2, 3), np.arange(12.0).reshape(3, 4)
    a.flags.writeable = b.flags.writeable = False
    out = np.ones((2, 4))
    _blas.multiply(a, b, out, accumulate=True)
    np.testing.assert_array_equal(out, a @ b + 1)


def test_large_products_are_those_of_matmul():
    """Beyond the blocks that BLAS works in, on its threads."""
    a, b = draw((300, 700), np.float32), draw((700, 900), np.float32, seed=4)
    out = draw((300, 900), np.float32, seed=5)
    want = out + a @ b
    _blas.multiply(a, b, out, accumulate=True)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-3)
    _blas.multiply(a[:, ::2], b[::2], out)
    np.testing.assert_allclose(out, a[:, ::2] @ b[::2], rtol=0, atol=1e-3)


def test_a_numpy_without_the_routine(monkeypatch):
    """No name is found, or no library."""
    monkeypatch.setattr(_blas, "NAMES", {})
    assert _blas._routine.__wrapped__("f") is None
    monkeypatch.setattr("numpy._core._multiarray_umath.__file__", "/nowhere")
    assert _blas._routine.__wrapped__("d") is None
