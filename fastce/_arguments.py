"""Checks and normalises the arguments of a call; all messages about user input are written here."""

import functools
import math
import operator
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt

Reduction = Literal["mean", "sum", "none"]
AnyArray = npt.NDArray[Any]

_LARGEST = float(np.finfo(np.float32).max)
_REDUCTIONS = ("mean", "sum", "none")


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is `ml_dtypes.bfloat16`, known by name so that nothing need be imported."""
    return dtype.name == "bfloat16"


def compute_dtype(dtype: np.dtype[Any]) -> type[np.float32] | type[np.float64]:
    """What is computed with, and the dtype of losses: float64 for float64, else float32."""
    return np.float64 if dtype == np.float64 else np.float32


def native(array: AnyArray) -> AnyArray:
    """The array in the byte order of the machine."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _is_float(dtype: np.dtype[Any]) -> bool:
    return (dtype.kind == "f" and dtype.itemsize <= 8) or is_bfloat16(dtype)


def any_array(name: str, value: npt.ArrayLike) -> AnyArray:
    """An array of any dtype; whatever is not one yet comes in through here."""
    if type(value) is not np.ndarray:
        refuse_mask(name, value)
    return np.asarray(value)


def refuse_mask(name: str, value: Any) -> None:
    """Fail where a mask would be dropped: kernels would read what its owner has called invalid."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name}: expected an array without a mask, got {type(value).__name__}; its method "
            "filled makes one of it"
        )


def float_array(name: str, value: npt.ArrayLike) -> AnyArray:
    """An array of one of the four floating-point dtypes."""
    array = any_array(name, value)
    check_float(name, array.dtype)
    return native(array)


def check_float(name: str, dtype: np.dtype[Any]) -> None:
    """Only the four floating-point dtypes are computed with."""
    if not _is_float(dtype):
        raise TypeError(f"{name}: expected float64, float32, float16 or bfloat16, got {dtype}")


def float_or_integer_array(name: str, value: npt.ArrayLike) -> AnyArray:
    """A floating-point array; integers and booleans become float64."""
    array = any_array(name, value)
    if array.dtype.kind in "iub":
        return array.astype(np.float64)
    return float_array(name, array)


def class_axis(name: str, shape: tuple[int, ...], axis: int) -> int:
    """The class axis as a non-negative number."""
    axis = integer("axis", axis)
    if not shape:
        raise ValueError(f"{name}: expected an array with a class axis, got a single number")
    if not -len(shape) <= axis < len(shape):
        raise np.exceptions.AxisError(
            f"axis: expected an integer in [-{len(shape)}, {len(shape)}), got {axis}"
        )
    axis %= len(shape)
    if shape[axis] == 0:
        raise ValueError(
            f"{name}: expected at least one class, got shape {shape} with class axis {axis}"
        )
    return axis


def linear_layer(
    x: npt.ArrayLike, weight: npt.ArrayLike, bias: npt.ArrayLike | None
) -> tuple[AnyArray, AnyArray, AnyArray | None]:
    """What makes the logits x W^T + b: shapes (rows, features), (classes, features), (classes,)."""
    x, weight = float_array("x", x), float_array("weight", weight)
    if x.ndim != 2:
        raise ValueError(f"x: expected shape (rows, features), got {x.shape}")
    if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight: expected shape (classes, {x.shape[1]}) for x of shape {x.shape}, "
            f"got {weight.shape}"
        )
    if not len(weight):
        raise ValueError(f"weight: expected at least one class, got shape {weight.shape}")
    if bias is None:
        return x, weight, None
    bias = float_array("bias", bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape {weight.shape[:1]}, got {bias.shape}")
    return x, weight, bias


class Signature(NamedTuple):
    """What the dtypes and shapes of a call mean."""

    axis: int
    classes: int
    rows: tuple[int, ...]
    row_count: int
    dtype: type[np.float32] | type[np.float64]  # what is computed with
    hard: bool  # whether the targets are integers


def signature(
    name: str, dtype: np.dtype[Any], shape: tuple[int, ...], axis: int,
    target_dtype: np.dtype[Any], target_shape: tuple[int, ...], ignore_index: int,
) -> Signature:  # fmt: skip
    """Check that logits and targets fit each other; the values of targets are a kernel's matter."""
    axis = axis if type(axis) is int else integer("axis", axis)
    return _signature(name, dtype, shape, axis, target_dtype, target_shape, ignore_index)


