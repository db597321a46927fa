"""The one place that says how kernels are compiled and where their machine code is kept.

Numba's own cache keys on the file of the one function alone, so that editing a helper in another
file leaves the caller stale, and its index file can pair one process's key with another's code when
both write at once.  `_SourceCache` has neither fault: a cached kernel is one file, named by the
digest of everything that the machine code depends on, and appears by an atomic rename.

Loading an entry runs what it says. So entries, and the folder that they lie in, count only where
nobody but this user or the administrator can have written them.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import pickle
import pkgutil
import secrets
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
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

from fastce.cpu.mode import InDefaultMode

if numba.config.DISABLE_JIT:
    # Of numba's own functions, too, some would then be Python's, which nothing here could call.
    raise ImportError(
        "fastce: expected a numba that compiles, got one with NUMBA_DISABLE_JIT set; what fastce "
        "computes has no form but compiled code"
    )

if hasattr(os, "register_at_fork"):
    # A child forked while another thread compiles would find the compiler locked for ever.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )

# What numba's environment variables can change in the code it makes; the processor is in the key.
_CODE_SETTINGS = ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "DEBUGINFO_DEFAULT")

# Flags of a compiled file that Python takes for valid, whatever its source (PEP 552).
_UNCHECKED = (1).to_bytes(4, "little")
_AT_ONCE = getattr(os, "O_NONBLOCK", 0)  # or a pipe in the place of a file would be waited for

# No fast-math: the order of additions is the program's choice and NaN must reach the result.
_FLAGS = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": False}
# For functions that only compiled code calls.
_UNWRAPPED = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` on first use into code that runs without the interpreter lock.

    It computes in the default mode of floating-point arithmetic, see `fastce.cpu.mode`.
    """
    return _cached(numba.njit(function, pipeline_class=InDefaultMode, **_FLAGS))


