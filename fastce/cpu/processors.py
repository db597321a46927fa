"""How many processors this process may use: its affinity, and the quotas of its control groups."""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available(process: Path = Path("/proc/self")) -> int:
    """Processors that may be used: those of the affinity, or as many as a quota makes up."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, min([count, *(math.ceil(quota) for quota in _quotas(process))]))


def _quotas(process: Path) -> Iterator[float]:
    """Processors' worth of time that control groups grant: the group itself, and all above it."""
    for folder in _groups(process):
        for time in (_cpu_max(folder), _cfs(folder)):
            if time is not None and time[0] > 0 and time[1] > 0:
                yield time[0] / time[1]


def _cpu_max(folder: Path) -> tuple[int, int] | None:
    """Quota and period of version 2."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota), int(period)
    except (OSError, ValueError):  # none, or "max": no quota
        return None


def _cfs(folder: Path) -> tuple[int, int] | None:
    """Quota and period of version 1; -1 is no quota."""
    try:
        quota, period = (
            int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
        )
    except (OSError, ValueError):
        return None
    return quota, period


def _groups(process: Path) -> Iterator[Path]:
    """The folders of the groups that the process is in and of those above, as far as mounted."""
    try:
        memberships = (process / "cgroup").read_text().splitlines()
        mounts = (process / "mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return
    paths: dict[str, PurePosixPath] = {}  # of the group, by its controllers; version 2 has none
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        paths["cpu" if "cpu" in controllers.split(",") else controllers] = PurePosixPath(path)
    for line in mounts:
        fields, _, source = line.partition(" - ")
        root, mounted = (field.encode().decode("unicode_escape") for field in fields.split()[3:5])
        kind, *_, options = source.split()
        first = kind == "cgroup" and "cpu" in options.split(",")
        group = paths.get("cpu" if first else "") if first or kind == "cgroup2" else None
        if group is None:
            continue
        # In a container the path may be that outside, of which the root is what is mounted.
        below = group.relative_to(root) if group.is_relative_to(root) else PurePosixPath()
        for part in (below, *below.parents):
            yield Path(mounted) / part
