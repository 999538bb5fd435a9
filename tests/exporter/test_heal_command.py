"""mpo-export --heal: the file that was written is replaced by its healed form, whose certificate is the healed one's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpo_exporter.cli.main import main
from mpo_exporter.cli.options import HealBounds
from mpo_exporter.heal.checkpoint import Record, save_checkpoint
from mpo_exporter.heal.command import heal_settings
from mpo_exporter.heal.settings import HealJob, Settings, parse_tokens
from mpo_exporter.heal.train import Trainer
from mpo_formats import ConfigError, MpoFile
from tests.helpers import BOS, granite_config, some_ids, write_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("heal") / "model", granite_config(), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, np.array(some_ids(930, 7, BOS)))
    return path


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "120")
        fixed = ["--plan", "int4", "--measure-tokens", "200", "--heal-text", str(text)]
        monkeypatch.setattr(sys, "argv", ["mpo-export", str(model), *fixed, *words])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def test_the_file_is_healed_and_certified_as_such(command: Command, tmp_path: Path) -> None:
    target = tmp_path / "model.mpo"
    code, printed, _ = command("--heal-tokens", "2k", "--out", str(target))
    assert code == 0 and list(tmp_path.iterdir()) == [target]
    assert "dense" in printed and "compressed" in printed and "healed" in printed
    assert "healed on 2,0" in printed
    with MpoFile(target, verify=True) as file:
        facts = file.spec.provenance.options
        assert facts["plan"] == "int4" and int(facts["healed_tokens"]) > 1900
        [entry] = file.certificates().entries
        [line] = [line for line in printed.splitlines() if "KL to dense, mean" in line]
        figures = [part.strip() for part in line.split("│") if part.strip()]
        assert figures[-1] == f"{entry.quality.kl_mean:.4f}" and figures[-2] != figures[-1]


def test_a_failed_healing_leaves_the_exported_file(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise MemoryError

    target = tmp_path / "model.mpo"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", fail)
        code, _, told = command("--heal", "--heal-tokens", "2k", "--out", str(target))
    assert code == 1 and "out of memory" in told and "lower" in told and "is the file before healing" in told
    with MpoFile(target, verify=True) as file:
        assert "healed_tokens" not in file.spec.provenance.options
        assert file.certificates().entries


def test_a_healing_that_does_not_help_leaves_the_exported_file(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model.mpo"
    with monkeypatch.context() as patch:
        faster = Settings(tokens=2000).faster(1000)
        patch.setattr("mpo_exporter.heal.command.Settings", lambda **given: faster)
        code, printed, _ = command("--heal-tokens", "2k", "--out", str(target))
    assert code == 0 and "healing raised the KL: the file is the one before healing" in " ".join(printed.split())
    assert list(tmp_path.iterdir()) == [target]
    with MpoFile(target, verify=True) as file:
        assert "healed_tokens" not in file.spec.provenance.options
        [entry] = file.certificates().entries
        [line] = [line for line in printed.splitlines() if "KL to dense, mean" in line]
        figures = [part.strip() for part in line.split("│") if part.strip()]
        assert figures[-2] == f"{entry.quality.kl_mean:.4f}" and float(figures[-1]) > entry.quality.kl_mean


def test_a_report_too_says_that_healing_was_not_kept(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster = Settings(tokens=2000).faster(1000)
    monkeypatch.setattr("mpo_exporter.heal.command.Settings", lambda **given: faster)
    given = "--heal-tokens", "2k", "--out", str(tmp_path / "model.mpo"), "--report", str(tmp_path / "report")
    code, printed, _ = command(*given)
    assert code == 0 and "healing raised the KL: the file is the one before healing" in " ".join(printed.split())


def test_a_target_leaves_room_for_what_healing_records(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, room = tmp_path / "model.mpo", 60_000
    words = ["--target-size", str(room), "--calib", str(text), "--measure-tokens", "0", "--out", str(target)]
    monkeypatch.setattr(
        sys, "argv", ["mpo-export", str(model), *words, "--heal-text", str(text), "--heal-tokens", "300"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code and 0.98 * room < target.stat().st_size <= room
    with MpoFile(target) as file:
        assert "healed_tokens" in file.spec.provenance.options


def test_a_begun_healing_of_another_file_does_not_matter(command: Command, tmp_path: Path) -> None:
    target = tmp_path / "model.mpo"
    assert command("--heal-tokens", "300", "--out", str(target))[0] == 0
    folder = HealJob(target, target).folder
    size = target.stat().st_size
    folder.mkdir()
    save_checkpoint(folder, Record("of another"), {})
    assert command("--heal-tokens", "300", "--force", "--out", str(target))[0] == 0
    assert target.stat().st_size == size and not folder.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--heal-tokens", "2X"], "--heal-tokens 2X: expected a number of tokens such as 500k, 2M, 1.5M or 1000000"),
        (["--heal-tokens", "2k", "--heal-minutes", "1"], "tokens and minutes were both given; give one of them"),
        (["--heal", "--heal-epochs", "0"], "epochs: expected more than 0"),
        (["--heal", "--heal-text", "missing.jsonl"], "missing.jsonl: cannot be read"),
    ],
)
def test_what_cannot_be_healed_is_refused_before_the_export(
    words: list[str], message: str, command: Command, tmp_path: Path
) -> None:
    target = tmp_path / "model.mpo"
    code, _, told = command("--out", str(target), *words)
    assert code == 1 and message in " ".join(told.split()) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("2M", 2_000_000), ("500k", 500_000), ("1.5M", 1_500_000), ("1_000", 1000), ("20000", 20_000), (" .5m ", 500_000)],
)
def test_numbers_of_tokens(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "many", "-2M", "0", "1e6", "0.1", "2MM", "nan"])
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a number of tokens such as"):
        parse_tokens(text)


def asked(wanted: bool, text: Path | None = None, **bounds: Any) -> Settings | None:
    """The settings of --heal (or not), --heal-text and the options of HealBounds."""
    request = HealBounds(**bounds).request(wanted, text)
    return heal_settings(request) if request else None


def test_a_bound_implies_healing() -> None:
    assert asked(False) is None
    assert asked(True) == Settings()
    assert asked(False, heal_tokens="500k") == Settings(tokens=500_000)
    assert asked(False, heal_epochs=2.0) == asked(True, heal_epochs=2.0) == Settings(epochs=2.0)
    assert asked(False, heal_minutes=20) == Settings(minutes=20)
    assert asked(False, Path("text.txt")) == Settings()
