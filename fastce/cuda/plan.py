"""Which kernel for which rows: the launch parameters, all of them, in one table."""

from typing import Any, NamedTuple

# Shared memory before the classes: what the warps of a block tell each other, three times over,
# the coefficients of the row, its target class and the logit of it, and a zero.
EXCHANGED = 512
COEFFICIENTS = 3 * EXCHANGED
TARGET = COEFFICIENTS + 32
ZERO = TARGET + 16
SCRATCH = ZERO + 16
RESERVED = 1024  # what the driver takes of the shared memory for each block

ITEM_SIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


class Variant(NamedTuple):
    """What a kernel over rows is compiled for."""

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


class Runs(NamedTuple):
    """One line of the table: rows of up to threads * vectors vectors of 16 bytes, and beyond."""

    threads: int  # per row
    block: int
    vectors: int
    beyond: str
    blocks: int
    regime: str = "row"

    @property
    def registers(self) -> int:
        """Registers that a thread may use, of the 65536 of a multiprocessor."""
        return min(255, 65536 // (self.block * self.blocks) // 8 * 8)


# The first line that holds a row is taken.  Sixteen lanes are the fewest that have one each for the
# classes before and after the whole vectors.  Four vectors in flight for each of 1024 threads cover
# the latency of memory; two blocks of a multiprocessor overlap, one computing while the other
# loads.  Where shared memory takes the rest of a row, two vectors in registers leave room to loop.
ROWS = (
    #    threads block vectors beyond    blocks     rows up to
    Runs(16,     128,  2,      "",       5),      # 512 bytes
    Runs(32,     128,  2,      "",       5),      # 1 KiB
    Runs(32,     128,  4,      "",       4),      # 2 KiB
    Runs(32,     128,  8,      "",       4),      # 4 KiB
    Runs(128,    128,  4,      "",       8),      # 8 KiB
    Runs(256,    256,  4,      "",       4),      # 16 KiB
    Runs(512,    512,  4,      "",       2),      # 32 KiB
    Runs(512,    512,  2,      "shared", 2),      # 127 KiB on an H100: two blocks share 228 KiB
    Runs(1024,   1024, 2,      "shared", 1),      # 257 KiB on an H100
    Runs(1024,   1024, 2,      "memory", 1),      # any
)  # fmt: skip

# With labels on every class, or a cap, the code for a vector is so long that the compiler loops
# over more than two, and keeps them in local memory for that.
OPTION_ROWS = (
    *ROWS[:2],
    Runs(128,    128,  2,      "",       8),      # 4 KiB
    Runs(256,    256,  2,      "",       4),      # 8 KiB
    *ROWS[-3:],
)  # fmt: skip

# A thread for each row: of short rows side by side, copied to shared memory by their block; or of
# rows whose classes are not side by side.
TILE = Runs(1, 128, 1, "", 4, "tile")
TILE_BYTES = 256  # of a row: 32 KiB for a block
STRIDED = Runs(1, 128, 1, "", 4, "strided")
TABLE = (TILE, STRIDED, *ROWS)


class Limits(NamedTuple):
    """Bytes of shared memory."""

    block: int
    multiprocessor: int


def choose(
    dtype: str, task: str, classes: int, *, side_by_side: bool, packed: bool, limits: Limits,
    spread: bool = False, soft: str = "", capped: bool = False,
) -> tuple[Variant, int]:  # fmt: skip
    """The variant for rows of `classes`, and the bytes of shared memory of a block.

    `side_by_side`: the classes of a row are; `packed`: so are rows, from a multiple of 16 bytes on,
    of logits and of results.
    """
    size = ITEM_SIZE[dtype]
    options = {"spread": spread, "soft": soft, "capped": capped}
    if not side_by_side:
        return variant(dtype, task, STRIDED, **options), 0
    if packed and classes * size <= TILE_BYTES:
        return variant(dtype, task, TILE, **options), TILE.block * classes * size
    vectors = classes * size // 16
    for runs in OPTION_ROWS if spread or capped else ROWS:
        missing = 16 * max(0, vectors - runs.threads * runs.vectors)
        room = min(limits.block, limits.multiprocessor // runs.blocks - RESERVED) - SCRATCH
        if runs.beyond == "memory" or missing <= (room if runs.beyond == "shared" else 0):
            shared = SCRATCH + (missing if runs.beyond == "shared" else 0)
            return variant(dtype, task, runs, **options), shared
    raise AssertionError("the last line of the table holds any row")


def variant(dtype: str, task: str, runs: Runs, **options: Any) -> Variant:
    """The kernel of a line of the table."""
    return Variant(
        dtype, task, runs.regime, runs.threads, runs.block, runs.vectors, runs.beyond,
        blocks=runs.blocks, **options,
    )  # fmt: skip


class Elements(NamedTuple):
    """What a kernel over elements, for the binary form, is compiled for."""

    dtype: str
    task: str  # loss, gradient
    labels: str  # dtype of the targets
    vectors: bool = True  # logits, gradient and targets side by side, from multiples of 16 bytes on
    plain: bool = True  # neither weights nor upstream gradients nor losses of single elements


# Elements: threads of a block, the chunks of 16 bytes of logits that each takes, and blocks of a
# multiprocessor.  Four blocks have 32 KiB on the way at a time; some 18 cover the latency.
ELEMENT_THREADS = 256
CHUNKS = 4
ELEMENT_BLOCKS = 4
ELEMENT_REGISTERS = 64  # of 65536 for a multiprocessor

# Sums over rows: threads of a block, rows that a block adds up, and the most blocks.
SUM_THREADS = 256
SHARE = 16384
MOST_PARTS = 256


def shares(rows: int) -> tuple[int, int]:
    """Rows that each part of a sum adds up, and the number of parts."""
    share = max(SHARE, -(-rows // MOST_PARTS))
    return share, max(1, -(-rows // share))
