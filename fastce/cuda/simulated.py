"""The names of `vector` for numba's simulator: the same arithmetic, element by element, in NumPy.

Addresses are those of host memory.  `memory` may be set to a list of (first, last) byte ranges that
a kernel is allowed to touch.
"""

import ctypes
import math
import threading
from typing import Any

import numpy as np
from numba.cuda.simulator.kernel import _get_kernel_context

SIMULATED = True
WARP = 16  # lanes; a run needs two for each class of a vector, for its edges

memory = None
_PATIENCE = 600  # seconds: threads that no longer meet are a fault of the kernel
_KINDS = {
    "f32": np.float32,
    "f64": np.float64,
    "u16": np.uint16,
    "u32": np.uint32,
    "i8": np.int8,
    "i16": np.int16,
    "i32": np.int32,
    "i64": np.int64,
    "u8": np.uint8,
}
# Of the launch: threads of a block, blocks of a cluster, bytes of shared memory of a block.  The
# blocks of a cluster are one of the simulator's blocks, which it runs one after the other.
launched = [1, 1, 0]
_blocks: dict[tuple[int, int], Any] = {}
_warps: dict[tuple[int, int], Any] = {}
_warps_lock = threading.Lock()


def _me() -> Any:
    return threading.current_thread()


def device(function):
    """Leave the function as it is: every simulated thread calls it."""
    return function


def thread():
    np.seterr(all="ignore")  # of this thread: a GPU has no warnings either
    return np.int32(_me().threadIdx.x % launched[0])


def block():
    return np.int32(_me().blockIdx.x)


def barrier():
    if launched[1] == 1:
        _get_kernel_context().syncthreads()
        return
    with _warps_lock:
        met = _blocks.setdefault(
            (id(_me()._manager), cluster_rank()), threading.Barrier(launched[0])
        )
    met.wait(timeout=_PATIENCE)


cluster = block


def cluster_size():
    return np.int32(launched[1])


