"""Second-order kernels: diagonal Hessians for boosting, exact Hessian-vector products."""

import numpy as np

from fastce.cpu import columns, rows
from fastce.cpu.elementary import exp_scaled
from fastce.cpu.jit import device, kernel
from fastce.cpu.memory import (
    address,
    address_as,
    claim,
    hold,
    load,
    load_number,
    store,
    store_number,
    zeros,
)
from fastce.cpu.tiles import (
    allocate,
    count_tiles,
    gather,
    scatter,
    start_of,
    tile_rows,
)
from fastce.cpu.vector import (
    convert,
    lane_numbers,
    lanes,
    maximum,
    splat,
    total,
    where,
)


@device
def _curve(p, curved, straight, floor):
    """curved * p (1 - p) + straight * p, at least `floor`; NaN stays."""
    h = p * (curved * (1.0 - p) + straight)
    return maximum(splat(floor, h), h)


@device
def _curve_at_maximum(rest, curved, straight, floor):
    """The same where p = 1 / (1 + rest), so that 1 - p keeps its digits."""
    p = 1.0 / (1.0 + rest)
    h = p * (curved * (rest * p) + straight)
    return maximum(splat(floor, h), h)


@kernel
def gradient_hessian_rows(
    logits_base, grad_base, hess_base, targets, weight, curved, straight, floor, at_target,
    outer, inner, classes, chunk, parts, outer_stride, inner_stride, step,
    grad_outer_stride, grad_inner_stride, grad_step,
    hess_outer_stride, hess_inner_stride, hess_step, counter,
):  # fmt: skip
    """weight * (p - y) and weight * curvature; |p - y| at the target instead if `at_target`."""
    logits = address(logits_base)
    grad = address(grad_base)
    hess = address(hess_base)
    zero = zeros(logits)
    width = lanes(zero)
    each = rows.distance(logits, step)
    hess_each = rows.distance(hess, hess_step)
    while True:
        part = claim(counter)
        if part >= parts:
            return
        for i in range(part * chunk, min((part + 1) * chunk, outer * inner)):
            offset = start_of(i, inner, outer_stride, inner_stride)
            grad_offset = start_of(i, inner, grad_outer_stride, grad_inner_stride)
            hess_offset = start_of(i, inner, hess_outer_stride, hess_inner_stride)
            y = targets[i]
            w = 1.0 if weight is None else weight[i]
            z_y = load_number(logits, offset + y * each)
            m, rest = rows.statistics(logits, offset, classes, step, None)
            shift, bias, cut, factor = rows.gradient_scale(m, rest, 1.0, zero)
            top = rows.first_maximum(logits, offset, 0, classes, step, None, m)
            for start in range(0, classes, width):
                j = min(start, classes - width)
                z = load(logits, offset + j * each, step, zero)
                p = exp_scaled(z - shift, bias, cut) * factor
                h = _curve(p, curved, straight, floor) * w
                store(hess, hess_offset + j * hess_each, hess_step, h)
            if rest < 1.0:
                h = w * _curve_at_maximum(rest, curved, straight, floor)
                store_number(hess, hess_offset + top * hess_each, h)
            if at_target:
                store_number(
                    hess, hess_offset + y * hess_each,
                    0.0 - w * rows.target_gradient(m, rest, z_y, 1.0, 1.0),
                )  # fmt: skip
            rows.write_gradient(
                logits, offset, classes, step, None, m, rest, w,
                grad, grad_offset, grad_step, False, None, 0, None, None, 0.0, 0.0,
            )  # fmt: skip
            value = rows.target_gradient(m, rest, z_y, w, w)
            store_number(grad, grad_offset + y * rows.distance(grad, grad_step), value)


