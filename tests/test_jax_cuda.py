"""`fastce.jax` on CUDA devices as far as it goes without one: programs, launches, errors.

`test_jax_cuda_device` has what comes of the launches.
"""

import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from tests import xla_frames
from tests.test_cuda import FakeDriver, _launch_of
from tests.xla_frames import EXECUTE, INITIALIZE, INSTANTIATE, PREPARE, Launch, Place

STREAM = 0x57


class Fake(FakeDriver):
    """With handles that are numbers, and functions that compiled code can call."""

    def __init__(self):
        super().__init__()
        self.driver = xla_frames.Driver()
        self.direct = []  # launches by the functions for arrays outside JAX
        self.loaded = 0
        self.lacks = ""

    class CUstreamCaptureMode:
        CU_STREAM_CAPTURE_MODE_RELAXED = 2

    @staticmethod
    def CUresult(status):  # noqa: N802
        return SimpleNamespace(name=f"CUDA_ERROR_{status}")

    def _called(self, name, *arguments):
        answer = super()._called(name, *arguments)
        if name == "cuModuleGetFunction":
            self.loaded += 1
            return 0, 1000 + self.loaded
        if name == "cuDevicePrimaryCtxRetain":
            return 0, 70_000_000_000  # more than 32 bits
        if name == "cuThreadExchangeStreamCaptureMode":
            return 0, 1
        if name == "cuGetProcAddress":
            assert arguments[1:] == (12_000, 0)
            symbol = arguments[0].decode()
            return 0, 0 if symbol == self.lacks else self.driver.entry(symbol), 0
        if name == "cuLaunchKernel":
            function, grid, _, _, block, _, _, shared, stream, _, extra = arguments
            packed = xla_frames.read_arguments(extra)
            self.direct.append(Launch(function, grid, block, shared, stream, 1, packed))
        if name == "cuLaunchKernelEx":
            config, function, _, extra = arguments
            packed, of = xla_frames.read_arguments(extra), _launch_of(config)
            self.direct.append(Launch(function, arguments=packed, **of))
        return answer


@pytest.fixture
def device(monkeypatch):
    """A device whose driver is `Fake`, kernels that need not be compiled, and a new handler."""
    from fastce.cuda import driver, kernels, xla

    fake = Fake()
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    monkeypatch.setattr(driver, "code", lambda kernel, cc: kernels.Code("kernel", b"code"))
    devices = {}
    monkeypatch.setattr(
        driver, "device", lambda k: devices.get(k) or devices.setdefault(k, driver.Device(k))
    )
    handler = xla.layout.Handler(xla._serve)
    yield fake, handler.address
    xla.handler.cache_clear()  # whose symbol the new one has taken


LOGITS, LABELS, UPSTREAM, LOSSES, GRAD = (1 << 40, 2 << 40, 3 << 40, 4 << 40, 5 << 40)
SHAPES = {
    "tile": ((300, 10), 0), "lanes": ((40, 100), 0), "block": ((3, 4, 5000), 0),
    "cluster": ((5, 200_000), 0), "class axis first": ((7, 33), 1), "images": ((2, 9, 4, 5), 2),
    "a row": ((70,), 0), "one class": ((5, 1), 0),
}  # fmt: skip


def arguments(shape, trailing, dtype, soft, with_grad, offset=0):
    axis = len(shape) - 1 - trailing
    rows = shape[:axis] + shape[axis + 1 :]
    real = "float64" if dtype == "float64" else "float32"
    operands = [
        Place(LOGITS + offset, shape, dtype),
        Place(LABELS, shape, dtype) if soft else Place(LABELS, rows, "int32"),
    ]
    if not with_grad:
        return operands, [Place(LOSSES, rows, real)]
    operands.append(Place(UPSTREAM, rows, real))
    return operands, [Place(LOSSES, rows, real), Place(GRAD + offset, shape, dtype)]


