"""Tokenizers from the metadata of GGUF files: against the library's own parts, transformers' reading, a slow SentencePiece BPE,
and cuts that llama.cpp makes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Raw
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from mpo_formats import CheckpointError
from mpo_runtime.loading import read_text_files
from mpo_runtime.text.gguf_tokenizer import tokenizer_files
from mpo_runtime.text.tokenizer import Tokenizer
from mpo_runtime.weights.gguf import Gguf
from tests.gguf_files import Change, byte_level, convert, write_gguf
from tests.helpers import granite_config, random_tensors

TEXTS = [
    "The quick brown fox; it's WE'LL don’t I'VE 'tis",
    "  two leading spaces, tabs\tand\r\nCRLF  \n\n\n  end  ",
    "1 12 123 1234567 3.14 ½ ② ٣٤ x2y3\n\n9-year",
    'fn main() { println!("{}", a[1] != b); } // a_b',
    "Größe naïve Straße ÀÉÎ déjà vu",
    "Все люди рождаются свободными и равными 99 раз",
    "人人生而自由，在尊严和权利上一律平等。すべての人間は 모든 인간은",
    "सभी मनुष्यों को गौरव และสิทธิ يولد جميع الناس",
    "🙂👍🏽👨‍👩‍👧 a\u0301e\u0308 \u200b\u00a0\u3000|\u2028|",
    "<|im_start|>user\nHi<|im_end|> <|im_start|> a  <think>",
    "aaaaaaaaaaaaaaaaaaaaaaaaa ........ ----- \n\n\n\n\n",
    "",
    " ",
    "   ",
    "\n",
]
CONTROL, OWN = ["<|im_start|>", "<|im_end|>"], ["<think>", "\t\t\t"]
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
# What each name stands for, from the library's parts; the patterns are transformers' copies of the original tokenizers'.
RULES = {
    **{
        name: pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated"), BYTE_LEVEL]
        )
        for name in ("llama-bpe", "qwen2")
    },
    "smollm": DIGITS,
    "refact": DIGITS,
    "starcoder": DIGITS,
    "gpt-2": GPT2,
}


def train(rule: Any, size: int = 600) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges of a byte-level BPE that is trained on the texts, cut by a rule."""
    raw = Raw(models.BPE())
    raw.pre_tokenizer = rule
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(raw.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), [tuple(merge) for merge in model["merges"]]


def write(path: Path, vocabulary: int, tokenizer: Change, change: Change | None = None) -> Path:
    """A GGUF file of a tiny Llama with that tokenizer."""
    config = granite_config(model_type="llama", num_hidden_layers=1, vocab_size=vocabulary)
    tensors = {name: tensor.numpy() for name, tensor in random_tensors(config, 0, torch.float32).items()}
    return write_gguf(path, config, tensors, tokenizer=tokenizer, change=change)


def read(path: Path) -> Tokenizer:
    tokenizer, _ = read_text_files(Gguf(path))
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("pre", RULES)
def test_byte_level_ids_are_those_of_the_librarys_parts(tmp_path: Path, pre: str) -> None:
    tokens, merges = train(RULES[pre])
    ours = read(write(tmp_path / "model.gguf", len(tokens) + 4, byte_level(tokens, merges, pre, CONTROL, OWN)))
    raw = Raw(models.BPE({token: index for index, token in enumerate([*tokens, *CONTROL, *OWN])}, merges))
    raw.pre_tokenizer = RULES[pre]
    raw.add_special_tokens(CONTROL)
    raw.add_tokens(OWN)
    for text in TEXTS:
        ids = ours.encode(text, parse_special=True)
        assert ids == raw.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids, skip_special_tokens=False) == text
        assert not set(ours.encode(text)) & ours.special_ids
    assert list(ours.special_tokens) == CONTROL and set(ours.added_tokens) == {*CONTROL, *OWN}


