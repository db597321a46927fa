"""A vocabulary too large for one array: slices made one after the other, merged, looked at again.

python examples/slices.py [--quick]
"""

import argparse

import numpy as np

import fastce
from fastce import shards

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="a small vocabulary")
quick = parser.parse_args().quick
rows, features, classes, size = (20, 8, 1000, 300) if quick else (256, 64, 500_000, 50_000)

rng = np.random.default_rng(0)
x = rng.standard_normal((rows, features), np.float32)
weight = rng.standard_normal((classes, features), np.float32)
targets = rng.integers(0, classes, rows)

total = None
for start in range(0, classes, size):
    z = x @ weight[start : start + size].T
    part = shards.partial(z, targets, class_offset=start, classes=classes)
    total = part if total is None else shards.merge(total, part)
result = shards.finish(total)

dx = np.zeros_like(x)
for start in range(0, classes, size):
    z = x @ weight[start : start + size].T
    shards.grad(z, targets, total, class_offset=start, out=z)
    dx += z @ weight[start : start + size]

loss, (expected, _, _) = fastce.linear_cross_entropy_and_grad(x, weight, targets)
print(f"loss {result.loss:.6f}, by linear_cross_entropy {loss:.6f}")
print(f"accuracy {np.mean(result.predicted == targets):.3f}")
assert np.allclose(dx, expected, rtol=1e-3, atol=1e-5)
