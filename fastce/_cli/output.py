"""Where commands write: files appear when complete, devices and pipes are written into."""

import contextlib
import errno
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from .terminal import Failure

_STDOUT = 1


def check(outputs: Mapping[str, Path], inputs: Iterable[Path]) -> None:
    """Refuse outputs, named by their options, that cannot be made or are an input or each other."""
    taken = [_identity(path) for path in inputs]
    for option, path in outputs.items():
        if not path.parent.is_dir():
            raise Failure(f"{option}: expected a folder that exists, got {path.parent}")
        identity = _identity(path)
        if path.is_dir() or identity in taken:
            raise Failure(f"{option}: expected a file of its own, got {path}")
        if path.is_socket() and not is_stdout(path):
            raise Failure(f"{option}: expected a file, a device or a pipe, got the socket {path}")
        if not path.is_char_device():  # what is written to /dev/null twice does not meet
            taken.append(identity)


def _identity(path: Path) -> object:
    """What all names of a file have in common, be they links: its inode; its path if it is new."""
    try:
        found = path.stat()
    except OSError:
        return os.path.realpath(path)
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to write, and to seek in, whose content is at `path` if the block ends well.

    A file, or what a symbolic link leads to, is written beside its place under another name, which
    is removed if the block does not end well.  A device, a pipe or the standard output is given the
    bytes when all are there, from a temporary file.
    """
    with writing(path):
        if is_stdout(path):
            sys.stdout.flush()
            into = _spooled(os.dup(_STDOUT))  # opened anew, a file would be written from its start
        elif path.exists() and not path.is_file():
            into = _spooled(_device(path))
        else:
            into = _beside(Path(os.path.realpath(path)))
        with into as file:
            yield file


@contextlib.contextmanager
def writing(path: Path, file: IO[bytes] | None = None) -> Iterator[None]:
    """Say of which output an error is; when the block ends, `file` has passed on all it was given.

    For blocks that write several outputs; `written` does so by itself.
    """
    try:
        yield
        if file is not None:
            file.flush()
    except OSError as error:
        raise Failure(f"{path}: {error.strerror or error}") from None


def temporary(stack: contextlib.ExitStack) -> IO[bytes]:
    """Open a file that nobody else sees and that is gone with the stack."""
    return stack.enter_context(tempfile.TemporaryFile())


def is_stdout(path: Path) -> bool:
    """Whether this is a name of what the standard output goes to, as /dev/stdout is."""
    try:
        return not path.is_char_device() and os.path.samestat(path.stat(), os.fstat(_STDOUT))
    except OSError:
        return False


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[IO[bytes]]:
    if path.is_symlink():  # still, when all links have been followed
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    exists = path.exists()
    if exists and not os.access(path, os.W_OK):  # which replacing it would not ask for
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    # Of a long name only the beginning: with what is added it would be too long.
    unfinished = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.tmp")
    try:
        with unfinished.open("xb") as file:
            if exists:
                shutil.copymode(path, unfinished)
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a crash could leave the final name on missing content
        unfinished.replace(path)
    finally:
        with contextlib.suppress(OSError):  # renamed, or never made
            unfinished.unlink()


def _device(path: Path) -> int:
    """Open a device or a pipe, or say at once that it is a pipe which nobody reads."""
    try:
        # Without O_NONBLOCK this would wait until somebody reads.
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise Failure(f"{path}: expected somebody who reads the pipe, got nobody") from None
    os.set_blocking(descriptor, True)
    return descriptor


@contextlib.contextmanager
def _spooled(descriptor: int) -> Iterator[IO[bytes]]:
    """Collect in a temporary file, in which one can seek, what goes to `descriptor` at the end."""
    with open(descriptor, "wb") as sink, tempfile.TemporaryFile() as file:
        yield file
        file.seek(0)
        shutil.copyfileobj(file, sink)
