"""What of `fastce.cuda` can be tested without a device, in the ordinary run of the tests.

The contract's tables go through numba's simulator in a process of their own, for it must be chosen
before numba is imported; launches go to a driver that writes down what it is told.
"""

import importlib.util
import inspect
import itertools
import os
import re
import shlex
import struct
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastce
from fastce import shards
from fastce._devices import on_device

needs_numba_cuda = pytest.mark.needs("test-cuda")


class Elsewhere:
    """An array that says it lies on a device."""

    __cuda_array_interface__ = {  # noqa: RUF012
        "version": 3, "shape": (3, 4), "typestr": "<f4", "data": (4096, False), "strides": None
    }  # fmt: skip


_SIMULATED = [
    "test_cuda_device", "test_cuda_binary", "test_cuda_dlpack", "test_cuda_shards",
    pytest.param("test_torch_cuda_device", marks=pytest.mark.needs("test-torch")),
    pytest.param("test_jax_cuda_device", marks=pytest.mark.needs("test-jax")),
]  # fmt: skip


@needs_numba_cuda
@pytest.mark.parametrize("name", _SIMULATED)
def test_contract_in_the_simulator(name):
    path = Path(__file__).with_name(f"{name}.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-o", "addopts=", "-p", "no:cacheprovider",
         path],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}, cwd=path.parents[1], text=True,
        capture_output=True, timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    skipped = re.findall(r"^SKIPPED .*: (.*)$", done.stdout, re.MULTILINE)
    assert set(skipped) <= {
        "the page speaks of a real device", "the simulated device is the only one",
        "XLA records graphs on real devices only",
    }  # fmt: skip


def test_only_arrays_on_a_device_go_there():
    assert on_device(Elsewhere())
    for value in (np.zeros(3), [1.0], 2.0, np.float32(1), np.zeros((2, 2)).view(np.matrix)):
        assert not on_device(value)


@pytest.mark.needs("test-torch", "test-jax")
def test_arrays_of_other_libraries_on_the_host_stay_there():
    import jax
    import torch

    assert not on_device(torch.zeros(3, requires_grad=True))
    assert not on_device(jax.numpy.zeros(3))


@pytest.mark.parametrize(
    "device, on", [((2, 1), True), ((13, 0), True), ((1, 0), False), ((10, 0), False)]
)
def test_arrays_that_have_nothing_but_dlpack(device, on):
    class Exchanged:
        def __dlpack_device__(self):
            return device

    assert on_device(Exchanged()) == on

    class Scattered:
        def __dlpack_device__(self):
            raise BufferError("on several devices")

    assert not on_device(Scattered())


