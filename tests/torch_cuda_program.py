"""What test_torch_distributed runs for tensors on CUDA devices: ranks in numba's simulator, gloo.

Tensors of the CPU are taken for tensors of a device; what is right is computed on the CPU.
"""

import contextlib
import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.cuda_simulator import take_tensors_for_its_own  # first, for small launch parameters

# isort: split
import fastce.torch as ft
from fastce import cuda
from fastce.torch import _groups
from fastce.torch.distributed import (
    data_parallel_cross_entropy,
    vocabulary_parallel_cross_entropy,
    vocabulary_parallel_linear_cross_entropy,
)
from tests.torch_ranks import run_on_ranks

ROWS, CLASSES = 7, 23
WEIGHT = torch.rand(CLASSES, generator=torch.Generator().manual_seed(2))
OPTIONS = [
    {},
    {"weight": WEIGHT, "label_smoothing": 0.1, "ignore_index": 3, "z_loss": 0.01},
    {"softcap": 2.0, "normalizer": 11.0},
    {"weight": WEIGHT, "reduction": "sum"},
    {"ignore_index": 3, "z_loss": 0.1, "reduction": "none"},
]


@contextlib.contextmanager
def on_device():
    with pytest.MonkeyPatch.context() as patches:
        take_tensors_for_its_own(patches)
        yield patches


