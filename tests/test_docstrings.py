"""Every docstring is one that numpydoc, Sphinx and `help` read: sections keep their headings."""

import ast
import re

import pytest

from tests.conftest import PACKAGE

SECTIONS = {
    "Parameters", "Returns", "Yields", "Raises", "Warns", "See Also", "Notes", "References",
    "Examples", "Attributes", "Methods", "Other Parameters",
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def docstrings(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", path.name), text


def faults(text):
    """What no reader of docstrings would take for a section, though it is meant as one."""
    lines = text.splitlines()
    for before, line, after in zip(["", *lines], lines, [*lines[1:], ""], strict=False):
        if re.search(r"\S -{3,}|-{3,} \S", line):
            yield f"a heading within a line: {line.strip()}"
        if re.fullmatch(r"\s*-{3,}\s*", line):
            heading = before.strip()
            if heading not in SECTIONS:
                yield f"an unknown section: {before}"
            elif len(line.strip()) != len(heading):
                yield f"a line of another length than its heading: {before}"
        elif line.strip() in SECTIONS and not after.strip().startswith("---"):
            yield f"a heading without a line: {line}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sections_have_their_headings(path):
    found = [f"{name}: {fault}" for name, text in docstrings(path) for fault in faults(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text, found",
    [
        ("Sum.\n\nNotes\n-----\nOf all.", 0),
        ("Sum.\n\nNotes ----- Of all.", 1),
        ("Sum.\n\nNotes\n----\nOf all.", 1),
        ("Sum.\n\nNote\n----\nOf all.", 1),
        ("Sum.\n\nNotes\n\nOf all.", 1),
    ],
)
def test_the_check_finds_what_is_wrong(text, found):
    assert len(list(faults(text))) == found
