"""mpo-export --calib: which plans calibrate on what, and what cannot be calibrated on."""

from __future__ import annotations

from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("options", "used"),
    [
        (("--plan", "auto"), "calibration.jsonl"),
        (("--plan", "auto", "--calib", "TEXT"), "calib.txt"),
        (("--plan", "auto", "--calib-windows", 0), None),
        (("--plan", "int4"), None),
        (("--plan", "int4", "--calib", "TEXT"), "calib.txt"),
        (("--plan", "paper"), None),
        (("--plan", "dense", "--calib", "TEXT"), None),
    ],
)
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


def test_a_target_is_met_and_never_exceeded(run: Run, folder: Path) -> None:
    whole = run("mpo-export", folder, "--plan", "int4", "--measure-tokens", 0, "--out", "int4.mpo")
    assert whole.code == 0, whole
    size = Path("int4.mpo").stat().st_size
    done = run(
        "mpo-export", folder, "--target-size", f"{size / 1e6:.6f}MB", "--calib-windows", 8, "--measure-tokens", 0
    )
    assert done.code == 0, done
    assert size * 0.9 < Path("little.mpo").stat().st_size <= size
    with MpoFile("little.mpo") as file:
        file.verify()
        parameters = file.spec.architecture.parameters()
    bits = size * 8 / parameters
    again = run(
        "mpo-export", folder, "--target-bpw", f"{bits:.4f}", "--calib-windows", 8, "--measure-tokens", 0, "--force"
    )
    assert again.code == 0, again
    assert Path("little.mpo").stat().st_size <= bits * parameters / 8 + 1


def test_targets_that_cannot_be_met_or_read(run: Run, folder: Path) -> None:
    for arguments, words in (
        (("--target-bpw", 0.5), ("too few", "the smallest file of this model takes", "give a larger target")),
        (("--target-bpw", 0), ("--target-bpw 0", "more than 0")),
        (("--target-size", "2 bananas"), ("--target-size 2 bananas", "2.1GB")),
        (("--target-size", "1MB", "--target-bpw", 3), ("give one of them",)),
        (("--target-size", "1MB", "--plan", "int4"), ("--target-size: expected the plan auto, found int4",)),
        (("--target-size", "1MB", "--calib-windows", 0), ("--calib",)),
    ):
        windows = () if "--calib-windows" in arguments else ("--calib-windows", 8)
        done = run("mpo-export", folder, *arguments, *windows, "--measure-tokens", 0)
        assert done.code == 1, (arguments, done)
        assert all(word in done.err for word in words), (words, done.err)
        assert not Path("little.mpo").exists()


def test_a_kept_work_folder_is_gone_on_with_or_begun_again(run: Run, folder: Path) -> None:
    fixed = ("mpo-export", folder, "--effort", "quick", "--measure-tokens", 0, "--out", "out.mpo", "--force")
    done = run(*fixed, "--keep-work")
    assert done.code == 0 and "weights alone" in done.out, done
    assert Path(".out.mpo.export").is_dir()
    whole = Path("out.mpo").read_bytes()
    again = run(*fixed, "--keep-work")
    assert again.code == 0 and "going on with the work of a run that was stopped: .out.mpo.export" in again.out
    assert Path("out.mpo").read_bytes() == whole
    other = run(*fixed, "--target-size", "1MB")
    assert other.code == 0 and "of another request or version" in other.out and "starting again" in other.out
    assert not Path(".out.mpo.export").exists()
    with MpoFile("out.mpo") as file:
        file.verify()
        assert file.spec.provenance.options["effort"] == "quick"
