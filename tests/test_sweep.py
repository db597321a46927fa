"""Section 3, "for every number": swept through all bit patterns, not sampled.

Each kernel family, in each way that its lanes run, on every 16-bit number, on float32 numbers a
stride apart through all patterns (another offset each run, which a failure names), and on both
sides of every boundary of the code.  `python -m benchmarks.sweep` goes through all 2^32.
"""

import secrets

import numpy as np
import pytest

import fastce
from tests import oracle, sweep
from tests.checks import assert_gradient, assert_loss, loss_dtype, relative_errors
from tests.families import BFLOAT16, FAMILIES, FLOAT16, FLOAT32, WAYS, Lying, faults

FLOAT64 = np.dtype(np.float64)
COUNT = 1 << 16  # float32 numbers for each family and way to lie
SEED = secrets.randbits(32)


def numbers(dtype, turn):
    """What is tried in a dtype; the next turn takes the numbers next to those of this one."""
    if dtype.itemsize == 2:
        return sweep.every_number(dtype)
    step = (1 << 32) // COUNT + 1
    strided = sweep.patterns(SEED + turn * (step // 64 + 1), step, COUNT)
    return np.concatenate([strided, sweep.boundaries(dtype)])


CASES = [(f, d, w) for f, (dtypes, ways) in FAMILIES.items() for d in dtypes for w in ways]


@pytest.mark.parametrize(
    "family, dtype, way",
    [pytest.param(f, d, w, id=f"{f.__name__}-{d}-{w}") for f, d, w in CASES],
)
def test_every_number(family, dtype, way):
    found = []
    x = numbers(dtype, CASES.index((family, dtype, way)))
    for part, batch in sweep.batches(x, SEED):
        rows = Lying(batch.logits, *WAYS[way], SEED)
        found += [f"{part}: {fault}" for fault in faults(family(rows, batch), batch, dtype)]
    assert not found, f"offset {SEED}:\n" + "\n".join(found)


@pytest.mark.parametrize("way", WAYS)
def test_float64_numbers(way):
    """Those of boundaries, and some of all patterns, which are too many to sweep."""
    random = np.random.default_rng(SEED).integers(0, 2**64, 1 << 11, np.uint64).view(np.float64)
    x = np.concatenate([random, sweep.boundaries(FLOAT64)[::15]])
    rng = np.random.default_rng(SEED)
    with np.errstate(over="ignore", invalid="ignore"):
        below = x[:, None] - rng.random((len(x), sweep.CLASSES - 1)) * 12
    beside = np.broadcast_to(sweep.BESIDE, below.shape)
    for others, target in ((below, 0), (below, 1), (beside, 0), (beside, 1)):
        logits = np.column_stack([x, others])
        rows = Lying(logits, *WAYS[way], SEED)
        targets = np.full(len(x), target)
        loss, grad = fastce.cross_entropy_and_grad(
            rows.logits, rows.classes(targets), axis=rows.axis, reduction="none"
        )
        want = oracle.cross_entropy(logits, targets, reduction="none")
        assert_loss(loss, want.loss, FLOAT64, anywhere=True)
        assert_gradient(rows.back(grad), want.grad, FLOAT64)
        top = np.sort(logits, axis=1)
        with np.errstate(invalid="ignore"):
            near = top[:, -1] - top[:, -2] < 10
        assert relative_errors(loss, want.loss)[near].max() < 2e-15, f"offset {SEED}"


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_binary_form_of_every_number(dtype):
    x = numbers(dtype, len(CASES))
    for target in (0.0, 0.25, 1.0):
        labels = np.full(x.shape, target, dtype)
        loss, grad = fastce.binary_cross_entropy_and_grad(x, labels, reduction="none")
        want = oracle.binary_cross_entropy(x, labels, reduction="none")
        assert loss.dtype == loss_dtype(dtype)
        assert_loss(loss, want.loss, dtype, anywhere=True)
        assert_gradient(grad, want.grad, dtype)
