"""Train an output layer whose classes are divided among MPI ranks; compare it with one that is not.

mpiexec -n 4 python examples/mpi_vocabulary.py [--quick]
"""

import argparse

import numpy as np
from mpi4py import MPI

import fastce
from fastce import mpi

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="a few steps of a small layer")
quick = parser.parse_args().quick
rows, features, classes, steps = (64, 8, 500, 5) if quick else (1024, 128, 32000, 10)

comm = MPI.COMM_WORLD
part = slice(*(classes * k // comm.size for k in (comm.rank, comm.rank + 1)))
rng = np.random.default_rng(0)  # the same numbers on every rank
x = rng.standard_normal((rows, features), np.float32)
targets = rng.integers(0, classes, rows)
whole = np.zeros((classes, features), np.float32)
mine = whole[part].copy()

for step in range(steps):
    loss, (_, gradient, _) = mpi.linear_cross_entropy_and_grad(
        x, mine, targets, class_offset=part.start, classes=classes
    )
    mine -= 20 * gradient
    expected, (_, gradient, _) = fastce.linear_cross_entropy_and_grad(x, whole, targets)
    whole -= 20 * gradient
    assert abs(loss - expected) < 1e-4 * expected
    if comm.rank == 0:
        print(f"step {step}: loss {loss:.6f}, in one process {expected:.6f}")
assert np.allclose(mine, whole[part], rtol=1e-3, atol=1e-4)
