"""What XLA and the CUDA driver show to a handler, as their headers have it.

Structures are those of ``xla/ffi/api/c_api.h`` and ``cuda.h``; functions are Python's.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

INSTANTIATE, PREPARE, INITIALIZE, EXECUTE = range(4)
DTYPES = {"int32": 4, "float16": 10, "float32": 11, "float64": 12, "bfloat16": 16}
FUNCTIONS = (
    "Error_Create", "Error_GetMessage", "Error_Destroy", "Handler_Register", "Stream_Get",
    "Type_Register", "ExecutionContext_Get", "State_Set", "State_Get", "DeviceMemory_Allocate",
    "DeviceMemory_Free", "ThreadPool_Schedule", "ThreadPool_NumThreads", "Future_Create",
    "Future_SetAvailable", "Future_SetError", "RunId_Get", "DeviceOrdinal_Get",
)  # fmt: skip
Function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
_P, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32


def structure(name: str, *fields: Any) -> Any:
    """A structure of XLA's: each begins with its size and a place for extensions."""
    return type(name, (ctypes.Structure,), {"_fields_": [("size", _SIZE), ("more", _P), *fields]})


Version = structure("Version", ("major", _INT), ("minor", _INT))
Api = structure(
    "Api", ("version", Version), ("internal", _P), *((name, _P) for name in FUNCTIONS)
)  # fmt: skip
Buffer = structure(
    "Buffer", ("dtype", _INT), ("data", _P), ("rank", ctypes.c_int64), ("dims", _P)
)  # fmt: skip
Items = structure("Items", ("count", ctypes.c_int64), ("types", _P), ("items", _P))
Named = structure("Named", ("count", ctypes.c_int64), ("types", _P), ("names", _P), ("items", _P))
Frame = structure(
    "Frame", ("api", _P), ("context", _P), ("stage", _INT), ("args", Items), ("rets", Items),
    ("attrs", Named), ("future", _P),
)  # fmt: skip
Got = structure("Got", ("context", _P), ("value", _P))
GotInt = structure("GotInt", ("context", _P), ("value", _INT))
NewError = structure("NewError", ("message", ctypes.c_char_p), ("code", _INT))
Extension = structure("Extension", ("metadata", _P))  # the type comes in the place of `more`
CONTEXT = 0xC0


class Scalar(ctypes.Structure):
    """A number among the attributes."""

    _fields_ = (("dtype", _INT), ("value", _P))


class Metadata(ctypes.Structure):
    """What a handler says of itself."""

    _fields_ = (("size", _SIZE), ("version", Version), ("traits", ctypes.c_uint32))


class Asked(ctypes.Structure):
    """The extension by which XLA asks for it."""

    _fields_ = (("size", _SIZE), ("kind", _INT), ("next", _P), ("metadata", _P))


def table(stream: int = 0, ordinal: int = 0, broken: str = "") -> tuple[Any, list[str], list[Any]]:
    """XLA's functions, of which one may be broken; the messages of errors; what to keep alive."""
    errors: list[str] = []

    def failing(name: str) -> int | None:
        return errors.append(f"{name} is broken") or len(errors) if name == broken else None

    def get_stream(where: int) -> int | None:
        got = Got.from_address(where)
        assert (got.size, got.more, got.context) == (32, None, CONTEXT)
        got.value = stream
        return failing("Stream_Get")

    def get_ordinal(where: int) -> int | None:
        got = GotInt.from_address(where)
        assert (got.size, got.more, got.context) == (28, None, CONTEXT)
        got.value = ordinal
        return failing("DeviceOrdinal_Get")

    def create(where: int) -> int:
        new = NewError.from_address(where)
        assert (new.size, new.more, new.code) == (28, None, 13)
        errors.append(new.message.decode())
        return len(errors)

    functions = {"Stream_Get": get_stream, "DeviceOrdinal_Get": get_ordinal, "Error_Create": create}
    kept: list[Any] = [Function(function) for function in functions.values()]
    api = Api(size=ctypes.sizeof(Api))
    for name, function in zip(functions, kept, strict=True):
        setattr(api, name, ctypes.cast(function, _P))
    return api, errors, kept


class Place(NamedTuple):
    """An array of which only this matters."""

    address: int
    shape: tuple[int, ...]
    dtype: str


