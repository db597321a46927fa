"""What follows from (m, rest) of a row: the numbers reported, and the coefficients of its gradient."""

import math

import numpy as np

from fastce.cuda import machine
from fastce.cuda.formats import integer, number
from fastce.cuda.machine import convert, device
from fastce.cuda.rows import cross_entropy, gradient_scale, target_gradient

COUNTS, IGNORED, BAD = 0, 1, 2  # states of a row

# Arguments of every kernel that walks over rows, in order: 64-bit integers, then float64.
# Addresses and strides in bytes; an address of 0 stands for what is absent.
INTEGERS = (
    "z", "z_outer", "z_inner", "z_class", "out", "out_outer", "out_inner", "out_class",
    "rows", "inner", "classes", "targets", "target_code",
    "soft", "soft_outer", "soft_inner", "soft_class", "soft_code", "weight", "weight_code",
    "ignore", "upstream", "upstream_code", "scales",
    "losses", "z_terms", "lse", "entropy", "predicted",
)  # fmt: skip
FLOATS = ("keep", "spread", "z_loss", "cap", "nll_scale", "z_scale")

_load_f64 = machine.load["f64"]
_store_i64 = machine.store["i64"]
_ONE = 1.0


@device
def target_of_row(targets, code, row, classes, ignore):
    """(class, state) of a row; class -1 where the labels are soft or do not count."""
    if targets == 0:
        return np.int64(-1), COUNTS
    y = integer(targets, row, code)
    if y == ignore:
        return np.int64(-1), IGNORED
    if y < 0 or y >= classes:
        return np.int64(-1), BAD
    return y, COUNTS


@device
def label(soft, soft_class, soft_code, weight, weight_code, j, keep, spread, like):
    """What the labels lay on class j beside the target: (keep * h_j + spread) * w_j."""
    u = convert(spread, like)
    if soft != 0:
        u = u + convert(keep, like) * number(soft + j * soft_class, soft_code, like)
    if weight != 0:
        u = u * number(weight + j * (8 if weight_code == 0 else 4 if weight_code == 1 else 2),
                       weight_code, like)  # fmt: skip
    return u


@device
def finish_row(
    row, m, rest, gap, mass, y, state, z_y, slope, classes, weight, weight_code,
    upstream, upstream_code, scales, keep, spread, z_loss, nll_scale, z_scale,
):  # fmt: skip
    """(nll, z term, lse, scale, power, gradient at the target, scale of the labels) of a row."""
    lse = m + math.log1p(rest)
    if abs(m) == np.inf:
        lse = m
    t = 0.0
    u_y = 0.0
    if y >= 0:
        t = keep
        u_y = spread
        if weight != 0:
            w = label(0, 0, 0, weight, weight_code, y, 0.0, 1.0, _ONE)
            t = t * w
            u_y = u_y * w
    nll = cross_entropy(m, rest, z_y, t, gap, mass)
    z_term = 0.0
    if z_loss != 0.0:
        z_term = z_loss * lse * lse
    if scales != 0:
        nll_scale = nll_scale * _load_f64(scales)
        z_scale = z_scale * _load_f64(scales + 8)
    if upstream != 0:
        size = 8 if upstream_code == 0 else 4 if upstream_code == 1 else 2
        up = number(upstream + row * size, upstream_code, _ONE)
        nll_scale = nll_scale * up
        z_scale = z_scale * up
    a = nll_scale * (t + mass)
    if z_loss != 0.0:
        a = a + 2.0 * z_scale * z_loss * lse
    elif classes == 1 and rest == 0.0:
        a = 0.0  # one class: the gradient is exactly zero
        nll_scale = 0.0
    at_target = target_gradient(m, rest, z_y, a, nll_scale * (t + u_y)) * slope
    if state == BAD:
        nll = np.nan
        z_term = np.nan
        a = np.nan
        at_target = np.nan
    if state == IGNORED:
        nll = 0.0
        z_term = 0.0
        lse = 0.0
    scale, power = gradient_scale(m, rest, a)
    return nll, z_term, lse, scale, power, at_target, nll_scale
