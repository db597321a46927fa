"""Kernels over many rows.

A warp or block for each row whose classes lie side by side, or a thread for each row of any other
layout or of few classes.

A warp or block does everything in one read and at most one write, as long as the row fits into its
registers and shared memory; of longer rows what lies beyond is read again, from the L2 cache where
it holds it.  The gradient of a slice whose statistics are known needs nothing of the rest of its
row: there a long row is divided among blocks that never meet.

A thread reads its row three times: from shared memory, into which its block copies a tile of short
rows and out of which it copies the results; or else from memory, where neighbours read side by side
if the class axis is not the last, so that two of the three come from the cache.
"""

from typing import Any

import numpy as np
from numba import cuda

from fastce.cuda import machine
from fastce.cuda.finish import (
    FLOATS,
    IGNORED,
    INTEGERS,
    Labels,
    Sums,
    Upstream,
    labelling,
    place_in_slice,
    target_class,
)
from fastce.cuda.formats import FORMATS
from fastce.cuda.machine import (
    WARP,
    barrier,
    block,
    cluster,
    cluster_arrive,
    cluster_rank,
    cluster_size,
    copy_async,
    quotient,
    thread,
    wait_for_copies,
    warp_barrier,
)
from fastce.cuda.parts import Coefficients, elements, runs
from fastce.cuda.plan import TARGET, ZERO, Variant
from fastce.cuda.records import STATE, Known, accessors, target_of
from fastce.cuda.reports import OF_SLICES, TARGETED, WRITING, row_reports
from fastce.cuda.rows import capped, reference, top_two

_MINUS_INF = np.float32(-np.inf)
_load_f64 = machine.load["f64"]
_shared_f64, _put_f64 = machine.shared_load["f64"], machine.shared_store["f64"]

SIGNATURE = (len(INTEGERS), len(FLOATS))


@machine.device
def row_offset(row, inner, outer_stride, inner_stride):
    """Bytes from the first row to a row, the rows lying in memory as (outer, inner)."""
    if inner == 1:
        return row * outer_stride
    outer = quotient(row, inner)
    return outer * outer_stride + (row - outer * inner) * inner_stride


