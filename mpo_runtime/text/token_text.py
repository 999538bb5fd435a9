"""Reads evaluation and calibration text: plain text, JSONL with text or messages, or a file of token ids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpo_formats import ConfigError, MpoError
from mpo_formats.git_lfs import is_pointer, pointer_message
from mpo_runtime.text.chat_template import ChatTemplate, encode_chat
from mpo_runtime.text.decode import decode_text
from mpo_runtime.text.rows import parse_row
from mpo_runtime.text.tokenizer import Tokenizer

END_OF_TEXT = "<|end_of_text|>"
# Held-out text of three domains, what certificates are measured on if the user says nothing.
BUILT_IN_TEXT = Path(__file__).parents[1] / "data" / "evaluation.jsonl"


@dataclass(frozen=True, slots=True)
class TokenText:
    """A tokenised text: its ids, the UTF-8 bytes of its content (0: not known), a name and a digest of the source."""

    name: str
    ids: NDArray[np.int64]
    content_bytes: int
    sha256: str

    def first(self, count: int) -> TokenText:
        """The first `count` tokens; `content_bytes` becomes 0 (not known) where that leaves tokens out."""
        if count >= self.ids.size:
            return self
        return replace(self, ids=self.ids[:count], content_bytes=0)


def read_tokens(path: Path, tokenizer: Tokenizer | None, template: ChatTemplate | None) -> TokenText:
    """Tokenises a text file as a whole.

    `.txt` and others are plain UTF-8, with documents separated by a line `<|end_of_text|>` where there is one; each
    document ends with the model's end-of-text token. `.jsonl` rows hold `text`, or messages in one of
    the layouts of mpo_runtime.text.rows, which the model's chat template renders; without a template their contents are
    joined as lines of plain text. `.u16` and `.npy` are token ids.

    Raises:
        ConfigError: naming the file and line that cannot be read.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give a text, .jsonl, .u16 or .npy file"
        ) from None
    if is_pointer(raw[:64]):
        raise ConfigError(pointer_message(path))
    digest = hashlib.sha256(raw).hexdigest()
    if path.suffix == ".u16":
        if len(raw) % 2:
            raise ConfigError(f"{path}: {len(raw)} bytes, expected two for each token id; write it again")
        return TokenText(path.name, np.frombuffer(raw, "<u2").astype(np.int64), 0, digest)
    if path.suffix == ".npy":
        return TokenText(path.name, _array_tokens(path), 0, digest)
    if tokenizer is None:
        raise ConfigError(f"{path}: the model has no tokenizer; give token ids as .u16 or .npy")
    text = decode_text(raw, path)
    if path.suffix == ".jsonl":
        documents = [
            # str.splitlines would also cut at U+2028 and the like, which JSON allows inside a string
            _row_tokens(line, number, path, tokenizer, template)
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    else:
        documents = [_text_tokens(part, tokenizer) for part in text.split(f"\n{END_OF_TEXT}\n") if part.strip()]
    ids = [token for tokens, _ in documents for token in tokens]
    if not ids:
        raise ConfigError(f"{path}: holds no text")
    return TokenText(path.name, np.array(ids, np.int64), sum(size for _, size in documents), digest)


def _array_tokens(path: Path) -> NDArray[np.int64]:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError):
        raise ConfigError(f"{path}: not a .npy file of numbers; write it with numpy.save") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        raise ConfigError(f"{path}: expected an array of integer token ids; write it with numpy.save")
    return array.astype(np.int64).reshape(-1)


def _text_tokens(text: str, tokenizer: Tokenizer) -> tuple[list[int], int]:
    text = text.removesuffix(f"\n{END_OF_TEXT}")
    ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return [*tokenizer.encode(text), *ends], len(text.encode())


def _row_tokens(
    line: str, number: int, path: Path, tokenizer: Tokenizer, template: ChatTemplate | None
) -> tuple[list[int], int]:
    row = parse_row(line, f"{path}: line {number}")
    if isinstance(row, str):
        return _text_tokens(row, tokenizer)
    if template is None:
        return _text_tokens("\n".join(message["content"] for message in row), tokenizer)
    size = sum(len(message["content"].encode()) for message in row)
    try:
        return encode_chat(template, tokenizer, row, add_generation_prompt=False), size
    except MpoError as error:  # a template may refuse roles or their order
        raise ConfigError(f"{path}: line {number}: {error}") from None