def own(count):
    """The slice of a rank; sizes differ."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return slice(count * rank // size, count * (rank + 1) // size)


def problem(dtype=torch.float32, soft=False):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(ROWS, CLASSES, generator=generator)).to(dtype)
    if soft:
        return logits, torch.rand(ROWS, CLASSES, generator=generator).to(dtype)
    return logits, torch.randint(CLASSES, (ROWS,), generator=generator)


def assert_same_everywhere(loss):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, loss.detach().numpy().tobytes())
    assert len(set(found)) == 1


def check(function, logits, part, want):
    """Loss and gradient of a rank are those of one process on the CPU; also in a second pass."""
    mine = logits.detach()[part].clone().requires_grad_()
    upstream = torch.linspace(0.5, 1.5, want.numel()).reshape(want.shape)
    (whole,) = torch.autograd.grad(want, logits, upstream.to(want.dtype))
    with on_device():
        loss = function(mine)
        for _ in range(2):
            (grad,) = torch.autograd.grad(loss, mine, upstream.to(loss.dtype), retain_graph=True)
            torch.testing.assert_close(grad, whole[part])
    assert_same_everywhere(loss)
    torch.testing.assert_close(loss, want, check_dtype=False, rtol=1e-6, atol=0)


def classes_divided():
    part = own(CLASSES)
    cases = [*((o, False, torch.float32) for o in OPTIONS), (OPTIONS[1], True, torch.float32),
             (OPTIONS[0], False, torch.bfloat16), (OPTIONS[0], False, torch.float64)]  # fmt: skip
    for options, soft, dtype in cases:
        logits, target = problem(dtype, soft)
        given = dict(options)
        if soft:
            given.pop("ignore_index", None)
        want = ft.cross_entropy(logits.requires_grad_(), target, **given, dtype=torch.float64)
        if "weight" in given:
            given["weight"] = WEIGHT[part]
        labels = target[:, part] if soft else target

        def divided(z, labels=labels, given=given):
            return vocabulary_parallel_cross_entropy(
                z, labels, class_offset=part.start, classes=CLASSES, **given
            )

        check(divided, logits, (slice(None), part), want)


def rows_divided():
    part = own(ROWS)
    for options in OPTIONS[:2]:
        logits, target = problem()
        want = ft.cross_entropy(logits.requires_grad_(), target, **options, dtype=torch.float64)
        check(
            lambda z, y=target[part], options=options: data_parallel_cross_entropy(z, y, **options),
            logits, part, want,
        )  # fmt: skip


def layouts():
    """DTensors, on meshes of one dimension or two."""
    size = dist.get_world_size()
    shapes = {(size,): [[Shard(0)], [Shard(1)]]}
    if size == 4:
        shapes = {(2, 2): [[Shard(1), Shard(1)], [Shard(0), Shard(1)], [Shard(1), Replicate()]]}
    for shape, placements in shapes.items():
        mesh = init_device_mesh("cpu", shape)
        for layout, options in itertools.product(placements, (OPTIONS[1], OPTIONS[4])):
            logits, target = problem()
            want = ft.cross_entropy(logits.requires_grad_(), target, **options)
            (whole,) = torch.autograd.grad(want, logits, torch.ones_like(want))
            z = spread(logits.detach(), mesh, layout).requires_grad_()
            y = spread(target, mesh, [Replicate() if p == Shard(1) else p for p in layout])
            with on_device():
                loss = ft.cross_entropy(z, y, **options)
                (grad,) = torch.autograd.grad(loss, z, torch.ones_like(loss))
            torch.testing.assert_close(loss.full_tensor(), want)
            assert grad.placements == tuple(layout)
            torch.testing.assert_close(grad.full_tensor(), whole)


def spread(tensor, mesh, placements):
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def what_is_exchanged():
    """Records on the device, in one call; nobody asks the device for a number but to agree."""
    part, size = own(CLASSES), dist.get_world_size()
    logits, target = problem()
    mine = logits[:, part].clone().requires_grad_()

    def call(**options):
        return vocabulary_parallel_cross_entropy(
            mine, target, class_offset=part.start, classes=CLASSES, **options
        )

    for options, record in (({}, 40), ({"label_smoothing": 0.1}, 56)):
        with on_device() as patches:
            seen = exchanges(patches)
            refuse_to_wait(patches)
            loss = call(**options)
            assert seen == [24 * size, record * ROWS * size]
            torch.autograd.grad(loss, mine, torch.ones(()))
            assert len(seen) == 2
    mine = logits[own(ROWS)].clone().requires_grad_()
    with on_device() as patches:
        seen = exchanges(patches)
        refuse_to_wait(patches)
        data_parallel_cross_entropy(mine, target[own(ROWS)])
        assert seen == [24 * size, 40 * size]


def exchanges(patches):
    """Bytes that each collective call hands out from now on."""
    seen, each, joined = [], dist.all_gather, dist.all_gather_single

    def all_gather(tensors, *others):
        seen.append(sum(tensor.nbytes for tensor in tensors))
        return each(tensors, *others)

    def all_gather_single(every, *others):
        seen.append(every.nbytes)
        return joined(every, *others)

    patches.setattr(dist, "all_gather", all_gather)
    patches.setattr(dist, "all_gather_single", all_gather_single)
    return seen


def refuse_to_wait(patches):
    """Fail where the host asks for a number that is on the device, but for that ranks agree."""
    agreeing, first_error = [], _groups._first_error

    def asked(*arguments):
        agreeing.append(True)
        found = first_error(*arguments)
        agreeing.clear()
        return found

    def refusing(name):
        before = getattr(torch.Tensor, name)

        def ask(*arguments, **given):
            assert agreeing, f"{name}: the host waits for the device"
            return before(*arguments, **given)

        patches.setattr(torch.Tensor, name, ask)

    patches.setattr(_groups, "_first_error", asked)
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"):
        refusing(name)


def errors_are_everyones():
    """What is wrong on one rank raises on all, or is noted on all; the group goes on working."""
    logits, target = problem()
    size, last = dist.get_world_size(), dist.get_rank() == dist.get_world_size() - 1
    part = own(CLASSES)
    at = {"class_offset": part.start, "classes": CLASSES}

    def spoilt(good, broken):
        return broken if last else good

    def divided(z=logits[:, part], y=target, **given):
        return vocabulary_parallel_cross_entropy(z, y, **{**at, **given})

    cases = [
        (ValueError, "reduction", lambda: divided(reduction=spoilt("mean", "median"))),
        (ValueError, "class_offset", lambda: divided(class_offset=spoilt(part.start, CLASSES))),
        (TypeError, "logits", lambda: divided(spoilt(logits[:, part], logits[:, part].long()))),
        (ValueError, "targets: expected shape", lambda: divided(y=spoilt(target, target[1:]))),
        (NotImplementedError, "got one on", lambda: vocabulary_parallel_linear_cross_entropy(
            logits, logits, target, **at)),
    ]  # fmt: skip
    if size > 1:
        cases += [
            (ValueError, "same on every rank", lambda: divided(z_loss=spoilt(0.0, 0.1))),
            (ValueError, "same on every rank", lambda: divided(
                spoilt(logits, logits[1:])[:, part], spoilt(target, target[1:]))),
            (ValueError, "classes: .* make up all 23", lambda: divided(
                logits[:, :5], class_offset=0)),
            (AttributeError if last else RuntimeError, "no attribute", lambda: divided(
                spoilt(logits[:, part], logits.tolist()))),
        ]  # fmt: skip
    everyones = ("same on every rank", "classes: .* make up all 23", "got one on")
    for kind, message, call in cases:
        with on_device(), pytest.raises(kind, match=message) as caught:
            call()
        if not last and message not in everyones:
            assert f"rank {size - 1}: " in str(caught.value)
    if size > 1:  # a rank whose tensors lie elsewhere
        where = contextlib.nullcontext() if last else on_device()
        with where, pytest.raises(ValueError, match="same on every rank"):
            divided()
    bad = target.clone()
    bad[5] = CLASSES
    for loss, index in (
        (lambda: divided(y=spoilt(target, bad)), r"23 at index \(5,\)"),
        (lambda: data_parallel_cross_entropy(logits, spoilt(target, bad)), r"23 at index \(5,\)"),
    ):
        with on_device():
            found = loss()
            with pytest.raises(IndexError, match=spoilt("got something else elsewhere", index)):
                cuda.synchronize(None)
        assert found.isnan()
    groups_of_devices_alone(divided, last)
    with on_device():
        found = divided()
    torch.testing.assert_close(found, ft.cross_entropy(logits, target))
    mine = logits[:, part].clone().requires_grad_()
    with on_device(), pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(divided(mine), mine, create_graph=True)


def groups_of_devices_alone(divided, last):
    """As with NCCL: ranks agree on the device, also that one of them has tensors on the CPU."""
    with on_device() as patches:
        patches.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
        patches.setattr(torch.cuda, "current_device", lambda: pytest.fail("not that of the logits"))
        divided()
    with contextlib.nullcontext() if last else on_device(), pytest.MonkeyPatch.context() as patches:
        patches.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
        patches.setattr(_groups, "_meeting_place", lambda *_: torch.device("cpu"))
        with pytest.raises(ValueError, match="group: expected a backend for tensors on the CPU"):
            divided()
    with on_device() as patches:
        patches.setattr(dist, "get_backend_config", lambda group: "cpu:gloo")
        with pytest.raises(ValueError, match=r"group: .* on CUDA devices, .* got cpu:gloo"):
            divided()


def program():
    classes_divided()
    rows_divided()
    layouts()
    what_is_exchanged()
    errors_are_everyones()


if __name__ == "__main__":
    run_on_ranks("tests.torch_cuda_program")
