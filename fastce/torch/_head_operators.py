"""Cross-entropy of a linear layer as operators of torch.library.

As those of logits they are differentiated by calling the next: the loss has a gradient, and the
slope along a direction; both have the derivatives of the gradient along a direction.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastce import _arguments as checks
from fastce._arguments import AnyArray
from fastce._head import Head
from fastce._head_curvature import slopes, slopes_and_gradients
from fastce.torch._head import arrays, loss, loss_and_gradients, narrowed
from fastce.torch._logits import refuse_curved_options
from fastce.torch._operators import differentiable
from fastce.torch._tensors import Options, array, loss_dtype, upstream, wide

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


@torch.library.custom_op("fastce::linear_cross_entropy_slope", mutates_args=())
def _linear_cross_entropy_slope(
    u: Tensor | None, v: Tensor | None, c: Tensor | None, input: Tensor, linear_weight: Tensor,
    target: Tensor, linear_bias: Tensor | None, weight: Tensor | None, ignore_index: int,
    label_smoothing: float, z_loss: float, softcap: float | None, reduction: str,
    normalizer: float | None,
) -> Tensor:  # fmt: skip
    """The derivative of the loss along (u, v, c) of input, linear_weight and linear_bias."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer)
    head = _checked(input, linear_weight, target, linear_bias, weight, options)
    return _reduced(slopes(head, _direction(u, v, c)), head)


