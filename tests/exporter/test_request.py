"""Requests: what a command line asks for, checked before any work begins."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpo_exporter.cli import main as cli
from mpo_exporter.plan.options import Choice, KeyOptions, Options, Target
from mpo_exporter.plan.planner import with_default_target
from mpo_exporter.request import (
    CalibrationRequest,
    ExportRequest,
    HealingRequest,
    Machine,
    MeasureRequest,
    ProfileRequest,
    check_file,
    check_folder,
    plan_options,
    size_bytes,
)
from mpo_formats import ConfigError, OutputError, PlanError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2.1GB", 2_100_000_000),
        ("900 MB", 900_000_000),
        ("1200000", 1_200_000),
        ("1.5kb", 1500),
        ("7B", 7),
        ("9" * 400, 10**18),
    ],
)
def test_sizes_as_users_write_them(text: str, size: int) -> None:
    assert size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "2 bananas", "-1MB", "1e6", "MB", "1..2GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="expected bytes such as 2.1GB, 900MB or 1200000"):
        size_bytes(text)


def test_auto_has_a_default_target_and_keeps_one_that_was_given() -> None:
    assert with_default_target(Options()).target == Target(default=True)
    for options in (Options(target=Target(max_kl=0.1)), Options(target=Target(ratio=0.5)), Options("int4")):
        assert with_default_target(options) == options


Parse = Callable[..., ExportRequest]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """The request that a command line makes."""

    def parsed(*words: object) -> ExportRequest:
        made: list[ExportRequest] = []
        monkeypatch.setattr("mpo_exporter.cli.export.run_export", made.append)
        cli.app([*map(str, words)], prog_name="mpo-export", standalone_mode=False)
        return made[0]

    return parsed


def test_a_command_line_without_options_is_the_default_request(parse: Parse) -> None:
    assert parse("demo") == parse("export", "demo") == ExportRequest("demo")


def test_a_folder_with_a_commands_name_is_given_as_a_path(parse: Parse) -> None:
    assert parse("./heal").model == "./heal" and parse("--chi", 4, "report").model == "report"


def test_every_option_arrives_in_its_field(parse: Parse, tmp_path: Path) -> None:
    words = {
        "--plan": "k-proj",
        "--chi": 8,
        "--cores": 3,
        "--layers": "mlp",
        "--compression-ratio": 0.5,
        "--sensitivity": "full",
        "--rank": 9,
        "--quant-bits": 16,
        "--min-dim": 7,
        "--out": "a.mpo",
        "--save-plan": "plan.json",
        "--calib": "c.txt",
        "--calib-windows": 5,
        "--eval-text": "e.txt",
        "--measure-tokens": 3,
        "--report": "r",
        "--certify-chi": 2,
        "--heal-tokens": "5k",
        "--heal-text": "h.txt",
        "--effort": "best",
        "--device": "cuda",
        "--threads": 4,
    }
    flags = ("--no-norm-correction", "--force", "--dry-run", "--no-compare-cores", "--keep-work")
    assert parse(*(word for pair in words.items() for word in pair), *flags, "demo") == ExportRequest(
        "demo",
        Options(
            "k-proj",
            8,
            3,
            choice=Choice(pattern="mlp", share=0.5, sensitivity="full"),
            keys=KeyOptions(9, 16, False, 7),
        ),
        out=Path("a.mpo"),
        force=True,
        calibration=CalibrationRequest(Path("c.txt"), 5),
        measure=MeasureRequest(Path("e.txt"), 3),
        prefixes=(2,),
        healing=HealingRequest(tokens="5k", text=Path("h.txt")),
        report=Path("r"),
        dry_run=True,
        save_plan=Path("plan.json"),
        compare_cores=False,
        effort="best",
        keep_work=True,
        machine=Machine("cuda", 4),
    )
    targets = (("size", "1.5MB", 1_500_000), ("bpw", 3, 3.0), ("ratio", 0.5, 0.5))
    for (name, given, value), field in zip(targets, ("size", "bits_per_weight", "ratio"), strict=True):
        assert parse("demo", f"--target-{name}", given).options.target == Target(**{field: value})
    assert parse("demo", "--max-kl", 0.1, "--for-speed").options == Options(target=Target(max_kl=0.1), for_speed=True)
    assert parse("demo", "--heal").healing == HealingRequest()
    assert parse("demo", "--heal-minutes", 2).healing == HealingRequest(minutes=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--measure-tokens", -1), "--measure-tokens -1: expected 0 or more"),
        (("--calib-windows", -1), "--calib-windows -1: expected 0 or more"),
        (("--certify-chi", 0), "--certify-chi 0: expected 1 to 31, below --chi"),
        (("--certify-chi", 32), "--certify-chi 32: expected 1 to 31, below --chi"),
        (("--target-size", "1MB", "--max-kl", 0.1), "--target-size and --max-kl: give one of them"),
        (("--target-size", "1MB", "--plan", "int4"), "--target-size: expected the plan auto, found int4"),
        (("--effort", "most"), "--effort most: expected one of quick, normal, best"),
        (("--effort", "quick", "--max-kl", 0.1), "--max-kl: needs calibration text, which --effort quick does not use"),
        (("--effort", "quick", "--calib", "c.txt"), "--calib: needs calibration text"),
        (("--effort", "quick", "--calib-windows", 3), "--calib-windows: needs calibration text"),
        (("--effort", "quick", "--plan", "int4", "--top-k", 3), "--top-k: needs calibration text"),
        (("--plan", "file:absent.json"), "absent.json: cannot be read"),
    ],
)
def test_a_request_that_cannot_be_honoured_is_not_built(parse: Parse, words: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse("demo", *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"level": "exact"}, "--level exact: expected one of fast, full"),
        ({"bits": 7}, "--bits 7: expected one of 8, 6"),
        ({"chi": 0}, "--chi 0"),
        ({"calibration": CalibrationRequest(windows=0)}, "--calib-windows 0: expected at least 1"),
    ],
)
def test_a_profile_that_cannot_be_made_is_not_requested(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ProfileRequest("demo", **change)


def test_a_plan_file_brings_its_plan_and_bonds(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"version": 1, "plan": "paper", "chi": 5}))
    options = plan_options(f"file:{path}", 32, 3, choice=Choice(top_k=2))
    assert (options.plan, options.chi, options.cores, options.choice.top_k) == ("paper", 5, 3, 2)
    assert options.file is not None and options.takes_built_in_text
    path.write_text(json.dumps({"version": 1, "plan": "dense"}))
    assert plan_options(f"file:{path}", 32, 2).fits and not Options("dense").fits
    with pytest.raises(PlanError, match="expected the plan paper, .* found dense"):
        plan_options(f"file:{path}", 32, 2, choice=Choice(top_k=2))


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    old = tmp_path / "old.mpo"
    old.write_text("old")
    for path, force, words in (
        (tmp_path, True, "is a folder; give the name of a file with --out"),
        (old, False, "exists already; give another name with --out or overwrite it with --force"),
        (tmp_path / "absent" / "new.mpo", True, r"cannot write \(No such file or directory\); .* with --out"),
        (old / "new.mpo", True, r"cannot write \(Not a directory\); .* with --out"),
    ):
        with pytest.raises(OutputError, match=words):
            check_file(path, "--out", force=force)
    check_file(old, "--out", force=True)
    check_file(tmp_path / "new.mpo", "--out", force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["old.mpo"] and old.read_text() == "old"


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match="file: is a file; give a folder with --report"):
        check_folder(file, "--report")
    with pytest.raises(OutputError, match=r"below: cannot write \(Not a directory\); .* with --report"):
        check_folder(file / "below", "--report")
    check_folder(tmp_path / "new" / "deep", "--report")
    assert (tmp_path / "new" / "deep").is_dir()


@pytest.mark.parametrize("option", ["--out", "--save-plan", "--report"])
def test_every_path_is_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    """A folder that refuses new files; root may write everywhere, so the refusal is made."""
    refusing = tmp_path / "refusing"
    refusing.mkdir()
    real = os.open

    def refuse(path: Any, *rest: Any, **options: Any) -> int:
        if str(path).startswith(str(refusing)):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    field = option.removeprefix("--").replace("-", "_")
    request = ExportRequest("demo", **{field: refusing / "new"})
    words = rf"new: cannot write \(Permission denied\); give another folder with {option}"
    with pytest.raises(OutputError, match=words):
        request.check_paths(request.target(str(tmp_path / "demo")))
