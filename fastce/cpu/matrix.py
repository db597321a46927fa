"""What a classifier head does with matrices beside their products, on all threads."""

import numpy as np

from fastce.cpu.jit import kernel
from fastce.cpu.memory import claim


@kernel
def add(target, addend, rows, counter):
    """Add to every row of `target` the row of `addend` beside it, or its only one.

    What BLAS would do within a product, but NumPy's `matmul` only overwrites.  Threads take turns
    with `rows` rows each.
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


@kernel
def mark_beyond(matrix, bound, marks, columns, counter):
    """Set the mark of every column with a number beyond +-bound, or with NaN; others are kept.

    Threads take turns with `columns` columns each.
    """
    bound = matrix.dtype.type(bound)
    while True:
        start = claim(counter) * columns
        if start >= len(marks):
            return
        part = marks[start : start + columns]
        for i in range(len(matrix)):
            row = matrix[i, start : start + columns]
            for j in range(len(part)):
                part[j] |= not (np.abs(row[j]) <= bound)
