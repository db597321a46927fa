"""Machine code for the CPU.

Its rooms are imported when they are first asked for: numba is no part of `import fastce`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastce.cpu import calls as calls
    from fastce.cpu import small as small


def __getattr__(name: str) -> Any:
    # Once imported a room is an attribute, so that a call finds it without an import statement,
    # which takes 0.3 microseconds.
    if name not in ("calls", "small"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
