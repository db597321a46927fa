"""What labels lay on classes, and what follows from (m, rest) of a row: numbers and coefficients.

Kernels take plain addresses, strides in bytes and numbers, and gather them here into named tuples,
which exist while compiling only.  An address of 0 stands for what is absent.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from fastce.cuda import machine
from fastce.cuda.formats import FORMATS, integer, number
from fastce.cuda.machine import device, reciprocal
from fastce.cuda.plan import Variant
from fastce.cuda.rows import cross_entropy, gradient_scale, log1p, target_gradient, weighted_gap

# What stands for the target class of a row whose labels are soft, which is ignored, whose target
# is not a class, or is one that lies in another slice of the classes.
SOFT, IGNORED, BAD, ELSEWHERE = np.int32(-1), np.int32(-2), np.int32(-3), np.int32(-4)

# Arguments of every kernel over rows, in order: 64-bit integers, then float64.
INTEGERS = (
    "z", "z_outer", "z_inner", "z_class", "out", "out_outer", "out_inner", "out_class",
    "rows", "inner", "classes", "targets", "target_code", "ignore",
    "soft", "soft_outer", "soft_inner", "soft_class", "weight",
    "upstream", "upstream_step", "upstream_code", "scales",
    "losses", "z_terms", "lse", "entropy", "predicted",
    "records", "class_offset", "all_classes", "parts",
)  # fmt: skip
FLOATS = ("keep", "spread", "z_loss", "cap", "nll_scale", "z_scale")


class Labels(NamedTuple):
    """What the labels of a row lay on its classes: (kept * h_j + spread) * w_j."""

    soft: int
    soft_step: int
    weight: int  # of the dtype that is computed with, side by side
    kept: float  # of soft labels; the target class has its share apart
    spread: float


class Upstream(NamedTuple):
    """What the gradient of a row is multiplied by: numbers, one per row, one for all."""

    rows: int
    step: int
    code: int
    scales: int  # address of 1 / weight and 1 / count, for the mean
    nll_scale: float
    z_scale: float


class Sums(NamedTuple):
    """Of a row: sum u (m - z), sum u, sum e (m - z), and the first class where z is m."""

    gap: float
    mass: float
    surprise: float
    first: Any


class Target(NamedTuple):
    """The target of a row: its class or what stands for one, its capped logit, weight, slope."""

    y: Any
    z: float
    weight: float  # 0 unless y is a class
    slope: float  # of the cap
    spread: float  # what is spread over all classes, on this one: the number that `mass` counts


class Finished(NamedTuple):
    """Numbers of a row, and its gradient: factor * exp(z_j - m) * 2**power - of_labels * u_j.

    That of its target is `at_target`.  With soft labels, that of a class with more than half of the
    probability is (labelled - of_labels * u_j) + at_target; otherwise `labelled` is NaN.
    """

    nll: float
    z_term: float
    lse: float
    factor: float
    power: int
    of_labels: float
    at_target: float
    labelled: float


_load_f64 = machine.load["f64"]
_ONE = 1.0


@device
def target_class(targets, code, row, classes, ignore):
    """The target class of a row, or one of SOFT, IGNORED, BAD."""
    if targets == 0:
        return SOFT
    y = integer(targets, row, code)
    if y == ignore:
        return IGNORED
    if y < 0 or y >= classes:
        return BAD
    return np.int32(y)


@device
def place_in_slice(y, class_offset, classes):
    """Where in a slice of the classes a target class is."""
    place = np.int64(y) - class_offset
    if y < 0:
        return y
    if place < 0 or place >= classes:
        return ELSEWHERE
    return np.int32(place)


@device
def finish_row(row, m, rest, sums, target, classes, labels, z_loss, upstream):
    """Everything about a row, in float64; `labels.kept` is also the share that a target class has.

    Without labels on other classes `sums` are zero.
    """
    lse = m + log1p(rest)
    if abs(m) == np.inf:
        lse = m
    t = labels.kept * target.weight
    nll = cross_entropy(m, rest, target.z, t, sums.gap, sums.mass)
    z_term = 0.0
    if z_loss != 0.0:
        z_term = z_loss * lse * lse
    of_labels = upstream.nll_scale
    of_z = upstream.z_scale
    if upstream.scales != 0:
        of_labels = of_labels * _load_f64(upstream.scales)
        of_z = of_z * _load_f64(upstream.scales + 8)
    if upstream.rows != 0:
        up = number(upstream.rows + row * upstream.step, upstream.code, _ONE)
        of_labels = of_labels * up
        of_z = of_z * up
    of_lse = 0.0
    if z_loss != 0.0:
        of_lse = 2.0 * of_z * z_loss * lse
    a = of_labels * (t + sums.mass) + of_lse
    if z_loss == 0.0 and classes == 1 and rest == 0.0:
        a = 0.0  # one class: the gradient is exactly zero
        of_labels = 0.0
    b = of_labels * (t + target.spread)
    at_target = target_gradient(m, rest, target.z, a, b) * target.slope
    labelled = np.nan
    if target.y == SOFT and rest < 1.0:
        labelled = of_labels * sums.mass
        at_target = of_lse - a * (rest * reciprocal(1.0 + rest))
    if target.y == BAD:
        nll = np.nan
        a = np.nan
    if target.y == IGNORED:
        nll = 0.0
        z_term = 0.0
        lse = 0.0
    factor, power = gradient_scale(m, rest, a)
    return Finished(nll, z_term, lse, factor, power, of_labels, at_target, labelled)


def labelling(variant: Variant) -> SimpleNamespace:
    """What the labels lay on classes, and the sums that takes, for a variant's dtypes."""
    real = FORMATS[variant.dtype].compute
    size = np.dtype(real).itemsize
    load_weight = machine.load["f64" if size == 8 else "f32"]
    is_soft, is_spread, is_stats = bool(variant.soft), variant.spread, variant.task == "stats"
    load_soft = FORMATS[variant.soft or "float32"].load

    @device
    def class_weight(weight, y):
        """The weight of a class; 1 where there are none."""
        w = real(1)
        if weight != 0:
            w = load_weight(weight + np.int64(y) * size)
        return w

    @device
    def labels_from(labels, first):
        """The labels of a row from a class on."""
        weight = labels.weight
        if weight != 0:
            weight = weight + np.int64(first) * size
        soft = labels.soft + np.int64(first) * labels.soft_step
        return Labels(soft, labels.soft_step, weight, labels.kept, labels.spread)

    @device
    def label(labels, j):
        """What the labels lay on class j beside the target."""
        u = real(labels.spread)
        if is_soft:
            h = load_soft(labels.soft + np.int64(j) * labels.soft_step)
            u = u + real(labels.kept) * real(h)
        return u * class_weight(labels.weight, j)

    @device
    def weigh(sums, labels, j, x, m):
        """The sums of a row with the capped logit x of class j added, in float64.

        No fixed point fits these sums: they must be taken in an order that depends on classes
        alone.
        """
        gap = sums.gap
        mass = sums.mass
        surprise = sums.surprise
        first = sums.first
        below = np.float64(m) - np.float64(x)
        if is_spread:
            u = np.float64(label(labels, j))
            gap = gap + weighted_gap(u, below)
            mass = mass + u
        if is_stats:
            e = np.float64(machine.exponential(x - m, real(0)))
            surprise = surprise + weighted_gap(e, below)
            if x == m:
                first = min(first, np.int64(j))
        return Sums(gap, mass, surprise, first)

    return SimpleNamespace(
        class_weight=class_weight, labels_from=labels_from, label=label, weigh=weigh
    )
