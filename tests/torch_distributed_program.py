"""What test_torch_distributed runs: ranks that check their results against one process's."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

import fastce.torch as ft
from fastce import _linear_slice
from fastce.torch.distributed import (
    data_parallel_cross_entropy,
    vocabulary_parallel_cross_entropy,
    vocabulary_parallel_linear_cross_entropy,
)
from tests.torch_ranks import run_on_ranks

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


def layer(dtype, soft=False):
    """Hidden states of (ROWS - 1) rows in two axes, weights, bias and target."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, ROWS // 2, 6, generator=generator).to(dtype)
    weight = torch.randn(CLASSES, 6, generator=generator).to(dtype)
    bias = torch.randn(CLASSES, generator=generator).to(dtype)
    target = problem(dtype, soft)[1][: ROWS - 1]
    return x, weight, bias, target.reshape(2, ROWS // 2, *target.shape[1:])


HEADS = [(0, True, False), (1, False, False), (1, True, True), (2, True, False)]


def linear_layer_divided(dtype):
    """One all-reduce makes the gradient of what all ranks share that of one process."""
    part = own(CLASSES)
    whole_memory = _linear_slice.MEMORY
    for number, biased, soft in HEADS:
        for reduced in REDUCTIONS:
            given = OPTIONS[number] | reduced
            if soft:
                given.pop("ignore_index", None)
            *everything, target = layer(dtype, soft)
            leaves = [t.clone().requires_grad_() for t in everything]
            mine = [leaves[0].detach(), *(t.detach()[part] for t in leaves[1:])]
            mine = [t.clone().requires_grad_() for t in mine]
            logits = F.linear(leaves[0].double(), leaves[1].double(), leaves[2].double())
            if not biased:
                logits = logits - leaves[2].double()
            labels = target.reshape(-1, CLASSES).double() if soft else target.reshape(-1)
            want = ft.cross_entropy(logits.reshape(-1, CLASSES), labels, **given)
            if "weight" in given:
                given["weight"] = WEIGHT[part]
            # All rows at a time, or ten.
            ten = 4 * 10 * -(-CLASSES // dist.get_world_size())
            _linear_slice.MEMORY = whole_memory if biased else ten
            loss = vocabulary_parallel_linear_cross_entropy(
                mine[0], mine[1], target[..., part] if soft else target,
                linear_bias=mine[2] if biased else None,
                class_offset=part.start, classes=CLASSES, **given,
            )  # fmt: skip
            _linear_slice.MEMORY = whole_memory
            assert_same_everywhere(loss)
            rtol = 1e-5 if dtype is torch.float32 else torch.finfo(dtype).eps
            torch.testing.assert_close(
                loss.reshape(-1), want.reshape(-1), check_dtype=False, rtol=1e-5, atol=1e-6
            )
            upstream = torch.linspace(0.5, 1.5, loss.numel()).reshape(loss.shape).to(loss.dtype)
            used = slice(0, 3 if biased else 2)
            wanted = torch.autograd.grad(want, leaves[used], upstream.reshape(want.shape).double())
            for _ in range(2):  # the second pass has no logits left from the forward one
                dx, *others = torch.autograd.grad(loss, mine[used], upstream, retain_graph=True)
                assert_same_everywhere(dx.float())
                torch.testing.assert_close(dx, wanted[0], rtol=rtol, atol=1e-6)
                for got, whole in zip(others, wanted[1:], strict=True):
                    torch.testing.assert_close(got, whole[part], rtol=rtol, atol=1e-6)


def what_is_exchanged():
    """Backward exchanges the gradient of what all ranks share, once, and only if it is wanted."""
    part = own(CLASSES)
    x, weight, _, target = layer(torch.float32)
    for wanted in (False, True):
        mine = weight[part].clone().requires_grad_()
        loss = vocabulary_parallel_linear_cross_entropy(
            x.clone().requires_grad_(wanted), mine, target, class_offset=part.start, classes=CLASSES
        )
        with exchanges() as seen:
            loss.backward()
        assert seen == ([4 * x.numel()] if wanted else [])
    logits, labels = problem(torch.float32)
    with exchanges() as seen:
        loss = data_parallel_cross_entropy(logits.requires_grad_(), labels)
        forward = len(seen)
        loss.backward()
    assert sum(seen) == 24 * dist.get_world_size() + 32
    assert len(seen) == forward


def logits_are_computed_once():
    """But where upstream gradients, or the two divisors of a mean, are not known before the end."""
    part, whole, before = own(CLASSES), _linear_slice.MEMORY, _linear_slice.LinearSlice._logits
    x, weight, _, target = layer(torch.float32)
    passes = []

    def counting(self, keep):
        passes.append(keep)
        return before(self, keep)

    _linear_slice.MEMORY = 4 * 10 * -(-CLASSES // dist.get_world_size())
    _linear_slice.LinearSlice._logits = counting
    weighted = {"weight": WEIGHT[part], "z_loss": 0.1}
    for options, count in [({}, 1), ({"z_loss": 0.1}, 1), (weighted, 2), ({"reduction": "none"}, 2),
                           (weighted | {"normalizer": 3.0}, 1)]:  # fmt: skip
        mine = weight[part].clone().requires_grad_()
        loss = vocabulary_parallel_linear_cross_entropy(
            x, mine, target, class_offset=part.start, classes=CLASSES, **options
        )
        loss.sum().backward()
        assert len(passes) == count, options
        passes.clear()
    with torch.no_grad():  # the loss alone, also of weights that require a gradient
        vocabulary_parallel_linear_cross_entropy(
            x, mine, target, class_offset=part.start, classes=CLASSES
        )
    assert passes == [True]
    _linear_slice.MEMORY, _linear_slice.LinearSlice._logits = whole, before


@contextlib.contextmanager
def exchanges():
    """Bytes that each collective call hands out."""
    seen, before = [], (dist.all_reduce, dist.all_gather)

    def all_reduce(tensor, **given):
        seen.append(tensor.nbytes)
        return before[0](tensor, **given)

    def all_gather(tensors, *others):
        seen.append(sum(tensor.nbytes for tensor in tensors))
        return before[1](tensors, *others)

    dist.all_reduce, dist.all_gather = all_reduce, all_gather
    try:
        yield seen
    finally:
        dist.all_reduce, dist.all_gather = before


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
    size = dist.get_world_size()
    last = dist.get_rank() == size - 1
    part = own(CLASSES)
    at = {"class_offset": part.start, "classes": CLASSES}
    bad = target.clone()
    bad[5] = CLASSES

    overwritten = 1 * logits.clone().requires_grad_()
    ft.cross_entropy(overwritten, target, in_place=True)

    x, linear_weight, bias, rows = layer(torch.float32)
    beyond = rows.clone()
    beyond[1, 2] = CLASSES

    def spoilt(good, broken):
        return broken if last else good

    def head(x=x, rows=rows, **others):
        return vocabulary_parallel_linear_cross_entropy(x, linear_weight[part], rows, **at | others)

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
        (ValueError, "target: .*no gradient", lambda: data_parallel_cross_entropy(
            logits, spoilt(target, logits.clone().requires_grad_()))),
        (RuntimeError, "logits: expected logits", lambda: data_parallel_cross_entropy(
            spoilt(logits, overwritten), target)),
        (IndexError, "targets", lambda: head(rows=spoilt(rows, beyond))),
        (ValueError, "target: expected shape", lambda: head(rows=spoilt(rows, rows[:1]))),
        (ValueError, "bias", lambda: head(linear_bias=spoilt(bias[part], bias[:1]))),
        (ValueError, "class_offset", lambda: head(class_offset=spoilt(part.start, CLASSES))),
        (ValueError, "weight: expected shape", lambda: head(x=spoilt(x, x[..., :3]))),
        (ValueError, "weight: .*no gradient", lambda: head(
            weight=WEIGHT[part].clone().requires_grad_(last))),
    ]  # fmt: skip
    if dist.get_world_size() > 1:
        cases += [
            (ValueError, "same on every rank", lambda: vocabulary_parallel_cross_entropy(
                spoilt(logits, logits[1:])[:, part], spoilt(target, target[1:]), **at)),
            (ValueError, "same on every rank", lambda: data_parallel_cross_entropy(
                logits, target, z_loss=spoilt(0.0, 0.1))),
            (ValueError, "classes", lambda: vocabulary_parallel_cross_entropy(
                logits[:, :5], target, class_offset=0, classes=CLASSES)),
            (AttributeError if last else RuntimeError, "no attribute 'shape'", lambda: head(
                x=spoilt(x, x.tolist()))),
            (ValueError, "same on every rank", lambda: head(softcap=spoilt(None, 3.0))),
            (ValueError, "same on every rank", lambda: head(
                x=spoilt(x, x.reshape(4, -1, 6)), rows=spoilt(rows, rows.reshape(4, -1)))),
            (ValueError, "same on every rank", lambda: head(x=x.clone().requires_grad_(last))),
        ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message) as caught:
            call()
        if not last and "same" not in message and message != "classes":
            assert f"rank {size - 1}: " in str(caught.value)
    loss = vocabulary_parallel_cross_entropy(logits[:, part], target, **at)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))
    loss = data_parallel_cross_entropy(logits.requires_grad_(), target)
    for differentiable in (loss, head(x.requires_grad_())):
        with pytest.raises(NotImplementedError, match="second derivatives"):
            torch.autograd.grad(differentiable, [logits, x], create_graph=True, allow_unused=True)


def program():
    for dtype in (torch.float32, torch.bfloat16):
        classes_divided(dtype)
        rows_divided(dtype)
        linear_layer_divided(dtype)
    what_is_exchanged()
    logits_are_computed_once()
    errors_are_everyones()


if __name__ == "__main__":
    run_on_ranks("tests.torch_distributed_program")
