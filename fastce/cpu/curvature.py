"""Second-order kernels: diagonal Hessians for boosting, exact Hessian-vector products."""

import numpy as np

from fastce.cpu import columns, rows
from fastce.cpu.elementary import exp_scaled
from fastce.cpu.jit import device, kernel
from fastce.cpu.loops import start_of, tile_start, tiling
from fastce.cpu.memory import (
    address,
    claim,
    load,
    load_number,
    store,
    store_number,
    zeros,
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
    shape, logits_base, strides, step, targets, weight, curved, straight, floor, at_target,
    grad_base, grad_strides, grad_step, hess_base, hess_strides, hess_step, parts, chunk, counter,
):  # fmt: skip
    """weight * (p - y) and weight * curvature; |p - y| at the target instead if `at_target`."""
    outer, inner, classes = shape
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
            offset = start_of(i, inner, strides)
            grad_offset = start_of(i, inner, grad_strides)
            hess_offset = start_of(i, inner, hess_strides)
            y = targets[i]
            w = 1.0 if weight is None else weight[i]
            z_y = load_number(logits, offset + y * each)
            m, rest = rows.statistics(logits, offset, classes, step, None)
            shift = rows.reference(m)[0]
            bias, cut, factor = rows.gradient_scale(m, rest, 1.0, zero)
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
    shape, logits_base, strides, advance, step, targets, weight, curved, straight, floor, at_target,
    grad_base, grad_strides, grad_advance, grad_step,
    hess_base, hess_strides, hess_advance, hess_step, parts, chunk, counter,
):  # fmt: skip
    """`gradient_hessian_rows` with lanes across rows."""
    outer, inner, classes = shape
    logits = address(logits_base)
    grad = address(grad_base)
    hess = address(hess_base)
    zero = zeros(logits)
    wide = convert(zero, 0.0)
    width = lanes(zero)
    across, tiles = tiling(inner, width)
    scratch = np.zeros((2, width))
    while True:
        part = claim(counter)
        if part >= parts:
            return
        for tile in range(part * chunk, min((part + 1) * chunk, outer * tiles)):
            i, skip = tile_start(tile, tiles, inner, width)
            offset = start_of(i, inner, strides)
            grad_offset = start_of(i, inner, grad_strides)
            hess_offset = start_of(i, inner, hess_strides)
            for lane in range(width):
                row = i + lane * across
                place = offset + targets[row] * advance + lane * rows.distance(logits, step)
                scratch[0, lane] = load_number(logits, place)
                scratch[1, lane] = 1.0 if weight is None else weight[row]
            z_y = load(scratch, 0, None, wide)
            w = load(scratch, width * 8, None, wide)
            narrow_w = convert(w, zero)
            m, rest, first = columns.statistics(logits, offset, classes, advance, step, None)
            shift = convert(rows.reference(m)[0], zero)
            bias, cut, factor = rows.gradient_scale(m, rest, wide + 1.0, zero)
            factor = convert(factor, zero)
            peak = convert(_curve_at_maximum(rest, curved, straight, floor), zero)
            for j in range(classes):
                z = load(logits, offset + j * advance, step, zero)
                p = exp_scaled(z - shift, bias, cut) * factor
                h = where(first == float(j), peak, _curve(p, curved, straight, floor))
                columns.put(hess, hess_offset + j * hess_advance, hess_step, h * narrow_w, skip)
            value = rows.target_gradient(m, rest, z_y, w, w)
            store(scratch, 0, None, value)
            columns.write_gradient(
                logits, offset, classes, advance, step, None, m, rest, w, wide == 0.0,
                grad, grad_offset, grad_advance, grad_step, skip,
                None, 0, 0, None, None, zero, zero,
            )  # fmt: skip
            for lane in range(skip, width):
                y = targets[i + lane * across]
                place = grad_offset + y * grad_advance + lane * rows.distance(grad, grad_step)
                store_number(grad, place, scratch[0, lane])
                if at_target:
                    place = hess_offset + y * hess_advance
                    place += lane * rows.distance(hess, hess_step)
                    store_number(hess, place, 0.0 - scratch[0, lane])


@kernel
def hessian_vector_rows(
    shape, logits_base, strides, step, v_base, v_strides, v_step, upstream, scale,
    out_base, out_strides, out_step, parts, chunk, counter,
):  # fmt: skip
    """p * (v - sum p v), v taken relative to its value at the maximum so that nothing cancels."""
    outer, inner, classes = shape
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
            offset = start_of(i, inner, strides)
            v_offset = start_of(i, inner, v_strides)
            out_offset = start_of(i, inner, out_strides)
            m, rest = rows.statistics(logits, offset, classes, step, None)
            top = min(rows.first_maximum(logits, offset, 0, classes, step, None, m), classes - 1)
            v_top = load_number(v, v_offset + top * v_each)
            shift = rows.reference(m)[0]
            bias, cut, factor = rows.gradient_scale(m, rest, 1.0, zero)
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
    shape, logits_base, strides, advance, step, v_base, v_strides, v_advance, v_step,
    upstream, scale, out_base, out_strides, out_advance, out_step, parts, chunk, counter,
):  # fmt: skip
    """`hessian_vector_rows` with lanes across rows."""
    outer, inner, classes = shape
    logits = address(logits_base)
    out = address(out_base)
    v = address(v_base)
    zero = zeros(logits)
    wide = convert(zero, 0.0)
    width = lanes(zero)
    across, tiles = tiling(inner, width)
    scratch = np.zeros((2, width))
    while True:
        part = claim(counter)
        if part >= parts:
            return
        for tile in range(part * chunk, min((part + 1) * chunk, outer * tiles)):
            i, skip = tile_start(tile, tiles, inner, width)
            offset = start_of(i, inner, strides)
            v_offset = start_of(i, inner, v_strides)
            out_offset = start_of(i, inner, out_strides)
            m, rest, first = columns.statistics(logits, offset, classes, advance, step, None)
            store(scratch, 0, None, convert(first, 0.0))
            for lane in range(width):
                top = int(scratch[0, lane])
                place = v_offset + top * v_advance + lane * rows.distance(v, v_step)
                scratch[0, lane] = load_number(v, place)
                row = i + lane * across
                scratch[1, lane] = scale if upstream is None else scale * upstream[row]
            v_top = convert(load(scratch, 0, None, wide), zero)
            s = convert(load(scratch, width * 8, None, wide), zero)
            shift = convert(rows.reference(m)[0], zero)
            bias, cut, factor = rows.gradient_scale(m, rest, wide + 1.0, zero)
            factor = convert(factor, zero)
            mean = wide
            for j in range(classes):
                z = load(logits, offset + j * advance, step, zero)
                u = load(v, v_offset + j * v_advance, v_step, zero) - v_top
                mean = mean + convert(exp_scaled(z - shift, bias, cut) * factor * u, 0.0)
            center = convert(mean, zero)
            for j in range(classes):
                z = load(logits, offset + j * advance, step, zero)
                u = load(v, v_offset + j * v_advance, v_step, zero) - v_top
                p = exp_scaled(z - shift, bias, cut) * factor
                columns.put(out, out_offset + j * out_advance, out_step, p * (u - center) * s, skip)
