"""What test_torch_distributed runs for DTensors: every layout gives what one process would."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing import assert_close

import fastce.torch as ft
from fastce.torch.distributed import (
    data_parallel_cross_entropy,
    vocabulary_parallel_cross_entropy,
    vocabulary_parallel_linear_cross_entropy,
)
from tests.torch_ranks import run_on_ranks

SHAPE = ROWS, CLASSES, PLACES = 7, 11, 5
WEIGHT = torch.rand(CLASSES, generator=torch.Generator().manual_seed(2))
OPTIONS = [
    {},
    {"weight": WEIGHT, "label_smoothing": 0.1, "ignore_index": 3, "z_loss": 0.01},
]


def problem(soft=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(SHAPE, generator=generator)
    if soft:
        return logits.to(dtype), torch.rand(SHAPE, generator=generator).to(dtype)
    return logits.to(dtype), torch.randint(CLASSES, (ROWS, PLACES), generator=generator)


def spread(tensor, mesh, placements):
    """A DTensor of what every rank has."""
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def assert_spread(got, whole, placements, **tolerance):
    assert got.placements == tuple(placements)
    assert got.shape == whole.shape
    want = spread(whole.detach(), got.device_mesh, placements).to_local()
    assert_close(got.detach().to_local(), want, **tolerance)


def meshes():
    size = dist.get_world_size()
    return [
        init_device_mesh("cpu", shape) for shape in ([(2, 2), (4,)] if size == 4 else [(size,)])
    ]


def of_rows(placements):
    """Where torch's loss_parallel has the targets, by its own table."""
    return [{Shard(1): Replicate(), Shard(2): Shard(1)}.get(p, p) for p in placements]


def every_layout():
    for mesh in meshes():
        for placements in itertools.product(
            [Replicate(), Shard(0), Shard(1), Shard(2)], repeat=mesh.ndim
        ):
            for options, reduction in itertools.product(OPTIONS, ["mean", "none"]):
                check(mesh, placements, {**options, "reduction": reduction})
            check(mesh, placements, {"reduction": "sum"}, soft=True)
            check(mesh, placements, {"normalizer": 3.0}, dtype=torch.bfloat16)


def check(mesh, placements, options, soft=False, dtype=torch.float32):
    logits, target = problem(soft, dtype)
    reduction = options.get("reduction", "mean")
    leaf = logits.clone().requires_grad_()
    want = ft.cross_entropy(leaf, target, **options, dtype=torch.float32)
    upstream = torch.linspace(0.5, 1.5, want.numel()).reshape(want.shape)
    (wanted,) = torch.autograd.grad(want, leaf, upstream)
    z = spread(logits, mesh, placements).requires_grad_()
    mine = list(placements) if soft else of_rows(placements)
    with CommDebugMode() as exchanged:
        y = spread(target, mesh, mine)
        loss = ft.cross_entropy(z, y, **options, dtype=torch.float32)
    others = [Replicate()] * mesh.ndim
    where = of_rows(placements) if reduction == "none" else others
    assert_spread(loss, want, where, rtol=1e-6, atol=1e-7)
    rows = sum(p in (Shard(0), Shard(2)) for p in placements) if reduction != "none" else 0
    divided = sum(p == Shard(1) for p in placements)
    # That ranks agree, records, sums; nothing for the arguments, and nothing in the backward pass.
    assert exchanged.get_total_counts() == mesh.ndim + divided + rows
    above = spread(upstream, mesh, where)
    with CommDebugMode() as exchanged:
        (grad,) = torch.autograd.grad(loss, z, above)
    assert exchanged.get_total_counts() == 0
    assert grad.dtype is dtype
    assert_spread(grad, wanted, placements)
    given = {"weight": spread(options.pop("weight"), mesh, others)} if "weight" in options else {}
    again = ft.cross_entropy(z, spread(target, mesh, others), **given, **options)
    assert_close(again.to_local(), loss.to_local().to(dtype), rtol=0, atol=0)
    if all(p == Replicate() for p in mine):
        loss = ft.CrossEntropyLoss(**options, **given)(z, target)
        assert_close(loss.to_local(), again.to_local(), rtol=0, atol=0)


FEATURES = 6
# Of input, and of weights and bias, along a dimension of the mesh.
DIVIDED = {
    "nothing": (Replicate(), Replicate()),
    "classes": (Replicate(), Shard(0)),
    "rows": (Shard(0), Replicate()),
    "places": (Shard(1), Replicate()),
}


