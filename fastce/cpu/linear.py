"""Kernels around the matrix products of a linear model."""

from fastce.cpu.jit import kernel
from fastce.cpu.vector import claim


@kernel
def add(target, addend, rows, counter):
    """Add to every row of `target` the row of `addend` beside it, or its only one.

    What BLAS would do with a product is NumPy's to ask for and out of reach: its `matmul` only
    overwrites.  Threads take turns with `rows` rows each.
    """
    step = 1 if len(addend) > 1 else 0
    while True:
        start = claim(counter) * rows
        if start >= len(target):
            return
        for i in range(start, min(start + rows, len(target))):
            to = target[i]
            of = addend[i * step]
            for j in range(len(to)):
                to[j] += of[j]
