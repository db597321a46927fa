"""The functions of `fastce` for arrays on a CUDA device.

They take what the functions of the same names in `fastce` take, with PyTorch tensors, CuPy arrays
or anything with the CUDA array interface in the place of NumPy arrays, and return arrays of the
same library on the same device and stream; `fastce` itself hands such arrays to them.  Nothing is
copied, and no call waits for the device.  What differs:

- A target that is no class makes the loss and gradient of its row NaN.  The IndexError is raised by
  `synchronize`, or by a later call that finds it noted.
- A reduced loss is an array without axes, not a number, and so is `total_weight`.

`fastce.cuda.shards` has those of `fastce.shards`.
"""

import importlib.util

if importlib.util.find_spec("numba_cuda") is None:
    raise ImportError(
        "fastce.cuda: expected the package numba-cuda, of the extra fastce[cuda], or "
        "fastce[cuda12] for a driver of CUDA 12"
    )

from fastce.cuda.binary import binary_cross_entropy, binary_cross_entropy_and_grad
from fastce.cuda.losses import (
    cross_entropy,
    cross_entropy_and_grad,
    cross_entropy_stats,
    synchronize,
)
from fastce.cuda.softmax import log_softmax, logsumexp, softmax

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_and_grad",
    "cross_entropy",
    "cross_entropy_and_grad",
    "cross_entropy_stats",
    "log_softmax",
    "logsumexp",
    "softmax",
    "synchronize",
]
