"""Arrays on a device, whoever made them: read where they lie, made anew of the same kind."""

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastce import _arguments as arguments
from fastce._devices import on_device


class Bfloat16(NamedTuple):
    """What is asked of a dtype, for the one that NumPy does not know by itself."""

    name: str = "bfloat16"
    kind: str = "V"
    itemsize: int = 2

    def __str__(self) -> str:
        return self.name


class Array(NamedTuple):
    """An array on a device."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    dtype: Any  # a NumPy dtype or `Bfloat16`
    device: int
    stream: int  # on which its owner works
    maker: "Maker"
    owner: Any
    read_only: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return int(self.dtype.itemsize)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def result(self) -> Any:
        """The array as the caller gets it."""
        return self.maker.give(self)

    @property
    def contiguous(self) -> bool:
        """Whether the elements follow each other in row order."""
        expected = self.itemsize
        for size, stride in zip(self.shape[::-1], self.strides[::-1], strict=True):
            if size != 1 and stride != expected:
                return math.prod(self.shape) == 0
            expected *= size
        return True

    @property
    def reach(self) -> tuple[int, int]:
        """The first byte and the one after the last."""
        if math.prod(self.shape) == 0:
            return self.address, self.address
        steps = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
        first = self.address + sum(s for s in steps if s < 0)
        return first, self.address + sum(s for s in steps if s > 0) + self.itemsize


class Maker(NamedTuple):
    """How a library makes arrays on the device and stream of another one's."""

    empty: Callable[[tuple[int, ...], str, Array], Any]
    empty_like: Callable[[Array], Any]
    contiguous: Callable[[Any], Any]
    give: Callable[[Array], Any] = operator.attrgetter("owner")


def device_array(name: str, value: Any, like: Array | None = None) -> Array:
    """An array on a device, on that of another if given."""
    if not on_device(value):
        where = "a CUDA device" if like is None else f"CUDA device {like.device}, that of logits"
        raise TypeError(f"{name}: expected an array on {where}, got {type(value).__name__}")
    library = type(value).__module__.partition(".")[0]
    try:
        array = _READERS.get(library, _from_protocol)(value)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    if like is None:
        return array
    if array.device != like.device:
        raise ValueError(
            f"{name}: expected an array on CUDA device {like.device}, that of logits, "
            f"got one on {array.device}"
        )
    return array


