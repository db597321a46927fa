"""Which tests need more than the extra `test`: one table, for pytest's collection and its summary.

A plugin of pytest. Without an extra, the files that need it are not imported, the single tests that
need it left out, and the summary says so in one line. With ``--extras`` only tests of this table
run, and all that they need has to be installed.
"""

import fnmatch
import functools
import importlib.metadata
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement


class Extra(NamedTuple):
    """What is tested with an extra, and the files that cannot be imported without it."""

    subject: str
    files: tuple[str, ...] = ()


# Single tests of other files say what they need by @pytest.mark.needs("test-cuda").
EXTRAS = {
    "test-torch": Extra("torch", ("fastce/torch*", "tests/test_torch*")),
    "test-jax": Extra("JAX", ("fastce/*jax*", "tests/test_jax*")),
    "boosting": Extra("XGBoost and LightGBM", ("tests/test_boosting*",)),
    "test-cuda": Extra(
        "CUDA without a device", ("fastce/cuda*", "tests/test_cuda_*", "tests/test_*_cuda*")
    ),
    "peers": Extra("statsmodels and data frames of dask"),
}


def requirements(extra: str, pyproject: Path) -> Iterator[Requirement]:
    """What an extra brings on this system, by way of other extras too."""
    project = _project(pyproject)
    for line in project["optional-dependencies"][extra]:
        requirement = Requirement(line)
        if requirement.name == project["name"]:
            for other in requirement.extras:
                yield from requirements(other, pyproject)
        elif requirement.marker is None or requirement.marker.evaluate():
            yield requirement


@functools.cache
def _project(pyproject: Path) -> Any:
    return tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]


def _missing(config: pytest.Config) -> dict[str, list[str]]:
    """The packages that are not installed, by the extra that brings them."""
    installed = functools.cache(_installed)
    pyproject = config.rootpath / "pyproject.toml"
    lacking = {
        extra: [r.name for r in requirements(extra, pyproject) if not installed(r.name)]
        for extra in EXTRAS
    }
    return {extra: names for extra, names in lacking.items() if names}


def _installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


MISSING = pytest.StashKey[dict[str, list[str]]]()


def _needed(path: Path, config: pytest.Config) -> set[str]:
    """The extras without which a file cannot be imported."""
    if not path.is_relative_to(config.rootpath):
        return set()
    name = path.relative_to(config.rootpath).as_posix()
    return {
        extra for extra, (_, files) in EXTRAS.items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in files)
    }  # fmt: skip


def _of(missing: Collection[str]) -> str:
    """Name what is tested with these extras, and how they are had."""
    subjects = ", ".join(f"{EXTRAS[extra].subject} [{extra}]" for extra in missing)
    return f"{subjects}; python -m pip install -e '.[test,{','.join(missing)}]'"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--extras``."""
    parser.addoption(
        "--extras", action="store_true",
        help="run only tests that need more than the extra `test`; all of it has to be there",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Find out what is installed."""
    config.addinivalue_line("markers", "needs(*extras): extras without which a test cannot run")
    config.stash[MISSING] = missing = _missing(config)
    if missing and config.getoption("extras"):
        packages = ", ".join(sorted(set().union(*missing.values())))
        raise pytest.UsageError(f"--extras: not installed: {packages}, for tests of {_of(missing)}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out what needs an absent extra, and what tests import: it has no tests of its own.

    A file that is asked for by its name is run, or fails by what it imports.
    """
    asked_for = (
        config.invocation_params.dir / str(word).partition("::")[0] for word in config.args
    )
    if collection_path in asked_for:
        return None
    helper = collection_path.parent == config.rootpath / "tests" and collection_path.suffix == ".py"
    if helper and not collection_path.name.startswith("test_"):
        return True
    return True if _needed(collection_path, config) & config.stash[MISSING].keys() else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that need an absent extra; with ``--extras``, all that need none."""
    kept, left_out = [], []
    for item in items:
        needed = _needed(item.path, config).union(*(m.args for m in item.iter_markers("needs")))
        if unknown := needed - EXTRAS.keys():
            raise pytest.UsageError(f"{item.nodeid}: expected extras {[*EXTRAS]}, got {unknown}")
        can_run = needed.isdisjoint(config.stash[MISSING])
        wanted = needed or not config.getoption("extras")
        (kept if can_run and wanted else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say what was not run."""
    if missing := config.stash[MISSING]:
        terminalreporter.write_line(f"not run, for want of an extra: tests of {_of(missing)}")