def head(dtype=torch.float32, soft=False):
    """Hidden states, weights, bias, and target as before."""
    generator = torch.Generator().manual_seed(1)
    shapes = (ROWS, PLACES, FEATURES), (CLASSES, FEATURES), (CLASSES,)
    layer = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    if soft:
        return layer, torch.rand((ROWS, PLACES, CLASSES), generator=generator).to(dtype)
    return layer, torch.randint(CLASSES, (ROWS, PLACES), generator=generator)


def every_layout_of_a_head():
    for mesh in meshes():
        for kinds in itertools.product(DIVIDED, repeat=mesh.ndim):
            for options, reduction in itertools.product(OPTIONS, ["mean", "none"]):
                check_head(mesh, kinds, {**options, "reduction": reduction})
            check_head(mesh, kinds, {"reduction": "sum"}, soft=True)
            check_head(mesh, kinds, {"normalizer": 3.0}, dtype=torch.bfloat16)


def check_head(mesh, kinds, options, soft=False, dtype=torch.float32):
    layer, target = head(dtype, soft)
    reduction = options.get("reduction", "mean")
    leaves = [t.clone().requires_grad_() for t in layer]
    want = ft.linear_cross_entropy(
        *leaves[:2], target, linear_bias=leaves[2], **options, dtype=torch.float32
    )
    upstream = torch.linspace(0.5, 1.5, want.numel()).reshape(want.shape)
    wanted = torch.autograd.grad(want, leaves, upstream)
    of_input, of_weight = ([DIVIDED[kind][k] for kind in kinds] for k in (0, 1))
    given = [
        spread(t, mesh, where).requires_grad_()
        for t, where in zip(layer, (of_input, of_weight, of_weight), strict=True)
    ]
    labels = [Shard(2) if soft and kind == "classes" else DIVIDED[kind][0] for kind in kinds]
    with CommDebugMode() as exchanged:
        loss = ft.linear_cross_entropy(
            *given[:2], spread(target, mesh, labels), linear_bias=given[2], **options,
            dtype=torch.float32,
        )  # fmt: skip
    others = [Replicate()] * mesh.ndim
    where = of_input if reduction == "none" else others
    assert_spread(loss, want, where, rtol=1e-5, atol=1e-6)
    divided, rows = kinds.count("classes"), kinds.count("rows") + kinds.count("places")
    summed = rows if reduction != "none" else 0
    assert exchanged.get_total_counts() == mesh.ndim + divided + summed
    above = spread(upstream, mesh, where)
    for _ in range(2):  # the second computes the gradients anew
        with CommDebugMode() as exchanged:
            grads = torch.autograd.grad(loss, given, above, retain_graph=True)
        assert exchanged.get_total_counts() == divided + 2 * rows
        rtol = 1e-5 if dtype is torch.float32 else torch.finfo(dtype).eps
        for grad, whole, placements in zip(
            grads, wanted, (of_input, of_weight, of_weight), strict=True
        ):
            assert grad.dtype is dtype
            assert_spread(grad, whole, placements, rtol=rtol, atol=1e-5)
    if all(where == Replicate() for where in labels):
        plain = given[0].detach().to_local() if set(kinds) == {"classes"} else given[0]
        again = ft.linear_cross_entropy(
            plain, given[1].detach(), target, linear_bias=given[2].detach(), **options
        )
        assert_close(again.to_local(), loss.to_local().to(dtype), rtol=0, atol=0)


def modules_of_dtensors():
    """A layer that distribute_tensor has divided, and hidden states that all ranks have."""
    (mesh, *_) = meshes()
    (x, weight, bias), target = head()
    module = ft.LinearCrossEntropyLoss(FEATURES, CLASSES, bias=True)
    where = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    module.linear.weight = torch.nn.Parameter(spread(weight, mesh, where))
    module.linear.bias = torch.nn.Parameter(spread(bias, mesh, where))
    loss = module(spread(x, mesh, [Replicate()] * mesh.ndim), target)
    loss.backward()
    assert_close(loss.to_local(), ft.linear_cross_entropy(x, weight, target, linear_bias=bias))
    assert module.linear.weight.grad.placements == tuple(where)


