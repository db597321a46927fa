"""Fixtures of the whole suite."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

import fastce

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("suite")

PACKAGE = Path(fastce.__file__).parent

PATIENCE = 600.0  # seconds, after which a program hangs: long, for machines that are busy or slow

RunPython = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def python() -> RunPython:
    """Run a program in a fresh interpreter; fails on a bad exit status, an abort or a hang."""

    def run(
        program: str,
        *,
        package: Path = PACKAGE,
        timeout: float = PATIENCE,
        **environment: str | None,
    ) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
        for name, value in environment.items():
            if value is None:
                env.pop(name, None)
            else:
                env[name] = value
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=env, cwd=package.parent, timeout=timeout, text=True, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    """Leave the number of threads as it was."""
    before = fastce.get_num_threads()
    yield
    fastce.set_num_threads(before)
