"""The mathematics of one row of logits: what is summed, what follows from it, what is written.

A row z with its maximum m is known by two numbers, m and

    rest = sum of exp(z_j - m) over all classes but one where the maximum is,

from which   logsumexp = m + log1p(rest)   and   p_j = exp(z_j - m) / (1 + rest).
Every term is non-negative, so nothing cancels: a loss of 1e-30 keeps its digits.

Exponentials are taken as exp(z - shift) / 2**power.  For |m| <= 1024 the shift is 0, so that z
enters the reduction unrounded; beyond, it is m, from which the subtraction is exact for every z
that matters.  The power keeps the sums of order one; being a power of two it costs no accuracy.

Sums run over a fixed number of lanes in blocks of a fixed length, so that every bit is the same
whatever the threads, the batch or the processor.  No more than four float32 exponentials are added
up, two and two, before the sum moves on to float64: their own error is 1.3e-7 at most, each of the
two additions may add 6e-8, and what is promised is 3e-7 whatever the terms are.

A row lies in memory `offset` bytes from a base (see `vector`), `step` bytes from class to class
(None: side by side), and has at least as many classes as a vector has lanes.
"""

import numpy as np

from fastce.cpu.constants import constant
from fastce.cpu.elementary import (
    add_up,
    capped,
    exp_scale,
    exp_scaled,
    log1p,
    round_to_integer,
)
from fastce.cpu.jit import device
from fastce.cpu.memory import (
    first_line,
    item_size,
    load,
    store,
    store_streaming,
    zeros,
)
from fastce.cpu.vector import (
    any_lane,
    convert,
    extract,
    first_lane,
    fma,
    lane_numbers,
    lanes,
    largest,
    maximum,
    splat,
    total,
    where,
)

BLOCK = 512  # classes per block: those of its maximum are summed again without it
# How far a maximum may exceed the reference that exponentials are scaled for: lifted by 2**64 and
# summed in blocks, they stay below 2**127.
LEAD = 40.0
# Below this rest the sum with the maximum is not used: what it has lost by rounding, relative to
# log1p(rest), would be more than the sum without it has.
SWALLOWED = 4.0
# What distances of classes are multiplied with before they are added up: many may be as large as
# there are numbers, where classes are masked by the smallest one, or larger.
SHORT = 2.0**-12


@device
def distance(base, step):
    """Bytes from one class to the next."""
    return item_size(base) if step is None else step


@device
def reference(m):
    """The shift and the power of two to take exponentials with where the maximum is about m.

    What is divided by the power here is multiplied with it there, so that both must get it from one
    call: next to a half integer m log2(e), the float32 and the float64 of the same m do not round
    to the same power.
    """
    near = where(m <= 1024.0, where(m >= -1024.0, m, 0.0), 0.0)
    shift = where(near == m, 0.0, where(m == -np.inf, 0.0, m))
    return shift, round_to_integer(near * constant("LOG2E", m))


@device
def exp_of(m, shift, power, like):
    """exp(m - shift) / 2**power in float64: between 0.7 and 1.5 for the reference at m.

    It shares the one error of the vectors like `like` that is not random, that of their ln 2.
    """
    bias, floor = exp_scale(power, m)
    return exp_scaled((m - shift) - power * constant("LN2_EXCESS", like), bias, floor)


@device
def lifted_scale(power, like):
    """`exp_scale` that lifts exponentials by 2**LIFT, away from the smallest normal number."""
    return exp_scale(power - constant("LIFT", like), like)


@device
def scale_of(m, like):
    """(shift, bias, floor, one): all that exponentials are taken with beside a maximum m.

    exp(z - m) is exp_scaled(z - shift, bias, floor) / one; m and one are float64.
    """
    shift, power = reference(m)
    bias, floor = lifted_scale(power, like)
    one = exp_of(m, shift, power, like) * constant("LIFTED", like)
    return convert(shift, like), bias, floor, one


@device
def _classes(base, offset, j, step, softcap):
    """The vector of classes from j on, after the cap."""
    position = offset + j * distance(base, step)
    return capped(load(base, position, step, zeros(base)), softcap)[0]


@device
def _tail(base, offset, whole, count, step, softcap):
    """The classes from `whole` to `count`: the row's last vector, earlier lanes made -inf."""
    zero = zeros(base)
    width = lanes(zero)
    if whole == count:
        return splat(-np.inf, zero)
    z = _classes(base, offset, count - width, step, softcap)
    return where(lane_numbers(zero) < float(width - (count - whole)), -np.inf, z)


