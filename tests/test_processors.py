"""How many processors there are to use: the quotas of control groups count as affinity does."""

import os

import pytest

from fastce.cpu.processors import available

V2 = "30 25 0:26 {root} {mount} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "31 25 0:27 {root} {mount} rw,nosuid shared:5 - cgroup cgroup rw,cpu,cpuacct\n"
MEMORY = "32 25 0:28 / {mount} rw,nosuid shared:6 - cgroup cgroup rw,memory\n"

# mounts, memberships, the root of what is mounted, files, processors out of 64
CASES = {
    "no control groups": (None, None, "/", {}, 64),
    "v2, none set": (V2, "0::/app", "/", {"app/cpu.max": "max 100000"}, 64),
    "v2": (V2, "0::/app", "/", {"app/cpu.max": "200000 100000"}, 2),
    "v2, a part of a processor": (V2, "0::/app", "/", {"app/cpu.max": "50000 100000"}, 1),
    "v2, one and a half": (V2, "0::/app", "/", {"app/cpu.max": "150000 100000"}, 2),
    "v2, more than there are": (V2, "0::/app", "/", {"app/cpu.max": "99900000 100000"}, 64),
    "v2, the group above": (
        V2, "0::/pod/app", "/",
        {"pod/cpu.max": "300000 100000", "pod/app/cpu.max": "max 100000"}, 3,
    ),
    "v2, the smallest along the path": (
        V2, "0::/a/b/c", "/",
        {"a/cpu.max": "800000 100000", "a/b/cpu.max": "400000 100000",
         "a/b/c/cpu.max": "600000 100000", "other/cpu.max": "100000 100000"}, 4,
    ),
    "v2, at the root of a namespace": (V2, "0::/", "/", {"cpu.max": "500000 100000"}, 5),
    "v2, the path is that outside": (
        V2, "0::/docker/abc", "/docker/abc", {"cpu.max": "600000 100000"}, 6,
    ),
    "v2, below what is mounted": (
        V2, "0::/docker/abc/app", "/docker/abc",
        {"cpu.max": "600000 100000", "app/cpu.max": "200000 100000"}, 2,
    ),
    "v2, damaged": (V2, "0::/app", "/", {"app/cpu.max": "nonsense"}, 64),
    "v2, of no time": (V2, "0::/app", "/", {"app/cpu.max": "0 0"}, 64),
    "v1": (
        V1, "4:cpu,cpuacct:/app", "/",
        {"app/cpu.cfs_quota_us": "250000", "app/cpu.cfs_period_us": "100000"}, 3,
    ),
    "v1, none set": (
        V1, "4:cpu,cpuacct:/app", "/",
        {"app/cpu.cfs_quota_us": "-1", "app/cpu.cfs_period_us": "100000"}, 64,
    ),
    "v1, the group above": (
        V1, "4:cpuacct,cpu:/pod/app\n5:memory:/x", "/",
        {"pod/cpu.cfs_quota_us": "200000", "pod/cpu.cfs_period_us": "100000",
         "pod/app/cpu.cfs_quota_us": "-1", "pod/app/cpu.cfs_period_us": "100000"}, 2,
    ),
    "v1, in a container": (
        V1, "4:cpu,cpuacct:/docker/abc", "/docker/abc",
        {"cpu.cfs_quota_us": "700000", "cpu.cfs_period_us": "100000"}, 7,
    ),
    "of another controller": (
        MEMORY, "4:cpu:/app\n5:memory:/app", "/",
        {"app/cpu.cfs_quota_us": "100000", "app/cpu.cfs_period_us": "100000"}, 64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_available(case, tmp_path, monkeypatch):
    mounts, memberships, root, files, want = CASES[case]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    mount, process = tmp_path / "with space", tmp_path / "process"
    process.mkdir()
    if mounts is not None:
        escaped = str(mount).replace(" ", r"\040")
        (process / "mountinfo").write_text(mounts.format(mount=escaped, root=root))
        (process / "cgroup").write_text(f"{memberships}\n")
    for name, content in files.items():
        path = mount / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    assert available(process) == want


def test_affinity_counts_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3), raising=False)
    assert available(tmp_path) == 3


def test_where_there_is_no_affinity(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available(tmp_path) == 1
