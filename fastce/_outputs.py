"""Where a gradient goes: the caller's `out`, or a fresh array."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fastce._arguments import AnyArray, refuse_mask

# Candidate solutions to look at before two strided arrays count as overlapping.
_OVERLAP_WORK: Any = 10_000  # NumPy's stub knows only two of the numbers that it takes
_LINE = 64  # bytes
_LARGE = 32 << 20  # bytes from which an array's first byte is worth choosing


def gradient(
    out: AnyArray | None, logits: AnyArray, name: str = "logits", **read: npt.ArrayLike | None
) -> AnyArray:
    """Where the gradient goes: `out` if it fits, or a fresh array laid out like the logits.

    `out` may be the very memory of the logits, but not overlap them otherwise, nor anything else
    that is read: what the caller has given, not what has been made of it.
    """
    if out is None:
        return _fresh_like(logits)
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out: expected a NumPy array, got {type(out).__name__}")
    refuse_mask("out", out)
    check(out, logits, name, out.flags.writeable, out.flags.c_contiguous)
    same = out is logits or _same_memory(out, logits)
    check_apart(out, None if same else logits, name, _overlap, read)
    return out


def _fresh_like(array: AnyArray) -> AnyArray:
    """A fresh array laid out like another; a large one begins with a line of the caches.

    NumPy's own large arrays begin in the midst of one, so that the runs of rows beside each other,
    which class axes other than the last come in, cannot be written past the caches: measured, a
    gradient of (8, 21, 512, 512) along axis 1 takes four fifths of the time.
    """
    if array.nbytes < _LARGE or not array.flags.c_contiguous:
        return np.empty_like(array, subok=False)
    memory = np.empty(array.nbytes + _LINE, np.uint8)
    return np.ndarray(array.shape, array.dtype, memory, -memory.ctypes.data % _LINE)


def check(out: Any, logits: Any, name: str, writable: bool, contiguous: bool) -> None:
    """`out` is shaped and typed like the logits, and can be written to."""
    if out.dtype != logits.dtype:
        raise ValueError(f"out: expected dtype {logits.dtype}, that of {name}, got {out.dtype}")
    if out.shape != logits.shape:
        raise ValueError(f"out: expected shape {logits.shape}, that of {name}, got {out.shape}")
    if not writable:
        raise ValueError("out: expected a writable array, got a read-only one")
    if not contiguous and not _every_element_apart(out):
        raise ValueError(
            f"out: expected every element in a place of its own, got strides {out.strides} "
            f"for shape {out.shape}"
        )


def check_apart(
    out: Any, logits: Any, name: str, overlap: Callable[[Any, Any], bool], read: dict[str, Any]
) -> None:
    """`out` overlaps nothing that is read; logits that are `out` itself are given as None."""
    if logits is not None and overlap(out, logits):
        raise ValueError(f"out: expected the memory of {name} itself or memory apart from it, "
                         "got an overlapping view")  # fmt: skip
    for other, array in read.items():
        if array is not None and overlap(out, array):
            raise ValueError(f"out: expected memory apart from {other}, got an overlapping view")


def _every_element_apart(array: Any) -> bool:
    """Whether each stride steps over what the smaller ones reach, as in any slice."""
    reach = array.itemsize
    for stride, size in sorted(zip(map(abs, array.strides), array.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return False
            reach += stride * (size - 1)
    return True


def _same_memory(a: AnyArray, b: AnyArray) -> bool:
    return (
        a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
        and a.strides == b.strides
    )


def _overlap(a: AnyArray, given: npt.ArrayLike) -> bool:
    b = np.asarray(given)
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=_OVERLAP_WORK)
    except np.exceptions.TooHardError:  # undecided in reasonable time: refuse
        return True
