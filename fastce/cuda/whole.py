"""Kernels over rows: one warp or one block for each row whose classes lie side by side, or one
thread for each row of any other layout.

A warp or block does everything in one read and at most one write, as long as the row fits into its
registers and shared memory; of longer rows what lies beyond is read again, from the L2 cache where
it holds it.  A thread reads its row three times; neighbours read side by side, so that a class axis
anywhere but last, or few classes, come from the cache.
"""

import math
from typing import Any

import numpy as np
from numba import cuda

from fastce.cuda import machine
from fastce.cuda.finish import BAD, IGNORED, finish_row, label, target_of_row
from fastce.cuda.formats import FORMATS
from fastce.cuda.machine import WARP, barrier, block, reciprocal, thread
from fastce.cuda.parts import COEFFICIENTS, Variant, elements, runs
from fastce.cuda.rows import cap_slope, capped, gradient_scale, reference, top_two, weighted_gap

_MINUS_INF = np.float32(-np.inf)
_store_i64 = machine.store["i64"]
_shared_f64, _put_f64 = machine.shared_load["f64"], machine.shared_store["f64"]


def row_reports(variant: Variant) -> Any:
    """Device function: the numbers of a finished row go to memory; returns the coefficients."""
    form, task = FORMATS[variant.dtype], variant.task
    real, loss_size = form.compute, 8 if form.size == 8 else 4
    store = machine.store["f64" if form.size == 8 else "f32"]
    loses, is_stats = task in ("loss", "gradient", "stats"), task == "stats"
    is_lse, is_softmax, is_log = task == "logsumexp", task == "softmax", task == "log_softmax"
    is_capped = variant.capped

    @machine.device
    def report(
        lane, row, m, rest, gap, mass, surprise, found, y, state, raw_y, classes, weight,
        weight_code, upstream, upstream_code, scales, losses, z_terms, lse_out, entropy_out,
        predicted, keep, spread, z_loss, cap, nll_scale, z_scale,
    ):  # fmt: skip
        if is_log:
            return math.log1p(rest), np.int64(0), 0.0, 0.0
        if is_softmax:
            scale, power = gradient_scale(m, rest, 1.0)
            return scale, power, 0.0, 0.0
        z_y = raw_y
        slope = 1.0
        if is_capped and y >= 0:
            slope = np.float64(cap_slope(raw_y, cap))
            z_y = capped(raw_y, cap)
        nll, z_term, lse, scale, power, at_target, of_labels = finish_row(
            row, m, rest, gap, mass, y, state, np.float64(z_y), slope, classes, weight,
            weight_code, upstream, upstream_code, scales, keep, spread, z_loss, nll_scale, z_scale,
        )  # fmt: skip
        if lane == 0:
            if loses:
                if z_terms != 0:
                    store(z_terms + row * loss_size, real(z_term))
                else:
                    nll = nll + z_term
                store(losses + row * loss_size, real(nll))
            if is_stats or is_lse:
                store(lse_out + row * loss_size, real(lse))
            if is_stats:
                uncertainty = surprise * reciprocal(1.0 + rest) + math.log1p(rest)
                if state == BAD:
                    uncertainty = np.nan
                if state == IGNORED:
                    uncertainty = 0.0
                    found = np.int64(-1)
                store(entropy_out + row * loss_size, real(uncertainty))
                _store_i64(predicted + row * 8, found)
        return scale, power, at_target, of_labels

    return report


def row_kernel(variant: Variant) -> Any:
    """One warp or one block per row."""
    form, run = FORMATS[variant.dtype], runs(variant)
    shape, fill, statistics, sums, write = run.shape, run.fill, run.statistics, run.sums, run.write
    report = row_reports(variant)
    threads, rows_per_block = variant.threads, variant.block // variant.threads
    size, words, real, word = form.size, form.words, form.compute, form.word
    registers, load = variant.vectors * form.words, form.load
    several = threads > WARP
    has_target = variant.task in ("loss", "gradient", "stats")
    writes = variant.task in ("gradient", "softmax", "log_softmax")
    sums_up = variant.spread or variant.task == "stats"

    def kernel(
        z, z_outer, z_inner, z_class, out, out_outer, out_inner, out_class,
        rows, inner, classes, targets, target_code,
        soft, soft_outer, soft_inner, soft_class, soft_code, weight, weight_code,
        ignore, upstream, upstream_code, scales,
        losses, z_terms, lse_out, entropy_out, predicted,
        keep, spread, z_loss, cap64, nll_scale, z_scale,
    ):  # fmt: skip
        lane = thread() % threads
        row = block() * rows_per_block + thread() // threads
        if row >= rows:
            return
        cap = real(cap64)
        address = z + row * z_outer
        to = out + row * out_outer
        y, state = target_of_row(targets, target_code, row, classes, ignore)
        raw_y = real(0)
        if has_target:
            if y >= 0:
                raw_y = load(address + y * size)
        h = soft + row * soft_outer if soft != 0 else soft
        kept = keep if soft != 0 else 0.0
        head, body, edge = shape(address, classes, lane)
        edge_z = real(_MINUS_INF)
        if edge >= 0:
            edge_z = load(address + edge * size)
        held = cuda.local.array(registers, word)
        spare = cuda.local.array(words, word)
        base = address + head * size
        fill(held, base, body, lane)
        m, rest = statistics(held, spare, edge_z, base, body, lane, cap)
        gap = 0.0
        mass = 0.0
        surprise = 0.0
        found = np.int64(0)
        if sums_up:
            gap, mass, surprise, found = sums(
                address, classes, lane, m, cap,
                h, soft_class, soft_code, weight, weight_code, kept, spread,
            )  # fmt: skip
        scale = 0.0
        power = np.int64(0)
        at_target = 0.0
        of_labels = 0.0
        # What belongs to the row takes a hundred float64 operations: one thread of a block does it,
        # and in a single warp all do.
        if not several or lane == 0:
            scale, power, at_target, of_labels = report(
                lane, row, np.float64(m), rest, gap, mass, surprise, found, y, state, raw_y,
                classes, weight, weight_code, upstream, upstream_code, scales,
                losses, z_terms, lse_out, entropy_out, predicted,
                keep, spread, z_loss, cap, nll_scale, z_scale,
            )  # fmt: skip
            if writes and several:
                _put_f64(COEFFICIENTS, scale)
                _put_f64(COEFFICIENTS + 8, np.float64(power))
                _put_f64(COEFFICIENTS + 16, at_target)
                _put_f64(COEFFICIENTS + 24, of_labels)
        if writes:
            if several:
                barrier()
                scale = _shared_f64(COEFFICIENTS)
                power = np.int64(_shared_f64(COEFFICIENTS + 8))
                at_target = _shared_f64(COEFFICIENTS + 16)
                of_labels = _shared_f64(COEFFICIENTS + 24)
            write(
                held, spare, edge, edge_z, head, base, body, lane, to, ((to ^ address) & 15) == 0,
                y, state, m, real(scale), real(power), real(at_target), real(of_labels), cap,
                h, soft_class, soft_code, weight, weight_code, kept, spread,
            )  # fmt: skip

    return kernel


