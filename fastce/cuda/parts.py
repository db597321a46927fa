"""What kernels over side-by-side classes are made of: load, sum up, write a run of classes.

A run is a row or a piece of one.  It consists of whole 16-byte vectors, the body, and of a few
classes before and after them, the edges, so that every run has its full width however it is
aligned.  Each of the threads of a run holds `vectors` vectors in registers and at most one class of
the edges; what does not fit in the registers goes to shared memory, where a thread reads nothing
but what it has put there itself, or is read again from memory.

Positions within a run are 32-bit: half the registers.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from fastce.cuda import machine
from fastce.cuda.finish import IGNORED, Sums, labelling
from fastce.cuda.formats import FORMATS
from fastce.cuda.machine import WARP, copy_async, exclusive_or, wait_for_copies
from fastce.cuda.plan import SCRATCH, ZERO, Variant
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
)
from fastce.cuda.sharing import sharing

_MINUS_INF, _ZERO = np.float32(-np.inf), np.float32(0.0)
_shared_u32 = machine.shared_load["u32"]


class Place(NamedTuple):
    """Where a thread stands: its number within the run, the row, and the run in memory."""

    lane: Any
    row: Any
    address: Any
    first: Any  # class of the row at the address
    classes: Any
    head: Any  # classes before the body
    body: Any  # vectors
    edge: Any  # class of the edges that this thread holds, or -1


class Coefficients(NamedTuple):
    """What a row's gradient is computed with, in the precision of its elements."""

    m: float
    factor: float
    power: float
    of_labels: float  # in float64 for soft labels, as the two below
    at_target: float
    labelled: float
    cap: float


def elements(variant: Variant) -> SimpleNamespace:
    """What is done with one logit, and with one word of one or two of them."""
    form = FORMATS[variant.dtype]
    two, is_capped = form.per_word == 2, variant.capped
    first, second_of, pack = form.first, form.second, form.pack
    word_max, word_min = form.word_max, form.word_min
    label = labelling(variant).label
    coarse, minus_coarse = form.coarse, form.minus_coarse
    fine, minus_fine = form.fine, form.minus_fine
    high_unit, low_unit, one = form.high_unit, form.low_unit, form.one
    with_label, is_log = variant.spread, variant.task == "log_softmax"
    is_soft, real = bool(variant.soft), form.compute

    @machine.device
    def see(most, runner_up, word):
        """The two largest of each place in a word so far, and one word more."""
        return word_max(most, word), word_max(runner_up, word_min(most, word))

    @machine.device
    def seen(most, runner_up, z):
        """The two largest of what `see` has gone through, and of z."""
        m, second = top_two(first(most), first(runner_up), z)
        if two:
            m, second = merge_top_two(m, second, second_of(most), second_of(runner_up))
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
    def result(x, j, row, labels):
        """What is written for the logit x of class j."""
        z = x
        if is_capped:
            z = capped(x, row.cap)
        if is_log:
            return (z - row.m) - row.factor
        g = scaled(z, row.m, row.factor, row.power)
        if with_label:
            u = label(labels, j)
            g = g - real(row.of_labels) * u
            if is_soft and z == row.m and row.labelled == row.labelled:
                # Most of the probability: a small difference, where the model agrees.
                g = real((row.labelled - row.of_labels * np.float64(u)) + row.at_target)
        if is_capped:
            g = g * cap_slope(x, row.cap)
        return g

    @machine.device
    def result_word(word, j, row, labels):
        low = result(first(word), j, row, labels)
        if two:
            return pack(low, result(second_of(word), j + 1, row, labels))
        return low

    return SimpleNamespace(
        see=see, seen=seen, add_one=add_one, add_word=add_word, rest=rest, result=result,
        result_word=result_word,
    )  # fmt: skip


