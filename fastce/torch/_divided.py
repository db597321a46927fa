"""Losses whose classes or rows are divided among ranks, as functions with a gradient."""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastce import _arguments as arguments
from fastce import shards
from fastce._linear_slice import LinearSlice, rows_at_once
from fastce.torch import _groups, _head
from fastce.torch._groups import Axis, Share
from fastce.torch._tensors import (
    Options,
    class_weight,
    empty_like,
    kernel_array,
    loss_tensor,
    refuse_gradient,
    refuse_overwritten,
    upstream,
)


class Divided(torch.autograd.Function):
    """The loss of logits; the gradient is that of the rank's own, from what all know by then.

    Without a number of classes the rank has all of them.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, where: dict[str, Any],
        classes: int | None, options: Options, axes: tuple[Axis, ...],
    ) -> Tensor:  # fmt: skip
        error: Exception | None = None
        total: Any = None
        try:
            refuse_gradient("target", ctx.needs_input_grad[1])
            refuse_gradient("weight", ctx.needs_input_grad[2])
            refuse_overwritten(input)
            checked = arguments.options(*options)
            ctx.where = where = {k: arguments.integer(k, value) for k, value in where.items()}
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
        ctx.reduction = checked.reduction
        ctx.save_for_backward(input, target, weight)
        if input.is_cuda:
            from fastce.torch import _on_device

            ctx.z_loss = checked.z_loss
            ctx.total = _on_device.merge(axes, total)
            loss, ctx.scales = _on_device.finish(axes, ctx.total, checked)
            return loss
        _groups.merge(axes, total)
        loss, ctx.scales = _reduced(axes, total, checked)
        ctx.total = total
        return loss_tensor(loss)

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
    """The loss of a linear layer, whose gradients are computed along with it where they can be.

    That takes one pass over the logits, as ranks merge what they know of some rows before the next
    rows' logits are computed. Otherwise, and for further passes through the same graph, gradients
    are computed in backward, and logits that were not kept once more.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, linear_weight: Tensor, target: Tensor,
        linear_bias: Tensor | None, weight: Tensor | None, class_offset: int, classes: int,
        options: Options, axes: tuple[Axis, ...], differentiated: bool,
    ) -> Tensor:  # fmt: skip
        error: Exception | None = None
        layer: Any = None
        what: Any = None
        shape: tuple[int, ...] = ()
        wanted = [asked and differentiated for asked in ctx.needs_input_grad]
        try:
            refuse_gradient("target", wanted[2])
            refuse_gradient("weight", wanted[4])
            checked = arguments.options(*options)
            classes = arguments.integer("classes", classes)
            rows, x, labels = _head.flattened(input, linear_weight, target)
            layer = LinearSlice(
                **_head.arrays(x, linear_weight, labels, linear_bias, weight),
                class_offset=class_offset,
            )
            terms, shape = layer.check(classes, checked), tuple(input.shape)
            ctx.exchanged = _exchanged(axes, wanted[0], wanted[1], wanted[3])
            what = terms, checked, ctx.exchanged
        except Exception as found:  # of whatever kind: others would wait for this rank
            error = found
        _groups.agree(axes, error, what, shape)
        layer.rows_at_once = rows_at_once(-(-classes // _groups.parts(axes)), terms.dtype)
        merge = functools.partial(_groups.merge, axes)
        ctx.gradients = None
        if any(wanted) and _is_known_by_row(checked, weight):
            total, ctx.gradients = layer.partial_and_gradients(classes, checked, merge)
        else:
            total = layer.partial(classes, checked, merge)
        loss, ctx.scales = _reduced(axes, total, checked)
        ctx.layer, ctx.total, ctx.reduction, ctx.axes = layer, total, checked.reduction, axes
        ctx.save_for_backward(input, linear_weight, target, linear_bias, weight)
        tensor = loss_tensor(loss)
        return tensor.reshape(rows) if checked.reduction == "none" else tensor

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        _first_order_only()
        input, linear_weight, _, linear_bias, _ = ctx.saved_tensors  # as they were, or an error
        given = upstream(g.reshape(-1) if g.ndim else g)
        found, ctx.gradients = ctx.gradients, None
        if found is None:
            by_row = arguments.upstream(given, ctx.total.rows, ctx.reduction)
            found = ctx.layer.gradients(ctx.total, ctx.scales, by_row)
            factor = 1.0
        else:
            factor = ctx.scales[0] * given
        wide: list[Any] = [None if a is None else torch.from_numpy(a) for a in found]
        for gradient, groups in zip(wide, ctx.exchanged, strict=True):
            for k in groups:
                dist.all_reduce(gradient, group=ctx.axes[k].group)
            if gradient is not None and factor != 1.0:
                gradient.mul_(factor)
        wide[0] = wide[0].reshape(input.shape)
        dx, dweight, dbias = _head.narrowed(tuple(wide), input, linear_weight, linear_bias)
        return dx, dweight, None, dbias, *(None,) * 6


def divided_head(*arguments: Any) -> Tensor:
    """The loss; whether gradients are kept is no more to be seen inside of a Function."""
    loss: Tensor = DividedHead.apply(*arguments, torch.is_grad_enabled())
    return loss


def _exchanged(axes: tuple[Axis, ...], *wanted: bool) -> tuple[tuple[int, ...], ...]:
    """Among which groups the gradients of input, weights and bias are added up."""
    by_classes, by_rows = (
        tuple(k for k, axis in enumerate(axes) if axis.divides == what)
        for what in ("classes", "rows")
    )
    return tuple(
        groups if asked else ()
        for groups, asked in zip((by_classes, by_rows, by_rows), wanted, strict=True)
    )


def _is_known_by_row(options: arguments.Options, weight: Tensor | None) -> bool:
    """Whether a row's gradient is known before the others, up to a factor that all have."""
    one_divisor = options.reduction == "sum" or options.normalizer is not None or weight is None
    return options.reduction != "none" and (one_divisor or not options.z_loss)


def _reduced(
    axes: tuple[Axis, ...], total: shards.Partial, options: arguments.Options
) -> tuple[Any, tuple[float, float]]:
    """The loss, and the upstream gradient and z-loss of the sum that has its gradient."""
    if options.reduction == "none":
        loss = shards.finish(total, z_loss=options.z_loss, reduction="none").loss
        return loss, (1.0, options.z_loss)
    sums = _groups.add(axes, shards.row_sums(total, options.z_loss))
    return sums.loss(options, total.terms.dtype), sums.scales(options)


def _first_order_only() -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError("second derivatives: expected none of a distributed loss")
