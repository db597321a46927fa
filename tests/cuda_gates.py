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
from fastce.cuda.kernels import Capability, Kernel, compiled, exists
from fastce.cuda.plan import OPTION_ROWS, ROWS, STRIDED, TILE, Elements, Variant, variant

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


def gate(kernel: Kernel, capability: Capability) -> Gate:
    """Compile a kernel and count."""
    code = compiled(kernel, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(code.cubin)
        done = subprocess.run([_disassembler(), file.name], capture_output=True, text=True,
                              check=True)  # fmt: skip
    # of the kernel and of subroutines, of which the kernel's is the largest
    registers = re.findall(
        r"EIATTR_REGCOUNT.*?\.word\s+\S*index@\S+\s+/\*\w+\*/\s+\.word\s+(0x[0-9a-f]+)",
        done.stdout, re.DOTALL,
    )  # fmt: skip

    def count(pattern: str) -> int:
        return len(re.findall(pattern, done.stdout))

    return Gate(
        max(int(number, 16) for number in registers),
        count(r"\b(?:LDL|STL)\b"), count(r"\bLDG\.E\.128"),
        count(r"\bLDGSTS\.E[.A-Z0-9]*\.128"), count(r"\bSTG\.E\.128"), count(r"\bMUFU\.EX2"),
        count(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d )?\s*[A-Z]"),
    )  # fmt: skip


def faults(kernel: Variant | Elements, registers: int, found: Gate) -> list[str]:
    """What a kernel that may use so many registers lacks."""
    wrong = []
    if found.spills:
        wrong.append(f"{found.spills} spills")
    if found.registers > registers:
        wrong.append(f"{found.registers} registers, more than {registers}")
    if isinstance(kernel, Elements):
        loads = kernel.vectors * (1 + (kernel.labels == kernel.dtype))
        if found.loads < loads:
            wrong.append(f"{found.loads} loads of 16 bytes, fewer than {loads}")
        if kernel.task == "gradient" and kernel.vectors and not found.stores:
            wrong.append("no stores of 16 bytes")
        return wrong
    if kernel.regime == "row" and found.loads < kernel.vectors:
        wrong.append(f"{found.loads} loads of 16 bytes, fewer than {kernel.vectors}")
    if (kernel.regime == "tile" or kernel.beyond == "shared") and not found.copies:
        wrong.append("no copies of 16 bytes")
    writes = kernel.task in ("gradient", "slice_gradient")
    if writes and kernel.regime != "strided" and not found.stores:
        wrong.append("no stores of 16 bytes")
    if kernel.dtype != "float64" and not found.ex2:
        wrong.append("no ex2")
    return wrong


REGIMES = {"tile": TILE, "strided": STRIDED} | {
    f"{runs.threads} x {runs.vectors} {runs.beyond} {'cluster' * (runs.cluster > 1)}".strip(): runs
    for runs in (*ROWS, *OPTION_ROWS)
}
OPTIONS: dict[str, dict[str, object]] = {
    "": {},
    "smoothing": {"spread": True},
    "soft": {"spread": True, "soft": "float32"},
    "softcap": {"capped": True},
}


ELEMENTS = {
    "": {},
    "options": {"plain": False},
    "strided": {"plain": False, "vectors": False},
}


def everything() -> Iterator[tuple[str, Variant | Elements, int, Capability]]:
    """Every kernel with a gradient or a loss, on every architecture, and its share of registers."""
    for capability in CAPABILITIES:
        name = "sm_{}{}".format(*capability)
        for dtype in plan.ITEM_SIZE:
            for task in ("gradient", "loss"):
                for option, flags in ELEMENTS.items():
                    for labels in (dtype, "bool"):
                        line = f"{name:7}{dtype:9} {task:15}{f'binary {labels}':26}{option:10}"
                        kernel = Elements(dtype, task, labels, **flags)
                        yield line, kernel, kernel.registers, capability
            for regime, runs in REGIMES.items():
                for task in ("gradient", "loss", "stats", "partial", "slice_gradient"):
                    for option, given in OPTIONS.items():
                        if option and task in ("loss", "stats"):
                            continue
                        if runs.regime == "row" and runs not in (OPTION_ROWS if option else ROWS):
                            continue
                        if task == "slice_gradient" and (
                            runs.beyond or runs.threads > plan.STREAMING
                        ):
                            continue
                        kernel = variant(dtype, task, runs, **given)
                        if exists(kernel, capability):
                            line = f"{name:7}{dtype:9} {task:15}{regime:26}{option:10}"
                            yield line, kernel, runs.registers, capability


def main(words: list[str]) -> int:
    """Print the table; the status is the number of kernels with faults."""
    bad = 0
    print(f"{'':67}registers of spills LDG.128 LDGSTS.128 STG.128 EX2 instructions")
    for line, kernel, registers, capability in everything():
        if not all(word in line.split() for word in words):
            continue
        found = gate(kernel, capability)
        wrong = faults(kernel, registers, found)
        bad += bool(wrong)
        print(
            f"{line}{found.registers:9}{registers:4}{found.spills:6}"
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
