"""The tokenizer and the chat template of a `.mpo` file as metadata of a GGUF file; the counterpart of gguf_tokenizer.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mpo_formats import Architecture, ConfigError, MpoFile
from mpo_runtime.text.gguf_tokenizer import PRE_TOKENIZERS
from mpo_runtime.text.sentencepiece import CONTROL, NORMAL, UNKNOWN, USER_DEFINED

UNUSED, BYTE = 5, 6
# llama.cpp's name for the rules that Granite 3 shares with SmolLM.
GRANITE_DIGITS = "refact"
# Settings of a pre-tokenizer that change nothing but offsets, which llama.cpp does not have.
IMMATERIAL = ("trim_offsets", "invert")


def add_tokenizer(writer: Any, file: MpoFile, architecture: Architecture) -> None:
    """Adds vocabulary, merges, special tokens and chat template to a GGUFWriter; nothing where the file has no tokenizer.

    Raises:
        ConfigError: for a tokenizer that llama.cpp has no name for.
    """
    content = file.file("tokenizer.json")
    if content is None:
        if file.file("tokenizer.model") is not None:
            raise ConfigError(
                f"{file.name}: has a tokenizer.model without tokenizer.json, which to-gguf cannot write yet"
            )
        writer.add_tokenizer_model("none")
        return
    document = json.loads(content)
    model = document["model"]
    if model.get("type") != "BPE":
        raise ConfigError(f"{file.name}: tokenizer of type {model.get('type')}: to-gguf writes BPE only")
    if model.get("byte_fallback"):
        add_sentencepiece(writer, document)
    else:
        add_byte_level(writer, document, file.name, architecture.model_type)
    rows = tokens_and_types(document, architecture.vocab_size)
    writer.add_token_list([token for token, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    if model.get("byte_fallback"):
        writer.add_token_scores(scores(document, [token for token, _ in rows]))
    ends = architecture.eos_token_ids
    for name, token in (
        ("bos", architecture.bos_token_id),
        ("eos", ends[0] if ends else None),
        ("pad", architecture.pad_token_id),
    ):
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(begins_with_bos(document))
    if template := file.file("chat_template.jinja"):
        writer.add_chat_template(template.decode())


def add_byte_level(writer: Any, document: Mapping[str, Any], name: str, model_type: str) -> None:
    """Adds the kind of a byte-level BPE, how it cuts text, and its merges."""
    wanted = steps(document.get("pre_tokenizer"))
    names = [pre for pre, known in PRE_TOKENIZERS.items() if steps({"pretokenizers": known}) == wanted]
    if not names:
        raise ConfigError(
            f"{name}: its tokenizer cuts text in a way that to-gguf has no name of llama.cpp for; "
            f"known: {', '.join(PRE_TOKENIZERS)}"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(GRANITE_DIGITS if model_type == "granite" and GRANITE_DIGITS in names else names[0])
    merges = document["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])


def steps(pre_tokenizer: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A pre-tokenizer as a list of steps, without what changes nothing."""
    if pre_tokenizer is None:
        return []
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return [{key: value for key, value in part.items() if key not in IMMATERIAL} for part in parts]


def add_sentencepiece(writer: Any, document: Mapping[str, Any]) -> None:
    """Adds the kind of a SentencePiece BPE, and whether it puts a space in front."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    rules = json.dumps([document.get("normalizer"), document.get("pre_tokenizer")])
    writer.add_add_space_prefix('"Prepend"' in rules or '"first"' in rules or '"always"' in rules)


def scores(document: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """A score for each token of a SentencePiece BPE: the rank of its first merge, negative; a low one without merge."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(document["model"]["merges"]):
        ranks.setdefault("".join(merge) if isinstance(merge, list) else merge.replace(" ", ""), rank)
    return [-float(ranks[token]) if token in ranks else -1e6 for token in tokens]


def tokens_and_types(document: Mapping[str, Any], vocabulary: int) -> list[tuple[str, int]]:
    """Spelling and type of every row of the embedding; rows without a token are unused ones."""
    model = document["model"]
    found = {index: (token, NORMAL) for token, index in model["vocab"].items()}
    if model.get("byte_fallback"):
        for index, (token, _) in found.items():
            if token == model.get("unk_token"):
                found[index] = (token, UNKNOWN)
            elif token.startswith("<0x") and len(token) == 6:
                found[index] = (token, BYTE)
    for added in document.get("added_tokens", []):
        kind = CONTROL if added["special"] else USER_DEFINED
        if found.get(added["id"], ("", NORMAL))[1] != UNKNOWN:
            found[added["id"]] = (added["content"], kind)
    return [found.get(index, (f"[PAD{index}]", UNUSED)) for index in range(vocabulary)]


def begins_with_bos(document: Mapping[str, Any]) -> bool:
    """Whether the tokenizer puts a special token in front of a text."""
    processor = document.get("post_processor") or {}
    for part in processor.get("processors", [processor]):
        single = part.get("single") or []
        if part.get("type") == "TemplateProcessing" and single and "SpecialToken" in single[0]:
            return True
    return False
