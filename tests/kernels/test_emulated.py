"""The instruction sets that this CPU cannot run, against the generic one: emulated x86 (SIMDe), and AArch64 under qemu."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "mpo_runtime" / "csrc"
FLAGS = ("-std=c++17", "-w", "-ffp-contract=off", f"-I{SOURCES}")


def build(compiler: str, flags: tuple[str, ...], folder: Path) -> Path:
    """Compile the parity program with all kernels and operations, two sources at a time."""
    sources = [*SOURCES.glob("*.cpp"), *SOURCES.glob("kernels/*.cpp"), *SOURCES.glob("ops/*.cpp")]
    sources += [
        path for path in SOURCES.glob("fit/*.cpp") if path.stem not in ("rounding", "product")
    ]  # which need threads
    sources += [HERE / "parity.cpp"]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.parent.name}-{source.stem}.o"
        subprocess.run([compiler, *FLAGS, *flags, "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as workers:
        objects = list(workers.map(compile_one, sources))
    program = folder / "parity"
    subprocess.run([compiler, *flags, *map(str, objects), "-o", str(program)], check=True)
    return program


def lines_of(command: list[str]) -> list[str]:
    """Run the parity program; return what it prints, the summary last."""
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    return found.stdout.splitlines()


def cpu_flags() -> tuple[str, ...]:
    """Let SIMDe use AVX2 where this machine has it: fewer instructions to compile and to run."""
    information = Path("/proc/cpuinfo")
    has = information.read_text().split() if information.exists() else []
    return ("-mavx2", "-mfma", "-mf16c") if {"avx2", "fma", "f16c"} <= set(has) else ()


@pytest.mark.long
def test_avx512_and_amx_emulated(tmp_path: Path) -> None:
    """All levels of x86: equal bit for bit where all values are small integers, to 1e-5 elsewhere."""
    compiler = shutil.which("g++")
    if compiler is None or os.uname().machine != "x86_64":
        pytest.skip("the emulation of AVX-512 and AMX is built with g++ on x86-64")
    if not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("SIMDe is absent; install libsimde-dev to test the AVX-512 and AMX kernels on any CPU")
    emulation = f'-DMPO_EMULATED_INTRINSICS="{HERE / "emulation.hpp"}"'
    program = build(compiler, ("-O0", *cpu_flags(), emulation), tmp_path)
    assert lines_of([str(program), "1"]) == ["222 cases, 0 differences; amx vbmi avx512 avx2 generic"]


@pytest.mark.long
def test_neon_under_qemu(tmp_path: Path) -> None:
    """The AArch64 level, cross-compiled."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("g++-aarch64-linux-gnu or qemu-user is absent; install both to test the NEON kernels on any CPU")
    program = build(compiler, ("-O1", "-static"), tmp_path)
    assert lines_of([emulator, str(program), "1"]) == ["222 cases, 0 differences; neon generic"]
