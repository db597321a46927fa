"""How warnings and absent extras are treated: runs of pytest over tiny projects of our names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.extras import EXTRAS, requirements

ROOT = Path(__file__).parents[1]

FOREIGN = """
import warnings
def deprecates():
    warnings.warn("theirs", DeprecationWarning)
def blames_the_caller():
    warnings.warn("a use of ours", DeprecationWarning, stacklevel=2)
def names_a_file(path):
    warnings.warn_explicit("of a file", UserWarning, path, 1)
"""
# What a test does, and whether it passes.
WARNINGS = {
    "foreign.deprecates()": True,
    "foreign.blames_the_caller()": False,
    "warnings.warn('ours')": False,
    "fastce.warns()": False,
    "np.zeros(1) / 0": False,
    "foreign.names_a_file('/home/fastce/venv/lib/python3.11/site-packages/foreign.py')": True,
    "foreign.names_a_file('/home/fastce/.pyenv/lib/python3.11/foreign.py')": True,
    "foreign.names_a_file('/home/user/fastce/fastce/cpu/rows.py')": False,
}


def run(project, files, *words):
    """Standard output and exit status of pytest in a folder with these files."""
    for name, text in files.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", *words],
        cwd=project, env=os.environ | {"PYTHONPATH": ""}, text=True, capture_output=True,
    )  # fmt: skip
    return done.stdout + done.stderr, done.returncode


def outcomes(output):
    """How many tests have passed, failed and so on, as the last line tells."""
    return {what: int(n) for n, what in re.findall(r"(\d+) (\w+)", output.splitlines()[-1])}


def test_warnings_are_errors_where_our_own_code_causes_them(tmp_path):
    body = "".join(f"def test_{i}():\n    {line}\n" for i, line in enumerate(WARNINGS))
    output, _ = run(
        tmp_path,
        {
            "pyproject.toml": (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
            "foreign.py": FOREIGN,
            "fastce/__init__.py": "import warnings\ndef warns(): warnings.warn('ours')\n",
            "tests/__init__.py": "",
            "tests/test_it.py": f"import warnings, numpy as np\nimport fastce, foreign\n{body}",
        },
        "-vv",
    )
    passed = {
        int(i): how == "PASSED" for i, how in re.findall(r"test_(\d+) (PASSED|FAILED)", output)
    }
    assert {line: passed[i] for i, line in enumerate(WARNINGS)} == WARNINGS, output
    assert "DeprecationWarning: theirs" in output  # shown all the same


def project(needs):
    """A project whose extras need a package, with a test for each extra and one that needs none."""
    lines = "\n".join(f"{extra} = ['{needs}']" for extra in EXTRAS)
    imports = "import pytest" if needs == "pytest" else "import no_such_module"
    marked = "".join(
        f"@pytest.mark.needs({extra!r})\ndef test_{i}(): {imports}\n"
        for i, extra in enumerate(EXTRAS)
    )
    files = {
        "pyproject.toml": f"[project]\nname = 'fastce'\n[project.optional-dependencies]\n{lines}\n"
        "[tool.pytest.ini_options]\naddopts = ['--doctest-modules']\n",
        "conftest.py": "pytest_plugins = ['extras']\n",
        "extras.py": (ROOT / "tests" / "extras.py").read_text(encoding="utf-8"),
        "tests/helper.py": "import no_such_module\n",
        "tests/test_some.py": f"import pytest\n{marked}def test_plain(): pass\n",
    }
    named = ["tests/test_torch_x.py", "tests/test_jax.py", "tests/test_boosting.py",
             "tests/test_cuda_x.py", "tests/test_jax_cuda_x.py"]  # fmt: skip
    return files | dict.fromkeys(named, f"{imports}\ndef test(): pass\n"), len(named)


def test_without_an_extra_the_rest_passes_and_the_summary_tells_what_is_left_out(tmp_path):
    files, _ = project("no-such-package")
    output, status = run(tmp_path, files)
    assert status == 0, output
    assert outcomes(output) == {"passed": 1, "deselected": len(EXTRAS)}
    (line,) = re.findall(r"^not run.*", output, re.MULTILINE)
    assert all(f"{subject} [{extra}]" in line for extra, (subject, _) in EXTRAS.items())
    assert f"pip install -e '.[test,{','.join(EXTRAS)}]'" in line

    output, status = run(tmp_path, {}, "--extras")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "not installed: no-such-package" in output

    output, status = run(tmp_path, {}, "tests/test_jax.py")
    assert status == pytest.ExitCode.INTERRUPTED, output  # not collected, which is an error
    assert "No module named 'no_such_module'" in output


def test_with_the_extras_their_tests_alone_can_be_chosen(tmp_path):
    files, named = project("pytest")
    output, status = run(tmp_path, files)
    assert status == 0, output
    assert outcomes(output) == {"passed": 1 + len(EXTRAS) + named}
    assert "not run" not in output
    output, status = run(tmp_path, {}, "--extras")
    assert status == 0, output
    assert outcomes(output) == {"passed": len(EXTRAS) + named, "deselected": 1}


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_table_names_extras_and_files_that_there_are(extra):
    assert [*requirements(extra, ROOT / "pyproject.toml")]
    for pattern in EXTRAS[extra].files:
        assert [*ROOT.glob(pattern)], pattern


def test_nothing_is_skipped_for_want_of_a_package():
    """Such a skip would pass where an extra is broken; `needs` fails there with ``--extras``."""
    skips = "import" + "orskip"
    guilty = [path.name for path in ROOT.glob("tests/*.py") if skips in path.read_text("utf-8")]
    assert guilty == []
