"""CUDA kernels compile without a device, hold their rows in registers, and move 16 bytes at a time.

A few kernels here, chosen so that each line of the launch table, each dtype and each architecture
comes once; `cuda_gates` does them all.
"""

import pytest

from fastce.cuda.kernels import OfRecords
from fastce.cuda.plan import Elements, variant
from tests.cuda_gates import REGIMES, faults, gate

KERNELS = [
    ("float32", "gradient", "tile", {}, (9, 0)),
    ("bfloat16", "gradient", "strided", {}, (8, 0)),
    ("float32", "gradient", "32 x 8", {}, (9, 0)),
    ("bfloat16", "gradient", "128 x 4", {}, (10, 0)),
    ("bfloat16", "gradient", "512 x 4", {}, (9, 0)),
    ("float16", "gradient", "512 x 2 shared", {}, (8, 0)),
    ("bfloat16", "gradient", "1024 x 2 shared", {"capped": True}, (9, 0)),
    ("float64", "loss", "1024 x 2 memory", {"spread": True}, (9, 0)),
    ("bfloat16", "gradient", "512 x 2 shared cluster", {}, (9, 0)),
    ("float32", "gradient", "1024 x 1 shared cluster", {"spread": True}, (10, 0)),
    ("float16", "loss", "1024 x 2 memory cluster", {}, (9, 0)),
    ("bfloat16", "partial", "512 x 2 shared cluster", {}, (9, 0)),
    ("float32", "slice_gradient", "256 x 4", {}, (10, 0)),
    ("bfloat16", "slice_gradient", "256 x 2", {"spread": True, "soft": "float32"}, (8, 0)),
]  # fmt: skip


@pytest.mark.parametrize("dtype, task, regime, options, capability", KERNELS)
def test_kernel(dtype, task, regime, options, capability):
    runs = REGIMES[regime]
    kernel = variant(dtype, task, runs, **options)
    found = gate(kernel, capability)
    print(kernel, found)
    assert faults(kernel, runs.registers, found) == []


@pytest.mark.parametrize(
    "kernel, capability",
    [
        (Elements("bfloat16", "gradient", "bfloat16"), (9, 0)),
        (Elements("float32", "gradient", "bool", plain=False), (10, 0)),
        (Elements("float64", "loss", "float64", vectors=False, plain=False), (8, 0)),
    ],
)
def test_kernel_over_elements(kernel, capability):
    found = gate(kernel, capability)
    print(kernel, found)
    assert faults(kernel, kernel.registers, found) == []


@pytest.mark.parametrize("name", ["merge", "finish", "total", "settle"])
def test_kernel_over_records(name):
    kernel = OfRecords(name, labelled=True)
    found = gate(kernel, (9, 0))
    print(kernel, found)
    assert found.spills == 0
    assert found.registers <= 128


def test_device_functions_in_kernels_of_ones_own():
    from numba import cuda
    from numba.cuda import types

    from tests.cuda_user import gradients_of_rows, losses_of_rows

    z, y, numbers = types.float32[:, :], types.int64[:], types.float64[:]
    options = (numbers, types.float64, types.float64, types.float64)
    for kernel, signature in (
        (losses_of_rows, (z, y, numbers)), (gradients_of_rows, (z, y, *options, numbers, z)),
    ):  # fmt: skip
        text, _ = cuda.compile_ptx(kernel, types.void(*signature), cc=(9, 0))
        assert ".visible .entry" in text
        assert ".local" not in text
