"""Which kernel for which rows: the launch parameters, all of them, in one table."""

import functools
from typing import Any, NamedTuple

# Shared memory before the classes: what the warps of a block tell each other, three times over,
# the coefficients of the row, its target class and the logit of it, a zero, and what the blocks of
# a cluster tell each other, also three times.
EXCHANGED = 512
COEFFICIENTS = 3 * EXCHANGED
TARGET = COEFFICIENTS + 32
ZERO = TARGET + 16
BLOCKS = ZERO + 16
BLOCKS_EXCHANGED = 256
SCRATCH = BLOCKS + 3 * BLOCKS_EXCHANGED
RESERVED = 1024  # what the driver takes of the shared memory for each block

ITEM_SIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


class Variant(NamedTuple):
    """What a kernel over rows is compiled for."""

    dtype: str
    task: str  # loss, gradient, stats, softmax, log_softmax, logsumexp, partial, slice_gradient
    regime: str  # row: a warp or block for each; tile, strided: a thread for each
    threads: int = 32  # per run
    block: int = 32
    vectors: int = 1  # per thread, in registers
    beyond: str = ""  # where the rest of a run is kept: "shared" memory, or "memory", read again
    spread: bool = False  # whether labels lie on other classes than the target
    soft: str = ""  # dtype of soft labels
    capped: bool = False
    blocks: int = 1  # that must find room on a multiprocessor: bounds the registers
    clustered: bool = False  # whether several blocks share a row; how many, the launch says


