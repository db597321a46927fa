"""The intrinsics of the machine at hand: a GPU's, or those of numba's simulator of one."""

from numba.cuda import config

if config.ENABLE_CUDASIM:
    from fastce.cuda.simulated import *  # noqa: F403
else:
    from fastce.cuda.memory import *  # noqa: F403
    from fastce.cuda.vector import *  # noqa: F403
