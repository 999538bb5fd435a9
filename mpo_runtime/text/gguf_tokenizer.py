"""Makes tokenizer.json, tokenizer_config.json and the chat template from the metadata of a GGUF file.

A GGUF file holds a vocabulary with a type and a score for each token, perhaps merges, and names in `tokenizer.ggml.pre` how
text is cut before them; llama.cpp has the cutting rules in its source. Two kinds are made here as documents of the library
`tokenizers`: byte-level BPE (`tokenizer.ggml.model` gpt2) with the rules below, and SentencePiece BPE (llama), whose merges
follow from the scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mpo_formats.errors import CheckpointError
from mpo_formats.spec import FileName

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"  # stands for a space in SentencePiece's vocabularies
# llama.cpp ends a generation at control tokens of these spellings, whatever the metadata name.
END_SPELLINGS = frozenset(
    ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "<|end_of_text|>"]
)
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")

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


def end_of_text_ids(metadata: Mapping[str, Any], vocabulary: int) -> tuple[int, ...]:
    """The ids at which a generation ends: eos, eot and eom of the metadata, then control tokens known by their spelling."""
    named = [metadata.get(f"tokenizer.ggml.{key}") for key in END_KEYS]
    found = [token for token in named if type(token) is int and 0 <= token < vocabulary]
    tokens, types = metadata.get("tokenizer.ggml.tokens") or [], metadata.get("tokenizer.ggml.token_type") or []
    spellings = {spelling.encode() for spelling in END_SPELLINGS}
    pairs = zip(tokens[:vocabulary], types, strict=False)
    found += [index for index, (token, kind) in enumerate(pairs) if kind == CONTROL and token in spellings]
    return tuple(dict.fromkeys(found))


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
    document = byte_level_document(table) if kind == "gpt2" else sentencepiece_document(table)
    files: dict[FileName, bytes] = {
        "tokenizer.json": json.dumps(document, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(table.config(), ensure_ascii=False).encode(),
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

    def special(self, key: str, default: int | None = None) -> str | None:
        """The spelling of a special token (`bos`, `eos`, …), or None where the file names none that exists."""
        index = self.get(f"{key}_token_id")
        index = default if index is None else index
        return self.tokens[index] if type(index) is int and 0 <= index < len(self.tokens) else None

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
            special = kind in (CONTROL, UNKNOWN) or token in named
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

    def config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        spm = self.get("model") == "llama"
        named = {
            "bos_token": self.special("bos", 1 if spm else None),
            "eos_token": self.special("eos", 2 if spm else None),
            "unk_token": self.special("unknown", 0 if spm else None),
            "pad_token": self.special("padding"),
        }
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{key: token for key, token in named.items() if token is not None},
        }

    def frame(self, begin: bool) -> dict[str, Any] | None:
        """The post-processor that puts bos and eos around a text, None where neither is asked for.

        begin: whether a text begins with bos where the file does not say.
        """
        spm = self.get("model") == "llama"
        bos = self.special("bos", 1 if spm else None) if self.switch("add_bos_token", begin) else None
        eos = self.special("eos", 2 if spm else None) if self.switch("add_eos_token", False) else None
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


def byte_level_document(table: Table) -> dict[str, Any]:
    """The tokenizer.json of a byte-level BPE.

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
    model = bpe(table, merges, ignore_merges=whole)
    return document(
        table,
        model,
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        post_processor=table.frame(whole),
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    )


def sentencepiece_document(table: Table) -> dict[str, Any]:
    """The tokenizer.json of a SentencePiece BPE: merges from the scores, unknown characters as bytes.

    A space goes before the text and after every special token, as SentencePiece and llama.cpp have it, unless the file says
    otherwise (`add_space_prefix`).
    """
    prefix = table.switch("add_space_prefix", True)
    normalizers: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = bpe(table, merges_of_scores(table), unknown=table.special("unknown", 0), byte_fallback=True)
    return document(
        table,
        model,
        normalizer={"type": "Sequence", "normalizers": normalizers},
        pre_tokenizer=None,
        post_processor=table.frame(True),
        decoder={"type": "Sequence", "decoders": decoders},
    )


def merges_of_scores(table: Table) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, those of the highest score first.

    Control tokens and bytes are never parts or results, or text could spell them.

    Raises:
        CheckpointError: where there is no score for each token.
    """
    scores: Sequence[float] = table.array("scores")
    if len(scores) < len(table.tokens):
        raise table.wrong("scores", f"{len(table.tokens)} scores", f"{len(scores)}")
    text = (NORMAL, USER_DEFINED, UNUSED)
    ids = {token: index for index, token in enumerate(table.tokens) if table.types[index] in text}
    found = []
    for token, index in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-scores[index], ids[left], ids[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def bpe(
    table: Table,
    merges: list[tuple[str, str]],
    *,
    unknown: str | None = None,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """The section `model` of a tokenizer.json."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": table.ids,
        "merges": merges,
    }


def document(table: Table, model: dict[str, Any], **stages: dict[str, Any] | None) -> dict[str, Any]:
    """A whole tokenizer.json; stages are its normalizer, pre-tokenizer, post-processor and decoder."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": table.added_tokens(),
        **stages,
        "model": model,
    }
