"""What ranks merge and add up on CUDA devices; nothing of it is waited for."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from fastce._arguments import Options
from fastce.cuda import shards
from fastce.cuda.arrays import device_array
from fastce.torch._groups import Axis


def merge(axes: tuple[Axis, ...], total: shards.Partial) -> shards.Partial:
    """Merge what the ranks know of the rows that they have in common, of all classes together."""
    for axis in axes:
        if axis.divides == "classes":
            every = _gathered(axis.group, total.records)
            total = shards.merge_gathered(total, every, total.terms.classes)
    return total


def finish(axes: tuple[Axis, ...], total: shards.Partial, options: Options) -> tuple[Tensor, Any]:
    """The loss of all ranks' rows and the scales of its gradient, which single losses have not."""
    apart = options.reduction == "none"
    done = shards.finish_rows(total, options.z_loss, losses=apart)
    sums = done.sums
    for axis in axes:
        if axis.divides == "rows" and not apart:  # not all_reduce, whose order is the library's
            sums = shards.add(device_array("sums", _gathered(axis.group, sums.result)))
    settled = shards.settle(sums, total.terms, options)
    if done.losses is not None:
        return done.losses.result, None
    return settled.loss.result, settled.scales


def _gathered(group: Any, mine: Tensor) -> Tensor:
    """What each rank has, one after the other."""
    ranks = dist.get_world_size(group)
    every = mine.new_empty((ranks * mine.shape[0], *mine.shape[1:]))
    dist.all_gather_single(every, mine, group)
    return every.view(ranks, *mine.shape)
