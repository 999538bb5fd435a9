"""Which text an export measures on and calibrates on, and that the model is opened and closed once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mpo_exporter import texts
from mpo_exporter.cli.export import run_export
from mpo_exporter.plan.named import PLANS
from mpo_exporter.plan.options import Choice, Options
from mpo_exporter.request import CalibrationRequest, ExportRequest, MeasureRequest
from mpo_exporter.source import Source, find_source, open_source
from mpo_exporter.texts import calibration_for, calibration_text, calibration_walk, held_out_text
from mpo_formats import CheckpointError, PlanError
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import granite_config, write_folder

WORDS = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    with open_source(write_folder(tmp_path_factory.mktemp("model") / "little")) as source:
        yield source


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Source]:
    """A model without a tokenizer."""
    folder = write_folder(tmp_path / "silent")
    (folder / "tokenizer.json").unlink()
    with open_source(folder) as source:
        yield source


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(20 * WORDS)
    return path


def test_held_out_text_is_cut_to_the_tokens_that_were_asked_for(source: Source, words: Path) -> None:
    text, reason = held_out_text(source, words, 50)
    assert text is not None and reason == "" and text.name == "words.txt"
    assert source.tokenizer is not None
    assert text.ids.tolist() == source.tokenizer.encode(20 * WORDS)[:50]
    assert held_out_text(source, words, 0) == (None, "--measure-tokens 0")


def test_held_out_text_is_cut_to_about_a_minute(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = source.architecture.parameters()
    monkeypatch.setattr(texts, "MEASURE_BUDGET", 600 * parameters)
    text, _ = held_out_text(source, None, None)
    assert text is not None and text.ids.size == 600 and text.name == "evaluation.jsonl"
    monkeypatch.setattr(texts, "MEASURE_BUDGET", 511 * parameters)
    text, reason = held_out_text(source, None, None)
    assert text is None and "the model is large for this machine; give --measure-tokens N" in reason
    text, _ = held_out_text(source, None, 20)
    assert text is not None and text.ids.size == 20


def test_a_model_without_a_tokenizer_has_no_texts(silent: Source, tmp_path: Path) -> None:
    assert held_out_text(silent, None, None) == (None, "the model has no tokenizer.json")
    text, told = calibration_for(silent, Options(), None, 8)
    assert text is None and "no tokenizer.json to read calibration text with" in told
    np.save(tmp_path / "ids.npy", np.arange(40))
    text, _ = calibration_for(silent, Options(), tmp_path / "ids.npy", 8)
    assert text is not None and text.ids.tolist() == list(range(40))


def test_which_plans_are_fitted_to_which_text(source: Source, words: Path) -> None:
    built_in = {name for name in PLANS if calibration_for(source, Options(name), None, 8)[0]}
    assert built_in == {"auto", "corrected"}
    named = {name for name in PLANS if calibration_for(source, Options(name), words, 8)[0]}
    assert named == set(PLANS) - {"dense"}
    assert calibration_for(source, Options("paper", choice=Choice(top_k=1)), None, 8)[0] is not None
    for options in (Options(), Options("paper", choice=Choice(top_k=1))):
        text, told = calibration_for(source, options, words, 0)
        assert text is None and told == "fitted to the weights alone, without calibration text"


def test_the_walk_takes_so_many_windows(source: Source, words: Path, tmp_path: Path) -> None:
    walk = calibration_walk(source, calibration_text(source, words), tmp_path, 5)
    assert walk.windows.shape == (5, 64)


def test_models_are_found_by_name_folder_and_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "mine", granite_config())
    assert find_source("demo").name == "demo" and find_source(str(folder)).name == "mine"
    with pytest.raises(CheckpointError, match="absent: no such folder; give demo, granite, granite-2b"):
        find_source("absent")
    monkeypatch.setattr("mpo_exporter.source.cached_folder", lambda identifier: tmp_path / identifier / "revision")
    found = find_source("granite")
    assert (found.name, found.revision) == ("granite", "revision")
    assert re.fullmatch(r"granite-3\.3-8b-instruct@[0-9a-f]{40}", found.folder.parent.name)
    assert find_source("owner/other").name == "other"


@pytest.mark.parametrize("fails", [False, True])
def test_the_weights_are_opened_and_closed_once(
    tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    opened: list[Checkpoint] = []
    closed: list[Checkpoint] = []
    start, close = Checkpoint.__init__, Checkpoint.close

    def started(checkpoint: Checkpoint, folder: Path) -> None:
        opened.append(checkpoint)
        start(checkpoint, folder)

    def ended(checkpoint: Checkpoint) -> None:
        closed.append(checkpoint)
        close(checkpoint)

    folder = write_folder(tmp_path / "little", granite_config(hidden_size=64, intermediate_size=64))
    monkeypatch.setattr(Checkpoint, "__init__", started)
    monkeypatch.setattr(Checkpoint, "close", ended)
    monkeypatch.setenv("MPO_CACHE", str(tmp_path / "cache"))
    request = ExportRequest(
        str(folder),
        Options("int4", choice=Choice(pattern="nothing" if fails else None)),
        out=tmp_path / "out.mpo",
        calibration=CalibrationRequest(words, 6),
        measure=MeasureRequest(words, 30),
    )
    if fails:
        with pytest.raises(PlanError, match="--layers nothing"):
            run_export(request)
    else:
        run_export(request)
    assert len(opened) == 1 and closed == opened
