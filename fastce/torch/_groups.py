"""What the ranks of process groups agree on, and what they merge and add up on the CPU."""

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


class Share(NamedTuple):
    """How many of all classes a rank has."""

    size: int
    classes: int


def agree(
    axes: tuple[Axis, ...], error: Exception | None, what: Any, rows: Any = None,
    share: Share | None = None, like: Any = None,
) -> None:  # fmt: skip
    """Raise on every rank of a grid if one has an error or is about to do something else.

    `what` is the same on all ranks, `rows` on those among which rows are not divided; shares are to
    make up all classes, where they are given. What follows is exchanged where the tensor `like` is.
    Groups are asked one after the other, and each is told what those before it have found.
    """
    on_device = bool(getattr(like, "is_cuda", False))
    for axis in axes:
        if error is None and ("cuda" if on_device else "cpu") not in _backends(axis.group):
            error = _no_backend(axis.group, "CUDA devices" if on_device else "the CPU")
    places = [_meeting_place(axis.group, like if on_device else None) for axis in axes]
    found = None if error is None else _as_told(error)
    covered = 0 if share is None else share.size
    what = (what, "on CUDA devices") if on_device else what
    for axis, place in zip(axes, places, strict=True):
        alike = what if axis.divides == "rows" else (what, rows)
        found, sizes = _first_error(axis.group, found, alike, covered, place)
        covered = sizes if axis.divides == "classes" else covered
    if error is not None:
        raise error
    if found is not None:
        raise found
    if share is not None and covered != share.classes:
        raise ValueError(
            f"classes: expected slices that make up all {share.classes}, got {covered} on all ranks"
        )


def _as_told(error: Exception) -> Exception:
    """The error as other ranks raise it."""
    rank = dist.get_rank()
    for kind in _MADE_OF_A_MESSAGE:
        if isinstance(error, kind):
            return kind(f"rank {rank}: {error}")
    return RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")


def _first_error(
    group: Any, found: Exception | None, what: Any, covered: int, place: torch.device
) -> tuple[Exception | None, int]:
    """The error that all ranks of a group raise, if any; and how many classes they have."""
    mine = torch.tensor([found is not None, zlib.crc32(repr(what).encode()), covered], device=place)
    tensors = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(tensors, mine, group)
    every = torch.stack(tensors).tolist()
    if not any(failed for failed, *_ in every) and len({digest for _, digest, _ in every}) == 1:
        return None, sum(size for *_, size in every)
    told: list[Any] = [None] * len(every)
    dist.all_gather_object(told, (found, repr(what)), group)
    error: Exception | None = next((other for other, _ in told if other is not None), None)
    if error is not None:
        return error, 0
    ranks = dist.get_process_group_ranks(group)
    differs = next(k for k, (_, other) in enumerate(told) if other != told[0][1])
    return ValueError(
        f"group: expected the same on every rank, got {told[0][1]} on rank {ranks[0]} and "
        f"{told[differs][1]} on rank {ranks[differs]}"
    ), 0


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


def _backends(group: Any) -> list[str]:
    """The kinds of devices whose tensors a group exchanges."""
    return [one.partition(":")[0] for one in dist.get_backend_config(group).split(",")]


def _no_backend(group: Any, where: str) -> ValueError:
    return ValueError(
        f"group: expected a backend for tensors on {where}, as in "
        "init_process_group('cpu:gloo,cuda:nccl') or new_group(backend='gloo'), got "
        f"{dist.get_backend_config(group)}"
    )


def _meeting_place(group: Any, on_device: torch.Tensor | None) -> torch.device:
    """Where ranks agree: on the CPU if the group can, so that no device has to be waited for."""
    if "cpu" in _backends(group):
        return torch.device("cpu")
    if on_device is not None:
        return on_device.device
    if not torch.cuda.is_available():  # nor have other ranks of such a group
        raise _no_backend(group, "the CPU")
    return torch.device("cuda", torch.cuda.current_device())
