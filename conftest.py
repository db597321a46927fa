"""Doctests of modules whose framework is not installed (extra `peers`) are left out."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("jax") else ["fastce/jax.py"]
