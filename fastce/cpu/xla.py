"""Handlers of XLA's foreign function interface on CPUs: compiled code that XLA calls with a frame.

Handlers touch no Python object, and share their work with the threads of XLA's own pool.

What is to be done is a *job*, words on the heap: its fields, then targets, upstream gradients and
sums.  A thread of the pool that comes to help may begin when all is done and the arrays are gone;
it then finds the job closed.  Whoever leaves last frees it.  One function is both XLA's handler and
the pool's task, so that the kernels are compiled once; it knows a job by its first word, where a
frame has its size.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from fastce.cpu import ffi
from fastce.cpu.foreign import across, chunks, cross_entropy
from fastce.cpu.jit import c_function, device
from fastce.cpu.memory import array_at, item_size, pointer_at

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


@intrinsic
def _number(typingctx, word):
    """The float64 that a word holds."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), codegen


# XLA's functions ----------------------------------------------------------------------------------


@device
def _request(frame, job, function, size, third, fourth):
    """Call a function of XLA's; whether it did as asked."""
    error = ffi.ask(frame, job + 8 * REQUEST, function, size, third, fourth)
    if error != 0:
        words = ffi.words(job, FIELDS)
        words[REQUEST] = 24
        words[REQUEST + 2] = error
        ffi.call(
            ffi.words(frame[ffi.API], ffi.ERROR_DESTROY + 1)[ffi.ERROR_DESTROY],
            (job + 8 * REQUEST,),
        )
    return error == 0


@device
def _call_help(frame, job, task):
    """Give the pool as many tasks as threads of it may help."""
    words = ffi.words(job, FIELDS)
    words[OWNERS] = 1
    if words[OUTER] * words[INNER] * words[CLASSES] < SHARED:
        return
    if ffi.words(frame[ffi.API], 1)[0] <= 8 * ffi.POOL_SIZE:
        return
    words[POOL] = 0
    if not _request(frame, job, ffi.POOL_SIZE, 32, job + 8 * POOL, 0):
        return
    helpers = max(0, min(words[PARTS], words[POOL]) - 1)
    words[OWNERS] = 1 + helpers
    for _ in range(helpers):
        if not _request(frame, job, ffi.SCHEDULE, 40, task, job):
            _leave(job)


# Jobs ---------------------------------------------------------------------------------------------


@device
def _prepare(address, kind, label_kind, upstream_kind):
    """A job made of a frame, or 0 if there is nothing to do."""
    frame = ffi.words(address, ffi.FRAME)
    outer, classes, inner = ffi.sizes(frame)
    rows = outer * inner
    logits = ffi.buffer(frame[ffi.ARGUMENTS], 0)[ffi.DATA]
    if frame[ffi.STAGE] & ffi.LOWER_HALF != ffi.EXECUTE or rows == 0:
        return 0
    base = pointer_at(logits, kind)
    size = item_size(base)
    outer_stride, inner_stride, class_stride = classes * inner * size, size, inner * size
    if inner == 1:
        outer, inner, outer_stride, inner_stride = 1, rows, 0, classes * size
    columns = across(base, classes, class_stride, None, 0, None, 0)
    chunk, parts = chunks(base, outer, inner, classes, columns)
    job = ffi.allocate(8 * (FIELDS + 2 * rows + 2 * parts))
    words = ffi.words(job, FIELDS)
    words[MARK] = JOB
    words[COUNTER] = 0
    words[BEGUN] = 0
    words[DONE] = 0
    words[LOGITS] = logits
    words[LABELS] = ffi.buffer(frame[ffi.ARGUMENTS], 1)[ffi.DATA]
    words[UPSTREAM] = job + 8 * (FIELDS + rows)
    words[SUMS] = job + 8 * (FIELDS + 2 * rows)
    words[LOSSES] = ffi.buffer(frame[ffi.RESULTS], 0)[ffi.DATA]
    words[OUTER] = outer
    words[INNER] = inner
    words[CLASSES] = classes
    words[OUTER_STRIDE] = outer_stride
    words[INNER_STRIDE] = inner_stride
    words[CLASS_STRIDE] = class_stride
    words[CHUNK] = chunk
    words[PARTS] = parts
    words[COLUMNS] = columns
    words[SMOOTHING] = ffi.attribute(frame, ffi.LABEL_SMOOTHING)
    words[PENALTY] = ffi.attribute(frame, ffi.Z_LOSS)
    upstream = array_at(words[UPSTREAM], np.float64, rows)
    if upstream_kind is not None:
        words[GRADIENT] = ffi.buffer(frame[ffi.RESULTS], 1)[ffi.DATA]
        given = array_at(ffi.buffer(frame[ffi.ARGUMENTS], 2)[ffi.DATA], upstream_kind, rows)
        for i in range(rows):
            upstream[i] = given[i]
    if label_kind is not None:
        labels = array_at(words[LABELS], label_kind, rows)
        words[LABELS] = job + 8 * FIELDS
        targets = ffi.words(words[LABELS], rows)
        for i in range(rows):
            y = labels[i]  # once: the caller's own array may lie there
            targets[i] = y
            if _bad(y, words):
                targets[i] = 0
                upstream[i] = np.nan
    return job


@device
def _finish(address, job, label_kind, loss_kind):
    """NaN where the target is no class: XLA has no exceptions that would come at the call."""
    if label_kind is not None:
        words = ffi.words(job, FIELDS)
        rows = words[OUTER] * words[INNER]
        frame = ffi.words(address, ffi.FRAME)
        labels = ffi.buffer(frame[ffi.ARGUMENTS], 1)[ffi.DATA]
        targets = array_at(labels, label_kind, rows)
        losses = array_at(words[LOSSES], loss_kind, rows)
        for i in range(rows):
            if _bad(targets[i], words):
                losses[i] = np.nan


@device
def _leave(job):
    """Give up one's share of a job."""
    if ffi.add(ffi.words(job, FIELDS), OWNERS, -1) == 1:
        ffi.free(job)


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
        helping = ffi.words(address, 1)[MARK] == JOB
        if not helping:
            frame = ffi.words(address, ffi.FRAME)
            if frame[ffi.EXTENSION] != 0 and ffi.answer(frame[ffi.EXTENSION], 0):
                return 0
            job = _prepare(address, kind, label_kind, given_kind)
            if job == 0:
                return 0
            _call_help(frame, job, ffi.symbol(name))
        words = ffi.words(job, FIELDS)
        if helping and ffi.add(words, BEGUN, 1) >= CLOSED:
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
            ffi.words(job + 8 * COUNTER, 1),
        )  # fmt: skip
        if helping:
            ffi.add(words, DONE, 1)
        else:
            begun = ffi.add(words, BEGUN, CLOSED)
            while ffi.add(words, DONE, 0) < begun:
                ffi.give_way()
            _finish(address, job, label_kind, loss_kind)
        _leave(job)
        return 0

    return handle
