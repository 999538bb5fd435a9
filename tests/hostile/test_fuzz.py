"""Runs the mutation fuzz in a process of its own, whose memory is limited."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mpo_formats import MpoFile, reference
from tests.formats import tiny
from tests.hostile import fuzz

ROOT = Path(__file__).resolve().parents[2]


def fuzz_in_process(cases: int) -> str:
    """The report of a run; fails with the first failures where there are any."""
    folders = os.pathsep.join([str(ROOT), str(ROOT / "formats")])
    command = [sys.executable, "-m", "tests.hostile.fuzz", "--cases", str(cases)]
    environment = {**os.environ, "PYTHONPATH": folders}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def check(report: str, cases: int) -> None:
    """Every case was counted, and each outcome occurred."""
    assert f"fuzz: {cases} cases" in report
    assert "; 0 failures" in report
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (refused at \w+|valid)", report)}
    assert sum(counts.values()) == cases
    # A fuzz that never gets past the opening, or never gets refused, would prove little.
    assert min(counts["refused at opening"], counts["refused at verification"], counts["valid"] * 10) > cases / 20


def test_two_thousand_mutations(capsys: pytest.CaptureFixture[str]) -> None:
    report = fuzz_in_process(2000)
    with capsys.disabled():
        print(f"\n{report}")
    check(report, 2000)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_mutations(capsys: pytest.CaptureFixture[str]) -> None:
    report = fuzz_in_process(100_000)
    with capsys.disabled():
        print(f"\n{report}")
    check(report, 100_000)


def test_a_case_can_be_repeated() -> None:
    files = [fuzz.build(0, number) for number in range(200)]
    assert files[100:] == [fuzz.build(0, number) for number in range(100, 200)]
    assert len(set(files)) > 180
    assert files[:40] != [fuzz.build(1, number) for number in range(40)]


def test_the_harness_notices_what_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "valid.mpo"
    tiny.write(path, tiny.model())
    assert fuzz.read_all(path) == "valid"
    assert fuzz.read_all(write(tmp_path, path.read_bytes()[:-1])) == "refused at opening"
    assert fuzz.read_all(write(tmp_path, path.read_bytes()[:-1] + b"x")) == "refused at verification"
    monkeypatch.setattr(fuzz, "limit_memory", lambda: None)
    monkeypatch.setattr(fuzz, "build", lambda seed, number: path.read_bytes())
    assert fuzz.run(3).failures == []
    monkeypatch.setattr(fuzz, "SECONDS", 0.0)
    assert len(fuzz.run(3).failures) == 3
    monkeypatch.setattr(fuzz, "SECONDS", 100.0)
    monkeypatch.setattr(reference, "matrix", lambda *_, **__: 1 / 0)
    assert fuzz.run(1).failures == ["case 0 of seed 0: ZeroDivisionError: division by zero"]
    monkeypatch.undo()
    MpoFile(path).close()


def write(folder: Path, content: bytes) -> Path:
    """A file with that content."""
    path = folder / "changed.mpo"
    path.write_bytes(content)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces a limit of the address space")
def test_memory_is_limited() -> None:
    code = "from tests.hostile import fuzz; import numpy; fuzz.limit_memory(); numpy.zeros(fuzz.BYTES)"
    folders = os.pathsep.join([str(ROOT), str(ROOT / "formats")])
    environment = {**os.environ, "PYTHONPATH": folders}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert "MemoryError" in done.stderr
