"""The handler of XLA's foreign function interface for CUDA devices: it launches prepared kernels.

It is compiled for the CPU like the others, and one of it serves all dtypes, options and devices.
XLA calls it with the addresses of arrays and a stream.  For each kind of call (device, dtypes,
sizes, options, alignment) there is a *plan*, words in memory: functions of the driver, and for each
launch the kernel, the shape of the grid and the kernel's arguments, with addresses relative to the
arrays.  All that is left to do is to add addresses and to call the driver; no Python is involved.

Plans are made by a function of the caller's when first needed (`fastce.cuda.xla`).  XLA asks for
that before it runs a program, in the stage of initialisation, so that no kernel has to be loaded
while a CUDA graph is recorded.  They form a list that only grows, at its head, so that threads read
it without a lock.
"""

import ctypes
from collections.abc import Callable

from llvmlite import binding
from numba import types

from fastce.cpu import ffi
from fastce.cpu.jit import c_function, device

# Words of a call: what kind it is,
ORDINAL, DTYPE, LABELS, WITH_GRAD, OUTER, CLASSES, INNER, SMOOTHING, PENALTY, ALIGNMENT = range(10)
KIND = 10
# the addresses of logits, labels, upstream gradient, losses and gradient, the stream, a status of
# the driver's, the text of an error; structures for XLA and the driver; the launch at hand.
ADDRESSES, ARRAYS = KIND, 5
STREAM, STATUS, MESSAGE, REQUEST, EXTRA, SIZE, COPY = 15, 16, 17, 18, 23, 28, 29

# Words of a plan: the next one, the kind of its calls; functions of the driver and the context that
# they need; the place of each array among the kernels' arguments, or -1; bytes of these; launches.
NEXT, KIND_OF, PUSH, POP, LAUNCH, CONTEXT, PLACES, SIZE_OF, COUNT, LAUNCHES = (
    0, 1, 11, 12, 13, 14, 15, 20, 21, 22
)  # fmt: skip

# Words of a launch: the kernel's handle; the structure that the driver takes (CUlaunchConfig), with
# the stream and the address of its attributes; the only attribute (CUlaunchAttribute); arguments.
KERNEL, CONFIG, CONFIG_STREAM, CONFIG_ATTRIBUTES, ATTRIBUTE, VALUES = 0, 1, 5, 6, 8, 17
MOST_VALUES = 40
WORDS = VALUES + MOST_VALUES
CALL = COPY + WORDS

# Words that the handler finds by a symbol: the first plan, the function that makes plans.
FIRST, PLANNER = 0, 1
_SYMBOL = "fastce.xla.cuda"

_BUFFER_POINTER, _BUFFER_SIZE, _END = 1, 2, 0  # CU_LAUNCH_PARAM_...
_INTERNAL = 13  # XLA_FFI_Error_Code_...


@device
def _describe(frame, call):
    """What kind of call it is, its addresses and stream; XLA's error, or 0."""
    words = ffi.words(call, CALL)
    error = ffi.ask(frame, call + 8 * REQUEST, ffi.STREAM, 32, 0, 0)
    if error != 0:
        return error
    words[STREAM] = words[REQUEST + 3]
    error = ffi.ask(frame, call + 8 * REQUEST, ffi.ORDINAL, 28, 0, 0)
    if error != 0:
        return error
    words[ORDINAL] = words[REQUEST + 3] & ffi.LOWER_HALF
    operands, results = frame[ffi.ARGUMENTS], frame[ffi.RESULTS]
    logits, labels = ffi.buffer(operands, 0), ffi.buffer(operands, 1)
    words[ADDRESSES] = logits[ffi.DATA]
    words[ADDRESSES + 1] = labels[ffi.DATA]
    words[ADDRESSES + 2] = 0
    words[ADDRESSES + 3] = ffi.buffer(results, 0)[ffi.DATA]
    words[ADDRESSES + 4] = 0
    words[WITH_GRAD] = frame[ffi.COUNT] == 3
    if words[WITH_GRAD]:
        words[ADDRESSES + 2] = ffi.buffer(operands, 2)[ffi.DATA]
        words[ADDRESSES + 4] = ffi.buffer(results, 1)[ffi.DATA]
    words[DTYPE] = logits[ffi.DTYPE] & ffi.LOWER_HALF
    words[LABELS] = labels[ffi.DTYPE] & ffi.LOWER_HALF
    words[OUTER], words[CLASSES], words[INNER] = ffi.sizes(frame)
    words[SMOOTHING] = ffi.attribute(frame, ffi.LABEL_SMOOTHING)
    words[PENALTY] = ffi.attribute(frame, ffi.Z_LOSS)
    words[ALIGNMENT] = (words[ADDRESSES] & 15) | (words[ADDRESSES + 4] & 15) << 4
    return 0


