"""Losses over `torch.distributed`, the classes or the rows divided among the ranks of a group.

Every rank makes the same calls in the same order; tensors are on the CPU, the backend is gloo.
Where a rank finds something wrong with its arguments, all raise, the others naming the rank, before
anything else is exchanged: ranks agree on 16 bytes each first. Backward passes exchange nothing.
"""

import zlib
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastce import _arguments as arguments
from fastce import losses, shards
from fastce.torch._tensors import (
    Options,
    array,
    class_weight,
    empty_like,
    loss_dtype,
    loss_tensor,
    upstream,
)

_RAISED = (TypeError, ValueError, IndexError, NotImplementedError, MemoryError)


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
    divided costs digits (see `fastce.shards`). The logits are read twice. Eager mode only, first
    derivatives only.

    What made the logits of a slice from something that all ranks share, hidden states say, has to
    add up the gradients of all ranks, as in any tensor-parallel layer.
    """
    options = Options(ignore_index, label_smoothing, z_loss, softcap, reduction, normalizer)
    where = {"class_offset": class_offset, "axis": axis}
    loss: Tensor = _VocabularyParallel.apply(input, target, weight, where, classes, options, group)
    return loss


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
    Two all_reduce, of 16 and of 8 bytes. Eager mode only, first derivatives only.

    Gradients of shared weights are to be summed over the ranks. `DistributedDataParallel` averages
    them: there, multiply the loss by the number of ranks.
    """
    options = Options(ignore_index, label_smoothing, z_loss, softcap, "mean", None)
    loss: Tensor = _DataParallel.apply(input, target, weight, axis, options, group)
    return loss


class _VocabularyParallel(torch.autograd.Function):
    """The loss; the gradient is computed in backward, from what all ranks know by then."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, where: dict[str, int],
        classes: int, options: Options, group: Any,
    ) -> Tensor:  # fmt: skip
        error: Exception | None = None
        total: Any = None
        ctx.reduced = {
            "z_loss": options.z_loss, "reduction": options.reduction,
            "normalizer": options.normalizer,
        }  # fmt: skip
        try:
            arguments.options(*options)
            total = shards.partial(
                array(input), array(target), **where, classes=classes, weight=class_weight(weight),
                ignore_index=options.ignore_index, label_smoothing=options.label_smoothing,
                softcap=options.softcap,
            )  # fmt: skip
        except _RAISED as found:
            error = found
        _agree(group, error, total and (total.terms, total.rows, options))
        mine = torch.from_numpy(total.records)
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, mine, group)
        total.records[...] = every[0].numpy()
        for other in every[1:]:
            shards.merge_records(total.records, other.numpy(), total.terms.dtype)
        ctx.where, ctx.total = where, total
        ctx.save_for_backward(input, target, weight)
        return loss_tensor(shards.finish(total, **ctx.reduced).loss, loss_dtype(input))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        _first_order_only()
        input, target, weight = ctx.saved_tensors
        gradient = empty_like(input)
        shards.grad(
            array(input), array(target), ctx.total, **ctx.where, weight=class_weight(weight),
            **ctx.reduced, grad_output=upstream(g), out=array(gradient),
        )  # fmt: skip
        return gradient, *(None,) * 6


class _DataParallel(torch.autograd.Function):
    """The mean over all ranks, whose gradient is computed in backward."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, axis: int,
        options: Options, group: Any,
    ) -> Tensor:  # fmt: skip
        error: Exception | None = None
        call: Any = None
        try:
            call = _call(input, target, weight, axis, options)
        except _RAISED as found:
            error = found
        _agree(group, error, call and (call.options, call.classes, np.dtype(call.dtype).name))
        sums = torch.tensor([call.total_weight, call.count], dtype=torch.float64)
        dist.all_reduce(sums, group=group)
        ctx.sums = call.total_weight, call.count = sums.tolist()
        ctx.given = axis, options
        ctx.save_for_backward(input, target, weight)
        call.dtype = np.float64  # parts of the loss are not rounded
        loss = torch.tensor(float(losses._cross_entropy(call)), dtype=torch.float64)
        dist.all_reduce(loss, group=group)
        return loss.to(loss_dtype(input))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        _first_order_only()
        input, target, weight = ctx.saved_tensors
        gradient = empty_like(input)
        call = _call(input, target, weight, *ctx.given)
        call.total_weight, call.count = ctx.sums
        losses._cross_entropy(call, (g.item(), None), array(gradient))
        return gradient, *(None,) * 5


def _call(
    input: Tensor, target: Tensor, weight: Tensor | None, axis: int, options: Options
) -> losses.Call:
    checked = arguments.options(*options)
    return losses.Call("logits", array(input), array(target), axis, class_weight(weight), checked)


def _first_order_only() -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError("second derivatives: expected none of a distributed loss")


def _agree(group: Any, error: Exception | None, what: Any) -> None:
    """Raise on every rank if one has an error, or if they differ in `what` they compute."""
    mine = torch.tensor([error is not None, zlib.crc32(repr(what).encode())])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group)
    if not any(int(failed) for failed, _ in every) and all(torch.equal(o, mine) for o in every):
        return
    found: list[Any] = [None] * len(every)
    given = None if error is None else (type(error), str(error))
    dist.all_gather_object(found, (given, repr(what)), group)
    if error is not None:
        raise error
    for rank, (other, _) in enumerate(found):
        if other is not None:
            raise other[0](f"rank {rank}: {other[1]}")
    rank = next(k for k, (_, other) in enumerate(found) if other != found[0][1])
    raise ValueError(
        f"group: expected the same on every rank, got {found[0][1]} on rank 0 and "
        f"{found[rank][1]} on rank {rank}"
    )
