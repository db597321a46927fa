"""Doctests of modules whose framework is not installed (extra `peers`) are left out."""

import importlib.util

_MODULES = {"torch": "fastce/torch", "jax": "fastce/jax.py"}

collect_ignore = [
    module for framework, module in _MODULES.items() if not importlib.util.find_spec(framework)
]
