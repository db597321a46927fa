"""``fastce info``: what a report of a fault should begin with."""

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import llvmlite.binding

import fastce
from fastce.cpu import jit, processors

from .terminal import pairs

# The vector extensions the kernels make use of, of all that LLVM names.
_EXTENSIONS = ("sse4.2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bf16", "avx512fp16")
_EXTENSIONS_ARM = ("neon", "fullfp16", "bf16", "sve", "sve2")


def run(options: argparse.Namespace) -> int:
    """Print what is known; what cannot be found out is said so and never an error."""
    pairs(
        [
            ("fastce", fastce.__version__),
            ("Python", f"{platform.python_version()} ({platform.python_implementation()})"),
            *((name, _version(name)) for name in ("numpy", "numba", "llvmlite")),
            ("LLVM", ".".join(map(str, llvmlite.binding.llvm_version_info))),
            ("system", platform.platform()),
            ("processor", _processor()),
            ("LLVM target", llvmlite.binding.get_host_cpu_name() or "unknown"),
            ("vector extensions", _extensions()),
            ("processors usable", f"{processors.available()} of {os.cpu_count() or 'unknown'}"),
            ("threads", _threads()),
            ("kernel cache", _cache(jit.cache_directory())),
            ("GPU", _gpu()),
        ]
    )
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _processor() -> str:
    """Name of the processor as its vendor writes it, where the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def _extensions() -> str:
    try:
        present = llvmlite.binding.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know them for every processor
        return "unknown"
    names = [name for name in (*_EXTENSIONS, *_EXTENSIONS_ARM) if present.get(name)]
    return " ".join(names) or "none of those used"


def _threads() -> str:
    try:
        return f"{fastce.get_num_threads()} (own pool of Python threads)"
    except ValueError as error:
        return str(error)


def _cache(folder: Path | None) -> str:
    if folder is None:
        return "off: no folder is to be had, kernels are compiled in every process"
    sizes = [path.stat().st_size for path in folder.glob("*.nbc")]
    return f"{folder} ({len(sizes)} kernels, {sum(sizes) / 1e6:.1f} MB)"


def _gpu() -> str:
    """Name the GPUs that NVIDIA's own tool finds; this version computes on none."""
    tool = shutil.which("nvidia-smi")
    names: list[str] = []
    if tool is not None:
        try:
            query = [tool, "--query-gpu=name", "--format=csv,noheader"]
            found = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
            names = found.stdout.splitlines()
        except (OSError, subprocess.SubprocessError):
            pass
    return f"{', '.join(names) or 'none found'} (this version computes on the CPU only)"
