"""Doctests of modules whose framework is not installed (extras `peers`, `cuda`) are left out."""

import importlib.util

_MODULES = {"torch": "fastce/torch", "jax": "fastce/jax.py", "numba_cuda": "fastce/cuda"}

collect_ignore = [
    module for framework, module in _MODULES.items() if not importlib.util.find_spec(framework)
]
