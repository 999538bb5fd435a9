"""What healing refuses before it trains, and what it leaves behind then: nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mpo_exporter.compactifai import LayerSensitivityProfiler, load_granite_model
from mpo_exporter.heal.settings import HealJob, Settings
from mpo_exporter.plan.options import Options
from mpo_formats import CheckpointError, ConfigError, FormatError, MpoError, MpoFile, OutputError
from mpo_runtime.text.token_text import TokenText
from tests.helpers import BOS, export_folder, granite_config, heal_folder, some_ids, write_folder

SETTINGS = Settings(tokens=300, window=32, train_codes=False)
NAN = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("teacher") / "model", granite_config(), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def file(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "rough.mpo"
    export_folder(teacher, path, Options("int4"))
    return path


@pytest.fixture(scope="module")
def broken(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with one weight that is no number."""
    folder = write_folder(tmp_path_factory.mktemp("broken") / "model", granite_config(), dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    tensors[NAN][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def tokens(count: int) -> TokenText:
    return TokenText("ids", np.array(some_ids(count, 7, BOS)), 0, "0" * 64)


def refused(error: type[MpoError], words: str, file: Path, teacher: Path, target: Path, text: TokenText) -> None:
    with pytest.raises(error, match=words):
        heal_folder(teacher, HealJob(file, target, SETTINGS, text=text))
    assert not target.exists() and not list(target.parent.glob(".*"))


def test_a_damaged_file(file: Path, teacher: Path, tmp_path: Path) -> None:
    """Its healed form would have checksums that are right."""
    name = "model.layers.0.mlp.up_proj.0.q4"
    raw = bytearray(file.read_bytes())
    with MpoFile(file) as whole:
        place = raw.index(whole.array(name).tobytes())
    raw[place] ^= 0xFF
    damaged = tmp_path / "damaged.mpo"
    damaged.write_bytes(raw)
    refused(FormatError, f"{name}: wrong checksum", damaged, teacher, tmp_path / "healed.mpo", tokens(930))


def test_a_teacher_that_is_not_finite(file: Path, broken: Path, tmp_path: Path) -> None:
    words = rf"teacher model: {NAN} is not finite at \[3, 5\]"
    refused(CheckpointError, words, file, broken, tmp_path / "healed.mpo", tokens(930))


def test_a_source_that_is_not_finite_is_named_before_gradients_are_taken(broken: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{NAN} is not finite at \[3, 5\]"):
        export_folder(broken, tmp_path / "out.mpo", Options("auto"), calibration=tokens(2000))
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=rf"{NAN} is not finite at \[3, 5\]"):
        LayerSensitivityProfiler(load_granite_model(broken), tokens(400), bond_dimension=4).profile()


def test_a_text_too_short_and_folders_that_are_not_there(file: Path, teacher: Path, tmp_path: Path) -> None:
    refused(ConfigError, "fill 1 windows of 32", file, teacher, tmp_path / "healed.mpo", tokens(40))
    with pytest.raises(OutputError, match="cannot write"):
        heal_folder(teacher, HealJob(file, tmp_path / "no" / "healed.mpo", SETTINGS, text=tokens(930)))
    place = tmp_path / "taken"
    place.write_text("mine")
    with pytest.raises(OutputError, match="taken: cannot be made"):
        heal_folder(teacher, HealJob(file, tmp_path / "healed.mpo", SETTINGS, text=tokens(930), work=place))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"] and place.read_text() == "mine"


def test_a_seed_below_zero() -> None:
    with pytest.raises(ConfigError, match="seed: expected at least 0, found -1"):
        Settings(seed=-1)


def test_a_kept_folder_serves_no_other_part_of_the_same_text(file: Path, teacher: Path, tmp_path: Path) -> None:
    """A text that was read and cut keeps its source's digest: the teacher's scores are those of the windows."""
    long, short = tokens(2000), tokens(2000).first(930)
    settings = replace(SETTINGS, tokens=900)
    heal_folder(teacher, HealJob(file, tmp_path / "long.mpo", settings, text=long, work=tmp_path / "work"))
    kept = heal_folder(teacher, HealJob(file, tmp_path / "short.mpo", settings, text=short, work=tmp_path / "work"))
    fresh = heal_folder(teacher, HealJob(file, tmp_path / "fresh.mpo", settings, text=short))
    assert kept.curve == fresh.curve
