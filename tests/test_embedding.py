"""docs/embedding.md says what is so, and its files and the examples beside it run."""

import doctest
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "embedding.md"
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.mark.needs("test-jax", "boosting")
def test_examples():
    blocks = re.findall(r"^```pycon\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    assert len(blocks) > 5
    test = doctest.DocTestParser().get_doctest("".join(blocks), {}, PAGE.name, str(PAGE), 0)
    assert doctest.DocTestRunner().run(test).failed == 0


def test_files_it_points_to_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", TEXT)
    assert links
    for link in links:
        assert (PAGE.parent / link).exists(), link


def test_the_loop_of_the_example(capfd):
    """Both ways come to the same loss, and training lowers it."""
    runpy.run_path(str(ROOT / "examples" / "njit_loop.py"), run_name="__main__")
    *epochs, last = capfd.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in epochs]
    assert losses == sorted(losses, reverse=True)
    fused, two_steps = (float(part.split()[-1]) for part in last.split(","))
    assert fused == pytest.approx(two_steps, rel=1e-5)
