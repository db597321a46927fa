"""Handlers of XLA's foreign function interface: compiled code that XLA calls with a frame.

The layout of a frame is part of XLA's stable binary interface, version 0, as its header
``xla/ffi/api/c_api.h`` has it.  All that is read here is made of 64-bit words, whose numbers are
given below; a 32-bit field is the lower half of its word.  Handlers touch no Python object, and
share their work with the threads of XLA's own pool.

What is to be done is a *job*, words on the heap: its fields, then targets, upstream gradients and
sums.  A thread of the pool that comes to help may begin when all is done and the arrays are gone;
it then finds the job closed.  Whoever leaves last frees it.  One function is both XLA's handler and
the pool's task, so that the kernels are compiled once; it knows a job by its first word, where a
frame has its size.
"""

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from fastce.cpu.foreign import across, array_at, chunks, cross_entropy
from fastce.cpu.jit import c_function, device
from fastce.cpu.memory import item_size, pointer_at
from fastce.cpu.vector import I32, I64, call_llvm

# Version of the interface; later minor ones only add to it.
MAJOR, MINOR = 0, 1

# Words of the frame; of an extension and what it points to; of a buffer; of an attribute; of the
# table of functions.
EXTENSION, API, CONTEXT, STAGE, ARGUMENTS, RESULTS, ATTRIBUTES, FRAME = 1, 2, 3, 4, 9, 14, 20, 21
EXTENSION_TYPE, METADATA, VERSION, TRAITS = 1, 3, 3, 4
DATA, RANK, DIMENSIONS = 3, 4, 5
VALUE = 1
ERROR_DESTROY, SCHEDULE, POOL_SIZE, TABLE = 8, 17, 18, 19
METADATA_EXTENSION, EXECUTE = 1, 3

# Attributes, which come sorted by their names.
LABEL_SMOOTHING, TRAILING, Z_LOSS = range(3)

# Words of a job.
(
    MARK, COUNTER, BEGUN, DONE, OWNERS, LOGITS, LABELS, UPSTREAM, LOSSES, GRADIENT, SUMS, OUTER,
    INNER, CLASSES, OUTER_STRIDE, INNER_STRIDE, CLASS_STRIDE, CHUNK, PARTS, COLUMNS, SMOOTHING,
    PENALTY, POOL, REQUEST,
) = range(24)  # fmt: skip
FIELDS = REQUEST + 5  # the longest structure that a function of XLA's takes
JOB = -1  # the mark
CLOSED = 1 << 32
# Logits from which more threads are worth waking.
SHARED = 65536
IGNORED = -1  # the target of rows that count for nothing

_YIELD = "SwitchToThread" if sys.platform == "win32" else "sched_yield"


@intrinsic
def _allocate(typingctx, size):
    """Memory from the heap."""

    def codegen(context, builder, sig, args):
        return call_llvm(builder, "malloc", I64, args[0])

    return types.int64(types.int64), codegen


