"""What is not looked through for doctests: modules whose framework is not installed, and a device.

The frameworks come with the extras `peers` and `cuda`.
"""

import importlib.util

_MODULES = {"torch": "fastce/torch", "jax": "fastce/jax.py", "numba_cuda": "fastce/cuda"}

collect_ignore = [
    module for framework, module in _MODULES.items() if not importlib.util.find_spec(framework)
]
# Once imported, launches are those of the simulator for the rest of the process.
collect_ignore.append("tests/cuda_simulator.py")