def row_kernel(variant: Variant) -> Any:
    """One warp, one block, one cluster of blocks, or several blocks that never meet, per row."""
    form, run = FORMATS[variant.dtype], runs(variant)
    place, edge_of, fill = run.place, run.edge_of, run.fill
    statistics, sums_of, write = run.statistics, run.sums_of, run.write
    report = row_reports(variant)
    threads, per_block = variant.threads, variant.block // variant.threads
    thread_bits = threads.bit_length() - 1
    size, words, real, word = form.size, form.words, form.compute, form.word
    registers, load = variant.vectors * form.words, form.load
    several, clustered, width = threads > WARP, variant.clustered, 16 // form.size
    spread_word, hear = run.spread_word, run.hear
    has_target, writes = variant.task in TARGETED, variant.task in WRITING
    is_soft, sums_up = bool(variant.soft), variant.spread or variant.task == "stats"
    labels_from = labelling(variant).labels_from
    of_slice, is_known = variant.task in OF_SLICES, variant.task == "slice_gradient"
    divided, is_capped = clustered or (is_known and several), variant.capped
    record = accessors(variant.spread)
    take, record_size = record.take, record.size
    exact = np.float64 if is_soft else real  # what a soft-labelled row's maximum is computed with

    @machine.device
    def stand(z, z_outer, z_inner, rows, inner, classes, parts):
        """Where this thread stands; a run of the last block without a row has no classes."""
        tid = thread()
        first = np.int32(0)
        count = classes
        if clustered:
            row = np.int64(cluster())
            part = width * quotient(classes + width * cluster_size() - 1, width * cluster_size())
            first = np.int32(part * cluster_rank())
            count = max(np.int64(0), min(part, classes - first))
        elif divided:
            row = quotient(np.int64(block()), parts)
            part = width * quotient(classes + width * parts - 1, width * parts)
            first = np.int32(part * (np.int64(block()) - row * parts))
            count = max(np.int64(0), min(part, classes - first))
        else:
            row = np.int64(block()) * per_block + (tid >> thread_bits)
        if row >= rows:
            count = np.int64(0)
            row = rows - 1
        offset = row_offset(row, inner, z_outer, z_inner)
        return place(z, row, offset, first, count, np.int32(tid & (threads - 1)))

    def kernel(
        z, z_outer, z_inner, z_class, out, out_outer, out_inner, out_class,
        rows, inner, classes, targets, target_code, ignore,
        soft, soft_outer, soft_inner, soft_class, weight,
        upstream, upstream_step, upstream_code, scales,
        losses, z_terms, lse_out, entropy_out, predicted,
        records, class_offset, all_classes, parts,
        keep, spread, z_loss, cap64, nll_scale, z_scale,
    ):  # fmt: skip
        if clustered:
            cluster_arrive()
        cap = real(cap64)
        at = stand(z, z_outer, z_inner, rows, inner, classes, parts)
        leads = not several or (at.lane == 0 and (is_known or at.first == 0))
        held = cuda.local.array(registers, word)
        spare = cuda.local.array(words, word)
        edge_z = edge_of(at)
        fill(held, at)
        y = IGNORED
        raw_y = real(0)
        here = records + at.row * record_size
        if at.classes > 0 and leads:
            if of_slice:
                y = target_class(targets, target_code, at.row, all_classes, ignore)
                y = place_in_slice(y, class_offset, classes)
                if is_known:
                    y = target_of(_load_f64(here + STATE), y)
            else:
                y = target_class(targets, target_code, at.row, classes, ignore)
            if has_target and y >= 0 and (is_capped or not is_known):
                raw_y = load(at.address + np.int64(y - at.first) * size)
        if several and at.lane == 0:  # registers are scarce until the row is done with
            _put_f64(TARGET, np.float64(y))
            _put_f64(TARGET + 8, np.float64(raw_y))
            _put_f64(ZERO, 0.0)
        if is_known:
            m = real(_load_f64(here))
            rest = 0.0
        else:
            m, rest = statistics(held, spare, edge_z, at, cap)
        h = soft
        if is_soft:
            h = soft + row_offset(at.row, inner, soft_outer, soft_inner)
        labels = Labels(h, soft_class, weight, keep, spread)
        sums = Sums(0.0, 0.0, 0.0, np.int64(0))
        known = Known(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        if sums_up and not is_known:
            top = m
            if of_slice and m == _MINUS_INF:
                top = real(0)  # so that masked classes are at a distance
            sums = sums_of(at, top, cap, classes, labels)
        factor = 0.0
        power = np.int64(0)
        of_labels = 0.0
        at_target = 0.0
        labelled = 0.0
        # What belongs to the row takes a hundred float64 operations: one thread of a block does it,
        # and in a single warp all do.
        if leads:
            if several:
                y = np.int32(_shared_f64(TARGET))
                raw_y = real(_shared_f64(TARGET + 8))
            if is_known:
                known = take(here)
                rest = known.rest
                sums = Sums(known.gap, known.mass, 0.0, np.int64(0))
            factor, power, of_labels, at_target, labelled = report(
                at.lane == 0 and at.classes > 0, at.row, np.float64(m), rest, sums, y, raw_y,
                known, all_classes if of_slice else classes, labels, Upstream(
                    upstream, upstream_step, upstream_code, scales, nll_scale, z_scale
                ), z_loss, cap, losses, z_terms, lse_out, entropy_out, predicted, here,
            )  # fmt: skip
            if writes and several:
                spread_word(factor, power, of_labels, at_target, labelled, y)
        if writes:
            if several:
                factor, power, of_labels, at_target, labelled, y = hear()
            else:
                warp_barrier()  # in place, other lanes write where the target's logit has been read
            row = Coefficients(
                m, real(factor), real(power), exact(of_labels), exact(at_target), labelled, cap
            )
            at = stand(z, z_outer, z_inner, rows, inner, classes, parts)
            to = out + row_offset(at.row, inner, out_outer, out_inner) + np.int64(at.first) * size
            if divided:
                labels = labels_from(labels, at.first)
            write(held, spare, at, to, y, row, labels)

    return kernel


def thread_kernel(variant: Variant) -> Any:
    """One thread per row: its classes any number of bytes apart, or in a tile of short rows."""
    form, element = FORMATS[variant.dtype], elements(variant)
    add_one, rest_of, result = element.add_one, element.rest, element.result
    report, weigh = row_reports(variant), labelling(variant).weigh
    per_block, real, size = variant.block, form.compute, form.size
    tiled = variant.regime == "tile"
    take = form.shared_load if tiled else form.load
    give = form.shared_store if tiled else form.store
    copy, write_back = tile_copies(variant)
    writes, has_target = variant.task in WRITING, variant.task in TARGETED
    is_capped, is_soft = variant.capped, bool(variant.soft)
    sums_up = variant.spread or variant.task == "stats"
    of_slice, is_known = variant.task in OF_SLICES, variant.task == "slice_gradient"
    record = accessors(variant.spread)
    take_record, record_size = record.take, record.size
    exact = np.float64 if is_soft else real

    @machine.device
    def statistics(at, class_step, start, classes, labels, cap):
        """(m, rest) and sums of the row at `at`."""
        m = real(_MINUS_INF)
        second = real(_MINUS_INF)
        j = start
        for _ in range(classes):
            m, second = top_two(m, second, take(at + j * class_step))
            j = j + 1 if j + 1 < classes else np.int64(0)
        if is_capped:
            m = capped(m, cap)
            second = capped(second, cap)
        ref = reference(m, second)
        high = np.int64(0)
        low = np.int64(0)
        j = start
        for _ in range(classes):
            high, low = add_one(high, low, take(at + j * class_step), ref, cap)
            j = j + 1 if j + 1 < classes else np.int64(0)
        rest = rest_of(m, ref, high, low)
        sums = Sums(0.0, 0.0, 0.0, np.int64(classes))
        if sums_up:
            top = m
            if of_slice and m == _MINUS_INF:
                top = real(0)  # so that masked classes are at a distance
            for j in range(classes):
                x = take(at + j * class_step)
                if is_capped:
                    x = capped(x, cap)
                sums = weigh(sums, labels, j, x, top)
        return m, rest, sums

    @machine.device
    def work(
        at, to, class_step, out_step, start, row, y, classes, all_classes, labels, upstream,
        z_loss, cap, losses, z_terms, lse_out, entropy_out, predicted, record,
    ):  # fmt: skip
        """Everything about the row at `at`, for results at `to`; sums of terms begin at `start`."""
        known = Known(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        if is_known:
            known = take_record(record)
            m = real(known.m)
            rest = known.rest
            sums = Sums(known.gap, known.mass, 0.0, np.int64(0))
            y = target_of(known.state, y)
        else:
            m, rest, sums = statistics(at, class_step, start, classes, labels, cap)
        raw_y = real(0)
        if has_target and y >= 0:
            raw_y = take(at + np.int64(y) * class_step)
        factor, power, of_labels, at_target, labelled = report(
            True, row, np.float64(m), rest, sums, y, raw_y, known, all_classes, labels, upstream,
            z_loss, cap, losses, z_terms, lse_out, entropy_out, predicted, record,
        )  # fmt: skip
        if writes:
            done = Coefficients(
                m, real(factor), real(power), exact(of_labels), exact(at_target), labelled, cap
            )
            j = start
            for _ in range(classes):
                g = result(take(at + j * class_step), j, done, labels)
                if j == y:
                    g = real(done.at_target)
                if y == IGNORED:
                    g = real(0)
                give(to + j * out_step, g)
                j = j + 1 if j + 1 < classes else np.int64(0)

    def kernel(
        z, z_outer, z_inner, z_class, out, out_outer, out_inner, out_class,
        rows, inner, classes, targets, target_code, ignore,
        soft, soft_outer, soft_inner, soft_class, weight,
        upstream, upstream_step, upstream_code, scales,
        losses, z_terms, lse_out, entropy_out, predicted,
        records, class_offset, all_classes, parts,
        keep, spread, z_loss, cap64, nll_scale, z_scale,
    ):  # fmt: skip
        tid = np.int64(thread())
        first = np.int64(block()) * per_block
        row = first + tid
        if tiled:
            copy(z, first, rows, classes)
            barrier()
        if row < rows:
            at = z + row_offset(row, inner, z_outer, z_inner)
            to = out + row_offset(row, inner, out_outer, out_inner)
            class_step = z_class
            out_step = out_class
            start = np.int64(0)
            if tiled:
                at = tid * classes * size
                to = at
                class_step = np.int64(size)
                out_step = class_step
                # Neighbours begin at different classes, or they would meet in the same banks.
                start = tid - quotient(tid, classes) * classes
            h = soft
            if is_soft:
                h = soft + row_offset(row, inner, soft_outer, soft_inner)
            total = classes
            if of_slice:
                total = all_classes
            y = target_class(targets, target_code, row, total, ignore)
            if of_slice:
                y = place_in_slice(y, class_offset, classes)
            work(
                at, to, class_step, out_step, start, row, y, classes, total,
                Labels(h, soft_class, weight, keep, spread),
                Upstream(upstream, upstream_step, upstream_code, scales, nll_scale, z_scale),
                z_loss, real(cap64),
                losses, z_terms, lse_out, entropy_out, predicted, records + row * record_size,
            )  # fmt: skip
        if tiled and writes:
            barrier()
            write_back(out, first, rows, classes)

    return kernel


def tile_copies(variant: Variant) -> Any:
    """Device functions: a block's rows, one after the other in memory, to shared memory and back.

    A full tile is a whole number of vectors, so that if the first one is aligned all are.
    """
    form, threads = FORMATS[variant.dtype], variant.block
    size, words, word, width = form.size, form.words, form.word, 16 // form.size
    load, store = form.load, form.store
    shared_load, shared_store = form.shared_load, form.shared_store
    shared_load_vector, store_vector = form.shared_load_vector, form.store_vector

    @machine.device
    def copy(z, first, rows, classes):
        tid = np.int64(thread())
        count = min(np.int64(threads), rows - first) * classes
        base = z + first * classes * size
        whole = count * size >> 4
        for i in range(tid, whole, threads):
            copy_async(16 * i, base + 16 * i)
        for j in range(whole * width + tid, count, threads):
            shared_store(j * size, load(base + j * size))
        wait_for_copies()

    @machine.device
    def write_back(out, first, rows, classes):
        tid = np.int64(thread())
        spare = cuda.local.array(words, word)
        count = min(np.int64(threads), rows - first) * classes
        base = out + first * classes * size
        whole = count * size >> 4
        for i in range(tid, whole, threads):
            shared_load_vector(16 * i, spare, 0)
            store_vector(base + 16 * i, spare, 0)
        for j in range(whole * width + tid, count, threads):
            store(base + j * size, shared_load(j * size))

    return copy, write_back
