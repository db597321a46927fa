"""Cross-entropy on a CUDA device: the tests of the contract, then every shape against its peers.

    python -m benchmarks.gpu_report                 some minutes on a card; needs PyTorch
    python -m benchmarks.gpu_report --dry-run       the same code on the CPU, tiny, in seconds

All calls of a shape are measured in one run, alternately, with CUDA events and buffers that rotate
beyond the L2 cache: the median of many. A fraction is the bytes that must be moved (the logits read
once and the gradient written once) over the time, as a part of what copying reaches in the same
run. Peers that are not installed are left out. Then the same within JAX, if its CUDA plugin is
there (`benchmarks.integrations.jax_cuda`), and with NCCL the loss of classes divided among all
cards (`benchmarks.integrations.gpu_ranks`). Writes gpu_report.md and gpu_report.png.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastce
from fastce import shards

with contextlib.suppress(ModuleNotFoundError):  # asv imports this module and has no torch
    import torch
    import torch.nn.functional as F  # noqa: N812

SHAPES = (
    (1 << 20, 10), (32768, 1000), (32768, 4096), (8192, 32_000), (8192, 50_257), (8192, 128_256),
    (8192, 262_144), (1024, 1 << 20), (8, 1 << 20), (1, 50_257),
)  # fmt: skip
BINARY_SHAPE = (65_536, 1000)  # one label for each element
SLICE_SHAPES = ((8192, 32_064), (8192, 16_032))  # of 128256 classes, divided by four or eight
DRY_SHAPES, DRY_BINARY_SHAPE, DRY_SLICE_SHAPES = ((64, 10), (8, 1000)), (64, 10), ((8, 100),)
FEWEST_ROWS = 128  # of the shapes that have a target
# Arrays of the size of the logits that a task reads and writes.
MOVED = {
    "loss": 1, "gradient": 2, "in place": 2, "binary loss": 2, "binary gradient": 3,
    "records of a slice": 1, "gradient of a slice": 2,
}  # fmt: skip
ROTATING = 200 << 20  # bytes of logits that calls take turns with: four times the L2 of an H100
REPETITIONS = 40
TARGETS = {10: 0.70, 1000: 0.80}  # fraction of copying for loss and gradient; 0.90 from 4096 up

Call = Callable[[Any, Any], Any]


class Clock:
    """Time on the device by events, on the host by its clock."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def seconds(self, call: Callable[[], Any]) -> float:
        if not self.cuda:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def backward(function: Call) -> Call:
    """Loss and gradient by PyTorch's differentiation."""

    def both(z: Any, y: Any) -> Any:
        leaf = z.detach().requires_grad_()
        function(leaf, y).backward()
        return leaf.grad

    return both


def binary_contestants(device: str) -> dict[str, dict[str, Call]]:
    """The same for the binary form."""
    torch_loss = F.binary_cross_entropy_with_logits
    found: dict[str, dict[str, Call]] = {
        "binary loss": {"fastce": fastce.binary_cross_entropy, "torch": torch_loss},
        "binary gradient": {
            "fastce": fastce.binary_cross_entropy_and_grad, "torch": backward(torch_loss)
        },
    }  # fmt: skip
    if device == "cuda":
        compiled = torch.compile(torch_loss)
        found["binary loss"]["torch.compile"] = compiled
        found["binary gradient"]["torch.compile"] = backward(compiled)
    return found


def slice_contestants(device: str) -> dict[str, dict[str, Call]]:
    """Records and gradient of one of two halves of the classes."""
    totals: dict[Any, Any] = {}

    def partial(z: Any, y: Any, class_offset: int = 0) -> Any:
        z, y = (z, y) if z.is_cuda else (z.numpy(), y.numpy())
        return shards.partial(z, y, class_offset=class_offset, classes=2 * z.shape[-1])

    def gradient(z: Any, y: Any) -> Any:
        key = z.shape, z.dtype  # the numbers of the rotating logits differ, the work does not
        if key not in totals:
            totals[key] = shards.merge(partial(z, y), partial(z, y, z.shape[-1]))
        z, y = (z, y) if z.is_cuda else (z.numpy(), y.numpy())
        return shards.grad(z, y, totals[key], class_offset=0)

    return {
        "records of a slice": {"fastce": partial}, "gradient of a slice": {"fastce": gradient}
    }  # fmt: skip


