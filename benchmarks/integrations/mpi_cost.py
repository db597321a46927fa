"""What a step of `fastce.mpi` costs, measured on this machine and modelled for many.

    python -m benchmarks.integrations.mpi_cost [--quick]     needs mpiexec; on 1, 2 and 4 ranks

Model of one step (loss and gradient) of N rows, C classes among P ranks, r bytes per record:

    compute  = (partial + gradient of N x C / P logits)       bound by memory, measured per byte
    agree    = Allreduce of 24 bytes           = 2 latency log2(P)
    reduce   = Allreduce of n = r N bytes      = 2 latency log2(P) + (P - 1) / P n (2 / bandwidth
                                                 + merging per byte)

that is, reduce-scatter and allgather by halves [Rabenseifner 2004], each rank merging every record
once in all; two ranks exchange whole buffers, and merge them twice. Latency and bandwidth come from
plain sums on 2 ranks, merging from 1, computing from 1 and 2, which share the memory of a machine;
what is said of 4 is a prediction. More ranks than cores take turns with what they do per row.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROWS, CLASSES = 4096, 32768  # 512 MiB, of which no rank's slice fits a cache
REPEATS = 12
QUICK_ROWS, QUICK_CLASSES = 8, 64
# A cluster for the extrapolation: what a current network gives a rank (400 Gbit/s for 8 of them).
NETWORK = {"latency": 2e-6, "bandwidth": 6e9}


def seconds(comm: Any, call: Callable[[], Any]) -> float:
    """Least time of a call over repeats, each as long as its slowest rank takes."""
    from mpi4py import MPI

    call()
    best = math.inf
    for _ in range(REPEATS):
        comm.Barrier()
        start = time.perf_counter()
        call()
        best = min(best, comm.allreduce(time.perf_counter() - start, op=MPI.MAX))
    return best


def measure(rows: int, classes: int) -> dict[str, float]:
    """Times on this rank's communicator, and of its parts."""
    from mpi4py import MPI

    from fastce import mpi, shards

    comm = MPI.COMM_WORLD
    start, stop = (classes * k // comm.size for k in (comm.rank, comm.rank + 1))
    rng = np.random.default_rng(comm.rank)
    logits = rng.standard_normal((rows, stop - start), np.float32)
    out = np.empty_like(logits)
    targets = np.random.default_rng(0).integers(0, classes, rows)
    given: Any = {"class_offset": start, "classes": classes}
    part = shards.partial(logits, targets, **given)
    total = shards.Partial(part.records.copy(), part.rows, part.terms)
    mpi._merge_all(comm, total)
    other = part.records.copy()
    few, many = np.zeros(3), np.zeros(part.records.size)
    return {
        "step": seconds(
            comm, lambda: mpi.cross_entropy_and_grad(logits, targets, **given, out=out)
        ),
        "partial": seconds(comm, lambda: shards.partial(logits, targets, **given)),
        "grad": seconds(
            comm, lambda: shards.grad(logits, targets, total, class_offset=start, out=out)
        ),
        "finish": seconds(comm, lambda: shards.finish(total)),
        "merge": seconds(comm, lambda: shards.merge_records(other, part.records, np.float32)),
        "agree": seconds(comm, lambda: mpi._agree(comm, None, part.terms)),
        "reduce": seconds(comm, lambda: mpi._merge_all(comm, part)),
        "few": seconds(comm, lambda: comm.Allreduce(MPI.IN_PLACE, few)),
        "many": seconds(comm, lambda: comm.Allreduce(MPI.IN_PLACE, many)),
        "bytes": float(part.records.nbytes),
    }


def launched(ranks: int, *options: str) -> dict[str, float]:
    """The measurements of rank 0 of so many."""
    beside = Path(sys.executable).parent
    mpiexec = shutil.which("mpiexec", path=f"{beside}:{os.environ['PATH']}")
    assert mpiexec, "mpiexec not found: install the extra mpi"
    itself = [sys.executable, "-m", "benchmarks.integrations.mpi_cost", "--rank", *options]
    command = [mpiexec, "-n", str(ranks), *itself]
    env = os.environ | {"FASTCE_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def model(
    ranks: int, one: dict[str, float], compute: float, network: dict[str, float], turns: float = 1.0
) -> dict[str, float]:
    """Seconds of the parts of a step among so many ranks, given that of a slice of the logits."""
    steps, share = math.log2(ranks) if ranks > 1 else 0.0, (ranks - 1) / ranks
    latency, size = network["latency"], one["bytes"]
    wire = 2 * share * size / network["bandwidth"]
    merging = one["merge"] * (1.0 if ranks == 2 else share) * (ranks > 1)
    return {
        "compute": compute + turns * one["finish"],
        "agree": 2 * latency * steps,
        "reduce": 2 * latency * steps + wire + turns * merging,
    }


def sliced(measured: dict[str, float]) -> float:
    """Seconds for the logits of a slice, read twice and written once."""
    return measured["partial"] + measured["grad"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", action="store_true", help="measure on the ranks of mpiexec")
    parser.add_argument("--quick", action="store_true", help="tiny inputs; the numbers say nothing")
    asked = parser.parse_args()
    rows, classes = (QUICK_ROWS, QUICK_CLASSES) if asked.quick else (ROWS, CLASSES)
    if asked.rank:
        from mpi4py import MPI

        found = measure(rows, classes)
        if MPI.COMM_WORLD.rank == 0:
            print(json.dumps(found))
        return
    cores = len(os.sched_getaffinity(0))
    options = ["--quick"] if asked.quick else []
    measured = {ranks: launched(ranks, *options) for ranks in (1, 2, 4)}
    one, two = measured[1], measured[2]
    here = {
        "latency": two["few"] / 2,
        "bandwidth": one["bytes"] / max(two["many"] - two["few"], 1e-9),
    }
    print(f"{rows} rows, {classes} classes, float32, {cores} cores, one thread per rank;")
    print(
        f"{one['bytes'] / rows:.0f} bytes and {one['merge'] / rows * 1e9:.0f} ns per record merged"
    )
    print(f"latency {here['latency'] * 1e6:.1f} us, bandwidth {here['bandwidth'] / 1e9:.1f} GB/s\n")
    print("milliseconds      compute            agree           reduce             step")
    print("ranks      model measured  model measured  model measured  model measured")
    for ranks, got in measured.items():
        said = model(ranks, one, sliced(measured[min(ranks, 2)]), here, max(1.0, ranks / cores))
        compute = sliced(got) + got["finish"]
        pairs = [
            (said["compute"], compute), (said["agree"], got["agree"]),
            (said["reduce"], got["reduce"]), (sum(said.values()), got["step"]),
        ]  # fmt: skip
        print(f"{ranks:5}  " + "  ".join(f"{a * 1e3:8.3f} {b * 1e3:7.3f}" for a, b in pairs))
    print(
        f"\nThe slice of one rank above on every rank, {NETWORK['latency'] * 1e6:.0f} us and "
        f"{NETWORK['bandwidth'] / 1e9:.0f} GB/s apart:"
    )
    for ranks in (8, 64, 1024):
        said = model(ranks, one, sliced(one), NETWORK)
        sent = said["agree"] + said["reduce"]
        print(
            f"{ranks:5} ranks: compute {said['compute'] * 1e3:.2f}, agree "
            f"{said['agree'] * 1e3:.3f}, reduce {said['reduce'] * 1e3:.3f} ms: "
            f"{100 * sent / (said['compute'] + sent):.1f} % is communication"
        )


if __name__ == "__main__":
    main()