@device
def _find(table, call):
    """The plan for a call, or 0."""
    wanted = ffi.words(call, KIND)
    at = ffi.add(table, FIRST, 0)
    while at != 0:
        plan = ffi.words(at, LAUNCHES)
        same = True
        for k in range(KIND):
            same &= plan[KIND_OF + k] == wanted[k]
        if same:
            break
        at = plan[NEXT]
    return at


@device
def _make(table, call):
    """A new plan for a call, now in the list; or 0, and then the call has a message."""
    at = ffi.call(table[PLANNER], (call,))
    if at != 0:
        plan = ffi.words(at, LAUNCHES)
        while True:
            plan[NEXT] = ffi.add(table, FIRST, 0)
            if ffi.exchange(table, FIRST, plan[NEXT], at):
                break
    return at


@device
def _launch(at, call):
    """Queue the launches of a plan; the driver's status, 0 if all is well."""
    plan = ffi.words(at, LAUNCHES)
    words = ffi.words(call, CALL)
    status = ffi.call(plan[PUSH], (plan[CONTEXT],)) & ffi.LOWER_HALF
    if status != 0:
        return status
    copy = call + 8 * COPY
    launch = ffi.words(copy, WORDS)
    words[SIZE] = plan[SIZE_OF]
    words[EXTRA] = _BUFFER_POINTER
    words[EXTRA + 1] = copy + 8 * VALUES
    words[EXTRA + 2] = _BUFFER_SIZE
    words[EXTRA + 3] = call + 8 * SIZE
    words[EXTRA + 4] = _END
    for k in range(plan[COUNT]):
        prepared = ffi.words(at + 8 * (LAUNCHES + k * WORDS), WORDS)
        for i in range(WORDS):
            launch[i] = prepared[i]
        launch[CONFIG_STREAM] = words[STREAM]
        launch[CONFIG_ATTRIBUTES] = copy + 8 * ATTRIBUTE
        for i in range(ARRAYS):
            if plan[PLACES + i] >= 0:
                launch[VALUES + plan[PLACES + i]] += words[ADDRESSES + i]
        arguments = (copy + 8 * CONFIG, launch[KERNEL], 0, call + 8 * EXTRA)
        status = ffi.call(plan[LAUNCH], arguments) & ffi.LOWER_HALF
        if status != 0:
            break
    popped = ffi.call(plan[POP], (call + 8 * REQUEST,)) & ffi.LOWER_HALF
    return popped if status == 0 else status


@device
def _error(frame, call):
    """An error of XLA's with the message of a call."""
    words = ffi.words(call, CALL)
    words[REQUEST] = 28
    words[REQUEST + 1] = 0
    words[REQUEST + 2] = words[MESSAGE]
    words[REQUEST + 3] = _INTERNAL
    return ffi.call(ffi.function(frame, ffi.ERROR_CREATE), (call + 8 * REQUEST,))


def handle(address):
    """Serve a call of XLA's, whose frame is at an address: its error, or 0."""
    frame = ffi.words(address, ffi.FRAME)
    if frame[ffi.EXTENSION] != 0 and ffi.answer(frame[ffi.EXTENSION], ffi.RECORDABLE):
        return 0
    stage = frame[ffi.STAGE] & ffi.LOWER_HALF
    if stage != ffi.INITIALIZE and stage != ffi.EXECUTE:
        return 0
    table = ffi.words(ffi.symbol(_SYMBOL), PLANNER + 1)
    call = ffi.allocate(8 * CALL)
    words = ffi.words(call, CALL)
    words[STATUS] = 0
    error = _describe(frame, call)
    if error == 0:
        plan = _find(table, call)
        if plan == 0:
            plan = _make(table, call)
        if plan != 0 and stage == ffi.EXECUTE:
            words[STATUS] = _launch(plan, call)
            if words[STATUS] != 0:
                plan = ffi.call(table[PLANNER], (call,))  # which puts it into words
        if plan == 0:
            error = _error(frame, call)
    ffi.free(call)
    return error


class Handler:
    """The compiled handler, whose `address` is for XLA; it must live as long as XLA may call it.

    `planner` is a function of the address of a call: it gives the address of a plan that is in no
    list yet and is never given back; or 0, and the address of a text in the call's MESSAGE. A call
    whose STATUS is not 0 has failed and needs the text only.
    """

    def __init__(self, planner: Callable[[int], int]) -> None:
        self._planner = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(planner)
        self._table = (ctypes.c_int64 * 2)()
        self._table[PLANNER] = ctypes.cast(self._planner, ctypes.c_void_p).value or 0
        self._symbol = ctypes.c_int64(ctypes.addressof(self._table))
        binding.add_symbol(_SYMBOL, ctypes.addressof(self._symbol))
        self._compiled = c_function(handle, types.int64(types.int64))
        self.address = int(self._compiled.address)
