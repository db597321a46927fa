"""What asv needs of the benchmarks, beside what `benchmarks.smoke` runs."""

import subprocess
import sys

FRAMEWORKS = [
    "dask", "distributed", "jax", "lightgbm", "matplotlib", "mpi4py", "optax", "rich", "torch",
    "xgboost",
]  # fmt: skip
PROGRAM = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({FRAMEWORKS}))  # None: import raises ModuleNotFoundError
import benchmarks
names = [module.name for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")]
for name in names:
    importlib.import_module(name)
print(*names)
"""


def test_no_module_that_asv_finds_needs_a_framework():
    """It imports every one of the package, but sees no folder without `__init__`."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "benchmarks.bench_time" in done.stdout.split()