@torch.library.custom_op("fastce::linear_cross_entropy_second", mutates_args=())
def _linear_cross_entropy_second(
    grad_output: Tensor, u: Tensor | None, v: Tensor | None, c: Tensor | None, input: Tensor,
    linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
    reduction: str, normalizer: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same, and the derivatives of the gradients, times an upstream gradient.

    Without a bias the last one is empty.
    """
    options = Options(ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer)
    head = _checked(input, linear_weight, target, linear_bias, weight, options)
    above = checks.upstream(upstream(grad_output), head.call.rows, reduction)
    found, *gradients = slopes_and_gradients(head, _direction(u, v, c), above)
    dx, dweight, dbias = narrowed(
        tuple(map(torch.from_numpy, gradients)), input, linear_weight, linear_bias
    )
    return _reduced(found, head), dx, dweight, input.new_empty(0) if dbias is None else dbias


def _checked(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None,
    weight: Tensor | None, options: Options,
) -> Head:  # fmt: skip
    labels = wide(target) if target.is_floating_point() else target
    return Head.checked(
        **arrays(input, linear_weight, labels, linear_bias, weight), **options._asdict()
    )


def _direction(*tensors: Tensor | None) -> Any:
    return tuple(None if t is None else array(wide(t)) for t in tensors)


def _reduced(slopes: AnyArray, head: Head) -> Tensor:
    """The slope of the loss, of those of its rows."""
    dtype = head.compute
    return torch.from_numpy(np.asarray(slopes.sum() if head.call.losses is None else slopes, dtype))


@_linear_cross_entropy.register_fake
def _(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None,
    weight: Tensor | None, *options: Any,
) -> Tensor:  # fmt: skip
    return _like_loss(input, linear_weight, options)


@_linear_cross_entropy_grad.register_fake
def _(
    grad_output: Tensor, input: Tensor, linear_weight: Tensor, target: Tensor,
    linear_bias: Tensor | None, *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _like_gradients(input, linear_weight, linear_bias)


@_linear_cross_entropy_slope.register_fake
def _(
    u: Tensor | None, v: Tensor | None, c: Tensor | None, input: Tensor, linear_weight: Tensor,
    target: Tensor, linear_bias: Tensor | None, weight: Tensor | None, *options: Any,
) -> Tensor:  # fmt: skip
    return _like_loss(input, linear_weight, options)


@_linear_cross_entropy_second.register_fake
def _(
    grad_output: Tensor, u: Tensor | None, v: Tensor | None, c: Tensor | None, input: Tensor,
    linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    loss = _like_loss(input, linear_weight, options)
    return loss, *_like_gradients(input, linear_weight, linear_bias)


def _like_loss(input: Tensor, linear_weight: Tensor, options: Sequence[Any]) -> Tensor:
    rows = input.shape[:1] if Options(*options).reduction == "none" else ()
    return input.new_empty(rows, dtype=loss_dtype(input, linear_weight))


def _like_gradients(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = input.new_empty(0) if linear_bias is None else torch.empty_like(linear_bias)
    return torch.empty_like(input), torch.empty_like(linear_weight), dbias


# Derivatives --------------------------------------------------------------------------------------

# Of the arguments behind the first five of the loss.
_NO_GRADIENTS = (None,) * 6


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _keep_from(ctx, 0, inputs)


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _keep_from(ctx, 1, inputs)


def _keep_slope(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _keep_from(ctx, 3, inputs)


def _keep_from(ctx: Any, first: int, inputs: tuple[Any, ...]) -> None:
    """Keep what the loss takes from argument `first` on, and what comes before it."""
    ctx.options = inputs[first + 5 :]
    ctx.set_materialize_grads(False)  # products with zeros take as long as others
    ctx.save_for_backward(*inputs[first : first + 5], *inputs[:first])
    ctx.save_for_forward(*inputs[first : first + 5], *inputs[:first])


def _loss_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    arguments = ctx.saved_tensors
    dx, dweight, dbias = linear_cross_entropy_grad(g, *arguments, *ctx.options)
    return dx, dweight, None, _of_bias(dbias, arguments), None, *_NO_GRADIENTS


def _loss_forward(
    ctx: Any, u: Tensor | None, v: Tensor | None, h: None, c: Tensor | None, *_: None
) -> Tensor:
    return linear_cross_entropy_slope(u, v, c, *ctx.saved_tensors, *ctx.options)


def _gradient_backward(
    ctx: Any, u: Tensor | None, v: Tensor | None, c: Tensor | None
) -> tuple[Tensor | None, ...]:
    *arguments, g = ctx.saved_tensors
    refuse_curved_options(Options(*ctx.options))
    given = (u, v, _of_bias(c, arguments), *arguments, *ctx.options)
    if not any(ctx.needs_input_grad[1:]):
        return linear_cross_entropy_slope(*given), None, None, None, None, None, *_NO_GRADIENTS
    slope, dx, dweight, dbias = linear_cross_entropy_second(g, *given)
    return slope, dx, dweight, None, _of_bias(dbias, arguments), None, *_NO_GRADIENTS


def _gradient_forward(
    ctx: Any, dg: Tensor | None, u: Tensor | None, v: Tensor | None, h: None, c: Tensor | None,
    *_: None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The derivatives along dg, of the upstream gradient, and u, v, c, of the others."""
    *arguments, g = ctx.saved_tensors
    refuse_curved_options(Options(*ctx.options))
    terms = []
    if dg is not None:
        terms.append(linear_cross_entropy_grad(dg, *arguments, *ctx.options))
    if any(t is not None for t in (u, v, c)):
        terms.append(linear_cross_entropy_second(g, u, v, c, *arguments, *ctx.options)[1:])
    return tuple(map(sum, zip(*terms, strict=True)))


def _slope_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    *arguments, u, v, c = ctx.saved_tensors
    refuse_curved_options(Options(*ctx.options))
    dx, dweight, dbias = linear_cross_entropy_grad(g, *arguments, *ctx.options)
    by_direction = (
        None if t is None else gradient
        for t, gradient in zip((u, v, c), (dx, dweight, dbias), strict=True)
    )
    _, dx, dweight, dbias = linear_cross_entropy_second(g, u, v, c, *arguments, *ctx.options)
    return *by_direction, dx, dweight, None, _of_bias(dbias, arguments), None, *_NO_GRADIENTS


def _of_bias(dbias: Tensor | None, arguments: Sequence[Any]) -> Tensor | None:
    """None where there is no bias; an operator has to return a tensor."""
    return None if arguments[3] is None else dbias


def _no_third_derivatives(ctx: Any, *_: Any) -> None:
    raise NotImplementedError("third derivatives: expected at most second ones")


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


linear_cross_entropy = differentiable(_linear_cross_entropy, _keep, _loss_backward, _loss_forward)
linear_cross_entropy_grad = differentiable(
    _linear_cross_entropy_grad, _keep_gradient, _gradient_backward, _gradient_forward
)
linear_cross_entropy_slope = differentiable(
    _linear_cross_entropy_slope, _keep_slope, _slope_backward, _no_third_derivatives
)
linear_cross_entropy_second = differentiable(
    _linear_cross_entropy_second, _keep_nothing, _no_third_derivatives, _no_third_derivatives
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


for _operator in (
    _linear_cross_entropy, _linear_cross_entropy_grad, _linear_cross_entropy_slope,
    _linear_cross_entropy_second,
):  # fmt: skip
    _operator.register_vmap(_one_by_one(_operator))
