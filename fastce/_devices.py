"""Where an array lies: with the processor, or on a CUDA device."""

from typing import Any

import numpy as np


def on_device(value: Any) -> bool:
    """Whether a value is an array on a CUDA device; asked of every call, so that it must be cheap.

    Libraries say so of their own arrays, and none is imported for it: those that show the CUDA
    array interface do so for arrays on CUDA devices alone.  PyTorch's is not asked for, because it
    raises an error for tensors that take part in differentiation.
    """
    kind = type(value)
    if kind is np.ndarray:
        return False
    if kind.__module__.startswith("torch"):
        return bool(getattr(value, "is_cuda", False))
    return hasattr(value, "__cuda_array_interface__")
