"""What of `fastce.cuda` can be tested without a device, in the ordinary run of the tests.

The contract's tables go through numba's simulator in a process of their own, for it must be chosen
before numba is imported; launches go to a driver that writes down what it is told.
"""

import importlib.util
import inspect
import os
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastce
from fastce._devices import on_device

CUDA = importlib.util.find_spec("numba_cuda") is not None
needs_numba_cuda = pytest.mark.skipif(not CUDA, reason="numba-cuda is not installed")


class Elsewhere:
    """An array that says it lies on a device."""

    __cuda_array_interface__ = {  # noqa: RUF012
        "version": 3, "shape": (3, 4), "typestr": "<f4", "data": (4096, False), "strides": None
    }  # fmt: skip


@needs_numba_cuda
@pytest.mark.parametrize(
    "name, for_a_real_device", [("test_cuda_device", 1), ("test_torch_cuda_device", 0)]
)
def test_in_the_simulator(name, for_a_real_device):
    path = Path(__file__).with_name(f"{name}.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", path],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}, cwd=path.parents[1], text=True,
        capture_output=True, timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]
    skipped = re.findall(r"(\d+) skipped", done.stdout.splitlines()[-1])
    assert sum(map(int, skipped)) == for_a_real_device


def test_only_arrays_on_a_device_go_there():
    assert on_device(Elsewhere())
    for value in (np.zeros(3), [1.0], 2.0, np.float32(1), np.zeros((2, 2)).view(np.matrix)):
        assert not on_device(value)
    torch = pytest.importorskip("torch")
    assert not on_device(torch.zeros(3, requires_grad=True))


