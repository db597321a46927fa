"""Cross-entropy of tensors: what torch.nn.functional and torch.nn offer, by fastce's kernels."""

from fastce.torch.functional import cross_entropy, linear_cross_entropy
from fastce.torch.modules import CrossEntropyLoss, LinearCrossEntropyLoss

__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "cross_entropy",
    "linear_cross_entropy",
]
