"""``fastce warmup --cuda``: compile the usual CUDA kernels ahead, with or without a device."""

import re
import time
from collections.abc import Sequence

from . import terminal

_TASKS = ("loss", "gradient")


def warm(architectures: Sequence[str], dtypes: Sequence[str]) -> None:
    """Compile what hard targets without options need, for rows of any length."""
    try:
        from fastce.cuda import kernels, plan
    except ImportError as error:
        raise terminal.Failure(str(error)) from error
    capabilities = [_capability(name) for name in architectures] or [_of_device()]
    usual: list[kernels.Kernel] = [
        kernels.Sum(name, double=False, last=last)
        for name in ("targets", "losses")
        for last in (False, True)
    ]
    usual += dict.fromkeys(  # clusters of any size are launches of one kernel
        plan.variant(d, t, runs) for d in dtypes for t in _TASKS for runs in plan.TABLE
    )
    usual += [plan.Elements(d, t, labels=d) for d in dtypes for t in _TASKS]
    usual += [kernels.Sum("parts", double=False, last=last) for last in (False, True)]
    rows = []
    with terminal.progress("warmup", len(capabilities) * len(usual)) as advance:
        for kernel in usual:
            seconds = []
            for capability in capabilities:
                began = time.perf_counter()
                if kernels.exists(kernel, capability):
                    kernels.code(kernel, capability)
                    seconds.append(f"{time.perf_counter() - began:.2f}")
                else:
                    seconds.append("")
                advance(1)
            rows.append((kernels.name_of(kernel), *seconds))
    names = ["sm_{}{}".format(*capability) for capability in capabilities]
    terminal.table(("seconds for the kernel", *names), rows)


def _capability(name: str) -> tuple[int, int]:
    found = re.fullmatch(r"sm_(\d+)(\d)", name)
    if found is None:
        raise terminal.Failure(f"--cuda: expected architectures such as sm_90, got {name!r}")
    return int(found[1]), int(found[2])


def _of_device() -> tuple[int, int]:
    from fastce.cuda import driver

    try:
        return driver.device(0).capability
    except (ImportError, RuntimeError) as error:
        raise terminal.Failure(f"{error}; name architectures, such as --cuda sm_90") from error
