"""Cross-entropy of logits as operators of torch.library.

The loss and its gradient are operators that torch.compile and torch.func see from outside. Each is
differentiated by calling the next, down to the product with the Hessian.
"""

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
    kernel_array,
    loss_dtype,
    loss_tensor,
    optional_array,
    refuse_overwritten,
    tensor_of,
    upstream,
    wide,
)

_NO_GRADIENTS = (None,) * 8  # of the arguments behind the target


def _arguments(
    input: Tensor, target: Tensor, weight: Tensor | None, axis: int, options: Options
) -> dict[str, Any]:
    refuse_overwritten(input)
    place = kernel_array(input)
    ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer = options
    return {
        "logits": place(input), "targets": place(target), "weight": class_weight(weight, place),
        "axis": axis, "ignore_index": ignore_index, "label_smoothing": label_smoothing,
        "z_loss": z_loss, "softcap": softcap, "reduction": reduction, "normalizer": normalizer,
    }  # fmt: skip


def loss(
    input: Tensor, target: Tensor, weight: Tensor | None, axis: int, options: Options
) -> Tensor:
    """The loss alone."""
    loss = fastce.cross_entropy(**_arguments(input, target, weight, axis, options))
    return loss_tensor(loss)


def loss_and_gradient(
    input: Tensor, target: Tensor, weight: Tensor | None, axis: int, options: Options,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss of logits on the CPU and its gradient, into `out` or fresh memory, in one pass."""
    if out is None and not input.is_contiguous():  # such strides the core would choose otherwise
        out = empty_like(input)
    loss, gradient = fastce.cross_entropy_and_grad(
        **_arguments(input, target, weight, axis, options), out=optional_array(out)
    )
    return loss_tensor(loss), tensor_of(gradient) if out is None else out


def gradient(
    grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, axis: int,
    options: Options, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The gradient times an upstream one, into `out` or fresh memory."""
    out = empty_like(input) if out is None else out
    fastce.cross_entropy_and_grad(
        **_arguments(input, target, weight, axis, options),
        grad_output=upstream(grad_output), out=kernel_array(input)(out),
    )  # fmt: skip
    return out


# Operators ----------------------------------------------------------------------------------------


@torch.library.custom_op("fastce::cross_entropy", mutates_args=())
def _cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, axis: int, ignore_index: int,
    label_smoothing: float, z_loss: float, softcap: float | None, reduction: str,
    normalizer: float | None,
) -> Tensor:  # fmt: skip
    """The loss."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer)
    return loss(input, target, weight, axis, options)


@torch.library.custom_op("fastce::cross_entropy_grad", mutates_args=())
def _cross_entropy_grad(
    grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, axis: int,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
    reduction: str, normalizer: float | None,
) -> Tensor:  # fmt: skip
    """The gradient with respect to the input, times an upstream gradient."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer)
    return gradient(grad_output, input, target, weight, axis, options)


@torch.library.custom_op("fastce::hessian_vector_product", mutates_args=())
def _hessian_vector_product(input: Tensor, v: Tensor, factor: Tensor, axis: int) -> Tensor:
    """The Hessian of each row's plain loss, times its factor and a vector."""
    if input.is_cuda:
        raise NotImplementedError(
            f"second derivatives: expected logits on the CPU, got some on {input.device}: "
            "fastce.cuda has no hessian_vector_product"
        )
    product = fastce.hessian_vector_product(
        array(wide(input)), array(wide(v)), axis=axis, grad_output=upstream(factor)
    )
    return torch.empty_like(input).copy_(torch.from_numpy(product))


def _loss_shape(input: Tensor, axis: int, options: Options) -> list[int]:
    shape = list(input.shape)
    del shape[axis]
    return shape if options.reduction == "none" else []


@_cross_entropy.register_fake
def _(input: Tensor, target: Tensor, weight: Tensor | None, axis: int, *options: Any) -> Tensor:
    return input.new_empty(_loss_shape(input, axis, Options(*options)), dtype=loss_dtype(input))