@device
def _term(z, first, skipped, shift, bias, floor):
    """Scaled exponentials of a vector of classes from `first` on, zero at the class `skipped`."""
    e = exp_scaled(z - shift, bias, floor)
    return where(lane_numbers(e) == float(skipped - first), 0.0, e)


@device
def _exponentials(z, shift, bias, floor):
    """Scaled exponentials of z - shift; None is no shift."""
    return exp_scaled(z if shift is None else z - shift, bias, floor)


@device
def _block(base, offset, start, stop, step, softcap, shift, bias, floor, tail, ending):
    """Lane-wise sum of the scaled exponentials of a block and its lane-wise maximum.

    Vectors of classes from `start` to `stop`, and if `ending` the `tail` of the row.
    """
    zero = zeros(base)
    width = lanes(zero)
    sums = convert(zero, 0.0)
    top = zero - np.inf
    other_top = top
    quads = stop - (stop - start) % (4 * width)
    for j in range(start, quads, 4 * width):
        z = _classes(base, offset, j, step, softcap)
        top = maximum(z, top)
        e = _exponentials(z, shift, bias, floor)
        z = _classes(base, offset, j + width, step, softcap)
        other_top = maximum(z, other_top)
        e = e + _exponentials(z, shift, bias, floor)
        z = _classes(base, offset, j + 2 * width, step, softcap)
        top = maximum(z, top)
        f = _exponentials(z, shift, bias, floor)
        z = _classes(base, offset, j + 3 * width, step, softcap)
        other_top = maximum(z, other_top)
        f = f + _exponentials(z, shift, bias, floor)
        sums = sums + convert(e + f, 0.0)
    e = zero
    for j in range(quads, stop, width):
        z = _classes(base, offset, j, step, softcap)
        top = maximum(z, top)
        e = e + _exponentials(z, shift, bias, floor)
    sums = sums + convert(e, 0.0)
    if ending:
        other_top = maximum(tail, other_top)
        sums = sums + convert(_exponentials(tail, shift, bias, floor), 0.0)
    return sums, maximum(top, other_top)


@device
def short_distance(level, z):
    """SHORT (level - z), which is finite where both are."""
    return fma(z, splat(-SHORT, z), splat(SHORT * level, z))


@device
def _block_distances(base, offset, start, stop, count, step, softcap, tail, ending, level):
    """Sum of SHORT (level - z_j) over the classes of a `_block`."""
    zero = zeros(base)
    width = lanes(zero)
    sums = convert(zero, 0.0)
    quads = stop - (stop - start) % (4 * width)
    for j in range(start, quads, 4 * width):
        d = short_distance(level, _classes(base, offset, j, step, softcap))
        d = d + short_distance(level, _classes(base, offset, j + width, step, softcap))
        f = short_distance(level, _classes(base, offset, j + 2 * width, step, softcap))
        f = f + short_distance(level, _classes(base, offset, j + 3 * width, step, softcap))
        sums = sums + convert(d + f, 0.0)
    d = zero
    for j in range(quads, stop, width):
        d = d + short_distance(level, _classes(base, offset, j, step, softcap))
    sums = sums + convert(d, 0.0)
    if ending:
        counted = lane_numbers(zero) >= float(stop - (count - width))
        sums = sums + convert(where(counted, short_distance(level, tail), 0.0), 0.0)
    return total(sums)


@device
def _block_gaps(
    base, offset, start, stop, count, step, softcap, tail, ending, level,
    soft, soft_offset, soft_step, weight, keep, spread,
):  # fmt: skip
    """Sums of u_j * (level - z_j) and of u_j over the classes of a `_block`."""
    zero = zeros(base)
    width = lanes(zero)
    if soft is None and weight is None:  # all alike, and never zero
        distances = _block_distances(
            base, offset, start, stop, count, step, softcap, tail, ending, level
        )
        return spread / SHORT * distances, spread * (where(ending, count, stop) - start)
    gaps = convert(zero, 0.0)
    masses = gaps
    for begin in range(start, stop, 2 * width):
        gap = zero
        mass = zero
        for j in range(begin, min(begin + 2 * width, stop), width):
            u = labels(soft, soft_offset, soft_step, weight, j, keep, spread, zero)
            d = short_distance(level, _classes(base, offset, j, step, softcap))
            gap = fma(u, where(u == 0.0, 0.0, d), gap)
            mass = mass + u
        gaps = gaps + convert(gap, 0.0)
        masses = masses + convert(mass, 0.0)
    if ending:
        j = count - width
        u = labels(soft, soft_offset, soft_step, weight, j, keep, spread, zero)
        u = where(lane_numbers(zero) < float(stop - j), 0.0, u)
        gaps = gaps + convert(short_gap(u, level, tail), 0.0)
        masses = masses + convert(u, 0.0)
    return total(gaps) / SHORT, total(masses)


