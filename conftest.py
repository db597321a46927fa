"""What is not looked through for doctests: modules whose framework is not installed, and a device.

The frameworks come with the extras `peers` and `cuda`.
"""

import importlib.util

_MODULES = {
    "fastce/torch": "torch", "fastce/jax.py": "jax", "fastce/_jax_primitive.py": "jax",
    "fastce/cuda": "numba_cuda",
}  # fmt: skip

collect_ignore = [
    module for module, framework in _MODULES.items() if not importlib.util.find_spec(framework)
]
# Once imported, launches are those of the simulator for the rest of the process.
collect_ignore += ["tests/cuda_simulator.py", "tests/torch_cuda_program.py"]
