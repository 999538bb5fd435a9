"""Work folders: an export that was stopped goes on, and gives the same bytes as one that was not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo_exporter import work as works
from mpo_exporter.calibrate import hessian, moments
from mpo_exporter.calibrate.store import Arrays
from mpo_exporter.effort import QUICK
from mpo_exporter.export import ExportTask, Listener, export
from mpo_exporter.plan.options import Options, Target
from mpo_exporter.source import open_source
from mpo_exporter.work import Work, work_folder, working
from mpo_formats import ConfigError, OutputError
from mpo_runtime.text.token_text import TokenText
from tests.helpers import VOCABULARY, granite_config, write_folder

KEY = {"model": "a"}
TEXT = TokenText("text", np.random.default_rng(0).integers(0, VOCABULARY, 2048), 0, "0" * 64)


class Stopped(Exception):
    """Ends an export as a signal would."""


def stopping(work: Work, after: int) -> Work:
    """The work, whose writing of the part of that number ends the run before or after it."""
    left, write = [after], work.write

    def counted(name: str, arrays: Arrays) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Stopped
        write(name, arrays)
        if left[0] == -1:
            raise Stopped

    work.write = counted  # type: ignore[method-assign]
    return work


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """A function that exports a small model with a work folder, and returns the file's bytes."""
    folder = write_folder(tmp_path / "model", granite_config(num_hidden_layers=3))
    monkeypatch.setattr(moments, "BETWEEN", 0.0)
    monkeypatch.setenv("MPO_CACHE", str(tmp_path / "cache"))

    def run(name: str = "out", stop: int = 0, log: list[str] | None = None, **task: Any) -> bytes:
        target = tmp_path / f"{name}.mpo"
        said = [] if log is None else log
        with open_source(folder) as source, working(work_folder(target), KEY, log=said.append) as work:
            given = {"calibration": TEXT, "windows": 4, **task}
            asked = ExportTask(target, Options(target=Target(size=60_000)), force=True, work=work, **given)
            if stop:
                stopping(work, stop)
            export(source, asked, Listener(log=said.append))
        return target.read_bytes()

    return run


def forget_measurements(folder: Path) -> None:
    for cache in (folder / "cache").glob("*"):
        cache.unlink()


@pytest.mark.parametrize("blind", [False, True])
def test_an_export_stopped_anywhere_goes_on_to_the_same_bytes(
    exported: Callable[..., bytes], tmp_path: Path, blind: bool
) -> None:
    """Stopped at every other part that is kept, and a second time at a later one."""
    task: dict[str, Any] = {"calibration": None, "effort": QUICK} if blind else {}
    whole, work = exported(**task), work_folder(tmp_path / "out.mpo")
    assert not work.exists()
    stops = 0
    for stop in range(1, 200, 2):
        forget_measurements(tmp_path)
        (tmp_path / "out.mpo").unlink()
        before = stops
        for after in (stop, stop + 30):
            try:
                exported(stop=after, **task)
            except Stopped:
                stops += 1
                assert work.exists() and not (tmp_path / "out.mpo").exists()
        assert exported(**task) == whole
        assert not work.exists()
        if stops == before:
            break
    assert stops > (8 if blind else 20)


@pytest.mark.parametrize("stop", [9, 16, 20])
def test_inputs_in_parts_go_on_to_the_same_bytes(
    exported: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Down projections [32, 48] in columns of 32 and 16; each is kept whole when its last part is fitted."""
    whole = exported("whole", windows=8)
    for name, value in {"WIDE": 40, "PART": 32, "UNIT": 16}.items():
        monkeypatch.setattr(hessian, name, value)
    monkeypatch.setattr(moments, "WIDE", 40)
    wanted = exported("parts", windows=8)
    assert wanted != whole and len(wanted) == len(whole)
    with pytest.raises(Stopped):
        exported(stop=stop, windows=8)
    assert exported(windows=8) == wanted


def test_damaged_parts_are_done_again(exported: Callable[..., bytes], tmp_path: Path) -> None:
    whole, draw, damaged = exported(), np.random.default_rng(1), 0
    for stop in range(6, 30, 3):
        forget_measurements(tmp_path)
        said = list[str]()
        with pytest.raises(Stopped):
            exported(stop=stop)
        parts = sorted(work_folder(tmp_path / "out.mpo").glob("*.part"))
        part = parts[int(draw.integers(len(parts)))]
        raw = bytearray(part.read_bytes())
        raw[-1] ^= 1
        part.write_bytes(raw)
        assert exported(log=said) == whole
        damaged += any("damaged" in line for line in said)
    assert damaged > 3


def test_the_work_of_another_request_is_dropped(tmp_path: Path) -> None:
    folder, said = tmp_path / "work", list[str]()
    with pytest.raises(KeyboardInterrupt), working(folder, KEY) as work:
        work.write("part", {"x": np.arange(3)})
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), working(folder, KEY, log=said.append) as work:
        np.testing.assert_array_equal((work.read("part") or {})["x"], np.arange(3))
        raise KeyboardInterrupt
    assert "going on" in said[0] and "goes on from there" in said[1]
    with working(folder, {"model": "b"}, log=said.append) as work:
        assert work.read("part") is None
    assert "model 'a', now 'b'" in said[2] and "starting again" in said[2]
    assert not folder.exists()


def test_a_folder_in_use_and_a_folder_of_something_else_are_refused(tmp_path: Path) -> None:
    with (
        working(tmp_path / "work", KEY),
        pytest.raises(OutputError, match="another export to the same file is running"),
    ):
        Work(tmp_path / "work", KEY)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(OutputError, match="found something else"):
        Work(tmp_path / "mine", KEY)
    assert (tmp_path / "mine" / "letter.txt").exists()


def test_work_is_removed_when_it_cannot_be_of_use(tmp_path: Path) -> None:
    for keep in (False, True):
        with pytest.raises(ConfigError), working(tmp_path / "work", KEY, keep=keep):
            raise ConfigError("wrong")
        assert (tmp_path / "work").exists() is keep
        with working(tmp_path / "work", KEY, keep=keep):
            pass
        assert (tmp_path / "work").exists() is keep


def test_a_full_disk_says_that_the_work_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="cannot keep the work done so far"), working(tmp_path / "work", KEY) as work:
        monkeypatch.setattr(works, "pack", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        work.write("part", {})
    assert (tmp_path / "work").exists()
