"""Losses whose classes are divided among ranks of gloo, against torch's own ways.

    python -m benchmarks.integrations.torch_distributed [--quick] [--ranks 1 2]

Every rank has one thread and a slice of the classes. Contestants, loss and gradients each:

    kernel    the loss of the rank's slice alone, by the core's function, without any exchange
    ours      fastce.torch.distributed, of plain tensors
    rows      the same with reduction="none": gradients of a head need its logits a second time
    DTensor   fastce.torch of DTensors
    Megatron  the formula of tensor-parallel training in plain torch: three all_reduce
    torch     F.cross_entropy of a DTensor in torch's loss_parallel, of F.linear for a head

They take turns, and a turn is as long as its slowest rank; times are minima over turns, ratios
medians over turns.
"""

import argparse
import functools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

import fastce
import fastce.torch as ft
from benchmarks.timing import PAUSE, Times
from fastce.torch.distributed import (
    vocabulary_parallel_cross_entropy,
    vocabulary_parallel_linear_cross_entropy,
)

Call = Callable[[], Any]
KERNEL, OURS, ROWS, DTENSOR, MEGATRON, TORCH = (
    "kernel", "ours", "rows", "DTensor", "Megatron", "torch",
)  # fmt: skip


class Plan(NamedTuple):
    """Rows, features of a head (None for logits) and classes; turns."""

    cases: tuple[tuple[int, int | None, int], ...]
    turns: int


FULL = Plan(((32, None, 1000), (1024, None, 32000), (256, 128, 8000), (2048, 128, 32000)), turns=4)
QUICK = Plan(((8, None, 12), (8, 4, 12)), turns=1)


class Megatron(torch.autograd.Function):
    """Mean loss of logits whose classes are divided, the gradient in the memory of exp(logits)."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor, first: int) -> torch.Tensor:
        top = logits.max(1).values
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
        shifted = logits - top[:, None]
        own = (target >= first) & (target < first + logits.shape[1])
        place = torch.where(own, target - first, 0)
        at_target = torch.where(own, shifted.gather(1, place[:, None])[:, 0], 0.0)
        dist.all_reduce(at_target)
        powers = shifted.exp_()
        total = powers.sum(1)
        dist.all_reduce(total)
        powers.div_(total[:, None])
        ctx.save_for_backward(powers, own, place)
        return (total.log() - at_target).mean()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        powers, own, place = ctx.saved_tensors
        powers[torch.arange(len(own)), place] -= own.to(powers.dtype)
        return powers.mul_(g / len(own)), None, None


class Shared(torch.autograd.Function):
    """What all ranks have: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(g)
        return g


