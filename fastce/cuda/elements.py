"""Binary cross-entropy, element by element, and the sum of the losses in a fixed order.

For a logit z the label that its sign agrees with is the nearer one.  With a = |z| and e = exp(-a)

    loss     = far * (a + log1p(e)) + near * log1p(e)
    d / d z  = sign(z) * (far - near * e) / (1 + e)

where near and far are the weights of the two labels: no term is negative for targets in [0, 1], so
that nothing cancels.  Each thread takes a few chunks of consecutive elements, 16 bytes of logits
each; which ones depends on their numbers alone and not on how they lie in memory.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from fastce.cuda import machine, plan
from fastce.cuda.formats import CODES, FORMATS, integer
from fastce.cuda.machine import (
    block,
    convert,
    device,
    exponential,
    fma,
    minimum,
    power_of_two,
    quotient,
    reciprocal,
    thread,
)
from fastce.cuda.plan import Elements
from fastce.cuda.rows import log1p
from fastce.cuda.sharing import sharing

# Arguments of the kernel: 64-bit integers, then float64.  Of each array its address, 0 for none,
# and the bytes between outer and between inner elements.
INTEGERS = (
    "z", "z_outer", "z_inner", "targets", "target_outer", "target_inner",
    "weight", "weight_outer", "weight_inner", "positive", "positive_outer", "positive_inner",
    "upstream", "upstream_outer", "upstream_inner", "out", "out_outer", "out_inner",
    "losses", "losses_outer", "losses_inner", "count", "inner", "sums",
)  # fmt: skip
FLOATS = ("weight_factor", "positive_factor", "scale")

_store_f64 = machine.store["f64"]
_ONE, _TWO, _ZERO = np.float32(1.0), np.float32(2.0), np.float32(0.0)
_ROUND = np.float32(1.5 * 2.0**23)  # adding it rounds to an integer
_MINUS_LOG2E = np.float32(-1.4426950408889634)
_MINUS_LOG2E_REST = np.float32(-1.4426950408889634 - float(_MINUS_LOG2E))
# (2**f - 1) / f for |f| <= 1/2, minimax in the relative error of 2**f (2.0e-9).
_P0, _P1, _P2, _P3, _P4, _P5 = (np.float32(c) for c in (
    0.6931471824645996, 0.24022647738456726, 0.055503323674201965, 0.00961843691766262,
    0.0013398873852565885, 0.00015353361959569156,
))  # fmt: skip
# (atanh(s) / s - 1) / s**2 in s**2 up to 1/9, for the relative error of atanh (4.6e-9).
_Q0, _Q1, _Q2, _Q3 = (np.float32(c) for c in (
    0.3333320617675781, 0.20010849833488464, 0.13999570906162262, 0.14012229442596436,
))  # fmt: skip
# Beyond it exp(-a) is kept multiplied by 2**96, so that a weight may bring it back into range.
_FAR = np.float32(64.0)
_LARGEST = np.float32(200.0)
_LIFT, _GAIN = np.float32(96.0), np.float32(2.0**-96)
_SMALLEST_POWER = np.float32(-127.0)  # which stands for zero


@device
def single_tail(a):
    """(e, log1p(e)) / gain and gain, for e = exp(-a) of a float32 a >= 0, within 2**-23.

    The ex2 instruction would lose two bits of what is promised here.
    """
    lift = _ZERO
    gain = _ONE
    if a > _FAR:
        lift = _LIFT
        gain = _GAIN
    bounded = minimum(a, _LARGEST)
    k = fma(bounded, _MINUS_LOG2E, _ROUND) - _ROUND
    f = fma(bounded, _MINUS_LOG2E_REST, fma(bounded, _MINUS_LOG2E, -k))
    p = fma(f, fma(f, fma(f, fma(f, fma(f, _P5, _P4), _P3), _P2), _P1), _P0)
    e = fma(p, f, _ONE) * power_of_two(max(k + lift, _SMALLEST_POWER))
    if a != a:
        e = a
    # log1p(e) = 2 atanh(s), s = e / (2 + e), with what rounding s has lost
    d = _TWO + e
    r = reciprocal(d)
    s = e * r
    s = fma(r, fma(-d, s, e), s)
    z = s * s
    q = fma(z, fma(z, fma(z, _Q3, _Q2), _Q1), _Q0)
    twice = s + s
    tail = fma(twice * z, q, twice)
    if lift > _ZERO:
        tail = e
    return e, tail, gain


@device
def double_tail(a):
    """The same of a float64."""
    e = exponential(-a, 0.0)
    return e, log1p(e), 1.0


class Factor(NamedTuple):
    """A number, times those of an array spread over the elements; 0 for none."""

    array: int
    outer: int
    inner: int
    number: float


def label_loader(name: str, real: Any) -> Any:
    """Device function: a target of a dtype, floating-point or not, as a number to compute with."""
    if name in FORMATS:
        load = FORMATS[name].load

        @device
        def load_label(where):
            return convert(load(where), real(0))
    else:
        code = CODES[name]

        @device
        def load_label(where):
            return convert(np.float64(integer(where, 0, code)), real(0))

    return load_label


def mathematics(real: Any) -> Any:
    """Device function: loss and gradient of one element, computed in `real`."""
    tail_of = double_tail if real is np.float64 else single_tail
    zero, one = real(0), real(1)

    @device
    def element(z, t, weight, positive, scale):
        """The weighted loss of an element, and its gradient times `scale`."""
        yes = positive * t
        no = one - t
        near = yes
        far = no
        if z < zero:
            near = no
            far = yes
        a = abs(z)
        e, tail, gain = tail_of(a)
        # In this order what is far below one is brought back before it is taken for zero.
        of_near = zero if near == zero else ((weight * near) * tail) * gain
        of_far = zero if far == zero else weight * (far * (a + tail * gain))
        nearer = reciprocal(one + e * gain)
        g = (scale * weight) * (far * nearer) - (((scale * weight) * near) * (e * nearer)) * gain
        if z < zero:
            g = -g
        loss = of_near + of_far
        if weight == zero:
            loss = zero
            g = zero
        return loss, g

    return element


def kernel_of(variant: Elements) -> Any:
    """Loss and gradient of the elements of arrays that lie in memory as (outer, inner)."""
    form = FORMATS[variant.dtype]
    real, word, words, size = form.compute, form.word, form.words, form.size
    width, real_size = 16 // size, 8 if form.size == 8 else 4
    per_word, two = form.per_word, form.per_word == 2
    load, store, load_label = form.load, form.store, label_loader(variant.labels, real)
    load_vector, store_vector = form.load_vector, form.store_vector
    first_of, second_of, pack = form.first, form.second, form.pack
    kind = "f64" if real_size == 8 else "f32"
    load_real, store_real = machine.load[kind], machine.store[kind]
    vectors, plain = variant.vectors, variant.plain
    label_vectors = vectors and variant.labels == variant.dtype
    label_size = 2 if variant.labels == "bfloat16" else np.dtype(variant.labels).itemsize
    writes, element = variant.task == "gradient", mathematics(real)
    threads = plan.ELEMENT_THREADS
    total, share = sharing(threads).total, threads * plan.CHUNKS * width

    @device
    def unpack(held, numbers):
        for k in range(words):
            numbers[k * per_word] = first_of(held[k])
            if two:
                numbers[k * per_word + 1] = second_of(held[k])

    @device
    def times(factor, o, i):
        """The number of a factor, times that of its array if there is one."""
        value = factor.number
        if not plain and factor.array != 0:
            value = value * load_real(factor.array + o * factor.outer + i * factor.inner)
        return value

    @device
    def settle(x, t, o, i, weight, positive, upstream, losses, losses_outer, losses_inner):
        """Everything about one element; its loss is kept if losses of elements are."""
        loss, g = element(x, t, times(weight, o, i), times(positive, o, i), times(upstream, o, i))
        if not plain and losses != 0:
            store_real(losses + o * losses_outer + i * losses_inner, loss)
        return loss, g

    def kernel(
        z, z_outer, z_inner, targets, target_outer, target_inner,
        weight, weight_outer, weight_inner, positive, positive_outer, positive_inner,
        upstream, upstream_outer, upstream_inner, out, out_outer, out_inner,
        losses, losses_outer, losses_inner, count, inner, sums,
        weight_factor, positive_factor, scale,
    ):  # fmt: skip
        tid = np.int64(thread())
        part = np.int64(block())
        stop = min((part + 1) * share, count)
        held = cuda.local.array(words, word)
        logits = cuda.local.array(width, real)
        labels = cuda.local.array(width, real)
        w = Factor(weight, weight_outer, weight_inner, real(weight_factor))
        p = Factor(positive, positive_outer, positive_inner, real(positive_factor))
        up = Factor(upstream, upstream_outer, upstream_inner, real(scale))
        summed = 0.0
        for begin in range(part * share + tid * width, stop, threads * width):
            o = quotient(begin, inner)
            i = begin - o * inner
            # Apart, and the other one once in a loop: a condition for each element of a vector
            # would keep the compiler from mixing their instructions.
            if vectors and begin + width <= stop:
                load_vector(z + begin * size, held, 0)
                unpack(held, logits)
                if label_vectors:
                    load_vector(targets + begin * size, held, 0)
                    unpack(held, labels)
                else:
                    for k in range(width):
                        labels[k] = load_label(targets + (begin + k) * label_size)
                for k in range(width):
                    loss, g = settle(
                        logits[k], labels[k], o, i, w, p, up, losses, losses_outer, losses_inner
                    )
                    summed = summed + np.float64(loss)
                    logits[k] = g
                    i = i + 1
                    if not plain and i == inner:
                        i = np.int64(0)
                        o = o + 1
                if writes:
                    for k in range(words):
                        held[k] = pack(logits[k * per_word], logits[k * per_word + per_word - 1])
                    store_vector(out + begin * size, held, 0)
            else:
                for _ in range(min(np.int64(width), stop - begin)):
                    loss, g = settle(
                        load(z + o * z_outer + i * z_inner),
                        load_label(targets + o * target_outer + i * target_inner),
                        o, i, w, p, up, losses, losses_outer, losses_inner,
                    )  # fmt: skip
                    summed = summed + np.float64(loss)
                    if writes:
                        store(out + o * out_outer + i * out_inner, g)
                    i = i + 1
                    if i == inner:
                        i = np.int64(0)
                        o = o + 1
        if sums != 0:
            summed, _ = total(np.int32(tid), summed, 0.0)
            if tid == 0:
                _store_f64(sums + 8 * part, summed)

    return kernel
