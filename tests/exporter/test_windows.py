"""Calibration text as windows: chat through the template, even spread, and clear refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpo_exporter.calibrate.windows import COUNT, cut_calibration
from mpo_exporter.source import open_source
from mpo_exporter.texts import calibration_text
from mpo_formats import ConfigError
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import BOS, VOCABULARY, granite_config, write_folder


def text_of(count: int) -> TokenText:
    return TokenText("some.txt", np.arange(count, dtype=np.int64) % VOCABULARY, count, "")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(write_folder(tmp_path_factory.mktemp("model") / "granite"))


def test_windows_are_led_by_the_first_token_and_spread_over_the_text(source: Checkpoint) -> None:
    windows = cut_calibration(text_of(100), source.architecture, window=11, count=4)
    assert windows.tolist() == [[BOS, *range(start, start + 10)] for start in (0, 30, 60, 90)]


def test_a_model_without_a_first_token_gets_none(tmp_path: Path) -> None:
    source = Checkpoint(write_folder(tmp_path, granite_config(bos_token_id=None)))
    windows = cut_calibration(text_of(40), source.architecture, window=10)
    assert windows.tolist() == [list(range(start, start + 10)) for start in (0, 10, 20, 30)]


def test_windows_are_no_longer_than_the_context(source: Checkpoint) -> None:
    assert cut_calibration(text_of(1000), source.architecture).shape == (15, 64)


def test_the_embedded_text_fills_the_windows_of_the_embedded_model() -> None:
    with open_source("demo") as demo:
        assert cut_calibration(calibration_text(demo), demo.architecture).shape == (COUNT, 256)


def test_chat_rows_pass_through_the_template(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello there"}]}) + "\n")
    with open_source("demo") as demo:
        text, tokenizer = calibration_text(demo, file), demo.tokenizer
    assert tokenizer is not None
    shown = tokenizer.decode(text.ids.tolist(), skip_special_tokens=False)
    assert "Hello there" in shown
    assert "user" in shown


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no text"),
        ("too short", r"short\.txt: \d+ tokens are too few to calibrate on, expected at least 252; .*--calib"),
    ],
)
def test_too_little_text(source: Checkpoint, tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "short.txt"
    file.write_text(content)
    with open_source(source.folder) as opened, pytest.raises(ConfigError, match=words):
        cut_calibration(calibration_text(opened, file), source.architecture)


@pytest.mark.parametrize(("window", "count"), [(1, 4), (65, 4), (10, 0)])
def test_windows_that_cannot_be(source: Checkpoint, window: int, count: int) -> None:
    with pytest.raises(ConfigError, match="expected windows of 2 to 64 tokens"):
        cut_calibration(text_of(500), source.architecture, window=window, count=count)


def test_a_token_that_the_model_lacks(source: Checkpoint) -> None:
    text = replace(text_of(300), ids=np.full(300, VOCABULARY, np.int64))
    with pytest.raises(ConfigError, match=f"token id {VOCABULARY} lies outside the vocabulary"):
        cut_calibration(text, source.architecture)