def runs(variant: Variant) -> SimpleNamespace:
    """Load, statistics and writing of a run of side-by-side classes."""
    form = FORMATS[variant.dtype]
    share, element = sharing(variant.threads, variant.clustered), elements(variant)
    top, exact, total, least = share.top, share.exact, share.total, share.least
    see, seen, rest_of = element.see, element.seen, element.rest
    add_one, add_word = element.add_one, element.add_word
    weigh = labelling(variant).weigh
    result, result_word = element.result, element.result_word
    threads, vectors = variant.threads, variant.vectors
    several = threads > WARP
    in_shared, again = variant.beyond == "shared", variant.beyond == "memory"
    beyond = in_shared or again
    size, width, words, per_word = form.size, 16 // form.size, form.words, form.per_word
    size_bits, width_bits = size.bit_length() - 1, width.bit_length() - 1
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
    def place(z, row, offset, first, count, lane):
        """Divide a run of `count` classes, the first of a row `offset` bytes from z.

        It has a head, a body and edges.
        """
        address = z + offset + np.int64(first) * size
        head = np.int32(min(np.int32(count), np.int32((-address) & 15) >> size_bits))
        body = np.int32((count - head) >> width_bits)
        tail = np.int32(head + body * width)
        edge = np.int32(-1)
        if lane < head:
            edge = lane
        elif lane >= width and lane - width < count - tail:
            edge = np.int32(tail + (lane - width))
        return Place(lane, row, address, first, np.int32(count), head, body, edge)

    @machine.device
    def edge_of(at):
        """The class of the edges that this thread holds; -inf if none."""
        if at.edge >= 0:
            return load(at.address + np.int64(at.edge) * size)
        return real(_MINUS_INF)

    @machine.device
    def fill(held, at):
        """Read the body once: registers first, then shared memory, all loads under way at once."""
        base = at.address + np.int64(at.head) * size
        for v in range(vectors):
            i = np.int32(at.lane + v * threads)
            if i < at.body:
                load_vector(base + np.int64(i) * 16, held, v * words)
            else:
                for k in range(words):
                    held[v * words + k] = empty
        if in_shared:
            for i in range(at.lane + vectors * threads, at.body, threads):
                copy_async(SCRATCH + 16 * (i - vectors * threads), base + 16 * np.int64(i))

    @machine.device
    def fetch(spare, at, i):
        """Read vector i of those beyond the registers once more."""
        if again:
            load_vector(at.address + np.int64(at.head) * size + 16 * np.int64(i), spare, 0)
        else:
            shared_load_vector(SCRATCH + 16 * (i - vectors * threads), spare, 0)

    @machine.device
    def statistics(held, spare, edge_z, at, cap):
        """(m, rest) of a run."""
        most = empty
        runner_up = empty
        for k in range(registers):
            most, runner_up = see(most, runner_up, held[k])
        if in_shared:
            wait_for_copies()
        if beyond:
            for i in range(at.lane + vectors * threads, at.body, threads):
                fetch(spare, at, i)
                for k in range(words):
                    most, runner_up = see(most, runner_up, spare[k])
        m, second = seen(most, runner_up, edge_z)
        m, second = top(at.lane, m, second)
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
            for i in range(at.lane + vectors * threads, at.body, threads):
                fetch(spare, at, i)
                for k in range(words):
                    high, low = add_word(high, low, spare[k], ref, cap)
        all_high, all_low = exact(at.lane, np.int64(high), np.int64(low))
        return m, rest_of(m, ref, all_high, all_low)

    @machine.device
    def sums_of(at, m, cap, classes, labels):
        """`Sums` of a run, taken in class order; for this the run is read again, from the cache."""
        sums = Sums(0.0, 0.0, 0.0, classes)
        for j in range(at.lane, at.classes, threads):
            x = load(at.address + np.int64(j) * size)
            if is_capped:
                x = capped(x, cap)
            sums = weigh(sums, labels, at.first + j, x, m)
        gap = sums.gap
        mass = sums.mass
        surprise = sums.surprise
        found = sums.first
        if is_spread:
            gap, mass = total(at.lane, gap, mass)
        if is_stats:
            surprise, _ = total(at.lane, surprise, 0.0)
            found = least(at.lane, found)
        return Sums(gap, mass, surprise, found)

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
    def write_body(held, where, i, spare, at, to, aligned, y, own, row, labels):
        """Turn vector i, at `where` in `held`, into results; the target's component is its own."""
        j = np.int32(at.head + i * width)
        for k in range(words):
            spare[k] = result_word(held[where + k], j + k * per_word, row, labels)
            if y == IGNORED:
                spare[k] = word_type(0)
        start = to + np.int64(j) * size
        write_vector(spare, start, aligned)
        if j <= own and own < j + width:
            store(to + np.int64(own) * size, real(row.at_target))

    @machine.device
    def write(held, spare, at, to, y, row, labels):
        """Write the results of a run; the thread that holds the target corrects its component.

        `to` and `labels` begin where the run does.
        """
        edge_z = edge_of(at)  # again, rather than in a register all the while
        own = y  # the place of the target in this run, if it is there
        if y >= 0:
            own = np.int32(y - at.first)
        aligned = ((to ^ at.address) & 15) == 0
        if two and several:
            # Otherwise the compiler keeps the halves, unpacked for the sums, until now, and for
            # want of registers spills them.
            zero = _shared_u32(ZERO)
            for k in range(registers):
                held[k] = exclusive_or(held[k], zero)
        for v in range(vectors):
            i = np.int32(at.lane + v * threads)
            if i < at.body:
                write_body(held, v * words, i, spare, at, to, aligned, y, own, row, labels)
        if beyond:
            for i in range(at.lane + vectors * threads, at.body, threads):
                fetch(spare, at, i)
                write_body(spare, 0, np.int32(i), spare, at, to, aligned, y, own, row, labels)
        if at.edge >= 0:
            g = result(edge_z, at.edge, row, labels)
            if at.edge == own:
                g = real(row.at_target)
            if y == IGNORED:
                g = real(_ZERO)
            store(to + np.int64(at.edge) * size, g)

    return SimpleNamespace(
        place=place, edge_of=edge_of, fill=fill, statistics=statistics, sums_of=sums_of,
        write=write, spread_word=share.spread_word, hear=share.hear,
    )  # fmt: skip