def direct(monkeypatch, fake, operands, results, trailing, label_smoothing, z_loss):
    """The launches of `fastce.cuda` for the same arrays."""
    from fastce import cuda
    from fastce.cuda import arrays, plan
    from fastce.cuda import driver as module

    def as_array(place):
        dtype = arrays._dtype(place.dtype)
        strides = arrays.row_order(place.shape, dtype.itemsize)
        return arrays.Array(
            place.address, place.shape, strides, dtype, 0, STREAM, maker, place
        )  # fmt: skip

    other = iter(range(6 << 40, 7 << 40, 1 << 30))

    def empty(shape, dtype, like):
        return results[0] if shape == results[0].shape else Place(next(other), shape, dtype)

    maker = arrays.Maker(empty, None, None)
    monkeypatch.setitem(arrays._READERS, "tests", as_array)
    monkeypatch.setattr(arrays, "on_device", lambda value: isinstance(value, Place))
    monkeypatch.setattr("fastce.cuda.losses.on_device", lambda value: isinstance(value, Place))
    options = {
        "axis": len(operands[0].shape) - 1 - trailing, "label_smoothing": label_smoothing,
        "z_loss": z_loss, "reduction": "none",
    }  # fmt: skip
    if operands[1].dtype == "int32":
        options["ignore_index"] = -1
    fake.direct.clear()
    if len(operands) == 3:
        cuda.cross_entropy_and_grad(
            *operands[:2], grad_output=operands[2], out=results[1], **options
        )
    else:
        cuda.cross_entropy(*operands, **options)
    over_rows = {
        entry[0] for kernel, entry in module.device(0)._functions.items()
        if isinstance(kernel, plan.Variant)
    }  # fmt: skip
    return [launch for launch in fake.direct if launch.function in over_rows]


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_launches_are_those_outside_jax(device, monkeypatch, shape, dtype, soft, with_grad):
    """The same kernels with the same numbers, the sentinel for ignored rows included."""
    fake, handler = device
    shape, trailing = SHAPES[shape]
    for label_smoothing, z_loss, offset in ((0.0, 0.0, 0), (0.1, 0.01, 0), (0.0, 0.01, 8)):
        fake.driver.launches.clear()
        operands, results = arguments(shape, trailing, dtype, soft, with_grad, offset)
        options = {"trailing": trailing, "label_smoothing": label_smoothing, "z_loss": z_loss}
        assert xla_frames.call(handler, operands, results, stream=STREAM, **options) is None
        want = direct(monkeypatch, fake, operands, results, **options)
        # What is named differently and of no matter: which soft label is ignored, and how far it
        # is from the upstream gradient of the only row to the next.
        of_no_matter = ["ignore"] * soft + ["upstream_step"] * (shape == (70,))
        got, want = (without(launches, of_no_matter) for launches in (fake.driver.launches, want))
        assert got == want
        assert len(want) == 1
    assert set(fake.driver.pushed) == {70_000_000_000}
    assert not fake.driver.contexts


def without(launches, names):
    changed = []
    for launch in launches:
        packed = bytearray(launch.arguments)
        for name in names:
            struct.pack_into("q", packed, 8 * _index(name), 0)
        changed.append(launch._replace(arguments=bytes(packed)))
    return changed


def _index(name):
    from fastce.cuda.finish import INTEGERS

    return INTEGERS.index(name)


def test_clusters_and_tiles_are_among_those(device):
    fake, handler = device
    for name in ("tile", "cluster"):
        xla_frames.call(handler, *arguments(*SHAPES[name], "float32", False, True))
    tile, cluster = fake.driver.launches
    assert (tile.cluster, tile.shared) == (1, 128 * 10 * 4)
    assert cluster.cluster == cluster.grid // 5 > 1


