"""What dividing the classes costs on one machine, beside the undivided call.

    python -m benchmarks.integrations.shards_cost [--quick]

Alternately, as median ratios to the same function of the whole array; float32, all threads. The
plain dask formulas are what one writes without this library. Then what every chunk costs whatever
its size: the time to build a graph of many tiny chunks, and to go through it on one thread.
"""

import itertools
import time
from collections.abc import Callable
from typing import Any

import dask
import dask.array as da
import numpy as np

import fastce
import fastce.dask
from benchmarks.timing import Contestant, alternately, asked_for_quick
from fastce import shards

ROWS, CLASSES, SLICES = 1024, 32768, 4
GRAPHS = (50, 400)  # rows of chunks


def sliced(slices: Any, targets: Any, outs: Any = None, **options: Any) -> Any:
    """Loss, and with `outs` the gradient, by way of slices."""
    classes = sum(z.shape[1] for z in slices)
    starts = range(0, classes, classes // len(slices))
    total = shards.merge(*(
        shards.partial(z, targets, class_offset=start, classes=classes, **options)
        for start, z in zip(starts, slices, strict=True)
    ))  # fmt: skip
    if outs is not None:
        for start, z, out in zip(starts, slices, outs, strict=True):
            shards.grad(z, targets, total, class_offset=start, out=out)
    return shards.finish(total).loss


def plain_dask(z: Any, targets: Any) -> Any:
    """Mean cross-entropy as a formula of dask arrays, and its gradient."""
    m = z.max(axis=1, keepdims=True)
    e = da.exp(z - m)
    s = e.sum(axis=1, keepdims=True)
    hot = da.asarray(targets)[:, None] == da.arange(z.shape[1], chunks=z.chunks[1])[None]
    loss = (da.log(s)[:, 0] + m[:, 0] - (z * hot).sum(axis=1)).mean()
    return loss, (e / s - hot) / len(targets)


def plain_softmax(z: Any) -> Any:
    """softmax as a formula of dask arrays."""
    e = da.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def main() -> None:
    quick = asked_for_quick()
    rows, classes = (16, 64) if quick else (ROWS, CLASSES)
    turns, seconds = (1, 0.0) if quick else (5, 0.1)
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((rows, classes), np.float32)
    targets = rng.integers(0, classes, rows)
    out = np.empty_like(logits)
    slices = [np.ascontiguousarray(z) for z in np.split(logits, SLICES, axis=1)]
    outs = [np.empty_like(z) for z in slices]
    z = da.from_array(logits, chunks=(rows // 4, classes // SLICES))
    by_rows = da.from_array(logits, chunks=(rows // 4, classes))
    calls = {
        "loss": lambda: fastce.cross_entropy(logits, targets),
        "loss, one slice": lambda: sliced([logits], targets),
        f"loss, {SLICES} slices": lambda: sliced(slices, targets),
        "loss with smoothing": lambda: fastce.cross_entropy(logits, targets, label_smoothing=0.1),
        f"loss with smoothing, {SLICES} slices": lambda: sliced(
            slices, targets, label_smoothing=0.1
        ),
        "loss, dask, 16 chunks": lambda: fastce.dask.cross_entropy(z, targets).compute(),
        "both": lambda: fastce.cross_entropy_and_grad(logits, targets, out=out),
        "both, one slice": lambda: sliced([logits], targets, [out]),
        f"both, {SLICES} slices": lambda: sliced(slices, targets, outs),
        "both, dask, 16 chunks": lambda: dask.persist(
            *fastce.dask.cross_entropy_and_grad(z, targets)
        ),
        "both, formula of dask arrays": lambda: dask.persist(*plain_dask(z, targets)),
        "logsumexp": lambda: fastce.logsumexp(logits),
        "logsumexp, dask, 16 chunks": lambda: fastce.dask.logsumexp(z).compute(),
        "softmax": lambda: fastce.softmax(logits, out=out),
        "softmax, dask, 4 chunks of rows": lambda: fastce.dask.softmax(by_rows).persist(),
        "softmax, dask, 16 chunks": lambda: fastce.dask.softmax(z).persist(),
        "softmax, formula of dask arrays": lambda: plain_softmax(z).persist(),
        "stats": lambda: fastce.cross_entropy_stats(logits, targets),
        "stats, dask, 16 chunks": lambda: dask.persist(fastce.dask.cross_entropy_stats(z, targets)),
    }
    for group in ("loss", "both", "logsumexp", "softmax", "stats"):
        mine = {n: Contestant(c) for n, c in calls.items() if n.split(",")[0].split()[0] == group}
        found = alternately(mine, turns=turns, seconds=seconds)
        for name, times in found.items():
            ratio = times.over(found[group])
            print(f"{name:38} {times.minimum * 1e3:8.2f} ms   {ratio:5.2f}")
    for name, per_chunk in chunk_costs((2, 3) if quick else GRAPHS).items():
        print(f"{name:38} " + ", ".join(f"{n} chunks {b:4.0f} + {r:4.0f} us"
                                        for n, (b, r) in per_chunk.items()))  # fmt: skip


def chunk_costs(graphs: tuple[int, ...]) -> dict[str, dict[int, tuple[float, float]]]:
    """Microseconds per chunk to build a graph and to go through it, by function and chunks."""
    functions: dict[str, Callable[[Any, Any], Any]] = {
        "exp and sum of dask": lambda z, y: da.exp(z).sum(),
        "cross_entropy": fastce.dask.cross_entropy,
        "cross_entropy_and_grad": fastce.dask.cross_entropy_and_grad,
        "cross_entropy_stats": fastce.dask.cross_entropy_stats,
        "logsumexp": lambda z, y: fastce.dask.logsumexp(z),
        "softmax": lambda z, y: fastce.dask.softmax(z),
        "nll_loss": fastce.dask.nll_loss,
        "binary_cross_entropy": lambda z, y: fastce.dask.binary_cross_entropy(z, z),
        "linear_cross_entropy_and_grad": lambda z, y: fastce.dask.linear_cross_entropy_and_grad(
            z.rechunk({1: -1}), da.zeros((16, 8), chunks=(4, 8), dtype=np.float32), y
        ),
    }
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for rows, (name, function) in itertools.product(graphs, functions.items()):
        z = da.zeros((rows, 8), chunks=(1, 2), dtype=np.float32)
        best = [np.inf, np.inf]
        for _ in range(2):
            start = time.perf_counter()
            result = function(z, np.zeros(rows, int))
            built = time.perf_counter()
            dask.persist(result, scheduler="sync")
            times = built - start, time.perf_counter() - built
            best = [min(pair) for pair in zip(best, times, strict=True)]
        build, run = (1e6 * t / z.npartitions for t in best)
        found.setdefault(name, {})[z.npartitions] = build, run
    return found


if __name__ == "__main__":
    main()
