"""The one place that says how kernels are compiled and where their machine code is kept.

Numba's own cache keys on the file of the one function alone, so that editing a helper in another
file leaves the caller stale, and its index file can pair one process's key with another's code when
both write at once.  `_SourceCache` has neither fault: a cached kernel is one file, named by the
digest of everything that the machine code depends on, and appears by an atomic rename.
"""

import functools
import hashlib
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core.caching import _Cache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.serialize import dumps
from numba.core.sigutils import normalize_signature

if hasattr(os, "register_at_fork"):
    # A child forked while another thread compiles would find the compiler locked for ever.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )

# What numba's environment variables can change in the code it makes; the processor is in the key.
_CODE_SETTINGS = ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "DEBUGINFO_DEFAULT")

# No fast-math: the order of additions is the program's choice and NaN must reach the result.
_FLAGS = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": False}
# For functions that only compiled code calls.
_UNWRAPPED = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` on first use into code that runs without the interpreter lock."""
    return _cached(numba.njit(function, **_FLAGS))


def routine(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` once, for compiled code to call; it does not become part of its caller."""
    return _cached(numba.njit(function, **_UNWRAPPED, **_FLAGS))


def device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` for use inside kernels; it always becomes part of its caller."""
    return numba.njit(function, forceinline=True, **_UNWRAPPED, **_FLAGS)  # type: ignore[no-any-return]


def public(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` as part of whatever compiled code calls it, or for a call from Python."""
    return numba.njit(function, forceinline=True, **_FLAGS)  # type: ignore[no-any-return]


def c_function(function: Callable[..., Any], signature: Any) -> Any:
    """Compile `function` now into one that C can call; its `address` is good while it lives."""
    args, result = normalize_signature(signature)
    compiled = CFunc(function, (args, result), locals={}, options=dict(_FLAGS))
    if cache_directory() is not None:
        compiled._cache = _SourceCache(function)  # type: ignore[attr-defined]
    compiled.compile()
    return compiled


def _cached(dispatcher: Any) -> Callable[..., Any]:
    if cache_directory() is not None:
        dispatcher._cache = _SourceCache(dispatcher.py_func)
    return dispatcher  # type: ignore[no-any-return]


@functools.cache
def cache_directory() -> Path | None:
    """Folder of the machine-code cache, or None where no folder can be had.

    ``FASTCE_CACHE_DIR`` chooses it (an empty value turns the cache off); otherwise it is
    ``fastce`` in ``XDG_CACHE_HOME`` or the platform's usual place.  A folder that can be read but
    not written still serves what it holds.
    """
    chosen = os.environ.get("FASTCE_CACHE_DIR")
    if chosen == "":
        return None
    try:
        folder = Path(chosen) if chosen is not None else _default_directory()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # read-only disk, a file in the way, no home folder
        return None
    return folder


def _default_directory() -> Path:
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "fastce"


@functools.cache
def source_digest() -> bytes:
    """Digest of every source file of the kernels and of the compilers that turn them to code."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    versions = (sys.version, numba.__version__, llvmlite.__version__, np.__version__)
    settings = [str(getattr(numba.config, name)) for name in _CODE_SETTINGS]
    digest.update(repr((versions, settings)).encode())
    return digest.digest()


class _SourceCache(_Cache):  # type: ignore[misc]
    """One file per kernel and signature, named by the digest of all that it depends on."""

    def __init__(self, function: Callable[..., Any]) -> None:
        source_digest()  # now, while the files are what Python has just read
        self._name = f"{function.__module__}.{function.__qualname__}"
        self._enabled = True

    @property
    def cache_path(self) -> str:
        return str(cache_directory())

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        """Nothing to forget: an entry is valid for ever or never looked up again."""

    def _path(self, signature: Any, codegen: Any) -> Path:
        key = (self._name, str(signature), codegen.magic_tuple())
        digest = hashlib.sha256(source_digest() + repr(key).encode()).hexdigest()
        return Path(self.cache_path) / f"{self._name.rpartition('.')[2]}-{digest[:40]}.nbc"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        if not self._enabled:
            return None
        target_context.refresh()
        payload = load_entry(self._path(sig, target_context.codegen()))
        if payload is None:
            return None
        return CompileResult._rebuild(target_context, *pickle.loads(payload))

    def save_overload(self, sig: Any, data: Any) -> None:
        if not self._enabled:
            return
        store_entry(self._path(sig, data.codegen), dumps(data._reduce()))


def load_entry(path: Path) -> bytes | None:
    """What `store_entry` has put there, or None where it has not or it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum, payload = content[:32], content[32:]
    return payload if hashlib.sha256(payload).digest() == checksum else None


def store_entry(path: Path, payload: bytes) -> None:
    """Write a cache file, which appears whole or not at all."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            file.write(hashlib.sha256(payload).digest() + payload)
        Path(temporary).replace(path)
    except OSError:  # a read-only or full disk only costs compile time
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
