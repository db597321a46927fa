"""Kernels by name: what each is compiled from, and its machine code, kept on disk.

Code is compiled for one compute capability without a need for a driver, so that it can be looked at
and cached anywhere.  A cached kernel is one file, named by the digest of all that it depends on.
"""

import functools
import hashlib
import importlib.metadata
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fastce.cpu.jit import cache_directory, code_digest, load_entry, store_entry
from fastce.cuda import plan
from fastce.cuda.plan import Elements, Variant

# What turns source into machine code.
_COMPILERS = ("numba-cuda", "llvmlite", "numpy", "nvidia-nvvm", "nvidia-nvjitlink",
              "nvidia-cuda-nvcc-cu12", "nvidia-nvjitlink-cu12")  # fmt: skip

Capability = tuple[int, int]


class Sum(NamedTuple):
    """A kernel of `sums`: of targets, of losses or parts of them, or the conversion of weights."""

    name: str
    double: bool
    last: bool = False


class OfRecords(NamedTuple):
    """A kernel of `records`: merges them, finishes rows, adds up their sums, settles these."""

    name: str
    labelled: bool = False
    double: bool = False


Kernel = Variant | Elements | Sum | OfRecords


class Source(NamedTuple):
    """A kernel's function, its numbers of integer and float64 arguments, and launch bounds."""

    function: Callable[..., None]
    integers: int
    floats: int
    block: int
    blocks: int


class Code(NamedTuple):
    """Machine code and the name under which it holds the kernel."""

    name: str
    cubin: bytes


@functools.cache
def source(kernel: Kernel) -> Source:
    """What a kernel is compiled from."""
    from fastce.cuda import elements, loops, records, sums

    if isinstance(kernel, Variant):
        maker = loops.row_kernel if kernel.regime == "row" else loops.thread_kernel
        return Source(maker(kernel), *loops.SIGNATURE, kernel.block, kernel.blocks)
    if isinstance(kernel, Elements):
        return Source(
            elements.kernel_of(kernel), len(elements.INTEGERS), len(elements.FLOATS),
            plan.ELEMENT_THREADS, kernel.blocks,
        )  # fmt: skip
    if isinstance(kernel, OfRecords):
        maker = getattr(records, f"{kernel.name}_kernel")
        integers, floats = records.ARGUMENTS[kernel.name]
        return Source(
            maker(kernel.labelled, kernel.double, plan.SUM_THREADS), len(integers), len(floats),
            plan.SUM_THREADS, 1,
        )  # fmt: skip
    made = {
        "targets": sums.targets_kernel, "losses": sums.losses_kernel, "parts": sums.parts_kernel,
        "weight": sums.weight_kernel,
    }[kernel.name](kernel.double, kernel.last, plan.SUM_THREADS)  # fmt: skip
    integers, floats = sums.ARGUMENTS[kernel.name]
    return Source(made, len(integers), len(floats), plan.SUM_THREADS, 1)


def exists(kernel: Kernel, capability: Capability) -> bool:
    """Whether devices of a compute capability can run a kernel."""
    clustered = isinstance(kernel, Variant) and kernel.clustered
    return not clustered or plan.most_of_a_cluster(capability) > 1


def ptx(kernel: Kernel, capability: Capability) -> str:
    """A kernel in PTX."""
    from numba import cuda
    from numba.cuda import types

    function, integers, floats, block, blocks = source(kernel)
    signature = types.void(*[types.int64] * integers, *[types.float64] * floats)
    text, _ = cuda.compile(
        function, signature, cc=capability, device=False, abi="numba", output="ptx",
        launch_bounds=(block, blocks),
    )  # fmt: skip
    return text.decode() if isinstance(text, bytes) else str(text)


def compiled(kernel: Kernel, capability: Capability) -> Code:
    """Machine code of a kernel, compiled now."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    text = ptx(kernel, capability)
    entry = re.search(r"\.visible \.entry (\w+)", text)
    assert entry is not None
    options = LinkerOptions(arch="sm_{}{}".format(*capability))
    linked = Linker(ObjectCode.from_ptx(text.encode()), options=options).link("cubin")
    return Code(entry[1], bytes(linked.code))


def code(kernel: Kernel, capability: Capability) -> Code:
    """Machine code of a kernel, from the disk if it is there."""
    folder, sources = cache_directory(), _source_digest()
    if folder is None or sources is None:
        return compiled(kernel, capability)
    key = hashlib.sha256(sources + repr((kernel, capability)).encode()).hexdigest()
    path = folder / f"{name_of(kernel)}-sm{capability[0]}{capability[1]}-{key[:40]}.cubin"
    payload = load_entry(path)
    if payload is not None:
        name, _, cubin = payload.partition(b"\0")
        return Code(name.decode(), cubin)
    made = compiled(kernel, capability)
    store_entry(path, made.name.encode() + b"\0" + made.cubin)
    return made


def name_of(kernel: Kernel) -> str:
    """A short name for people."""
    if isinstance(kernel, Sum | OfRecords):
        return kernel.name
    if isinstance(kernel, Elements):
        return f"binary-{kernel.task}-{kernel.dtype}"
    regime = "cluster" if kernel.clustered else kernel.regime
    return "-".join((kernel.task, kernel.dtype, regime))


@functools.cache
def _source_digest() -> bytes | None:
    """Digest of all code of the kernels and of the compilers that turn it to machine code."""
    sources = code_digest("fastce.cuda", "fastce.cpu.constants")
    if sources is None:
        return None
    digest = hashlib.sha256(sources)
    digest.update(repr([(name, _version(name)) for name in _COMPILERS]).encode())
    digest.update(np.__version__.encode())
    return digest.digest()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
