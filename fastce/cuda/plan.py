"""Which kernel for which rows: the launch parameters, all of them, in one table."""

from typing import NamedTuple

# Shared memory before the classes: what the warps of a block tell each other, three times over,
# the coefficients of the row, its target class and the logit of it, and a zero.
EXCHANGED = 512
COEFFICIENTS = 3 * EXCHANGED
TARGET = COEFFICIENTS + 32
ZERO = TARGET + 16
SCRATCH = ZERO + 16


class Variant(NamedTuple):
    """What a kernel is compiled for."""

    dtype: str
    task: str  # loss, gradient, stats, softmax, log_softmax, logsumexp
    regime: str  # row: a warp or block for each; tile, strided: a thread for each
    threads: int = 32  # per run
    block: int = 32
    vectors: int = 1  # per thread, in registers
    beyond: str = ""  # where the rest of a run is kept: "shared" memory, or "memory", read again
    spread: bool = False  # whether labels lie on other classes than the target
    soft: str = ""  # dtype of soft labels
    capped: bool = False
    blocks: int = 1  # that must find room on a multiprocessor: bounds the registers
