"""Memory that is available to this process, and the most that it has used."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mpo_formats.errors import ConfigError

STATUS = Path("/proc/self/status")


def available_memory() -> int:
    """Bytes that can be allocated without swapping, within the limit of the control group; 4 GiB where it is unknown."""
    available = 4 << 30
    table = Path("/proc/meminfo")
    if table.exists():
        rows = dict(line.split(":", 1) for line in table.read_text().splitlines() if ":" in line)
        available = int(rows["MemAvailable"].split()[0]) * 1024
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        available = min(available, max(0, int(text) - int(used.read_text())))
    return available


def require_memory(name: str, weights: int, cache: int, remedy: str, available: int | None = None) -> None:
    """Refuses a model that does not fit, before anything is loaded.

    Args:
        name: of the model.
        weights, cache: bytes of its weights, and of the KV cache of one full context.
        remedy: what the user can do.
        available: bytes of the device that are free; None for this machine's memory.

    Raises:
        ConfigError: where they are more than is available.
    """
    available = available_memory() if available is None else available
    if weights + cache > available:
        raise ConfigError(
            f"{name}: needs {(weights + cache) / 1e9:.2f} GB of memory ({weights / 1e9:.2f} GB of weights, {cache / 1e9:.2f} GB "
            f"of KV cache), and {available / 1e9:.2f} GB are available; {remedy}"
        )


def peak_memory() -> int:
    """The largest resident size of this program so far, in bytes; 0 on systems that do not report it.

    On Linux it is read from /proc: the figure of `getrusage` survives `exec` and would include the parent process.
    """
    if STATUS.exists():
        rows = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
        if "VmHWM" in rows:
            return int(rows["VmHWM"].split()[0]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