def contestants(device: str) -> dict[str, dict[str, Call]]:
    """Calls by what they compute: loss, loss and gradient, the same in place."""

    def in_place(z: Any, y: Any) -> Any:
        array = z if z.is_cuda else z.numpy()
        return fastce.cross_entropy_and_grad(array, y, out=array)

    found: dict[str, dict[str, Call]] = {
        "loss": {"fastce": fastce.cross_entropy, "torch": F.cross_entropy},
        "gradient": {"fastce": fastce.cross_entropy_and_grad, "torch": backward(F.cross_entropy)},
        "in place": {"fastce": in_place},
    }
    if device != "cuda":
        return found
    compiled = torch.compile(F.cross_entropy)
    found["loss"]["torch.compile"] = compiled
    found["gradient"]["torch.compile"] = backward(compiled)
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        pass
    else:  # always in place
        found["in place"]["Liger"] = backward(liger_cross_entropy)
    try:
        from quack.cross_entropy import cross_entropy as quack_cross_entropy
    except ImportError:
        pass
    else:
        found["loss"]["quack"] = lambda z, y: quack_cross_entropy(z, y, reduction="mean")
        found["gradient"]["quack"] = backward(
            lambda z, y: quack_cross_entropy(z, y, reduction="mean")
        )
    try:
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
    except ImportError:
        pass
    else:
        found["loss"]["flash-attn"] = lambda z, y: cross_entropy_loss(z, y)[0].mean()
        found["gradient"]["flash-attn"] = backward(lambda z, y: cross_entropy_loss(z, y)[0].mean())
    return found