def strided_kernel(variant: Variant) -> Any:
    """One thread per row, classes any number of bytes apart."""
    form, element = FORMATS[variant.dtype], elements(variant)
    add_one, rest_of, result = element.add_one, element.rest, element.result
    report = row_reports(variant)
    per_block, real, load, store = variant.block, form.compute, form.load, form.store
    writes = variant.task in ("gradient", "softmax", "log_softmax")
    has_target, is_capped = variant.task in ("loss", "gradient", "stats"), variant.capped
    is_spread, is_stats = variant.spread, variant.task == "stats"

    def kernel(
        z, z_outer, z_inner, z_class, out, out_outer, out_inner, out_class,
        rows, inner, classes, targets, target_code,
        soft, soft_outer, soft_inner, soft_class, soft_code, weight, weight_code,
        ignore, upstream, upstream_code, scales,
        losses, z_terms, lse_out, entropy_out, predicted,
        keep, spread, z_loss, cap64, nll_scale, z_scale,
    ):  # fmt: skip
        row = block() * per_block + thread()
        if row >= rows:
            return
        cap = real(cap64)
        outer = row // inner
        within = row - outer * inner
        address = z + outer * z_outer + within * z_inner
        to = out + outer * out_outer + within * out_inner
        h = soft + outer * soft_outer + within * soft_inner if soft != 0 else soft
        kept = keep if soft != 0 else 0.0
        y, state = target_of_row(targets, target_code, row, classes, ignore)
        raw_y = real(0)
        if has_target:
            if y >= 0:
                raw_y = load(address + y * z_class)
        m = real(_MINUS_INF)
        second = real(_MINUS_INF)
        for j in range(classes):
            m, second = top_two(m, second, load(address + j * z_class))
        if is_capped:
            m = capped(m, cap)
            second = capped(second, cap)
        ref = reference(m, second)
        high = np.int64(0)
        low = np.int64(0)
        gap = 0.0
        mass = 0.0
        surprise = 0.0
        found = np.int64(classes)
        for j in range(classes):
            x = load(address + j * z_class)
            high, low = add_one(high, low, x, ref, cap)
            if is_capped:
                x = capped(x, cap)
            below = np.float64(m) - np.float64(x)
            if is_spread:
                u = label(h, soft_class, soft_code, weight, weight_code, j, kept, spread, m)
                gap = gap + weighted_gap(np.float64(u), below)
                mass = mass + np.float64(u)
            if is_stats:
                e = machine.exponential(x - m, real(0))
                surprise = surprise + weighted_gap(np.float64(e), below)
                if x == m:
                    found = min(found, np.int64(j))
        rest = rest_of(m, ref, high, low)
        scale, power, at_target, of_labels = report(
            0, row, np.float64(m), rest, gap, mass, surprise, found, y, state, raw_y,
            classes, weight, weight_code, upstream, upstream_code, scales,
            losses, z_terms, lse_out, entropy_out, predicted,
            keep, spread, z_loss, cap, nll_scale, z_scale,
        )  # fmt: skip
        if writes:
            for j in range(classes):
                g = result(
                    load(address + j * z_class), j, m, real(scale), real(power), real(of_labels),
                    cap, h, soft_class, soft_code, weight, weight_code, kept, spread,
                )  # fmt: skip
                if j == y:
                    g = real(at_target)
                if state == IGNORED:
                    g = real(0)
                store(to + j * out_class, g)

    return kernel