# transformers cuts smollm, refact and starcoder as gpt-2, without setting digits apart first.
@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-2"])
def test_byte_level_ids_are_those_of_transformers(tmp_path: Path, pre: str) -> None:
    tokens, merges = train(RULES[pre])
    tokenizer = byte_level(tokens, merges, pre, CONTROL, OWN[:1])
    path = write(
        tmp_path / "model.gguf", len(tokens) + 3, tokenizer, lambda writer: writer.add_eos_token_id(len(tokens))
    )
    ours, theirs = read(path), AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in TEXTS:
        assert ours.encode(text, parse_special=True) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        # llama.cpp gives these, build 11549; a vocabulary of bytes and of the merges below.
        ("smollm", "\n\n12", ["ĊĊ", "1", "2"]),
        ("gpt-2", "\n\n12", ["Ċ", "Ċ", "12"]),
        ("llama-bpe", "\n\n12345", ["ĊĊ", "123", "4", "5"]),
        ("qwen2", "\n\n12", ["ĊĊ", "1", "2"]),
        ("smollm", " 12", ["Ġ", "1", "2"]),
        ("gpt-2", " 12", ["Ġ12"]),
        ("llama-bpe", " 12", ["Ġ", "12"]),
        ("gpt-2", "a'D", ["a", "'", "D"]),
        ("llama-bpe", "a'D", ["a", "'D"]),
    ],
)
def test_how_each_rule_cuts(tmp_path: Path, pre: str, text: str, pieces: list[str]) -> None:
    merges = [("Ċ", "Ċ"), ("1", "2"), ("12", "3"), ("Ġ", "12"), ("'", "D")]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    ours = read(write(tmp_path / "model.gguf", len(tokens), byte_level(tokens, merges, pre)))
    assert [ours.id_to_token(token) for token in ours.encode(text)] == pieces


def test_a_piece_that_is_a_token_stays_whole_in_llama_bpe_alone(tmp_path: Path) -> None:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "bc", "abc"]
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]  # by merges alone abc gives a, bc
    found = {}
    for pre in ("llama-bpe", "qwen2"):
        ours = read(write(tmp_path / "model.gguf", len(tokens), byte_level(tokens, merges, pre)))
        found[pre] = [ours.id_to_token(token) for token in ours.encode("abc")]
    assert found == {"llama-bpe": ["abc"], "qwen2": ["a", "bc"]}


@pytest.mark.parametrize(("pre", "expected"), [("llama-bpe", [1]), ("qwen2", []), ("gpt-2", [])])
def test_whether_texts_begin_with_bos(tmp_path: Path, pre: str, expected: list[int]) -> None:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]

    def ids(change: Change) -> list[int]:
        path = write(tmp_path / "model.gguf", len(tokens), byte_level(tokens, [("a", "b")], pre), change)
        return read(path).encode("ab", add_special_tokens=True)

    assert ids(lambda writer: writer.add_bos_token_id(1)) == [*expected, 256]
    for begin in (True, False):
        for end in (True, False):

            def change(writer: Any, begin: bool = begin, end: bool = end) -> None:
                writer.add_bos_token_id(1)
                writer.add_eos_token_id(2)
                writer.add_add_bos_token(begin)
                writer.add_add_eos_token(end)

            assert ids(change) == [1] * begin + [256] + [2] * end


