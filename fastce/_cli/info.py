"""``fastce info``: what a report of a fault should begin with."""

import argparse
import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
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
            ("CUDA driver", _cuda_driver()),
            ("CUDA arrays", _cuda()),
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
    """Name the GPUs and the driver that NVIDIA's own tool finds."""
    tool = shutil.which("nvidia-smi")
    found: list[str] = []
    if tool is not None:
        try:
            query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
            done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
            found = [" with driver ".join(line.split(", ")) for line in done.stdout.splitlines()]
        except (OSError, subprocess.SubprocessError):
            pass
    return ", ".join(found) or "none found"


def _cuda() -> str:
    """Say whether arrays on CUDA devices are computed with, by the packages installed."""
    numba_cuda, bindings = _version("numba-cuda"), _version("cuda-bindings")
    if numba_cuda == "unknown":
        return "not taken: needs numba-cuda, of the extra fastce[cuda] or fastce[cuda12]"
    return f"computed on their device, by numba-cuda {numba_cuda} and cuda-bindings {bindings}"


def _cuda_driver() -> str:
    """Ask the driver, without starting a device, for the newest CUDA that it runs."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL(name).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return "none found"
    if failed:
        return f"{name} is there and does not answer"
    return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
