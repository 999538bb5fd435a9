"""Turns tokenizer.model, the file of the sentencepiece library, into the document of a tokenizer.json.

The file is a protocol buffer (`ModelProto` in sentencepiece_model.proto of github.com/google/sentencepiece), of which the
few fields that encoding depends on are read here, so that no package is needed for it. BPE merges are not stored: any two
neighbours whose concatenation is a piece may merge, the piece of the highest score first.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mpo_formats.errors import CheckpointError
from mpo_formats.git_lfs import is_pointer, pointer_message

SPACE = "\u2581"
# Types of a piece.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
KINDS = {1: "Unigram", 2: "BPE"}
REMEDY = "let transformers write tokenizer.json: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
# Numbers of the fields: of the model, of a piece, of trainer_spec and of normalizer_spec.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
PIECE_TEXT, PIECE_SCORE, PIECE_TYPE = 1, 2, 3
MODEL_TYPE, SUFFIX_SPACES, BYTE_FALLBACK, UNKNOWN_ID, BOS_ID, EOS_ID = 3, 24, 35, 40, 41, 42
CHARACTER_MAP, DUMMY_PREFIX, REMOVE_SPACES, ESCAPE_SPACES = 2, 3, 4, 5


@dataclass(frozen=True, slots=True)
class Piece:
    """A token: its text, its score (a log-probability, or minus the rank of a merge) and its type."""

    text: str
    score: float
    type: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What encoding depends on; an id of -1 stands for a token that the model does not have."""

    pieces: tuple[Piece, ...]
    kind: str
    byte_fallback: bool
    unknown_id: int
    bos_id: int
    eos_id: int
    character_map: bytes
    dummy_prefix: bool
    remove_spaces: bool

    def text(self, index: int) -> str | None:
        """The text of a piece, None for an id outside the vocabulary."""
        return self.pieces[index].text if 0 <= index < len(self.pieces) else None


def read_model(data: bytes, name: str) -> SentencePieceModel:
    """Reads the bytes of tokenizer.model.

    Raises:
        CheckpointError: naming the file, where it is damaged, of another library (tiktoken), or of a kind that tokenizer.json
            cannot express.
    """
    if is_pointer(data[:64]):
        raise CheckpointError(pointer_message(name))
    try:
        fields = list(_fields(data))
        pieces = tuple(_piece(value) for number, value in fields if number == PIECES)
        trainer, normalizer = (
            {key: value for number, part in fields if number == wanted for key, value in _fields(part)}
            for wanted in (TRAINER, NORMALIZER)
        )
    except (ValueError, TypeError, IndexError, struct.error):
        pieces, trainer, normalizer = (), {}, {}
    if not pieces:
        raise CheckpointError(f"{name}: is not a sentencepiece model; fetch it again, or {REMEDY}")
    kind = KINDS.get(trainer.get(MODEL_TYPE, 1))
    if kind is None or trainer.get(SUFFIX_SPACES) or not normalizer.get(ESCAPE_SPACES, 1):
        raise CheckpointError(f"{name}: is a sentencepiece model of an unusual kind, expected BPE or Unigram; {REMEDY}")
    if len({piece.text for piece in pieces}) < len(pieces):
        raise CheckpointError(f"{name}: has a piece twice; the file is damaged, fetch it again")
    unknown = next((index for index, piece in enumerate(pieces) if piece.type == UNKNOWN), None)
    if unknown is None:
        raise CheckpointError(f"{name}: has no piece for unknown characters; the file is damaged, fetch it again")
    return SentencePieceModel(
        pieces=pieces,
        kind=kind,
        byte_fallback=bool(trainer.get(BYTE_FALLBACK, 0)),
        unknown_id=unknown,
        bos_id=_signed(trainer.get(BOS_ID, 1)),
        eos_id=_signed(trainer.get(EOS_ID, 2)),
        character_map=normalizer.get(CHARACTER_MAP, b""),
        dummy_prefix=bool(normalizer.get(DUMMY_PREFIX, 1)),
        remove_spaces=bool(normalizer.get(REMOVE_SPACES, 1)),
    )


def tokenizer_json(model: SentencePieceModel, config: Mapping[str, Any]) -> bytes:
    """The bytes of a tokenizer.json that encodes as the sentencepiece library does.

    Args:
        config: tokenizer_config.json, with `named_tokens`; its added tokens, `add_bos_token` (true where absent, as
            transformers has it for Llama), `add_eos_token` and `legacy` are heeded.
    """
    tokens = [piece.text for piece in model.pieces]
    scores = [piece.score for piece in model.pieces]
    added = {
        index: _added_token(index, piece.text, special=piece.type != USER_DEFINED)
        for index, piece in enumerate(model.pieces)
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
    }
    for index, token in sorted(_configured_tokens(config).items()):
        # A tokenizer numbers its tokens without gaps: ids that stand for nothing get a text that no text has.
        tokens += [f"<unused id {missing}>" for missing in range(len(tokens), index + 1)]
        scores += [0.0] * (len(tokens) - len(scores))
        tokens[index] = token["content"]
        added[index] = token
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added[index] for index in sorted(added)],
        "normalizer": _sequence("normalizers", _normalizers(model, _is_legacy(config))),
        "pre_tokenizer": _pre_tokenizer(model, _is_legacy(config)),
        "post_processor": _post_processor(model, config, {text: index for index, text in enumerate(tokens)}),
        "decoder": _sequence("decoders", _decoders(model)),
        "model": _bpe(model, tokens) if model.kind == "BPE" else _unigram(model, tokens, scores),
    }
    return json.dumps(document, ensure_ascii=False).encode()


