"""What the tests share: dtypes and promised bounds, inputs, and comparison with the oracle."""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from tests.oracle import Expected, exact

FLOATS = [np.dtype(name) for name in ("float64", "float32", "float16", ml_dtypes.bfloat16)]

# Contract, section 3: relative error of the loss where no logit leads by 10 or more, and anywhere.
LOSS_BOUND = {8: 2e-15, 4: 3e-7}
LOSS_BOUND_ANYWHERE = {8: 1e-13, 4: 4e-6}
GRADIENT_BOUND = {8: 1e-13, 4: 1e-5}


def loss_dtype(logits_dtype: DTypeLike) -> np.dtype[Any]:
    """Dtype in which the loss of logits of this dtype comes."""
    return np.dtype(np.float64 if np.dtype(logits_dtype) == np.float64 else np.float32)


def gradient_bound(dtype: DTypeLike) -> float:
    """Promised relative error of a gradient of `dtype`, with the rounding of 16-bit ones."""
    bound = GRADIENT_BOUND[loss_dtype(dtype).itemsize]
    unit = float(ml_dtypes.finfo(dtype).eps) / 2
    return bound + (unit if np.dtype(dtype).itemsize == 2 else 0.0)


def draw(
    shape: tuple[int, ...], dtype: DTypeLike = np.float32, *, scale: float = 1.0, seed: int = 0
) -> Any:
    """Normal logits, rounded to `dtype`."""
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def draw_targets(
    shape: tuple[int, ...], classes: int, dtype: DTypeLike = np.int64, *, seed: int = 1
) -> Any:
    """Uniform integer targets that fit `dtype`."""
    largest = min(classes, np.iinfo(dtype).max + 1)
    return np.random.default_rng(seed).integers(0, largest, shape).astype(dtype)


def draw_soft(
    shape: tuple[int, ...], dtype: DTypeLike = np.float32, *, axis: int = -1, seed: int = 1
) -> Any:
    """Random label distributions along `axis`, rounded to `dtype`."""
    h = np.random.default_rng(seed).gamma(0.3, size=shape)
    return (h / h.sum(axis=axis, keepdims=True)).astype(dtype)


def draw_weight(classes: int, dtype: DTypeLike = np.float32, *, seed: int = 2) -> Any:
    """Class weights that every dtype holds exactly."""
    return (np.random.default_rng(seed).integers(1, 17, classes) / 8).astype(dtype)


def labels_on_one_class(
    rows: int, classes: int, label: int, dtype: DTypeLike
) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Targets and options by which all that is laid on a row lies on one of its classes."""
    only = np.arange(classes) == label
    hard = np.full(rows, label)
    soft = np.where(only, 0.3, np.zeros((rows, 1))).astype(dtype)
    weight = {"weight": np.where(only, 0.7, 0.0).astype(loss_dtype(dtype))}
    smoothing = {"label_smoothing": 0.1}
    return {
        "hard, smoothing": (hard, weight | smoothing),
        "soft": (soft, {}),
        "soft, weight": (soft, weight),
        "soft, smoothing": (soft, weight | smoothing),
    }


ONE_CLASS = tuple(labels_on_one_class(1, 1, 0, np.float32))  # the names of these


def relative_errors(got: Any, want: Expected) -> NDArray[np.longdouble]:
    """Error of each entry relative to its scale, counting nothing below the smallest normal number.

    Entries where both are infinite or NaN have error 0; where only one is, inf.
    """
    array = np.asarray(got)
    info = ml_dtypes.finfo(array.dtype)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        value, rounded = exact(array), exact(want.value.astype(np.float64).astype(array.dtype))
        same = (np.isinf(value) & (value == rounded)) | (np.isnan(value) & np.isnan(rounded))
        slack = exact(info.smallest_subnormal)
        floor = np.maximum(np.abs(want.scale), exact(info.smallest_normal))
        error = np.maximum(np.abs(value - want.value) - slack, 0) / floor
        return np.where(same, 0, np.where(np.isfinite(error), error, np.inf))


def assert_close(got: Any, want: Expected, bound: float) -> None:
    """Fail unless `got` has the shape of `want` and every relative error is at most `bound`."""
    array = np.asarray(got)
    assert array.shape == want.value.shape, f"shape {array.shape}, expected {want.value.shape}"
    if array.size == 0:
        return
    error = relative_errors(array, want)
    worst = np.unravel_index(int(np.argmax(error)), error.shape)
    assert error[worst] <= bound, (
        f"relative error {float(error[worst]):.3g} > {bound:.3g} at {tuple(map(int, worst))}: "
        f"got {array[worst]!r}, expected {want.value[worst]!r}"
    )


def assert_loss(
    got: Any, want: Expected, logits_dtype: DTypeLike, *, anywhere: bool = False
) -> None:
    """Fail unless `got` is the loss within the promised bound and of the promised dtype."""
    dtype = loss_dtype(logits_dtype)
    assert got.dtype == dtype, f"loss dtype {got.dtype}, expected {dtype}"
    assert_close(got, want, (LOSS_BOUND_ANYWHERE if anywhere else LOSS_BOUND)[dtype.itemsize])


def assert_gradient(got: Any, want: Expected, logits_dtype: DTypeLike) -> None:
    """Fail unless `got` is the gradient within the promised bound, in the dtype of the logits."""
    assert got.dtype == np.dtype(logits_dtype), f"dtype {got.dtype}, expected {logits_dtype}"
    assert_close(got, want, gradient_bound(logits_dtype))


def same_bits(first: Any, second: Any) -> bool:
    """True where both arrays have the same shape, dtype and bytes."""
    a, b = np.asarray(first), np.asarray(second)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