@pytest.mark.parametrize(
    "call",
    [
        lambda z: fastce.cross_entropy(z, z),
        lambda z: fastce.cross_entropy_and_grad(z, z),
        lambda z: fastce.cross_entropy_stats(z, z),
        fastce.softmax,
        fastce.log_softmax,
        fastce.logsumexp,
        lambda z: shards.partial(z, z, class_offset=0, classes=4),
        lambda z: fastce.binary_cross_entropy(z, z),
        lambda z: fastce.binary_cross_entropy_and_grad(z, z),
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


def _launch_of(config):
    """A launch of clusters as it lies in memory for the driver (CUlaunchConfig in cuda.h)."""
    import ctypes

    where = config.getPtr()
    numbers = (ctypes.c_uint32 * 7).from_address(where)
    stream, attributes, count = (ctypes.c_uint64 * 3).from_address(where + 32)
    kind, _, *shape = (ctypes.c_uint32 * 5).from_address(attributes)
    assert (count & 0xFFFFFFFF, kind, shape[1:]) == (1, 4, [1, 1])  # ..._CLUSTER_DIMENSION
    assert [numbers[k] for k in (1, 2, 4, 5)] == [1] * 4
    return {"grid": numbers[0], "block": numbers[3], "shared": numbers[6], "stream": stream,
            "cluster": shape[0]}  # fmt: skip


class FakeDriver:
    """Answers as the bindings of the CUDA driver do, and keeps what it was told."""

    CU_MEMHOSTALLOC_PORTABLE, CU_MEMHOSTALLOC_DEVICEMAP = 1, 2

    def __init__(self):
        self.calls = []
        self.status = 0
        self.widest = 16  # cluster that there is room for
        self.memory = np.zeros(8, np.int64)
        self.arguments = None

    def __getattr__(self, name):
        if name in ("CUlaunchAttribute", "CUlaunchAttributeID", "CUlaunchConfig", "CUstream"):
            from cuda.bindings import driver

            return getattr(driver, name)
        if not name.startswith("cu"):
            return SimpleNamespace()
        return lambda *arguments: self._called(name, *arguments)

    class CUdevice_attribute:  # noqa: N801
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 9
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 0
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 232_448
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR = 233_472
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 132

    class CUevent_flags:  # noqa: N801
        CU_EVENT_DISABLE_TIMING = 2
        CU_EVENT_BLOCKING_SYNC = 1

    class CUstream_flags:  # noqa: N801
        CU_STREAM_NON_BLOCKING = 1

    class CUfunction_attribute:  # noqa: N801
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
        CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT = 9
        CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14

    def _called(self, name, *arguments):
        import ctypes

        self.calls.append((name, *arguments))
        if name == "cuDeviceGetAttribute":
            return 0, arguments[0]
        if name == "cuStreamCreate":
            return 0, 4321
        if name == "cuMemHostAlloc":
            return 0, self.memory.ctypes.data
        if name == "cuOccupancyMaxActiveClusters":
            return 0, int(_launch_of(arguments[1])["cluster"] <= self.widest)
        if name in ("cuLaunchKernel", "cuLaunchKernelEx"):
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
def test_the_driver_has_what_is_asked_of_it():
    """Names and numbers of the stand-in are those of the bindings."""
    from cuda.bindings import driver

    from fastce.cuda import driver as ours

    for name, value in vars(FakeDriver).items():
        if name.startswith("CU_"):
            assert getattr(driver, name) == value
        elif isinstance(value, type):
            numbers = {k: v for k, v in vars(value).items() if k.startswith("CU_")}
            real = getattr(driver, name)
            for key, number in numbers.items():
                if name != "CUdevice_attribute":  # there they are the answers
                    assert getattr(real, key) == number
                assert hasattr(real, key)
    called = set(re.findall(r"\.(cu[A-Z]\w+)\(", inspect.getsource(ours)))
    assert "cuLaunchKernelEx" in called
    assert all(callable(getattr(driver, name)) for name in called)


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
def test_a_launch_of_clusters(device):
    from fastce.cuda import plan
    from fastce.cuda.finish import INTEGERS

    made, fake = device
    kernel = plan.variant("float32", "loss", plan.LONG_ROWS[1])
    count = len(INTEGERS)
    fake.calls.clear()
    made.launch(kernel, 32, 5000, 77, tuple(range(count)), (0.5,) * 6, 16)
    assert struct.unpack(f"{count}q6d", fake.arguments) == (*range(count), *(0.5,) * 6)
    (launch,) = [call for call in fake.calls if call[0].startswith("cuLaunch")]
    assert launch[0] == "cuLaunchKernelEx"
    assert launch[2:4] == ("cuModuleGetFunction", 0)
    assert _launch_of(launch[1]) == {
        "grid": 32, "block": 512, "shared": 5000, "stream": 77, "cluster": 16
    }  # fmt: skip
    assert ("cuFuncSetAttribute", "cuModuleGetFunction", 14, 1) in fake.calls
    assert ("cuFuncSetAttribute", "cuModuleGetFunction", 9, 100) in fake.calls


@needs_numba_cuda
@pytest.mark.parametrize("widest, cluster", [(16, 16), (8, 8), (0, 1)])
def test_clusters_are_as_large_as_there_is_room_for(device, widest, cluster):
    made, fake = device
    fake.widest = widest
    for _ in range(2):
        chosen = made.possible(
            "bfloat16", "gradient", 1024, 1 << 20, side_by_side=True, packed=True
        )
        assert chosen.cluster == cluster
        assert chosen.grid == 1024 * cluster
    tries = {16: 1, 8: 2, 0: 2}[widest]  # each is asked about once
    assert fake.names().count("cuOccupancyMaxActiveClusters") == tries


@needs_numba_cuda
def test_streams_wait_for_each_other(device):
    made, fake = device
    assert made.stream == made.stream == 4321
    assert fake.calls.count(("cuStreamCreate", 1)) == 1
    fake.calls.clear()
    made.order(1, 77)
    assert fake.calls == [
        ("cuCtxPushCurrent", "cuDevicePrimaryCtxRetain"), ("cuEventCreate", 3),
        ("cuEventRecord", "cuEventCreate", 1), ("cuStreamWaitEvent", 77, "cuEventCreate", 0),
        ("cuEventDestroy", "cuEventCreate"), ("cuCtxPopCurrent",),
    ]  # fmt: skip


@needs_numba_cuda
def test_what_kernels_use_is_kept_until_they_are_done(device, monkeypatch):
    class Memory:
        pass

    made, fake = device
    done, reached, asked = threading.Event(), threading.Event(), []

    def wait_for(event):
        asked.append(event)
        reached.set()
        done.wait(600)
        return (0,)

    def destroy(event):
        reached.set()
        return (0,)

    monkeypatch.setattr(fake, "cuEventSynchronize", wait_for, raising=False)
    monkeypatch.setattr(fake, "cuEventDestroy", destroy, raising=False)
    memory, released = Memory(), threading.Event()
    weakref.finalize(memory, released.set)
    made.keep(memory, 1)
    del memory
    assert reached.wait(600)
    assert asked == ["cuEventCreate"]
    assert not released.is_set()
    done.set()
    assert released.wait(600)
    assert ("cuEventRecord", "cuEventCreate", 1) in fake.calls


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


@pytest.mark.needs("test-cuda", "test-torch")
def test_tensors_of_torch_are_read_where_they_lie(monkeypatch):
    import torch

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

    h100, a100 = plan.Limits(232_448, 233_472, 132, 16), plan.Limits(166_912, 167_936, 108, 1)
    many = [*range(1, 2000, 7), 32_000, 50_257, 128_256, 262_144, 1_000_000, 3_000_000]
    devices = (h100, h100._replace(cluster=8), a100)
    options = ({}, {"spread": True}, {"capped": True})
    cases = itertools.product(plan.ITEM_SIZE.items(), many, (1, 8, 50, 5000), devices, options)
    for (dtype, size), classes, rows, limits, given in cases:
        kernel, grid, shared, cluster, _ = plan.choose(
            dtype, "gradient", rows, classes, side_by_side=True, packed=True, limits=limits,
            **given,
        )  # fmt: skip
        if kernel.regime == "tile":
            assert shared == kernel.block * classes * size <= 48 << 10
            continue
        assert grid * kernel.block >= rows * cluster * kernel.threads
        assert (cluster > 1) == kernel.clustered
        assert cluster <= limits.cluster
        assert grid % cluster == 0
        assert kernel.threads >= 32 // size  # the edges
        assert shared <= limits.block
        assert kernel.blocks * (shared + plan.RESERVED) <= limits.multiprocessor
        held = 16 * kernel.threads * kernel.vectors + shared - plan.SCRATCH
        # each block's part begins where vectors do if the row does
        part = plan.part(classes, cluster, 16 // size)
        assert part * cluster >= classes
        assert cluster == 1 or part % (16 // size) == 0
        assert kernel.beyond == "memory" or held >= part * size - 15
        lines = plan.OPTION_ROWS if given else plan.ROWS
        assert kernel in [plan.variant(dtype, "gradient", runs, **given) for runs in lines]


@needs_numba_cuda
def test_the_gradient_of_a_slice_is_divided_among_blocks_that_hold_it():
    """No row is read twice, whatever its length, and no block has to meet another."""
    from fastce.cuda import plan

    limits = plan.Limits(232_448, 233_472, 132, 16)
    many = [*range(1, 2000, 7), 32_000, 50_257, 128_256, 1_000_000, 3_000_000]
    for (dtype, size), classes, rows, spread in itertools.product(
        plan.ITEM_SIZE.items(), many, (1, 50, 5000), (False, True)
    ):
        kernel, grid, _, cluster, parts = plan.choose(
            dtype, "slice_gradient", rows, classes, side_by_side=True, packed=False,
            limits=limits, spread=spread,
        )  # fmt: skip
        assert (kernel.beyond, kernel.clustered, cluster) == ("", False, 1)
        assert grid * (kernel.block // kernel.threads) >= rows * parts
        assert parts == 1 or kernel.threads == kernel.block
        width = 16 // size
        part = -(-classes // (width * parts)) * width  # as the kernel has it
        assert part * parts >= classes
        assert part // width <= kernel.threads * kernel.vectors
        assert kernel.blocks >= 4


@needs_numba_cuda
@pytest.mark.parametrize(
    "dtype, rows, classes, cluster, beyond",
    [
        ("bfloat16", 8192, 50_257, 1, "shared"),
        ("bfloat16", 8192, 128_256, 2, "shared"),
        ("bfloat16", 8192, 262_144, 8, "shared"),
        ("bfloat16", 1024, 1 << 20, 16, "shared"),
        ("float32", 8192, 128_256, 4, "shared"),
        ("float32", 1024, 1 << 20, 16, "shared"),
        ("float64", 1024, 1 << 20, 16, "memory"),
        ("float32", 8, 1 << 20, 16, "shared"),  # few rows: over the whole device
        ("bfloat16", 1, 50_257, 4, "shared"),
        ("float32", 1, 4096, 1, ""),  # too short to divide
    ],
)
def test_rows_are_divided_among_as_few_blocks_as_hold_them(dtype, rows, classes, cluster, beyond):
    from fastce.cuda import plan

    limits = plan.Limits(232_448, 233_472, 132, 16)
    where = {"side_by_side": True, "packed": False}
    chosen = plan.choose(dtype, "gradient", rows, classes, limits=limits, **where)
    assert (chosen.cluster, chosen.kernel.beyond) == (cluster, beyond)
    # a sum over labels in another order would have other bits in another batch
    stats = plan.choose(dtype, "stats", 1, classes, limits=limits, **where)
    assert stats.cluster == plan.choose(dtype, "stats", 5000, classes, limits=limits, **where)[3]
    without = plan.choose(
        dtype, "gradient", rows, classes, limits=limits._replace(cluster=1), **where
    )
    assert without.cluster == 1


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
    kernels_over_rows = {k for k, _ in made if isinstance(k, plan.Variant)}
    for task in ("loss", "gradient"):
        wanted = {plan.variant("bfloat16", task, runs) for runs in plan.TABLE}
        assert wanted <= kernels_over_rows
    assert plan.Elements("bfloat16", "gradient", "bfloat16") in {k for k, _ in made}
    made.clear()
    cuda.warm(["sm_80"], ["float32"])
    assert not any(getattr(k, "clustered", False) for k, _ in made)
    with pytest.raises(terminal.Failure, match="expected architectures such as sm_90"):
        cuda.warm(["h100"], ["bfloat16"])


PAGE = (Path(__file__).parents[1] / "docs" / "cuda.md").read_text(encoding="utf-8")


@needs_numba_cuda
@pytest.mark.parametrize("name", ["losses_of_rows", "gradients_of_rows"])
def test_the_page_shows_the_kernels_that_are_tested(name):
    from tests import cuda_user

    source = inspect.getsource(getattr(cuda_user, name))
    assert re.sub(r'    """.*"""\n', "", source) in PAGE


def test_the_commands_of_the_page_are_understood():
    from fastce.__main__ import _parser

    commands = re.findall(r"python -m fastce ([^`#\n]+)", PAGE)
    assert commands
    for command in commands:
        _parser().parse_args(shlex.split(command))
