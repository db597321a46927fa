"""The kernels from C, on threads of its own: compiles capi.c and compares with NumPy in, NumPy out.

python examples/capi.py        # needs a C compiler called cc
"""

import ctypes
import subprocess
import tempfile
from pathlib import Path

import numpy as np

import fastce
import fastce.capi


def library(folder):
    """The shared library of capi.c, loaded."""
    source, target = Path(__file__).with_name("capi.c"), Path(folder) / "capi.so"
    include = fastce.capi.header().parent
    command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    subprocess.run([*command, f"-I{include}", source, "-o", target], check=True)
    loaded = ctypes.CDLL(str(target))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    loaded.losses_and_grads.argtypes = [pointer, pointer, size, size, pointer, pointer, pointer]
    loaded.losses_and_grads.restype = size
    return loaded


def main():
    """Compare the losses and gradients of C and of NumPy, bit by bit."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((1000, 500), np.float32)
    targets = rng.integers(0, 500, 1000)
    weight = rng.random(500, np.float32)
    want, want_grad = fastce.cross_entropy_and_grad(
        logits, targets, weight=weight, label_smoothing=0.1, reduction="none"
    )
    losses = np.empty(1000, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        status = library(folder).losses_and_grads(
            fastce.capi.address("float32", grad=True, weight=True), logits.ctypes.data,
            *logits.shape, targets.ctypes.data, weight.ctypes.data, losses.ctypes.data,
        )  # fmt: skip
    assert status == 0
    print("same losses:", np.array_equal(losses, want))
    print("same gradients, in place:", np.array_equal(logits, want_grad))


if __name__ == "__main__":
    main()
