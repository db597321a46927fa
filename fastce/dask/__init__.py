"""fastce's functions of dask arrays, chunked along rows, classes or both. Needs ``fastce[dask]``.

All are lazy: they read shapes and dtypes, and return dask arrays. Each chunk of logits is
summarised where it is, in one short record per row (see `fastce.shards`); records of one row of
chunks are merged along a tree, and what is small, sums over rows, along another. No chunk is joined
to another, none is kept, and a gradient has the chunks of the logits.

Results do not depend on workers, their number, or on tasks that are done twice, to the last bit.
"""

from fastce.dask.binary import binary_cross_entropy, binary_cross_entropy_and_grad
from fastce.dask.curvature import gradient_hessian, hessian_vector_product
from fastce.dask.likelihood import nll_loss, nll_loss_and_grad
from fastce.dask.linear import linear_cross_entropy, linear_cross_entropy_and_grad
from fastce.dask.losses import cross_entropy, cross_entropy_and_grad, cross_entropy_stats
from fastce.dask.softmax import log_softmax, logsumexp, softmax

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_and_grad",
    "cross_entropy",
    "cross_entropy_and_grad",
    "cross_entropy_stats",
    "gradient_hessian",
    "hessian_vector_product",
    "linear_cross_entropy",
    "linear_cross_entropy_and_grad",
    "log_softmax",
    "logsumexp",
    "nll_loss",
    "nll_loss_and_grad",
    "softmax",
]
