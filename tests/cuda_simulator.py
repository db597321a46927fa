"""Numba's simulator as a CUDA device: small launch parameters, and arrays whose memory is watched.

To be imported before anything of numba, in a process with NUMBA_ENABLE_CUDASIM=1.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np

from fastce.cuda import plan

# A simulated warp has 16 lanes, and every simulated thread is one of Python's: the same regimes as
# the real table, for shorter rows.
plan.ROWS = (
    plan.Runs(16, 32, 1, "", 1),
    plan.Runs(16, 16, 2, "", 1),
    plan.Runs(32, 32, 2, "", 1),
    plan.Runs(32, 32, 1, "shared", 1),
    plan.Runs(32, 32, 1, "shared", 1, cluster=2),
    plan.Runs(32, 32, 1, "memory", 1, cluster=2),
    plan.Runs(32, 32, 1, "shared", 1, cluster=4),  # of a single row
    plan.Runs(32, 32, 1, "memory", 1),  # without clusters
)
plan.LEAST_PART = 512
plan.OPTION_ROWS = plan.ROWS
plan.TILE = plan.Runs(1, 16, 1, "", 1, "tile")  # a whole number of vectors
plan.TILE_BYTES = 64
plan.STRIDED = plan.Runs(1, 8, 1, "", 1, "strided")
plan.SUM_THREADS, plan.SHARE = 8, 12
plan.ELEMENT_THREADS, plan.CHUNKS = 16, 4

from fastce.cuda import arrays, calls, layout, simulated, simulated_driver  # noqa: E402

simulated_driver.Device.limits = plan.Limits(plan.SCRATCH + 768, 1 << 20, 4, 4)
layout.MOST_ROWS = 20
calls._SUM_SHARED = 24 * plan.SUM_THREADS
simulated.memory = []  # what kernels may touch


class DeviceArray:
    """An array that says it lies on a CUDA device; kernels may touch such memory alone."""

    def __init__(self, host: Any) -> None:
        self.host = host
        simulated.memory.append(np.lib.array_utils.byte_bounds(host))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        interface = self.host.__array_interface__
        return {
            "version": 3, "shape": self.host.shape, "strides": self.host.strides,
            "typestr": interface["typestr"], "data": interface["data"],
        }  # fmt: skip


def _read(value: DeviceArray) -> arrays.Array:
    host = value.host
    dtype = arrays.Bfloat16() if host.dtype.name == "bfloat16" else host.dtype
    address, read_only = host.__array_interface__["data"]
    return arrays.Array(address, host.shape, host.strides, dtype, 0, 0, _MAKER, value, read_only)


def _empty(shape: tuple[int, ...], dtype: str, like: Any) -> DeviceArray:
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    made = np.empty(shape, kind)
    made.view(np.uint8 if made.ndim else made.dtype).fill(0xA5 if made.ndim else 77)
    return DeviceArray(made)


_MAKER = arrays.Maker(
    _empty,
    lambda like: _empty(like.shape, like.dtype.name, like),
    lambda value: DeviceArray(np.ascontiguousarray(value.host)),
)
arrays._READERS["tests"] = _read


def forget_arrays() -> None:
    """Nothing but the note of bad targets may be touched."""
    note = simulated_driver.device(0).note_address
    simulated.memory[:] = [(note, note + 8 * simulated_driver.NOTE_WORDS)]


def to_device(host: Any) -> DeviceArray:
    """The array itself: simulated kernels take addresses of the host."""
    return DeviceArray(host)


def take_tensors_for_its_own(patches: Any) -> None:
    """Tensors of the CPU lie on the device, whatever torch thinks; their memory is not watched."""
    import torch

    patches.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    patches.setattr(torch.Tensor, "is_cpu", property(lambda tensor: False))
    patches.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    patches.setattr(simulated, "memory", None)


def to_host(array: DeviceArray) -> Any:
    """The array as one of NumPy."""
    return array.host
