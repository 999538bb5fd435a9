"""Tokenizers from the metadata of GGUF files on 2230 texts: the ids that llama.cpp and the library's own parts give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Raw

from mpo_runtime.loading import read_text_files
from mpo_runtime.weights.gguf import Gguf
from tests.runtime.llama_cpp_ids import (
    BYTE_LEVEL,
    RECORD,
    SENTENCEPIECE,
    digests,
    embedded_document,
    texts,
    write_vocabulary,
)
from tests.runtime.test_gguf_tokenizer import RULES


@pytest.mark.parametrize("rule", [*BYTE_LEVEL, *SENTENCEPIECE])
def test_the_ids_are_those_of_llama_cpp(tmp_path: Path, rule: str) -> None:
    tokenizer, _ = read_text_files(Gguf(write_vocabulary(tmp_path / "model.gguf", rule)))
    assert tokenizer is not None
    found = digests(lambda text: tokenizer.encode(text, parse_special=True))
    recorded = json.loads(RECORD.read_text())[rule]
    assert len(found) == len(recorded)
    differing = [place for place, pair in enumerate(zip(found, recorded, strict=True)) if len(set(pair)) > 1]
    assert not differing, [texts()[place * 100 : place * 100 + 100] for place in differing]


def test_the_ids_of_the_embedded_vocabulary_are_those_of_its_own_document(tmp_path: Path) -> None:
    """The vocabulary is numbered anew in the GGUF file: tokens are compared."""
    tokenizer, _ = read_text_files(Gguf(write_vocabulary(tmp_path / "model.gguf", "qwen2")))
    assert tokenizer is not None
    own = Raw.from_str(json.dumps(embedded_document()))
    for text in texts():
        ids = tokenizer.encode(text, parse_special=True)
        assert [tokenizer.id_to_token(token) for token in ids] == own.encode(text, add_special_tokens=False).tokens
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("rule", BYTE_LEVEL)
def test_the_cuts_are_those_of_the_librarys_parts(tmp_path: Path, rule: str) -> None:
    tokenizer, _ = read_text_files(Gguf(write_vocabulary(tmp_path / "model.gguf", rule)))
    assert tokenizer is not None
    document = embedded_document()
    document["pre_tokenizer"] = None
    document["model"]["ignore_merges"] = rule == "llama-bpe"
    raw = Raw.from_str(json.dumps(document))
    raw.pre_tokenizer = RULES[rule]
    for text in texts():
        ids = tokenizer.encode(text, parse_special=True)
        assert [tokenizer.id_to_token(token) for token in ids] == raw.encode(text, add_special_tokens=False).tokens
