"""How the operators of the logits act on batches of `torch.func.vmap`.

The entries of a batch are so many more rows, which are independent; a mean or sum over the rows of
each entry is taken afterwards.
"""

from typing import Any

import torch
from torch import Tensor

from fastce.torch._logits import (
    _cross_entropy,
    _cross_entropy_grad,
    _hessian_vector_product,
    divisors,
    inverse,
)
from fastce.torch._tensors import Options


def _to_front(size: int, dim: int | None, tensor: Tensor) -> Tensor:
    """The tensor with the mapped dimension in front, or the same for each entry."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _mapped(
    size: int, in_dims: tuple[Any, ...], input: Tensor, target: Tensor, weight: Tensor | None,
    axis: int, options: Options,
) -> tuple[tuple[Any, ...], Tensor]:  # fmt: skip
    """Arguments of the losses of the rows of all entries of a batch, and each entry's divisor."""
    by_input, by_target, by_weight = in_dims[:3]
    if by_weight is not None:
        raise NotImplementedError("vmap: expected one weight for the whole batch, got one for each")
    own_count = options.reduction == "mean" and options.normalizer is None
    if own_count and options.z_loss and weight is not None:  # that mean has two divisors
        raise NotImplementedError(
            "vmap: expected a normalizer for the mean with both weight and z_loss, got None"
        )
    input, target = _to_front(size, by_input, input), _to_front(size, by_target, target)
    axis = axis % (input.ndim - 1) + 1
    rowwise = options._replace(reduction="none", normalizer=None)
    return (
        (input, target, weight, axis, *rowwise),
        divisors(size, input, target, weight, axis, options),
    )


@_cross_entropy.register_vmap
def _(
    info: Any, in_dims: tuple[Any, ...], input: Tensor, target: Tensor, weight: Tensor | None,
    axis: int, *others: Any,
) -> tuple[Tensor, int]:  # fmt: skip
    options = Options(*others)
    arguments, divisor = _mapped(info.batch_size, in_dims, input, target, weight, axis, options)
    losses = _cross_entropy(*arguments)
    if options.reduction == "none":
        return losses, 0
    sums = losses.reshape(info.batch_size, -1).sum(1, dtype=torch.float64)
    return (sums * inverse(divisor, torch.nan)).to(losses.dtype), 0


@_cross_entropy_grad.register_vmap
def _(
    info: Any, in_dims: tuple[Any, ...], g: Tensor, input: Tensor, target: Tensor,
    weight: Tensor | None, axis: int, *others: Any,
) -> tuple[Tensor, int]:  # fmt: skip
    options = Options(*others)
    arguments, divisor = _mapped(info.batch_size, in_dims[1:], input, target, weight, axis, options)
    g = _to_front(info.batch_size, in_dims[0], g)
    if options.reduction != "none":
        rows = list(arguments[0].shape)
        del rows[arguments[3]]
        g = g * inverse(divisor, 0.0)
        g = g.reshape(-1, *(1,) * (len(rows) - 1)).expand(rows)
    return _cross_entropy_grad(g, *arguments), 0


@_hessian_vector_product.register_vmap
def _(
    info: Any, in_dims: tuple[Any, ...], input: Tensor, v: Tensor, factor: Tensor, axis: int
) -> tuple[Tensor, int]:
    input, v, factor = map(_to_front, (info.batch_size,) * 3, in_dims, (input, v, factor))
    axis = axis % (input.ndim - 1) + 1
    return _hessian_vector_product(input, v, factor, axis), 0
