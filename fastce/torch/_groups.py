"""What the ranks of process groups agree on, merge and add up."""

import math
import zlib
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from fastce import shards

# torch.compile runs these functions as they are, between two graphs: ranks wait for each other in
# them, which a graph does not know of, and kernels are called that are no operators.
eagerly = torch.compiler.disable(reason="losses of several ranks are computed in eager mode")


class Axis(NamedTuple):
    """A group, and what is divided among its ranks: None where each has the same."""

    group: Any
    divides: Literal["classes", "rows"] | None


# Others, which may not be made of a message, are a RuntimeError on the other ranks.
_MADE_OF_A_MESSAGE = (TypeError, ValueError, IndexError, NotImplementedError, MemoryError)


def agree(axes: tuple[Axis, ...], error: Exception | None, what: Any, rows: Any = None) -> None:
    """Raise on every rank of a grid if one has an error or is about to do something else.

    `what` is the same on all ranks, `rows` on those among which rows are not divided. Groups are
    asked one after the other, and each is told what those before it have found.
    """
    for axis in axes:
        _check_backend(axis.group)
    found = None if error is None else _as_told(error)
    for axis in axes:
        found = _first_error(axis.group, found, what if axis.divides == "rows" else (what, rows))
    if error is not None:
        raise error
    if found is not None:
        raise found


def _as_told(error: Exception) -> Exception:
    """The error as other ranks raise it."""
    rank = dist.get_rank()
    for kind in _MADE_OF_A_MESSAGE:
        if isinstance(error, kind):
            return kind(f"rank {rank}: {error}")
    return RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")


def _first_error(group: Any, found: Exception | None, what: Any) -> Exception | None:
    """The error that all ranks of a group raise, if any."""
    mine = torch.tensor([found is not None, zlib.crc32(repr(what).encode())])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group)
    if not any(int(failed) for failed, _ in every) and all(torch.equal(o, mine) for o in every):
        return None
    told: list[Any] = [None] * len(every)
    dist.all_gather_object(told, (found, repr(what)), group)
    error: Exception | None = next((other for other, _ in told if other is not None), None)
    if error is not None:
        return error
    ranks = dist.get_process_group_ranks(group)
    differs = next(k for k, (_, other) in enumerate(told) if other != told[0][1])
    return ValueError(
        f"group: expected the same on every rank, got {told[0][1]} on rank {ranks[0]} and "
        f"{told[differs][1]} on rank {ranks[differs]}"
    )


def merge(axes: tuple[Axis, ...], total: shards.Partial) -> None:
    """Merge in place what the ranks know of the rows that they have in common."""
    mine = torch.from_numpy(total.records)
    for axis in axes:
        if axis.divides == "classes":
            every = [torch.empty_like(mine) for _ in range(dist.get_world_size(axis.group))]
            dist.all_gather(every, mine, axis.group)
            mine.copy_(every[0])
            for other in every[1:]:
                shards.merge_records(total.records, other.numpy(), total.terms.dtype)


def parts(axes: tuple[Axis, ...]) -> int:
    """How many ranks have a slice of the classes."""
    return math.prod(dist.get_world_size(a.group) for a in axes if a.divides == "classes")


def add(axes: tuple[Axis, ...], sums: shards.Sums) -> shards.Sums:
    """Add up what the ranks have summed over rows of their own."""
    numbers = torch.tensor(sums, dtype=torch.float64)
    for axis in axes:
        if axis.divides == "rows":
            dist.all_reduce(numbers, group=axis.group)
    return shards.Sums(*numbers.tolist())


def _check_backend(group: Any) -> None:
    """What is exchanged is on the CPU."""
    config = dist.get_backend_config(group)
    if "cpu" not in (backend.partition(":")[0] for backend in config.split(",")):
        raise ValueError(
            f"group: expected a backend for tensors on the CPU, as in "
            f"init_process_group('cpu:gloo,cuda:nccl') or new_group(backend='gloo'), got {config}"
        )
