"""The machine that this process runs on: its CPU, and how many of its cores the process may use."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

PROC, PROCESSORS = Path("/proc/self"), Path("/proc/cpuinfo")


def usable_cpus() -> int:
    """How many threads can run at once: the cores that the process may run on, within the CPU quota of its container.

    A quota of one and a half CPUs gives one: a second thread would be stopped for half of the time, and the first would wait
    for it.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = cpu_quota()
    return count if quota is None else max(1, min(count, int(quota)))


def cpu_quota(proc: Path = PROC) -> float | None:
    """The CPUs that control groups (`docker --cpus`, Kubernetes limits) let this process use; None without a limit.

    Reads version 1 (cpu.cfs_quota_us and cpu.cfs_period_us) and version 2 (cpu.max); a group's parents limit it, too.

    Args:
        proc: the folder of the process.
    """
    limits = [limit for group in _cpu_groups(proc) if (limit := _group_quota(group)) is not None]
    return min(limits, default=None)


def _cpu_groups(proc: Path) -> Iterator[Path]:
    """The folders of the control groups that the process is in and that count CPU time, and of their parents."""
    try:
        rows = (proc / "cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
        mounts = (proc / "mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux, or hidden
        return
    # 4:cpu,cpuacct:/docker/0123 in version 1, 0::/system.slice/x.service in version 2
    paths = {}
    for row in rows:
        _, _, rest = row.partition(":")
        controllers, _, path = rest.partition(":")
        paths["cgroup2" if not controllers else "cgroup" if "cpu" in controllers.split(",") else ""] = path
    for mount in mounts:
        # 36 35 98:0 ROOT MOUNT_POINT OPTIONS … - TYPE DEVICE SUPER_OPTIONS
        head, _, tail = mount.partition(" - ")
        fields, (kind, _, options) = head.split(" "), (*tail.split(" "), "", "", "")[:3]
        if kind not in paths or len(fields) < 5 or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        root, point = fields[3].rstrip("/"), Path(fields[4])
        own = paths[kind]
        # A container sees its own group as the root of the mount, whatever the path says that it has outside.
        inside = own[len(root) :] if own == root or own.startswith(f"{root}/") else ""
        steps = [part for part in inside.split("/") if part not in ("", "..")]
        yield from (point.joinpath(*steps[:count]) for count in range(len(steps), -1, -1))


def _group_quota(group: Path) -> float | None:
    """The CPUs that one control group allows, None where it sets no limit."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except (OSError, ValueError):  # no such file, or "max"
        return None


def cpu_name() -> str:
    """The processor's name as the system gives it, else its architecture."""
    try:
        rows = PROCESSORS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        rows = []
    names = [row.partition(":")[2].strip() for row in rows if row.startswith("model name")]
    return names[0] if names and names[0] else platform.processor() or platform.machine()


def system_name() -> str:
    """Operating system, architecture and Python, in a few words."""
    return f"{platform.system()} {platform.machine()}, Python {sys.version.partition(' ')[0]}"
