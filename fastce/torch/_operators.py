"""Operators of torch.library with derivatives that torch.func finds as well."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def differentiable(
    operator: Any, keep: Callable[..., None], differentiate: Callable[..., Any]
) -> Callable[..., Any]:
    """Give an operator its derivative, and return what calls it wherever it is called.

    torch.func does not see the derivatives that an operator is registered with, but those of a
    Function around it (torch 2.13.0).
    """
    operator.register_autograd(differentiate, setup_context=keep)

    class Differentiable(torch.autograd.Function):
        generate_vmap_rule = True
        setup_context = staticmethod(keep)
        backward = staticmethod(differentiate)

        @staticmethod
        @functools.wraps(operator._init_fn)  # torch.compile counts the arguments
        def forward(*arguments: Any) -> Any:
            return operator(*arguments)

    def call(*arguments: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return Differentiable.apply(*arguments)
        return operator(*arguments)

    return call
