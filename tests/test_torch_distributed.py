"""`fastce.torch.distributed` with gloo: the results of one process, and no rank left waiting."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SECONDS = 500


def run(program, sizes, **environment):
    process = subprocess.Popen(
        [sys.executable, "-m", f"tests.torch_{program}_program", *map(str, sizes)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:  # a hang: all ranks go
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output
    assert all(f"{size} ranks: all well" in output for size in sizes)


@pytest.mark.parametrize("program", ["distributed", "dtensor"])
def test_on_1_2_and_4_ranks(program):
    run(program, (1, 2, 4))


@pytest.mark.needs("test-cuda")
def test_tensors_on_simulated_devices():
    run("cuda", (2, 4), NUMBA_ENABLE_CUDASIM="1")


def test_a_group_for_devices_alone(monkeypatch):
    """What is exchanged of tensors on the CPU is there, and nobody waits to find that out."""
    from fastce.torch.distributed import data_parallel_cross_entropy

    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: "cuda:nccl")
    with pytest.raises(ValueError, match=r"group: .*cpu:gloo,cuda:nccl.*, got cuda:nccl"):
        data_parallel_cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]))
