"""The two programs, run in this process as a user runs them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mpo_exporter.cli import main as exporter_cli
from mpo_runtime.cli import main as runtime_cli


@dataclass(frozen=True)
class Outcome:
    """What a program left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    def assert_error(self, program: str, *words: str, code: int = 1) -> None:
        """Exit code 1, nothing on standard output, and one line on standard error that has these words."""
        assert self.code == code, self
        assert len(self.err.splitlines()) == 1, self.err
        assert self.err.startswith(f"{program}: error: ")
        for word in words:
            assert word in self.err


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a program in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPO_HOME", str(tmp_path / "store"))

    def runner(program: str, *arguments: object) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        main = {"mpo-run": runtime_cli.main, "mpo-export": exporter_cli.main}[program]
        with pytest.raises(SystemExit) as stopped:
            main()
        return Outcome(int(stopped.value.code or 0), *capsys.readouterr())

    return runner
