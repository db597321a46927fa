"""Operators of torch.library with derivatives that torch.func finds as well."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

from fastce.torch._tensors import forward_mode


def differentiable(
    operator: Any, keep: Callable[..., None], differentiate: Callable[..., Any],
    push_forward: Callable[..., Any],
) -> Callable[..., Any]:  # fmt: skip
    """Give an operator its derivatives, and return what calls it wherever it is called.

    torch.func does not see the derivative that an operator is registered with, but those of a
    Function around it, and forward mode has no other place (torch 2.13.0).
    """
    operator.register_autograd(differentiate, setup_context=keep)

    class Differentiable(torch.autograd.Function):
        generate_vmap_rule = True
        setup_context = staticmethod(keep)
        backward = staticmethod(differentiate)
        jvp = staticmethod(push_forward)

        @staticmethod
        @functools.wraps(operator._init_fn)  # torch.compile counts the arguments
        def forward(*arguments: Any) -> Any:
            return operator(*arguments)

    def call(*arguments: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            _refuse_nested_forward_mode()
        elif not forward_mode():
            return operator(*arguments)
        return Differentiable.apply(*arguments)

    return call


def _refuse_nested_forward_mode() -> None:
    """Fail where the tangent of a tangent is wanted: torch drops it, without a word (2.13.0)."""
    kinds = [interpreter.key() for interpreter in retrieve_all_functorch_interpreters()]
    if kinds.count(torch._C._functorch.TransformType.Jvp) > 1:
        raise NotImplementedError(
            "second derivatives: expected jvp or jacfwd around grad, vjp or jacrev, or the other "
            "way round, got forward mode in forward mode"
        )