@device
def _block_without(
    base, offset, start, stop, count, step, softcap, shift, bias, floor, tail, ending, skipped
):  # fmt: skip
    """The sum of `_block` without one class."""
    zero = zeros(base)
    width = lanes(zero)
    sums = convert(zero, 0.0)
    for j in range(start, stop, width):
        z = _classes(base, offset, j, step, softcap)
        sums = sums + convert(_term(z, j, skipped, shift, bias, floor), 0.0)
    if ending:
        sums = sums + convert(_term(tail, count - width, skipped, shift, bias, floor), 0.0)
    return sums


@device
def first_maximum(base, offset, start, count, step, softcap, m):
    """The first class from `start` on whose logit is m; `count` if there is none."""
    zero = zeros(base)
    width = lanes(zero)
    while start + 4 * width <= count:  # one comparison for four vectors: half the time
        top = maximum(
            maximum(
                _classes(base, offset, start, step, softcap),
                _classes(base, offset, start + width, step, softcap),
            ),
            maximum(
                _classes(base, offset, start + 2 * width, step, softcap),
                _classes(base, offset, start + 3 * width, step, softcap),
            ),
        )
        if any_lane(top == m):
            break
        start += 4 * width
    for j in range(start, count - width + 1, width):
        lane = first_lane(_classes(base, offset, j, step, softcap) == m)
        if lane < width:
            return j + lane
    lane = first_lane(_classes(base, offset, count - width, step, softcap) == m)
    return min(count, count - width + lane)


@device
def statistics(base, offset, count, step, softcap):
    """(m, rest) of a row in one pass over memory, in float64.

    Exponentials are scaled for a reference, the maximum of the first classes; where a later block
    exceeds it by more than LEAD, the block is summed again for its own maximum.
    rest is NaN where the row holds NaN or +inf, and where all of it is -inf.
    """
    m, rest, _, _ = labelled_statistics(
        base, offset, count, step, softcap, None, 0, None, None, 1.0, 0.0
    )
    return m, rest


@device
def labelled_statistics(
    base, offset, count, step, softcap, soft, soft_offset, soft_step, weight, keep, spread
):  # fmt: skip
    """`statistics`, and the sums of u_j * (m - z_j) and of u_j, u being the row's `labels`.

    A block is looked at a second time for its gaps while it is in the nearest cache.  They are
    measured from the maximum so far, so that all are as non-negative as the labels.
    """
    zero = zeros(base)
    width = lanes(zero)
    whole = count - count % width
    tail = _tail(base, offset, whole, count, step, softcap)
    first = _classes(base, offset, 0, step, softcap)
    known = np.float64(largest(maximum(first, zero - np.inf)))
    shift, power = reference(known)
    bias, floor = lifted_scale(power, zero)
    m = -np.inf
    others = convert(zero, 0.0)
    own = others
    lost = others
    level = 0.0  # what gaps are measured from
    gap = 0.0
    gap_lost = 0.0
    mass = 0.0
    mass_lost = 0.0
    start = np.int64(0)  # a literal would have every function that takes it compiled twice
    best = start  # the block with the maximum, whose sum is kept apart from the others'
    while start < count:
        stop = min(start + BLOCK, whole)
        ending = start + BLOCK >= count and whole < count
        if shift == 0.0:  # nearly always; a twelfth of the instructions less
            block, top = _block(
                base, offset, start, stop, step, softcap, None, bias, floor, tail, ending
            )
        else:
            block, top = _block(
                base, offset, start, stop, step, softcap, shift, bias, floor, tail, ending
            )
        if any_lane(top > m):
            highest = np.float64(largest(top))
            if highest > known + LEAD:
                if highest == np.inf:
                    return highest, np.nan, np.nan, np.nan
                old_shift, old_power = shift, power
                shift, power = reference(highest)
                factor = 0.0
                if known > -np.inf:
                    rescale_bias, rescale_floor = exp_scale(power - old_power, m)
                    factor = exp_scaled(old_shift - shift, rescale_bias, rescale_floor)
                others = others * factor
                own = own * factor
                lost = lost * factor
                known = highest
                bias, floor = lifted_scale(power, zero)
                continue  # sum this block again
            m = highest
            best = start
            others, lost = add_up(others, lost, own, zero)
            own = block
        else:
            others, lost = add_up(others, lost, block, zero)
        if soft is not None or spread != 0.0:
            raised = where(m == -np.inf, 0.0, m)  # so that masked classes are at a distance
            if raised != level:
                gap, gap_lost = add_up(gap, gap_lost, (mass + mass_lost) * (raised - level), zero)
            level = raised
            block_gap, block_mass = _block_gaps(
                base, offset, start, stop, count, step, softcap, tail, ending, level,
                soft, soft_offset, soft_step, weight, keep, spread,
            )  # fmt: skip
            gap, gap_lost = add_up(gap, gap_lost, block_gap, zero)
            mass, mass_lost = add_up(mass, mass_lost, block_mass, zero)
        start += BLOCK
    gap += gap_lost
    mass += mass_lost
    if m == -np.inf:
        return m, np.nan, gap, mass
    one = exp_of(m, shift, power, zero) * constant("LIFTED", zero)
    apart = total(others) + total(lost)
    rest = (apart + total(own)) / one - 1.0
    if rest < SWALLOWED:  # the maximum has taken digits of the others: sum its block without it
        skipped = first_maximum(base, offset, best, count, step, softcap, m)
        stop = min(best + BLOCK, whole)
        ending = best + BLOCK >= count and whole < count
        own = _block_without(
            base, offset, best, stop, count, step, softcap, shift, bias, floor, tail, ending,
            skipped,
        )  # fmt: skip
        rest = (apart + total(own)) / one
    return m, rest, gap, mass


