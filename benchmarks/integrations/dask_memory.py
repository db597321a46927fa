"""Loss and gradient of more logits than memory holds, generated chunk by chunk as they are needed.

    python -m benchmarks.integrations.dask_memory --gigabytes 40 [--quick]

Prints the peak memory of the process. The gradient is reduced to the sum of its sizes: written
nowhere, but computed whole. Some rows of chunks are checked against `fastce.cross_entropy`.
"""

import argparse
import resource
import time

import dask
import dask.array as da
import numpy as np

import fastce
import fastce.dask

CLASSES, CHUNK = 32768, (2048, 8192)  # 64 MiB of float32


def block(start: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """Logits from a place on: uniform ones, which are generated as fast as they are used."""
    return 8 * np.random.default_rng(start).random(shape, np.float32)


def make(block_info: dict) -> np.ndarray:  # type: ignore[type-arg]
    where = block_info[None]["array-location"]
    return block((where[0][0], where[1][0]), tuple(b - a for a, b in where))


def expected(row: int, targets: np.ndarray) -> tuple[float, float]:
    """Sum of losses and of sizes of the gradient of a row of chunks."""
    parts = [
        block((row, k), (len(targets), min(CHUNK[1], CLASSES - k)))
        for k in range(0, CLASSES, CHUNK[1])
    ]
    logits = np.concatenate(parts, axis=1)
    loss, grad = fastce.cross_entropy_and_grad(logits, targets, reduction="sum", out=logits)
    return float(loss), float(np.abs(grad, out=grad).sum(dtype=np.float64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument(
        "--quick", action="store_true", help="one row of chunks, a quarter of a gigabyte"
    )
    asked = parser.parse_args()
    gigabytes = 0.0 if asked.quick else asked.gigabytes
    row_chunks = max(1, round(gigabytes * 1e9 / (4 * CLASSES * CHUNK[0])))
    rows = row_chunks * CHUNK[0]
    z = da.map_blocks(
        make, chunks=((CHUNK[0],) * row_chunks, (CHUNK[1],) * (CLASSES // CHUNK[1])),
        dtype=np.float32, meta=np.empty((0, 0), np.float32),
    )  # fmt: skip
    targets = np.random.default_rng(0).integers(0, CLASSES, rows)
    start = time.perf_counter()
    loss, grad = fastce.dask.cross_entropy_and_grad(z, targets, reduction="none")
    sizes = da.absolute(grad).sum(axis=1, dtype=np.float64)
    loss, sizes = dask.compute(loss, sizes)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for row in (0, rows - CHUNK[0]):
        part = slice(row, row + CHUNK[0])
        want = expected(row, targets[part])
        np.testing.assert_allclose(loss[part].sum(dtype=np.float64), want[0], rtol=1e-6)
        np.testing.assert_allclose(sizes[part].sum(), want[1], rtol=1e-5)
    print(
        f"{z.nbytes / 1e9:.1f} GB of logits in {z.npartitions} chunks of {CHUNK}: mean loss "
        f"{loss.mean():.6f}, {seconds:.0f} s, peak memory {peak / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
