"""softmax where the classes are divided: what a slice of them needs of all, and makes of it."""

import numpy as np
import numpy.typing as npt

from fastce import _arguments as arguments
from fastce import shards
from fastce._arguments import AnyArray
from fastce.cpu import calls
from fastce.cpu import shards as kernels

Numbers = npt.NDArray[np.float64]


def partial(x: AnyArray, axis: int, class_offset: int, classes: int) -> shards.Partial:
    """The partial of a slice without labels, integers and booleans in float64."""
    x = arguments.float_or_integer_array("x", x)
    rows = x.shape[:axis] + x.shape[axis + 1 :]
    any_class = np.broadcast_to(np.int64(0), rows)
    return shards.partial(x, any_class, class_offset=class_offset, classes=classes, axis=axis)


def softmax(x: AnyArray, total: shards.Partial, axis: int, logarithm: bool) -> AnyArray:
    """softmax of a slice, or its logarithm."""
    x = arguments.float_or_integer_array("x", x)
    out = np.empty_like(x, subok=False)
    calls.softmax(axis, x, out, logarithm, _known(total))
    return out


def _known(total: shards.Partial) -> Numbers:
    known = np.empty((len(total.records) - 1, 2))
    kernels.statistics(total.records[:-1], total.terms.dtype.type(0), known)
    return known