@intrinsic
def _free(typingctx, address):
    """Give it back."""

    def codegen(context, builder, sig, args):
        call_llvm(builder, "free", ir.VoidType(), args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _give_way(typingctx):
    """Let another thread run."""

    def codegen(context, builder, sig, args):
        call_llvm(builder, _YIELD, I32)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _call(typingctx, function, argument):
    """Call the function at an address, which takes an address and returns one."""

    def codegen(context, builder, sig, args):
        function_type = ir.FunctionType(I64, [I64])
        return builder.call(builder.inttoptr(args[0], function_type.as_pointer()), [args[1]])

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _symbol(typingctx, name):
    """The word at the address that `binding.add_symbol` has given a name."""
    if not isinstance(name, types.StringLiteral):
        return None  # numba tries again with the literal

    def codegen(context, builder, sig, args):
        word = ir.GlobalVariable(builder.module, I64, name.literal_value)
        return builder.load(word, typ=I64)

    return types.int64(name), codegen


@intrinsic
def _add(typingctx, words, number, value):
    """Add to a word that threads share, in order with all that they do else; its value before."""

    def codegen(context, builder, sig, args):
        array = context.make_array(words)(context, builder, args[0])
        place = builder.gep(array.data, [args[1]], source_etype=I64)
        return builder.atomic_rmw("add", place, args[2], "seq_cst")

    return types.int64(words, types.int64, types.int64), codegen


@intrinsic
def _number(typingctx, word):
    """The float64 that a word holds."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), codegen


@device
def _words(address, count):
    return array_at(address, np.int64, count)


@device
def _product(words, start, stop):
    product = 1
    for k in range(start, stop):
        product *= words[k]
    return product


# XLA's functions ----------------------------------------------------------------------------------


@device
def _answer(extension):
    """Tell XLA which interface this is, if that is what it asks."""
    asked = _words(extension, METADATA + 1)
    if asked[EXTENSION_TYPE] & 0xFFFFFFFF != METADATA_EXTENSION:
        return False
    metadata = _words(asked[METADATA], TRAITS + 1)
    metadata[VERSION] = MAJOR | MINOR << 32
    metadata[TRAITS] = 0
    return True


@device
def _request(frame, job, function, size, third, fourth):
    """Call a function of XLA's on the calling context; whether it did as asked."""
    table = _words(frame[API], TABLE)
    words = _words(job, FIELDS)
    words[REQUEST] = size
    words[REQUEST + 1] = 0
    words[REQUEST + 2] = frame[CONTEXT]
    words[REQUEST + 3] = third
    words[REQUEST + 4] = fourth
    error = _call(table[function], job + 8 * REQUEST)
    if error != 0:
        words[REQUEST] = 24
        words[REQUEST + 2] = error
        _call(table[ERROR_DESTROY], job + 8 * REQUEST)
    return error == 0


@device
def _call_help(frame, job, task):
    """Give the pool as many tasks as threads of it may help."""
    words = _words(job, FIELDS)
    words[OWNERS] = 1
    if words[OUTER] * words[INNER] * words[CLASSES] < SHARED:
        return
    if _words(frame[API], 1)[0] < 8 * TABLE:
        return
    words[POOL] = 0
    if not _request(frame, job, POOL_SIZE, 32, job + 8 * POOL, 0):
        return
    helpers = max(0, min(words[PARTS], words[POOL]) - 1)
    words[OWNERS] = 1 + helpers
    for _ in range(helpers):
        if not _request(frame, job, SCHEDULE, 40, task, job):
            _leave(job)


# Jobs ---------------------------------------------------------------------------------------------


@device
def _prepare(address, kind, label_kind, upstream_kind):
    """A job made of a frame, or 0 if there is nothing to do."""
    frame = _words(address, FRAME)
    operands = _words(frame[ARGUMENTS], 3)
    results = _words(frame[RESULTS], 2)
    attributes = _words(frame[ATTRIBUTES], 3)
    logits = _words(operands[0], DIMENSIONS + 1)
    dimensions = _words(logits[DIMENSIONS], logits[RANK])
    axis = logits[RANK] - 1 - _attribute(attributes, TRAILING)
    outer = _product(dimensions, 0, axis)
    classes = dimensions[axis]
    inner = _product(dimensions, axis + 1, logits[RANK])
    rows = outer * inner
    if frame[STAGE] & 0xFFFFFFFF != EXECUTE or rows == 0:
        return 0
    base = pointer_at(logits[DATA], kind)
    size = item_size(base)
    outer_stride, inner_stride, class_stride = classes * inner * size, size, inner * size
    if inner == 1:
        outer, inner, outer_stride, inner_stride = 1, rows, 0, classes * size
    columns = across(base, classes, class_stride, None, 0, None, 0)
    chunk, parts = chunks(base, outer, inner, classes, columns)
    job = _allocate(8 * (FIELDS + 2 * rows + 2 * parts))
    words = _words(job, FIELDS)
    words[MARK] = JOB
    words[COUNTER] = 0
    words[BEGUN] = 0
    words[DONE] = 0
    words[LOGITS] = logits[DATA]
    words[LABELS] = _words(operands[1], DATA + 1)[DATA]
    words[UPSTREAM] = job + 8 * (FIELDS + rows)
    words[SUMS] = job + 8 * (FIELDS + 2 * rows)
    words[LOSSES] = _words(results[0], DATA + 1)[DATA]
    words[OUTER] = outer
    words[INNER] = inner
    words[CLASSES] = classes
    words[OUTER_STRIDE] = outer_stride
    words[INNER_STRIDE] = inner_stride
    words[CLASS_STRIDE] = class_stride
    words[CHUNK] = chunk
    words[PARTS] = parts
    words[COLUMNS] = columns
    words[SMOOTHING] = _attribute(attributes, LABEL_SMOOTHING)
    words[PENALTY] = _attribute(attributes, Z_LOSS)
    upstream = array_at(words[UPSTREAM], np.float64, rows)
    if upstream_kind is not None:
        words[GRADIENT] = _words(results[1], DATA + 1)[DATA]
        given = array_at(_words(operands[2], DATA + 1)[DATA], upstream_kind, rows)
        for i in range(rows):
            upstream[i] = given[i]
    if label_kind is not None:
        labels = array_at(words[LABELS], label_kind, rows)
        words[LABELS] = job + 8 * FIELDS
        targets = _words(words[LABELS], rows)
        for i in range(rows):
            targets[i] = labels[i]
            if _bad(labels[i], words):
                targets[i] = 0
                upstream[i] = np.nan
    return job


@device
def _finish(address, job, label_kind, loss_kind):
    """NaN where the target is no class: XLA has no exceptions that would come at the call."""
    if label_kind is not None:
        words = _words(job, FIELDS)
        rows = words[OUTER] * words[INNER]
        frame = _words(address, FRAME)
        labels = _words(_words(frame[ARGUMENTS], 2)[1], DATA + 1)[DATA]
        targets = array_at(labels, label_kind, rows)
        losses = array_at(words[LOSSES], loss_kind, rows)
        for i in range(rows):
            if _bad(targets[i], words):
                losses[i] = np.nan


@device
def _leave(job):
    """Give up one's share of a job."""
    if _add(_words(job, FIELDS), OWNERS, -1) == 1:
        _free(job)


@device
def _attribute(attributes, number):
    """The bits of an attribute, one word."""
    return _words(_words(attributes[number], VALUE + 1)[VALUE], 1)[0]


@device
def _bad(y, words):
    return (y < 0 or y >= words[CLASSES]) and y != IGNORED


class Handler:
    """One compiled handler, whose `address` is for XLA; it must live as long as XLA may call it.

    The operands are logits, labels (int32 classes, or probabilities typed like the logits) and,
    with a gradient, an upstream gradient for each row; the results are losses and the gradient.
    16-bit floats go by the types of their bits, as in `memory`.
    """

    def __init__(self, kind: type[np.generic], soft: bool, with_grad: bool) -> None:
        name = f"fastce.xla.{kind.__name__}.{'soft' if soft else 'hard'}.{with_grad}"
        self._itself = ctypes.c_int64()  # where the handler finds its own address
        binding.add_symbol(name, ctypes.addressof(self._itself))
        handle = _handler(name, kind, soft, with_grad)
        handle.__qualname__ = name  # what the cache knows it by
        self._compiled = c_function(handle, types.int64(types.int64))
        self.address = self._itself.value = int(self._compiled.address)


def _handler(name: str, kind: type[np.generic], soft: bool, with_grad: bool) -> Callable[..., Any]:
    """The body of a handler; what a kind lacks is None and compiled away."""
    loss_kind = np.float64 if kind is np.float64 else np.float32
    label_kind, target_kind = (None, None) if soft else (np.int32, np.int64)
    soft_kind = kind if soft else None
    gradient_kind = kind if with_grad else None
    given_kind, upstream_kind = (loss_kind, np.float64) if with_grad else (None, None)

    def handle(address):
        job = address
        helping = _words(address, 1)[MARK] == JOB
        if not helping:
            frame = _words(address, FRAME)
            if frame[EXTENSION] != 0 and _answer(frame[EXTENSION]):
                return 0
            job = _prepare(address, kind, label_kind, given_kind)
            if job == 0:
                return 0
            _call_help(frame, job, _symbol(name))
        words = _words(job, FIELDS)
        if helping and _add(words, BEGUN, 1) >= CLOSED:
            _leave(job)
            return 0
        outer, inner, classes, parts = words[OUTER], words[INNER], words[CLASSES], words[PARTS]
        strides = (words[OUTER_STRIDE], words[INNER_STRIDE], words[CLASS_STRIDE])
        cross_entropy(
            pointer_at(words[LOGITS], kind), array_at(words[LABELS], target_kind, outer * inner),
            pointer_at(words[LABELS], soft_kind), None, None,
            array_at(words[UPSTREAM], upstream_kind, outer * inner),
            array_at(words[LOSSES], loss_kind, outer * inner),
            pointer_at(words[GRADIENT], gradient_kind),
            1.0, IGNORED, _number(words[SMOOTHING]), _number(words[PENALTY]), None,
            outer, inner, classes, strides, strides, strides, words[COLUMNS] != 0, words[CHUNK],
            array_at(words[SUMS], np.float64, 2 * parts).reshape((parts, 2)),
            _words(job + 8 * COUNTER, 1),
        )  # fmt: skip
        if helping:
            _add(words, DONE, 1)
        else:
            begun = _add(words, BEGUN, CLOSED)
            while _add(words, DONE, 0) < begun:
                _give_way()
            _finish(address, job, label_kind, loss_kind)
        _leave(job)
        return 0

    return handle
