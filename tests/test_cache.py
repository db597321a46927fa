"""The machine-code cache: used by the next process, never stale, and damage only costs time."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import PACKAGE

# Runs the kernels that compile fastest and prints how many were compiled.
PROGRAM = """
import fastce
from numba.core import event
with event.install_recorder("numba:compile") as compiled:
    assert fastce.nll_loss([[-1.0, -2.0]], [1]) == 2.0
print(len(compiled.buffer))
"""


def compilations(python, folder, **options):
    return int(python(PROGRAM, FASTCE_CACHE_DIR=str(folder), **options).stdout)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the package that a test may edit."""
    package = tmp_path_factory.mktemp("copy") / "fastce"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    return package


@pytest.fixture
def filled(tmp_path, python):
    """A cache folder that holds what the program needs."""
    folder = tmp_path / "cache"
    assert compilations(python, folder) > 0
    assert list(folder.iterdir())
    return folder


def test_the_second_process_compiles_nothing(filled, python):
    files = {path.name: path.read_bytes() for path in filled.iterdir()}
    assert compilations(python, filled) == 0
    assert {path.name: path.read_bytes() for path in filled.iterdir()} == files


DIGESTS = """
from pathlib import Path
from fastce.cpu import jit
digests = [jit.source_digest()]
for path in sorted(Path(jit.__file__).parent.glob("*.py")):
    with path.open("a") as file:
        file.write("# edited\\n")
    jit.source_digest.cache_clear()
    digests.append(jit.source_digest())
print(len(digests), len(set(digests)))
"""


def test_editing_any_source_of_the_kernels_is_noticed(copy, python):
    """By the digest that names what is kept; the next test sees what comes of it."""
    count = len(list((PACKAGE / "cpu").glob("*.py"))) + 1
    assert python(DIGESTS, package=copy).stdout.split() == [str(count)] * 2


def test_editing_a_source_takes_effect(copy, tmp_path, python):
    """The edit of one helper reaches kernels of other files; the old code is still in the cache."""
    program = "import fastce; print(fastce.logsumexp([0.0, 0.0]))"
    options = {"package": copy, "FASTCE_CACHE_DIR": str(tmp_path / "cache")}
    before = python(program, **options).stdout
    constants = copy / "cpu" / "constants.py"
    text = constants.read_text()
    edited = text.replace("0.69314718", "0.79314718")  # ln 2
    assert edited != text
    constants.write_text(edited)
    assert python(program, **options).stdout != before
    constants.write_text(text)
    assert python(program, **options).stdout == before


def test_another_processor_has_its_own_code(filled, python):
    assert compilations(python, filled, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="") > 0
    assert compilations(python, filled) == 0


DAMAGES = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "garbage": lambda content: b"\x80\x04garbage" * 20,
    "one bit flipped": lambda content: content[:1000] + bytes([content[1000] ^ 1]) + content[1001:],
    "text": lambda content: b"not a cache file\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_compiled_again_and_replaced(damage, filled, python):
    for path in filled.iterdir():
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert compilations(python, filled) > 0
    assert compilations(python, filled) == 0


def test_a_folder_in_the_place_of_a_file(filled, python):
    for path in list(filled.iterdir()):
        path.unlink()
        path.mkdir()
    assert compilations(python, filled) > 0


USELESS = {
    "cannot be made": lambda tmp_path: "/proc/no/such/folder",
    "is a file": lambda tmp_path: _touch(tmp_path / "file"),
    "below a file": lambda tmp_path: _touch(tmp_path / "file") / "folder",
    "turned off": lambda tmp_path: "",
}


def _touch(path: Path) -> Path:
    path.write_text("")
    return path


@pytest.mark.parametrize("folder", USELESS)
def test_without_a_folder_everything_works(folder, tmp_path, python):
    place = USELESS[folder](tmp_path)
    assert compilations(python, place) > 0
    program = "from fastce.cpu import jit; print(jit.cache_directory())"
    assert python(program, FASTCE_CACHE_DIR=str(place)).stdout == "None\n"


def test_a_read_only_folder(filled, tmp_path, python):
    """What it holds is used; what it lacks is compiled and not kept."""
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (filled, empty):
        folder.chmod(0o500)
    try:
        assert compilations(python, filled) == 0
        assert compilations(python, empty) > 0
        if os.geteuid() != 0:  # permissions do not bind the superuser
            assert not list(empty.iterdir())
    finally:
        for folder in (filled, empty):
            folder.chmod(0o700)


@pytest.mark.parametrize("home", [None, "", "/proc/nobody"])
def test_without_a_home(home, python):
    environment = {"HOME": home, "XDG_CACHE_HOME": "/proc/nothing" if home is None else None}
    assert int(python(PROGRAM, FASTCE_CACHE_DIR=None, **environment).stdout) >= 0


def test_the_usual_place(tmp_path, python):
    program = "from fastce.cpu import jit; print(jit.cache_directory())"
    done = python(program, FASTCE_CACHE_DIR=None, XDG_CACHE_HOME=str(tmp_path))
    assert Path(done.stdout.strip()).parent == tmp_path


def test_several_processes_write_at_once(tmp_path, python):
    folder = tmp_path / "cache"
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(compilations, python, folder) for _ in range(4)]
        assert max(run.result() for run in runs) > 0
    assert compilations(python, folder) == 0
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]


def test_a_process_killed_while_it_fills_the_cache(tmp_path, python):
    folder = tmp_path / "cache"
    environment = {**os.environ, "FASTCE_CACHE_DIR": str(folder), "PYTHONPATH": str(PACKAGE.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        process.wait(2.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert compilations(python, folder) >= 0
    assert compilations(python, folder) == 0