@pytest.mark.parametrize(
    "call",
    [
        lambda z: fastce.cross_entropy(z, z),
        lambda z: fastce.cross_entropy_and_grad(z, z),
        lambda z: fastce.cross_entropy_stats(z, z),
        fastce.softmax,
        fastce.log_softmax,
        fastce.logsumexp,
    ],
)
def test_functions_for_arrays_of_the_host_pass_on_those_of_a_device(call, monkeypatch):
    """Without the extra there is one error, which says so."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "numba_cuda" else find(name)
    )
    for name in [name for name in sys.modules if name.startswith("fastce.cuda")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(fastce, "cuda", raising=False)
    with pytest.raises(ImportError, match=r"expected the package numba-cuda.*fastce\[cuda\]"):
        call(Elsewhere())


class FakeDriver:
    """Answers as the bindings of the CUDA driver do, and keeps what it was told."""

    CU_MEMHOSTALLOC_PORTABLE, CU_MEMHOSTALLOC_DEVICEMAP = 1, 2

    def __init__(self):
        self.calls = []
        self.status = 0
        self.memory = np.zeros(8, np.int64)
        self.arguments = None

    def __getattr__(self, name):
        if not name.startswith("cu"):
            return SimpleNamespace()
        return lambda *arguments: self._called(name, *arguments)

    class CUdevice_attribute:  # noqa: N801
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 9
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 0
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 232_448
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR = 233_472

    class CUfunction_attribute:  # noqa: N801
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    def _called(self, name, *arguments):
        import ctypes

        self.calls.append((name, *arguments))
        if name == "cuDeviceGetAttribute":
            return 0, arguments[0]
        if name == "cuMemHostAlloc":
            return 0, self.memory.ctypes.data
        if name == "cuLaunchKernel":
            extra = (ctypes.c_void_p * 5).from_address(arguments[-1])
            size = ctypes.c_size_t.from_address(extra[3]).value
            self.arguments = ctypes.string_at(extra[1], size)
            assert (extra[0], extra[2], extra[4]) == (1, 2, None)
            return (SimpleNamespace(name="CUDA_ERROR_ILL"),) if self.status else (0,)
        return 0, name

    def names(self):
        return [call[0] for call in self.calls]


@pytest.fixture
def device(monkeypatch):
    """A device whose driver is `FakeDriver`, and kernels that need not be compiled."""
    from fastce.cuda import driver, kernels

    fake = FakeDriver()
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    monkeypatch.setattr(driver, "code", lambda kernel, cc: kernels.Code("kernel", b"code"))
    made = driver.Device(0)
    monkeypatch.setattr(driver, "device", lambda ordinal: made)
    return made, fake


@needs_numba_cuda
def test_a_launch_packs_its_arguments_and_loads_once(device):
    from fastce.cuda.kernels import Sum

    made, fake = device
    weight = Sum("weight", double=False)
    fake.calls.clear()
    for _ in range(2):
        made.launch(weight, 3, 100, 77, (1, -2, 3, 4, 1 << 62))
    assert struct.unpack("5q", fake.arguments) == (1, -2, 3, 4, 1 << 62)
    assert fake.names().count("cuModuleLoadData") == 1
    assert ("cuModuleLoadData", b"code") in fake.calls
    assert ("cuFuncSetAttribute", "cuModuleGetFunction", 8, 232_448) in fake.calls
    assert fake.names().count("cuCtxPushCurrent") == fake.names().count("cuCtxPopCurrent")
    launch = next(call for call in fake.calls if call[0] == "cuLaunchKernel")
    assert launch[1:11] == ("cuModuleGetFunction", 3, 1, 1, 256, 1, 1, 100, 77, 0)
    fake.status = 1
    with pytest.raises(RuntimeError, match="CUDA_ERROR_ILL"):
        made.launch(weight, 3, 100, 77, (1, -2, 3, 4, 5))
    assert fake.names().count("cuCtxPushCurrent") == fake.names().count("cuCtxPopCurrent")


@needs_numba_cuda
def test_a_call_never_waits(device, monkeypatch):
    """Also what graph capture needs: launches on the caller's stream and nothing else."""
    from fastce.cuda import arrays, cross_entropy_and_grad

    made, fake = device
    monkeypatch.setitem(arrays._READERS, "tests", arrays._from_interface)
    maker = arrays.Maker(
        lambda shape, dtype, like: Made(shape, dtype),
        lambda like: Made(like.shape, "float32"),
        lambda value: value,
    )
    monkeypatch.setattr(arrays, "_NUMBA", maker)
    for _ in range(2):
        fake.calls.clear()
        cross_entropy_and_grad(Made((8192, 4096), "float32"), Made((8192,), "int64"))
    allowed = {"cuCtxPushCurrent", "cuCtxPopCurrent", "cuLaunchKernel"}
    assert set(fake.names()) == allowed
    assert fake.names().count("cuLaunchKernel") == 3
    assert {call[9] for call in fake.calls if call[0] == "cuLaunchKernel"} == {5}
    made.synchronize()
    assert "cuCtxSynchronize" in fake.names()


class Made:
    """An array on a device, without memory, whose owner works on stream 5."""

    def __init__(self, shape, dtype):
        self.__cuda_array_interface__ = {
            "version": 3, "shape": shape, "typestr": np.dtype(dtype).str, "data": (4096, False),
            "strides": None, "stream": 5,
        }  # fmt: skip


@needs_numba_cuda
def test_without_a_driver_there_is_one_error():
    from fastce.cuda import driver

    try:
        driver._driver()
    except RuntimeError:
        with pytest.raises(RuntimeError, match=r"^fastce\.cuda: expected a CUDA d"):
            fastce.softmax(Elsewhere())
    else:
        pytest.skip("there is a CUDA device")


@needs_numba_cuda
def test_tensors_of_torch_are_read_where_they_lie(monkeypatch):
    torch = pytest.importorskip("torch")
    from fastce.cuda import arrays

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=9))
    tensor = torch.zeros(3, 8, dtype=torch.bfloat16)[:, ::2].requires_grad_()
    array = arrays._from_torch(tensor)
    assert array.address == tensor.data_ptr()
    assert (array.shape, array.strides, array.stream) == ((3, 4), (16, 4), 9)
    assert (array.dtype.name, array.itemsize, array.contiguous) == ("bfloat16", 2, False)
    made = arrays._torch_empty((2,), "float32", array)
    assert made.dtype == torch.float32
    assert not arrays._torch_empty_like(array).requires_grad