@functools.lru_cache(maxsize=1024)
def _signature(
    name: str, dtype: np.dtype[Any], shape: tuple[int, ...], axis: int,
    target_dtype: np.dtype[Any], target_shape: tuple[int, ...], ignore_index: int,
) -> Signature:  # fmt: skip
    check_float(name, dtype)
    axis = class_axis(name, shape, axis)
    rows = shape[:axis] + shape[axis + 1 :]
    hard = target_dtype.kind in "iu"
    if hard and target_shape != rows:
        raise ValueError(
            f"targets: expected shape {rows}, that of logits {shape} without the class "
            f"axis {axis}, got {target_shape}"
        )
    if not hard:
        if not _is_float(target_dtype):
            raise TypeError(
                f"targets: expected integers, or floats shaped like logits, got {target_dtype}"
            )
        if target_shape != shape:
            if target_shape == rows:
                raise TypeError(f"targets: expected integers of shape {rows}, got {target_dtype}")
            raise ValueError(
                f"targets: expected probabilities of the shape of logits {shape}, "
                f"got {target_shape}"
            )
        if ignore_index >= 0:
            raise ValueError(
                f"ignore_index: expected a negative number with probabilities as targets, "
                f"got {ignore_index}"
            )
    return Signature(axis, shape[axis], rows, math.prod(rows), compute_dtype(dtype), hard)


def hard_labels(array: AnyArray, classes: int, ignore_index: int) -> npt.NDArray[np.int64]:
    """Integer targets as one int64 per row, in row order."""
    if array.dtype == np.int64 and array.flags.c_contiguous:
        return array.reshape(-1)
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        bad = array.ravel() >= classes
        if ignore_index >= 0:
            bad &= array.ravel() != ignore_index
        row = int(np.argmax(bad))
        raise bad_target(array.ravel()[row], row, array.shape, classes)
    return np.ascontiguousarray(array, np.int64).reshape(-1)


def check_integers(dtype: np.dtype[Any]) -> None:
    """Targets that must be integers."""
    if dtype.kind not in "iu":
        raise TypeError(f"targets: expected integers, got {dtype}")


def hard_targets(value: npt.ArrayLike, logits: AnyArray, axis: int) -> npt.NDArray[np.int64]:
    """Labels that must be integers."""
    array = any_array("targets", value)
    check_integers(array.dtype)
    fit = signature("logits", logits.dtype, logits.shape, axis, array.dtype, array.shape, -1)
    return hard_labels(array, fit.classes, -1)


def row_weight(
    name: str, value: npt.ArrayLike | None, rows: tuple[int, ...]
) -> npt.NDArray[np.float64] | None:
    """One weight per row, in row order."""
    if value is None:
        return None
    array = any_array(name, value)
    check_row_weight(name, array.dtype, array.shape, rows)
    return np.ascontiguousarray(array, np.float64).reshape(-1)


def check_row_weight(
    name: str, dtype: np.dtype[Any], shape: tuple[int, ...], rows: tuple[int, ...]
) -> None:
    """One number per row."""
    if dtype.kind not in "fiu" and not is_bfloat16(dtype):
        raise TypeError(f"{name}: expected numbers, got {dtype}")
    if shape != rows:
        raise ValueError(f"{name}: expected shape {rows}, one per row, got {shape}")


def bad_target(
    value: Any, row: int, rows: tuple[int, ...], classes: int, ignorable: bool = True
) -> IndexError:
    """The error for the target of a row, counted in the order of rows of this shape."""
    where = tuple(int(i) for i in np.unravel_index(row, rows))
    return IndexError(
        f"targets: expected integers in [0, {classes}){' or ignore_index' if ignorable else ''}, "
        f"got {int(value)} at index {where}"
    )


