"""What test_torch_distributed runs: ranks that check their results against one process's."""

import multiprocessing
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

import fastce
import fastce.torch as ft
from fastce.torch.distributed import (
    data_parallel_cross_entropy,
    vocabulary_parallel_cross_entropy,
)

ROWS, CLASSES = 37, 23
WEIGHT = torch.rand(CLASSES, generator=torch.Generator().manual_seed(2))
OPTIONS = [
    {},
    {"weight": WEIGHT, "label_smoothing": 0.1, "ignore_index": 3, "z_loss": 0.01},
    {"softcap": 2.0},
]
REDUCTIONS = [{}, {"reduction": "sum"}, {"reduction": "none"}, {"normalizer": 11.0}]


def own(count):
    """The slice of a rank; sizes differ."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return slice(count * rank // size, count * (rank + 1) // size)


def problem(dtype, soft=False):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(ROWS, CLASSES, generator=generator)
    if soft:
        return logits.to(dtype), torch.rand(ROWS, CLASSES, generator=generator).to(dtype)
    return logits.to(dtype), torch.randint(CLASSES, (ROWS,), generator=generator)


def assert_same_everywhere(loss):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, loss.detach().numpy().tobytes())
    assert len(set(found)) == 1


def check(function, logits, part, want, upstream, **options):
    """Loss and gradient of a rank are those of one process; also in a second pass."""
    mine = logits[part].clone().requires_grad_()
    loss = function(mine, **options)
    assert_same_everywhere(loss)
    (whole,) = torch.autograd.grad(want, logits, upstream, retain_graph=True)
    torch.testing.assert_close(loss, want, check_dtype=False, rtol=1e-6, atol=0)
    for _ in range(2):
        (grad,) = torch.autograd.grad(loss, mine, upstream.to(loss.dtype), retain_graph=True)
        torch.testing.assert_close(grad, whole[part])


def classes_divided(dtype):
    part = own(CLASSES)
    for options in OPTIONS:
        for reduced in REDUCTIONS:
            for soft in (False, True):
                logits, target = problem(dtype, soft)
                given = options | reduced
                if soft:
                    given.pop("ignore_index", None)
                want = ft.cross_entropy(
                    logits.requires_grad_(), target, **given, dtype=torch.float64
                )
                if "weight" in given:
                    given["weight"] = WEIGHT[part]
                labels = target[:, part] if soft else target
                check(
                    lambda z, labels=labels, given=given: vocabulary_parallel_cross_entropy(
                        z, labels, class_offset=part.start, classes=CLASSES, **given
                    ),
                    logits, (slice(None), part), want, 1.5 * torch.ones_like(want),
                )  # fmt: skip


def rows_divided(dtype):
    part = own(ROWS)
    for options in OPTIONS:
        logits, target = problem(dtype)
        want = ft.cross_entropy(logits.requires_grad_(), target, **options, dtype=torch.float64)
        for upstream in (1.0, 1.5):
            check(
                lambda z, y=target[part], options=options: data_parallel_cross_entropy(
                    z, y, **options
                ),
                logits, part, want, torch.tensor(upstream, dtype=torch.float64),
            )  # fmt: skip
    if dist.get_world_size() > 1:  # a rank without rows
        logits, target = problem(dtype)
        first = dist.get_rank() == 0
        loss = data_parallel_cross_entropy(*(t if first else t[:0] for t in (logits, target)))
        torch.testing.assert_close(loss, F.cross_entropy(logits.float(), target).to(loss.dtype))


def errors_are_everyones():
    """Whatever is wrong on one rank raises on all, and the group goes on working."""
    logits, target = problem(torch.float32)
    last = dist.get_rank() == dist.get_world_size() - 1
    part = own(CLASSES)
    at = {"class_offset": part.start, "classes": CLASSES}
    bad = target.clone()
    bad[5] = CLASSES

    def spoilt(good, broken):
        return broken if last else good

    cases = [
        (IndexError, "targets", lambda: vocabulary_parallel_cross_entropy(
            logits[:, part], spoilt(target, bad), **at)),
        (ValueError, "reduction", lambda: vocabulary_parallel_cross_entropy(
            logits[:, part], target, **at, reduction=spoilt("mean", "median"))),
        (NotImplementedError, "CPU", lambda: vocabulary_parallel_cross_entropy(
            spoilt(logits[:, part], logits[:, part].to("meta")), target, **at)),
        (IndexError, "targets", lambda: data_parallel_cross_entropy(logits, spoilt(target, bad))),
        (TypeError, "logits", lambda: data_parallel_cross_entropy(
            spoilt(logits, logits.long()), target)),
    ]  # fmt: skip
    if dist.get_world_size() > 1:
        cases += [
            (ValueError, "same on every rank", lambda: vocabulary_parallel_cross_entropy(
                spoilt(logits, logits[1:])[:, part], spoilt(target, target[1:]), **at)),
            (ValueError, "same on every rank", lambda: data_parallel_cross_entropy(
                logits, target, z_loss=spoilt(0.0, 0.1))),
            (ValueError, "classes", lambda: vocabulary_parallel_cross_entropy(
                logits[:, :5], target, class_offset=0, classes=CLASSES)),
        ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message) as caught:
            call()
        if not last and "same" not in message and message != "classes":
            assert f"rank {dist.get_world_size() - 1}: " in str(caught.value)
    loss = vocabulary_parallel_cross_entropy(logits[:, part], target, **at)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))
    loss = data_parallel_cross_entropy(logits.requires_grad_(), target)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(loss, logits, create_graph=True)


def rank(number, size, file):
    torch.set_num_threads(1)
    fastce.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=number, world_size=size,
        timeout=timedelta(seconds=240),
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        classes_divided(dtype)
        rows_divided(dtype)
    errors_are_everyones()
    dist.destroy_process_group()


def main():
    # Ranks are forked from a process that has imported everything and started no thread.
    multiprocessing.set_forkserver_preload(["tests.torch_distributed_program"])
    for size in map(int, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(
                rank, (size, Path(folder) / "store"), size, start_method="forkserver"
            )
        print(f"{size} ranks: all well")


if __name__ == "__main__":
    main()
