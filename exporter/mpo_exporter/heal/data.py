"""The data of a healing: chat rows, rows of text, plain text or token ids, packed into windows of equal length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpo_exporter.heal.settings import Settings
from mpo_exporter.source import data_folder
from mpo_formats import Architecture, ConfigError, MpoError
from mpo_runtime.text.chat_template import ChatTemplate, encode_chat
from mpo_runtime.text.decode import decode_text
from mpo_runtime.text.rows import Message, parse_row
from mpo_runtime.text.token_text import TokenText, read_tokens
from mpo_runtime.text.tokenizer import Tokenizer

# Tokens of a window where the settings name none and the model's context is not shorter.
WINDOW = 256


@dataclass(frozen=True, slots=True)
class HealingText:
    """A tokenised text: `ids` [N], `counts` [N] (which of them count in the loss), and the source's name and SHA-256."""

    name: str
    ids: NDArray[np.int64]
    counts: NDArray[np.bool_]
    sha256: str


def read_healing_text(
    path: Path | TokenText | None,
    tokenizer: Tokenizer | None,
    template: ChatTemplate | None,
    *,
    assistant_only: bool = False,
) -> HealingText:
    """Reads and tokenises a healing text; None means the embedded one.

    Rows of a `.jsonl` file have one of the layouts that mpo_runtime.text.rows knows. Other files are read by `read_tokens`.

    Args:
        path: the file, or a text that is tokenised already.
        assistant_only: only the tokens of the assistant's messages, including the end of each message, count in the loss.

    Raises:
        ConfigError: naming file and line of what cannot be read; for a text in which no token counts.
    """
    if isinstance(path, TokenText):
        if assistant_only:
            raise ConfigError(
                f"{path.name}: is tokenised already, so the assistant's messages cannot be told apart; "
                "give .jsonl rows, or let all tokens count"
            )
        return HealingText(path.name, path.ids, np.ones(path.ids.size, np.bool_), path.sha256)
    path = path or data_folder() / "healing.jsonl"
    if path.suffix != ".jsonl":
        if assistant_only:
            raise ConfigError(f"{path}: has no assistant's messages; give .jsonl rows, or let all tokens count")
        text = read_tokens(path, tokenizer, template)
        return HealingText(text.name, text.ids, np.ones(text.ids.size, np.bool_), text.sha256)
    if tokenizer is None:
        raise ConfigError(f"{path}: the model has no tokenizer; give token ids as .u16 or .npy")
    if assistant_only and template is None:
        raise ConfigError(
            f"{path}: the model has no chat template, so the assistant's messages cannot be found; let all tokens count"
        )
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a text or .jsonl file") from None
    documents = []
    for number, row in _rows(raw, path):
        try:
            documents.append(_document(row, tokenizer, template, assistant_only))
        except MpoError as error:  # a template may refuse a role, or the order of the roles
            raise ConfigError(f"{path}: line {number}: {error}") from None
    ids = np.array([token for tokens, _ in documents for token in tokens], np.int64)
    counts = np.array([flag for _, flags in documents for flag in flags], np.bool_)
    if not counts.any():
        raise ConfigError(f"{path}: holds no {'tokens of the assistant' if assistant_only else 'text'}")
    return HealingText(path.name, ids, counts, hashlib.sha256(raw).hexdigest())


def _rows(raw: bytes, path: Path) -> Iterator[tuple[int, str | list[Message]]]:
    for number, line in enumerate(decode_text(raw, path).split("\n"), 1):
        if line.strip() and (content := parse_row(line, f"{path}: line {number}")):
            yield number, content


def _document(
    row: str | list[Message], tokenizer: Tokenizer, template: ChatTemplate | None, assistant_only: bool
) -> tuple[list[int], list[bool]]:
    if isinstance(row, str) or template is None:
        text = row if isinstance(row, str) else "\n".join(message["content"] for message in row)
        ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        ids = [*tokenizer.encode(text), *ends]
        return ids, [not assistant_only] * len(ids)
    ids = encode_chat(template, tokenizer, row, add_generation_prompt=False)
    if not assistant_only:
        return ids, [True] * len(ids)
    counts = [False] * len(ids)
    for index, message in enumerate(row):
        if message["role"] == "assistant":
            begin = _common(ids, row[:index], template, tokenizer, prompt=True) if index else 0
            end = _common(ids, row[: index + 1], template, tokenizer, prompt=False)
            counts[begin:end] = [True] * max(end - begin, 0)
    return ids, counts


