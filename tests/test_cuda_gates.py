"""CUDA kernels compile without a device, hold their rows in registers, and move 16 bytes at a time.

A few kernels here, chosen so that each line of the launch table, each dtype and each architecture
comes once; `cuda_gates` does them all.
"""

import importlib.util

import pytest

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from tests.cuda_gates import REGIMES, faults, gate, variant

KERNELS = [
    ("float32", "gradient", "tile", {}, (9, 0)),
    ("bfloat16", "gradient", "strided", {}, (8, 0)),
    ("float32", "gradient", "32 x 8", {}, (9, 0)),
    ("bfloat16", "gradient", "128 x 4", {}, (10, 0)),
    ("bfloat16", "gradient", "512 x 4", {}, (9, 0)),
    ("float16", "gradient", "512 x 2 shared", {}, (8, 0)),
    ("bfloat16", "gradient", "1024 x 2 shared", {"capped": True}, (9, 0)),
    ("float64", "loss", "1024 x 2 memory", {"spread": True}, (9, 0)),
]  # fmt: skip


@pytest.mark.parametrize("dtype, task, regime, options, capability", KERNELS)
def test_kernel(dtype, task, regime, options, capability):
    kernel = variant(dtype, task, REGIMES[regime], **options)
    found = gate(kernel, capability)
    print(kernel, found)
    assert faults(kernel, found) == []
