"""Compiled cross-entropy kernels: losses, gradients and log-sum-exp as fast as memory moves."""

from fastce.binary import binary_cross_entropy, binary_cross_entropy_and_grad
from fastce.cpu.threads import get_num_threads, num_threads, set_num_threads
from fastce.curvature import gradient_hessian, hessian_vector_product
from fastce.likelihood import nll_loss, nll_loss_and_grad
from fastce.linear import linear_cross_entropy, linear_cross_entropy_and_grad
from fastce.losses import (
    CrossEntropyStats,
    cross_entropy,
    cross_entropy_and_grad,
    cross_entropy_stats,
)
from fastce.softmax import log_softmax, logsumexp, softmax

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyStats",
    "binary_cross_entropy",
    "binary_cross_entropy_and_grad",
    "cross_entropy",
    "cross_entropy_and_grad",
    "cross_entropy_stats",
    "get_num_threads",
    "gradient_hessian",
    "hessian_vector_product",
    "linear_cross_entropy",
    "linear_cross_entropy_and_grad",
    "log_softmax",
    "logsumexp",
    "nll_loss",
    "nll_loss_and_grad",
    "num_threads",
    "set_num_threads",
    "softmax",
]
