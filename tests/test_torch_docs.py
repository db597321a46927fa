"""The page for users of torch says what is so; the example and the benchmark beside it run."""

import doctest
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "torch.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_examples():
    blocks = re.findall(r"^```pycon\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    assert len(blocks) > 5
    test = doctest.DocTestParser().get_doctest("".join(blocks), {}, "torch.md", str(PAGE), 0)
    assert doctest.DocTestRunner().run(test).failed == 0


def test_files_and_commands_it_names_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (PAGE.parent / link).exists(), link
    for path in re.findall(r"python (examples/\S+\.py)", TEXT):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m (benchmarks\.\w+)", TEXT):
        assert importlib.util.find_spec(module), module


def test_language_model(tmp_path):
    """The curves of the four ways are one curve."""
    picture = tmp_path / "curves.png"
    command = [ROOT / "examples" / "torch_language_model.py", "--quick", "--output", picture]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    table = [line.split() for line in done.stdout.splitlines()[1:-1]]
    assert len(table) == 4
    numbers = [[float(cell) for cell in row if re.fullmatch(r"[\d.]+e[+-]\d+|\d+\.\d{5}", cell)]
               for row in table]  # fmt: skip
    for first, last, off in numbers:
        assert first == pytest.approx(numbers[0][0], rel=1e-5)
        assert last == pytest.approx(numbers[0][1], rel=1e-5)
        assert off < 1e-5
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name, shown", [("torch", "with gradient"), ("torch_distributed", "│ 2 ")])
def test_benchmarks(name, shown):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.integrations.{name}", "--quick"],
        cwd=ROOT, text=True, capture_output=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(shown) == 2
