"""benchmarks/gpu.py runs from end to end, on tiny sizes in Triton's interpreter; what it would measure is not looked at."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install 'mpo-runtime[gpu]'")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.long


def test_every_section_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry", "--work", str(tmp_path), "--minutes", "60"]
    command += ["--sections", ",".join(gpu.SECTIONS)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    table = done.stdout.split("no figures of a GPU")[1]
    for section in gpu.SECTIONS:
        assert f"| {section} |" in table
    bars = [line for line in table.splitlines() if line.startswith(("| parity |", "| agreement |"))]
    assert bars and all(line.endswith("| yes |") for line in bars)
    assert not list(Path(gpu.SHIPPED.parent).glob("*.tmp")) and (tmp_path / "tiles.json").exists()


def test_a_section_that_fails_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: gpu.Run) -> Iterator[gpu.Row]:
        yield {"what": "before", "value": 1.0, "unit": "s", "bar": 2.0}
        raise RuntimeError("no luck\nat all")

    monkeypatch.setitem(gpu.SECTIONS, "decode", broken)
    options = {"dry": True, "work": tmp_path, "rounds": 1, "size": "8b", "minutes": 60.0}
    run = gpu.Run(argparse.Namespace(**options))
    rows = gpu.measured(run, ["decode", "card"])
    assert [row["section"] for row in rows] == ["decode", "decode", "card", "card"]
    assert rows[1]["what"] == "failed: RuntimeError: no luck"
    assert gpu.reached({"value": 1.0, "bar": 2.0}) is False and gpu.reached({"value": 1.0, "most": 2.0}) is True
    run.arguments.minutes = -1.0
    assert "not begun" in gpu.measured(run, ["card"])[0]["what"]