@device
def labels(soft, soft_offset, soft_step, weight, j, keep, spread, like):
    """What the labels lay on the classes from j on: (keep * h_j + spread) * w_j."""
    width = item_size(weight) if weight is not None else 0
    if soft is None:
        u = splat(spread, like)
    else:
        h = load(soft, soft_offset + j * distance(soft, soft_step), soft_step, like)
        u = fma(h, splat(keep, like), splat(spread, like))
    if weight is not None:
        u = u * load(weight, j * width, None, like)
    return u


@device
def label_of(h, w, keep, spread, like):
    """One class's `labels` in float64, from its probability and its weight, or None for either.

    The very number that vectors like `like` have: where it is all that the labels lay on a row, the
    gradient at the target is what is left of their difference.
    """
    u = splat(spread, like)
    if h is not None:
        u = fma(splat(h, like), splat(keep, like), u)
    if w is not None:
        u = u * splat(w, like)
    return extract(convert(u, 0.0), 0)


@device
def weighted_gap(u, m, z):
    """u * (m - z), zero where u is zero even if z is -inf."""
    return where(u == 0.0, 0.0, u * (m - z))


@device
def short_gap(u, m, z):
    """SHORT u (m - z), zero where u is zero even if z is -inf; m and z may be the ends of range."""
    return where(u == 0.0, 0.0, u * short_distance(m, z))


@device
def entropy_gap(base, offset, count, step, softcap, m, rest):
    """Mean of m - z_j under softmax(z): its entropy less log1p(rest)."""
    zero = zeros(base)
    width = lanes(zero)
    whole = count - count % width
    shift, bias, floor, one = scale_of(m, zero)
    gap = convert(zero, 0.0)
    for j in range(0, whole, width):
        z = _classes(base, offset, j, step, softcap)
        u = exp_scaled(z - shift, bias, floor)
        gap = gap + convert(weighted_gap(u, m, z), 0.0)
    z = _tail(base, offset, whole, count, step, softcap)
    u = exp_scaled(z - shift, bias, floor)
    gap = gap + convert(weighted_gap(u, m, z), 0.0)
    return total(gap) / (one * (1.0 + rest))


@device
def cross_entropy(m, rest, z_y, t, gap, mass):
    """The loss t * (lse - z_y) + sum u_j (lse - z_j) of a row, its lse, and t + sum u_j.

    All float64, numbers or vectors.  t is the weight of the target class y, zero if the labels are
    soft; gap and mass come from `labelled_statistics`.  The gradient is
    (t + mass) p_j - u_j - t [j = y].
    """
    tail = log1p(rest)
    everything = t + mass
    to_target = where(t == 0.0, 0.0, t * (m - z_y))
    nll = to_target + gap + everything * tail
    # Which of several NaN survives is the compiler's choice; results should not show it.
    return where(nll == nll, nll, np.nan), m + tail, everything


@device
def target_gradient(m, rest, z_y, a, b):
    """a p_y - b in float64, without cancellation where p_y is near one and a near b."""
    bias, floor = exp_scale(0.0, m)
    p = exp_scaled(z_y - m, bias, floor) / (1.0 + rest)
    return where(z_y == m, (a - b) - a * (rest / (1.0 + rest)), a * p - b)


