"""`fastce.torch` against the bare kernels and against torch's own cross-entropy.

    python -m benchmarks.integrations.torch [--quick] [--no-compile]

Contestants take turns in one run; times are minima over turns, ratios medians over turns. The bare
kernel gets arrays and makes its gradient in fresh memory, as tensors' gradients are. Compiled
functions are torch.compile's; the first run of all compiles them, which takes minutes.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from rich.table import Table

import fastce
import fastce.torch as ft
from benchmarks.timing import Contestant, alternately
from fastce.torch._tensors import array

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Plan(NamedTuple):
    """Shapes and dtypes, turns, seconds for each contestant in a turn."""

    cases: tuple[tuple[int, int, torch.dtype], ...]
    turns: int
    seconds: float


FULL = Plan(
    (
        (32, 10, torch.float32),
        (4096, 1000, torch.float32),
        (1024, 32000, torch.float32),
        (4096, 1000, torch.bfloat16),
        (1024, 32000, torch.bfloat16),
    ),
    turns=7, seconds=0.05,
)  # fmt: skip
QUICK = Plan(((32, 10, torch.float32), (64, 100, torch.bfloat16)), turns=1, seconds=0.0)
BASE, OURS, IN_PLACE, COMPILED, TORCH, TORCH_COMPILED = (
    "kernel", "fastce.torch", "in place", "compiled", "torch", "torch compiled",
)  # fmt: skip


class Case:
    """Logits and targets, and the calls that are made with them."""

    def __init__(self, rows: int, classes: int, dtype: torch.dtype, *, compiling: bool) -> None:
        torch.manual_seed(0)
        self.name = f"{rows} x {classes}, {str(dtype).removeprefix('torch.')}"
        self.source = torch.randn(rows, classes).to(dtype)
        self.target = torch.randint(classes, (rows,))
        self.leaf = self.source.clone().requires_grad_()
        self.compiling = compiling

    def functions(self) -> dict[str, Loss]:
        """The losses, by contestant."""
        losses: dict[str, Loss] = {OURS: ft.cross_entropy, TORCH: F.cross_entropy}
        if self.compiling:
            torch._dynamo.reset()  # shapes seen before would make it compile for any shape
            losses[COMPILED] = torch.compile(ft.cross_entropy, fullgraph=True)
            losses[TORCH_COMPILED] = torch.compile(F.cross_entropy, fullgraph=True)
        return losses

    def forward(self) -> dict[str, Contestant]:
        """The loss alone."""
        arguments = array(self.source), array(self.target)
        bare = Contestant(functools.partial(fastce.cross_entropy, *arguments))
        calls = {
            name: Contestant(functools.partial(loss, self.source, self.target))
            for name, loss in self.functions().items()
        }
        return {BASE: bare, **calls}

    def both(self) -> dict[str, Contestant]:
        """The loss and its gradient."""
        arguments = array(self.source), array(self.target)
        bare = Contestant(functools.partial(fastce.cross_entropy_and_grad, *arguments))
        calls = {
            name: Contestant(functools.partial(self.gradient, loss))
            for name, loss in self.functions().items()
        }
        return {BASE: bare, **calls, IN_PLACE: Contestant(self.in_place, self.compute_logits)}

    def gradient(self, loss: Loss) -> Any:
        """Forward and backward."""
        return torch.autograd.grad(loss(self.leaf, self.target), self.leaf)

    def compute_logits(self) -> None:
        """Logits that are not a leaf."""
        self.logits = self.source + torch.zeros((), requires_grad=True)

    def in_place(self) -> Any:
        """Forward and backward in the memory of the logits."""
        loss = ft.cross_entropy(self.logits, self.target, in_place=True)
        return torch.autograd.grad(loss, self.logits)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="fastce.torch against kernels and torch.")
    parser.add_argument("--quick", action="store_true", help="small cases, once")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    torch.set_num_threads(fastce.get_num_threads())
    table = Table("case", "", BASE, "overhead", COMPILED, IN_PLACE, TORCH, TORCH_COMPILED)
    for rows, classes, dtype in plan.cases:
        case = Case(rows, classes, dtype, compiling=not (options.quick or options.no_compile))
        for work, contestants in (("loss", case.forward()), ("with gradient", case.both())):
            times = alternately(contestants, turns=plan.turns, seconds=plan.seconds)
            base, ours = times[BASE], times[OURS]
            shown = {
                name: f"{times[name].over(ours):.2f}"
                for name in (COMPILED, IN_PLACE, TORCH, TORCH_COMPILED)
                if name in times
            }
            table.add_row(
                case.name, work, f"{base.minimum * 1e6:.0f} us",
                f"{(ours.minimum - base.minimum) * 1e6:+.0f} us ({ours.over(base):.2f})",
                *(shown.get(name, "") for name in (COMPILED, IN_PLACE, TORCH, TORCH_COMPILED)),
            )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    console.print(
        f"overhead: in brackets, times the kernel; what follows: times fastce.torch in eager mode. "
        f"torch {torch.__version__}, {fastce.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