def test_more_rows_than_a_launch_takes(device, monkeypatch):
    from fastce.cuda import layout

    monkeypatch.setattr(layout, "MOST_ROWS", 100)
    fake, handler = device
    xla_frames.call(handler, *arguments((250, 10), 0, "float32", False, True), stream=STREAM)
    starts = [struct.unpack_from("34q", launch.arguments) for launch in fake.driver.launches]
    at = {name: _index(name) for name in ("z", "rows", "targets", "upstream", "losses", "out")}
    assert [[start[k] for k in at.values()] for start in starts] == [
        [LOGITS + 40 * n, min(100, 250 - n), LABELS + 4 * n, UPSTREAM + 4 * n, LOSSES + 4 * n,
         GRAD + 40 * n]
        for n in (0, 100, 200)
    ]  # fmt: skip
    assert {launch.stream for launch in fake.driver.launches} == {STREAM}


def test_a_plan_is_made_once_for_each_kind_of_call(device, monkeypatch):
    from fastce.cuda import xla

    fake, handler = device
    made, plan = [], xla._plan
    monkeypatch.setattr(xla, "_plan", lambda *given: made.append(given) or plan(*given))
    calls = [
        (((40, 100), 0, "float32", False, True), {}),
        (((40, 100), 0, "float32", False, False), {}),
        (((40, 100), 0, "float32", True, True), {}),
        (((40, 100), 0, "bfloat16", False, True), {}),
        (((41, 100), 0, "float32", False, True), {}),
        (((40, 101), 0, "float32", False, True), {}),
        (((40, 100), 1, "float32", False, True), {"trailing": 1}),
        (((40, 100), 0, "float32", False, True, 4), {}),
        (((40, 100), 0, "float32", False, True), {"label_smoothing": 0.1}),
        (((40, 100), 0, "float32", False, True), {"z_loss": 0.1}),
        (((40, 100), 0, "float32", False, True), {"ordinal": 1}),
    ]  # fmt: skip
    for _ in range(3):
        for given, options in calls:
            assert xla_frames.call(handler, *arguments(*given), **options) is None
    assert len(made) == len(calls)
    thirds = np.split(np.array([hash(launch) for launch in fake.driver.launches]), 3)
    assert len(set(thirds[0])) == len(calls)
    assert (thirds[0] == thirds[1]).all()
    assert (thirds[0] == thirds[2]).all()
    # the same rows along more axes, and at other addresses
    operands, results = arguments((2, 20, 100), 0, "float32", False, True)
    moved = [place._replace(address=place.address + (1 << 20)) for place in operands]
    for each in (operands, moved):
        xla_frames.call(handler, each, results)
    first, second = fake.driver.launches[-2:]
    assert first != second
    assert len(made) == len(calls)


def test_kernels_are_loaded_before_a_program_runs(device):
    """At the stage of initialisation, which also comes before a graph is recorded."""
    fake, handler = device
    given = arguments((40, 100), 0, "float32", False, True)
    for stage in (INSTANTIATE, PREPARE):
        assert xla_frames.call(handler, *given, stage=stage) is None
    assert not fake.calls
    assert xla_frames.call(handler, *given, stage=INITIALIZE) is None
    assert fake.loaded == 1
    assert not fake.driver.launches
    modes = [call[1] for call in fake.calls if call[0] == "cuThreadExchangeStreamCaptureMode"]
    assert modes == [2, 1]  # relaxed, and back to what it was
    fake.calls.clear()
    assert xla_frames.call(handler, *given, stage=EXECUTE) is None
    assert not fake.calls  # of Python's
    assert len(fake.driver.launches) == 1
    assert xla_frames.metadata(handler) == (0, 1, 1)  # may be recorded


def test_no_rows(device):
    fake, handler = device
    assert xla_frames.call(handler, *arguments((0, 100), 0, "float32", False, True)) is None
    assert not fake.driver.launches


GIVEN = ((40, 100), 0, "float32", False, True)


