"""How arrays of any strides lie in memory as rows of classes.

As on the CPU nothing is copied: an array is seen as (outer, inner, classes), each axis with its own
stride in bytes.  Row axes that follow each other evenly are merged; where more than two remain, the
leading ones are gone through one by one.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

MOST_ROWS = 1 << 30  # of a launch: grids and the division by `inner` are limited to 32 bits

Strides = tuple[int, int, int]  # bytes between outer rows, inner rows, classes


class Block(NamedTuple):
    """Rows that one launch does."""

    first: int
    rows: int
    inner: int  # 1 where all rows are evenly spaced
    offsets: tuple[int, ...]  # bytes to the first row, one for each array
    strides: tuple[Strides, ...]


def row_blocks(
    axis: int, shape: tuple[int, ...], strides: Sequence[tuple[int, ...]]
) -> Iterator[Block]:
    """Divide arrays of one shape, given by their strides, into blocks of rows."""
    sizes = shape[:axis] + shape[axis + 1 :]
    if math.prod(sizes) == 0:
        return
    steps = [s[:axis] + s[axis + 1 :] for s in strides]
    classes = [s[axis] for s in strides]
    merged: list[tuple[int, tuple[int, ...]]] = []  # (size, strides), innermost first
    leading = len(sizes)
    for k in reversed(range(len(sizes))):
        here = tuple(s[k] for s in steps)
        if sizes[k] > 1:
            if merged and all(
                s == merged[-1][0] * m for s, m in zip(here, merged[-1][1], strict=True)
            ):
                merged[-1] = (merged[-1][0] * sizes[k], merged[-1][1])
            elif len(merged) < 2:
                merged.append((sizes[k], here))
            else:
                break
        leading = k
    nothing = (0,) * len(strides)
    if len(merged) < 2:
        (outer, outer_steps), inner, inner_steps = (merged or [(1, nothing)])[0], 1, nothing
    else:
        (inner, inner_steps), (outer, outer_steps) = merged
    most = max(1, MOST_ROWS // inner)
    each = tuple(zip(outer_steps, inner_steps, classes, strict=True))
    for number, index in enumerate(itertools.product(*map(range, sizes[:leading]))):
        start = [sum(i * s for i, s in zip(index, step, strict=False)) for step in steps]
        for begin in range(0, outer, most):
            yield Block(
                (number * outer + begin) * inner, min(most, outer - begin) * inner, inner,
                tuple(a + begin * s for a, s in zip(start, outer_steps, strict=True)), each,
            )  # fmt: skip
