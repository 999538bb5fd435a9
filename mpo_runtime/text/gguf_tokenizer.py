"""Makes tokenizer.json, tokenizer_config.json and the chat template from the metadata of a GGUF file.

A GGUF file holds a vocabulary with a type and a score for each token, perhaps merges, and names in `tokenizer.ggml.pre` how
text is cut before them; llama.cpp has the cutting rules in its source. Two kinds are made here as documents of the library
`tokenizers`: byte-level BPE (`tokenizer.ggml.model` gpt2) with the rules below, and SentencePiece BPE (llama) as from a
tokenizer.model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mpo_formats.errors import CheckpointError
from mpo_formats.spec import FileName
from mpo_runtime.text.sentencepiece import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    SentencePieceModel,
    named_tokens,
    tokenizer_json,
)

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")


def _split(pattern: str) -> list[dict[str, Any]]:
    return [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]


_GPT2 = [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]
_DIGITS = [{"type": "Digits", "individual_digits": True}, *_GPT2]
# How text is cut, by `tokenizer.ggml.pre`, with the other names that llama.cpp has for the same rule.
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _split(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _split(_QWEN2)),
    **dict.fromkeys(("smollm", "refact", "starcoder"), _DIGITS),
    **dict.fromkeys(("gpt-2", "granite-docling"), _GPT2),
}
# In these a piece that is a token stays whole, and texts begin with the bos token unless the file says otherwise.
_WHOLE_PIECES = ("llama-bpe", "llama3", "llama-v3")


def tokenizer_files(metadata: Mapping[str, Any], vocabulary: int, where: str) -> dict[FileName, bytes]:
    """The files tokenizer.json, tokenizer_config.json and chat_template.jinja; none where the file has no tokenizer.

    Args:
        vocabulary: rows of the embedding; where: the file, for messages.

    Raises:
        CheckpointError: for a kind of tokenizer or pre-tokenizer that is not supported, or tables that do not fit together.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return {}
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{where}: tokenizer.ggml.model {kind!r} is not supported; expected gpt2 or llama; "
            "give the model's Hugging Face folder"
        )
    table = Table(metadata, vocabulary, where)
    if kind == "gpt2":
        document, names = byte_level_json(table), table.named_tokens()
    else:
        model = sentencepiece_model(table)
        around = {
            "add_bos_token": table.switch("add_bos_token", True),
            "add_eos_token": table.switch("add_eos_token", False),
        }
        document, names = tokenizer_json(model, around), named_tokens(model)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    files: dict[FileName, bytes] = {
        "tokenizer.json": document,
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False).encode(),
    }
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        files["chat_template.jinja"] = template.encode()
    return files


