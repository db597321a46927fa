"""What a step of `fastce.mpi` costs, measured on this machine and modelled for many.

    python -m benchmarks.mpi_cost            needs mpiexec; runs itself on 1, 2 and 4 ranks

Model of one step (loss and gradient) of N rows, C classes among P ranks, r bytes per record:

    compute  = (partial + gradient of N x C / P logits)       bound by memory, measured per byte
    agree    = Allreduce of 24 bytes           = 2 latency log2(P)
    reduce   = Allreduce of n = r N bytes      = 2 latency log2(P) + (P - 1) / P n (2 / bandwidth
                                                 + merging per byte)

that is, reduce-scatter and allgather by halves [Rabenseifner 2004], each rank merging every record
once in all; two ranks exchange whole buffers, and merge them twice. Latency, bandwidth and merging
come from 2 ranks and plain sums; 4 ranks are then predicted and measured. More ranks than cores
take turns: what they compute, and merge, takes as many times longer.
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

ROWS, CLASSES = 2048, 16384
REPEATS = 30
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


def measure() -> dict[str, float]:
    """Times on this rank's communicator, and of its parts."""
    from mpi4py import MPI

    from fastce import mpi, shards

    comm = MPI.COMM_WORLD
    start, stop = (CLASSES * k // comm.size for k in (comm.rank, comm.rank + 1))
    rng = np.random.default_rng(comm.rank)
    logits = rng.standard_normal((ROWS, stop - start), np.float32)
    out = np.empty_like(logits)
    targets = np.random.default_rng(0).integers(0, CLASSES, ROWS)
    given: Any = {"class_offset": start, "classes": CLASSES}
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


def launched(ranks: int) -> dict[str, float]:
    """The measurements of rank 0 of so many."""
    beside = Path(sys.executable).parent
    mpiexec = shutil.which("mpiexec", path=f"{beside}:{os.environ['PATH']}")
    assert mpiexec, "mpiexec not found: install the extra mpi"
    command = [mpiexec, "-n", str(ranks), sys.executable, "-m", "benchmarks.mpi_cost", "--rank"]
    env = os.environ | {"FASTCE_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def model(
    ranks: int, one: dict[str, float], network: dict[str, float], turns: float = 1.0
) -> dict[str, float]:
    """Seconds of the parts of a step among so many ranks."""
    steps, share = math.log2(ranks) if ranks > 1 else 0.0, (ranks - 1) / ranks
    latency, size = network["latency"], one["bytes"]
    wire = 2 * share * size / network["bandwidth"]
    merging = one["merge"] * (1.0 if ranks == 2 else share) * (ranks > 1)
    return {
        "compute": turns * (one["partial"] + one["grad"]) / ranks + turns * one["finish"],
        "agree": 2 * latency * steps,
        "reduce": 2 * latency * steps + wire + turns * merging,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", action="store_true", help="measure on the ranks of mpiexec")
    if parser.parse_args().rank:
        from mpi4py import MPI

        found = measure()
        if MPI.COMM_WORLD.rank == 0:
            print(json.dumps(found))
        return
    cores = len(os.sched_getaffinity(0))
    measured = {ranks: launched(ranks) for ranks in (1, 2, 4)}
    one, two = measured[1], measured[2]
    here = {
        "latency": two["few"] / 2,
        "bandwidth": one["bytes"] / max(two["many"] - two["few"], 1e-9),
    }
    print(f"{ROWS} rows, {CLASSES} classes, float32, {cores} cores, one thread per rank;")
    print(
        f"{one['bytes'] / ROWS:.0f} bytes and {one['merge'] / ROWS * 1e9:.0f} ns per record merged"
    )
    print(f"latency {here['latency'] * 1e6:.1f} us, bandwidth {here['bandwidth'] / 1e9:.1f} GB/s\n")
    print("milliseconds      compute            agree           reduce             step")
    print("ranks      model measured  model measured  model measured  model measured")
    for ranks, got in measured.items():
        said = model(ranks, one, here, max(1.0, ranks / cores))
        compute = got["partial"] + got["grad"] + got["finish"]
        pairs = [
            (said["compute"], compute), (said["agree"], got["agree"]),
            (said["reduce"], got["reduce"]), (sum(said.values()), got["step"]),
        ]  # fmt: skip
        print(f"{ranks:5}  " + "  ".join(f"{a * 1e3:8.3f} {b * 1e3:7.3f}" for a, b in pairs))
    print(f"\n1024 ranks over {NETWORK['latency'] * 1e6:.0f} us, {NETWORK['bandwidth'] / 1e9:.0f} GB/s,"
          " the classes of one rank as here on one:")  # fmt: skip
    for ranks in (8, 64, 1024):
        said = model(ranks, one, NETWORK)
        compute = one["partial"] + one["grad"] + one["finish"]
        share = (said["agree"] + said["reduce"]) / (compute + said["agree"] + said["reduce"])
        print(
            f"{ranks:5} ranks: compute {compute * 1e3:.2f}, agree {said['agree'] * 1e3:.3f}, "
            f"reduce {said['reduce'] * 1e3:.3f} ms: {100 * share:.1f} % is communication"
        )


if __name__ == "__main__":
    main()
