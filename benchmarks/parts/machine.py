"""What a benchmark ran on: a description of the machine, and the commit."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FLAGS = ("avx2", "f16c", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "asimddp")


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine and the commit that figures belong to."""

    cpu: str
    cores: int
    flags: tuple[str, ...]
    memory_gib: float
    system: str
    python: str
    commit: str


def command_line() -> str:
    """The command that is running, for its results: paths are shortened to their names, which say nothing of the machine."""

    def is_path(word: str) -> bool:
        return "/" in word and Path(word).parent.exists()  # `4/h` in a list of plans is none

    return shlex.join(["python", *(Path(word).name if is_path(word) else word for word in sys.argv)])


def describe_machine() -> Machine:
    """Reads it from the system; a dirty tree marks the commit with `+`."""
    content = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in content.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return Machine(
        cpu=fields.get("model name") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        flags=tuple(flag for flag in FLAGS if flag in flags),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        commit=git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else ""),
    )


def device_name(device: str) -> str:
    """The processor that a torch device is, in words."""
    if not device.startswith("cuda"):
        return describe_machine().cpu
    import torch

    return torch.cuda.get_device_name(device)


def git(*words: str) -> str:
    """One line of git's answer about this repository, or nothing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