def copy_bandwidth(clock: Clock, device: str, size: int) -> float:
    """Bytes per second of copying: read and written."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    to = torch.empty_like(source)
    to.copy_(source)
    times = [clock.seconds(lambda: to.copy_(source)) for _ in range(REPETITIONS)]
    return 2 * size / statistics.median(times)


def measure(
    clock: Clock, device: str, dtype: torch.dtype, shape: tuple[int, int], repetitions: int,
    kind: str = "",
) -> list[tuple[str, str, float, float]]:  # fmt: skip
    """(task, who, median seconds, peak bytes beside the logits) of every call of a shape."""
    rows, classes = shape
    size = rows * classes * dtype.itemsize
    copies = max(1, -(-ROTATING // size)) if device == "cuda" else 2
    logits = [torch.randn(shape, dtype=dtype, device=device) for _ in range(copies)]
    targets = torch.randint(0, classes, (rows,), device=device)
    if kind == "binary":
        targets = torch.randint(0, 2, shape, device=device).to(dtype)
    by_kind = {"": contestants, "binary": binary_contestants, "slice": slice_contestants}
    by_task = by_kind[kind](device)
    calls = [(task, who, call) for task, by in by_task.items() for who, call in by.items()]
    times: dict[tuple[str, str], list[float]] = {}
    peaks: dict[tuple[str, str], int] = {}
    for turn in range(-2, repetitions):  # the first two compile and warm up
        for number, (task, who, call) in enumerate(calls):
            if peaks.get((task, who)) == -1:
                continue
            z = logits[(turn * len(calls) + number) % copies]
            if turn == 0 and clock.cuda:
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if clock.cuda else 0
            try:
                seconds = clock.seconds(lambda call=call, z=z: call(z, targets))
            except Exception as error:  # a peer that cannot do this shape says so itself
                if who == "fastce":
                    raise
                print(f"{who}, {task}, {dtype}, {shape}: {error}", file=sys.stderr)
                peaks[task, who] = -1
                continue
            if turn >= 0:
                times.setdefault((task, who), []).append(seconds)
            if turn == 0 and clock.cuda:
                peaks[task, who] = torch.cuda.max_memory_allocated() - before
    return [
        (task, who, statistics.median(t), peaks.get((task, who), 0))
        for (task, who), t in times.items()
    ]


def launch_latency(clock: Clock, device: str) -> float:
    """Microseconds that a small call takes the host, once warm."""
    z, y = torch.zeros(32, 10, device=device), torch.zeros(32, dtype=torch.long, device=device)
    out = torch.empty_like(z)

    def call() -> None:
        fastce.cross_entropy_and_grad(z, y, out=out if device == "cuda" else None)

    for _ in range(100):
        call()
    clock.wait()
    began = time.perf_counter()
    for _ in range(1000):
        call()
    taken = (time.perf_counter() - began) / 1000
    clock.wait()
    return taken * 1e6


def report(folder: Path, device: str, repetitions: int) -> list[str]:
    """Measure everything; the lines of the table."""
    clock, dry = Clock(device), device != "cuda"
    copying = copy_bandwidth(clock, device, 1 << (20 if dry else 31))
    lines = [
        f"Device: {torch.cuda.get_device_name() if not dry else 'none, a dry run on the CPU'}; "
        f"copying {copying / 1e9:.0f} GB/s; a small call {launch_latency(clock, device):.1f} us.",
        "",
        "| dtype | N x C | task | who | ms | GB/s | of copying | to fastce | peak MB | target |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    fractions: dict[str, list[float]] = {}
    shapes = DRY_SHAPES if dry else SHAPES
    plotted = [shape for shape in shapes if dry or shape[0] >= FEWEST_ROWS]
    cases = [
        *((shape, "") for shape in shapes),
        (DRY_BINARY_SHAPE if dry else BINARY_SHAPE, "binary"),
        *((shape, "slice") for shape in (DRY_SLICE_SHAPES if dry else SLICE_SHAPES)),
    ]
    for dtype in (torch.float32,) if dry else (torch.bfloat16, torch.float32):
        for shape, kind in cases:
            size = shape[0] * shape[1] * dtype.itemsize
            results = measure(clock, device, dtype, shape, repetitions, kind)
            own = {task: seconds for task, who, seconds, _ in results if who == "fastce"}
            for task, who, seconds, peak in results:
                moved = size * MOVED[task]
                fraction = moved / seconds / copying
                wanted = TARGETS.get(shape[1], 0.90)
                target = ""
                if who == "fastce" and task == "gradient" and shape in plotted:
                    if not dry:
                        target = f"{wanted:.2f} {'met' if fraction >= wanted else 'MISSED'}"
                    fractions.setdefault(str(dtype).removeprefix("torch."), []).append(fraction)
                lines.append(
                    f"| {str(dtype).removeprefix('torch.')} | {shape[0]} x {shape[1]} | {task} "
                    f"| {who} | {seconds * 1e3:.3f} | {moved / seconds / 1e9:.0f} "
                    f"| {fraction:.2f} | {seconds / own[task]:.2f} | {peak / 1e6:.0f} | {target} |"
                )
            print("\n".join(lines[-len(results) :]), flush=True)
            if not dry:
                torch.cuda.empty_cache()
    _plot(folder / "gpu_report.png", fractions, [classes for _, classes in plotted])
    return lines


def _plot(path: Path, fractions: dict[str, list[float]], classes: list[int]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for dtype, values in fractions.items():
        axes.plot(classes, values, "o-", label=dtype)
    axes.plot(classes, [TARGETS.get(c, 0.90) for c in classes], "k:", label="target")
    axes.set(xscale="log", xlabel="classes", ylabel="fraction of copying", ylim=(0, None))
    axes.set_title("loss and gradient")
    axes.legend()
    figure.savefig(path, dpi=150)


def jax_report(dry: bool) -> list[str]:
    """The same within JAX, in a process of its own: two libraries would share the memory."""
    command = [sys.executable, "-m", "benchmarks.integrations.jax_cuda", *["--dry-run"] * dry]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    return done.stdout.splitlines() if not done.returncode else ["`fastce.jax`: not measured."]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--output", type=Path, default=Path(), metavar="FOLDER")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    options = parser.parse_args()
    if "torch" not in globals():
        parser.error("PyTorch is not installed")
    options.output.mkdir(parents=True, exist_ok=True)
    device = "cpu" if options.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run needs none")
    if device == "cuda" and not options.no_tests:
        names = (
            "cuda_device", "cuda_binary", "cuda_shards", "torch_cuda_device", "jax_cuda_device"
        )  # fmt: skip
        files = [f"tests/test_{name}.py" for name in names]
        tests = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", *files]
        if status := subprocess.run(tests, check=False).returncode:
            return status
    lines = report(options.output, device, 3 if options.dry_run else REPETITIONS)
    lines += ["", *jax_report(options.dry_run)]
    if options.dry_run or torch.distributed.is_nccl_available():
        from benchmarks.integrations import gpu_ranks

        lines += gpu_ranks.report(options.dry_run)
    (options.output / "gpu_report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
