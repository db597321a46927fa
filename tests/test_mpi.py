"""`fastce.mpi` under mpiexec: the same results as in one process, and no rank left waiting."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
SECONDS = 300


def mpiexec(ranks, *command, **environment):
    """Run Python on some ranks; one that fails ends all, and a run that hangs is killed."""
    assert MPIEXEC, "an MPI library is part of the extra `test`"
    env = os.environ | {
        "PYTHONPATH": str(ROOT), "FASTCE_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
        # What Open MPI, if that is installed, asks for where there are more ranks than cores.
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        **environment,
    }  # fmt: skip
    process = subprocess.Popen(
        [MPIEXEC, "-n", str(ranks), sys.executable, "-m", "mpi4py", *command],
        env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output
    return output


def test_on_1_2_4_and_7_ranks():
    # One after the other, so that the first compiles the kernels and seven do not at once.
    for ranks in (1, 2, 4, 7):
        assert f"{ranks} ranks: all well" in mpiexec(ranks, "-m", "tests.mpi_program")