def named_tokens(model: SentencePieceModel) -> dict[str, str]:
    """The begin-of-text, end-of-text and unknown tokens, under the names that tokenizer_config.json has for them."""
    named = {"bos_token": model.bos_id, "eos_token": model.eos_id, "unk_token": model.unknown_id}
    return {name: text for name, index in named.items() if (text := model.text(index)) is not None}


def _bpe(model: SentencePieceModel, tokens: list[str]) -> dict[str, Any]:
    """The BPE model, with the merges in the order of their scores."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    mergeable = {piece.text: piece for piece in model.pieces if piece.type == NORMAL}
    merges = []
    for text, piece in mergeable.items():
        splits = [(text[:place], text[place:]) for place in range(1, len(text))]
        found = [pair for pair in splits if pair[0] in mergeable and pair[1] in mergeable]
        merges += [(-piece.score, vocabulary[left], vocabulary[right], left, right) for left, right in found]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.text(model.unknown_id),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": [[left, right] for *_, left, right in sorted(merges)],
    }


def _unigram(model: SentencePieceModel, tokens: list[str], scores: list[float]) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": model.unknown_id,
        "vocab": [[token, score] for token, score in zip(tokens, scores, strict=True)],
        "byte_fallback": model.byte_fallback,
    }


def _is_legacy(config: Mapping[str, Any]) -> bool:
    """Whether the prefix also goes before text that follows a special token, as it always did until `legacy` came."""
    return config.get("legacy") is not False


def _normalizers(model: SentencePieceModel, legacy: bool) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if model.character_map:
        encoded = base64.b64encode(model.character_map).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if model.remove_spaces:
        steps += [_replace({"Regex": rf"\A +|[ {SPACE}]+\z"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if model.dummy_prefix and legacy:
        steps.append({"type": "Prepend", "prepend": SPACE})
    return [*steps, _replace({"String": " "}, SPACE)]


def _pre_tokenizer(model: SentencePieceModel, legacy: bool) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    if model.dummy_prefix and not legacy:
        steps.append({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False})
    if model.kind == "Unigram":
        # Such a model would take the spelling of a special piece for the piece: cut it after its first character.
        special = [piece.text for piece in model.pieces if piece.type in (UNKNOWN, CONTROL, BYTE) and piece.text[1:]]
        pattern = "|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in special)
        cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "MergedWithPrevious", "invert": False}
        steps += [cut] if special else []
    return _sequence("pretokenizers", steps) if steps else None


def _decoders(model: SentencePieceModel) -> list[dict[str, Any]]:
    steps = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    return [*steps, {"type": "Strip", "content": " ", "start": 1, "stop": 0}] if model.dummy_prefix else steps


def _post_processor(
    model: SentencePieceModel, config: Mapping[str, Any], ids: Mapping[str, int]
) -> dict[str, Any] | None:
    """Puts the begin-of-text and end-of-text tokens around a text, where the configuration has them added."""
    own = named_tokens(model)
    first, last = (
        [text]
        if config.get(f"add_{name}", add) and (text := _content(config.get(name, own.get(name))) or "") in ids
        else []
        for name, add in (("bos_token", True), ("eos_token", False))
    )
    if not first and not last:
        return None
    body: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    before, after = ([{"SpecialToken": {"id": token, "type_id": 0}} for token in part] for part in (first, last))
    return {
        "type": "TemplateProcessing",
        "single": [*before, *body, *after],
        "pair": [*before, *body, *after, {"Sequence": {"id": "B", "type_id": 1}}, *after],
        "special_tokens": {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in [*first, *last]},
    }


def _configured_tokens(config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The tokens that tokenizer_config.json adds to the model's own, by id."""
    decoder = config.get("added_tokens_decoder")
    found = {}
    for key, token in decoder.items() if isinstance(decoder, Mapping) else ():
        text = _content(token)
        if str(key).isdecimal() and text and isinstance(token, Mapping):
            flags = {flag: token[flag] for flag in ("single_word", "lstrip", "rstrip", "normalized") if flag in token}
            found[int(key)] = {**_added_token(int(key), text, special=bool(token.get("special", True))), **flags}
    return found


def _added_token(index: int, text: str, special: bool) -> dict[str, Any]:
    return {
        "id": index,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        # Spaces are written as ▁ before symbols that hold one are looked for.
        "normalized": not special and SPACE in text,
        "special": special,
    }


def _content(token: Any) -> str | None:
    """The text of a token that a configuration gives as a string or as an object."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _sequence(key: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", key: steps}


def _piece(data: Any) -> Piece:
    row = dict(_fields(data))
    score = struct.unpack("<f", row[PIECE_SCORE])[0] if PIECE_SCORE in row else 0.0
    return Piece(bytes(row[PIECE_TEXT]).decode(), score, int(row.get(PIECE_TYPE, NORMAL)))


def _signed(value: int) -> int:
    """An int32 of a protocol buffer, which is stored as 64 bits where it is negative."""
    return value - (1 << 64) if value >> 63 else value


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer message: number, and an integer or the bytes.

    Raises:
        ValueError: where the bytes are no message.
    """
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        wire = tag & 7
        value: Any
        if wire == 0:
            value, place = _varint(data, place)
        else:
            if wire == 2:
                size, place = _varint(data, place)
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
            else:
                raise ValueError(f"wire type {wire}")
            value, place = data[place : place + size], place + size
            if place > len(data):
                raise ValueError("the message is cut")
        yield tag >> 3, value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and where the next field begins."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("the number is too long")