def test_the_chat_template_and_the_names_of_special_tokens(tmp_path: Path) -> None:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]

    def change(writer: Any) -> None:
        writer.add_chat_template("{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
        writer.add_bos_token_id(257)
        writer.add_eos_token_id(258)

    path = write(tmp_path / "model.gguf", 259, byte_level(tokens, [("a", "b")], "smollm", CONTROL), change)
    tokenizer, template = read_text_files(Gguf(path))
    assert tokenizer is not None and template is not None
    assert (tokenizer.bos_token, tokenizer.eos_token) == tuple(CONTROL)
    text = template.render([{"role": "user", "content": "ab"}], bos_token=CONTROL[0], eos_token=CONTROL[1])
    assert tokenizer.encode(text, parse_special=True) == [257, 256, 258]


@pytest.mark.shared
@pytest.mark.parametrize("prefix", [None, False])
def test_sentencepiece_ids_are_those_of_the_models_own_tokenizer(
    shared: Path, tmp_path: Path, prefix: bool | None
) -> None:
    folder = shared / "models" / "stories260K-llama"
    path = convert(
        folder,
        tmp_path / "model.gguf",
        change=None if prefix is None else lambda writer: writer.add_add_space_prefix(prefix),
    )
    ours = read(path)
    state = json.loads((folder / "tokenizer.json").read_text())
    if prefix is False:
        del state["normalizer"]["normalizers"][0]
        del state["decoder"]["decoders"][-1]
    own = Tokenizer.from_bytes(json.dumps(state).encode(), {"bos_token": "<s>"})
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in [*TEXTS, "</s> a<s>b <unk>", "<s>", "é<0x0A>"]:
        for options in ({}, {"parse_special": True}, {"add_special_tokens": True}):
            assert ours.encode(text, **options) == own.encode(text, **options)
        ids = ours.encode(text)
        assert ours.decode(ids) == own.decode(ids)
        # transformers adds no space before a text that begins with one (SentencePiece and llama.cpp do), and always elsewhere.
        if prefix is None and not text.startswith(" ") and "<" not in text:
            assert ids == theirs.encode(text, add_special_tokens=False)


def slow_sentencepiece(ids: dict[str, int], scores: Sequence[float], text: str) -> list[int]:
    """Joins the leftmost of the neighbours whose union has the best score until none is a token; the rest becomes bytes."""
    parts = list(text)
    while True:
        joined = [left + right for left, right in pairwise(parts)]
        ranked = [(-scores[ids[union]], place) for place, union in enumerate(joined) if union in ids]
        if not ranked:
            break
        _, place = min(ranked)
        parts[place : place + 2] = [joined[place]]
    known = [[ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()] for part in parts]
    return [token for group in known for token in group]


@given(
    st.lists(st.text("ab▁é", min_size=2, max_size=5), min_size=2, max_size=14, unique=True),
    st.lists(st.text("ab é日", max_size=16), min_size=1, max_size=8),
)
def test_sentencepiece_merges_follow_from_scores(words: list[str], texts: list[str]) -> None:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *words, "a", "b", "▁", "é"]
    scores = [0.0] * 259 + [-float(index) for index in range(len(tokens) - 259)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [token.encode() for token in tokens],
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.add_space_prefix": False,
    }
    ours = Tokenizer.from_bytes(tokenizer_files(metadata, len(tokens), "x.gguf")["tokenizer.json"], {})
    ids = {token: index for index, token in enumerate(tokens)}
    for text in texts:
        assert ours.encode(text) == slow_sentencepiece(ids, scores, text.replace(" ", "▁"))


def test_text_cannot_spell_a_control_token_of_sentencepiece() -> None:
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "<",
        "/",
        "s",
        ">",
        "</",
        "s>",
        "</s",
    ]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [token.encode() for token in tokens],
        # A control token has the best score, so that the merge to it would come first.
        "tokenizer.ggml.scores": [0.0] * 259 + [-1.0 - index for index in range(7)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 7,
        "tokenizer.ggml.add_space_prefix": False,
    }
    document = tokenizer_files(metadata, len(tokens), "x.gguf")["tokenizer.json"]
    ours = Tokenizer.from_bytes(document, {})
    assert ours.encode("</s>", parse_special=True) == [2]
    assert [ours.id_to_token(token) for token in ours.encode("</s>")] == ["</", "s>"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokens", [b"\xff", b"a"], r"tokens: expected texts in UTF-8"),
        ("tokens", "abc", r"tokens: expected an array, found 'abc'"),
        ("token_type", [1], r"token_type: expected 2 types, found 1"),
        ("scores", [1.0], r"scores: expected 2 scores, found 1"),
    ],
)
def test_tables_that_do_not_fit(key: str, value: Any, message: str) -> None:
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [b"a", b"b"],
        "tokenizer.ggml.scores": [0.0, 0.0],
        f"tokenizer.ggml.{key}": value,
    }
    with pytest.raises(CheckpointError, match=rf"x\.gguf: tokenizer\.ggml\.{message}.*; download the file again"):
        tokenizer_files(metadata, 2, "x.gguf")


def test_a_file_without_a_tokenizer() -> None:
    assert tokenizer_files({}, 10, "x.gguf") == {}
    assert tokenizer_files({"tokenizer.ggml.model": "no_vocab"}, 10, "x.gguf") == {}