@pytest.mark.parametrize("name", ["cuCtxPushCurrent", "cuCtxPopCurrent", "cuLaunchKernelEx"])
def test_errors_of_the_driver_become_those_of_xla(device, name):
    fake, handler = device
    fake.driver.status[name] = 700
    for _ in range(2):
        message = xla_frames.call(handler, *arguments(*GIVEN))
        assert message == "fastce.cuda: CUDA_ERROR_700 from the CUDA driver"
        assert not fake.driver.contexts
    fake.driver.status[name] = 0
    assert xla_frames.call(handler, *arguments(*GIVEN)) is None


@pytest.mark.parametrize("name", ["Stream_Get", "DeviceOrdinal_Get"])
def test_errors_of_xla_are_handed_back(device, name):
    fake, handler = device
    assert xla_frames.call(handler, *arguments(*GIVEN), broken=name) == f"{name} is broken"
    assert not fake.driver.launches


def test_what_cannot_be_planned_is_an_error_of_xla(device):
    fake, handler = device
    message = xla_frames.call(handler, *arguments((1, 1 << 31), 0, "float16", False, False))
    assert message == f"logits: expected at most {(1 << 31) - 1} classes, got {1 << 31}"
    fake.lacks = "cuLaunchKernelEx"
    message = xla_frames.call(handler, *arguments(*GIVEN), stage=INITIALIZE)
    assert message == "fastce.cuda: expected a driver of CUDA 12, got one without cuLaunchKernelEx"
    fake.lacks = ""
    assert xla_frames.call(handler, *arguments(*GIVEN)) is None


def test_without_a_driver_xla_is_told_so(monkeypatch):
    from fastce.cuda import driver, xla

    def missing():
        raise RuntimeError("fastce.cuda: expected a CUDA driver, found none")

    monkeypatch.setattr(driver, "_driver", missing)
    monkeypatch.setattr(driver, "device", driver.Device)
    message = xla_frames.call(xla.handler().address, *arguments(*GIVEN))
    assert message == "fastce.cuda: expected a CUDA driver, found none"


def test_many_threads_at_once(device):
    """None misses a launch, whoever makes a plan first."""
    fake, handler = device
    begin = threading.Barrier(8)

    def work(number):
        begin.wait(60)
        for k in range(60):
            given = arguments((1 + (7 * number + k) % 20, 100), 0, "float32", False, True)
            assert xla_frames.call(handler, *given, stream=1000 * number + k + 1) is None

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    rows = {
        launch.stream: struct.unpack_from("9q", launch.arguments)[_index("rows")]
        for launch in fake.driver.launches
    }
    assert rows == {1000 * n + k + 1: 1 + (7 * n + k) % 20 for n in range(8) for k in range(60)}


def test_structures_are_the_drivers(device):
    """What the handler hands to the driver is laid out as its bindings have it."""
    import ctypes

    from fastce.cuda import driver, xla
    from fastce.cuda.xla import layout

    fake, handler = device
    for given in (arguments(*SHAPES[name], "float32", False, True) for name in ("cluster", "tile")):
        xla_frames.call(handler, *given)
        plan, launch = xla._plans[-1], fake.driver.launches[-1]
        config = driver._clusters(
            launch.cluster, launch.grid, launch.block, launch.shared, 0
        )  # fmt: skip
        theirs = np.frombuffer(ctypes.string_at(config.getPtr(), 56), np.int64).copy()
        ours = plan[layout.LAUNCHES + layout.CONFIG :][:7].copy()
        if launch.cluster > 1:
            theirs_too = np.frombuffer(ctypes.string_at(int(theirs[5]), 24), np.int64)
            at = layout.LAUNCHES + layout.ATTRIBUTE
            assert (plan[at : at + 3] & [0xFFFFFFFF, -1, 0xFFFFFFFF] == theirs_too).all()
        else:
            theirs[6] &= ~0xFFFFFFFF  # attributes: none
            ours[6] &= ~0xFFFFFFFF
        theirs[5] = 0
        low = [-1, -1, -1, 0xFFFFFFFF, -1, -1, 0xFFFFFFFF]  # without what pads
        assert (theirs & low == ours & low).all()
