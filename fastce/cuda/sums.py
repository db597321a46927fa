"""Sums over rows, in float64 and in an order that is always the same; no atomics.

Each of `parts` blocks adds up a fixed share of the rows and leaves a record; the last step, one
block more, adds up the records.  With a single part it leaves the final numbers at once.
"""

from typing import Any

import numpy as np

from fastce.cuda import machine
from fastce.cuda.finish import COUNTS, BAD, label, target_of_row
from fastce.cuda.machine import barrier, block, thread

RECORD = 32  # bytes that a part leaves: two sums, and the first row with a bad target or -1

_load_f64, _store_f64 = machine.load["f64"], machine.store["f64"]
_load_f32, _store_f32 = machine.load["f32"], machine.store["f32"]
_load_i64, _store_i64 = machine.load["i64"], machine.store["i64"]
_shared_f64, _put_f64 = machine.shared_load["f64"], machine.shared_store["f64"]
_shared_i64, _put_i64 = machine.shared_load["i64"], machine.shared_store["i64"]
_NONE = 0x7FFFFFFFFFFFFFFF


def _block_sum(threads: int) -> Any:
    steps = tuple(threads >> k for k in range(1, 11) if threads >> k)

    @machine.device
    def total(x, y, first):
        """Sums and the least over a block, for thread 0."""
        tid = thread()
        _put_f64(24 * tid, x)
        _put_f64(24 * tid + 8, y)
        _put_i64(24 * tid + 16, first)
        barrier()
        for step in steps:
            if tid < step:
                other = 24 * (tid + step)
                _put_f64(24 * tid, _shared_f64(24 * tid) + _shared_f64(other))
                _put_f64(24 * tid + 8, _shared_f64(24 * tid + 8) + _shared_f64(other + 8))
                _put_i64(24 * tid + 16, min(_shared_i64(24 * tid + 16), _shared_i64(other + 16)))
            barrier()
        return _shared_f64(0), _shared_f64(8), _shared_i64(16)

    return total


def mass_kernel(threads: int) -> Any:
    """Per part: weight and number of the rows that count, and the first row with a bad target."""
    total = _block_sum(threads)

    def kernel(targets, code, rows, classes, ignore, weight, weight_code, share, records):
        weights = 0.0
        count = 0.0
        bad = np.int64(_NONE)
        start = block() * share
        for row in range(start + thread(), min(start + share, rows), threads):
            y, state = target_of_row(targets, code, row, classes, ignore)
            if state == BAD:
                bad = min(bad, np.int64(row))
            if state == COUNTS:
                w = 1.0
                if weight != 0:
                    w = label(0, 0, 0, weight, weight_code, y, 0.0, 1.0, w)
                weights = weights + w
                count = count + 1.0
        weights, count, bad = total(weights, count, bad)
        if thread() == 0:
            to = records + block() * RECORD
            _store_f64(to, weights)
            _store_f64(to + 8, count)
            _store_i64(to + 16, bad)

    return kernel


def scales_kernel(threads: int) -> Any:
    """One block: 1 / weight, 1 / count (0 for none), weight, count; a bad target is noted."""

    def kernel(records, parts, targets, code, scales, note, normalizer):
        if thread() != 0:
            return
        weight = 0.0
        count = 0.0
        bad = np.int64(_NONE)
        for part in range(parts):
            weight = weight + _load_f64(records + part * RECORD)
            count = count + _load_f64(records + part * RECORD + 8)
            bad = min(bad, _load_i64(records + part * RECORD + 16))
        total = weight
        if normalizer >= 0.0:
            weight = normalizer
            count = normalizer
        _store_f64(scales, 1.0 / weight if weight != 0.0 else 0.0)
        _store_f64(scales + 8, 1.0 / count if weight != 0.0 and count != 0.0 else 0.0)
        _store_f64(scales + 16, weight)
        _store_f64(scales + 24, count)
        _store_f64(scales + 32, total)
        if bad != _NONE and note != 0:
            _store_i64(note + 8, bad)
            _store_i64(note, np.int64(1))

    return kernel


def losses_kernel(threads: int, double: bool) -> Any:
    """Per part: the sums of the losses and of the z-loss terms."""
    total = _block_sum(threads)
    load, size = (_load_f64, 8) if double else (_load_f32, 4)

    def kernel(losses, z_terms, rows, share, records):
        nll = 0.0
        z = 0.0
        start = block() * share
        for row in range(start + thread(), min(start + share, rows), threads):
            nll = nll + np.float64(load(losses + row * size))
            if z_terms != 0:
                z = z + np.float64(load(z_terms + row * size))
        nll, z, unused = total(nll, z, np.int64(0))
        if thread() == 0:
            _store_f64(records + block() * RECORD, nll)
            _store_f64(records + block() * RECORD + 8, z)

    return kernel


def loss_kernel(threads: int, double: bool) -> Any:
    """One block: the reduced loss."""
    store, real = (_store_f64, np.float64) if double else (_store_f32, np.float32)

    def kernel(records, parts, scales, mean, loss):
        if thread() != 0:
            return
        nll = 0.0
        z = 0.0
        for part in range(parts):
            nll = nll + _load_f64(records + part * RECORD)
            z = z + _load_f64(records + part * RECORD + 8)
        if mean != 0:
            weight = _load_f64(scales + 16)
            if weight == 0.0:
                nll = np.nan
            else:
                nll = nll / weight
                if z != 0.0:
                    z = z / _load_f64(scales + 24)
        store(loss, real(nll + z))

    return kernel