@kernel
def gradient_hessian_columns(
    logits_base, grad_base, hess_base, targets, weight, curved, straight, floor, at_target,
    outer, inner, classes, chunk, parts, outer_stride, inner_stride, class_stride,
    grad_outer_stride, grad_inner_stride, grad_class_stride,
    hess_outer_stride, hess_inner_stride, hess_class_stride, counter,
):  # fmt: skip
    """`gradient_hessian_rows` with lanes across rows."""
    logits = address(logits_base)
    grad = address(grad_base)
    hess = address(hess_base)
    zero = zeros(logits)
    wide = convert(zero, 0.0)
    width = lanes(zero)
    last = outer * inner - 1
    scratch = np.zeros((2, width))
    tile_memory, z_tile = allocate(classes, width)
    tile = address_as(tile_memory, logits_base)
    hess_memory, h_tile = allocate(classes, width)
    hess_tile = address_as(hess_memory, hess_base)
    tiles = count_tiles(outer, inner, width)
    while True:
        part = claim(counter)
        if part >= parts:
            hold(tile_memory)
            hold(hess_memory)
            return
        for number in range(part * chunk, min((part + 1) * chunk, tiles)):
            i, skip, stop = tile_rows(number, outer, inner, width)
            gather(
                logits, outer_stride, inner_stride, class_stride, i, outer, inner, classes,
                tile, z_tile, zero,
            )  # fmt: skip
            for lane in range(width):
                row = min(i + lane, last)
                place = columns.number(tile, z_tile, targets[row], lane, zero)
                scratch[0, lane] = load_number(tile, place)
                scratch[1, lane] = 1.0 if weight is None else weight[row]
            z_y = load(scratch, 0, None, wide)
            w = load(scratch, width * 8, None, wide)
            narrow_w = convert(w, zero)
            m, rest, first = columns.statistics(tile, z_tile, classes, None)
            shift, bias, cut, factor = rows.gradient_scale(m, rest, wide + 1.0, zero)
            peak = convert(_curve_at_maximum(rest, curved, straight, floor), zero)
            for j in range(classes):
                z = columns.class_of(tile, z_tile, j, zero)
                p = exp_scaled(z - shift, bias, cut) * factor
                h = where(first == float(j), peak, _curve(p, curved, straight, floor))
                store(hess_tile, columns.number(hess_tile, h_tile, j, 0, zero), None, h * narrow_w)
            value = rows.target_gradient(m, rest, z_y, w, w)
            store(scratch, 0, None, value)
            columns.to_gradient(
                tile, z_tile, classes, None, m, rest, w, wide == 0.0, None, 0, None, zero, zero
            )
            for lane in range(width):
                y = targets[min(i + lane, last)]
                store_number(tile, columns.number(tile, z_tile, y, lane, zero), scratch[0, lane])
                if at_target:
                    place = columns.number(hess_tile, h_tile, y, lane, zero)
                    store_number(hess_tile, place, 0.0 - scratch[0, lane])
            scatter(
                tile, z_tile, grad, grad_outer_stride, grad_inner_stride, grad_class_stride,
                i, skip, stop, outer, inner, classes, False, zero,
            )  # fmt: skip
            scatter(
                hess_tile, h_tile, hess, hess_outer_stride, hess_inner_stride, hess_class_stride,
                i, skip, stop, outer, inner, classes, False, zero,
            )  # fmt: skip


@kernel
def hessian_vector_rows(
    logits_base, v_base, out_base, upstream, scale, outer, inner, classes, chunk, parts,
    outer_stride, inner_stride, step, v_outer_stride, v_inner_stride, v_step,
    out_outer_stride, out_inner_stride, out_step, counter,
):  # fmt: skip
    """p * (v - sum p v), v taken relative to its value at the maximum so that nothing cancels."""
    logits = address(logits_base)
    out = address(out_base)
    v = address(v_base)
    zero = zeros(logits)
    width = lanes(zero)
    whole = classes - classes % width
    each = rows.distance(logits, step)
    v_each = rows.distance(v, v_step)
    out_each = rows.distance(out, out_step)
    while True:
        part = claim(counter)
        if part >= parts:
            return
        for i in range(part * chunk, min((part + 1) * chunk, outer * inner)):
            offset = start_of(i, inner, outer_stride, inner_stride)
            v_offset = start_of(i, inner, v_outer_stride, v_inner_stride)
            out_offset = start_of(i, inner, out_outer_stride, out_inner_stride)
            m, rest = rows.statistics(logits, offset, classes, step, None)
            top = min(rows.first_maximum(logits, offset, 0, classes, step, None, m), classes - 1)
            v_top = load_number(v, v_offset + top * v_each)
            shift, bias, cut, factor = rows.gradient_scale(m, rest, 1.0, zero)
            mean = convert(zero, 0.0)
            for start in range(0, classes, width):
                j = min(start, classes - width)
                z = load(logits, offset + j * each, step, zero)
                u = load(v, v_offset + j * v_each, v_step, zero) - v_top
                p = exp_scaled(z - shift, bias, cut) * factor
                if start == whole:
                    p = where(lane_numbers(zero) < float(whole - j), 0.0, p)
                mean = mean + convert(p * u, 0.0)
            center = total(mean)
            s = scale if upstream is None else scale * upstream[i]
            for start in range(0, classes, width):
                j = min(start, classes - width)
                z = load(logits, offset + j * each, step, zero)
                u = load(v, v_offset + j * v_each, v_step, zero) - v_top
                p = exp_scaled(z - shift, bias, cut) * factor
                store(out, out_offset + j * out_each, out_step, p * (u - center) * s)


