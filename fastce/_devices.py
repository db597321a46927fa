"""Where an array lies: with the processor, or on a CUDA device."""

from typing import Any

import numpy as np

_CUDA = (2, 13)  # DLPack's numbers for CUDA devices and memory managed by CUDA


def on_device(value: Any) -> bool:
    """Whether a value is an array on a CUDA device; asked of every call, so that it must be cheap.

    Libraries say so of their own arrays, and none is imported for it: DLPack names the device, and
    those that show the CUDA array interface do so for arrays on CUDA devices alone.  PyTorch's is
    not asked for, because it raises an error for tensors that take part in differentiation; nor
    JAX's, which may wait for the array.
    """
    kind = type(value)
    if kind is np.ndarray:
        return False
    if kind.__module__.startswith("torch"):
        return bool(getattr(value, "is_cuda", False))
    where = getattr(value, "__dlpack_device__", None)
    if where is None:
        return hasattr(value, "__cuda_array_interface__")
    try:
        return where()[0] in _CUDA
    except Exception:  # an array that lies on several devices, one without memory as yet
        return False
