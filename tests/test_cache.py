"""The machine-code cache: used by the next process, never stale, and damage only costs time."""

import compileall
import os
import py_compile
import shutil
import stat
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
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


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """What is compiled once for all."""
    return tmp_path_factory.mktemp("kept") / "cache"


@pytest.fixture
def filled(kept, tmp_path, python):
    """A cache folder that holds what the program needs."""
    if not kept.exists():
        assert compilations(python, kept) > 0
        assert list(kept.iterdir())
    return shutil.copytree(kept, tmp_path / "cache")


def test_the_second_process_compiles_nothing(filled, python):
    files = {path.name: path.read_bytes() for path in filled.iterdir()}
    assert compilations(python, filled) == 0
    assert {path.name: path.read_bytes() for path in filled.iterdir()} == files


EDITS = """
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
    assert python(EDITS, package=copy).stdout.split() == [str(count)] * 2


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


# What Python runs ---------------------------------------------------------------------------------


def _in_a_zip(package: Path) -> Path:
    archive = package.parent.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(package.rglob("*")):
            file.write(path, path.relative_to(package.parent))
    return archive


def _compiled(package: Path) -> Path:
    compileall.compile_dir(package, quiet=2, legacy=True)
    for path in package.rglob("*.py"):
        path.unlink()
    return package.parent


def _unchecked(package: Path) -> Path:
    """Compiled files that Python runs whatever their sources say, which say something else."""
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(package, quiet=2, invalidation_mode=mode)
    shutil.copytree(PACKAGE, package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.pyc"))
    return package.parent


FORMS = {
    "sources": lambda package: package.parent,
    "zip": _in_a_zip,
    "compiled files": _compiled,
    "zip of compiled files": lambda package: _in_a_zip(_compiled(package) / package.name),
    "unchecked compiled files": _unchecked,
}
DIGESTS = """
import numpy as np
from fastce import rows
from fastce.cpu import jit
print(jit.source_digest().hex(), rows._DIGEST)
"""


@pytest.mark.parametrize("form", FORMS)
def test_the_digest_is_of_what_python_runs(form, tmp_path, python):
    """Whatever the form in which an application is shipped, two versions of it have two digests."""

    def digests(name, edited=None, text=""):
        package = tmp_path / name / "fastce"
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        if edited is not None:
            path = package / edited
            path.write_text(path.read_text() + text)
        where = FORMS[form](package)
        done = python(DIGESTS, package=tmp_path / name / "none", PYTHONPATH=str(where))
        shutil.rmtree(tmp_path / name)
        return done.stdout.split()

    kernels, functions = digests("same")
    assert [kernels, functions] == digests("same")
    other = digests("same", "cpu/small.py", "\nEDITED = 1\n")
    assert other[0] != kernels
    assert other[1] != functions
    other = digests("same", "rows.py", "\nEDITED = 1\n")
    assert other[0] == kernels
    assert other[1] != functions


@pytest.mark.parametrize("form", ["zip", "compiled files"])
def test_an_edit_takes_effect_in_any_form(form, tmp_path, python):
    """Machine code of the version before lies in the same folder."""
    program = "import fastce; print(fastce.logsumexp([0.0, 0.0]))"
    found = []
    for edit in ("0.69314718", "0.79314718", "0.69314718"):  # ln 2
        package = tmp_path / "application" / "fastce"
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        constants = package / "cpu" / "constants.py"
        constants.write_text(constants.read_text().replace("0.69314718", edit))
        options = {
            "PYTHONPATH": str(FORMS[form](package)), "FASTCE_CACHE_DIR": str(tmp_path / "cache"),
        }  # fmt: skip
        found.append(python(program, package=tmp_path / "none", **options).stdout)
        shutil.rmtree(package.parent)
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("failing", ["get_data", "get_filename"])
def test_where_the_code_cannot_be_read_nothing_is_kept(failing, tmp_path, python):
    """As in some frozen programs, whose loaders tell less."""
    program = f"""
import importlib.util
loader = type(importlib.util.find_spec("fastce.cpu").loader)
def refuse(self, *args):
    raise OSError("frozen")
