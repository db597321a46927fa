"""The mathematics of one row of logits: what is summed, what follows from it, what is written.

A row z with its maximum m is known by two numbers, m and

    rest = sum of exp(z_j - m) over all classes but one where the maximum is,

from which   logsumexp = m + log1p(rest)   and   p_j = exp(z_j - m) / (1 + rest).
Every term is non-negative, so nothing cancels: a loss of 1e-30 keeps its digits.

Exponentials are taken as exp(z - shift) / 2**power.  For |m| <= 1024 the shift is 0, so that z
enters the reduction unrounded; beyond, it is m, from which the subtraction is exact for every z
that matters.  The power keeps the sums of order one; being a power of two it costs no accuracy.

Sums run over a fixed number of lanes in blocks of a fixed length and are carried from block to
block in float64, so that every bit is the same whatever the threads, the batch or the processor.

A row lies in memory `offset` bytes from a base (see `vector`), `step` bytes from class to class
(None: side by side), and has at least as many classes as a vector has lanes.
"""

import numpy as np

from fastce.cpu.constants import constant
from fastce.cpu.elementary import capped, exp_scale, exp_scaled, log1p, round_to_integer
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

BLOCK = 512  # classes per block: 8 float32 additions a lane, then float64
# How far a maximum may exceed the reference that exponentials are scaled for: lifted by 2**64 and
# summed in blocks, they stay below 2**127.
LEAD = 40.0


@device
def distance(base, step):
    """Bytes from one class to the next."""
    return item_size(base) if step is None else step


@device
def reference(m):
    """The shift and the power of two to take exponentials with where the maximum is about m."""
    near = where(m <= 1024.0, where(m >= -1024.0, m, 0.0), 0.0)
    shift = where(near == m, 0.0, where(m == -np.inf, 0.0, m))
    return shift, round_to_integer(near * constant("LOG2E", m))


@device
def exp_of(m, shift, power, like):
    """exp(m - shift) / 2**power in float64.

    It shares the one error of the vectors like `like` that is not random, that of their ln 2.
    """
    bias, floor = exp_scale(power, m)
    return exp_scaled((m - shift) - power * constant("LN2_EXCESS", like), bias, floor)


@device
def scaled_maximum(m, like):
    """exp(m - shift) / 2**power of the reference at m: between 0.7 and 1.5."""
    shift, power = reference(m)
    return exp_of(m, shift, power, like)


@device
def lifted_scale(power, like):
    """`exp_scale` that lifts exponentials by 2**LIFT, away from the smallest normal number."""
    return exp_scale(power - constant("LIFT", like), like)


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
    even = zero
    odd = zero
    even_top = zero - np.inf
    odd_top = even_top
    for j in range(start, stop - width, 2 * width):
        z = _classes(base, offset, j, step, softcap)
        even_top = maximum(z, even_top)
        even = even + _exponentials(z, shift, bias, floor)
        z = _classes(base, offset, j + width, step, softcap)
        odd_top = maximum(z, odd_top)
        odd = odd + _exponentials(z, shift, bias, floor)
    if (stop - start) % (2 * width) != 0:
        z = _classes(base, offset, stop - width, step, softcap)
        even_top = maximum(z, even_top)
        even = even + _exponentials(z, shift, bias, floor)
    if ending:
        odd_top = maximum(tail, odd_top)
        odd = odd + _exponentials(tail, shift, bias, floor)
    return convert(even + odd, 0.0), maximum(even_top, odd_top)


@device
def _block_gaps(
    base, offset, start, stop, count, step, softcap, tail, ending, level,
    soft, soft_offset, soft_step, weight, keep, spread,
):  # fmt: skip
    """Sums of u_j * (level - z_j) and of u_j over the classes of a `_block`."""
    zero = zeros(base)
    width = lanes(zero)
    even = zero
    odd = zero
    mass = zero
    for j in range(start, stop - width, 2 * width):
        u = labels(soft, soft_offset, soft_step, weight, j, keep, spread, zero)
        even = _with_gap(even, u, level, _classes(base, offset, j, step, softcap), soft, weight)
        mass = mass + u
        u = labels(soft, soft_offset, soft_step, weight, j + width, keep, spread, zero)
        z = _classes(base, offset, j + width, step, softcap)
        odd = _with_gap(odd, u, level, z, soft, weight)
        mass = mass + u
    if (stop - start) % (2 * width) != 0:
        j = stop - width
        u = labels(soft, soft_offset, soft_step, weight, j, keep, spread, zero)
        even = _with_gap(even, u, level, _classes(base, offset, j, step, softcap), soft, weight)
        mass = mass + u
    if ending:
        j = count - width
        u = labels(soft, soft_offset, soft_step, weight, j, keep, spread, zero)
        u = where(lane_numbers(zero) < float(stop - j), 0.0, u)
        odd = odd + weighted_gap(u, level, tail)
        mass = mass + u
    everything = total(convert(mass, 0.0))
    if soft is None and weight is None:  # all alike
        everything = spread * (where(ending, count, stop) - start)
    return total(convert(even + odd, 0.0)), everything