@_cross_entropy_grad.register_fake
def _(grad_output: Tensor, input: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(input)


@_hessian_vector_product.register_fake
def _(input: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(input)


# Derivatives --------------------------------------------------------------------------------------


def _keep_loss(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, target, weight, ctx.axis, *options = inputs
    ctx.options = Options(*options)
    ctx.save_for_backward(input, target, weight)
    ctx.save_for_forward(input, target, weight)


def _loss_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    input, target, weight = ctx.saved_tensors
    by_input, by_target, *_ = ctx.needs_input_grad
    grad_input = grad_target = None
    if by_input:
        grad_input = cross_entropy_grad(g, input, target, weight, ctx.axis, *ctx.options)
    if by_target:
        factor = _target_factor(g, input, target, weight, ctx.axis, ctx.options)
        surprise = _surprise(input, ctx.axis, ctx.options, g.dtype)
        grad_target = (factor * surprise).to(target.dtype)
    return grad_input, grad_target, *_NO_GRADIENTS


def _loss_forward(ctx: Any, v: Tensor | None, h: Tensor | None, *_: None) -> Tensor:
    """The derivative along v, of the logits, and h, of probabilities as targets."""
    input, target, weight = ctx.saved_tensors
    axis, options = ctx.axis, ctx.options
    one = input.new_ones(_loss_shape(input, axis, options), dtype=loss_dtype(input))
    terms = []
    if v is not None:
        terms.append(
            cross_entropy_grad(one, input, target, weight, axis, *options).to(one.dtype) * v
        )
    if h is not None:
        factor = _target_factor(one, input, target, weight, axis, options)
        terms.append(factor * _surprise(input, axis, options, one.dtype) * h)
    return sum(terms).to(one.dtype).sum(axis if one.ndim else None)


def _surprise(input: Tensor, axis: int, options: Options, dtype: torch.dtype) -> Tensor:
    """-log p of every class."""
    z, softcap = wide(input).to(dtype), options.softcap
    if softcap is not None:  # masked classes stay masked, and huge logits are no such
        z = torch.where(z == -torch.inf, z, softcap * torch.tanh(z / softcap))
    return -torch.log_softmax(z, axis, dtype=dtype)


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    g, input, target, weight, ctx.axis, *options = inputs
    ctx.options = Options(*options)
    ctx.save_for_backward(g, input, target, weight)
    ctx.save_for_forward(g, input, target, weight)


def _gradient_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    g, input, target, weight = ctx.saved_tensors
    axis, options = ctx.axis, ctx.options
    by_upstream, by_input, by_target, *_ = ctx.needs_input_grad
    refuse_curved_options(options)
    grad_g = grad_input = grad_target = None
    if by_upstream:
        unit = cross_entropy_grad(torch.ones_like(g), input, target, weight, axis, *options)
        grad_g = (unit.to(g.dtype) * v).sum(axis if g.ndim else None)
    if by_input:
        grad_input = _curvature(g, input, target, weight, axis, options, v)
    if by_target:
        p = torch.softmax(input, axis, dtype=g.dtype)
        centred = (p * v).sum(axis, keepdim=True) - v
        factor = _target_factor(g, input, target, weight, axis, options)
        grad_target = (factor * centred).to(target.dtype)
    return grad_g, grad_input, grad_target, *_NO_GRADIENTS


def _gradient_forward(
    ctx: Any, dg: Tensor | None, v: Tensor | None, h: Tensor | None, *_: None
) -> Tensor:
    """The derivative along dg, of the upstream gradient, v, of the logits, and h, of targets."""
    g, input, target, weight = ctx.saved_tensors
    axis, options = ctx.axis, ctx.options
    refuse_curved_options(options)
    terms = []
    if dg is not None:
        unit = cross_entropy_grad(torch.ones_like(g), input, target, weight, axis, *options)
        terms.append(unit * (dg.unsqueeze(axis) if dg.ndim else dg))
    if v is not None:
        terms.append(_curvature(g, input, target, weight, axis, options, v))
    if h is not None:
        u = _target_factor(g, input, target, weight, axis, options) * h
        p = torch.softmax(input, axis, dtype=g.dtype)
        terms.append(p * u.sum(axis, keepdim=True) - u)
    return sum(terms).to(input.dtype)


def _curvature(
    g: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, axis: int, options: Options,
    v: Tensor,
) -> Tensor:  # fmt: skip
    """The Hessian of the loss with respect to the input, times a vector and upstream gradients."""
    share = inverse(divisors(1, input, target, weight, axis, options), 0.0)[0]
    factor = g * share * _label_mass(input, target, weight, axis, options)
    return hessian_vector_product(input, v, factor, axis)


def refuse_curved_options(options: Options) -> None:
    if options.z_loss or options.softcap is not None:
        raise NotImplementedError(
            "second derivatives: expected neither z_loss nor softcap, got "
            f"z_loss={options.z_loss}, softcap={options.softcap}"
        )


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _no_third_derivatives(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError("third derivatives: expected at most second ones")


hessian_vector_product = differentiable(
    _hessian_vector_product, _keep_nothing, _no_third_derivatives, _no_third_derivatives
)
cross_entropy = differentiable(_cross_entropy, _keep_loss, _loss_backward, _loss_forward)
cross_entropy_grad = differentiable(
    _cross_entropy_grad, _keep_gradient, _gradient_backward, _gradient_forward
)


def _by_class(weight: Tensor, input: Tensor, axis: int) -> Tensor:
    """Weights of classes, to be multiplied with what is shaped like the input."""
    return weight.reshape(-1, *(1,) * (input.ndim - 1 - axis % input.ndim))


def _own_weight(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The weight of each row's class in float64, 0 where ignored."""
    target = target.long()
    valid = target != ignore_index
    if weight is None:
        return valid.double()
    return weight.double()[torch.where(valid, target, 0)] * valid


def _label_mass(
    input: Tensor, target: Tensor, weight: Tensor | None, axis: int, options: Options
) -> Tensor:
    """What the label of each row adds up to with weights and smoothing, in float64."""
    e = options.label_smoothing
    if target.is_floating_point():
        h = (1 - e) * target.double() + e / input.shape[axis]
        return (h if weight is None else h * _by_class(weight, input, axis)).sum(axis)
    own = _own_weight(target, weight, options.ignore_index)
    valid = _own_weight(target, None, options.ignore_index)
    return (1 - e) * own + e * valid * (1.0 if weight is None else weight.double().mean())


def divisors(
    parts: int, input: Tensor, target: Tensor, weight: Tensor | None, axis: int, options: Options
) -> Tensor:
    """What the sum over each of some equal parts of the rows is divided by, in float64."""
    if options.reduction != "mean":
        return input.new_ones(1, dtype=torch.float64)
    if options.normalizer is not None:
        return input.new_full((1,), options.normalizer, dtype=torch.float64)
    if target.is_floating_point():
        rows = input.numel() // (parts * input.shape[axis])
        return input.new_full((1,), rows, dtype=torch.float64)
    return _own_weight(target, weight, options.ignore_index).reshape(parts, -1).sum(1)


def inverse(divisors: Tensor, of_zero: float) -> Tensor:
    """1 / divisors, and what that is to be of 0."""
    return torch.where(divisors == 0, of_zero, 1 / divisors)


def _target_factor(
    g: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, axis: int, options: Options
) -> Tensor:
    """What multiplies -log p in the derivative with respect to probabilities as targets."""
    share = inverse(divisors(1, input, target, weight, axis, options), 0.0)[0]
    factor = (g.unsqueeze(axis) if g.ndim else g) * share * (1 - options.label_smoothing)
    # Not in float32: torch lets a 0-dimensional factor of float64 adapt to the weights.
    return factor if weight is None else factor * _by_class(weight.to(g.dtype), input, axis)
