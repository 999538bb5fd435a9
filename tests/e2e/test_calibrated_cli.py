"""mpo-export --calib: which plans calibrate on what, and what cannot be calibrated on."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpo_exporter.calibrate.windows import COUNT
from mpo_exporter.cli import CALIBRATION_WINDOWS
from mpo_formats import MpoFile
from tests.e2e.conftest import Run
from tests.helpers import write_folder

WORDS = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "little")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "calib.txt"
    path.write_text(20 * WORDS)
    return path


@pytest.mark.parametrize(("options", "used"), [
    (("--plan", "auto"), "calibration.jsonl"),
    (("--plan", "auto", "--calib", "TEXT"), "calib.txt"),
    (("--plan", "auto", "--calib-windows", 0), None),
    (("--plan", "int4"), None),
    (("--plan", "int4", "--calib", "TEXT"), "calib.txt"),
    (("--plan", "paper"), None),
    (("--plan", "dense", "--calib", "TEXT"), None),
])  # fmt: skip
def test_which_plan_is_fitted_to_which_text(
    run: Run, folder: Path, text: Path, options: tuple[object, ...], used: str | None
) -> None:
    given = [text if option == "TEXT" else option for option in options]
    windows = [] if "--calib-windows" in options else ["--calib-windows", 8]
    done = run("mpo-export", folder, *given, *windows, "--measure-tokens", 0, "--out", "out.mpo")
    assert done.code == 0, done
    assert (f"fitted to the calibration text {used}" if used else "fitted to the weights alone") in done.out
    with MpoFile("out.mpo") as file:
        file.verify()
        assert file.spec.provenance.options.get("calibration") == used
        assert (file.spec.provenance.calibration_sha256 is None) == (used is None)


def test_calibration_that_cannot_be_had(run: Run, folder: Path, tmp_path: Path) -> None:
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("\n")
    short.write_text("Too short.")
    for arguments, words in (
        (("--calib", empty), ("empty.txt", "holds no text")),
        (("--calib", short), ("short.txt", "too few to calibrate on", "--calib")),
        (("--calib", tmp_path / "none.txt"), ("none.txt", "cannot be read")),
        (("--calib-windows", -1), ("--calib-windows -1", "0 or more")),
    ):
        run("mpo-export", folder, *arguments, "--measure-tokens", 0).assert_error("mpo-export", *words)


def test_a_model_without_a_tokenizer_is_fitted_to_its_weights(run: Run, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    done = run("mpo-export", folder, "--out", "out.mpo")
    assert done.code == 0 and "no tokenizer.json to read calibration text with" in done.out


def test_the_default_of_the_command_is_that_of_the_calibration() -> None:
    assert CALIBRATION_WINDOWS == COUNT
