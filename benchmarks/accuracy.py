"""Worst relative errors of the loss and the gradient, beside torch's and SciPy's.

    python -m benchmarks.accuracy

Truth is the extended-precision oracle of the tests, on inputs already rounded to the dtype.  Loss
errors are those of single rows, gradient errors those of single components; what lies below the
smallest normal number of its dtype does not count.  An error of 1 means that a result is 0 where it
should not be.  Rounding alone costs up to half a unit in the last place of the dtype, which heads
each table; fastce's loss of 16-bit logits is float32 and has a finer one than its gradient.
"""

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import scipy.special

import fastce
from tests import oracle
from tests.checks import FLOATS, relative_errors

Peer = Callable[[Any, Any], tuple[Any, Any]]


def cases(dtype: np.dtype[Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, logits and targets; gaps and offsets as far as the dtype can hold them."""
    rng = np.random.default_rng(0)
    for classes in (2, 10, 1000, 32000):
        rows = max(16, 100_000 // classes)
        targets = rng.integers(0, classes, rows)
        for scale in (1, 10, 100):
            logits = (rng.normal(size=(rows, classes)) * scale).astype(dtype)
            yield f"N(0, {scale}^2)", logits, targets
            yield f"N(0, {scale}^2), target leads", logits, logits.argmax(axis=-1)
        if dtype.itemsize > 2:
            for offset in (1e3, 1e4, 1e6):
                logits = (rng.normal(size=(rows, classes)) + offset).astype(dtype)
                yield f"N(0, 1) + {offset:g}", logits, targets
        for gap in (10, 20, 40, 80, *([300, 700] if dtype.itemsize == 8 else [])):
            logits = (rng.normal(size=(64, classes)) * 0.1).astype(dtype)
            logits[np.arange(64), targets[:64] if rows >= 64 else rng.integers(0, classes, 64)] = (
                gap
            )
            yield f"confident by {gap}", logits, logits.argmax(axis=-1)


def ours(logits: Any, targets: Any) -> tuple[Any, Any]:
    """`fastce.cross_entropy_and_grad`."""
    return fastce.cross_entropy_and_grad(logits, targets, reduction="none")


def with_scipy(logits: Any, targets: Any) -> tuple[Any, Any]:
    """`scipy.special.log_softmax` and `softmax`; it has no 16-bit floats."""
    rows = np.arange(len(targets))
    grad = scipy.special.softmax(logits, axis=-1)
    grad[rows, targets] -= 1
    return -scipy.special.log_softmax(logits, axis=-1)[rows, targets], grad


def with_torch() -> Peer | None:
    """`torch.nn.functional.cross_entropy` and its backward, if torch is installed."""
    try:
        import torch
    except ImportError:
        return None

    def peer(logits: Any, targets: Any) -> tuple[Any, Any]:
        dtype = getattr(torch, logits.dtype.name)
        z = torch.tensor(logits.astype(np.float64)).to(dtype).requires_grad_()
        loss = torch.nn.functional.cross_entropy(z, torch.tensor(targets), reduction="none")
        loss.sum().backward()
        assert z.grad is not None
        return tuple(x.detach().double().numpy().astype(logits.dtype) for x in (loss, z.grad))

    return peer


def main() -> None:
    """Print one table for each dtype."""
    torch = with_torch()
    for dtype in FLOATS:
        peers: dict[str, Peer] = {"fastce": ours}
        if torch is not None:
            peers["torch"] = torch
        if dtype.itemsize > 2:
            peers["SciPy"] = with_scipy
        worst: dict[str, dict[str, tuple[float, float]]] = {}
        for name, logits, targets in cases(dtype):
            want = oracle.cross_entropy(logits, targets, reduction="none")
            for peer, call in peers.items():
                results = zip(call(logits, targets), (want.loss, want.grad), strict=True)
                errors = tuple(float(relative_errors(got, truth).max()) for got, truth in results)
                before = worst.setdefault(name, {}).get(peer, (0.0, 0.0))
                worst[name][peer] = (max(before[0], errors[0]), max(before[1], errors[1]))
        unit = float(ml_dtypes.finfo(dtype).eps) / 2
        print(f"\n{dtype}  (half a unit in the last place is {unit:.1e}; loss | gradient)")
        print(f"{'':30}" + "".join(f"{peer:>20}" for peer in peers))
        for name, row in [*worst.items(), ("worst", overall(worst, peers))]:
            print(f"{name:30}" + "".join(f"{row[p][0]:11.1e} {row[p][1]:8.1e}" for p in peers))


def overall(
    worst: dict[str, dict[str, tuple[float, float]]], peers: dict[str, Peer]
) -> dict[str, tuple[float, float]]:
    """The worst of all cases for each peer."""
    rows = list(worst.values())
    return {p: (max(r[p][0] for r in rows), max(r[p][1] for r in rows)) for p in peers}


if __name__ == "__main__":
    main()
