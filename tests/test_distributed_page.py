"""docs/distributed.md and the examples that it names do what they say."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_mpi import mpiexec

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "distributed.md"
TEXT = PAGE.read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_sessions_print_what_is_shown():
    sessions = blocks("pycon")
    assert len(sessions) > 3
    test = doctest.DocTestParser().get_doctest("".join(sessions), {}, PAGE.name, str(PAGE), 0)
    assert doctest.DocTestRunner().run(test).failed == 0


def test_programs_run_under_mpiexec(tmp_path):
    programs = blocks("python")
    assert len(programs) == 3
    path = tmp_path / "programs.py"
    path.write_text("\n".join(programs), encoding="utf-8")
    mpiexec(2, str(path))


@pytest.mark.parametrize("name", ["slices", "dask_cluster"])
def test_example(name):
    path = ROOT / "examples" / f"{name}.py"
    assert f"{name}.py" in path.read_text(encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(path), "--quick"], timeout=300, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout


def test_mpi_example():
    printed = mpiexec(2, str(ROOT / "examples" / "mpi_vocabulary.py"), "--quick")
    assert "step 4: loss" in printed


def test_files_that_it_names_exist():
    for path in re.findall(r"examples/\w+\.py", TEXT):
        assert (ROOT / path).exists(), path
