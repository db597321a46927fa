"""Losses whose classes or rows are divided among ranks, as functions with a gradient."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastce import _arguments as arguments
from fastce import shards
from fastce._linear_slice import LinearSlice
from fastce.torch import _groups, _head
from fastce.torch._groups import Axis, Share
from fastce.torch._tensors import (
    Options,
    class_weight,
    empty_like,
    kernel_array,
    loss_dtype,
    loss_tensor,
    refuse_gradient,
    upstream,
)


class Divided(torch.autograd.Function):
    """The loss of logits; the gradient is that of the rank's own, from what all know by then.

    Without a number of classes the rank has all of them.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, where: dict[str, int],
        classes: int | None, options: Options, axes: tuple[Axis, ...],
    ) -> Tensor:  # fmt: skip
        error: Exception | None = None
        total: Any = None
        try:
            refuse_gradient("target", ctx.needs_input_grad[1])
            refuse_gradient("weight", ctx.needs_input_grad[2])
            checked = arguments.options(*options)
            place = kernel_array(input)
            total = shards.partial(
                place(input), place(target), **where, weight=class_weight(weight, place),
                classes=input.shape[where["axis"]] if classes is None else classes,
                ignore_index=checked.ignore_index, label_smoothing=checked.label_smoothing,
                softcap=checked.softcap,
            )  # fmt: skip
        except Exception as found:  # of whatever kind: others would wait for this rank
            error = found
        share = total and Share(total.covered, total.terms.classes)
        what = total and (total.terms, checked)
        _groups.agree(axes, error, what, total and total.rows, share, input)
        ctx.where, ctx.reduction = where, checked.reduction
        ctx.save_for_backward(input, target, weight)
        if input.is_cuda:
            from fastce.torch import _on_device

            ctx.z_loss = checked.z_loss
            ctx.total = _on_device.merge(axes, total)
            loss, ctx.scales = _on_device.finish(axes, ctx.total, checked)
            return loss
        _groups.merge(axes, total)
        if checked.reduction == "none":
            ctx.scales = 1.0, checked.z_loss
            loss = shards.finish(total, z_loss=checked.z_loss, reduction="none").loss
        else:
            sums = _groups.add(axes, shards.row_sums(total, checked.z_loss))
            ctx.scales = sums.scales(checked)
            loss = sums.loss(checked, total.terms.dtype)
        ctx.total = total
        return loss_tensor(loss, loss_dtype(input))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        _first_order_only()
        input, target, weight = ctx.saved_tensors
        gradient = empty_like(input)
        place = kernel_array(input)
        given = {
            **ctx.where, "weight": class_weight(weight, place), "out": place(gradient),
            "reduction": "none" if ctx.reduction == "none" else "sum",
        }  # fmt: skip
        if input.is_cuda:
            from fastce.cuda.shards import grad

            grad(
                place(input), place(target), ctx.total, **given, z_loss=ctx.z_loss,
                scales=ctx.scales, grad_output=upstream(g),
            )  # fmt: skip
        else:
            factor, z_loss = ctx.scales
            shards.grad(
                place(input), place(target), ctx.total, **given, z_loss=z_loss,
                grad_output=factor * upstream(g),
            )  # fmt: skip
        return gradient, *(None,) * 6


class DividedHead(torch.autograd.Function):
    """The loss of a linear layer, whose gradients are computed in backward."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, linear_weight: Tensor, target: Tensor,
        linear_bias: Tensor | None, weight: Tensor | None, class_offset: int, classes: int,
        options: Options, group: Any,
    ) -> Tensor:  # fmt: skip
        error: Exception | None = None
        total: Any = None
        wanted = ctx.needs_input_grad
        try:
            refuse_gradient("target", wanted[2])
            refuse_gradient("weight", wanted[4])
            checked = arguments.options(*options)
            rows, x, labels = _head.flattened(input, linear_weight, target)
            layer = LinearSlice(
                **_head.arrays(x, linear_weight, labels, linear_bias, weight),
                class_offset=class_offset,
            )
            total = layer.partial(classes, checked)
        except Exception as found:  # of whatever kind: others would wait for this rank
            error = found
        axes = (Axis(group, "classes"),)
        what = total and (total.terms, checked, f"gradient of input: {wanted[0]}")
        _groups.agree(axes, error, what, total and tuple(input.shape))
        _groups.merge(axes, total)
        ctx.layer, ctx.total, ctx.options, ctx.group = layer, total, checked, group
        ctx.exchanging = wanted[0]
        ctx.save_for_backward(input, linear_weight, target, linear_bias, weight)
        loss = shards.finish(
            total, z_loss=checked.z_loss, reduction=checked.reduction, normalizer=checked.normalizer
        ).loss
        tensor = loss_tensor(loss, loss_dtype(input, linear_weight))
        return tensor.reshape(rows) if checked.reduction == "none" else tensor

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        _first_order_only()
        input, linear_weight, _, linear_bias, _ = ctx.saved_tensors  # as they were, or an error
        given = upstream(g.reshape(-1) if g.ndim else g)
        by_row = arguments.upstream(given, ctx.total.rows, ctx.options.reduction)
        found = ctx.layer.gradients(ctx.total, ctx.options, by_row)
        wide: list[Any] = [None if a is None else torch.from_numpy(a) for a in found]
        if ctx.exchanging:
            dist.all_reduce(wide[0], group=ctx.group)
        wide[0] = wide[0].reshape(input.shape)
        dx, dweight, dbias = _head.narrowed(tuple(wide), input, linear_weight, linear_bias)
        return dx, dweight, None, dbias, *(None,) * 5


def _first_order_only() -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError("second derivatives: expected none of a distributed loss")
