"""What asv needs of the benchmarks, beside what `benchmarks.smoke` runs."""

import subprocess
import sys

FRAMEWORKS = [
    "dask", "distributed", "jax", "lightgbm", "matplotlib", "mpi4py", "optax", "rich", "torch",
    "xgboost",
]  # fmt: skip


def test_asv_finds_its_benchmarks_without_any_framework():
    """asv imports every module of the package, but sees no folder without `__init__`."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({FRAMEWORKS}))  # None: import raises ModuleNotFoundError
import asv_runner.discovery as discovery, benchmarks, pathlib
discovery.update_sys_path(pathlib.Path(benchmarks.__path__[0]))
found = [b.name for b in discovery.disc_benchmarks(pathlib.Path(benchmarks.__path__[0]))]
assert any("Latency" in name for name in found), found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
