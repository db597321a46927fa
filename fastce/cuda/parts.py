"""What kernels over side-by-side classes are put together from: load, sum up, write a run of classes.

A run is a row or a piece of one.  It consists of whole 16-byte vectors, the body, and of a few
classes before and after them, the edges, so that every run has its full width however it is
aligned.  Each of the threads of a run holds `vectors` vectors in registers and at most one class of
the edges; what does not fit in the registers goes to shared memory, where a thread reads nothing
but what it has put there itself.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from fastce.cuda import machine
from fastce.cuda.finish import IGNORED, label
from fastce.cuda.formats import FORMATS
from fastce.cuda.machine import WARP, barrier, convert, copy_async, exchange, wait_for_copies
from fastce.cuda.rows import (
    accumulate,
    cap_slope,
    capped,
    merge_top_two,
    reference,
    rest_of_sum,
    scaled,
    term,
    top_two,
    weighted_gap,
)

# Shared memory before the classes: what the warps of a block tell each other, three times over,
# and the coefficients of the row.
EXCHANGED = 512
COEFFICIENTS = 3 * EXCHANGED
SCRATCH = COEFFICIENTS + 64

_MINUS_INF, _ZERO = np.float32(-np.inf), np.float32(0.0)
_shared_f64, _put_f64 = machine.shared_load["f64"], machine.shared_store["f64"]
_shared_i64, _put_i64 = machine.shared_load["i64"], machine.shared_store["i64"]


class Variant(NamedTuple):
    """What a kernel is compiled for."""

    dtype: str
    task: str  # loss, gradient, stats, softmax, log_softmax, logsumexp
    regime: str  # row: a warp or block for each; strided: a thread for each
    threads: int = 32  # per run
    block: int = 32
    vectors: int = 1  # per thread, in registers
    beyond: str = ""  # where the rest of a run is kept: "shared" memory, or "memory", read again
    spread: bool = False  # whether labels lie on other classes than the target
    capped: bool = False


def sharing(threads: int) -> SimpleNamespace:
    """Reductions over the `threads` of a run: of the two largest, of exact sums, of float64.

    Several warps meet in shared memory; their number is a power of two, at most `WARP`.
    """
    several, warps = threads > WARP, max(1, threads // WARP)
    steps = tuple(2**k for k in range(10) if 2**k < min(WARP, threads))
    warp_steps = tuple(2**k for k in range(10) if 2**k < warps)

    @machine.device
    def top(lane, m, second):
        for step in steps:
            m, second = merge_top_two(m, second, exchange(m, step), exchange(second, step))
        if several:
            if lane % WARP == 0:
                _put_f64(16 * (lane // WARP), np.float64(m))
                _put_f64(16 * (lane // WARP) + 8, np.float64(second))
            barrier()
            m = convert(_shared_f64(16 * (lane % warps)), m)
            second = convert(_shared_f64(16 * (lane % warps) + 8), m)
            for step in warp_steps:
                m, second = merge_top_two(m, second, exchange(m, step), exchange(second, step))
        return m, second

    @machine.device
    def exact(lane, high, low):
        for step in steps:
            high = high + exchange(high, step)
            low = low + exchange(low, step)
        if several:
            if lane % WARP == 0:
                _put_i64(EXCHANGED + 16 * (lane // WARP), high)
                _put_i64(EXCHANGED + 16 * (lane // WARP) + 8, low)
            barrier()
            high = _shared_i64(EXCHANGED + 16 * (lane % warps))
            low = _shared_i64(EXCHANGED + 16 * (lane % warps) + 8)
            for step in warp_steps:
                high = high + exchange(high, step)
                low = low + exchange(low, step)
        return high, low

    @machine.device
    def total(lane, x, y):
        for step in steps:
            x = x + exchange(x, step)
            y = y + exchange(y, step)
        if several:
            barrier()
            if lane % WARP == 0:
                _put_f64(2 * EXCHANGED + 16 * (lane // WARP), x)
                _put_f64(2 * EXCHANGED + 16 * (lane // WARP) + 8, y)
            barrier()
            x = _shared_f64(2 * EXCHANGED + 16 * (lane % warps))
            y = _shared_f64(2 * EXCHANGED + 16 * (lane % warps) + 8)
            for step in warp_steps:
                x = x + exchange(x, step)
                y = y + exchange(y, step)
        return x, y

    @machine.device
    def least(lane, found):
        for step in steps:
            found = min(found, exchange(found, step))
        if several:
            barrier()
            if lane % WARP == 0:
                _put_i64(8 * (lane // WARP), found)
            barrier()
            found = _shared_i64(8 * (lane % warps))
            for step in warp_steps:
                found = min(found, exchange(found, step))
        return found

    return SimpleNamespace(top=top, exact=exact, total=total, least=least)


def elements(variant: Variant) -> SimpleNamespace:
    """What is done with one logit, and with one word of one or two of them."""
    form = FORMATS[variant.dtype]
    two, is_capped = form.per_word == 2, variant.capped
    first, second_of, pack, real = form.first, form.second, form.pack, form.compute
    coarse, minus_coarse = form.coarse, form.minus_coarse
    fine, minus_fine = form.fine, form.minus_fine
    high_unit, low_unit, one = form.high_unit, form.low_unit, form.one
    with_label, is_log = variant.spread, variant.task == "log_softmax"

    @machine.device
    def see(m, second, word):
        m, second = top_two(m, second, first(word))
        if two:
            m, second = top_two(m, second, second_of(word))
        return m, second

    @machine.device
    def add_one(high, low, x, ref, cap):
        if is_capped:
            x = capped(x, cap)
        return accumulate(high, low, term(x, ref), coarse, minus_coarse, fine, minus_fine)

    @machine.device
    def add_word(high, low, word, ref, cap):
        high, low = add_one(high, low, first(word), ref, cap)
        if two:
            high, low = add_one(high, low, second_of(word), ref, cap)
        return high, low

    @machine.device
    def rest(m, ref, high, low):
        others = np.float64(high - one) * high_unit + np.float64(low) * low_unit
        return rest_of_sum(m, ref, others)

    @machine.device
    def result(
        x, j, m, factor, power, of_labels, cap, soft, soft_class, soft_code, weight, weight_code,
        keep, spread,
    ):  # fmt: skip
        """What is written for the logit x of class j."""
        z = x
        if is_capped:
            z = capped(x, cap)
        if is_log:
            return (z - m) - factor
        g = scaled(z, m, factor, power)
        if with_label:
            u = label(soft, soft_class, soft_code, weight, weight_code, j, keep, spread, x)
            g = g - of_labels * u
        if is_capped:
            g = g * cap_slope(x, cap)
        return g

    @machine.device
    def result_word(
        word, j, m, factor, power, of_labels, cap, soft, soft_class, soft_code, weight, weight_code,
        keep, spread,
    ):  # fmt: skip
        low = result(
            first(word), j, m, factor, power, of_labels, cap,
            soft, soft_class, soft_code, weight, weight_code, keep, spread,
        )  # fmt: skip
        if two:
            high = result(
                second_of(word), j + 1, m, factor, power, of_labels, cap,
                soft, soft_class, soft_code, weight, weight_code, keep, spread,
            )  # fmt: skip
            return pack(low, high)
        return low

    return SimpleNamespace(
        see=see, add_one=add_one, add_word=add_word, rest=rest, result=result,
        result_word=result_word, real=real,
    )  # fmt: skip


def runs(variant: Variant) -> SimpleNamespace:
    """Load, statistics and writing of a run of side-by-side classes."""
    form = FORMATS[variant.dtype]
    share, element = sharing(variant.threads), elements(variant)
    top, exact, total, least = share.top, share.exact, share.total, share.least
    see, add_one, add_word, rest_of = element.see, element.add_one, element.add_word, element.rest
    result, result_word = element.result, element.result_word
    threads, vectors = variant.threads, variant.vectors
    in_shared, again = variant.beyond == "shared", variant.beyond == "memory"
    beyond = in_shared or again
    size, width, words, per_word = form.size, 16 // form.size, form.words, form.per_word
    two, registers = per_word == 2, vectors * words
    real, word_type, empty = form.compute, form.word, form.empty
    # A thread of a row without bound may add up more than 512 terms.
    count_type = np.int64 if again else form.count
    load, store = form.load, form.store
    load_vector, store_vector = form.load_vector, form.store_vector
    shared_load_vector = form.shared_load_vector
    first, second_of = form.first, form.second
    is_capped, is_spread, is_stats = variant.capped, variant.spread, variant.task == "stats"

    @machine.device
    def shape(address, count, lane):
        """(classes before the body, vectors in it, class of the edges for this thread or -1)."""
        head = min(count, ((-address) & 15) // size)
        body = (count - head) // width
        edge = np.int64(-1)
        if lane < head:
            edge = lane
        elif lane >= width and lane - width < count - head - body * width:
            edge = head + body * width + (lane - width)
        return head, body, edge

    @machine.device
    def fill(held, base, body, lane):
        """Read the body once: registers first, then shared memory, all loads under way at once."""
        for v in range(vectors):
            i = lane + v * threads
            if i < body:
                load_vector(base + 16 * i, held, v * words)
            else:
                for k in range(words):
                    held[v * words + k] = empty
        if in_shared:
            for i in range(lane + vectors * threads, body, threads):
                copy_async(SCRATCH + 16 * (i - vectors * threads), base + 16 * i)
            wait_for_copies()

    @machine.device
    def fetch(spare, base, i):
        """Read vector i of those beyond the registers once more."""
        if again:
            load_vector(base + 16 * i, spare, 0)
        else:
            shared_load_vector(SCRATCH + 16 * (i - vectors * threads), spare, 0)

    @machine.device
    def statistics(held, spare, edge_z, base, body, lane, cap):
        """(m, rest) of a run."""
        m = edge_z
        second = real(_MINUS_INF)
        for k in range(registers):
            m, second = see(m, second, held[k])
        if beyond:
            for i in range(lane + vectors * threads, body, threads):
                fetch(spare, base, i)
                for k in range(words):
                    m, second = see(m, second, spare[k])
        m, second = top(lane, m, second)
        if is_capped:
            m = capped(m, cap)
            second = capped(second, cap)
        ref = reference(m, second)
        high = count_type(0)
        low = count_type(0)
        high, low = add_one(high, low, edge_z, ref, cap)
        for k in range(registers):
            high, low = add_word(high, low, held[k], ref, cap)
        if beyond:
            for i in range(lane + vectors * threads, body, threads):
                fetch(spare, base, i)
                for k in range(words):
                    high, low = add_word(high, low, spare[k], ref, cap)
        all_high, all_low = exact(lane, np.int64(high), np.int64(low))
        return m, rest_of(m, ref, all_high, all_low)

    @machine.device
    def sums(
        address, count, lane, m, cap, soft, soft_class, soft_code, weight, weight_code, keep, spread
    ):
        """(sum u (m - z), sum u, sum e (m - z), first class at m) in float64.

        No fixed point fits these sums.  They are taken in class order, whatever the alignment, and
        for this the run is read again, from the cache.
        """
        gap = 0.0
        mass = 0.0
        surprise = 0.0
        found = np.int64(count)
        for j in range(lane, count, threads):
            x = load(address + j * size)
            if is_capped:
                x = capped(x, cap)
            below = np.float64(m) - np.float64(x)
            if is_spread:
                u = label(soft, soft_class, soft_code, weight, weight_code, j, keep, spread, m)
                gap = gap + weighted_gap(np.float64(u), below)
                mass = mass + np.float64(u)
            if is_stats:
                e = machine.exponential(x - m, real(_ZERO))
                surprise = surprise + weighted_gap(np.float64(e), below)
                if x == m:
                    found = min(found, np.int64(j))
        if is_spread:
            gap, mass = total(lane, gap, mass)
        if is_stats:
            surprise, unused = total(lane, surprise, 0.0)
            found = least(lane, found)
        return gap, mass, surprise, found

    @machine.device
    def write_vector(packed, to, aligned):
        if aligned:
            store_vector(to, packed, 0)
        else:  # `out` starts elsewhere within 16 bytes than the logits
            for k in range(words):
                store(to + k * per_word * size, first(packed[k]))
                if two:
                    store(to + k * per_word * size + size, second_of(packed[k]))

    @machine.device
    def write(
        held, spare, edge, edge_z, head, base, body, lane, to, aligned, y, state,
        m, factor, power, at_target, of_labels, cap,
        soft, soft_class, soft_code, weight, weight_code, keep, spread,
    ):  # fmt: skip
        """Write the results of a run; the thread that holds the target corrects its component."""
        at_vector = np.int64(-1)
        if y >= head:
            at_vector = (y - head) // width
        if edge >= 0:
            g = result(
                edge_z, edge, m, factor, power, of_labels, cap,
                soft, soft_class, soft_code, weight, weight_code, keep, spread,
            )  # fmt: skip
            if edge == y:
                g = at_target
            if state == IGNORED:
                g = real(_ZERO)
            store(to + edge * size, g)
        for v in range(vectors):
            i = lane + v * threads
            if i < body:
                j = head + i * width
                for k in range(words):
                    spare[k] = result_word(
                        held[v * words + k], j + k * per_word, m, factor, power, of_labels, cap,
                        soft, soft_class, soft_code, weight, weight_code, keep, spread,
                    )  # fmt: skip
                    if state == IGNORED:
                        spare[k] = word_type(0)
                write_vector(spare, to + j * size, aligned)
                if i == at_vector:
                    store(to + y * size, at_target)
        if beyond:
            for i in range(lane + vectors * threads, body, threads):
                j = head + i * width
                fetch(spare, base, i)
                for k in range(words):
                    spare[k] = result_word(
                        spare[k], j + k * per_word, m, factor, power, of_labels, cap,
                        soft, soft_class, soft_code, weight, weight_code, keep, spread,
                    )  # fmt: skip
                    if state == IGNORED:
                        spare[k] = word_type(0)
                write_vector(spare, to + j * size, aligned)
                if i == at_vector:
                    store(to + y * size, at_target)

    return SimpleNamespace(
        shape=shape, fill=fill, statistics=statistics, sums=sums, write=write, element=element
    )
