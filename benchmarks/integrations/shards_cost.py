"""What dividing the classes costs on one machine, beside the undivided call.

    python -m benchmarks.integrations.shards_cost

Alternately, as median ratios to `cross_entropy` and `cross_entropy_and_grad` of the whole
array; float32, all threads. The plain dask formula is what one writes without this library.
"""

from typing import Any

import dask
import dask.array as da
import numpy as np

import fastce
import fastce.dask
from benchmarks.timing import Contestant, alternately
from fastce import shards

ROWS, CLASSES, SLICES = 1024, 32768, 4


def sliced(slices: Any, targets: Any, outs: Any = None, **options: Any) -> Any:
    """Loss, and with `outs` the gradient, by way of slices."""
    starts = range(0, CLASSES, CLASSES // len(slices))
    total = shards.merge(*(
        shards.partial(z, targets, class_offset=start, classes=CLASSES, **options)
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


def main() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((ROWS, CLASSES), np.float32)
    targets = rng.integers(0, CLASSES, ROWS)
    out = np.empty_like(logits)
    slices = [np.ascontiguousarray(z) for z in np.split(logits, SLICES, axis=1)]
    outs = [np.empty_like(z) for z in slices]
    z = da.from_array(logits, chunks=(ROWS // 4, CLASSES // SLICES))
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
    }
    found = alternately(
        {name: Contestant(call) for name, call in calls.items()}, turns=5, seconds=0.1
    )
    for name, times in found.items():
        ratio = times.over(found["loss" if name.startswith("loss") else "both"])
        print(f"{name:34} {times.minimum * 1e3:8.2f} ms   {ratio:5.2f}")


if __name__ == "__main__":
    main()
