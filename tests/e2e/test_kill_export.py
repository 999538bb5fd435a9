"""Killed at random moments, a real export leaves the target absent, the old file, or a complete new one; and it goes on."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from mpo_formats import MpoFile
from tests.e2e.test_kill import ROOT, kill_once
from tests.helpers import granite_config, write_folder

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "formats", "exporter")),
    "OMP_NUM_THREADS": "1",  # a fork must not find another thread in the middle of something
    "OPENBLAS_NUM_THREADS": "1",
}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and POSIX signals")


def round_of(target: Path) -> int | None:
    """The round that wrote the target, None where it is absent; fails when it is not a complete file."""
    if not target.exists():
        return None
    with MpoFile(target, verify=True) as file:
        return int(file.spec.provenance.options["chi"])


def kill_exports(folder: Path, kills: int) -> str:
    """Kills exports at random moments; every third time there is no old file. Returns the counts."""
    write_folder(folder / "model", granite_config())
    (folder / "out").mkdir()
    target = folder / "out" / "model.mpo"
    draw, counts, before = random.Random(5), Counter[str](), None
    command = [sys.executable, "-m", "tests.e2e.export_child", str(folder / "model"), str(target)]
    with subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        for kill in range(kills):
            if kill % 3 == 0:
                target.unlink(missing_ok=True)
                before = None
            first = 1_000_000 * (kill + 1)
            kill_once(server, first, draw.uniform(0, 0.25))
            after = round_of(target)
            assert after == before or (after is not None and after >= first)
            counts["absent" if after is None else "old" if after == before else "new"] += 1
            before = after
        server.communicate()
    return f"{kills} kills during export: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def test_kills_during_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = kill_exports(tmp_path, 12)
    with capsys.disabled():
        print(f"\n{report}")


@pytest.mark.long
def test_two_hundred_kills_during_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = kill_exports(tmp_path, 200)
    with capsys.disabled():
        print(f"\n{report}")
    # Kills that all came before or after the writing would prove nothing.
    assert all(name in report for name in ("absent", "old", "new"))


@pytest.mark.long
def test_an_export_of_granite_nano_killed_twenty_times_gives_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def export(name: str, seconds: float | None) -> bool:
        """Runs the program, and kills it after some seconds; whether it was finished."""
        words = [sys.executable, "-m", "mpo_exporter.cli", "demo", "--force", "--measure-tokens", "0", "--out", name]
        environment = {**os.environ, "MPO_CACHE": str(tmp_path / f"cache-{name}")}
        with subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=log, stderr=log) as program:
            try:
                return program.wait(seconds) == 0
            except subprocess.TimeoutExpired:
                program.kill()
                return False

    draw, longest, kills = random.Random(7), 0.0, 0
    with (tmp_path / "log.txt").open("a", encoding="utf-8") as log:
        start = time.monotonic()
        assert export("whole.mpo", None)
        longest = time.monotonic() - start
        while kills < 20:
            # Long enough that most runs keep something, short enough that many moments of the export are hit.
            if export("killed.mpo", draw.uniform(0.05, 0.35) * longest):
                (tmp_path / "killed.mpo").unlink()
                for cache in (tmp_path / "cache-killed.mpo").iterdir():
                    cache.unlink()
            else:
                kills += 1
        assert export("killed.mpo", None)
    said = (tmp_path / "log.txt").read_text(encoding="utf-8")
    with capsys.disabled():
        print(
            f"\n20 kills, {said.count('going on with the work')} runs went on with the work of another, {longest:.0f} s whole"
        )
    assert said.count("going on with the work") >= 10
    assert (tmp_path / "killed.mpo").read_bytes() == (tmp_path / "whole.mpo").read_bytes()
    assert not list(tmp_path.glob(".*"))
