"""Trains a small language model on real text, with torch's loss and with fastce's.

    python examples/torch_language_model.py [--quick] [--output PICTURE.png]

The text is what comes with Python: the source of its standard library. From four tokens the model
predicts the next one. Each way trains in a process of its own, from the same start with the same
batches, and they take turns at every step; the curves are the same, time and memory are not.
Switching takes one line: see `losses`.
"""

import argparse
import concurrent.futures
import contextlib
import multiprocessing
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

import fastce
import fastce.torch as ft

WAYS = ["torch", "fastce", "fastce in place", "fastce linear"]


class Size(NamedTuple):
    """Files to read, tokens to tell apart, features, rows of a batch, steps."""

    files: int | None
    vocabulary: int
    features: int
    rows: int
    steps: int


FULL, QUICK = Size(None, 20000, 64, 2048, 60), Size(3, 300, 8, 64, 4)
CONTEXT = 4
PAUSE = 0.01  # seconds before a step: the threads of torch spin for a while after their work


class Run(NamedTuple):
    """Losses, seconds of a step and of its loss with backward (medians), bytes at the peak."""

    losses: list[float]
    step: float
    loss: float
    memory: int


def tokens(size: Size) -> torch.Tensor:
    """The text as numbers, by frequency; what is too rare shares the last one."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))[: size.files]
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    words = re.findall(r"\w+|[^\w\s]|\n", text)
    frequent = [word for word, _ in Counter(words).most_common(size.vocabulary - 1)]
    numbers = {word: k for k, word in enumerate(frequent)}
    return torch.tensor([numbers.get(word, len(frequent)) for word in words])


class Model(torch.nn.Module):
    """Embeddings of the context, a hidden layer, and the head that makes the logits."""

    def __init__(self, vocabulary: int, features: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, features)
        self.hidden = torch.nn.Linear(CONTEXT * features, features)
        self.head = torch.nn.Linear(features, vocabulary, bias=False)

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        """Hidden states of contexts."""
        return torch.tanh(self.hidden(self.embedding(context).flatten(1)))


def losses(head: torch.nn.Linear) -> dict[str, Callable[..., torch.Tensor]]:
    """The loss of hidden states and targets, each way in one line."""
    return {
        "torch": lambda h, y: F.cross_entropy(head(h), y),
        "fastce": lambda h, y: ft.cross_entropy(head(h), y),
        "fastce in place": lambda h, y: ft.cross_entropy(head(h), y, in_place=True),
        "fastce linear": lambda h, y: ft.linear_cross_entropy(h, head.weight, y),
    }


class Trainer:
    """A model that trains with one of the losses, and what is measured of it."""

    def __init__(self, way: str, size: Size) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(fastce.get_num_threads())
        self.text, self.rows = tokens(size), size.rows
        self.model = Model(int(self.text.max()) + 1, size.features)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)
        self.loss_of = losses(self.model.head)[way]
        self.curve: list[float] = []
        self.steps: list[float] = []
        self.parts: list[float] = []
        self.resident = 0

    def step(self) -> None:
        """One step; what is resident after the first, which compiles, counts as being there."""
        start = torch.randint(len(self.text) - CONTEXT, (self.rows,))
        context = self.text[start[:, None] + torch.arange(CONTEXT)]
        began = time.perf_counter()
        hidden = self.model(context)
        before_loss = time.perf_counter()
        loss = self.loss_of(hidden, self.text[start + CONTEXT])
        loss.backward()
        self.parts.append(time.perf_counter() - before_loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps.append(time.perf_counter() - began)
        self.curve.append(loss.item())
        self.resident = self.resident or _forget_peak()

    def run(self) -> Run:
        """What was measured."""
        medians = map(statistics.median, (self.steps, self.parts))
        return Run(self.curve, *medians, _status("VmHWM") - self.resident)


def begin(way: str, size: Size) -> None:
    """Make the trainer of this process."""
    global trainer
    trainer = Trainer(way, size)


def step() -> None:
    """Let it take a step."""
    time.sleep(PAUSE)
    trainer.step()


def end() -> Run:
    """What it has measured."""
    return trainer.run()


def _status(field: str) -> int:
    """Bytes of physical memory of this process, as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def _forget_peak() -> int:
    """Start looking for the peak anew; returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def draw(runs: dict[str, Run], output: Path) -> None:
    """The curves over each other, times and memory side by side."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, (curves, times, memory) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for k, (way, run) in enumerate(runs.items()):
        curves.plot(run.losses, label=way, linewidth=6 - 1.5 * k, alpha=0.7)
    curves.set(xlabel="step", ylabel="loss in nats", title="the same curve")
    curves.legend()
    for axes, values, title in (
        (times, [1e3 * run.loss for run in runs.values()], "loss and backward, ms"),
        (memory, [run.memory / 1e6 for run in runs.values()], "memory of a step, MB"),
    ):
        bars = axes.barh(list(runs), values, color=[f"C{k}" for k in range(len(runs))])
        axes.bar_label(bars, fmt="%.0f")
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.set(title=title)
    figure.savefig(output, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Run]:
    """Train each way, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of a tiny model")
    parser.add_argument("--output", type=Path, default=Path("torch_language_model.png"))
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else FULL
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        processes = {
            way: stack.enter_context(concurrent.futures.ProcessPoolExecutor(1, context))
            for way in WAYS
        }
        for way, process in processes.items():
            process.submit(begin, way, size).result()
        for _ in range(size.steps):
            for process in processes.values():
                process.submit(step).result()
        runs = {way: process.submit(end).result() for way, process in processes.items()}
    first = runs["torch"]
    print(f"{'':16} {'first loss':>10} {'last loss':>10} {'off by':>8} {'step':>9} "
          f"{'loss part':>10} {'memory':>8}")  # fmt: skip
    for way, run in runs.items():
        off = max(abs(a / b - 1) for a, b in zip(run.losses, first.losses, strict=True))
        print(
            f"{way:16} {run.losses[0]:10.5f} {run.losses[-1]:10.5f} {off:8.0e} "
            f"{1e3 * run.step:6.1f} ms {1e3 * run.loss:7.1f} ms {run.memory / 1e6:5.0f} MB"
        )
    draw(runs, options.output)
    print(f"drawn: {options.output}")
    return runs


if __name__ == "__main__":
    main()