class Case:
    """Tensors of a rank, and the calls that are made with them."""

    def __init__(self, rows: int, features: int | None, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.classes, size, rank = classes, dist.get_world_size(), dist.get_rank()
        self.slice = slice(classes * rank // size, classes * (rank + 1) // size)
        self.first = self.slice.start
        self.target = torch.randint(classes, (rows,), generator=generator)
        mesh = init_device_mesh("cpu", (size,))
        shape = (rows, classes) if features is None else (classes, features)
        whole, axis = torch.randn(shape, generator=generator), 1 if features is None else 0
        self.own = whole.tensor_split(size, axis)[rank].contiguous().requires_grad_()
        self.spread = distribute_tensor(whole, mesh, [Shard(axis)], src_data_rank=None)
        self.spread.requires_grad_()
        if features is not None:
            self.x = torch.randn((rows, features), generator=generator).requires_grad_()
            self.spread_x = distribute_tensor(
                self.x.detach(), mesh, [Replicate()], src_data_rank=None
            ).requires_grad_()

    def of_logits(self) -> dict[str, Call]:
        """Loss and gradient of logits."""
        given = {"class_offset": self.first, "classes": self.classes}
        ours = functools.partial(vocabulary_parallel_cross_entropy, self.own, self.target, **given)
        inside = torch.where(self.target < self.own.shape[1], self.target, 0).numpy()
        logits = self.own.detach().numpy()
        return {
            KERNEL: lambda: fastce.cross_entropy_and_grad(logits, inside),
            OURS: lambda: torch.autograd.grad(ours(), self.own),
            DTENSOR: lambda: torch.autograd.grad(
                ft.cross_entropy(self.spread, self.target), self.spread
            ),
            MEGATRON: lambda: torch.autograd.grad(
                Megatron.apply(self.own, self.target, self.first), self.own
            ),
            TORCH: lambda: self.in_context(lambda: self.spread, self.spread),
        }

    def of_head(self) -> dict[str, Call]:
        """Loss and both gradients of a linear layer."""
        given = {"class_offset": self.first, "classes": self.classes}
        leaves, spread = (self.x, self.own), (self.spread_x, self.spread)
        ours = functools.partial(
            vocabulary_parallel_linear_cross_entropy, *leaves, self.target, **given
        )
        inside = torch.where(self.target < len(self.own), self.target, 0).numpy()
        x, weight = (t.detach().numpy() for t in leaves)
        even = torch.full((len(x),), 1.0 / len(x))
        return {
            KERNEL: lambda: fastce.linear_cross_entropy_and_grad(x, weight, inside),
            OURS: lambda: torch.autograd.grad(ours(), leaves),
            ROWS: lambda: torch.autograd.grad(ours(reduction="none"), leaves, even),
            DTENSOR: lambda: torch.autograd.grad(
                ft.linear_cross_entropy(*spread, self.target), spread
            ),
            MEGATRON: lambda: torch.autograd.grad(
                Megatron.apply(F.linear(Shared.apply(self.x), self.own), self.target, self.first),
                leaves,
            ),
            TORCH: lambda: self.in_context(lambda: F.linear(*spread), *spread),
        }

    def in_context(self, logits: Call, *leaves: Any) -> Any:
        """By torch's own means for DTensors."""
        with loss_parallel():
            gradients = torch.autograd.grad(F.cross_entropy(logits(), self.target), leaves)
        # Of what all ranks have a sum is left to be taken, which ours and Megatron's is.
        return [g.redistribute(t.device_mesh, t.placements).to_local()
                for g, t in zip(gradients, leaves, strict=True)]  # fmt: skip


def alternately(calls: dict[str, Call], turns: int) -> dict[str, Times]:
    """Seconds of the slowest rank, each turn the least of as many calls as take 20 ms."""
    repeats = {}
    for name, call in calls.items():
        call()
        began = time.perf_counter()
        call()
        least = torch.tensor(time.perf_counter() - began)
        dist.all_reduce(least, op=dist.ReduceOp.MAX)
        repeats[name] = max(2, min(200, int(0.02 / float(least))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            time.sleep(PAUSE)
            seconds = torch.empty(repeats[name], dtype=torch.float64)
            for k in range(repeats[name]):
                dist.barrier()
                began = time.perf_counter()
                call()
                seconds[k] = time.perf_counter() - began
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            found[name].append(float(seconds.min()))
    return {name: Times(tuple(all_turns)) for name, all_turns in found.items()}


def measure(rank: int, size: int, store: str, plan: Plan) -> None:
    """A rank's part; the first prints."""
    torch.set_num_threads(1)
    fastce.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    names = (ROWS, DTENSOR, MEGATRON, TORCH)
    table = Table("ranks", "case", KERNEL, OURS, *names)
    for rows, features, classes in plan.cases:
        case = Case(rows, features, classes)
        calls = case.of_logits() if features is None else case.of_head()
        times = alternately(calls, plan.turns)
        ours = times[OURS]
        shape = (rows, classes) if features is None else (rows, features, classes)
        table.add_row(
            str(size), " x ".join(map(str, shape)), f"{times[KERNEL].minimum * 1e3:.2f} ms",
            f"{ours.minimum * 1e3:.2f} ms ({ours.over(times[KERNEL]):.2f})",
            *(f"{times[name].over(ours):.2f}" if name in times else "" for name in names),
        )  # fmt: skip
    if rank == 0:
        console = Console(width=110)
        console.print(table)
    dist.destroy_process_group()


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description="Losses with divided classes against torch's.")
    parser.add_argument("--quick", action="store_true", help="small cases, once")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy reads it in the ranks, which are spawned
    for size in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            arguments = size, str(Path(folder) / "store"), QUICK if options.quick else FULL
            torch.multiprocessing.start_processes(measure, arguments, size, start_method="spawn")
    print(
        f"rows x classes, or rows x features x classes of a head. {OURS}: in brackets, times the "
        f"kernel; the others: times {OURS}. torch {torch.__version__}, one thread per rank"
    )


if __name__ == "__main__":
    main()
