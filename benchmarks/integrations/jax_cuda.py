"""`fastce.jax` on a CUDA device beside optax's loss and the formula that stands in for kernels.

    python -m benchmarks.integrations.jax_cuda              on a card; needs jax's CUDA plugin
    python -m benchmarks.integrations.jax_cuda --dry-run    the same code on the CPU, tiny

`python -m benchmarks.gpu_report` runs it, too.  All is under `jax.jit`.  Contestants take turns in
one run, with logits that rotate beyond the L2 cache; each time is that of several calls queued one
behind the other, so that launches overlap, and the median of many.  A fraction is the bytes that
must be moved (the logits read once and the gradient written once) over the time, as a part of what
copying by XLA reaches in the same run.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the kernels' code takes memory
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fastce.jax
from fastce import _jax_primitive as primitive

SHAPES = (
    (1 << 20, 10), (32768, 1000), (8192, 32_000), (8192, 50_257), (8192, 128_256), (1024, 1 << 20),
)  # fmt: skip
DRY_SHAPES = ((64, 10), (8, 1000))
ROTATING = 200 << 20  # bytes of logits: four times the L2 of an H100
CALLS, REPETITIONS = 8, 30
MOVED = {"copy": 2, "loss": 1, "gradient": 2}


def formula(logits: Any, labels: Any) -> Any:
    """What other platforms have."""
    ones = jnp.ones(labels.shape, jnp.float32)
    return primitive.formula(logits, labels, ones, primitive.Options(0))[0]


LOSSES = {
    "fastce": fastce.jax.softmax_cross_entropy_with_integer_labels,
    "optax": optax.softmax_cross_entropy_with_integer_labels,
    "formula": formula,
}


def contestants() -> dict[tuple[str, str], Callable[[Any, Any], Any]]:
    """Compiled functions by what they compute and whose they are."""
    found = {("copy", "XLA"): jax.jit(lambda z, y: -z)}
    for who, loss in LOSSES.items():
        mean = functools.partial(lambda loss, z, y: loss(z, y).mean(), loss)
        found["loss", who] = jax.jit(mean)
        found["gradient", who] = jax.jit(jax.value_and_grad(mean))
    return found


def measure(dtype: Any, shape: tuple[int, int], calls: int, turns: int) -> list[str]:
    """Lines of the table for one shape."""
    rows, classes = shape
    size = rows * classes * jnp.dtype(dtype).itemsize
    copies = max(1, -(-ROTATING // size)) if turns == REPETITIONS else 2
    keys = jax.random.split(jax.random.key(0), copies)
    logits = [jax.random.normal(key, shape, dtype) for key in keys]
    labels = jnp.asarray(np.random.default_rng(0).integers(0, classes, rows), jnp.int32)
    times: dict[tuple[str, str], list[float]] = {}
    every = contestants()
    for turn in range(-2, turns):  # the first two compile and warm up
        for key, function in every.items():
            jax.block_until_ready(logits)
            began = time.perf_counter()
            for k in range(calls):
                result = function(logits[(turn * calls + k) % copies], labels)
            jax.block_until_ready(result)
            if turn >= 0:
                times.setdefault(key, []).append((time.perf_counter() - began) / calls)
    taken = {key: statistics.median(each) for key, each in times.items()}
    bandwidth = {key: MOVED[key[0]] * size / seconds for key, seconds in taken.items()}
    return [
        f"| {jnp.dtype(dtype).name} | {rows} x {classes} | {task} | {who} | {1e3 * seconds:.3f} "
        f"| {bandwidth[task, who] / 1e9:.0f} "
        f"| {bandwidth[task, who] / bandwidth['copy', 'XLA']:.2f} "
        f"| {seconds / taken.get((task, 'fastce'), seconds):.2f} |"
        for (task, who), seconds in taken.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    dry = parser.parse_args().dry_run
    try:
        device = jax.devices("cpu" if dry else "cuda")[0]
    except RuntimeError:
        parser.error("JAX has no CUDA device; --dry-run needs none")
    with jax.default_device(device):
        text = jax.jit(LOSSES["fastce"]).lower(jnp.zeros((1, 2)), jnp.zeros(1, int)).as_text()
        print(f"JAX {jax.__version__} on {device.device_kind}; "
              f"{'kernels' if f'@{primitive.NAME}' in text else 'no kernels'}")  # fmt: skip
        print("\n| dtype | N x C | task | who | ms | GB/s | of copying | to fastce |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for dtype in (jnp.float32,) if dry else (jnp.bfloat16, jnp.float32):
            for shape in DRY_SHAPES if dry else SHAPES:
                lines = measure(dtype, shape, 2 if dry else CALLS, 2 if dry else REPETITIONS)
                print("\n".join(lines), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