@device
def _with_gap(gap, u, level, z, soft, weight):
    """gap + u * (level - z), u being `labels`."""
    d = level - z
    if soft is None and weight is None:  # never zero
        return fma(u, d, gap)
    return fma(u, where(u == 0.0, 0.0, d), gap)


@device
def _block_without(
    base, offset, start, stop, count, step, softcap, shift, bias, floor, tail, ending, skipped
):  # fmt: skip
    """The sum of `_block` without one class."""
    zero = zeros(base)
    width = lanes(zero)
    sums = zero
    for j in range(start, stop, width):
        z = _classes(base, offset, j, step, softcap)
        sums = sums + _term(z, j, skipped, shift, bias, floor)
    if ending:
        sums = sums + _term(tail, count - width, skipped, shift, bias, floor)
    return convert(sums, 0.0)


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
    level = 0.0  # what gaps are measured from
    gap = 0.0
    mass = 0.0
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
                known = highest
                bias, floor = lifted_scale(power, zero)
                continue  # sum this block again
            m = highest
            best = start
            others = others + own
            own = block
        else:
            others = others + block
        if soft is not None or spread != 0.0:
            raised = where(m == -np.inf, 0.0, m)  # so that masked classes are at a distance
            gap += mass * (raised - level)
            level = raised
            block_gap, block_mass = _block_gaps(
                base, offset, start, stop, count, step, softcap, tail, ending, level,
                soft, soft_offset, soft_step, weight, keep, spread,
            )  # fmt: skip
            gap += block_gap
            mass += block_mass
        start += BLOCK
    if m == -np.inf:
        return m, np.nan, gap, mass
    one = exp_of(m, shift, power, zero) * constant("LIFTED", zero)
    rest = (total(others) + total(own)) / one - 1.0
    if rest < 1.0:  # the maximum has swallowed digits of the others: sum its block without it
        skipped = first_maximum(base, offset, best, count, step, softcap, m)
        stop = min(best + BLOCK, whole)
        ending = best + BLOCK >= count and whole < count
        own = _block_without(
            base, offset, best, stop, count, step, softcap, shift, bias, floor, tail, ending,
            skipped,
        )  # fmt: skip
        rest = (total(others) + total(own)) / one
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
def weighted_gap(u, m, z):
    """u * (m - z), zero where u is zero even if z is -inf."""
    return where(u == 0.0, 0.0, u * (m - z))


@device
def entropy_gap(base, offset, count, step, softcap, m, rest):
    """Mean of m - z_j under softmax(z): its entropy less log1p(rest)."""
    zero = zeros(base)
    width = lanes(zero)
    whole = count - count % width
    shift, power = reference(m)
    bias, floor = lifted_scale(power, zero)  # the gap of a confident row may be the smallest normal
    gap = convert(zero, 0.0)
    for j in range(0, whole, width):
        z = _classes(base, offset, j, step, softcap)
        u = exp_scaled(z - shift, bias, floor)
        gap = gap + convert(weighted_gap(u, m, z), 0.0)
    z = _tail(base, offset, whole, count, step, softcap)
    u = exp_scaled(z - shift, bias, floor)
    gap = gap + convert(weighted_gap(u, m, z), 0.0)
    return total(gap) / (scaled_maximum(m, zero) * constant("LIFTED", zero) * (1.0 + rest))


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
    """What turns exp(z_j) into a p_j: the rounding constant, the cut-off, the factor.

    The exponentials are lifted and the factor lowered by as much, so that a p_j underflows
    gradually and once, unless the factor itself would underflow.
    """
    factor = a / (scaled_maximum(m, like) * (1.0 + rest))
    lowered = factor / constant("LIFTED", like)
    lift = where(abs_at_least(lowered, constant("TINY", like)), constant("LIFT", like), 0.0)
    power = reference(m)[1] - lift
    bias, floor = exp_scale(convert(power, like), like)
    return bias, floor, where(lift > 0.0, lowered, factor)


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
    shift = reference(m)[0]
    bias, floor, factor = gradient_scale(m, rest, a, zero)
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
