"""The README says what is so: its examples run and print what it shows, its commands exist."""

import doctest
import re
import shlex
from pathlib import Path

import pytest

from fastce.__main__ import _parser

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```pycon\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    assert len(blocks) > 5
    test = doctest.DocTestParser().get_doctest("".join(blocks), {}, "README", str(README), 0)
    assert doctest.DocTestRunner().run(test).failed == 0


COMMANDS = re.findall(r"(?:python -m fastce|^    fastce) ([^`#\n]+)", TEXT, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    _parser().parse_args(shlex.split(command))


def test_commands_are_found():
    commands = {"demo", "eval", "fit", "info", "predict", "warmup"}
    assert {command.split()[0] for command in COMMANDS} == commands


def test_files_it_points_to_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", TEXT)
    assert links
    for link in links:
        assert (README.parent / link).exists(), link
