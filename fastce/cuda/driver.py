"""Devices, as the CUDA driver shows them: their limits, loaded kernels, launches.

A launch takes plain integers and floats, packed into one buffer: no array is looked at, no type
inferred, and nothing waits for the device.
"""

import contextlib
import ctypes
import functools
import queue
import struct
import threading
from collections.abc import Iterator
from typing import Any

from fastce.cuda.kernels import Kernel, code, source
from fastce.cuda.plan import Launch, Limits, Variant, choose, most_of_a_cluster

_BUFFER_POINTER, _BUFFER_SIZE, _END = 1, 2, 0  # CU_LAUNCH_PARAM_...
_CUDA_12 = 12_000
OLDEST = (8, 0)  # the first with maxima that keep NaN, of pairs of 16-bit floats too
NOTE_WORDS = 5  # whether there is a bad target; its row, value; the classes; what call it was of


class Device:
    """One device, by its number."""

    def __init__(self, ordinal: int) -> None:
        driver = _driver()
        attribute = driver.CUdevice_attribute
        self.ordinal = ordinal
        handle = _checked(driver.cuDeviceGet(ordinal))

        def read(name: str) -> int:
            which = getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
            return int(_checked(driver.cuDeviceGetAttribute(which, handle)))

        self.capability = (read("COMPUTE_CAPABILITY_MAJOR"), read("COMPUTE_CAPABILITY_MINOR"))
        if self.capability < OLDEST:
            raise RuntimeError(
                "fastce.cuda: expected a device of compute capability 8.0 or later, got "
                "{}.{}".format(*self.capability)
            )
        self.limits = Limits(
            read("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"), read("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR"),
            read("MULTIPROCESSOR_COUNT"), most_of_a_cluster(self.capability),
        )  # fmt: skip
        self._context = _checked(driver.cuDevicePrimaryCtxRetain(handle))
        self._waiting: queue.SimpleQueue[tuple[Any, Any]] | None = None
        self._functions: dict[Kernel, tuple[Any, int, struct.Struct]] = {}
        self._roomy: set[Launch] = set()  # with clusters that the device has room for
        # Host memory that kernels write to and the host looks at without waiting for them.
        flags = driver.CU_MEMHOSTALLOC_PORTABLE | driver.CU_MEMHOSTALLOC_DEVICEMAP
        with self:
            self.note_address = int(_checked(driver.cuMemHostAlloc(8 * NOTE_WORDS, flags)))
        self.note = (ctypes.c_int64 * NOTE_WORDS).from_address(self.note_address)
        self.note[0] = 0

    def __enter__(self) -> None:
        driver = _driver()
        _checked(driver.cuCtxPushCurrent(self._context))

    def __exit__(self, *exception: object) -> None:
        _checked(_driver().cuCtxPopCurrent())

    def synchronize(self) -> None:
        """Wait for all that has been launched."""
        with self:
            _checked(_driver().cuCtxSynchronize())

    @functools.cached_property
    def stream(self) -> int:
        """A stream of its own, for arrays whose library does not say which one it works on.

        The default stream will not do: memory is given back in the order of this one from threads
        that need not have a context, without which a default stream means nothing.
        """
        driver = _driver()
        with self:
            return int(
                _checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
            )

    def order(self, first: int, then: int) -> None:
        """What a stream does from now on comes after all that another has been given so far."""
        driver = _driver()
        with self:
            event = self._recorded(first)
            _checked(driver.cuStreamWaitEvent(then, event, 0))
            _checked(driver.cuEventDestroy(event))

    def keep(self, value: Any, stream: int) -> None:
        """Hold on to a value until all that a stream has been given so far is done."""
        with self:
            event = self._recorded(stream)
        if self._waiting is None:
            self._waiting = queue.SimpleQueue()
            threading.Thread(
                target=self._release, args=(self._waiting,), name="fastce-cuda", daemon=True
            ).start()
        self._waiting.put((event, value))

    def _release(self, waiting: "queue.SimpleQueue[tuple[Any, Any]]") -> None:
        """Let go of each value when its event has come: what a thread of its own waits for.

        Errors of kernels are reported to those who synchronize.
        """
        driver = _driver()
        while True:
            event, value = waiting.get()
            with self:
                driver.cuEventSynchronize(event)
                driver.cuEventDestroy(event)
            del event, value

    def _recorded(self, stream: int) -> Any:
        driver = _driver()
        flags = driver.CUevent_flags
        event = _checked(driver.cuEventCreate(
            flags.CU_EVENT_DISABLE_TIMING | flags.CU_EVENT_BLOCKING_SYNC
        ))  # fmt: skip
        _checked(driver.cuEventRecord(event, stream))
        return event

    def load(self, kernel: Kernel) -> tuple[Any, int, struct.Struct]:
        """A kernel's handle, the threads of its blocks, and how its arguments are packed."""
        driver = _driver()
        made, of = code(kernel, self.capability), source(kernel)
        with self:
            module = _checked(driver.cuModuleLoadData(made.cubin))
            function = _checked(driver.cuModuleGetFunction(module, made.name.encode()))
            # What must be asked for: more than 48 KiB of shared memory, more than eight blocks in
            # a cluster; and all of the memory that the cache shares with it for two large blocks.
            attribute = driver.CUfunction_attribute
            wanted = {attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: self.limits.block}
            if isinstance(kernel, Variant) and kernel.clustered:
                wanted[attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED] = 1
            if isinstance(kernel, Variant) and kernel.beyond == "shared":
                wanted[attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT] = 100
            for which, value in wanted.items():
                _checked(driver.cuFuncSetAttribute(function, which, value))
        entry = (function, of.block, struct.Struct(f"{of.integers}q{of.floats}d"))
        self._functions[kernel] = entry
        return entry

    # For compiled code that launches kernels itself.

    @property
    def context(self) -> int:
        """The handle of the device's primary context."""
        return int(self._context)

    def function(self, kernel: Kernel) -> int:
        """The handle of a kernel in that context."""
        return int((self._functions.get(kernel) or self.load(kernel))[0])

    def entry(self, name: str) -> int:
        """The address of a function of the driver's, as CUDA 12.0 has it."""
        address = _checked(_driver().cuGetProcAddress(name.encode(), _CUDA_12, 0))
        if not address:
            raise RuntimeError(f"fastce.cuda: expected a driver of CUDA 12, got one without {name}")
        return int(address)

    def failure(self, status: int) -> RuntimeError:
        """The error that a number of the driver's stands for."""
        return _failure(_driver().CUresult(status))

    @contextlib.contextmanager
    def while_recording(self) -> Iterator[None]:
        """Let this thread load kernels even where it records a graph."""
        driver = _driver()
        relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        mode = _checked(driver.cuThreadExchangeStreamCaptureMode(relaxed))
        try:
            yield
        finally:
            _checked(driver.cuThreadExchangeStreamCaptureMode(mode))

    def launch(
        self, kernel: Kernel, grid: int, shared: int, stream: int,
        integers: tuple[int, ...], floats: tuple[float, ...] = (), cluster: int = 1,
    ) -> None:  # fmt: skip
        """Queue a kernel on a stream, a handle as an integer; `cluster` blocks in each cluster."""
        function, block, packing = self._functions.get(kernel) or self.load(kernel)
        packed = ctypes.create_string_buffer(packing.pack(*integers, *floats), packing.size)
        size = ctypes.c_size_t(packing.size)
        extra = (ctypes.c_void_p * 5)(
            _BUFFER_POINTER, ctypes.addressof(packed), _BUFFER_SIZE, ctypes.addressof(size), _END
        )
        driver, last = _driver(), ctypes.addressof(extra)
        with self:
            if cluster == 1:
                done = driver.cuLaunchKernel(
                    function, grid, 1, 1, block, 1, 1, shared, stream, 0, last
                )
            else:
                config = _clusters(cluster, grid, block, shared, stream)
                done = driver.cuLaunchKernelEx(config, function, 0, last)
            _checked(done)

    def possible(self, *rows: Any, **options: Any) -> Launch:
        """The launch that the table has for rows, as far as there is room for its clusters.

        The blocks of one must find room in one part of the device, and how many do may differ from
        device to device and with what of it is shared out.
        """
        while True:
            chosen = choose(*rows, limits=self.limits, **options)
            if chosen.cluster == 1 or chosen._replace(grid=0) in self._roomy:
                return chosen
            function, block, _ = self._functions.get(chosen.kernel) or self.load(chosen.kernel)
            config = _clusters(chosen.cluster, chosen.cluster, block, chosen.shared, 0)
            with self:
                at_once = _checked(_driver().cuOccupancyMaxActiveClusters(function, config))
            if at_once:
                self._roomy.add(chosen._replace(grid=0))
            else:
                self.limits = self.limits._replace(cluster=self.limits.cluster // 2)


def _clusters(cluster: int, grid: int, block: int, shared: int, stream: int) -> Any:
    """How to launch blocks in clusters."""
    driver = _driver()
    shape = driver.CUlaunchAttribute()
    shape.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    of = shape.value.clusterDim
    of.x, of.y, of.z = cluster, 1, 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
    config.sharedMemBytes, config.hStream = shared, driver.CUstream(stream)
    config.attrs, config.numAttrs = [shape], 1
    return config


@functools.cache
def device(ordinal: int) -> Device:
    """The device of a number."""
    return Device(ordinal)


@functools.cache
def _driver() -> Any:
    """The bindings of the driver, initialised."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise ImportError(
            "fastce.cuda: expected the packages of the extra fastce[cuda], or fastce[cuda12] for a "
            f"driver of CUDA 12: {error}"
        ) from error
    try:
        status = driver.cuInit(0)[0]
    except RuntimeError as error:  # there is no library to load
        raise RuntimeError(f"fastce.cuda: expected a CUDA driver, found none: {error}") from error
    if status:
        raise RuntimeError(
            f"fastce.cuda: expected a CUDA device, got {status.name} from the driver"
        )
    return driver


def _checked(result: tuple[Any, ...]) -> Any:
    """The value that a call of the driver returns, or its error raised."""
    status, *values = result
    if status:
        raise _failure(status)
    return values[0] if values else None


def _failure(status: Any) -> RuntimeError:
    return RuntimeError(f"fastce.cuda: {status.name} from the CUDA driver")
