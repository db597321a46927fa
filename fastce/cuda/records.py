"""What a slice of the classes knows of a row, how two slices merge, and what follows from all.

A record is a few float64: the maximum and the rest of the slice (see `rows`), the capped logit and
the weight of the target (zero in all slices but one), whether the row counts, and with labels on
all classes

    GAP    sum u_j (m - z_j), m being the maximum of the slice
    MASS   sum u_j

Two slices have a row's exponentials over a common maximum; their terms are non-negative, so nothing
cancels.  What is merged in one order has the same bits everywhere, but other bits in another order:
one rounding of float64 for each slice.

Kernels over records have one thread for each row, and add up rows as `sums` does.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from fastce.cuda import machine
from fastce.cuda.finish import (
    BAD,
    ELSEWHERE,
    IGNORED,
    Labels,
    Sums,
    Target,
    Upstream,
    finish_row,
)
from fastce.cuda.machine import block, device, thread
from fastce.cuda.rows import merge, weighted_gap
from fastce.cuda.sums import block_sum

PLAIN, LABELLED = 5, 7  # numbers in a record
STATE = 32  # bytes before the fifth
COUNTS, SKIPPED, REFUSED = 0.0, 1.0, 2.0  # whether a row does; the largest of all slices holds
SUMMED = 5  # losses, z-loss terms, weights, rows that count, rows whose target is no class

# Arguments of the kernels: 64-bit integers, then float64.
ARGUMENTS = {
    "merge": (("first", "other", "step", "parts", "rows", "merged"), ()),
    "finish": (("records", "rows", "hard", "losses", "lse", "sums"), ("keep", "z_loss")),
    "total": (("sums", "parts", "total"), ()),
    "settle": (("total", "scales", "weight", "loss", "note", "classes"), ("divisor",)),
}

_load_f64, _store_f64 = machine.load["f64"], machine.store["f64"]
_load_i64, _store_i64 = machine.load["i64"], machine.store["i64"]
_NONE = np.int64(0)


class Known(NamedTuple):
    """A record."""

    m: float
    rest: float
    z: float
    weight: float
    state: float
    gap: float
    mass: float


def accessors(labelled: bool) -> SimpleNamespace:
    """Device functions that write and read a record; `size` is its bytes."""

    @device
    def put(to, known):
        _store_f64(to, known.m)
        _store_f64(to + 8, known.rest)
        _store_f64(to + 16, known.z)
        _store_f64(to + 24, known.weight)
        _store_f64(to + STATE, known.state)
        if labelled:
            _store_f64(to + 40, known.gap)
            _store_f64(to + 48, known.mass)

    @device
    def take(at):
        gap = 0.0
        mass = 0.0
        if labelled:
            gap = _load_f64(at + 40)
            mass = _load_f64(at + 48)
        return Known(
            _load_f64(at), _load_f64(at + 8), _load_f64(at + 16), _load_f64(at + 24),
            _load_f64(at + STATE), gap, mass,
        )  # fmt: skip

    return SimpleNamespace(put=put, take=take, size=8 * (LABELLED if labelled else PLAIN))


@device
def state_of(y):
    """Whether the row of a target counts."""
    if y == IGNORED:
        return SKIPPED
    if y == BAD:
        return REFUSED
    return COUNTS


@device
def target_of(state, y):
    """What stands for the target y of a row, by its state in all slices."""
    if state == SKIPPED:
        return IGNORED
    if state == REFUSED:
        return BAD
    return y


@device
def _raised(mass, m, m_of_slice):
    """What a slice's gap lacks for the maximum of all slices."""
    return 0.0 if m == m_of_slice else weighted_gap(mass, m - m_of_slice)


@device
def joined(a, b):
    """The record of two slices."""
    m, rest = merge(a.m, a.rest, b.m, b.rest)
    gap = (a.gap + _raised(a.mass, m, a.m)) + (b.gap + _raised(b.mass, m, b.m))
    return Known(
        m, rest, a.z + b.z, a.weight + b.weight, max(a.state, b.state), gap, a.mass + b.mass
    )


def merge_kernel(labelled: bool, double: bool, threads: int) -> Any:
    """Records of the same rows of several slices merged, in their order."""
    record = accessors(labelled)
    put, take, size = record.put, record.take, record.size

    def kernel(first, other, step, parts, rows, merged):
        row = np.int64(block()) * threads + np.int64(thread())
        if row < rows:
            known = take(first + row * size)
            for part in range(parts):
                known = joined(known, take(other + part * step + row * size))
            put(merged + row * size, known)

    return kernel