def errors_of_a_head_are_everyones():
    size, rank = dist.get_world_size(), dist.get_rank()
    mesh = meshes()[0]
    last = rank == size - 1
    (x, weight, bias), target = head()
    everywhere = [Replicate()] * mesh.ndim
    by_class = [*everywhere[1:], Shard(0)]
    z, w, b = (
        spread(x, mesh, everywhere),
        spread(weight, mesh, by_class),
        spread(bias, mesh, by_class),
    )
    y = spread(target, mesh, everywhere)
    beyond = target.clone()
    beyond[0, 0] = CLASSES
    by_row = spread(x, mesh, [Shard(0)] * mesh.ndim)

    def call(x=z, weight=w, target=y, bias=b, **options):
        return lambda: ft.linear_cross_entropy(x, weight, target, linear_bias=bias, **options)

    cases = [
        (ValueError, "linear_weight: expected a DTensor", call(weight=weight)),
        (ValueError, "linear_weight: expected a DTensor", call(x=x, weight=weight, bias=bias)),
        (ValueError, "linear_bias: expected mesh and placements", call(bias=bias)),
        (ValueError, "linear_bias: expected mesh and placements", call(
            bias=spread(bias, mesh, everywhere))),
        (ValueError, "input, linear_weight: .* got S.0. and S.0. along", call(x=by_row)),
        (ValueError, "input, linear_weight: .* got S.2. and R along dimension 0", call(
            x=spread(x, mesh, [Shard(2), *everywhere[1:]]), weight=spread(weight, mesh, everywhere),
            bias=None)),
        (ValueError, "input, linear_weight: .* got P", call(
            x=DTensor.from_local(x, mesh, [Partial()] * mesh.ndim))),
        (ValueError, "input: expected a DTensor where", call(
            x=x, weight=spread(weight, mesh, everywhere))),
        (ValueError, "target: expected shape", call(target=spread(target[1:], mesh, everywhere))),
        (IndexError, f"targets: .* got {CLASSES}", call(
            target=spread(beyond if last else target, mesh, everywhere))),
        (ValueError, "weight: .*no gradient", lambda: ft.linear_cross_entropy(
            z, w, y, weight=WEIGHT.clone().requires_grad_(last))),
        (ValueError, "weight: expected shape", lambda: ft.linear_cross_entropy(
            z, w, y, weight=WEIGHT[1:])),
    ]  # fmt: skip
    if size > 1:
        cases += [
            (ValueError, "the same on every rank", call(z_loss=0.1 * last)),
            (ValueError, "the same on every rank", call(x=z.detach().requires_grad_(last))),
            (ValueError, "linear_weight: expected a class on every rank", call(
                weight=spread(weight[:1], mesh, by_class), target=0 * y, bias=None)),
        ]  # fmt: skip
    for kind, message, function in cases:
        with pytest.raises(kind, match=message):
            function()
    loss = call(x=z.requires_grad_())()
    assert_close(loss.to_local(), F.cross_entropy(F.linear(x, weight, bias).mT, target))
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(loss, z, create_graph=True)


