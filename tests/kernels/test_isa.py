"""The choice of an instruction set: lowered by name, never raised, wrong names reported."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

native: Any = pytest.importorskip("mpo_runtime._native", reason="the native kernels were not built")

SHOW = "import mpo_runtime._native as native; print(native.active_isa())"


def started_with(level: str) -> subprocess.CompletedProcess[str]:
    """Ask a new process, in which MPO_ISA is set, for its level."""
    environment = {**os.environ, "MPO_ISA": level, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True, check=False)


def test_levels_are_lowered_by_name() -> None:
    """Each supported level can be chosen; the last is generic; others change nothing."""
    levels = native.supported_isas()
    assert levels[-1] == "generic"
    before = native.active_isa()
    try:
        for level in levels:
            assert native.set_isa(level)
            assert native.active_isa() == level
        missing = [level for level in ("amx", "vbmi", "avx512", "avx2", "neon", "mmx", "") if level not in levels]
        assert not any(native.set_isa(level) for level in missing)
        assert native.active_isa() == levels[-1]
        assert native.set_isa("auto")
        assert native.active_isa() == levels[0]
    finally:
        native.set_isa(before)


@pytest.mark.parametrize("level", native.supported_isas())
def test_environment_lowers(level: str) -> None:
    """MPO_ISA is what a user sets to rule a level out."""
    assert started_with(level).stdout.strip() == level


def test_unknown_level_in_the_environment() -> None:
    """The message names the variable, its value and what this machine has."""
    found = started_with("avx9")
    assert found.returncode != 0
    assert "MPO_ISA is 'avx9', expected one of auto, " in found.stderr
    assert "generic on this machine" in found.stderr
