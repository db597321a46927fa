"""The limits of the machine: how fast as many threads move as many bytes without computing.

    python -m benchmarks.limits [MEGABYTES ...]

Each way to move bytes is tried in several forms; the fastest one is the limit.  The kernels here
claim chunks from a shared counter on fastce's own threads, so that a limit and what is measured
against it differ in nothing but the work.
"""

import argparse
import functools
import importlib.util
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

import fastce
from benchmarks.timing import Contestant, Times, alternately
from fastce._cli.terminal import table
from fastce.cpu.memory import (
    claim,
)
from fastce.cpu.threads import launch

Array = np.ndarray[Any, Any]
Move = Literal["read", "copy", "update", "fresh"]

# What a move is, and how many bytes it moves for each byte of the array.
MOVES: dict[Move, tuple[str, int]] = {
    "read": ("reading it", 1),
    "copy": ("copying it to memory used before", 2),
    "update": ("multiplying it in place", 2),
    "fresh": ("copying it to newly allocated memory", 2),
}

LINE = 64  # bytes: one streaming store, and what its address must be a multiple of
CHUNK = 1 << 14  # 8-byte words in a chunk: 128 KB, as many as fastce's kernels claim of float32


@intrinsic  # type: ignore[untyped-decorator]
def _stream(typingctx: Any, target: Any, source: Any, line: Any) -> Any:
    """Copy one line past the caches."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lines = ir.VectorType(ir.IntType(64), LINE // 8).as_pointer()
        written, read = (
            builder.gep(
                builder.bitcast(context.make_array(array)(context, builder, value).data, lines),
                [args[2]],
            )
            for array, value in ((target, args[0]), (source, args[1]))
        )
        store = builder.store(builder.load(read, align=LINE), written, align=LINE)
        one = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        store.set_metadata("nontemporal", one)
        return context.get_dummy_value()

    return types.void(target, source, types.int64), codegen


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _read(words: Array, sums: Array, counter: Array) -> None:
    while True:
        chunk = claim(counter)
        if chunk >= sums.size:
            return
        part = words[chunk * CHUNK : (chunk + 1) * CHUNK]
        total = np.uint64(0)  # integers may be added in any order, and so in vectors
        for i in range(part.size):
            total += part[i]
        sums[chunk] = total


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _copy(words: Array, target: Array, counter: Array) -> None:
    while True:
        start = claim(counter) * CHUNK
        if start >= words.size:
            return
        part = words[start : start + CHUNK]
        other = target[start : start + CHUNK]
        for i in range(part.size):
            other[i] = part[i]


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _copy_streaming(words: Array, target: Array, counter: Array) -> None:
    while True:
        start = claim(counter) * (CHUNK * 8 // LINE)
        lines = words.size * 8 // LINE
        if start >= lines:
            return
        for line in range(start, min(start + CHUNK * 8 // LINE, lines)):
            _stream(target, words, line)


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _update(numbers: Array, factor: np.float32, counter: Array) -> None:
    while True:
        start = claim(counter) * (CHUNK * 2)
        if start >= numbers.size:
            return
        part = numbers[start : start + CHUNK * 2]
        for i in range(part.size):
            part[i] *= factor


def _aligned(size: int) -> Array:
    """`size` bytes, a multiple of LINE, as float32 ones that start at a multiple of LINE."""
    memory = np.empty(size + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    numbers = memory[start : start + size].view(np.float32)
    numbers.fill(1.0)
    return numbers


class Way(NamedTuple):
    """A move and the name of the code that does it."""

    move: Move
    code: str


def ways(size: int) -> dict[Way, Contestant]:
    """Every way to move `size` bytes, rounded up to whole lines."""
    source, target = (_aligned(-(-size // LINE) * LINE) for _ in range(2))
    words, other = source.view(np.uint64), target.view(np.uint64)
    sums = np.empty(-(-words.size // CHUNK), np.uint64)

    def kernel(function: Callable[..., None], *args: Any) -> Contestant:
        return Contestant(functools.partial(launch, function, args, True))

    found = {
        Way("read", "kernel"): kernel(_read, words, sums),
        Way("copy", "kernel"): kernel(_copy, words, other),
        Way("copy", "streaming kernel"): kernel(_copy_streaming, words, other),
        Way("update", "kernel"): kernel(_update, target, np.float32(1.0)),
        Way("fresh", "kernel"): Contestant(
            lambda: launch(_copy, (words, np.empty_like(words)), True)
        ),
    }
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(fastce.get_num_threads())
        ones, copied = torch.from_numpy(source), torch.from_numpy(target)
        found[Way("read", "torch")] = Contestant(ones.sum)
        found[Way("copy", "torch")] = Contestant(functools.partial(copied.copy_, ones))
        found[Way("update", "torch")] = Contestant(functools.partial(copied.mul_, 1.0))
    return found


def best(times: dict[Way, Times], move: Move) -> tuple[Way, Times]:
    """The way with the smallest median."""
    return min(
        ((way, t) for way, t in times.items() if way.move == move), key=lambda item: item[1].median
    )


def main() -> None:
    """Print how fast each way is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__)
    parser.add_argument("megabytes", type=float, nargs="*", default=[131.072], help="array sizes")
    parser.add_argument("--turns", type=int, default=20)
    options = parser.parse_args()
    for megabytes in options.megabytes:
        size = int(megabytes * 1e6)
        times = alternately(ways(size), turns=options.turns, seconds=0.02)
        print(f"\n{megabytes:g} MB, {fastce.get_num_threads()} threads")
        rows = [
            (
                f"{MOVES[way.move][0]}, {way.code}",
                f"{t.minimum * 1e3:.3f}",
                f"{t.median * 1e3:.3f}",
                f"{MOVES[way.move][1] * size / t.minimum / 1e9:.1f}",
                "limit" if best(times, way.move)[0] == way else "",
            )
            for way, t in sorted(times.items())
        ]
        table(("", "minimum, ms", "median, ms", "GB/s", ""), rows)


if __name__ == "__main__":
    main()