class Runs(NamedTuple):
    """One line of the table: rows, or the parts of a row that the blocks of a cluster have.

    A part has up to threads * vectors vectors of 16 bytes, and beyond.
    """

    threads: int  # per part
    block: int
    vectors: int
    beyond: str
    blocks: int
    regime: str = "row"
    cluster: int = 1  # blocks per row

    @property
    def held(self) -> int:
        """Bytes of a run that its threads hold in registers."""
        return 16 * self.threads * self.vectors

    @property
    def registers(self) -> int:
        """Registers that a thread may use, of the 65536 of a multiprocessor."""
        return min(255, 65536 // (self.block * self.blocks) // 8 * 8)


# The first line that holds a row is taken.  Sixteen lanes are the fewest that have one each for the
# classes before and after the whole vectors.  Four vectors in flight for each of 1024 threads cover
# the latency of memory; two blocks of a multiprocessor overlap, one computing while the other
# loads.  Where shared memory takes the rest of a row, two vectors in registers leave room to loop.
# From compute capability 9.0 on, blocks of a cluster reach each other's shared memory: a row that
# is too long for one is divided among as few as hold it, and read from memory once however long.
# Only what is too long for sixteen, or for one on older devices, is read again, from the L2 cache
# as far as it holds what all blocks are at.
LONG_ROWS = (
    #    threads block vectors beyond    blocks               rows up to, on an H100
    Runs(512,    512,  2,      "shared", 2),                # 126 KiB: two blocks share 228 KiB
    Runs(512,    512,  2,      "shared", 2, cluster=2),     # 253 KiB
    Runs(512,    512,  2,      "shared", 2, cluster=4),     # 506 KiB
    Runs(512,    512,  2,      "shared", 2, cluster=8),     # 1013 KiB
    Runs(512,    512,  2,      "shared", 2, cluster=16),    # 2027 KiB
    Runs(1024,   1024, 2,      "shared", 1),                # 256 KiB
    Runs(1024,   1024, 2,      "shared", 1, cluster=16),    # 4107 KiB
    Runs(1024,   1024, 2,      "memory", 1, cluster=16),    # any
    Runs(1024,   1024, 2,      "memory", 1, cluster=8),     # any
    Runs(1024,   1024, 2,      "memory", 1),                # any
)  # fmt: skip
ROWS = (
    #    threads block vectors beyond    blocks     rows up to
    Runs(16,     128,  2,      "",       5),      # 512 bytes
    Runs(32,     128,  2,      "",       5),      # 1 KiB
    Runs(32,     128,  4,      "",       4),      # 2 KiB
    Runs(32,     128,  8,      "",       4),      # 4 KiB
    Runs(128,    128,  4,      "",       8),      # 8 KiB
    Runs(256,    256,  4,      "",       4),      # 16 KiB
    Runs(512,    512,  4,      "",       2),      # 32 KiB
    *LONG_ROWS,
)  # fmt: skip

# With labels on every class, or a cap, the code for a vector is so long that the compiler loops
# over more than two, and keeps them in local memory for that.
OPTION_ROWS = (
    *ROWS[:2],
    Runs(128,    128,  2,      "",       8),      # 4 KiB
    Runs(256,    256,  2,      "",       4),      # 8 KiB
    # What there is to tell other blocks takes the registers of the second vector, and where memory
    # is read again there are none left for it.
    *(
        runs if runs.cluster == 1 else runs._replace(vectors=1)
        for runs in LONG_ROWS if runs.cluster == 1 or runs.beyond == "shared"
    ),
)  # fmt: skip

# Rows fewer than multiprocessors are divided among more blocks than they need, as long as each has
# this many bytes: what two vectors for each of 512 threads hold.
LEAST_PART = 16384

# The most threads of a block where a row is divided among blocks that need not meet: four blocks
# of 16 KiB on a multiprocessor, some of which compute what belongs to a row while others copy.
STREAMING = 256

# A thread for each row: of short rows side by side, copied to shared memory by their block; or of
# rows whose classes are not side by side.
TILE = Runs(1, 128, 1, "", 4, "tile")
TILE_BYTES = 256  # of a row: 32 KiB for a block
STRIDED = Runs(1, 128, 1, "", 4, "strided")
TABLE = (TILE, STRIDED, *ROWS)


class Limits(NamedTuple):
    """What a device has."""

    block: int  # bytes of shared memory
    multiprocessor: int  # the same
    multiprocessors: int
    cluster: int  # the most blocks of one, a power of two; 1 where there are no clusters


def most_of_a_cluster(capability: tuple[int, int]) -> int:
    """Blocks of a cluster that devices of a compute capability may have.

    Eight on all from 9.0 on; sixteen on those for data centres.
    """
    major, _ = capability
    return 16 if major in (9, 10) else 8 if major > 10 else 1


class Launch(NamedTuple):
    """A kernel over rows, and how it is launched."""

    kernel: Variant
    grid: int  # blocks
    shared: int  # bytes of shared memory of each
    cluster: int = 1
    parts: int = 1  # of a row, for blocks that need not meet


@functools.lru_cache(maxsize=1024)  # ten microseconds, of the thirty that a small call may take
def choose(
    dtype: str, task: str, rows: int, classes: int, *, side_by_side: bool, packed: bool,
    limits: Limits, spread: bool = False, soft: str = "", capped: bool = False,
) -> Launch:  # fmt: skip
    """The kernel for so many rows of `classes`.

    `side_by_side`: the classes of a row are; `packed`: so are rows, from a multiple of 16 bytes on,
    of logits and of results.
    """
    size = ITEM_SIZE[dtype]
    options = {"spread": spread, "soft": soft, "capped": capped}
    if not side_by_side:
        return Launch(variant(dtype, task, STRIDED, **options), -(-rows // STRIDED.block), 0)
    if packed and classes * size <= TILE_BYTES:
        shared = TILE.block * classes * size
        return Launch(variant(dtype, task, TILE, **options), -(-rows // TILE.block), shared)
    table = OPTION_ROWS if spread or capped else ROWS
    if task == "slice_gradient":  # nothing is summed, so that nobody has to hold a whole row
        held = [runs for runs in table if not runs.beyond and runs.threads <= STREAMING]
        runs = next((r for r in held if classes * size <= r.held), held[-1])
        parts = -(-classes * size // runs.held)
        grid = parts * -(-rows // (runs.block // runs.threads))
        return Launch(variant(dtype, task, runs, **options), grid, SCRATCH, parts=parts)
    least = 1
    # Sums over labels and the entropy are taken in an order that must not depend on other rows.
    while not (spread or task == "stats") and (
        2 * least <= limits.cluster
        and 2 * least * rows <= limits.multiprocessors
        and classes * size >= 2 * least * LEAST_PART
    ):
        least *= 2
    # Rows too long for as many blocks as would be busy are read again by fewer.
    for runs in (*(runs for runs in table if runs.cluster >= least), *table):
        if runs.cluster > limits.cluster:
            continue
        vectors = part(classes, runs.cluster, 16 // size) * size // 16
        missing = max(0, 16 * vectors - runs.held)
        room = min(limits.block, limits.multiprocessor // runs.blocks - RESERVED) - SCRATCH
        if runs.beyond == "memory" or missing <= (room if runs.beyond == "shared" else 0):
            shared = SCRATCH + (missing if runs.beyond == "shared" else 0)
            grid = runs.cluster * -(-rows // (runs.block // runs.threads))
            return Launch(variant(dtype, task, runs, **options), grid, shared, runs.cluster)
    raise AssertionError("the last line of the table holds any row")


def part(classes: int, cluster: int, width: int) -> int:
    """Classes of each block of a cluster but the last: whole vectors of `width`."""
    return classes if cluster == 1 else -(-classes // (cluster * width)) * width


def variant(dtype: str, task: str, runs: Runs, **options: Any) -> Variant:
    """The kernel of a line of the table."""
    return Variant(
        dtype, task, runs.regime, runs.threads, runs.block, runs.vectors, runs.beyond,
        blocks=runs.blocks, clustered=runs.cluster > 1, **options,
    )  # fmt: skip


class Elements(NamedTuple):
    """What a kernel over elements, for the binary form, is compiled for."""

    dtype: str
    task: str  # loss, gradient
    labels: str  # dtype of the targets
    vectors: bool = True  # logits, gradient and targets side by side, from multiples of 16 bytes on
    plain: bool = True  # neither weights nor upstream gradients nor losses of single elements

    @property
    def blocks(self) -> int:
        """Blocks that must find room on a multiprocessor."""
        return 2 if self.dtype == "float64" else 3

    @property
    def registers(self) -> int:
        """Registers that a thread may use, of the 65536 of a multiprocessor."""
        return 65536 // (ELEMENT_THREADS * self.blocks) // 8 * 8


# Elements: threads of a block, the chunks of 16 bytes of logits that each takes, and blocks of a
# multiprocessor.  Three blocks have 24 KiB on the way at a time; some 18 cover the latency.  In
# float64 it is arithmetic that takes the time, and more registers.
ELEMENT_THREADS = 256
CHUNKS = 4

# Sums over rows: threads of a block, rows that a block adds up, and the most blocks.
SUM_THREADS = 256
SHARE = 16384
MOST_PARTS = 256


def shares(rows: int) -> tuple[int, int]:
    """Rows that each part of a sum adds up, and the number of parts."""
    share = max(SHARE, -(-rows // MOST_PARTS))
    return share, max(1, -(-rows // share))