@device
def gradient_scale(m, rest, a, like):
    """What turns z_j into a p_j: (shift, bias, floor) of the exponential, and the factor.

    The exponentials are lifted and the factor lowered by as much, so that a p_j underflows
    gradually and once, unless the factor itself would underflow.  m, rest and a are float64.
    """
    shift, power = reference(m)
    factor = a / (exp_of(m, shift, power, like) * (1.0 + rest))
    lowered = factor / constant("LIFTED", like)
    lift = where(abs_at_least(lowered, constant("TINY", like)), constant("LIFT", like), 0.0)
    bias, floor = exp_scale(power - lift, like)
    factor = where(lift > 0.0, lowered, factor)
    return convert(shift, like), bias, floor, convert(factor, like)


@device
def abs_at_least(x, bound):
    """Whether |x| >= bound."""
    return maximum(x, -1.0 * x) >= bound


@device
def _gradient(
    base, offset, j, step, softcap, shift, bias, floor, factor,
    soft, soft_offset, soft_step, weight, keep, spread,
):  # fmt: skip
    """The vector of a p_j - u_j from class j on, times the slope of the cap."""
    zero = zeros(base)
    u = labels(soft, soft_offset, soft_step, weight, j, keep, spread, zero)
    raw = load(base, offset + j * distance(base, step), step, zero)
    z, slope = capped(raw, softcap)
    g = fma(exp_scaled(z - shift, bias, floor), splat(factor, z), -1.0 * u)
    return g if softcap is None else g * slope


@device
def write_gradient(
    base, offset, count, step, softcap, m, rest, a, out, out_offset, out_step, streaming,
    soft, soft_offset, soft_step, weight, keep, spread,
):  # fmt: skip
    """Write a p_j - u_j, u being the `labels`, for every class.

    `out` may be the row itself unless `streaming`, which writes past the caches (see `drain`) and
    wants the numbers of `out` aligned to their size.
    """
    zero = zeros(base)
    width = lanes(zero)
    shift, bias, floor, factor = gradient_scale(m, rest, a, zero)
    each = distance(out, out_step)
    # The last vector overlaps the one before: read before anything is written, write it last.
    last = _gradient(
        base, offset, count - width, step, softcap, shift, bias, floor, factor,
        soft, soft_offset, soft_step, weight, keep, spread,
    )  # fmt: skip
    done = 0
    if out_step is None and streaming:
        g = _gradient(
            base, offset, 0, step, softcap, shift, bias, floor, factor,
            soft, soft_offset, soft_step, weight, keep, spread,
        )  # fmt: skip
        store(out, out_offset, None, g)
        done = first_line(out, out_offset)
        for j in range(done, count - width, width):
            g = _gradient(
                base, offset, j, step, softcap, shift, bias, floor, factor,
                soft, soft_offset, soft_step, weight, keep, spread,
            )  # fmt: skip
            store_streaming(out, out_offset + j * each, g)
        done = count
    for j in range(done, count - width, width):
        g = _gradient(
            base, offset, j, step, softcap, shift, bias, floor, factor,
            soft, soft_offset, soft_step, weight, keep, spread,
        )  # fmt: skip
        store(out, out_offset + j * each, out_step, g)
    store(out, out_offset + (count - width) * each, out_step, last)


@device
def write_log_softmax(base, offset, count, step, m, rest, out, out_offset, out_step, streaming):
    """Write (z_j - m) - log1p(rest) for every class; `out` as for `write_gradient`."""
    zero = zeros(base)
    width = lanes(zero)
    each = distance(base, step)
    out_each = distance(out, out_step)
    tail = log1p(rest)
    last = (load(base, offset + (count - width) * each, step, zero) - m) - tail
    done = 0
    if out_step is None and streaming:
        store(out, out_offset, None, (load(base, offset, step, zero) - m) - tail)
        done = first_line(out, out_offset)
        for j in range(done, count - width, width):
            z = load(base, offset + j * each, step, zero)
            store_streaming(out, out_offset + j * out_each, (z - m) - tail)
        done = count
    for j in range(done, count - width, width):
        z = load(base, offset + j * each, step, zero)
        store(out, out_offset + j * out_each, out_step, (z - m) - tail)
    store(out, out_offset + (count - width) * out_each, out_step, last)


@device
def write_zeros(like, count, out, out_offset, out_step):
    """Write a gradient of exact zeros."""
    zero = zeros(like)
    width = lanes(zero)
    each = distance(out, out_step)
    for j in range(0, count - width, width):
        store(out, out_offset + j * each, out_step, zero)
    store(out, out_offset + (count - width) * each, out_step, zero)
