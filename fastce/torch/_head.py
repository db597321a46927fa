"""Cross-entropy of a linear layer: what the core takes of tensors, and what it gives."""

from typing import Any

from torch import Tensor

import fastce
from fastce.torch._tensors import (
    Options,
    array,
    class_weight,
    empty_like,
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
    return loss_tensor(value)


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
    return loss_tensor(value), (dx, dweight, dbias)


def narrowed(gradients: Gradients, *like: Tensor | None) -> Gradients:
    """The gradients in the dtypes of what they are the gradients of."""
    dx, dweight, dbias = (
        None if g is None or t is None else g.to(t.dtype)
        for g, t in zip(gradients, like, strict=True)
    )
    return dx, dweight, dbias