def _common(
    ids: list[int], messages: list[Message], template: ChatTemplate, tokenizer: Tokenizer, *, prompt: bool
) -> int:
    """The number of leading tokens that `messages` alone and the whole conversation `ids` have in common."""
    part = encode_chat(template, tokenizer, messages, add_generation_prompt=prompt)
    return next((k for k, (ours, theirs) in enumerate(zip(part, ids, strict=False)) if ours != theirs), len(part))


def pack_windows(
    text: HealingText, architecture: Architecture, window: int | None, batch: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Packs a text into windows of equal length: token ids [N, W], and which of them count in the loss [N, W].

    Documents follow each other without padding. Each window begins with the model's begin-of-text token if it has one, as
    when quality is measured. An incomplete last window, and windows in which no token counts, are dropped.

    Raises:
        ConfigError: for a window longer than the model's context, a token id outside its vocabulary, or a text with
            fewer windows than a batch needs.
    """
    longest = architecture.max_position_embeddings
    size = min(WINDOW, longest) if window is None else window
    if not 2 <= size <= longest:
        raise ConfigError(f"--window {size}: expected 2 to {longest} tokens, the model's context")
    outside = text.ids[(text.ids < 0) | (text.ids >= architecture.vocab_size)]
    if outside.size:
        raise ConfigError(
            f"{text.name}: token id {outside[0]} lies outside the vocabulary of {architecture.vocab_size}; "
            "tokenise it with this model's tokenizer"
        )
    lead = [] if architecture.bos_token_id is None else [architecture.bos_token_id]
    step = size - len(lead)
    whole = text.ids.size // step
    ids = text.ids[: whole * step].reshape(whole, step)
    counts = text.counts[: whole * step].reshape(whole, step)
    ids = np.concatenate((np.broadcast_to(np.array(lead, np.int64), (whole, len(lead))), ids), axis=1)
    counts = np.concatenate((np.zeros((whole, len(lead)), np.bool_), counts), axis=1)
    kept = counts[:, 1:].any(axis=1)
    if int(kept.sum()) < batch:
        raise ConfigError(
            f"{text.name}: {text.ids.size} tokens fill {int(kept.sum())} windows of {size}, expected at "
            f"least {batch}; give a longer text, or lower --window or --batch"
        )
    return ids[kept], counts[kept]


@dataclass(frozen=True, slots=True)
class HealingData:
    """The windows to train on, in random order.

    Args:
        windows: token ids [N, W].
        counts: 1 for each prediction [N, W − 1] that counts in the loss, 0 for the others.
        name, sha256: of the text's source.
        digest: of all the windows and counts, before they were shuffled.
    """

    windows: NDArray[np.int64]
    counts: NDArray[np.float32]
    name: str
    sha256: str
    digest: str

    @property
    def span(self) -> int:
        """Predictions in a window, W − 1."""
        return int(self.windows.shape[1]) - 1

    def first(self, count: int) -> HealingData:
        """The same data with only the first `count` windows."""
        return replace(self, windows=self.windows[:count], counts=self.counts[:count])


def healing_data(
    text: Path | TokenText | None,
    readers: tuple[Tokenizer | None, ChatTemplate | None],
    architecture: Architecture,
    settings: Settings,
) -> HealingData:
    """Reads a healing text, packs it into windows and shuffles them; raises ConfigError as the two functions above do."""
    words = read_healing_text(text, *readers, assistant_only=settings.assistant_only)
    windows, counts = pack_windows(words, architecture, settings.window, settings.batch)
    digest = hashlib.sha256(windows.tobytes() + counts.tobytes()).hexdigest()
    order = np.random.default_rng(settings.seed).permutation(len(windows))
    return HealingData(windows[order], counts[order, 1:].astype(np.float32), words.name, words.sha256, digest)
