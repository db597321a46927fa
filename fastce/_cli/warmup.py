"""``fastce warmup``: compile the usual kernels ahead, so that no program waits for them."""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fastce
from fastce.cpu import jit

from . import cuda, terminal

Array = np.ndarray[Any, Any]

# Called with logits z, integer targets y and the class axis k.  Kernels are compiled apart by the
# type of the logits and by which options are None.
_CALLS: dict[str, Callable[[Array, Array, int], object]] = {
    "cross_entropy": lambda z, y, k: fastce.cross_entropy(z, y, axis=k),
    "cross_entropy, weight": lambda z, y, k: fastce.cross_entropy(z, y, axis=k, weight=_one(z, k)),
    "cross_entropy, soft targets": lambda z, y, k: fastce.cross_entropy(z, np.ones_like(z), axis=k),
    "cross_entropy, reduction none": lambda z, y, k: fastce.cross_entropy(
        z, y, axis=k, reduction="none"
    ),
    "cross_entropy_and_grad": lambda z, y, k: fastce.cross_entropy_and_grad(z, y, axis=k),
    "cross_entropy_and_grad, weight": lambda z, y, k: fastce.cross_entropy_and_grad(
        z, y, axis=k, weight=_one(z, k)
    ),
    "cross_entropy_and_grad, soft targets": lambda z, y, k: fastce.cross_entropy_and_grad(
        z, np.ones_like(z), axis=k
    ),
    "cross_entropy_stats": lambda z, y, k: fastce.cross_entropy_stats(z, y, axis=k),
    "cross_entropy_stats, weight": lambda z, y, k: fastce.cross_entropy_stats(
        z, y, axis=k, weight=_one(z, k)
    ),
    "logsumexp": lambda z, y, k: fastce.logsumexp(z, axis=k),
    "softmax": lambda z, y, k: fastce.softmax(z, axis=k),
    "log_softmax": lambda z, y, k: fastce.log_softmax(z, axis=k),
    "nll_loss_and_grad": lambda z, y, k: fastce.nll_loss_and_grad(z, y, axis=k),
    "binary_cross_entropy_and_grad": lambda z, y, k: fastce.binary_cross_entropy_and_grad(z, z),
    "linear_cross_entropy_and_grad": lambda z, y, k: fastce.linear_cross_entropy_and_grad(
        np.zeros((len(y), 1), z.dtype), np.zeros((z.shape[k], 1), z.dtype), y
    ),
    "gradient_hessian": lambda z, y, k: fastce.gradient_hessian(z, y, axis=k),
    "hessian_vector_product": lambda z, y, k: fastce.hessian_vector_product(z, z, axis=k),
}

# (shape, class axis): many classes, few, and classes that lie apart have kernels of their own.
_LAYOUTS = (((4, 1000), 1), ((1000, 10), 1), ((10, 1000), 0))


def run(options: argparse.Namespace) -> int:
    """Compile, and say how long each call took and where the machine code is kept."""
    if options.cuda is None and "bfloat16" in (options.dtype or ()):
        raise terminal.Failure("--dtype bfloat16: expected --cuda with it; NumPy has no bfloat16")
    folder = jit.cache_directory()
    before = _kernels(folder)
    began = time.perf_counter()
    if options.cuda is None:
        _warm_cpu(options.dtype or ("float32", "float64"))
    else:
        cuda.warm(options.cuda, options.dtype or ("float32", "bfloat16"))
    print(f"\n{time.perf_counter() - began:.1f} s in all; ", end="")
    if folder is None:
        print("nothing kept: no cache folder can be written, see FASTCE_CACHE_DIR")
    else:
        after = _kernels(folder)
        print(f"{len(after - before)} new kernels of {len(after)} in {folder}")
    return 0


def _warm_cpu(dtypes: Sequence[str]) -> None:
    rows = []
    with terminal.progress("warmup", len(_CALLS)) as advance:
        for name, call in _CALLS.items():
            rows.append((name, *(f"{_seconds(call, dtype):.2f}" for dtype in dtypes)))
            advance(1)
    terminal.table(("seconds for the first call of", *dtypes), rows)


def _kernels(folder: Path | None) -> set[Path]:
    return set() if folder is None else {*folder.glob("*.nbc"), *folder.glob("*.cubin")}


def _seconds(call: Callable[[Array, Array, int], object], dtype: str) -> float:
    total = 0.0
    for shape, axis in _LAYOUTS:
        logits, targets = np.zeros(shape, dtype), np.zeros(shape[1 - axis], np.int64)
        began = time.perf_counter()
        call(logits, targets, axis)
        total += time.perf_counter() - began
    return total


def _one(logits: Array, axis: int) -> Array:
    return np.ones(logits.shape[axis])
