"""`fastce.jax` where rows are divided among devices: each computes its own, and only sums move."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jax_sharded_program import DIVIDED, EXPLICIT, GATHERED, SHARD_MAP

ROOT = Path(__file__).parents[1]
PARTITIONERS = ["shardy", "gspmd"]
SUMS = (
    "mean",
    "sum",
    "normalizer",
    "optax, integers",
    "optax, probabilities",
    "checkpoint",
    "scan",
)


@functools.cache
def run(partitioner):
    """The program, which is started once, whether it fails or not."""
    environment = {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "tests.jax_sharded_program", partitioner],
        cwd=ROOT, env=os.environ | environment, text=True, capture_output=True, timeout=500,
    )  # fmt: skip


def results(partitioner):
    """What it prints."""
    done = run(partitioner)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout)


def check(case, name):
    """Bits of rows, and sums to within the rounding of their order."""
    if name in SUMS or name == "gradient of the labels":
        assert case["error"] < 1e-4
    else:
        assert all(case["bits"])


@pytest.mark.parametrize("partitioner", PARTITIONERS)
@pytest.mark.parametrize("name", DIVIDED)
def test_rows_stay_where_they_are(partitioner, name):
    case = results(partitioner)["cases"][name]
    check(case, name)
    assert {(shape.split("[")[1], how) for shape, how in case["exchanged"]} == (
        {("]", "all-reduce")} if name in SUMS else set()
    )


@pytest.mark.parametrize("partitioner", PARTITIONERS)
@pytest.mark.parametrize("name", GATHERED)
def test_whatever_else_is_divided_is_brought_together(partitioner, name):
    check(results(partitioner)["cases"][name], name)


@pytest.mark.parametrize("name", EXPLICIT)
def test_types_say_what_is_divided(name):
    """Meshes with axes that are explicit."""
    case = results("shardy")["explicit"][name]
    check(case, name)
    assert bool(case["exchanged"]) == (name in (*GATHERED, *SUMS))


@pytest.mark.parametrize("partitioner", PARTITIONERS)
def test_without_a_mesh(partitioner):
    assert results(partitioner)["without a mesh"] == [True, True]


@pytest.mark.parametrize("name", SHARD_MAP)
def test_in_shard_map(name):
    """As with optax's losses, whatever differs among devices."""
    assert results("shardy")["shard_map"][name] < 1e-5


def test_in_shard_map_over_a_part_of_the_mesh():
    assert results("shardy")["part of the mesh"]


def test_a_cache_of_programs_tells_options_apart():
    assert results("shardy")["cached"] == [True, True]


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_kernels_have_a_rule(platform):
    """The same on CUDA devices: rows may be divided, classes are named, but kept whole."""
    (rule,) = results("shardy")["lowered"][platform]
    assert rule.startswith("([i, j], [i], [i], [k])->([i], [i, j])")


def test_the_formula_is_left_to_xla():
    """It can divide classes as well."""
    assert results("shardy")["lowered"]["tpu"] == []
