"""What the threads of a run tell each other: reductions over warps, blocks and clusters."""

from types import SimpleNamespace

import numpy as np

from fastce.cuda import machine
from fastce.cuda.machine import (
    WARP,
    barrier,
    cluster_arrive,
    cluster_rank,
    cluster_size,
    cluster_wait,
    convert,
    exchange,
)
from fastce.cuda.plan import BLOCKS, BLOCKS_EXCHANGED, COEFFICIENTS, EXCHANGED, TARGET
from fastce.cuda.rows import merge_top_two

# Numbers of threads are powers of two: shifts and masks, as the compiler does not know that a
# dividend is never negative.
WARP_BITS = WARP.bit_length() - 1
_shared_f64, _put_f64 = machine.shared_load["f64"], machine.shared_store["f64"]
_shared_i64, _put_i64 = machine.shared_load["i64"], machine.shared_store["i64"]
_tell_f64, _tell_i64 = machine.remote_store["f64"], machine.remote_store["i64"]


@machine.device
def cluster_barrier():
    """Wait for all threads of the cluster; what they have stored in shared memory is there."""
    cluster_arrive()
    cluster_wait()


def sharing(threads: int, clustered: bool = False) -> SimpleNamespace:
    """Reductions over the `threads` of a run: of the two largest, of exact sums, of float64.

    Several warps meet in shared memory; their number is a power of two, at most `WARP`.  All
    threads learn the two largest; of sums over several warps only the first thread does.  Runs that
    are the parts of a row do the same once more: each block leaves what it has in the shared memory
    of the others, of sums in that of the first, whose first thread then has them.
    """
    several, warps = threads > WARP, max(1, threads // WARP)
    sums_at, totals_at = BLOCKS + BLOCKS_EXCHANGED, BLOCKS + 2 * BLOCKS_EXCHANGED
    steps = tuple(2**k for k in range(10) if 2**k < min(WARP, threads))
    warp_steps = tuple(2**k for k in range(10) if 2**k < warps)

    @machine.device
    def top(lane, m, second):
        for step in steps:
            m, second = merge_top_two(m, second, exchange(m, step), exchange(second, step))
        if several:
            if lane & (WARP - 1) == 0:
                _put_f64(16 * (lane >> WARP_BITS), np.float64(m))
                _put_f64(16 * (lane >> WARP_BITS) + 8, np.float64(second))
            barrier()
            m = convert(_shared_f64(16 * (lane & (warps - 1))), m)
            second = convert(_shared_f64(16 * (lane & (warps - 1)) + 8), m)
            for step in warp_steps:
                m, second = merge_top_two(m, second, exchange(m, step), exchange(second, step))
        if clustered:
            size = cluster_size()
            here = BLOCKS + 16 * cluster_rank()
            cluster_wait()  # for what all have announced at their beginning: that they are there
            if lane < size:
                _tell_f64(here, lane, np.float64(m))
                _tell_f64(here + 8, lane, np.float64(second))
            cluster_barrier()
            of_block = BLOCKS + 16 * (lane & (size - 1))
            m = convert(_shared_f64(of_block), m)
            second = convert(_shared_f64(of_block + 8), m)
            step = 1
            while step < size:
                m, second = merge_top_two(m, second, exchange(m, step), exchange(second, step))
                step = step + step
        return m, second

    @machine.device
    def exact(lane, high, low):
        for step in steps:
            high = high + exchange(high, step)
            low = low + exchange(low, step)
        if several:
            if lane & (WARP - 1) == 0:
                _put_i64(EXCHANGED + 16 * (lane >> WARP_BITS), high)
                _put_i64(EXCHANGED + 16 * (lane >> WARP_BITS) + 8, low)
            barrier()
            if lane == 0:
                for warp in range(1, warps):
                    high = high + _shared_i64(EXCHANGED + 16 * warp)
                    low = low + _shared_i64(EXCHANGED + 16 * warp + 8)
        if clustered:
            if lane == 0:
                _tell_i64(sums_at + 16 * cluster_rank(), 0, high)
                _tell_i64(sums_at + 16 * cluster_rank() + 8, 0, low)
            cluster_barrier()
            if lane == 0 and cluster_rank() == 0:
                for other in range(1, cluster_size()):
                    high = high + _shared_i64(sums_at + 16 * other)
                    low = low + _shared_i64(sums_at + 16 * other + 8)
        return high, low

    @machine.device
    def total(lane, x, y):
        for step in steps:
            x = x + exchange(x, step)
            y = y + exchange(y, step)
        if several:
            barrier()
            if lane & (WARP - 1) == 0:
                _put_f64(2 * EXCHANGED + 16 * (lane >> WARP_BITS), x)
                _put_f64(2 * EXCHANGED + 16 * (lane >> WARP_BITS) + 8, y)
            barrier()
            if lane == 0:
                for warp in range(1, warps):
                    x = x + _shared_f64(2 * EXCHANGED + 16 * warp)
                    y = y + _shared_f64(2 * EXCHANGED + 16 * warp + 8)
        if clustered:
            cluster_barrier()
            if lane == 0:
                _tell_f64(totals_at + 16 * cluster_rank(), 0, x)
                _tell_f64(totals_at + 16 * cluster_rank() + 8, 0, y)
            cluster_barrier()
            if lane == 0 and cluster_rank() == 0:
                for other in range(1, cluster_size()):
                    x = x + _shared_f64(totals_at + 16 * other)
                    y = y + _shared_f64(totals_at + 16 * other + 8)
        return x, y

    @machine.device
    def least(lane, found):
        for step in steps:
            found = min(found, exchange(found, step))
        if several:
            barrier()
            if lane & (WARP - 1) == 0:
                _put_i64(8 * (lane >> WARP_BITS), found)
            barrier()
            if lane == 0:
                for warp in range(1, warps):
                    found = min(found, _shared_i64(8 * warp))
        if clustered:
            cluster_barrier()
            if lane == 0:
                _tell_i64(sums_at + 16 * cluster_rank(), 0, found)
            cluster_barrier()
            if lane == 0 and cluster_rank() == 0:
                for other in range(1, cluster_size()):
                    found = min(found, _shared_i64(sums_at + 16 * other))
        return found

    @machine.device
    def spread_word(factor, power, of_labels, at_target, labelled, y):
        """The first thread of a row tells all of its threads."""
        _put_f64(COEFFICIENTS, factor)
        _put_f64(COEFFICIENTS + 8, np.float64(power))
        _put_f64(COEFFICIENTS + 16, of_labels)
        _put_f64(COEFFICIENTS + 24, at_target)
        _put_f64(TARGET + 8, labelled)
        if clustered:
            for other in range(1, cluster_size()):
                _tell_f64(COEFFICIENTS, other, factor)
                _tell_f64(COEFFICIENTS + 8, other, np.float64(power))
                _tell_f64(COEFFICIENTS + 16, other, of_labels)
                _tell_f64(COEFFICIENTS + 24, other, at_target)
                _tell_f64(TARGET, other, np.float64(y))
                _tell_f64(TARGET + 8, other, labelled)

    @machine.device
    def hear():
        """What `spread_word` has told, when it has."""
        if clustered:
            cluster_barrier()
        else:
            barrier()
        return (
            _shared_f64(COEFFICIENTS), np.int64(_shared_f64(COEFFICIENTS + 8)),
            _shared_f64(COEFFICIENTS + 16), _shared_f64(COEFFICIENTS + 24),
            _shared_f64(TARGET + 8), np.int32(_shared_f64(TARGET)),
        )  # fmt: skip

    return SimpleNamespace(
        top=top, exact=exact, total=total, least=least, spread_word=spread_word, hear=hear
    )
