"""Which modules of the package are looked through for examples."""

import importlib.util

# They cannot be imported without the extra.
collect_ignore = [] if importlib.util.find_spec("numba_cuda") else ["fastce/cuda"]