def call(
    handler: int, operands: Sequence[Place], results: Sequence[Place], *, trailing: int = 0,
    label_smoothing: float = 0.0, z_loss: float = 0.0, stage: int = EXECUTE, **functions: Any,
) -> str | None:  # fmt: skip
    """Call a handler with a frame made for it; the message of its error, None if there is none."""
    api, errors, kept = table(**functions)

    def pointers(values: Sequence[Any]) -> Any:
        kept.extend(values)
        array = (_P * len(values))(*map(ctypes.addressof, values))
        kept.append(array)
        return ctypes.addressof(array)

    def items(places: Sequence[Place]) -> Any:
        buffers = []
        for place in places:
            dims = (ctypes.c_int64 * len(place.shape))(*place.shape)
            kept.append(dims)
            buffers.append(Buffer(
                size=ctypes.sizeof(Buffer), dtype=DTYPES[place.dtype], data=place.address,
                rank=len(place.shape), dims=ctypes.addressof(dims),
            ))  # fmt: skip
        return Items(size=ctypes.sizeof(Items), count=len(places), items=pointers(buffers))

    values = [ctypes.c_double(label_smoothing), ctypes.c_int64(trailing), ctypes.c_double(z_loss)]
    kept.extend(values)
    scalars = [Scalar(0, ctypes.addressof(value)) for value in values]
    frame = Frame(
        size=ctypes.sizeof(Frame), api=ctypes.addressof(api), context=CONTEXT, stage=stage,
        args=items(operands), rets=items(results),
        attrs=Named(size=ctypes.sizeof(Named), count=3, items=pointers(scalars)),
    )  # fmt: skip
    error = Function(handler)(ctypes.addressof(frame))
    assert (error or 0) == len(errors)
    return errors[-1] if error else None


def metadata(handler: int) -> tuple[int, int, int]:
    """Version and traits that a handler tells, as XLA asks for them."""
    told = Metadata(size=ctypes.sizeof(Metadata))
    asked = Asked(ctypes.sizeof(Asked), 1, None, ctypes.addressof(told))
    frame = Frame(size=ctypes.sizeof(Frame), more=ctypes.addressof(asked), stage=EXECUTE)
    assert not Function(handler)(ctypes.addressof(frame))
    return told.version.major, told.version.minor, told.traits


# The driver ---------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """What the driver was told to launch."""

    function: int
    grid: int
    block: int
    shared: int
    stream: int
    cluster: int
    arguments: bytes


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", _P), ("attributes", _P), ("count", ctypes.c_uint),
    )  # fmt: skip


class Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("kind", ctypes.c_int), ("pad", _INT), ("value", ctypes.c_uint * 16))


def read_launch(config: int, function: int, extra: int) -> Launch:
    """The arguments of cuLaunchKernelEx."""
    given, cluster = Config.from_address(config), 1
    assert (*given.grid[1:], *given.block[1:]) == (1,) * 4
    if given.count:
        attribute = Attribute.from_address(given.attributes)
        assert (given.count, attribute.kind, attribute.value[1:3]) == (1, 4, [1, 1])
        cluster = attribute.value[0]
    return Launch(
        function, given.grid[0], given.block[0], given.shared, given.stream or 0, cluster,
        read_arguments(extra),
    )  # fmt: skip


def read_arguments(extra: int) -> bytes:
    """The bytes of a kernel's arguments."""
    buffer, at, size, where, end = (_P * 5).from_address(extra)
    assert (buffer, size, end) == (1, 2, None)
    return ctypes.string_at(at, _SIZE.from_address(where).value)


class Driver:
    """The functions that compiled code calls, and what they were told."""

    def __init__(self, run: Callable[[Launch], Any] | None = None) -> None:
        self.launches: list[Launch] = []
        self.contexts: list[int] = []  # that are current
        self.pushed: list[int] = []
        self.status = {"cuCtxPushCurrent": 0, "cuCtxPopCurrent": 0, "cuLaunchKernelEx": 0}
        self._run = run or self.launches.append
        kinds = {
            "cuCtxPushCurrent": (_P,), "cuCtxPopCurrent": (_P,), "cuLaunchKernelEx": (_P,) * 4,
        }  # fmt: skip
        functions = (self._push, self._pop, self._launch)
        self._functions = {
            name: ctypes.CFUNCTYPE(_INT, *kind)(function)
            for (name, kind), function in zip(kinds.items(), functions, strict=True)
        }

    def entry(self, name: str) -> int:
        """The address of a function."""
        return int(np.uint64(ctypes.cast(self._functions[name], _P).value or 0))

    def _push(self, context: int) -> int:
        if not self.status["cuCtxPushCurrent"]:
            self.contexts.append(context)
            self.pushed.append(context)
        return self.status["cuCtxPushCurrent"]

    def _pop(self, where: int) -> int:
        _P.from_address(where).value = self.contexts.pop()
        return self.status["cuCtxPopCurrent"]

    def _launch(self, config: int, function: int, parameters: int | None, extra: int) -> int:
        assert parameters is None
        assert self.contexts
        if not self.status["cuLaunchKernelEx"]:
            self._run(read_launch(config, function, extra))
        return self.status["cuLaunchKernelEx"]
