"""What becomes of a row that is known: its numbers go to memory, its gradient's coefficients on."""

from typing import Any

import numpy as np

from fastce.cuda import machine
from fastce.cuda.finish import BAD, IGNORED, Target, finish_row, labelling
from fastce.cuda.formats import FORMATS
from fastce.cuda.machine import reciprocal
from fastce.cuda.plan import Variant
from fastce.cuda.records import Known, accessors, state_of
from fastce.cuda.rows import cap_slope, capped, gradient_scale, log1p

OF_SLICES = ("partial", "slice_gradient")
TARGETED = ("loss", "gradient", "stats", *OF_SLICES)
WRITING = ("gradient", "softmax", "log_softmax", "slice_gradient")

_store_i64 = machine.store["i64"]


def row_reports(variant: Variant) -> Any:
    """Device function: the numbers of a finished row go to memory; returns its coefficients."""
    form, task = FORMATS[variant.dtype], variant.task
    real, loss_size = form.compute, 8 if form.size == 8 else 4
    store = machine.store["f64" if form.size == 8 else "f32"]
    loses, is_stats = task in ("loss", "gradient", "stats"), task == "stats"
    is_lse, is_softmax, is_log = task == "logsumexp", task == "softmax", task == "log_softmax"
    is_partial, is_known = task == "partial", task == "slice_gradient"
    is_capped, class_weight = variant.capped, labelling(variant).class_weight
    put = accessors(variant.spread).put

    @machine.device
    def report(
        is_first, row, m, rest, sums, y, raw_y, known, classes, labels, upstream, z_loss, cap,
        losses, z_terms, lse_out, entropy_out, predicted, record,
    ):  # fmt: skip
        if is_log:
            return log1p(rest), np.int64(0), 0.0, 0.0, 0.0
        if is_softmax:
            factor, power = gradient_scale(m, rest, 1.0)
            return factor, power, 0.0, 0.0, 0.0
        z_y = raw_y
        slope = 1.0
        weight = 0.0
        if y >= 0:
            weight = np.float64(class_weight(labels.weight, y))
            if is_capped:
                slope = np.float64(cap_slope(raw_y, cap))
                z_y = capped(raw_y, cap)
        if is_partial:
            if is_first:
                put(record, Known(
                    m, rest, np.float64(z_y), weight, state_of(y), sums.gap, sums.mass
                ))  # fmt: skip
            return 0.0, np.int64(0), 0.0, 0.0, 0.0
        z_y = np.float64(z_y)
        if is_known:
            z_y = known.z
            weight = known.weight
        spread = np.float64(real(labels.spread) * real(weight))
        target = Target(y, z_y, weight, slope, spread)
        done = finish_row(row, m, rest, sums, target, classes, labels, z_loss, upstream)
        if is_first:
            if loses:
                nll = done.nll
                if z_terms != 0:
                    store(z_terms + row * loss_size, real(done.z_term))
                else:
                    nll = nll + done.z_term
                store(losses + row * loss_size, real(nll))
            if is_stats or is_lse:
                store(lse_out + row * loss_size, real(done.lse))
            if is_stats:
                uncertainty = sums.surprise * reciprocal(1.0 + rest) + log1p(rest)
                found = sums.first
                if y == BAD:
                    uncertainty = np.nan
                if y == IGNORED:
                    uncertainty = 0.0
                    found = np.int64(-1)
                store(entropy_out + row * loss_size, real(uncertainty))
                _store_i64(predicted + row * 8, found)
        return done.factor, done.power, done.of_labels, done.at_target, done.labelled

    return report
