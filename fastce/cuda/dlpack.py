"""Arrays of any library that exchanges them by DLPack, such as JAX.

They are read where they lie; results are made in memory of the device's own pool and handed to the
library by its `from_dlpack`.  Such arrays do not say which stream their library works on.  fastce
works on one of its own: the library makes it wait for what is still being computed, as the protocol
asks, and is made to wait in turn for what it is handed.
"""

import ctypes
import functools
import math
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastce.cuda.arrays import Array, Maker, not_copied

_CUDA, _BFLOAT = 2, 4  # kDLCUDA, kDLBfloat
_DEFAULT = 1  # the legacy default stream, to the protocol as to the driver
# Where the type of elements stands in what a capsule of either version holds.
_TYPE_CODE = {b"dltensor": 20, b"dltensor_versioned": 52}


class Made(NamedTuple):
    """An array made for a result; what reads it waits for the kernels that write it."""

    view: Any  # of unsigned integers for bfloat16, which cuda.core does not hand over
    dtype: Any
    device: Any

    def __dlpack_device__(self) -> tuple[int, int]:
        """Where it lies, to the protocol."""
        return _CUDA, self.device.ordinal

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        """The array for work on a stream, the default one if None; -1: one that has waited."""
        if stream != -1:
            self.device.order(self.device.stream, _DEFAULT if stream is None else stream)
        capsule = self.view.__dlpack__(**options)
        if self.dtype.name == "bfloat16":
            _mark_bfloat16(capsule)
        return capsule


def read(value: Any) -> Array:
    """An array of another library; its memory is kept until the work on it is done."""
    from cuda.core.utils import StridedMemoryView

    device = _device(int(value.__dlpack_device__()[1]))
    view = StridedMemoryView.from_dlpack(value, device.stream)
    owner = _Borrowed()
    # The kernels that read it may be running long after the call has returned.
    weakref.finalize(owner, device.keep, view, device.stream).atexit = False
    # Read-only even where it is not immutable: nothing would tell the library to wait for what is
    # written to it.
    return _array(view, view.dtype, _maker(_importer(value)), owner, device, True)


def made(value: Made) -> Array:
    """An array that `_empty` has made."""
    return _array(value.view, value.dtype, None, value, value.device, False)


def _array(view: Any, dtype: Any, maker: Any, owner: Any, device: Any, read_only: bool) -> Array:
    shape, steps = tuple(view.shape), view.strides
    if steps is None:
        steps = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
    strides = tuple(dtype.itemsize * step for step in steps)
    return Array(
        view.ptr, shape, strides, dtype, device.ordinal, device.stream, maker, owner, read_only
    )


class _Borrowed:
    """While it lives, a call goes on that uses an array of another library."""


def _importer(value: Any) -> Callable[[Any], Any]:
    """The `from_dlpack` of an array's library."""
    namespace = getattr(value, "__array_namespace__", None)
    library = type(value).__module__.partition(".")[0]
    module = namespace() if namespace else sys.modules.get(library)
    for place in (module, getattr(module, "dlpack", None)):
        found = getattr(place, "from_dlpack", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    raise TypeError(
        f"expected an array of a library with from_dlpack, got {type(value).__name__} of "
        f"{type(value).__module__}"
    )


@functools.cache
def _maker(importer: Callable[[Any], Any]) -> Maker:
    return Maker(
        _empty, lambda like: _empty(like.shape, like.dtype.name, like), not_copied,
        lambda array: importer(array.owner),
    )  # fmt: skip


def _empty(shape: tuple[int, ...], dtype: str, like: Array) -> Made:
    """An array of one of the dtypes of results: that of the logits, or one of NumPy's own."""
    kind = like.dtype if dtype == like.dtype.name else np.dtype(dtype)
    stored = np.dtype(np.uint16) if dtype == "bfloat16" else kind
    return Made(_allocate(like.device, shape, stored), kind, _device(like.device))


def _allocate(ordinal: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """A view of new memory of the device's pool; freed in the order of the device's stream."""
    from cuda.core.utils import StridedMemoryView

    size = max(1, math.prod(shape) * dtype.itemsize)
    with _device(ordinal):
        pool, stream = _pool(ordinal)
        memory = pool.allocate(size, stream=stream)
        return StridedMemoryView.from_buffer(memory, shape, dtype=dtype)


@functools.cache
def _pool(ordinal: int) -> tuple[Any, Any]:
    from cuda.core import DeviceMemoryResource, Stream

    return DeviceMemoryResource(ordinal), Stream.from_handle(_device(ordinal).stream)


def _mark_bfloat16(capsule: Any) -> None:
    """Say of the 16-bit integers in a capsule that they are bfloat16."""
    name = ctypes.pythonapi.PyCapsule_GetName
    name.argtypes, name.restype = (ctypes.py_object,), ctypes.c_char_p
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.argtypes, pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
    kind = name(capsule)
    ctypes.c_uint8.from_address(pointer(capsule, kind) + _TYPE_CODE[kind]).value = _BFLOAT


def _device(ordinal: int) -> Any:
    from fastce.cuda import calls

    return calls.device(ordinal)
