"""Cross-entropy of a DTensor: its placements say what is divided, and among which ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fastce._arguments import class_axis
from fastce.torch._divided import Divided
from fastce.torch._groups import Axis, agree, eagerly
from fastce.torch._tensors import Options, refuse_gradient

Placements = tuple[Any, ...]


@eagerly
def cross_entropy(
    input: DTensor, target: Tensor, weight: Tensor | None, axis: int, options: Options
) -> DTensor:
    """The loss of all ranks' logits, which has as many as them for "none", and else one."""
    mesh, placements = mesh_of("input", input), tuple(input.placements)
    axis = axis + input.ndim if axis < 0 else axis
    axes = tuple(
        Axis(mesh.get_group(k), _divides(placement, axis)) for k, placement in enumerate(placements)
    )
    try:
        arguments, class_offset = _own(input, target, weight, axis, axes)
    except Exception as error:
        agree(axes, error, None)  # the others ask in Divided
        raise
    where = {"class_offset": class_offset, "axis": axis}
    loss: Tensor = Divided.apply(*arguments, where, input.shape[axis], options, axes)
    rows = _without(input.shape, axis)
    return of_all(loss, mesh, rows, _of_rows(placements, axis), options)


def mesh_of(name: str, tensor: DTensor) -> Any:
    """The mesh of a tensor, which the rank has to be in."""
    if tensor.device_mesh.get_coordinate() is None:
        raise ValueError(f"{name}: expected a mesh with rank {torch.distributed.get_rank()} in it")
    return tensor.device_mesh


def of_all(
    loss: Tensor, mesh: Any, rows: Sequence[int], placements: Placements, options: Options
) -> DTensor:
    """What each rank has of the loss, as one tensor."""
    if options.reduction != "none":
        return DTensor.from_local(loss, mesh, [Replicate()] * mesh.ndim)
    whole = torch.empty(rows, device="meta")
    return DTensor.from_local(loss, mesh, placements, shape=whole.shape, stride=whole.stride())


def _divides(placement: Any, axis: int) -> Any:
    if not placement.is_shard():
        return None
    return "classes" if placement.dim == axis else "rows"


def _without(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _of_rows(placements: Placements, axis: int) -> Placements:
    """Where something with one number per row lies."""
    moved = (p if p.is_replicate() or p.dim < axis else Shard(p.dim - 1) for p in placements)
    return tuple(
        Replicate() if old.is_shard(axis) else new
        for old, new in zip(placements, moved, strict=True)
    )


def _own(
    input: DTensor, target: Tensor, weight: Tensor | None, axis: int, axes: tuple[Axis, ...]
) -> tuple[tuple[Tensor, Tensor, Tensor | None], int]:
    """What of the arguments belongs to the classes and rows of the rank, and its first class."""
    mesh, placements = input.device_mesh, tuple(input.placements)
    class_axis("input", tuple(input.shape), axis)
    for k, placement in enumerate(placements):
        if type(placement) not in (Shard, Replicate):
            raise ValueError(
                f"input: expected Shard or Replicate along every dimension of the mesh, got "
                f"{placement} along dimension {k}; redistribute makes one of the other"
            )
    local, class_offset = own_classes("input", input, axis)
    soft = target.is_floating_point()
    labels = part(
        "target", target, input.shape if soft else _without(input.shape, axis),
        mesh, placements if soft else _of_rows(placements, axis),
    )  # fmt: skip
    weight = own_weights(weight, input.shape[axis], mesh, axes)
    return (local, labels, weight), class_offset


def own(name: str, tensor: DTensor) -> tuple[Tensor, tuple[int, ...]]:
    """What the rank has of a tensor, and where that lies."""
    local = tensor.to_local()
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    if tuple(local.shape) != tuple(shape):
        raise ValueError(
            f"{name}: expected a part of shape {tuple(shape)}, as torch divides "
            f"{tuple(tensor.shape)}, got {tuple(local.shape)}"
        )
    return local, tuple(offset)


def own_classes(name: str, tensor: DTensor, axis: int) -> tuple[Tensor, int]:
    """The same for what has classes along an axis, of which the first is told."""
    local, offset = own(name, tensor)
    if not local.shape[axis]:
        raise ValueError(
            f"{name}: expected a class on every rank, got {tensor.shape[axis]} in all and none here"
        )
    return local, offset[axis]


def own_weights(
    weight: Tensor | None, classes: int, mesh: Any, axes: tuple[Axis, ...]
) -> Tensor | None:
    """The weights of the rank's classes; plain ones are those of all."""
    if weight is None:
        return None
    if not isinstance(weight, DTensor):
        weight = DTensor.from_local(weight, mesh, [Replicate()] * mesh.ndim)
    by_class = tuple(Shard(0) if a.divides == "classes" else Replicate() for a in axes)
    return part("weight", weight, (classes,), mesh, by_class)


def part(
    name: str, tensor: Tensor, shape: Sequence[int], mesh: Any, placements: Placements
) -> Tensor:
    """What of a tensor belongs to the rank; nothing is exchanged for it."""
    refuse_gradient(name, torch.is_grad_enabled() and tensor.requires_grad)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if not isinstance(tensor, DTensor):
        if any(placement.is_shard() for placement in placements):
            raise ValueError(
                f"{name}: expected a DTensor with placements {placements}, got a tensor of which "
                "it is unknown whether it is the whole or a part"
            )
        return tensor
    if tensor.device_mesh != mesh:
        raise ValueError(f"{name}: expected the mesh of input {mesh}, got {tensor.device_mesh}")
    for has, wanted in zip(tensor.placements, placements, strict=True):
        if has not in (wanted, Replicate()):
            raise ValueError(
                f"{name}: expected placements {placements} or Replicate in their place, got "
                f"{tuple(tensor.placements)}"
            )
    return tensor.redistribute(mesh, placements).to_local()