def new(like: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """A new array of the kind and on the device of another."""
    return _of_kind(like, like.maker.empty(shape, dtype, like))


def new_like(like: Array) -> Array:
    """A new array shaped, typed and laid out like another."""
    return _of_kind(like, like.maker.empty_like(like))


def _of_kind(like: Array, value: Any) -> Array:
    made = device_array("out", value, like)
    return made._replace(stream=like.stream, maker=like.maker)


def float_array(name: str, value: Any, like: Array | None = None) -> Array:
    """An array of one of the four floating-point dtypes."""
    array = device_array(name, value, like)
    arguments.check_float(name, array.dtype)
    return array


def in_row_order(name: str, array: Array) -> Array:
    """An array whose elements follow each other, a copy if need be."""
    if array.contiguous:
        return array
    return device_array(name, array.maker.contiguous(array.owner), array)


def row_order(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides of elements that follow each other in row order."""
    return tuple(itemsize * math.prod(shape[k + 1 :]) for k in range(len(shape)))


def broadcast(array: Array, shape: tuple[int, ...]) -> Array:
    """An array spread over a shape that it broadcasts to."""
    sizes = (1,) * (len(shape) - array.ndim) + array.shape
    steps = (0,) * (len(shape) - array.ndim) + array.strides
    strides = tuple(0 if size == 1 else step for size, step in zip(sizes, steps, strict=True))
    return array._replace(shape=shape, strides=strides)


def overlap(a: Array, b: Array) -> bool:
    """Whether the memory between the first and last bytes of two arrays overlaps."""
    (first, last), (other_first, other_last) = a.reach, b.reach
    return first < other_last and other_first < last


def same_memory(a: Array, b: Array) -> bool:
    """Whether two arrays of one shape are the same elements."""
    return a.address == b.address and a.strides == b.strides


def _from_torch(tensor: Any) -> Array:
    import torch

    size = tensor.element_size()
    return Array(
        tensor.data_ptr(), tuple(tensor.shape), tuple(s * size for s in tensor.stride()),
        _dtype(str(tensor.dtype).removeprefix("torch.")), tensor.device.index,
        torch.cuda.current_stream(tensor.device).cuda_stream, _TORCH, tensor,
    )  # fmt: skip


def _torch_empty(shape: tuple[int, ...], dtype: str, like: Array) -> Any:
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device=like.owner.device)


def _torch_empty_like(like: Array) -> Any:
    import torch

    return torch.empty_like(like.owner, requires_grad=False)


def _from_cupy(array: Any) -> Array:
    import cupy  # type: ignore[import-not-found, unused-ignore]

    stream = cupy.cuda.get_current_stream().ptr
    return Array(
        array.data.ptr, array.shape, array.strides, _dtype(array.dtype.name), array.device.id,
        stream, _CUPY, array,
    )  # fmt: skip


def _cupy_empty(shape: tuple[int, ...], dtype: str, like: Array) -> Any:
    import cupy

    return cupy.empty(shape, dtype)


def _cupy_empty_like(like: Array) -> Any:
    import cupy

    return cupy.empty_like(like.owner)


def _cupy_contiguous(array: Any) -> Any:
    import cupy

    return cupy.ascontiguousarray(array)


def _from_protocol(value: Any) -> Array:
    """An array of any other library; by DLPack if the library can be given arrays by it, too."""
    both_ways = hasattr(value, "__dlpack__") and hasattr(value, "__array_namespace__")
    if not both_ways and hasattr(value, "__cuda_array_interface__"):
        return _from_interface(value)
    from fastce.cuda import dlpack

    return dlpack.read(value)


def _from_own(value: Any) -> Array:
    from fastce.cuda import dlpack

    return dlpack.made(value)


def _from_interface(value: Any) -> Array:
    """An array of any library with the CUDA array interface; results are Numba's."""
    interface = value.__cuda_array_interface__
    dtype = np.dtype(interface["typestr"])
    shape, strides = tuple(interface["shape"]), interface.get("strides")
    strides = row_order(shape, dtype.itemsize) if strides is None else tuple(strides)
    return Array(
        interface["data"][0], shape, strides, dtype, _device_of(value),
        interface.get("stream") or 0, _NUMBA, value, bool(interface["data"][1]),
    )  # fmt: skip


def _device_of(value: Any) -> int:
    device = getattr(value, "device", 0)  # JAX and others say; numba's arrays lie on the current
    number = getattr(device, "id", device)
    try:
        return operator.index(number)
    except TypeError:
        return 0


def _numba_empty(shape: tuple[int, ...], dtype: str, like: Array) -> Any:
    from numba import cuda

    return cuda.device_array(shape, np.dtype(dtype))


def _numba_empty_like(like: Array) -> Any:
    return _numba_empty(like.shape, like.dtype.name, like)


def not_copied(array: Any) -> Any:
    """For libraries without a copy in row order."""
    raise ValueError(f"expected an array in row order: {type(array).__name__} is not copied")


_TORCH = Maker(_torch_empty, _torch_empty_like, operator.methodcaller("contiguous"))
_CUPY = Maker(_cupy_empty, _cupy_empty_like, _cupy_contiguous)
_NUMBA = Maker(_numba_empty, _numba_empty_like, not_copied)
_READERS: dict[str, Callable[[Any], Array]] = {
    "torch": _from_torch, "cupy": _from_cupy, "fastce": _from_own
}  # fmt: skip


def _dtype(name: str) -> Any:
    return Bfloat16() if name == "bfloat16" else np.dtype(name)
