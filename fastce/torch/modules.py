"""The losses as modules."""

from typing import Any

import torch
from torch import Tensor

from fastce.torch.functional import cross_entropy, linear_cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss`, computed by `fastce.torch.cross_entropy`.

    Parameters
    ----------
    weight, size_average, ignore_index, reduce, reduction, label_smoothing
        As in torch; `weight` is a buffer, here as there.
    **options
        `axis`, `z_loss`, `softcap`, `normalizer`, `dtype` and `in_place`, as in `cross_entropy`.

    Examples
    --------
    >>> import torch
    >>> from fastce.torch import CrossEntropyLoss
    >>> loss = CrossEntropyLoss(label_smoothing=0.1, z_loss=1e-4)
    >>> print(f"{loss(torch.zeros(2, 10), torch.tensor([3, 4])):.4f}")
    2.3031
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        axis: int = 1,
        z_loss: float = 0.0,
        softcap: float | None = None,
        normalizer: float | None = None,
        dtype: torch.dtype | None = None,
        in_place: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.options: dict[str, Any] = {
            "axis": axis, "z_loss": z_loss, "softcap": softcap, "normalizer": normalizer,
            "dtype": dtype, "in_place": in_place,
        }  # fmt: skip

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits and targets, as `cross_entropy` takes them."""
        return cross_entropy(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing, **self.options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The options that are not torch's defaults."""
        return _shown(
            {"ignore_index": self.ignore_index, "reduction": self.reduction,
             "label_smoothing": self.label_smoothing, **self.options}
        )  # fmt: skip


class LinearCrossEntropyLoss(torch.nn.Module):
    """A linear layer and its loss, by `fastce.torch.linear_cross_entropy`: no logits held whole.

    Its arguments and the names of its parameters are those of `torch.nn.LinearCrossEntropyLoss`, so
    that either loads what the other has saved.

    Parameters
    ----------
    in_features, num_classes : int
        D and C.
    bias : bool, default False
        Whether the layer has a bias.
    device, dtype
        Of the layer's parameters.
    weight : torch.Tensor of shape (C,), optional
        One factor per class; a buffer.
    reduction, ignore_index, label_smoothing, z_loss, softcap, normalizer
        As in `linear_cross_entropy`.

    Examples
    --------
    >>> import torch
    >>> from fastce.torch import LinearCrossEntropyLoss
    >>> head = LinearCrossEntropyLoss(16, 1000)
    >>> loss = head(torch.randn(8, 16), torch.arange(8))
    >>> loss.backward()
    >>> head.linear.weight.grad.shape
    torch.Size([1000, 16])
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        normalizer: float | None = None,
    ) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(in_features, num_classes, bias, device, dtype)
        self.register_buffer("weight", weight)
        self.options: dict[str, Any] = {
            "reduction": reduction, "ignore_index": ignore_index,
            "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap,
            "normalizer": normalizer,
        }  # fmt: skip

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of hidden states and targets, as `linear_cross_entropy` takes them."""
        return linear_cross_entropy(
            input, self.linear.weight, target,
            linear_bias=self.linear.bias, weight=self.weight, **self.options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The options."""
        return _shown(self.options)


def _shown(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())
