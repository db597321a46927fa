"""The command line, end to end: ``python -m fastce`` in a process of its own.

What ``eval`` promises is in test_cli_eval.py; here are the other commands, and what all share.
"""

import importlib.metadata
import os
import subprocess
import sys

import numpy as np
import pytest

import fastce
from fastce.__main__ import main
from fastce._cli import warmup
from fastce.cpu import jit


def cli(*arguments, prelude="", **environment):
    """Run the command line; `prelude` is Python that runs before it."""
    program = f"import sys\n{prelude}\nfrom fastce.__main__ import main\nsys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
        check=False,
    )


def test_module_and_script_are_the_same_program():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="fastce")
    assert script.load() is main
    found = subprocess.run(
        [sys.executable, "-m", "fastce", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("demo", "eval", "info", "warmup"):
        assert command in found.stdout


@pytest.mark.parametrize(
    "arguments", [(), ("nonsense",), ("eval",), ("eval", "a.npy", "b.npy", "--axis", "x")]
)
def test_wrong_usage_ends_with_status_2(arguments):
    found = cli(*arguments)
    assert found.returncode == 2
    assert found.stderr.startswith("usage: fastce")


def test_a_command_imports_no_other(tmp_path):
    check = "import atexit\natexit.register(lambda: print(*sorted(sys.modules)))"
    modules = cli("info", prelude=check).stdout.split()
    assert "fastce._cli.info" in modules
    # numba itself imports SciPy where it is installed
    assert not {"fastce._cli.demo", "sklearn", "matplotlib", "torch"} & set(modules)


@pytest.mark.parametrize("prelude", ["", "sys.modules['rich'] = None"], ids=["rich", "plain"])
def test_info(prelude):
    found = cli("info", prelude=prelude)
    assert found.returncode == 0, found.stderr
    lines = dict(line.split("  ", 1) for line in found.stdout.splitlines())
    assert lines["fastce"].strip() == fastce.__version__
    assert lines["numba"].strip() == importlib.metadata.version("numba")
    for name in ("processor", "vector extensions", "threads", "kernel cache", "GPU"):
        assert lines[name].strip()


def test_info_tells_the_threads_asked_for():
    assert "\nthreads            1 " in cli("info", FASTCE_NUM_THREADS="1").stdout


def test_info_when_nothing_can_be_had(tmp_path):
    blind = "import pathlib, shutil\nshutil.which = lambda name: None"
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    found = cli("info", prelude=blind, FASTCE_CACHE_DIR=str(in_the_way / "cache"))
    assert found.returncode == 0, found.stderr
    assert "kernel cache       off" in found.stdout
    assert "GPU                none found" in found.stdout


PACKAGES = """
import importlib.metadata
import ctypes, shutil, subprocess
from types import SimpleNamespace
known = {known}
find = importlib.metadata.version
def version(name):
    if name in ("numba-cuda", "cuda-bindings"):
        if name not in known:
            raise importlib.metadata.PackageNotFoundError(name)
        return known[name]
    return find(name)
importlib.metadata.version = version
def ask(place):
    place._obj.value = 12080
    return {status}
def library(name, *rest, load=ctypes.CDLL, **options):
    if "cuda" in str(name):
        return SimpleNamespace(cuDriverGetVersion=ask)
    return load(name, *rest, **options)
ctypes.CDLL = library
shutil.which = lambda name: name
answer = SimpleNamespace(stdout="NVIDIA H100, 570.1\\nNVIDIA A10, 570.1\\n")
subprocess.run = lambda *given, **options: answer
"""


@pytest.mark.parametrize(
    "known, status, lines",
    [
        ({"numba-cuda": "0.30", "cuda-bindings": "13.5"}, 0,
         ["CUDA arrays        computed on their device, by numba-cuda 0.30 and cuda-bindings 13.5",
          "CUDA driver        CUDA 12.8",
          "GPU                NVIDIA H100 with driver 570.1, NVIDIA A10 with driver 570.1"]),
        ({}, 3,
         ["CUDA arrays        not taken: needs numba-cuda, of the extra fastce[cuda]",
          "is there and does not answer"]),
    ],
)  # fmt: skip
def test_info_on_cuda(known, status, lines):
    """What is installed and what is there, told apart, and nothing heavy imported for it."""
    check = "import atexit\natexit.register(lambda: print(*sorted(sys.modules)))"
    found = cli("info", prelude=PACKAGES.format(known=known, status=status) + check)
    assert found.returncode == 0, found.stderr
    for line in lines:
        assert line in found.stdout
    assert not {"numba.cuda", "numba_cuda", "cuda"} & set(found.stdout.split())


def test_version_is_that_of_the_package():
    assert fastce.__version__ == importlib.metadata.version("fastce")


def test_demo(tmp_path):
    picture = tmp_path / "demo.png"
    found = cli("demo", "--quick", "--output", picture)
    assert found.returncode == 0, found.stdout + found.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert found.stdout.count(" yes\n") == 4
    assert "NO" not in found.stdout


def test_demo_without_its_extras():
    found = cli("demo", prelude="sys.modules['sklearn'] = None")
    assert found.returncode == 2
    assert found.stderr == (
        "fastce demo: needs sklearn: python -m pip install scikit-learn scipy matplotlib rich\n"
    )


def test_demo_that_cannot_draw_says_so_at_once(tmp_path):
    found = cli("demo", "--output", tmp_path / "missing" / "demo.png")
    assert (found.returncode, found.stdout) == (2, "")
    assert "--output: expected a folder that exists" in found.stderr


FEW = """
import fastce._cli.warmup as warmup
warmup._CALLS = {k: call for k, call in warmup._CALLS.items() if k.endswith(("_grad", "_stats"))}
warmup._LAYOUTS = warmup._LAYOUTS[1:2]
"""


def test_warmup_compiles_what_is_then_not_compiled_again(tmp_path):
    cache = tmp_path / "cache"
    first = cli("warmup", "--dtype", "float32", prelude=FEW, FASTCE_CACHE_DIR=str(cache))
    assert first.returncode == 0, first.stderr
    kept = {path.name for path in cache.iterdir()}
    assert f"{len(kept)} new kernels of {len(kept)} in {cache}" in first.stdout
    assert "\ncross_entropy_and_grad " in first.stdout

    again = cli("warmup", "--dtype", "float32", prelude=FEW, FASTCE_CACHE_DIR=str(cache))
    assert f"0 new kernels of {len(kept)} in {cache}" in again.stdout

    np.save(tmp_path / "logits.npy", np.zeros((100, 10), np.float32))
    np.save(tmp_path / "targets.npy", np.zeros(100, int))
    paths = tmp_path / "logits.npy", tmp_path / "targets.npy"
    found = cli("eval", *paths, "--grad", tmp_path / "g.npy", FASTCE_CACHE_DIR=str(cache))
    assert found.returncode == 0, found.stderr
    assert {path.name for path in cache.iterdir()} == kept


def test_warmup_calls_everything_and_says_where_nothing_is_kept(monkeypatch, capsys):
    monkeypatch.setattr(jit, "cache_directory", lambda: None)
    monkeypatch.setattr(warmup, "_LAYOUTS", warmup._LAYOUTS[1:2])
    assert main(["warmup", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "nothing kept: no cache folder can be written" in out
    for name in fastce.__all__:
        if name.islower() and "threads" not in name and f"{name}_and_grad" not in fastce.__all__:
            assert f"\n{name} " in out


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end another way")
def test_output_that_nobody_reads_to_the_end():
    program = [sys.executable, "-m", "fastce", "info"]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
    process.stderr.close()
