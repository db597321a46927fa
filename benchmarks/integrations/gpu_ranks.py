"""The loss of classes that are divided among the GPUs of a machine, over NCCL.

    python -m benchmarks.integrations.gpu_ranks               every GPU there is; one is enough
    python -m benchmarks.integrations.gpu_ranks --dry-run     the same with gloo on the CPU, tiny

For a group with both backends, whose ranks agree on the CPU, and for one of NCCL alone, where the
host waits for the device once per call. A step is timed by the host from an idle device to an idle
device, and the slowest rank counts: the median of many.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

from fastce.torch.distributed import vocabulary_parallel_cross_entropy

SHAPE, DRY_SHAPE = (8192, 128_256), (64, 1000)
GROUPS = ("cpu:gloo,cuda:nccl", "cuda:nccl")
REPETITIONS = 40


def _median(step: Callable[[], Any], repetitions: int, wait: Callable[[], None]) -> float:
    """Seconds of the slowest rank."""
    times = torch.empty(repetitions, dtype=torch.float64)
    for turn in range(-3, repetitions):  # the first ones compile and connect
        wait()
        dist.barrier()
        began = time.perf_counter()
        step()
        wait()
        if turn >= 0:
            times[turn] = time.perf_counter() - began
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, times.tolist())
    return statistics.median(map(max, zip(*every, strict=True)))


def _measure(rank: int, size: int, folder: str, backend: str, dry: bool) -> None:
    """One rank of a group; the first writes a line of the table."""
    device = torch.device("cpu" if dry else f"cuda:{rank}")
    if not dry:
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    rows, classes = DRY_SHAPE if dry else SHAPE
    generator = torch.Generator(device).manual_seed(0)  # every rank has the same numbers
    whole = torch.randn(rows, classes, generator=generator, device=device).to(torch.bfloat16)
    targets = torch.randint(classes, (rows,), generator=generator, device=device)
    start, stop = (classes * k // size for k in (rank, rank + 1))
    mine = whole[:, start:stop].clone().requires_grad_()
    want = F.cross_entropy(whole.float(), targets)
    del whole

    def forward() -> torch.Tensor:
        return vocabulary_parallel_cross_entropy(mine, targets, class_offset=start, classes=classes)

    def both() -> None:
        mine.grad = None
        forward().backward()

    wait = (lambda: None) if dry else torch.cuda.synchronize
    seconds = [_median(step, 3 if dry else REPETITIONS, wait) for step in (forward, both)]
    loss = forward().detach()
    bits: list[Any] = [None] * size
    dist.all_gather_object(bits, loss.item().hex())
    if rank == 0:
        (Path(folder) / "line").write_text(
            f"| {backend} | {size} | {rows} x {classes} | {seconds[0] * 1e3:.3f} "
            f"| {seconds[1] * 1e3:.3f} | {abs(float(loss / want - 1)):.0e} "
            f"| {'yes' if len(set(bits)) == 1 else 'NO'} |"
        )
    dist.destroy_process_group()


def report(dry: bool) -> list[str]:
    """Lines of a table."""
    ranks = 2 if dry else torch.cuda.device_count()
    lines = [
        "",
        "Classes divided among ranks, bfloat16:",
        "",
        "| group | ranks | N x C | loss, ms | and gradient, ms | off torch's by | same bits |",
        "|---|---|---|---|---|---|---|",
    ]
    for backend in ("gloo",) if dry else GROUPS:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(
                _measure, (ranks, folder, backend, dry), ranks, start_method="spawn"
            )
            lines.append((Path(folder) / "line").read_text())
        print(lines[-1], flush=True)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    dry = parser.parse_args().dry_run
    if not dry and not (torch.cuda.is_available() and dist.is_nccl_available()):
        parser.error("there is no CUDA device with NCCL; --dry-run needs none")
    print("\n".join(report(dry)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