@needs_numba_cuda
def test_the_table_of_launches():
    """Every row has a kernel that holds it, with room for its shared memory."""
    from fastce.cuda import plan

    limits = plan.Limits(232_448, 233_472)
    for dtype, size in plan.ITEM_SIZE.items():
        for classes in [*range(1, 2000, 7), 32_000, 50_257, 128_256, 262_144, 1_000_000]:
            kernel, shared = plan.choose(
                dtype, "gradient", classes, side_by_side=True, packed=True, limits=limits
            )
            if kernel.regime == "tile":
                assert shared == kernel.block * classes * size <= 48 << 10
                continue
            assert kernel.threads >= 32 // size  # the edges
            assert shared <= limits.block
            assert kernel.blocks * (shared + plan.RESERVED) <= limits.multiprocessor
            held = 16 * kernel.threads * kernel.vectors + shared - plan.SCRATCH
            assert kernel.beyond == "memory" or held >= classes * size - 15
            assert plan.variant(dtype, "gradient", _line(kernel)) == kernel


def _line(kernel):
    from fastce.cuda import plan

    return next(
        runs for runs in plan.ROWS
        if (runs.threads, runs.vectors, runs.beyond)
        == (kernel.threads, kernel.vectors, kernel.beyond)
    )  # fmt: skip


@needs_numba_cuda
def test_compiled_kernels_are_kept_for_each_architecture(tmp_path, monkeypatch):
    from fastce.cuda import kernels

    compiled = []

    def compile_(kernel, capability):
        compiled.append(capability)
        return kernels.Code("name", bytes(capability))

    monkeypatch.setattr(kernels, "compiled", compile_)
    monkeypatch.setattr(kernels, "cache_directory", lambda: tmp_path)
    kernel = kernels.Sum("weight", double=False)
    for capability in ((9, 0), (9, 0), (8, 0), (9, 0)):
        assert kernels.code(kernel, capability).cubin == bytes(capability)
    assert compiled == [(9, 0), (8, 0)]
    (kept,) = tmp_path.glob("*sm90*.cubin")
    kept.write_bytes(kept.read_bytes()[:-1])  # damaged
    assert kernels.code(kernel, (9, 0)).cubin == b"\x09\x00"
    assert compiled == [(9, 0), (8, 0), (9, 0)]


@needs_numba_cuda
def test_warmup_compiles_every_line_of_the_table(monkeypatch):
    from fastce._cli import cuda, terminal
    from fastce.cuda import kernels, plan

    made = []
    monkeypatch.setattr(kernels, "code", lambda kernel, cc: made.append((kernel, cc)))
    cuda.warm(["sm_90", "sm_120"], ["bfloat16"])
    assert {cc for _, cc in made} == {(9, 0), (12, 0)}
    regimes = {(k.regime, k.threads, k.vectors, k.beyond) for k, _ in made if hasattr(k, "dtype")}
    assert len(regimes) == len(plan.TABLE)
    with pytest.raises(terminal.Failure, match="expected architectures such as sm_90"):
        cuda.warm(["h100"], ["bfloat16"])


PAGE = (Path(__file__).parents[1] / "docs" / "cuda.md").read_text(encoding="utf-8")


@needs_numba_cuda
def test_the_page_shows_the_kernel_that_is_tested():
    from tests import cuda_user

    assert (
        inspect.getsource(cuda_user.losses_of_rows).replace(
            '    """One thread for each row, one pass over its classes."""\n', ""
        )
        in PAGE
    )


def test_the_commands_of_the_page_are_understood():
    from fastce.__main__ import _parser

    commands = re.findall(r"python -m fastce ([^`#\n]+)", PAGE)
    assert commands
    for command in commands:
        _parser().parse_args(shlex.split(command))
