"""Arrays of a library that has nothing but DLPack, on a simulated device: memory of the host that
says it lies on one, handed to and fro in capsules of both versions of the protocol.
"""

import ctypes
import gc
import sys
import weakref
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest

from tests.test_cuda_device import SIMULATED, _arrays  # noqa: F401

if not SIMULATED:
    pytest.skip("the stand-in for a library has memory of the host", allow_module_level=True)

from cuda.core.utils import StridedMemoryView

import fastce
from fastce.cuda import dlpack, simulated, simulated_driver
from tests import oracle
from tests.checks import FLOATS, assert_gradient, assert_loss, draw, draw_targets, draw_weight

STREAM, CONSUMER = simulated_driver.Device.stream, 7


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p),
        ("offset", ctypes.c_uint64),
    )  # fmt: skip


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
        ("deleter", _Deleter), ("flags", ctypes.c_uint64), ("tensor", _Tensor),
    )  # fmt: skip


_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, (
    ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)  # fmt: skip
_CODES = {"i": 0, "u": 1, "f": 2}
_alive = {}  # what capsules that have not been deleted refer to


class Array:
    """An array of the library, in memory of the host."""

    def __init__(self, host, *, versioned=False):
        self.host, self.versioned = host, versioned
        self.streams, self.deleted = [], 0
        simulated.memory.append(np.lib.array_utils.byte_bounds(host))

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, *, stream=None, max_version=None, **_):
        self.streams.append(stream)
        host, versioned = self.host, self.versioned and max_version and max_version[0] >= 1
        managed = (_Versioned if versioned else _Managed)()
        shape = (ctypes.c_int64 * host.ndim)(*host.shape)
        strides = (ctypes.c_int64 * host.ndim)(*(s // host.itemsize for s in host.strides))
        code = 4 if host.dtype == ml_dtypes.bfloat16 else _CODES[host.dtype.kind]
        managed.tensor = _Tensor(
            host.ctypes.data, 2, 0, host.ndim, code, 8 * host.itemsize, 1,
            ctypes.addressof(shape), ctypes.addressof(strides), 0,
        )  # fmt: skip
        where = ctypes.addressof(managed)

        def delete(_):
            self.deleted += 1
            del _alive[where]

        managed.deleter = _Deleter(delete)
        if versioned:
            managed.major, managed.minor, managed.flags = 1, 0, 0
        _alive[where] = self, managed, shape, strides
        return _capsule(where, b"dltensor_versioned" if versioned else b"dltensor", None)


class Request:
    """An array that is handed over, with the library's own stream in the request for it."""

    versioned = True  # whether the library knows of capsules of version 1

    def __init__(self, export):
        self.export = export

    def __dlpack_device__(self):
        return self.export.__dlpack_device__()

    def __dlpack__(self, **options):
        if not self.versioned:
            options.pop("max_version")
        return self.export.__dlpack__(**{**options, "stream": CONSUMER})


class Imported:
    """What the library makes of an array that it is handed."""

    def __init__(self, export):
        self.view = StridedMemoryView.from_dlpack(Request(export), -1)

    @property
    def host(self):
        size = int(np.prod(self.view.shape)) * self.view.dtype.itemsize
        raw = (ctypes.c_byte * size).from_address(self.view.ptr)
        return np.frombuffer(raw, self.view.dtype).reshape(self.view.shape)


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """The library, memory from it, and what the driver is asked for."""
    module = ModuleType("elsewhere")
    module.from_dlpack = Imported
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    monkeypatch.setattr(Array, "__module__", "elsewhere.arrays")
    made, ordered, kept = [], [], []

    def allocate(ordinal, shape, dtype):
        array = Array(np.full(shape, 77).astype(dtype))
        made.append(weakref.ref(array))
        return StridedMemoryView.from_dlpack(array, -1)

    monkeypatch.setattr(dlpack, "_allocate", allocate)
    device = simulated_driver.Device
    monkeypatch.setattr(device, "order", lambda self, *streams: ordered.append(streams))
    monkeypatch.setattr(device, "keep", lambda self, *what: kept.append(what))
    module.made, module.ordered, module.kept = made, ordered, kept
    yield module
    kept.clear()
    gc.collect()
    assert not _alive  # no capsule is left


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize("dtype", [FLOATS[1], FLOATS[3]], ids=str)
def test_the_same_kind_of_array_comes_out(library, versioned, dtype, monkeypatch):
    logits, targets, weight = draw((5, 9), dtype), draw_targets((5,), 9), draw_weight(9)
    monkeypatch.setattr(Request, "versioned", versioned)
    z, y, w = (Array(host, versioned=versioned) for host in (logits, targets, weight))
    loss, grad = fastce.cross_entropy_and_grad(z, y, weight=w)
    want = oracle.cross_entropy(logits, targets, weight=weight)
    assert type(loss) is type(grad) is Imported
    assert_loss(loss.host, want.loss, dtype)
    assert_gradient(grad.host, want.grad, dtype)
    assert z.streams == y.streams == w.streams == [STREAM]
    # results wait for their kernels on the library's stream
    assert library.ordered == [(STREAM, CONSUMER)] * 2


def test_memory_is_held_while_it_is_used_and_given_back_once(library):
    z, y = Array(draw((5, 9))), Array(draw_targets((5,), 9))
    loss, grad = fastce.cross_entropy_and_grad(z, y)
    gc.collect()
    assert [stream for _, stream in library.kept] == [STREAM] * 2
    assert z.deleted == y.deleted == 0  # the device may not have got that far
    library.kept.clear()
    gc.collect()
    assert z.deleted == y.deleted == 1
    alive = [made() for made in library.made if made() is not None]
    assert len(alive) == 2  # of the scratch memory nothing is left
    before = grad.host.copy()
    del loss
    gc.collect()
    assert sorted(array.deleted for array in alive) == [0, 1]
    np.testing.assert_array_equal(grad.host, before)
    del grad
    gc.collect()
    assert [array.deleted for array in alive] == [1, 1]


def test_a_failed_call_gives_everything_back(library):
    z, y = Array(draw((5, 9))), Array(draw_targets((4,), 9))
    with pytest.raises(ValueError, match="targets: expected shape"):
        fastce.cross_entropy(z, y)
    library.kept.clear()
    gc.collect()
    assert z.deleted == y.deleted == 1


def test_other_functions(library):
    x, t = draw((3, 8)), (draw((3, 8), seed=1) > 0).astype("f4")
    assert_loss(fastce.logsumexp(Array(x)).host, oracle.logsumexp(x), FLOATS[1])
    assert_gradient(fastce.softmax(Array(x)).host, oracle.softmax(x), FLOATS[1])
    want = oracle.binary_cross_entropy(x, t)
    loss, grad = fastce.binary_cross_entropy_and_grad(Array(x), Array(t))
    assert_loss(loss.host, want.loss, FLOATS[1])
    assert_gradient(grad.host, want.grad, FLOATS[1])
    stats = fastce.cross_entropy_stats(Array(x), Array(np.array([0, 1, 2])))
    assert {type(field) for field in stats} == {Imported}


def test_out_is_refused():
    """JAX's arrays are immutable, and others would not wait for what is written to them."""
    x = Array(draw((3, 8)))
    before = x.host.copy()
    with pytest.raises(ValueError, match="out: expected a writable array, got a read-only one"):
        fastce.softmax(x, out=x)
    np.testing.assert_array_equal(x.host, before)


def test_a_library_that_cannot_be_given_arrays(library):
    del library.from_dlpack
    match = "x: expected an array of a library with from_dlpack, got Array of elsewhere.arrays"
    with pytest.raises(TypeError, match=match):
        fastce.softmax(Array(draw((3, 8))))


def test_the_namespace_of_the_array_standard_comes_first(library, monkeypatch):
    def given(export):
        return Imported(export), "by the namespace"

    namespace = ModuleType("namespace")
    namespace.from_dlpack = given
    monkeypatch.setattr(Array, "__array_namespace__", lambda self: namespace, raising=False)
    assert fastce.softmax(Array(draw((3, 8))))[1] == "by the namespace"


@pytest.mark.parametrize(
    "asked, ordered", [({}, [(STREAM, 1)]), ({"stream": None}, [(STREAM, 1)]),
                       ({"stream": 1}, [(STREAM, 1)]), ({"stream": -1}, [])],
)  # fmt: skip
def test_streams_of_the_protocol(library, asked, ordered):
    made = dlpack._empty((2, 3), "float32", dlpack.read(Array(draw((2, 3)))))
    assert made.__dlpack_device__() == (2, 0)
    made.__dlpack__(**asked)
    assert library.ordered == ordered