class Table:
    """The vocabulary of a GGUF file: spelling and type of each token, special tokens, and the merges or scores.

    Raises:
        CheckpointError: for tables that are missing or do not fit together.
    """

    def __init__(self, metadata: Mapping[str, Any], vocabulary: int, where: str) -> None:
        self.metadata, self.where = metadata, where
        raw = self.array("tokens")
        if not raw or len(raw) > vocabulary:
            raise self.wrong("tokens", f"1 to {vocabulary} tokens, the rows of the embedding", f"{len(raw)}")
        # llama.cpp's name for an empty token, which no text can spell either
        self.tokens = [self.decoded("tokens", token) or f"[EMPTY_{index}]" for index, token in enumerate(raw)]
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if self.ids[token] != index)
            raise self.wrong("tokens", "every token once", f"{twice!r} twice")
        self.types = self.array("token_type", [NORMAL] * len(self.tokens))
        if len(self.types) < len(self.tokens):
            raise self.wrong("token_type", f"{len(self.tokens)} types", f"{len(self.types)}")

    def wrong(self, key: str, expected: str, found: str) -> CheckpointError:
        """The error for a table that does not fit."""
        return CheckpointError(
            f"{self.where}: tokenizer.ggml.{key}: expected {expected}, found {found}; download the file again"
        )

    def get(self, key: str) -> Any:
        """The value of `tokenizer.ggml.KEY`, or None."""
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def array(self, key: str, default: list[Any] | None = None) -> list[Any]:
        """An array of the metadata; raises CheckpointError where it is missing and there is no default."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, list):
            raise self.wrong(key, "an array", repr(value))
        return value

    def decoded(self, key: str, raw: Any) -> str:
        """An element of an array of texts."""
        try:
            return str(raw, "utf-8")
        except (TypeError, UnicodeDecodeError):
            raise self.wrong(key, "texts in UTF-8", repr(raw)) from None

    def special(self, key: str, default: int = -1) -> int:
        """The id of a special token (`bos`, `eos`, …); -1 where the vocabulary does not have it."""
        index = self.get(f"{key}_token_id")
        index = default if index is None else index
        return index if type(index) is int and 0 <= index < len(self.tokens) else -1

    def switch(self, key: str, default: bool) -> bool:
        """A truth value of the metadata."""
        value = self.get(key)
        return value if isinstance(value, bool) else default

    def added_tokens(self) -> list[dict[str, Any]]:
        """The tokens that are found in text before anything else: control tokens and, not special, user-defined ones.

        The ids that the metadata name as bos, eos and so on are control tokens whatever their type.
        """
        named = {self.special(key) for key in ("bos", "eos", "unknown", "padding", "eot", "eom")}
        rows = []
        for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=False)):
            special = kind in (CONTROL, UNKNOWN) or index in named
            if special or kind == USER_DEFINED:
                rows.append(
                    {
                        "id": index,
                        "content": token,
                        "single_word": False,
                        "lstrip": False,
                        "rstrip": False,
                        "normalized": False,
                        "special": special,
                    }
                )
        return rows

    def named_tokens(self) -> dict[str, str]:
        """The special tokens under the names that tokenizer_config.json has for them."""
        named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {name: self.special(key) for name, key in named.items()}
        return {name: self.tokens[index] for name, index in ids.items() if index >= 0}

    def frame(self, begin: bool) -> dict[str, Any] | None:
        """The post-processor that puts bos and eos around a text, None where neither is asked for.

        begin: whether a text begins with bos where the file does not say.
        """
        names = self.named_tokens()
        bos = names.get("bos_token") if self.switch("add_bos_token", begin) else None
        eos = names.get("eos_token") if self.switch("add_eos_token", False) else None
        if bos is None and eos is None:
            return None

        def around(name: str) -> list[dict[str, Any]]:
            before = [] if bos is None else [{"SpecialToken": {"id": bos, "type_id": 0}}]
            after = [] if eos is None else [{"SpecialToken": {"id": eos, "type_id": 0}}]
            return [*before, {"Sequence": {"id": name, "type_id": 0}}, *after]

        return {
            "type": "TemplateProcessing",
            "single": around("A"),
            "pair": [*around("A"), *around("B")],
            "special_tokens": {
                token: {"id": token, "ids": [self.ids[token]], "tokens": [token]}
                for token in (bos, eos)
                if token is not None
            },
        }


def byte_level_json(table: Table) -> bytes:
    """The bytes of the tokenizer.json of a byte-level BPE.

    Raises:
        CheckpointError: for an unknown pre-tokenizer, or merges of tokens that the vocabulary lacks.
    """
    pre = table.get("pre")
    if pre not in PRE_TOKENIZERS:
        what = f"{pre!r} is not supported" if pre else "is missing, as in files made before May 2024"
        raise CheckpointError(
            f"{table.where}: tokenizer.ggml.pre {what}; expected one of {', '.join(PRE_TOKENIZERS)}; "
            "give the model's Hugging Face folder"
        )
    merges = []
    for raw in table.array("merges"):
        merge = table.decoded("merges", raw)
        left, _, right = merge[1:].partition(" ")  # a first character that is a space belongs to the token
        pair = (merge[:1] + left, right)
        if not right or any(part not in table.ids for part in (*pair, "".join(pair))):
            raise table.wrong("merges", "pairs of tokens that make a token", repr(merge))
        merges.append(pair)
    whole = pre in _WHOLE_PIECES
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": table.added_tokens(),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": table.frame(whole),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": whole,
            "vocab": table.ids,
            "merges": merges,
        },
    }
    return json.dumps(document, ensure_ascii=False).encode()


def sentencepiece_model(table: Table) -> SentencePieceModel:
    """The vocabulary as a SentencePiece BPE with byte fallback, which leaves spaces as they are.

    Raises:
        CheckpointError: where there is no score for each token, or no token for unknown characters.
    """
    scores = table.array("scores")
    if len(scores) < len(table.tokens):
        raise table.wrong("scores", f"{len(table.tokens)} scores", f"{len(scores)}")
    unknown = table.special("unknown", 0)
    if unknown < 0:
        raise table.wrong("unknown_token_id", "the id of a token", repr(table.get("unknown_token_id")))
    return SentencePieceModel(
        pieces=tuple(map(Piece, table.tokens, scores, table.types)),
        kind="BPE",
        byte_fallback=True,
        unknown_id=unknown,
        bos_id=table.special("bos", 1),
        eos_id=table.special("eos", 2),
        character_map=b"",
        dummy_prefix=table.switch("add_space_prefix", True),
        remove_spaces=False,
    )
