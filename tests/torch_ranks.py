"""Ranks of torch.distributed with gloo, for the programs that test it."""

import importlib
import multiprocessing
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import fastce


def _rank(number, size, file, module):
    torch.set_num_threads(1)
    fastce.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=number, world_size=size,
        timeout=timedelta(seconds=240),
    )  # fmt: skip
    importlib.import_module(module).program()
    dist.destroy_process_group()


def run_on_ranks(module):
    """Run the function `program` of a module on the numbers of ranks in the command line."""
    # Ranks are forked from a process that has imported everything and started no thread.
    multiprocessing.set_forkserver_preload([module])
    for size in map(int, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(
                _rank, (size, Path(folder) / "store", module), size, start_method="forkserver"
            )
        print(f"{size} ranks: all well")
