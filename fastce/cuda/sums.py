"""Sums over rows, in float64 and in an order that is always the same; no atomics.

Each of `parts` blocks adds up a fixed share of the rows and leaves a record; a second launch of one
block adds up the records.  A single part does the second step at once.
"""

from typing import Any

import numpy as np

from fastce.cuda import machine
from fastce.cuda.finish import BAD, SOFT, target_class
from fastce.cuda.formats import any_number, integer
from fastce.cuda.machine import barrier, block, thread

RECORD = 24  # bytes that a part leaves: two sums, and the first row with a bad target

# Arguments of the kernels: 64-bit integers, then float64.
ARGUMENTS = {
    "targets": (
        ("targets", "code", "rows", "classes", "ignore", "weight", "share", "parts", "records",
         "scales", "total", "note", "shape"),
        ("normalizer",),
    ),
    "losses": (
        ("losses", "z_terms", "rows", "share", "parts", "records", "scales", "loss"),
        ("weight", "count"),  # what to divide by, unless `scales` say
    ),
    "parts": (
        ("sums", "z_terms", "parts", "share", "parts_of_parts", "records", "scales", "loss"),
        ("weight", "count"),
    ),
    "weight": (("source", "step", "code", "count", "weight"), ()),
}  # fmt: skip

_load_f64, _store_f64 = machine.load["f64"], machine.store["f64"]
_load_f32, _store_f32 = machine.load["f32"], machine.store["f32"]
_load_i64, _store_i64 = machine.load["i64"], machine.store["i64"]
_shared_f64, _put_f64 = machine.shared_load["f64"], machine.shared_store["f64"]
_shared_i64, _put_i64 = machine.shared_load["i64"], machine.shared_store["i64"]
_NONE = np.int64(0x7FFFFFFFFFFFFFFF)


def block_sum(threads: int) -> Any:
    """Device functions: sums over a block, and over the records that blocks have left."""
    steps = tuple(threads >> k for k in range(1, 11) if threads >> k)

    @machine.device
    def total(x, y, first):
        """Sums and the least over a block, for thread 0."""
        tid = np.int64(thread())
        _put_f64(RECORD * tid, x)
        _put_f64(RECORD * tid + 8, y)
        _put_i64(RECORD * tid + 16, first)
        barrier()
        for step in steps:
            if tid < step:
                at = RECORD * tid
                other = RECORD * (tid + step)
                _put_f64(at, _shared_f64(at) + _shared_f64(other))
                _put_f64(at + 8, _shared_f64(at + 8) + _shared_f64(other + 8))
                _put_i64(at + 16, min(_shared_i64(at + 16), _shared_i64(other + 16)))
            barrier()
        return _shared_f64(0), _shared_f64(8), _shared_i64(16)

    @machine.device
    def total_of_records(records, parts):
        x = 0.0
        y = 0.0
        first = _NONE
        for part in range(np.int64(thread()), parts, threads):
            at = records + part * RECORD
            x = x + _load_f64(at)
            y = y + _load_f64(at + 8)
            first = min(first, _load_i64(at + 16))
        return total(x, y, first)

    return total, total_of_records


@machine.device
def _leave(records, part, x, y, first):
    at = records + part * RECORD
    _store_f64(at, x)
    _store_f64(at + 8, y)
    _store_i64(at + 16, first)


@machine.device
def _settle_targets(
    weight, count, bad, targets, code, classes, scales, total, note, shape, normalizer
):  # fmt: skip
    """1 / weight, 1 / count (0 for none), weight, count; a bad target is noted."""
    if total != 0:
        _store_f64(total, weight)
    if normalizer >= 0.0:
        weight = normalizer
        count = normalizer
    _store_f64(scales, 1.0 / weight if weight != 0.0 else 0.0)
    _store_f64(scales + 8, 1.0 / count if weight != 0.0 and count != 0.0 else 0.0)
    _store_f64(scales + 16, weight)
    _store_f64(scales + 24, count)
    if bad != _NONE and _load_i64(note) == 0:
        _store_i64(note + 8, bad)
        _store_i64(note + 16, integer(targets, bad, code))
        _store_i64(note + 24, classes)
        _store_i64(note + 32, shape)
        machine.publish()
        _store_i64(note, np.int64(1))


def targets_kernel(double: bool, last: bool, threads: int) -> Any:
    """Weight and number of the rows that count, and the first row with a bad target."""
    total, total_of_records = block_sum(threads)
    load_weight, size = (_load_f64, 8) if double else (_load_f32, 4)

    def kernel(
        targets, code, rows, classes, ignore, weight, share, parts, records, scales, total_weight,
        note, shape, normalizer,
    ):  # fmt: skip
        part = np.int64(block())
        if last:
            weights, count, bad = total_of_records(records, parts)
        else:
            weights = 0.0
            count = 0.0
            bad = _NONE
            start = part * share
            for row in range(start + np.int64(thread()), min(start + share, rows), threads):
                y = target_class(targets, code, row, classes, ignore)
                if y == BAD:
                    bad = min(bad, np.int64(row))
                if y >= 0 or y == SOFT:
                    w = 1.0
                    if weight != 0 and y >= 0:
                        w = np.float64(load_weight(weight + np.int64(y) * size))
                    weights = weights + w
                    count = count + 1.0
            weights, count, bad = total(weights, count, bad)
        if thread() == 0:
            if last or parts == 1:
                _settle_targets(
                    weights, count, bad, targets, code, classes, scales, total_weight, note, shape,
                    normalizer,
                )  # fmt: skip
            else:
                _leave(records, part, weights, count, bad)

    return kernel


def losses_kernel(double: bool, last: bool, threads: int, wide: bool = False) -> Any:
    """The reduced loss, from losses and z-loss terms of rows; float64 ones if `wide`."""
    total, total_of_records = block_sum(threads)
    load, size = (_load_f64, 8) if double or wide else (_load_f32, 4)
    store, real = (_store_f64, np.float64) if double else (_store_f32, np.float32)

    def kernel(losses, z_terms, rows, share, parts, records, scales, loss, weight, count):
        part = np.int64(block())
        if last:
            nll, z, _ = total_of_records(records, parts)
        else:
            nll = 0.0
            z = 0.0
            start = part * share
            for row in range(start + np.int64(thread()), min(start + share, rows), threads):
                nll = nll + np.float64(load(losses + row * size))
                if z_terms != 0:
                    z = z + np.float64(load(z_terms + row * size))
            nll, z, _ = total(nll, z, _NONE)
        if thread() == 0:
            if last or parts == 1:
                if scales != 0:
                    weight = _load_f64(scales + 16)
                    count = _load_f64(scales + 24)
                nll = nll / weight if weight != 0.0 else np.nan
                if z_terms != 0:
                    z = z / count if count != 0.0 else 0.0
                store(loss, real(nll + z))
            else:
                _leave(records, part, nll, z, _NONE)

    return kernel


def parts_kernel(double: bool, last: bool, threads: int) -> Any:
    """The reduced loss, from float64 sums of parts."""
    return losses_kernel(double, last, threads, wide=True)


def weight_kernel(double: bool, last: bool, threads: int) -> Any:
    """Class weights of any dtype and stride in the dtype that is computed with."""
    store, real, size = (_store_f64, np.float64, 8) if double else (_store_f32, np.float32, 4)

    def kernel(source, step, code, count, weight):
        j = np.int64(block()) * threads + np.int64(thread())
        if j < count:
            store(weight + j * size, real(any_number(source + j * step, code, 1.0)))

    return kernel
