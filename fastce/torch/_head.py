"""Cross-entropy of a linear layer as operators of torch.library, and the short way past them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastce
from fastce.torch._operators import differentiable
from fastce.torch._tensors import (
    Options,
    array,
    class_weight,
    empty_like,
    loss_dtype,
    loss_tensor,
    optional_array,
    upstream,
    wide,
)

# Of input, linear_weight and linear_bias.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def flattened(
    input: Tensor, linear_weight: Tensor, target: Tensor
) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """Shape of the rows, and input and target with one axis of rows."""
    rows, classes = tuple(input.shape[:-1]), len(linear_weight)
    x = input if input.ndim == 2 else input.reshape(-1, input.shape[-1])
    if target.shape == rows:
        return rows, x, target.reshape(-1)
    if target.shape == (*rows, classes):
        return rows, x, target.reshape(-1, classes)
    raise ValueError(
        f"target: expected shape {rows} or {(*rows, classes)} for input of shape "
        f"{(*input.shape,)}, got {(*target.shape,)}"
    )


def arrays(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None,
    weight: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    """What the core takes; wide, as it cannot convert bits, and as gradients are rounded once."""
    return {
        "x": array(wide(input)), "weight": array(wide(linear_weight)), "targets": array(target),
        "bias": None if linear_bias is None else array(wide(linear_bias)),
        "class_weight": class_weight(weight),
    }  # fmt: skip


def loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None,
    weight: Tensor | None, options: Options,
) -> Tensor:  # fmt: skip
    """The loss alone."""
    given = arrays(input, linear_weight, target, linear_bias, weight)
    value = fastce.linear_cross_entropy(**given, **options._asdict())
    return loss_tensor(value, loss_dtype(input, linear_weight))


def loss_and_gradients(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None,
    weight: Tensor | None, options: Options, grad_output: Tensor | None = None,
) -> tuple[Tensor, Gradients]:  # fmt: skip
    """The loss and the gradients of input, linear_weight and linear_bias, not yet narrowed."""
    dx, dweight, dbias = (
        None if t is None else empty_like(t, wide(t).dtype)
        for t in (input, linear_weight, linear_bias)
    )
    value, _ = fastce.linear_cross_entropy_and_grad(
        **arrays(input, linear_weight, target, linear_bias, weight), **options._asdict(),
        grad_output=None if grad_output is None else upstream(grad_output),
        out=(optional_array(dx), optional_array(dweight), optional_array(dbias)),
    )  # fmt: skip
    return loss_tensor(value, loss_dtype(input, linear_weight)), (dx, dweight, dbias)


def narrowed(gradients: Gradients, *like: Tensor | None) -> Gradients:
    """The gradients in the dtypes of what they are the gradients of."""
    dx, dweight, dbias = (
        None if g is None or t is None else g.to(t.dtype)
        for g, t in zip(gradients, like, strict=True)
    )
    return dx, dweight, dbias


# Operators ----------------------------------------------------------------------------------------


@torch.library.custom_op("fastce::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None,
    weight: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float,
    softcap: float | None, reduction: str, normalizer: float | None,
) -> Tensor:  # fmt: skip
    """The loss."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer)
    return loss(input, linear_weight, target, linear_bias, weight, options)


@torch.library.custom_op("fastce::linear_cross_entropy_grad", mutates_args=())
def _linear_cross_entropy_grad(
    grad_output: Tensor, input: Tensor, linear_weight: Tensor, target: Tensor,
    linear_bias: Tensor | None, weight: Tensor | None, ignore_index: int, label_smoothing: float,
    z_loss: float, softcap: float | None, reduction: str, normalizer: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of input, linear_weight and linear_bias, times an upstream gradient.

    Without a bias the last one is empty.
    """
    options = Options(ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer)
    arguments = input, linear_weight, target, linear_bias, weight
    _, gradients = loss_and_gradients(*arguments, options, grad_output)
    dx, dweight, dbias = narrowed(gradients, input, linear_weight, linear_bias)
    return dx, dweight, input.new_empty(0) if dbias is None else dbias


@_linear_cross_entropy.register_fake
def _(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None,
    weight: Tensor | None, *options: Any,
) -> Tensor:  # fmt: skip
    rows = input.shape[:1] if Options(*options).reduction == "none" else ()
    return input.new_empty(rows, dtype=loss_dtype(input, linear_weight))


@_linear_cross_entropy_grad.register_fake
def _(
    grad_output: Tensor, input: Tensor, linear_weight: Tensor, target: Tensor,
    linear_bias: Tensor | None, *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dbias = input.new_empty(0) if linear_bias is None else torch.empty_like(linear_bias)
    return torch.empty_like(input), torch.empty_like(linear_weight), dbias


# Derivatives --------------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = inputs[5:]
    ctx.save_for_backward(*inputs[:5])


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    arguments = ctx.saved_tensors
    dx, dweight, dbias = linear_cross_entropy_grad(g, *arguments, *ctx.options)
    return dx, dweight, None, None if arguments[3] is None else dbias, *(None,) * 7


def _no_second_derivatives(ctx: Any, *grad_outputs: Any) -> None:
    raise NotImplementedError(
        "second derivatives: expected cross_entropy(F.linear(input, linear_weight), target), "
        "got linear_cross_entropy"
    )


def _no_forward_mode(ctx: Any, *tangents: Any) -> None:
    raise NotImplementedError(
        "forward-mode derivatives: expected cross_entropy(F.linear(input, linear_weight), target), "
        "got linear_cross_entropy"
    )


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


linear_cross_entropy = differentiable(_linear_cross_entropy, _keep, _backward, _no_forward_mode)
linear_cross_entropy_grad = differentiable(
    _linear_cross_entropy_grad, _keep_nothing, _no_second_derivatives, _no_forward_mode
)


def _one_by_one(operator: Callable[..., Any]) -> Callable[..., Any]:
    """A rule for `torch.func.vmap`: an entry of the batch at a time, each as large as a call."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        results = [
            operator(*(
                a if dim is None else a.select(dim, k)
                for a, dim in zip(arguments, in_dims, strict=True)
            ))
            for k in range(info.batch_size)
        ]  # fmt: skip
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


for _operator in (_linear_cross_entropy, _linear_cross_entropy_grad):
    _operator.register_vmap(_one_by_one(_operator))


# Past the operators -------------------------------------------------------------------------------


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
            return loss(*arguments, options)
        value, ctx.gradients = loss_and_gradients(*arguments, options)
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        input, linear_weight, target, linear_bias, weight = ctx.saved_tensors
        arguments = input, linear_weight, target, linear_bias, weight
        gradients = vars(ctx).pop("gradients", None)
        if torch.is_grad_enabled():
            gradients = linear_cross_entropy_grad(g, *arguments, *ctx.options)
        elif gradients is None:
            _, gradients = loss_and_gradients(*arguments, ctx.options, g)
        elif (factor := g.item()) != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(factor)
        dx, dweight, dbias = narrowed(gradients, input, linear_weight, linear_bias)
        return dx, dweight, None, dbias, None, None
