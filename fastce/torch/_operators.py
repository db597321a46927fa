"""Operators of torch.library with derivatives that torch.func finds as well."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def differentiable(
    operator: Any, keep: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Give an operator its derivative, and return what calls it wherever it is called.

    torch.func does not see the derivatives that an operator is registered with, but those of a
    Function around it (torch 2.13.0).
    """
    operator.register_autograd(backward, setup_context=keep)

    # torch.compile wants a plain function, and counts its arguments.
    @functools.wraps(operator._init_fn)
    def forward(*arguments: Any) -> Any:
        return operator(*arguments)

    methods = {"forward": forward, "setup_context": keep, "backward": backward}
    function = type(
        operator._name.partition("::")[2],
        (torch.autograd.Function,),
        {"generate_vmap_rule": True, **{n: staticmethod(m) for n, m in methods.items()}},
    )

    def call(*arguments: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return function.apply(*arguments)
        return operator(*arguments)

    return call
