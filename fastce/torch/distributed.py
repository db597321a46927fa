"""Losses over `torch.distributed`, the classes or the rows divided among the ranks of a group.

Every rank makes the same calls in the same order; tensors are on the CPU of every rank or on a CUDA
device of every rank, and the group has a backend for them, such as gloo or NCCL. Where a rank finds
something wrong with its arguments, all raise, the others naming the rank, before anything else is
exchanged: ranks agree on 24 bytes each first. They do so on the CPU if the group has a backend for
it; with NCCL alone the host waits for the device there, and nowhere else.

On CUDA devices a target that is no class is reported late on every rank, as by `fastce.cuda`: by
`fastce.cuda.synchronize` or a later call. Until then the loss is NaN, the same on every rank.

`fastce.torch.cross_entropy` does the same for a DTensor, whose placements say what is divided.
"""

from typing import Any

from torch import Tensor

from fastce.torch._divided import Divided, divided_head
from fastce.torch._groups import Axis, eagerly
from fastce.torch._tensors import Options

__all__ = [
    "data_parallel_cross_entropy",
    "vocabulary_parallel_cross_entropy",
    "vocabulary_parallel_linear_cross_entropy",
]


@eagerly
def vocabulary_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    class_offset: int,
    classes: int,
    group: Any = None,
    axis: int = 1,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    normalizer: float | None = None,
) -> Tensor:
    """Cross-entropy of logits whose classes are divided among the ranks.

    Parameters
    ----------
    input : torch.Tensor of float64, float32, float16 or bfloat16
        Logits of the classes from `class_offset` on, for all rows.
    target : torch.Tensor
        Classes of all rows, integers in [0, classes), the same on every rank; or the rank's share
        of probabilities, floats shaped like `input`.
    weight : torch.Tensor, optional
        Weights of the rank's classes.
    class_offset, classes : int
        The first class of the rank, and the number of all classes.
    group : torch.distributed.ProcessGroup, optional
        The ranks that have a slice each. None means all.
    axis, ignore_index, reduction, label_smoothing, z_loss, softcap, normalizer
        As in `fastce.torch.cross_entropy`, the same on every rank.

    Returns
    -------
    torch.Tensor
        The loss of all classes in float32 or float64, the same bits on every rank. Its gradient
        with respect to `input` is that of the rank's slice.

    Raises
    ------
    TypeError, ValueError, IndexError, NotImplementedError
        On every rank, if one has bad arguments, or other rows or options than the others, or if the
        slices are not all classes.

    Notes
    -----
    One all_gather of 64 bytes per row and rank, 136 with label smoothing or probabilities as
    targets; what comes together is exact, so that neither the number of ranks nor how classes are
    divided costs digits (see `fastce.shards`). On CUDA devices it is one of 40 or 56 bytes per row
    and rank, merged in the order of the ranks with one rounding of float64 for each. The logits are
    read twice. Eager mode only, first derivatives only.

    What made the logits of a slice from something that all ranks share, hidden states say, has to
    add up the gradients of all ranks, as in any tensor-parallel layer.
    """
    options = Options(ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer)
    where = {"class_offset": class_offset, "axis": axis}
    axes = (Axis(group, "classes"),)
    loss: Tensor = Divided.apply(input, target, weight, where, classes, options, axes)
    return loss


@eagerly
def vocabulary_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    class_offset: int,
    classes: int,
    group: Any = None,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    normalizer: float | None = None,
) -> Tensor:
    """Cross-entropy of a linear layer whose classes are divided among the ranks.

    Parameters
    ----------
    input : torch.Tensor of float64, float32, float16 or bfloat16, of shape (..., D)
        Hidden states of all rows, the same on every rank.
    linear_weight, linear_bias, weight : torch.Tensor, of shape (K, D), (K,) and (K,)
        What belongs to the K classes of the rank, from `class_offset` on; otherwise as in
        `fastce.torch.linear_cross_entropy`.
    target : torch.Tensor
        Classes of all rows, integers in [0, classes) of shape (...), the same on every rank; or the
        rank's share of probabilities, of shape (..., K).
    class_offset, classes, group
        As in `vocabulary_parallel_cross_entropy`.
    reduction, ignore_index, label_smoothing, z_loss, softcap, normalizer
        As in `fastce.torch.linear_cross_entropy`, the same on every rank.

    Returns
    -------
    torch.Tensor
        The loss of all classes in float32 or float64, the same bits on every rank. Its gradient
        with respect to `input` is that of all classes, the same bits on every rank; the others are
        those of the rank's own classes.

    Raises
    ------
    TypeError, ValueError, IndexError, NotImplementedError
        On every rank, as `vocabulary_parallel_cross_entropy` does; also if gradients of `input` are
        wanted on some ranks only.

    Notes
    -----
    Forward, what `vocabulary_parallel_cross_entropy` exchanges. Backward, one all_reduce of the
    gradient of `input` in the dtype that is computed with, so that every rank has to make that pass
    with the same upstream gradient; none if `input` requires no gradient.

    Tensors are on the CPU: there are no kernels for a linear layer on CUDA devices.

    Logits are computed for as many rows at a time as fit in 64 MiB, were classes divided evenly.
    What ranks know of these rows is exchanged before the next, so that the gradients are computed
    along with the loss, from the same logits. Only with "none", or a mean with both `weight` and
    `z_loss` but no `normalizer`, is that not to be had: then logits that do not fit as a whole are
    computed once more in the backward pass. 16-bit tensors are widened whole until then.
    """
    options = Options(
        -100 if ignore_index is None else ignore_index,
        label_smoothing, z_loss, softcap, reduction, normalizer,
    )  # fmt: skip
    axes = (Axis(group, "classes"),)
    return divided_head(
        input, linear_weight, target, linear_bias, weight, class_offset, classes, options, axes
    )


@eagerly
def data_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    group: Any = None,
    axis: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Mean cross-entropy over the rows of all ranks, whatever number of them counts on each.

    Parameters
    ----------
    input, target, weight
        As in `fastce.torch.cross_entropy`, of the rank's own rows, of which there may be none.
    group : torch.distributed.ProcessGroup, optional
        The ranks that the rows are divided among. None means all.
    axis, ignore_index, label_smoothing, z_loss, softcap
        As in `fastce.torch.cross_entropy`, the same on every rank.

    Returns
    -------
    torch.Tensor
        The mean over the rows of all ranks in float32 or float64, the same on every rank. Its
        gradient with respect to `input` is that of the rank's rows.

    Raises
    ------
    TypeError, ValueError, IndexError, NotImplementedError
        On every rank, if one has bad arguments or another number of classes or other options.

    Notes
    -----
    One all_reduce of 32 bytes, or on CUDA devices an all_gather of 40 per rank. The logits are read
    twice. Eager mode only, first derivatives only.

    Gradients of shared weights are to be summed over the ranks. `DistributedDataParallel` averages
    them: there, multiply the loss by the number of ranks.
    """
    options = Options(ignore_index, label_smoothing, z_loss, softcap, "mean", None)
    where = {"class_offset": 0, "axis": axis}
    axes = (Axis(group, "rows"),)
    loss: Tensor = Divided.apply(input, target, weight, where, None, options, axes)
    return loss
