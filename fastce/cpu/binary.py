"""Binary cross-entropy, element by element, in float64 inside."""

from fastce.cpu.elementary import exp_scale, exp_scaled, log1p
from fastce.cpu.jit import device, kernel
from fastce.cpu.memory import (
    address,
    claim,
    load,
    load_number,
    store,
    store_number,
    zeros,
)
from fastce.cpu.rows import distance
from fastce.cpu.tiles import start_of
from fastce.cpu.vector import (
    convert,
    lanes,
    maximum,
    total,
    where,
)


@device
def _loss_and_gradient(z, t, w, positive):
    """w (positive t softplus(-z) + (1 - t) softplus(z)) and its derivative, numbers or vectors.

    With e = exp(-|z|) every term is non-negative for t in [0, 1]; a term whose factor is zero is
    zero even where softplus is infinite.
    """
    bias, floor = exp_scale(0.0, z)
    e = exp_scaled(-1.0 * maximum(z, -1.0 * z), bias, floor)
    tail = log1p(e)
    yes = w * positive * t
    no = w * (1.0 - t)
    loss_yes = where(yes == 0.0, 0.0, yes * (where(z < 0.0, -1.0 * z, 0.0) + tail))
    loss_no = where(no == 0.0, 0.0, no * (where(z > 0.0, z, 0.0) + tail))
    nearer = 1.0 / (1.0 + e)  # sigmoid(|z|)
    farther = e * nearer  # sigmoid(-|z|)
    up = where(z < 0.0, farther, nearer)
    down = where(z < 0.0, nearer, farther)
    return where(w == 0.0, 0.0, loss_yes + loss_no), where(w == 0.0, 0.0, no * up - yes * down)


@kernel
def binary_cross_entropy(
    logits_base, targets_base, weight_base, positive_base, out_base, upstream, losses, sums, scale,
    outer, inner, count, chunk, outer_stride, inner_stride, step,
    target_outer_stride, target_inner_stride, target_step,
    weight_outer_stride, weight_inner_stride, weight_step,
    positive_outer_stride, positive_inner_stride, positive_step,
    out_outer_stride, out_inner_stride, out_step, counter,
):  # fmt: skip
    """Loss and gradient of every element; `chunk` elements of one row at a time.

    `losses` and `upstream` are contiguous, in row order.
    """
    logits = address(logits_base)
    out = address(out_base)
    positive = address(positive_base)
    targets = address(targets_base)
    weight = address(weight_base)
    wide = convert(zeros(logits), 0.0)
    width = lanes(wide)
    segments = (count + chunk - 1) // chunk
    while True:
        part = claim(counter)
        if part >= len(sums):
            return
        row = part // segments
        start = (part % segments) * chunk
        stop = min(start + chunk, count)
        whole = stop - (stop - start) % width
        offset = start_of(row, inner, outer_stride, inner_stride)
        target_offset = start_of(row, inner, target_outer_stride, target_inner_stride)
        weight_offset = 0
        positive_offset = 0
        out_offset = 0
        if weight_base is not None:
            weight_offset = start_of(row, inner, weight_outer_stride, weight_inner_stride)
        if positive_base is not None:
            positive_offset = start_of(row, inner, positive_outer_stride, positive_inner_stride)
        if out_base is not None:
            out_offset = start_of(row, inner, out_outer_stride, out_inner_stride)
        lane_sums = wide
        for j in range(start, whole, width):
            z = load(logits, offset + j * distance(logits, step), step, wide)
            t = load(targets, target_offset + j * distance(targets, target_step), target_step, wide)
            w = wide + 1.0
            p = wide + 1.0
            if weight_base is not None:
                w = load(
                    weight, weight_offset + j * distance(weight, weight_step), weight_step, wide
                )
            if positive_base is not None:
                p = load(
                    positive, positive_offset + j * distance(positive, positive_step),
                    positive_step, wide,
                )  # fmt: skip
            loss, g = _loss_and_gradient(z, t, w, p)
            lane_sums = lane_sums + loss
            if losses is not None:
                store(
                    losses,
                    (row * count + j) * distance(losses, None),
                    None,
                    convert(loss, zeros(losses)),
                )
            if out_base is not None:
                g = g * scale
                if upstream is not None:
                    g = g * load(upstream, (row * count + j) * 8, None, wide)
                store(
                    out, out_offset + j * distance(out, out_step), out_step, convert(g, zeros(out))
                )
        rest = 0.0
        for j in range(whole, stop):
            z = load_number(logits, offset + j * distance(logits, step))
            t = load_number(targets, target_offset + j * distance(targets, target_step))
            w = 1.0
            p = 1.0
            if weight_base is not None:
                w = load_number(weight, weight_offset + j * distance(weight, weight_step))
            if positive_base is not None:
                p = load_number(positive, positive_offset + j * distance(positive, positive_step))
            loss, g = _loss_and_gradient(z, t, w, p)
            rest += loss
            if losses is not None:
                losses[row * count + j] = loss
            if out_base is not None:
                g *= scale
                if upstream is not None:
                    g *= upstream[row * count + j]
                store_number(out, out_offset + j * distance(out, out_step), g)
        sums[part] = total(lane_sums) + rest
