"""The CPUs that a process may use: cores, and the quotas of control groups in both versions, as containers set them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mpo_runtime import loading, machine, native
from mpo_runtime.cli.main import app
from mpo_runtime.machine import cpu_quota, usable_cpus


def system(tmp_path: Path, groups: str, mounts: list[str], files: dict[str, str]) -> Path:
    """A /proc/self and its control groups; ROOT in a mount stands for the folder."""
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "cgroup").write_text(groups)
    rows = [f"{30 + index} 23 0:28 {mount}" for index, mount in enumerate(mounts)]
    (tmp_path / "mountinfo").write_text("\n".join(rows).replace("ROOT", str(tmp_path)) + "\n")
    return tmp_path


V2 = "/ ROOT/fs rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "/ ROOT/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct"
CASES: dict[str, tuple[str, list[str], dict[str, str], float | None]] = {
    "version 2, in a container": ("0::/\n", [V2], {"fs/cpu.max": "150000 100000\n"}, 1.5),
    "version 2, without a limit": ("0::/\n", [V2], {"fs/cpu.max": "max 100000\n"}, None),
    "version 2, a service": (
        "0::/system/x\n",
        [V2],
        {"fs/system/x/cpu.max": "200000 100000", "fs/cpu.max": "max 1"},
        2.0,
    ),
    "version 2, a parent's limit": (
        "0::/a/b\n",
        [V2],
        {"fs/a/b/cpu.max": "400000 100000", "fs/a/cpu.max": "50000 100000"},
        0.5,
    ),
    "version 2, seen from outside": (
        "0::/docker/1/x\n",
        ["/docker/1 ROOT/fs rw - cgroup2 cgroup2 rw"],
        {"fs/x/cpu.max": "300000 100000"},
        3.0,
    ),
    "version 2, above the own root": ("0::/../..\n", [V2], {"fs/cpu.max": "100000 100000"}, 1.0),
    "version 1": (
        "5:memory:/\n4:cpu,cpuacct:/job\n",
        ["/ ROOT/memory rw - cgroup cgroup rw,memory", V1],
        {"cpu/job/cpu.cfs_quota_us": "100000\n", "cpu/job/cpu.cfs_period_us": "50000\n"},
        2.0,
    ),
    "version 1, in a container": (
        "4:cpu,cpuacct:/docker/0123\n",
        ["/docker/0123 ROOT/cpu ro - cgroup cgroup rw,cpu,cpuacct"],
        {"cpu/cpu.cfs_quota_us": "75000", "cpu/cpu.cfs_period_us": "100000"},
        0.75,
    ),
    "version 1, without a limit": (
        "4:cpu:/\n",
        [V1],
        {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        None,
    ),
    "both versions": (
        "1:cpu:/\n0::/\n",
        [V1, V2],
        {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"},
        1.0,
    ),
    "damaged": ("4:cpu:/\nx\n", [V1, "x", ""], {"cpu/cpu.cfs_quota_us": "?", "cpu/cpu.cfs_period_us": "0"}, None),
    "nothing": ("", [], {}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_quotas(tmp_path: Path, case: str) -> None:
    groups, mounts, files, expected = CASES[case]
    assert cpu_quota(system(tmp_path, groups, mounts, files)) == expected


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "absent") is None


@pytest.mark.parametrize(("quota", "expected"), [(None, 4), (0.5, 1), (1.0, 1), (1.9, 1), (3.0, 3), (64.0, 4)])
def test_the_quota_bounds_the_cores(monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int) -> None:
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 7}, raising=False)
    assert usable_cpus() == expected
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert usable_cpus() == expected


def test_torch_starts_with_the_usable_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        monkeypatch.setattr(loading, "usable_cpus", lambda: 1)
        loading._heed_quota.cache_clear()
        loading.set_threads(None)
        assert torch.get_num_threads() == 1
        loading.set_threads(3)  # asked for: the quota has no say
        loading.set_threads(None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
def test_the_native_kernels_start_with_the_usable_cpus() -> None:
    code = (
        "from mpo_runtime import machine; machine.cpu_quota = lambda: 1.0\n"
        "from mpo_runtime import native; print(native.active()['threads'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MPO_THREADS"}
    for threads, expected in ((None, "1"), ("3", "3"), ("", "1")):
        chosen = environment if threads is None else {**environment, "MPO_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", code], env=chosen, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_info_without_a_file_shows_the_machine() -> None:
    words = CliRunner().invoke(app, ["info"])
    assert words.exit_code == 0
    for part in (machine.cpu_name(), f"{usable_cpus()} of", "available", *native.active().values()):
        assert part in words.stdout
    facts = json.loads(CliRunner().invoke(app, ["info", "--json"]).stdout)
    assert facts["usable_cpus"] == usable_cpus() and facts["cpu"] == machine.cpu_name()
    assert facts["backend"]["native"] == native.active()["native"]
    assert facts["memory_available"] > 0