@kernel
def hessian_vector_columns(
    logits_base, v_base, out_base, upstream, scale, outer, inner, classes, chunk, parts,
    outer_stride, inner_stride, class_stride, v_outer_stride, v_inner_stride, v_class_stride,
    out_outer_stride, out_inner_stride, out_class_stride, counter,
):  # fmt: skip
    """`hessian_vector_rows` with lanes across rows."""
    logits = address(logits_base)
    out = address(out_base)
    zero = zeros(logits)
    wide = convert(zero, 0.0)
    width = lanes(zero)
    last = outer * inner - 1
    scratch = np.zeros((2, width))
    tile_memory, z_tile = allocate(classes, width)
    tile = address_as(tile_memory, logits_base)
    v_memory, v_place = allocate(classes, width)
    v_tile = address_as(v_memory, v_base)
    tiles = count_tiles(outer, inner, width)
    while True:
        part = claim(counter)
        if part >= parts:
            hold(tile_memory)
            hold(v_memory)
            return
        for number in range(part * chunk, min((part + 1) * chunk, tiles)):
            i, skip, stop = tile_rows(number, outer, inner, width)
            gather(
                logits, outer_stride, inner_stride, class_stride, i, outer, inner, classes,
                tile, z_tile, zero,
            )  # fmt: skip
            gather(
                address(v_base), v_outer_stride, v_inner_stride, v_class_stride, i, outer, inner,
                classes, v_tile, v_place, zero,
            )  # fmt: skip
            m, rest, first = columns.statistics(tile, z_tile, classes, None)
            store(scratch, 0, None, convert(first, 0.0))
            for lane in range(width):
                top = int(scratch[0, lane])
                place = columns.number(v_tile, v_place, top, lane, zero)
                scratch[0, lane] = load_number(v_tile, place)
                row = min(i + lane, last)
                scratch[1, lane] = scale if upstream is None else scale * upstream[row]
            v_top = convert(load(scratch, 0, None, wide), zero)
            s = convert(load(scratch, width * 8, None, wide), zero)
            shift, bias, cut, factor = rows.gradient_scale(m, rest, wide + 1.0, zero)
            mean = wide
            for j in range(classes):
                z = columns.class_of(tile, z_tile, j, zero)
                u = columns.class_of(v_tile, v_place, j, zero) - v_top
                mean = mean + convert(exp_scaled(z - shift, bias, cut) * factor * u, 0.0)
            center = convert(mean, zero)
            for j in range(classes):
                z = columns.class_of(tile, z_tile, j, zero)
                u = columns.class_of(v_tile, v_place, j, zero) - v_top
                p = exp_scaled(z - shift, bias, cut) * factor
                place = columns.number(tile, z_tile, j, 0, zero)
                store(tile, place, None, p * (u - center) * s)
            scatter(
                tile, z_tile, out, out_outer_stride, out_inner_stride, out_class_stride,
                i, skip, stop, outer, inner, classes, False, zero,
            )  # fmt: skip
