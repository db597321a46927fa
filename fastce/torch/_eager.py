"""Cross-entropy in eager mode, past the dispatcher.

On the CPU loss and gradient are computed in one pass, for an upstream gradient of 1. Whether it was
that would have to be asked of a CUDA device and waited for, and multiplying afterwards would read
and write the gradient once more: there it is computed in backward, as for losses of rows, whose
upstream gradients are not known before.
"""

from typing import Any

import torch
from torch import Tensor

from fastce.torch import _head, _logits
from fastce.torch._head_operators import linear_cross_entropy_grad
from fastce.torch._tensors import SIXTEEN_BITS, Options, mark_overwritten

_NO_GRADIENTS = (None,) * 4


def _in_backward(input: Tensor, options: Options) -> bool:
    """Whether the gradient is left to the backward pass."""
    return input.is_cuda or options.reduction == "none"


class CrossEntropy(torch.autograd.Function):
    """The loss, whose gradient is computed along with it and handed over in the first backward.

    It is computed anew, into the same memory, where an upstream gradient other than 1 comes in: a
    product would be as slow and round once more, to nothing if the numbers are small 16-bit ones.
    Further passes through the same graph compute it anew as well.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, axis: int, options: Options
    ) -> Tensor:
        ctx.save_for_backward(input, target, weight)
        ctx.arguments = axis, options
        if _in_backward(input, options):
            return _logits.loss(input, target, weight, axis, options)
        # Not among the saved tensors: whoever takes it may write to it.
        loss, ctx.gradient = _logits.loss_and_gradient(input, target, weight, axis, options)
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        input, target, weight = ctx.saved_tensors
        axis, options = ctx.arguments
        if torch.is_grad_enabled():
            again = _logits.cross_entropy_grad(g, input, target, weight, axis, *options)
            return again, *_NO_GRADIENTS
        gradient = vars(ctx).pop("gradient", None)
        if gradient is None or g.item() != 1.0:
            gradient = _logits.gradient(g, input, target, weight, axis, options, gradient)
        return gradient, *_NO_GRADIENTS


class InPlace(torch.autograd.Function):
    """The loss, whose gradient takes the memory of the logits.

    16-bit logits stay until backward, since there is no memory for their gradient in float32, and
    one of 16 bits has lost its small numbers before a loss scale is multiplied in. The others are
    overwritten at once, for the gradient of 1 and a product if need be: in float32 no digits are
    lost by that but those of numbers below 1e-38, and it takes 0.7 of the time of two passes.

    The version counter tells torch of it: who needs the logits afterwards gets torch's own error,
    and a loss that is asked for afterwards ours.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, axis: int, options: Options
    ) -> Tensor:
        memory = input.detach()  # shares the version counter
        ctx.arguments = axis, options
        ctx.in_backward = _in_backward(input, options) or input.dtype in SIXTEEN_BITS
        if ctx.in_backward:
            loss = _logits.loss(input, target, weight, axis, options)
        else:
            loss, _ = _logits.loss_and_gradient(input, target, weight, axis, options, memory)
            mark_overwritten(memory)
        ctx.save_for_backward(memory, target, weight)
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        memory, target, weight = ctx.saved_tensors
        axis, options = ctx.arguments
        if torch.is_grad_enabled():
            raise RuntimeError(
                "in_place: expected a backward without create_graph, got one with it: "
                "the logits that second derivatives need are gone"
            )
        if ctx.in_backward:
            _logits.gradient(g, memory, target, weight, axis, options, memory)
            mark_overwritten(memory)
        elif g.item() != 1.0:
            memory.data.mul_(g)  # without a new version, which marks of other parts would not have
            mark_overwritten(memory)
        return memory, *_NO_GRADIENTS


class LinearCrossEntropy(torch.autograd.Function):
    """The loss in eager mode, whose gradients are computed along with it and handed over once.

    They stay in float32 until then, so that an upstream gradient is multiplied in before numbers
    are rounded to 16 bits. Further passes through the same graph compute them anew.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, linear_weight: Tensor, target: Tensor,
        linear_bias: Tensor | None, weight: Tensor | None, options: Options,
    ) -> Tensor:  # fmt: skip
        arguments = input, linear_weight, target, linear_bias, weight
        ctx.save_for_backward(*arguments)
        ctx.options = options
        if options.reduction == "none":
            return _head.loss(*arguments, options)
        value, ctx.gradients = _head.loss_and_gradients(*arguments, options)
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        input, linear_weight, target, linear_bias, weight = ctx.saved_tensors
        arguments = input, linear_weight, target, linear_bias, weight
        gradients = vars(ctx).pop("gradients", None)
        if torch.is_grad_enabled():
            gradients = linear_cross_entropy_grad(g, *arguments, *ctx.options)
        elif gradients is None:
            _, gradients = _head.loss_and_gradients(*arguments, ctx.options, g)
        elif (factor := g.item()) != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(factor)
        dx, dweight, dbias = _head.narrowed(gradients, input, linear_weight, linear_bias)
        return dx, dweight, None, dbias, None, None
