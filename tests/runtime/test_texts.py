"""Texts: plain with document separators, JSON lines of text or messages, and files of token ids."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from mpo_formats import ConfigError
from mpo_runtime.text.chat_template import ChatTemplate
from mpo_runtime.text.token_text import read_tokens
from mpo_runtime.text.tokenizer import Tokenizer
from tests.helpers import EOS, byte_tokenizer

RAW = byte_tokenizer()
TOKENIZER = Tokenizer.from_bytes(RAW.to_str().encode(), {"bos_token": "<s>", "eos_token": "</s>"})
TEMPLATE = ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}", isolated=False)


def plain(text: str) -> list[int]:
    return RAW.encode(text, add_special_tokens=False).ids


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_each_document_of_a_text_ends_with_the_end_token(tmp_path: Path) -> None:
    path = written(tmp_path, "two.txt", "Hello, wörld.\nA line.\n<|end_of_text|>\nSecond\n<|end_of_text|>\n")
    text = read_tokens(path, TOKENIZER, None)
    first, second = "Hello, wörld.\nA line.", "Second"
    assert text.ids.tolist() == [*plain(first), EOS, *plain(second), EOS]
    assert text.ids.dtype == np.int64
    assert text.content_bytes == len(first.encode()) + len(second.encode())
    assert (text.name, text.sha256) == ("two.txt", hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_text_without_separators_is_one_document(tmp_path: Path) -> None:
    text = read_tokens(written(tmp_path, "one.md", "a\n\nb\n"), TOKENIZER, None)
    assert text.ids.tolist() == [*plain("a\n\nb\n"), EOS]


def test_rows_of_text(tmp_path: Path) -> None:
    """U+2028 and U+0085 are line ends to Python and plain characters to JSON; a blank line is nothing."""
    rows = ["one", "two\u2028lines\x85of\u2029it", "drei"]
    lines = "\n".join(json.dumps({"text": row}, ensure_ascii=False) for row in rows)
    text = read_tokens(written(tmp_path, "rows.jsonl", lines + "\n\n"), TOKENIZER, None)
    assert text.ids.tolist() == [token for row in rows for token in [*plain(row), EOS]]
    assert text.content_bytes == sum(len(row.encode()) for row in rows)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, content in (("one.txt", "a"), ("rows.jsonl", '{"text": "a"}')):
        text = read_tokens(written(tmp_path, name, "\ufeff" + content), TOKENIZER, None)
        assert text.ids.tolist() == [*plain("a"), EOS]


def test_the_first_tokens_of_a_text(tmp_path: Path) -> None:
    text = read_tokens(written(tmp_path, "one.txt", "abc"), TOKENIZER, None)
    assert text.first(4) is text and text.content_bytes == 3
    cut = text.first(2)
    assert (cut.ids.tolist(), cut.content_bytes, cut.sha256) == (plain("ab"), 0, text.sha256)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Höre"}]},
        {"instruction": "Hi", "output": "Höre"},
        {"data": ["Hi", "Höre"]},
    ],
)
def test_chats_of_other_layouts_are_the_same_messages(tmp_path: Path, row: dict[str, object]) -> None:
    same = [
        written(tmp_path, "a.jsonl", json.dumps(row)),
        written(tmp_path, "b.jsonl", json.dumps({"messages": MESSAGES})),
    ]
    first, second = (read_tokens(path, TOKENIZER, TEMPLATE) for path in same)
    assert first.ids.tolist() == second.ids.tolist() and first.content_bytes == second.content_bytes


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Höre"}]


def test_messages_are_rendered_by_the_template(tmp_path: Path) -> None:
    path = written(tmp_path, "chat.jsonl", json.dumps({"messages": MESSAGES}))
    text = read_tokens(path, TOKENIZER, TEMPLATE)
    assert text.ids.tolist() == [*plain("[user]Hi"), EOS, *plain("[assistant]Höre"), EOS]
    assert text.content_bytes == len("HiHöre".encode())


def test_messages_without_a_template_are_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "chat.jsonl", json.dumps({"messages": MESSAGES}))
    assert read_tokens(path, TOKENIZER, None).ids.tolist() == [*plain("Hi\nHöre"), EOS]


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    ids = [0, 1, 255, 256, 49154]
    np.save(tmp_path / "ids.npy", np.array(ids, np.int32).reshape(1, -1))
    small = written(tmp_path, "ids.u16", np.array(ids, "<u2").tobytes())
    for path in (tmp_path / "ids.npy", small):
        text = read_tokens(path, None, None)
        assert text.ids.tolist() == ids
        assert text.ids.dtype == np.int64
        assert text.content_bytes == 0


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bad.txt", b"abc\xff", r"not UTF-8 at byte 3 \(0xFF\); convert it with: iconv -f"),
        ("bad.jsonl", '{"text": "a"}\n{"text"', "line 2 is not JSON; expected one object a line"),
        ("bad.jsonl", '{"text": 3}', "line 1: expected an object with `text`"),
        ("bad.jsonl", '["text"]', "line 1: expected an object with `text`"),
        ("bad.jsonl", '{"messages": ["hello"]}', "`messages` "),
        ("bad.jsonl", '{"messages": [{"role": "user", "content": null}]}', "all of them strings"),
        ("bad.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("bad.u16", b"abc", "3 bytes, expected two for each token id"),
        ("bad.npy", b"not an array", "not a .npy file of numbers"),
        ("bad.npy", b"", "not a .npy file of numbers"),
        ("bad.txt", "\n  \n", "holds no text"),
        ("bad.jsonl", "\n\n", "holds no text"),
    ],
    ids=["utf-8", "json", "number", "list", "messages", "null", "deep", "odd", "npy", "empty", "blank", "no rows"],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(ConfigError, match=words) as error:
        read_tokens(path, TOKENIZER, TEMPLATE)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_arrays_of_anything_but_whole_numbers_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "floats.npy", np.ones(3))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name in ("floats.npy", "objects.npy"):
        with pytest.raises(ConfigError, match=r"npy"):
            read_tokens(tmp_path / name, None, None)


def test_missing_files_and_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_tokens(tmp_path / "absent.txt", TOKENIZER, None)
    with pytest.raises(ConfigError, match="the model has no tokenizer; give token ids"):
        read_tokens(written(tmp_path, "a.txt", "a"), None, None)
