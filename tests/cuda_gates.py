"""What compiled kernels are made of, without a device: registers, spills, 16-byte accesses.

``python -m tests.cuda_gates`` compiles every kernel for sm_80, sm_90 and sm_100 and prints a table
(some ten minutes); with arguments, those whose line in the table holds all of them.
"""

import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastce.cuda import plan
from fastce.cuda.kernels import Capability, compiled
from fastce.cuda.plan import ROWS, STRIDED, TILE, Runs, Variant

CAPABILITIES: tuple[Capability, ...] = ((8, 0), (9, 0), (10, 0))


class Gate(NamedTuple):
    """Counts of instructions in a kernel's machine code."""

    registers: int
    spills: int  # loads and stores of local memory
    loads: int  # of 16 bytes, from global memory to registers
    copies: int  # of 16 bytes, from global to shared memory
    stores: int  # of 16 bytes, to global memory
    ex2: int
    instructions: int


def gate(variant: Variant, capability: Capability) -> Gate:
    """Compile a kernel and count."""
    code = compiled(variant, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(code.cubin)
        done = subprocess.run([_disassembler(), file.name], capture_output=True, text=True,
                              check=True)  # fmt: skip
    registers = re.search(
        r"EIATTR_REGCOUNT.*?\.word\s+\S*index@\S+\s+/\*\w+\*/\s+\.word\s+(0x[0-9a-f]+)",
        done.stdout, re.DOTALL,
    )  # fmt: skip
    assert registers is not None

    def count(pattern: str) -> int:
        return len(re.findall(pattern, done.stdout))

    return Gate(
        int(registers[1], 16), count(r"\b(?:LDL|STL)\b"), count(r"\bLDG\.E\.128"),
        count(r"\bLDGSTS\.E[.A-Z0-9]*\.128"), count(r"\bSTG\.E\.128"), count(r"\bMUFU\.EX2"),
        count(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d )?\s*[A-Z]"),
    )  # fmt: skip


def faults(variant: Variant, found: Gate) -> list[str]:
    """What a kernel lacks."""
    runs = runs_of(variant)
    wrong = []
    if found.spills:
        wrong.append(f"{found.spills} spills")
    if found.registers > runs.registers:
        wrong.append(f"{found.registers} registers, more than {runs.registers}")
    if variant.regime == "row" and found.loads < variant.vectors:
        wrong.append(f"{found.loads} loads of 16 bytes, fewer than {variant.vectors}")
    if (variant.regime == "tile" or variant.beyond == "shared") and not found.copies:
        wrong.append("no copies of 16 bytes")
    if variant.task == "gradient" and variant.regime != "strided" and not found.stores:
        wrong.append("no stores of 16 bytes")
    if variant.dtype != "float64" and not found.ex2:
        wrong.append("no ex2")
    return wrong


def runs_of(variant: Variant) -> Runs:
    """The line of the table that a variant comes from."""
    return Runs(
        variant.threads, variant.block, variant.vectors, variant.beyond, variant.blocks
    )


def variant(dtype: str, task: str, runs: Runs, **options: object) -> Variant:
    """The variant of a line of the table."""
    regime = "tile" if runs is TILE else "strided" if runs is STRIDED else "row"
    return plan._variant(dtype, task, regime, runs, options)


REGIMES = {"tile": TILE, "strided": STRIDED} | {
    f"{runs.threads} x {runs.vectors} {runs.beyond}".strip(): runs for runs in ROWS
}
OPTIONS: dict[str, dict[str, object]] = {
    "": {},
    "smoothing": {"spread": True},
    "soft": {"spread": True, "soft": "float32"},
    "softcap": {"capped": True},
}


def everything() -> Iterator[tuple[str, Variant, Capability]]:
    """Every kernel with a gradient or a loss, on every architecture."""
    for capability in CAPABILITIES:
        for dtype in plan.ITEM_SIZE:
            for regime, runs in REGIMES.items():
                for task in ("gradient", "loss", "stats"):
                    for option, given in OPTIONS.items():
                        if option and task != "gradient":
                            continue
                        name = "sm_{}{}".format(*capability)
                        line = f"{name:7}{dtype:9} {task:9}{regime:17}{option:10}"
                        yield line, variant(dtype, task, runs, **given), capability


def main(words: list[str]) -> int:
    """Print the table; the status is the number of kernels with faults."""
    bad = 0
    print(f"{'':52}registers of spills LDG.128 LDGSTS.128 STG.128 EX2 instructions")
    for line, kernel, capability in everything():
        if not all(word in line.split() for word in words):
            continue
        found = gate(kernel, capability)
        wrong = faults(kernel, found)
        bad += bool(wrong)
        print(
            f"{line}{found.registers:9}{runs_of(kernel).registers:4}{found.spills:6}"
            f"{found.loads:8}{found.copies:11}{found.stores:8}{found.ex2:5}{found.instructions:7} "
            + "; ".join(wrong),
            flush=True,
        )
    return bad


def _disassembler() -> str:
    found = next(Path(sysconfig.get_path("purelib")).glob("nvidia/**/bin/nvdisasm"), None)
    assert found is not None, "nvdisasm comes with the package nvidia-cuda-nvdisasm"
    return str(found)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