def _block_sums(threads: int) -> Any:
    pair, _ = block_sum(threads)

    @device
    def leave(to, nll, z, weight, count, bad):
        """What the threads of a block have adds up in memory."""
        nll, z, _ = pair(nll, z, _NONE)
        weight, count, _ = pair(weight, count, _NONE)
        bad, _, _ = pair(bad, 0.0, _NONE)
        if thread() == 0:
            _store_f64(to, nll)
            _store_f64(to + 8, z)
            _store_f64(to + 16, weight)
            _store_f64(to + 24, count)
            _store_f64(to + 32, bad)

    return leave


def finish_kernel(labelled: bool, double: bool, threads: int) -> Any:
    """Loss and log-sum-exp of each row, and the sums of each block of rows."""
    record, leave = accessors(labelled), _block_sums(threads)
    take, size = record.take, record.size
    store, real, loss_size = (
        (machine.store["f64"], np.float64, 8) if double else (machine.store["f32"], np.float32, 4)
    )

    def kernel(records, rows, hard, losses, lse, sums, keep, z_loss):
        row = np.int64(block()) * threads + np.int64(thread())
        nll = 0.0
        z = 0.0
        weight = 0.0
        count = 0.0
        bad = 0.0
        if row < rows:
            known = take(records + row * size)
            y = target_of(known.state, ELSEWHERE)
            done = finish_row(
                row, known.m, known.rest, Sums(known.gap, known.mass, 0.0, np.int64(0)),
                Target(y, known.z, known.weight, 1.0, 0.0), 2, Labels(0, 0, 0, keep, 0.0), z_loss,
                Upstream(0, 0, 0, 0, 1.0, 1.0),
            )  # fmt: skip
            if losses != 0:
                store(losses + row * loss_size, real(done.nll + done.z_term))
            if lse != 0:
                store(lse + row * loss_size, real(done.lse))
            nll = done.nll
            z = done.z_term
            if y == ELSEWHERE:
                weight = known.weight if hard != 0 else 1.0
                count = 1.0
            if y == BAD:
                bad = 1.0
        leave(sums + np.int64(block()) * (8 * SUMMED), nll, z, weight, count, bad)

    return kernel


def total_kernel(labelled: bool, double: bool, threads: int) -> Any:
    """The sums of several parts of the rows added up; by a single block."""
    leave = _block_sums(threads)

    def kernel(sums, parts, total):
        nll = 0.0
        z = 0.0
        weight = 0.0
        count = 0.0
        bad = 0.0
        for part in range(np.int64(thread()), parts, threads):
            at = sums + part * (8 * SUMMED)
            nll = nll + _load_f64(at)
            z = z + _load_f64(at + 8)
            weight = weight + _load_f64(at + 16)
            count = count + _load_f64(at + 24)
            bad = bad + _load_f64(at + 32)
        leave(total, nll, z, weight, count, bad)

    return kernel


def settle_kernel(labelled: bool, double: bool, threads: int) -> Any:
    """The reduced loss, the scales of its gradient and the weight of the rows; bad targets noted.

    A negative divisor stands for the sums' own weight and number of rows.
    """
    store, real = (
        (machine.store["f64"], np.float64) if double else (machine.store["f32"], np.float32)
    )

    def kernel(total, scales, own_weight, loss, note, classes, divisor):
        if thread() == 0:
            z = _load_f64(total + 8)
            weight = _load_f64(total + 16)
            count = _load_f64(total + 24)
            if own_weight != 0:
                _store_f64(own_weight, weight)
            if divisor >= 0.0:
                weight = divisor
                count = divisor
            nll = _load_f64(total) / weight if weight != 0.0 else np.nan
            if z != 0.0:
                nll = nll + z / count
            store(loss, real(nll))
            _store_f64(scales, 1.0 / weight if weight != 0.0 else 0.0)
            _store_f64(scales + 8, 1.0 / count if weight != 0.0 and count != 0.0 else 0.0)
            if _load_f64(total + 32) != 0.0 and _load_i64(note) == 0:
                _store_i64(note + 8, np.int64(-1))  # a row of another slice
                _store_i64(note + 16, np.int64(0))
                _store_i64(note + 24, classes)
                _store_i64(note + 32, np.int64(0))
                machine.publish()
                _store_i64(note, np.int64(1))

    return kernel
