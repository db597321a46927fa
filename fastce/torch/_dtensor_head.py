"""Cross-entropy of a linear layer of DTensors, whose rows or classes are divided.

What the placements say of one dimension of the mesh::

    input                   linear_weight, linear_bias      divided
    Replicate               Shard(0)                        the classes
    Shard of rows           Replicate                       the rows
    Replicate               Replicate                       nothing
"""

from typing import Any, Literal

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from fastce.torch._divided import divided_head
from fastce.torch._dtensor import mesh_of, of_all, own, own_classes, own_weights, part
from fastce.torch._groups import Axis, agree, eagerly
from fastce.torch._tensors import Options


@eagerly
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None,
    weight: Tensor | None, options: Options,
) -> DTensor:  # fmt: skip
    """The loss of all ranks' rows and classes."""
    if not isinstance(linear_weight, DTensor):
        raise ValueError(
            "linear_weight: expected a DTensor where another argument is one, got a tensor of "
            "which it is unknown whether it is the whole or a part"
        )
    mesh = mesh_of("linear_weight", linear_weight)
    try:
        layout = _Layout(input, linear_weight)
        arguments, class_offset = layout.own(target, linear_bias, weight)
    except Exception as error:
        agree(tuple(Axis(mesh.get_group(k), None) for k in range(mesh.ndim)), error, None)
        raise  # the others have asked in divided_head
    loss = divided_head(*arguments, class_offset, linear_weight.shape[0], options, layout.axes)
    return of_all(loss, mesh, input.shape[:-1], tuple(layout.input.placements), options)


class _Layout:
    """How the rows of an input and the classes of weights are divided."""

    def __init__(self, input: Tensor, linear_weight: DTensor) -> None:
        mesh = linear_weight.device_mesh
        by_classes = linear_weight.placements
        if not isinstance(input, DTensor):
            if any(type(placement) is not Shard for placement in by_classes):
                raise ValueError(
                    "input: expected a DTensor where linear_weight is Replicate along a dimension "
                    "of the mesh, got a tensor of which it is unknown whether it is the whole or "
                    "a part"
                )
            input = DTensor.from_local(input, mesh, [Replicate()] * mesh.ndim)
        if input.device_mesh != mesh:
            raise ValueError(
                f"input: expected the mesh of linear_weight {mesh}, got {input.device_mesh}"
            )
        self.mesh, self.input, self.linear_weight = mesh, input, linear_weight
        self.axes = tuple(
            Axis(mesh.get_group(k), _divides(k, *both, input.ndim))
            for k, both in enumerate(zip(input.placements, by_classes, strict=True))
        )

    def own(
        self, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None
    ) -> tuple[tuple[Any, ...], int]:
        """The arguments of divided_head that belong to the rank, and its first class."""
        input, mesh, classes = self.input, self.mesh, self.linear_weight.shape[0]
        x, _ = own("input", input)
        own_weight, class_offset = own_classes("linear_weight", self.linear_weight, 0)
        shape, placements = (*input.shape[:-1],), tuple(input.placements)
        if target.is_floating_point():
            shape = (*shape, classes)
            placements = tuple(
                Shard(input.ndim - 1) if axis.divides == "classes" else placement
                for axis, placement in zip(self.axes, placements, strict=True)
            )
        labels = part("target", target, shape, mesh, placements)
        bias = None if linear_bias is None else self._own_bias(linear_bias)
        weights = own_weights(weight, classes, mesh, self.axes)
        return (x, own_weight, labels, bias, weights), class_offset

    def _own_bias(self, bias: Tensor) -> Tensor:
        wanted = self.linear_weight.placements
        if (
            not isinstance(bias, DTensor)
            or bias.device_mesh != self.mesh
            or bias.placements != wanted
        ):
            got = getattr(bias, "placements", "a tensor without any")
            raise ValueError(
                f"linear_bias: expected mesh and placements of linear_weight {wanted}, got {got}"
            )
        return own("linear_bias", bias)[0]


def _divides(
    dimension: int, of_input: Any, of_weight: Any, ndim: int
) -> Literal["classes", "rows"] | None:
    rows = type(of_input) is Shard and of_input.dim < ndim - 1
    classes = type(of_weight) is Shard and of_weight.dim == 0
    if classes and of_input == Replicate():
        return "classes"
    if of_weight == Replicate() and rows:
        return "rows"
    if of_input == of_weight == Replicate():
        return None
    raise ValueError(
        "input, linear_weight: expected along every dimension of the mesh Replicate and Shard(0), "
        f"Shard of an axis of rows and Replicate, or Replicate twice, got {of_input} and "
        f"{of_weight} along dimension {dimension}; redistribute makes one of the other"
    )