def cluster_rank():
    return np.int32(_me().threadIdx.x // launched[0])


def cluster_arrive():
    pass


def cluster_wait():
    _get_kernel_context().syncthreads()


def publish():
    pass


def _bytes(address, size, aligned):
    assert address % aligned == 0, f"address {address:#x} is not a multiple of {aligned}"
    if memory is not None:
        inside = any(first <= address and address + size <= last for first, last in memory)
        assert inside, f"{size} bytes at {address:#x} lie outside every array"
    return (ctypes.c_byte * size).from_address(int(address))


def _shared_bytes(offset, size, aligned, rank=None):
    first = launched[2] * (cluster_rank() if rank is None else int(rank))
    region = _get_kernel_context().shared._dynshared[first : first + launched[2]]
    assert offset % aligned == 0, f"offset {offset} is not a multiple of {aligned}"
    assert 0 <= offset <= region.size - size, f"{size} bytes at {offset} of {region.size} shared"
    return region[offset : offset + size]


def _accessors(kind, place):
    dtype = np.dtype(_KINDS[kind])

    def load(where):
        return np.frombuffer(place(where, dtype.itemsize, dtype.itemsize), dtype)[0]

    def store(where, value):
        with np.errstate(over="ignore"):
            value = dtype.type(value)
        np.frombuffer(place(where, dtype.itemsize, dtype.itemsize), dtype)[0] = value

    return load, store


def _vector_accessors(kind, place):
    dtype = np.dtype(_KINDS[kind])
    count = 16 // dtype.itemsize

    def load(where, array, first):
        array[first : first + count] = np.frombuffer(place(where, 16, 16), dtype)

    def store(where, array, first):
        np.frombuffer(place(where, 16, 16), dtype)[:] = array[first : first + count]

    return load, store


load = {kind: _accessors(kind, _bytes)[0] for kind in _KINDS}
store = {kind: _accessors(kind, _bytes)[1] for kind in _KINDS}
shared_load = {kind: _accessors(kind, _shared_bytes)[0] for kind in _KINDS}
shared_store = {kind: _accessors(kind, _shared_bytes)[1] for kind in _KINDS}


def _remote_store(kind):
    dtype = np.dtype(_KINDS[kind])

    def store(offset, rank, value):
        assert 0 <= rank < launched[1], f"block {rank} of {launched[1]}"
        np.frombuffer(_shared_bytes(offset, 8, 8, rank), dtype)[0] = value

    return store


remote_store = {kind: _remote_store(kind) for kind in ("f64", "i64")}
_WORDS = ("f32", "f64", "u32")
load_vector = {kind: _vector_accessors(kind, _bytes)[0] for kind in _WORDS}
store_vector = {kind: _vector_accessors(kind, _bytes)[1] for kind in _WORDS}
shared_load_vector = {kind: _vector_accessors(kind, _shared_bytes)[0] for kind in _WORDS}
shared_store_vector = {kind: _vector_accessors(kind, _shared_bytes)[1] for kind in _WORDS}


def copy_async(offset, address):
    _shared_bytes(offset, 16, 16)[:] = np.frombuffer(_bytes(address, 16, 16), np.int8)


def wait_for_copies():
    pass


class _Warp:
    def __init__(self):
        # Two in turn: nobody overwrites what another has yet to read, or waits for it to leave.
        self.values = [None] * WARP, [None] * WARP
        self.barriers = threading.Barrier(WARP), threading.Barrier(WARP)
        self.turn = [0] * WARP


def exchange(value, distance):
    """Shuffle: all lanes of a warp must take part."""
    me = _me()
    with _warps_lock:
        warp = _warps.setdefault((id(me._manager), me.thread_id // WARP), _Warp())
    lane = me.thread_id % WARP
    turn = warp.turn[lane]
    warp.turn[lane] ^= 1
    warp.values[turn][lane] = value
    warp.barriers[turn].wait(timeout=_PATIENCE)
    return warp.values[turn][lane ^ distance]


def warp_barrier():
    exchange(0, 0)


def forget_warps():
    """Drop the warps of finished blocks."""
    _warps.clear()
    _blocks.clear()


def maximum(a, b):
    return np.maximum(a, b)


def minimum(a, b):
    return np.fmin(a, b)


def exponential(x, power):
    if isinstance(x, np.float32):
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            t = np.float32(np.float64(x) * 1.4426950216293335 + np.float64(power))
            e = np.exp2(t)
        return np.float32(0) if abs(e) < 2.0**-126 else e
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return np.exp(x + power * 0.6931471805599453)


def convert(x, like):
    with np.errstate(over="ignore", under="ignore"):
        return type(like)(x) if isinstance(like, np.floating) else np.float64(x)


def exclusive_or(word, other):
    return word ^ other


def as_bits(x):
    if isinstance(x, np.float32):
        return int(x.view(np.int32))
    return int(np.float64(x).view(np.int64))


def from_bits(bits):
    return np.int64(bits).view(np.float64)


def fma(a, b, c):
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c))


def power_of_two(k):
    return np.ldexp(np.float32(1), int(k)) if k > -127 else np.float32(0)


def quotient(a, b):
    return a // b


def add(a, b):
    bits = 32 if isinstance(b, np.int32) else 64
    return (int(a) + int(b) + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


def reciprocal(x):
    return 1.0 / x


def _half(kind, high):
    def widen(word):
        half = np.uint32(int(word) >> 16 if high else int(word) & 0xFFFF)
        if kind == "bfloat16":
            return np.uint32(half << np.uint32(16)).view(np.float32)
        return np.float32(np.uint16(half).view(np.float16))

    return widen


def _round(kind, x):
    if kind == "float16":
        with np.errstate(over="ignore", under="ignore"):
            return int(np.float16(x).view(np.uint16))
    if math.isnan(x):
        return 0x7FFF
    bits = int(np.float32(x).view(np.uint32))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to nearest, ties to even


def _pack(kind):
    def pack(low, high):
        return np.uint32(_round(kind, low) | _round(kind, high) << 16)

    return pack


low_half = {kind: _half(kind, False) for kind in ("bfloat16", "float16")}
high_half = {kind: _half(kind, True) for kind in ("bfloat16", "float16")}
pack_halves = {kind: _pack(kind) for kind in ("bfloat16", "float16")}


def _halves(kind, extreme):
    low, high, pack = low_half[kind], high_half[kind], pack_halves[kind]

    def of_words(a, b):
        return pack(extreme(low(a), low(b)), extreme(high(a), high(b)))

    return of_words


max_halves = {kind: _halves(kind, maximum) for kind in ("bfloat16", "float16")}
min_halves = {kind: _halves(kind, minimum) for kind in ("bfloat16", "float16")}
