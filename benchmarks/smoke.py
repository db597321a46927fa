"""Run every benchmark once on tiny arrays, so that a broken one is noticed; nothing is judged.

    python -m benchmarks.smoke

Every case keeps its name, its class axis and its option, and gets a small shape.
"""

import dataclasses
import importlib
import inspect
import itertools
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import benchmarks
from benchmarks import bench_accuracy, bench_ratios, bench_startup, head, measure, report, sweep
from benchmarks.cases import CASES, Case

# asv takes what is called so for a benchmark, wherever in the package it finds it.
BENCHMARK = re.compile("(time|track|peakmem)_.+")
# Scripts of integrations, whose frameworks CI installs, and what to leave out of them.
INTEGRATIONS: dict[str, list[str]] = {
    "boosting": [], "dask_memory": [], "jax": [], "mpi_cost": [], "njit": [], "shards_cost": [],
    "torch": ["--no-compile"],
}  # fmt: skip
PLAN = report.Plan(measure.Effort(turns=1, seconds=0.0), False, 1 << 14, 2, 1, (1, 2))


def shrunk(case: Case) -> Case:
    """A case with at most 100 classes in at most 4 rows along each axis."""
    axis = case.axis % len(case.shape)
    most = [100 if k == axis else 4 for k in range(len(case.shape))]
    # Kernels of float64 and float16 are the tests' matter, and take seconds to compile.
    dtype = case.dtype if case.dtype == "bfloat16" else "float32"
    return dataclasses.replace(case, shape=tuple(map(min, case.shape, most)), dtype=dtype)


def suite() -> Iterator[tuple[str, type, str]]:
    """Name, class and method of every benchmark that asv finds."""
    for module_info in pkgutil.iter_modules(benchmarks.__path__, "benchmarks."):
        module = importlib.import_module(module_info.name)
        for name, found in vars(module).items():
            if name.startswith("_"):
                continue
            if inspect.isclass(found):
                for method, _ in inspect.getmembers(found, inspect.isfunction):
                    if BENCHMARK.fullmatch(method):
                        yield f"{module.__name__}.{name}.{method}", found, method
            elif inspect.isfunction(found) and BENCHMARK.fullmatch(name):
                raise TypeError(f"{module.__name__}.{name}: asv would take it for a benchmark")


def parameters(found: Any) -> Iterator[tuple[Any, ...]]:
    """Every combination of the parameters of a class of benchmarks."""
    each = found.params
    yield from itertools.product(*([each] if isinstance(each[0], str) else each))


def integration(name: str) -> str:
    """Run a script in a process of its own, as it is run; returns what it is called."""
    module = f"benchmarks.integrations.{name}"
    command = [sys.executable, "-m", module, "--quick", *INTEGRATIONS[name]]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return module


def main() -> None:
    """Run all; the first failure ends it."""
    began = time.perf_counter()
    CASES.update({name: shrunk(case) for name, case in CASES.items()})
    measure.SMALL = 0  # tiny arrays have limits here, so that these are run as well
    bench_accuracy.MOST = 2
    bench_accuracy.Accuracy.params = (["float32"], ["loss", "gradient"])
    bench_startup.REPEATS = PLAN.starts  # answered from what the report has found
    bench_ratios.EFFORT = PLAN.effort
    with tempfile.TemporaryDirectory() as folder:
        report.write(report.run(PLAN), Path(folder))
        written = sorted(path.name for path in Path(folder).iterdir())
    print(f"report: {', '.join(written)}")
    print(f"head: {sum(1 for _ in head.run(head.TINY))} rows")
    print(f"sweep: {len(sweep.tried('few classes', 0, 1 << 20))} results")
    for name, found, method in suite():
        cached = (found().setup_cache(),) if hasattr(found, "setup_cache") else ()
        for values in parameters(found):
            benchmark = found()
            if hasattr(benchmark, "setup"):
                benchmark.setup(*cached, *values)
            getattr(benchmark, method)(*cached, *values)
        print(f"{name}: {time.perf_counter() - began:.1f} s")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for module in pool.map(integration, INTEGRATIONS):
            print(f"{module}: {time.perf_counter() - began:.1f} s")
    print(f"all benchmarks run, {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