def as_loss_parallel():
    """Values, gradients and layouts of torch's own context, for what it can do."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for options, reduction in itertools.product(
        [{}, {"weight": WEIGHT}, {"ignore_index": 3}], ["mean", "sum", "none"]
    ):
        logits, target = problem()
        found = []
        for function in (F.cross_entropy, ft.cross_entropy):
            z = spread(logits, mesh, [Shard(1)]).requires_grad_()
            with loss_parallel():
                loss = function(z, target, **options, reduction=reduction)
                loss.backward(torch.ones_like(loss))
            found.append((loss, z.grad))
        for theirs, ours in zip(*found, strict=True):
            assert ours.placements == theirs.placements
            assert_close(ours.to_local(), theirs.to_local())


def errors_are_everyones():
    size, rank = dist.get_world_size(), dist.get_rank()
    mesh = meshes()[0]
    last = rank == size - 1
    logits, target = problem()
    layout = [Shard(1)] if mesh.ndim == 1 else [Shard(0), Shard(1)]
    z, labels = spread(logits, mesh, layout), of_rows(layout)
    y = spread(target, mesh, labels)
    beyond = target.clone()
    beyond[:, 0] = CLASSES
    wrong = DTensor.from_local(
        z.to_local()[:-1] if last else z.to_local(), mesh, layout, shape=z.shape, stride=z.stride()
    )
    strided = [_StridedShard(1, split_factor=2), *layout[1:]]
    everywhere = [Replicate()] * mesh.ndim
    cases = [
        (ValueError, "input: expected Shard or Replicate .* got P", lambda: ft.cross_entropy(
            DTensor.from_local(logits, mesh, [Partial()] * mesh.ndim), target)),
        (ValueError, "input: expected Shard or Replicate .* got _S", lambda: ft.cross_entropy(
            DTensor.from_local(z.to_local(), mesh, strided, shape=z.shape, stride=z.stride()), y)),
        (ValueError, "input: expected a part of shape", lambda: ft.cross_entropy(wrong, y)),
        (IndexError, f"targets: .* got {CLASSES}", lambda: ft.cross_entropy(
            z, spread(beyond if last else target, mesh, labels))),
        (ValueError, "target: expected shape", lambda: ft.cross_entropy(z, y[:, 1:])),
        (ValueError, "weight: expected shape", lambda: ft.cross_entropy(z, y, WEIGHT[1:])),
        (ValueError, "weight: .*no gradient", lambda: ft.cross_entropy(
            z, y, WEIGHT.clone().requires_grad_(last))),
        (ValueError, "axis", lambda: ft.cross_entropy(z, y, axis=3)),
        (NotImplementedError, "in_place", lambda: ft.cross_entropy(z, y, in_place=True)),
        (ValueError, "target: expected placements", lambda: ft.cross_entropy(
            z, DTensor.from_local(target, mesh, [Partial()] * mesh.ndim))),
        (ValueError, "target: expected the mesh", lambda: ft.cross_entropy(
            z, spread(target, init_device_mesh("cpu", (1, size, 1)), [Replicate()] * 3))),
    ]  # fmt: skip
    if size > 1:
        cases += [
            (ValueError, "input: expected a class on every rank", lambda: ft.cross_entropy(
                spread(logits[:, :1], mesh, layout), spread(0 * target, mesh, everywhere))),
            (ValueError, "the same on every rank", lambda: ft.cross_entropy(
                z, y, z_loss=0.1 * last)),
        ]  # fmt: skip
    if mesh.ndim > 1:
        cases += [
            (ValueError, "target: expected a DTensor", lambda: ft.cross_entropy(z, target)),
        ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message) as caught:
            call()
        if not last and message.startswith(("input: expected a part", "targets")):
            assert "rank " in str(caught.value)
    loss = ft.cross_entropy(z.requires_grad_(), y)
    assert_close(loss.to_local(), F.cross_entropy(logits, target))
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(loss, z, create_graph=True)


def graphs_break_around_losses():
    """Under torch.compile they are computed between two graphs, and not in one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    logits, target = problem()
    (x, weight, _), labels = head()
    group = {"class_offset": 0, "classes": CLASSES, "group": dist.new_group([dist.get_rank()],
             use_local_synchronization=True)}  # fmt: skip
    cases = [
        (logits, Shard(1), lambda z: ft.cross_entropy(2 * z, target)),
        (weight, Shard(0), lambda w: ft.linear_cross_entropy(x, 2 * w, labels)),
        (logits, None, lambda z: vocabulary_parallel_cross_entropy(2 * z, target, **group)),
        (logits, None, lambda z: data_parallel_cross_entropy(2 * z, target)),
        (weight, None, lambda w: vocabulary_parallel_linear_cross_entropy(
            x, 2 * w, labels, **group)),
    ]  # fmt: skip
    for whole, placement, function in cases:
        found = []
        for kind in (function, torch.compile(function, backend="aot_eager")):
            leaf = whole if placement is None else spread(whole, mesh, [placement])
            leaf = leaf.detach().clone().requires_grad_()
            loss = 3 * kind(leaf)
            loss.backward()
            found.append([getattr(t, "_local_tensor", t) for t in (loss, leaf.grad)])
        assert_close(*found, rtol=0, atol=0)
        torch._dynamo.reset()  # or it takes the graphs that are there
        with pytest.raises(torch._dynamo.exc.Unsupported, match="losses of several ranks"):
            torch.compile(function, backend="aot_eager", fullgraph=True)(leaf)


def program():
    if dist.get_world_size() == 2:
        graphs_break_around_losses()
    every_layout()
    every_layout_of_a_head()
    modules_of_dtensors()
    errors_of_a_head_are_everyones()
    as_loss_parallel()
    errors_are_everyones()


if __name__ == "__main__":
    run_on_ranks("tests.torch_dtensor_program")
