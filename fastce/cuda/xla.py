"""Plans for calls that XLA makes on CUDA devices: what `calls` would launch for the same arrays.

`fastce.cpu.xla_cuda` says how a plan lies in memory and replays it.  Nothing here happens when a
function is traced: compiled programs are kept on disk and move between processes, where the handles
of kernels would mean nothing, and one program may run on several devices.
"""

import ctypes
import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastce._arguments import Options
from fastce.cpu import xla_cuda as layout
from fastce.cpu.xla import IGNORED
from fastce.cuda import calls
from fastce.cuda.arrays import Array, Bfloat16, row_order
from fastce.cuda.finish import FLOATS, INTEGERS
from fastce.cuda.kernels import source

# The dtypes that XLA has these numbers for (XLA_FFI_DataType).
_INT32, _FLOAT16, _FLOAT32, _FLOAT64, _BFLOAT16 = 4, 10, 11, 12, 16
_DTYPES: dict[int, Any] = {
    _INT32: np.dtype(np.int32), _FLOAT16: np.dtype(np.float16), _FLOAT32: np.dtype(np.float32),
    _FLOAT64: np.dtype(np.float64), _BFLOAT16: Bfloat16(),
}  # fmt: skip
_NOBODY: Any = None  # makes results: XLA has made them
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_...

assert len(INTEGERS) + len(FLOATS) <= layout.MOST_VALUES

Words = NDArray[np.int64]

_plans: list[Words] = []  # which handlers read as long as the process lives
_messages: dict[str, Any] = {}


@functools.cache
def handler() -> layout.Handler:
    """The one handler of a process."""
    return layout.Handler(_serve)


def _serve(call: int) -> int:
    """Make a plan for a call, or say in words what has gone wrong."""
    words = np.ctypeslib.as_array((ctypes.c_int64 * layout.CALL).from_address(call))
    try:
        device = calls.device(int(words[layout.ORDINAL]))
        if status := int(words[layout.STATUS]):
            raise device.failure(status)
        with device.while_recording():
            plan = _plan(words, device)
    except Exception as error:  # whatever it is, XLA must be told
        text = str(error) or type(error).__name__
        message = _messages.setdefault(text, ctypes.create_string_buffer(text.encode()))
        words[layout.MESSAGE] = ctypes.addressof(message)
        return 0
    _plans.append(plan)
    return int(plan.ctypes.data)


def _plan(call: Words, device: Any) -> Words:
    """The launches for a call of XLA's, in the words of a plan."""
    kind = call[: layout.KIND]
    addresses = call[layout.ADDRESSES :][: layout.ARRAYS].tolist()
    recorded, places = _launches(kind, addresses)
    plan = np.zeros(layout.LAUNCHES + layout.WORDS * len(recorded), np.int64)
    plan[layout.KIND_OF :][: layout.KIND] = kind
    plan[layout.PUSH] = device.entry("cuCtxPushCurrent")
    plan[layout.POP] = device.entry("cuCtxPopCurrent")
    plan[layout.LAUNCH] = device.entry("cuLaunchKernelEx")
    plan[layout.CONTEXT] = device.context
    plan[layout.PLACES :][: layout.ARRAYS] = places
    plan[layout.SIZE_OF] = 8 * (len(INTEGERS) + len(FLOATS))
    plan[layout.COUNT] = len(recorded)
    for number, (kernel, grid, shared, _, integers, floats, cluster) in enumerate(recorded):
        launch = plan[layout.LAUNCHES + number * layout.WORDS :]
        launch[layout.KERNEL] = device.function(kernel)
        block = source(kernel).block
        pairs = [(grid, 1), (1, block), (1, 1), (shared, 0), (0, 0), (0, 0), (int(cluster > 1), 0)]
        launch[layout.CONFIG :][: len(pairs)] = [low | high << 32 for low, high in pairs]
        launch[layout.ATTRIBUTE :][:3] = _CLUSTER_DIMENSION, cluster | 1 << 32, 1
        values = launch[layout.VALUES :]
        values[: len(INTEGERS)] = integers
        values[len(INTEGERS) :][: len(FLOATS)].view(np.float64)[:] = floats
        for place, address in zip(places, addresses, strict=True):
            if place >= 0:
                values[place] -= address
    return plan


def _launches(kind: Words, addresses: list[int]) -> tuple[list[Any], list[int]]:
    """What a call comes to: launches, and which argument of the kernels each of its arrays is."""
    ordinal, dtype, label_dtype, with_grad, outer, classes, inner, *_ = map(int, kind)
    smoothing, z_loss = kind[[layout.SMOOTHING, layout.PENALTY]].view(np.float64).tolist()
    every, rows = (outer, classes, inner), (outer, inner)
    real = _DTYPES[_FLOAT64 if dtype == _FLOAT64 else _FLOAT32]
    hard = label_dtype == _INT32

    def array(number: int, shape: tuple[int, ...], of: Any) -> Array:
        strides = row_order(shape, of.itemsize)
        return Array(addresses[number], shape, strides, of, ordinal, 0, _NOBODY, None)

    z = array(0, every, _DTYPES[dtype])
    labels = array(1, rows if hard else every, _DTYPES[label_dtype])
    launches: list[Any] = []
    calls.rows(
        "gradient" if with_grad else "loss", 1, z,
        targets=labels if hard else None, soft=None if hard else labels,
        options=Options(IGNORED, smoothing, z_loss), results=calls.Results(array(3, rows, real)),
        upstream=array(2, rows, real) if with_grad else None,
        out=array(4, every, z.dtype) if with_grad else None,
        launch=lambda *launch: launches.append(launch),
    )  # fmt: skip
    names = ["z", "targets" if hard else "soft", "upstream", "losses", "out"]
    places = [INTEGERS.index(name) for name in names]
    return launches, places if with_grad else [*places[:2], -1, places[3], -1]