import fastce.cpu.jit as jit
setattr(loader, "{failing}", refuse)
assert jit.source_digest() is None
assert jit.cache_directory() is None
"""
    python(program, FASTCE_CACHE_DIR=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


# Who has written it -------------------------------------------------------------------------------

# Nobody, or for those who may not give files away: this user, to programs that think they are
# somebody else.
SUPERUSER = hasattr(os, "geteuid") and os.geteuid() == 0
SOMEBODY_ELSE = "" if SUPERUSER else "import os; me = os.geteuid(); os.geteuid = lambda: me + 1\n"

posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners and modes")


def _give_away(path: Path) -> str:
    if SUPERUSER:
        os.chown(path, 65534, 65534)
    return SOMEBODY_ELSE


def _mode(mode: int) -> Callable[[Path], str]:
    def change(path: Path) -> str:
        path.chmod(mode)
        return ""

    return change


# What is changed, how, what the warning names.
DISTRUSTED = {
    "folder of another": ("folder", _give_away, "belongs to user"),
    "folder of everybody": ("folder", _mode(0o777), "mode 0777"),
    "sticky folder of everybody": ("folder", _mode(0o1777), "mode 1777"),
    "folder of a group": ("folder", _mode(0o775), "mode 0775"),
    "parent of everybody": ("parent", _mode(0o777), "mode 0777"),
    "entries of another": ("entries", _give_away, "belongs to user"),
    "entries of everybody": ("entries", _mode(0o666), "mode 0666"),
    "entries of a group": ("entries", _mode(0o664), "mode 0664"),
}


@posix
@pytest.mark.parametrize("case", DISTRUSTED)
def test_what_somebody_else_could_have_written_is_not_run(case, filled, python):
    which, change, told = DISTRUSTED[case]
    places = {"folder": [filled], "parent": [filled.parent], "entries": list(filled.iterdir())}
    prelude = "".join({change(path) for path in places[which]})
    marks = {path: path.read_bytes() for path in filled.iterdir()}
    program = "import warnings\n" + prelude + "with warnings.catch_warnings(record=True) as told:\n"
    program += "    warnings.simplefilter('always')\n" + textwrap.indent(PROGRAM, "    ")
    program += "for warning in told: print(warning.message)\n"
    compiled, *warned = python(program, FASTCE_CACHE_DIR=str(filled)).stdout.splitlines()
    assert int(compiled) > 0
    assert len(warned) == 1
    assert told in warned[0]
    assert str(filled) in warned[0]
    assert "chmod" in warned[0]
    if which != "entries":  # those are replaced
        assert {path: path.read_bytes() for path in filled.iterdir()} == marks


@posix
@pytest.mark.parametrize("mode", [0o700, 0o755, 0o500, 0o555])
def test_a_folder_that_this_user_alone_can_write_serves(mode, filled, python):
    filled.parent.chmod(0o775)  # as where every user has a group
    filled.chmod(mode)
    try:
        assert compilations(python, filled) == 0
    finally:
        filled.chmod(0o700)


@posix
@pytest.mark.parametrize(("umask", "folder_mode", "entry_mode"), [
    (0, 0o755, 0o644), (0o022, 0o755, 0o644), (0o077, 0o700, 0o600),
])  # fmt: skip
def test_others_may_read_what_is_kept_and_never_write_it(
    umask, folder_mode, entry_mode, tmp_path, python
):
    """So that what the administrator has compiled serves everybody."""
    folder = tmp_path / "made" / "for" / "cache"
    python(f"import os; os.umask({umask})\n" + PROGRAM, FASTCE_CACHE_DIR=str(folder))
    for place in (folder, *folder.parents[:2]):
        assert stat.S_IMODE(place.stat().st_mode) == folder_mode
    entries = list(folder.iterdir())
    assert entries
    for entry in entries:
        assert entry.suffix == ".nbc"
        assert stat.S_IMODE(entry.stat().st_mode) == entry_mode


@posix
@pytest.mark.skipif(not SUPERUSER, reason="nobody but the administrator can become another user")
def test_what_the_administrator_has_compiled_serves_others(filled, tmp_path, python):
    for place in (filled, *filled.parents):
        if place.stat().st_uid == 0 and place.is_relative_to(tmp_path.parents[2]):
            place.chmod(0o755)
    program = "import os, fastce\nfastce.logsumexp([0.0])\nos.setgid(65534); os.setuid(65534)\n"
    done = python(program + PROGRAM, FASTCE_CACHE_DIR=str(filled))
    assert int(done.stdout) == 0


@posix
def test_a_pipe_in_the_place_of_an_entry(filled, python):
    for path in list(filled.iterdir()):
        path.unlink()
        os.mkfifo(path)
    assert compilations(python, filled) > 0
