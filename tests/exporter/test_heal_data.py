"""Healing text: the layouts of the usual data sets, which tokens count, packing, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo_exporter.heal.data import HealingText, pack_windows, read_healing_text
from mpo_exporter.source import embedded_model
from mpo_formats import Architecture, ConfigError
from mpo_runtime.loading import read_text_files
from mpo_runtime.text.chat_template import ChatTemplate
from mpo_runtime.text.rows import recognise
from mpo_runtime.text.token_text import read_tokens
from mpo_runtime.text.tokenizer import Tokenizer
from mpo_runtime.weights.checkpoint import Checkpoint

CHAT = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
ROWS = {
    "ultrachat": {"prompt": "Where?", "messages": CHAT, "prompt_id": "0"},
    "ultrachat raw": {"id": "0", "data": ["Where?", "Here."]},
    "openhermes": {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}]},
    "alpaca": {"instruction": "Where?", "input": "", "output": "Here."},
}


@pytest.fixture(scope="module")
def embedded() -> tuple[Tokenizer, ChatTemplate, Architecture]:
    checkpoint = Checkpoint(embedded_model())
    tokenizer, template = read_text_files(checkpoint)
    assert tokenizer is not None and template is not None
    return tokenizer, template, checkpoint.architecture


@pytest.mark.parametrize("name", ROWS)
def test_layouts_are_recognised(name: str) -> None:
    assert recognise(ROWS[name]) == CHAT


def test_other_layouts() -> None:
    assert recognise({"text": "Once.", "domain": "stories"}) == "Once."
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert recognise(row) == [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]
    system = {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}]}
    assert [message["role"] for message in recognise(system) or [] if isinstance(message, dict)] == ["system", "user"]


@pytest.mark.parametrize(
    "row", [[], {"prompt": "x"}, {"messages": [{"role": "user"}]}, {"conversations": ["x"]}, {"data": [1]}, {"text": 1}]
)
def test_unknown_layouts_are_named_by_line(
    row: Any, tmp_path: Path, embedded: tuple[Tokenizer, ChatTemplate, Architecture]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=r"rows\.jsonl: line 2: expected an object with `text`, `messages`"):
        read_healing_text(path, *embedded[:2])


def test_rows_are_tokenised_as_everywhere_else(
    tmp_path: Path, embedded: tuple[Tokenizer, ChatTemplate, Architecture]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ({"text": "Once upon a time"}, {"messages": CHAT})))
    found = read_healing_text(path, *embedded[:2])
    expected = read_tokens(path, *embedded[:2])
    np.testing.assert_array_equal(found.ids, expected.ids)
    assert found.sha256 == expected.sha256 and found.counts.all()


def test_only_the_assistant_counts_where_asked(
    tmp_path: Path, embedded: tuple[Tokenizer, ChatTemplate, Architecture]
) -> None:
    tokenizer, template, _ = embedded
    path = tmp_path / "rows.jsonl"
    turns = [*CHAT, {"role": "user", "content": "And you?"}, {"role": "assistant", "content": "There, of course."}]
    path.write_text(json.dumps({"text": "Not this."}) + "\n" + json.dumps({"messages": turns}) + "\n")
    found = read_healing_text(path, tokenizer, template, assistant_only=True)
    counted = tokenizer.decode(found.ids[found.counts].tolist(), skip_special_tokens=False)
    assert counted == "Here.<|end_of_text|>\nThere, of course.<|end_of_text|>\n"


def test_windows_are_led_and_hold_the_text_in_order(embedded: tuple[Tokenizer, ChatTemplate, Architecture]) -> None:
    architecture = embedded[2]
    ids = np.arange(1, 101)
    counts = ids > 40
    windows, kept = pack_windows(HealingText("t", ids, counts, ""), architecture, 11, 2)
    assert windows.shape == (6, 11) and (windows[:, 0] == architecture.bos_token_id).all()
    np.testing.assert_array_equal(
        windows[:, 1:].reshape(-1), np.arange(41, 101)
    )  # four windows without a count fell out
    assert kept[:, 1:].all() and not kept[:, 0].any()


@pytest.mark.parametrize(
    ("ids", "window", "message"),
    [
        (np.arange(1, 30), 16, r"t: 29 tokens fill 1 windows of 16, expected at least 4"),
        (np.arange(1, 30), 1, r"--window 1: expected 2 to 1024"),
        (np.arange(1, 30), 1025, r"--window 1025: expected 2 to 1024"),
        (np.array([1, 5000, 2]), 16, r"t: token id 5000 lies outside the vocabulary of 4096"),
    ],
)
def test_texts_that_cannot_be_packed(
    ids: Any, window: int, message: str, embedded: tuple[Tokenizer, ChatTemplate, Architecture]
) -> None:
    with pytest.raises(ConfigError, match=message):
        pack_windows(HealingText("t", ids, np.ones(ids.size, np.bool_), ""), embedded[2], window, 4)


@pytest.mark.parametrize(
    ("name", "content", "only", "message"),
    [
        ("a.jsonl", b"", False, "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n', True, "holds no tokens of the assistant"),
        ("a.txt", b"some text", True, "has no assistant's messages"),
        ("a.jsonl", b"{", False, "line 1 is not JSON"),
        ("a.jsonl", b"\xff", False, "not UTF-8 at byte 0"),
        ("missing.jsonl", None, False, "cannot be read"),
    ],
)
def test_texts_that_cannot_be_read(
    name: str,
    content: bytes | None,
    only: bool,
    message: str,
    tmp_path: Path,
    embedded: tuple[Tokenizer, ChatTemplate, Architecture],
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_healing_text(path, *embedded[:2], assistant_only=only)


def test_a_row_that_the_template_refuses_is_named(
    tmp_path: Path, embedded: tuple[Tokenizer, ChatTemplate, Architecture]
) -> None:
    strict = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{{ m.content }}{% endfor %}",
        isolated=False,
    )
    rows = [{"messages": CHAT}, {"messages": []}, {"messages": [*CHAT, {"role": "tool", "content": "1"}]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ConfigError, match=r"rows\.jsonl: line 3: .*no tools here"):
        read_healing_text(path, embedded[0], strict)
