"""Accuracy on questions: the figures of a plain forward pass, in the table and the report, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mpo_exporter.plan.options import Options
from mpo_exporter.report.accuracy import measured_accuracy
from mpo_exporter.source import open_source
from mpo_exporter.texts import read_tasks
from mpo_formats import ConfigError
from mpo_runtime.evaluation.questions import read_task
from mpo_runtime.measure import log_softmax
from tests.helpers import byte_tokenizer, export_folder, forward, granite_config, network, write_folder

ROWS = [
    {"query": "Which way?", "choices": ["left", "right again", "up"], "gold": number % 3, "note": number}
    for number in range(5)
] + [{"context": f"{number} and then", "choices": ["a b", "c"], "gold": number % 2} for number in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = granite_config(num_hidden_layers=1, hidden_size=64, intermediate_size=96, max_position_embeddings=64)
    place = write_folder(tmp_path_factory.mktemp("accuracy") / "model", config)
    return place


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "odd.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n", encoding="utf-8")
    return path


def plain_accuracy(path: Path) -> float:
    """The share of right choices by one forward pass for every text, with a token a byte and <s> in front."""
    model, right = network(path), 0
    lead = byte_tokenizer().encode("").ids
    for row in ROWS:
        prompt = f"{row['query']}\nAnswer:" if "query" in row else str(row["context"])
        nats = []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            start = lead + byte_tokenizer().encode(prompt, add_special_tokens=False).ids
            following = byte_tokenizer().encode(f" {choice}", add_special_tokens=False).ids
            scores = log_softmax(forward(model, [(start + following)[:-1]])[0])[len(start) - 1 :]
            nats.append(float(np.take_along_axis(scores, np.array(following)[:, None], -1).sum()))
        right += int(np.argmax(nats)) == row["gold"]
    return right / len(ROWS)


def test_both_models_answer_as_in_a_plain_forward_pass(folder: Path, questions: Path, tmp_path: Path) -> None:
    file = export_folder(folder, tmp_path / "little.mpo", Options("int4")).path
    stages: list[str] = []
    with open_source(folder) as source:
        tasks = read_tasks(source, [questions])
        [found] = measured_accuracy(source, file, tasks, progress=lambda stage, done, total: stages.append(stage))
    assert (found.task, found.questions) == ("odd", len(ROWS))
    assert found.dense == pytest.approx(plain_accuracy(folder))
    assert found.compressed == pytest.approx(plain_accuracy(file))
    assert found.error == pytest.approx(np.sqrt(found.compressed * (1 - found.compressed) / (len(ROWS) - 1)))
    assert set(stages) == {"odd, dense", "odd, compressed"}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"query": "a", "choices": ["b"]}', "line 1"),
        ('{"query": "a", "choices": ["b"], "gold": 0}\n{"query": "a", "choices": ["b"], "gold": 1}', "line 2"),
        ('{"query": "a", "choices": "bc", "gold": 0}', "line 1"),
        ("not JSON", "not JSON"),
        ("[1]", "line 1"),
        ("\n\n", "no questions"),
    ],
)
def test_rows_of_another_form_are_refused_by_line(content: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=named) as error:
        read_task(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl.*cannot be read"):
        read_task(tmp_path / "none.jsonl")


def test_questions_need_a_tokenizer(questions: Path, tmp_path: Path) -> None:
    place = write_folder(tmp_path / "bare", granite_config(num_hidden_layers=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / name).unlink()
    with open_source(place) as source, pytest.raises(ConfigError, match="no tokenizer"):
        read_tasks(source, [questions])