def as_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` on first use into code that computes in the mode of who calls it."""
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
    """Compile `function` now into one that C can call; its `address` is good while it lives.

    It computes in the default mode, as a `kernel` does.
    """
    args, result = normalize_signature(signature)
    compiled = CFunc(
        function, (args, result), locals={}, options=dict(_FLAGS), pipeline_class=InDefaultMode
    )
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
    not written still serves what it holds.  One that somebody else could have written does not, nor
    does any where it is unknown what code Python runs.
    """
    chosen = os.environ.get("FASTCE_CACHE_DIR")
    if chosen == "" or source_digest() is None:
        return None
    try:
        folder = (Path(chosen) if chosen is not None else _default_directory()).resolve()
        for missing in (*reversed(folder.parents), folder):
            missing.mkdir(mode=0o755, exist_ok=True)  # `parents=True` would let others write them
        reason = _reason_for_distrust(folder)
    except (OSError, RuntimeError):  # read-only disk, a file in the way, no home folder
        return None
    if reason is not None:
        _warn_of_distrust(folder, reason)
        return None
    return folder


def _reason_for_distrust(folder: Path) -> str | None:
    """Why somebody else could have put files into a folder, or another folder in its place."""
    reason = _foreign(folder.stat())
    if reason is not None:
        return f"{folder} {reason}"
    for place in folder.parents:
        status = place.stat()
        # What others may put there in its place would be theirs, which has just been looked at; and
        # groups may write above the folders of many people whose group is theirs alone.
        writers = 0 if status.st_mode & stat.S_ISVTX else stat.S_IWOTH
        reason = _foreign(status, writers)
        if reason is not None:
            return f"{place} {reason}"
    return None


def _foreign(status: os.stat_result, writers: int = stat.S_IWGRP | stat.S_IWOTH) -> str | None:
    """How somebody who is neither this user nor the administrator could have written a file."""
    if not hasattr(os, "geteuid"):
        return None
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to user {status.st_uid}"
    if status.st_mode & writers:
        return f"can be written to by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


_distrusted: set[Path] = set()


def _warn_of_distrust(folder: Path, reason: str) -> None:
    """Say, once, why what lies in a folder is not run."""
    if folder in _distrusted:
        return
    _distrusted.add(folder)
    warnings.warn(
        f"{reason}: the machine code in {folder} may be another user's and is not run; kernels are "
        "compiled anew. Expected files and a folder that belong to this user or to root and that "
        "nobody else can write: `chmod -R go-w` makes one's own so, and FASTCE_CACHE_DIR chooses "
        "another folder",
        RuntimeWarning, stacklevel=3,
    )  # fmt: skip


def _default_directory() -> Path:
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "fastce"


@functools.cache
def source_digest() -> bytes | None:
    """Digest of all code of the kernels and of the compilers that turn it to machine code."""
    code = code_digest("fastce.cpu")
    if code is None:
        return None
    versions = (sys.version, numba.__version__, llvmlite.__version__, np.__version__)
    settings = [str(getattr(numba.config, name)) for name in _CODE_SETTINGS]
    return hashlib.sha256(code + repr((versions, settings)).encode()).digest()


def code_digest(*names: str) -> bytes | None:
    """Digest of the files that Python runs as modules, and as all modules of packages.

    They are what the modules' loaders read: sources in a folder or in a zip, or compiled files
    where there are no sources.  None where the loaders cannot tell, as in some frozen programs.
    """
    digest = hashlib.sha256()
    try:
        for name in names:
            spec = _specification(name)
            modules = [name]
            if spec.submodule_search_locations is not None:
                found = pkgutil.iter_modules(spec.submodule_search_locations, f"{name}.")
                modules += sorted(module.name for module in found)
                if not modules[1:]:
                    return None
            for module in modules:
                for content in _code(_specification(module)):
                    size = len(content).to_bytes(8, "little")
                    digest.update(module.encode() + b"\0" + size + content)
    except (AttributeError, ImportError, OSError):  # as loaders of others may know no better
        return None
    return digest.digest()


def _specification(name: str) -> Any:
    """How a module has been imported, or would be."""
    if name in sys.modules:
        return sys.modules[name].__spec__
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ImportError(f"no module {name}")
    return spec


def _code(spec: Any) -> Iterator[bytes]:
    """The files that a module is made of."""
    yield spec.loader.get_data(spec.loader.get_filename(spec.name))
    if spec.cached is not None and Path(spec.cached).is_file():
        with Path(spec.cached).open("rb") as file:
            start = file.read(8)
            if start[4:] == _UNCHECKED:  # Python runs it and does not look at the source
                yield start + file.read()


class _SourceCache(_Cache):  # type: ignore[misc]
    """One file per kernel and signature, named by the digest of all that it depends on."""

    def __init__(self, function: Callable[..., Any]) -> None:
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
        sources = source_digest()
        assert sources is not None  # or there would be no folder
        digest = hashlib.sha256(sources + repr(key).encode()).hexdigest()
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
    """What `store_entry` has put there, or None where it has not or it is damaged or another's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | _AT_ONCE)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)  # of what is read, whatever has the name meanwhile
            reason = _foreign(status)
            if reason is not None:
                _warn_of_distrust(path.parent, f"{path.name} {reason}")
                return None
            content = file.read() if stat.S_ISREG(status.st_mode) else b""
    except OSError:
        return None
    checksum, payload = content[:32], content[32:]
    return payload if hashlib.sha256(payload).digest() == checksum else None


def store_entry(path: Path, payload: bytes) -> None:
    """Write a cache file, which appears whole or not at all: for others to read, not to write."""
    temporary = path.with_name(f"{path.name}-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb", opener=functools.partial(os.open, mode=0o644)) as file:
            file.write(hashlib.sha256(payload).digest() + payload)
        temporary.replace(path)
    except OSError:  # a read-only or full disk only costs compile time
        with contextlib.suppress(OSError):
            temporary.unlink()