def integer(name: str, value: Any) -> int:
    """A plain integer: what is given, or what an array or tensor of one integer holds."""
    if type(value) is int:
        return value
    refuse_mask(name, value)
    try:
        held = _held(value)
        if isinstance(held, bool):
            raise TypeError
        return operator.index(held)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None


def number(name: str, value: Any) -> float:
    """A plain float: what is given, or what an array or tensor of one number holds."""
    if type(value) is float:
        return value
    refuse_mask(name, value)
    try:
        held = _held(value)
        return float("" if isinstance(held, str | bytes) else held)  # "0.1" is no number here
    except OverflowError:  # an integer beyond all floats
        raise ValueError(f"{name}: expected a number that is a float, got {value}") from None
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None


def _held(value: Any) -> Any:
    """The one element of an array or tensor, or the value itself."""
    item = getattr(value, "item", None)
    return value if item is None else item()


def scalar(value: float, dtype: type[np.float32] | type[np.float64]) -> Any:
    """A float as a NumPy scalar; beyond the range of float32 it is infinite, without a warning."""
    if abs(value) > _LARGEST:
        value = math.copysign(math.inf, value) if dtype is np.float32 else value
    return dtype(value)


class Options(NamedTuple):
    """The numbers that shape a loss, checked."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    reduction: Reduction = "none"
    normalizer: float | None = None


PlainOptions = tuple[int, float, float, float | None, str, float | None]


def plain_options(
    ignore_index: Any, label_smoothing: Any, z_loss: Any, softcap: Any, reduction: Any,
    normalizer: Any,
) -> PlainOptions:  # fmt: skip
    """The options of a loss as plain numbers, whatever holds them, their ranges not yet checked.

    An array or tensor may hold another number by the next call, or by the backward pass of this
    one. So nothing is remembered, for either, but what has gone through here.
    """
    return (
        ignore_index if type(ignore_index) is int else integer("ignore_index", ignore_index),
        label_smoothing if type(label_smoothing) is float
        else number("label_smoothing", label_smoothing),
        z_loss if type(z_loss) is float else number("z_loss", z_loss),
        softcap if softcap is None or type(softcap) is float else number("softcap", softcap),
        reduction if type(reduction) is str else check_reduction(reduction),
        normalizer if normalizer is None or type(normalizer) is float
        else number("normalizer", normalizer),
    )  # fmt: skip


def options(
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
    normalizer: float | None,
) -> Options:
    """Check the options of a loss."""
    return _options(
        *plain_options(ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer)
    )


# A small call spends more time in checks than in its kernel; errors are not remembered.
@functools.lru_cache(maxsize=1024)
def _options(
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
    reduction: str, normalizer: float | None,
) -> Options:  # fmt: skip
    return Options(
        ignore_index,
        _label_smoothing(label_smoothing),
        _z_loss(z_loss),
        _softcap(softcap),
        check_reduction(reduction),
        _normalizer(normalizer, reduction),
    )


def _label_smoothing(value: float) -> float:
    """A number in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {value}")
    return value


def _z_loss(value: float) -> float:
    """Any finite number."""
    if not math.isfinite(value):
        raise ValueError(f"z_loss: expected a finite number, got {value}")
    return value


def _softcap(value: float | None) -> float | None:
    """A positive finite number, or None for no cap."""
    if value is not None and not 0.0 < value < math.inf:
        raise ValueError(f"softcap: expected a positive finite number or None, got {value}")
    return value


def skip_below(value: float) -> float:
    """A number in [0, 1)."""
    plain = number("skip_below", value)
    if not 0.0 <= plain < 1.0:
        raise ValueError(f"skip_below: expected a number in [0, 1), got {value}")
    return plain


def check_reduction(value: str) -> Reduction:
    """One of the three reductions, as a plain string."""
    if not isinstance(value, str) or value not in _REDUCTIONS:
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {value!r}")
    return cast(Reduction, _REDUCTIONS[_REDUCTIONS.index(value)])


def _normalizer(value: float | None, reduction: str) -> float | None:
    """What the sum is divided by for the mean, or None for its own count or weight."""
    if value is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f"normalizer: expected None with reduction={reduction!r}, got {value}; "
            "only the mean is divided by something"
        )
    if not 0.0 <= value < math.inf:
        raise ValueError(f"normalizer: expected a finite number, at least 0, got {value}")
    return value


def class_weight(
    name: str, value: npt.ArrayLike | None, classes: int, dtype: np.dtype[Any]
) -> AnyArray | None:
    """One weight per class in the dtype that is computed with."""
    if value is None:
        return None
    array = any_array(name, value)
    check_class_weight(name, array.dtype, array.shape, classes)
    with np.errstate(over="ignore", under="ignore"):
        return np.ascontiguousarray(array, compute_dtype(dtype))


def check_class_weight(
    name: str, dtype: np.dtype[Any], shape: tuple[int, ...], classes: int
) -> None:
    """One number per class."""
    if dtype.kind not in "fiu" and not is_bfloat16(dtype):
        raise TypeError(f"{name}: expected numbers, got {dtype}")
    if shape != (classes,):
        raise ValueError(f"{name}: expected shape ({classes},), one per class, got {shape}")


Upstream = tuple[float, npt.NDArray[np.float64] | None]


def upstream(value: npt.ArrayLike | None, rows: tuple[int, ...], reduction: str) -> Upstream:
    """The upstream gradient as one number and, with reduction="none", one per row or None."""
    if value is None:
        return 1.0, None
    array = any_array("grad_output", value)
    check_upstream(array.dtype, array.shape, rows, reduction)
    if array.ndim == 0:
        return float(array), None
    return 1.0, np.ascontiguousarray(array, np.float64).reshape(-1)


def check_upstream(
    dtype: np.dtype[Any], shape: tuple[int, ...], rows: tuple[int, ...], reduction: str
) -> None:
    """A single number or, for unreduced losses, one per row."""
    if dtype.kind not in "fiu" and not is_bfloat16(dtype):
        raise TypeError(f"grad_output: expected numbers, got {dtype}")
    if not shape:
        return
    if reduction != "none":
        raise ValueError(
            f"grad_output: expected a single number with reduction={reduction!r}, got shape {shape}"
        )
    if shape != rows:
        raise ValueError(f"grad_output: expected a single number or shape {rows}, got {shape}")


def same_shape(name: str, value: npt.ArrayLike, like: str, array: AnyArray) -> AnyArray:
    """A floating-point array of the shape of another argument."""
    other = float_array(name, value)
    check_same_shape(name, other.shape, like, array.shape)
    return other


def check_same_shape(
    name: str, shape: tuple[int, ...], like: str, like_shape: tuple[int, ...]
) -> None:
    """The shape of another argument."""
    if shape != like_shape:
        raise ValueError(f"{name}: expected the shape of {like} {like_shape}, got {shape}")


def reduced_axes(
    name: str, shape: tuple[int, ...], axis: int | tuple[int, ...] | None
) -> tuple[int, ...]:
    """The axes of a reduction as sorted non-negative numbers; None means all."""
    if axis is None:
        return tuple(range(len(shape)))
    given = axis if isinstance(axis, tuple) else (axis,)
    axes = []
    for one in given:
        number = integer("axis", one)
        if not -len(shape) <= number < len(shape):
            raise np.exceptions.AxisError(
                f"axis: expected integers in [-{len(shape)}, {len(shape)}) for {name} of shape "
                f"{shape}, got {one}"
            )
        axes.append(number % len(shape))
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis: expected each axis once, got {axis}")
    return tuple(sorted(axes))


def broadcastable(name: str, value: npt.ArrayLike | None, logits: AnyArray) -> AnyArray | None:
    """Weights spread over the shape of the logits without copying."""
    if value is None:
        return None
    array = float_or_integer_array(name, value)
    check_broadcastable(name, array.shape, logits.shape)
    return np.broadcast_to(array, logits.shape)


def check_broadcastable(name: str, shape: tuple[int, ...], like: tuple[int, ...]) -> None:
    """A shape that can be spread over that of the logits."""
    try:
        fits = np.broadcast_shapes(shape, like) == like
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to that of logits {like}, got {shape}"
        )


def check_number(name: str, dtype: np.dtype[Any]) -> None:
    """Floats of the four dtypes, integers or booleans."""
    if dtype.kind not in "iub":
        check_float(name, dtype)
