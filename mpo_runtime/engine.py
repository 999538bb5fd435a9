"""Generation over token ids: prefill in chunks, then one token a step. The engine handles ids only, no text."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpo_formats import Architecture, ConfigError
from mpo_runtime.forks import renew_in_children
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.sampler import Sampler, SamplingOptions

FinishReason = Literal["stop", "length"]
# Tokens of a prompt that are run at once.
PREFILL_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token; `finish` is set on the last one."""

    token: int
    logprob: float
    logits: NDArray[np.float32]
    finish: FinishReason | None


class Engine:
    """One conversation's state: a model and a KV cache of one row.

    A prompt that begins with the tokens in the cache reuses them. Tokens that are run together are rounded differently from
    tokens that are run one by one. So a reproducible generation (with a seed, or at temperature 0) reuses only whole chunks,
    which an empty cache would be filled with in the same way. One generation runs at a time; a second thread waits.

    Args:
        context: tokens that the cache holds; where None, the longest context of the model, but at most 4,096.
        chunk: tokens of a prompt that are run at once.

    Raises:
        ConfigError: for a context of less than 2 tokens or above the model's longest.
    """

    def __init__(self, model: Decoder, *, context: int | None = None, chunk: int = PREFILL_CHUNK) -> None:
        self.model = model
        self.context = default_context(model.architecture, context)
        if self.context < 2:
            raise ConfigError(f"context: expected at least 2 tokens, found {self.context}; raise --ctx-size")
        self.chunk = chunk
        self.cache = model.ops.new_cache(self.architecture, 1, self.context)
        self.held: list[int] = []  # the ids in the cache
        self.whole = 0  # how many of them were run in whole chunks, from the first one on
        self.lock = threading.Lock()
        renew_in_children(self)

    def renew_after_fork(self) -> None:
        """Makes a forked child ready to generate: the thread that may have been generating does not exist in it."""
        self.lock = threading.Lock()
        self._rewind(0, [])

    @property
    def architecture(self) -> Architecture:
        """The model's architecture."""
        return self.model.architecture

    def reusable(self, ids: Sequence[int], *, repeatable: bool = False) -> int:
        """How many leading ids of a prompt are in the cache and need not be run again.

        Args:
            repeatable: counts whole chunks only: the logits then equal those after an empty cache bit for bit.
        """
        shared = shared_prefix(self.held, ids[:-1])
        return min(shared // self.chunk * self.chunk, self.whole) if repeatable else shared

    def prefill(self, ids: Sequence[int], *, repeatable: bool = False) -> NDArray[np.float32]:
        """Runs the prompt through the model, except the ids that the cache already holds (see `reusable`).

        Returns:
            The logits [vocabulary] after the last id.

        Raises:
            ConfigError: when the prompt is empty, longer than the context, or has an id outside the vocabulary.
        """
        check_prompt(ids, self.context, self.architecture.vocab_size)
        shared = self.reusable(ids, repeatable=repeatable)
        self._rewind(shared, ids)
        return self._advance(ids[shared:])

    def _rewind(self, length: int, ids: Sequence[int]) -> None:
        # In this order: an interrupt between two lines leaves `held` shorter than the cache, never longer.
        self.whole = min(self.whole, length // self.chunk * self.chunk)
        self.held = list(ids[:length])
        self.cache.rewind(length)

    def _advance(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Runs tokens that follow those in the cache, and returns the logits [vocabulary] after the last one."""
        hidden: Any = None
        for start in range(0, len(ids), self.chunk):
            part = list(ids[start : start + self.chunk])
            hidden = self.model.hidden(self.model.ops.ids([part]), self.cache, [len(part)])
            on_grid = len(part) == self.chunk and len(self.held) == self.whole
            self.held += part
            self.whole += len(part) * on_grid
        logits: NDArray[np.float32] = self.model.ops.to_numpy(self.model.logits(hidden[:, -1:]))[0, 0]
        return logits

    def generate(
        self,
        ids: Sequence[int],
        options: SamplingOptions,
        *,
        max_tokens: int | None = None,
        stop_ids: Sequence[int] | None = None,
    ) -> Iterator[Step]:
        """Yields tokens after the prompt `ids` until an end token, `max_tokens` or the end of the context.

        Args:
            options: of the sampler; with a seed, or at temperature 0, the result is reproducible.
            max_tokens: None for as many as fit into the context.
            stop_ids: token ids that end the text; the model's end-of-text ids where None.
        """
        ends = self.architecture.eos_token_ids if stop_ids is None else stop_ids
        room = self.context - len(ids)
        limit = room if max_tokens is None else min(max_tokens, room)
        sampler = Sampler(options)
        with self.lock:
            logits = self.prefill(ids, repeatable=options.repeatable)
            history = list(ids)
            for index in range(limit):
                choice = sampler.sample(logits, history, prompt_length=len(ids))
                history.append(choice.token)
                finish: FinishReason | None = "stop" if choice.token in ends else None
                if finish is None and index + 1 == limit:
                    finish = "length"
                yield Step(choice.token, choice.logprob, logits, finish)
                if finish:
                    return
                logits = self._advance([choice.token])


def default_context(architecture: Architecture, context: int | None) -> int:
    """The context to allocate in tokens: as asked; where None, the model's longest, but at most 4,096.

    Raises:
        ConfigError: for more than the model's longest context.
    """
    longest = architecture.max_position_embeddings
    if context is not None and context > longest:
        raise ConfigError(f"context of {context} tokens: the model was made for {longest}; lower --ctx-size")
    return context if context is not None else min(longest, 4096)


def check_prompt(ids: Sequence[int], context: int, vocabulary: int) -> None:
    """Raises ConfigError for a prompt that is empty, fills the context or has an id outside the vocabulary."""
    if not ids:
        raise ConfigError("prompt: is empty; give at least one token of text")
    if len(ids) >= context:
        raise ConfigError(
            f"prompt: {len(ids)} tokens do not fit into a context of {context}; shorten it or raise --ctx-size"
        )
    for token in (min(ids), max(ids)):
        if not 0 <= token < vocabulary:
            raise ConfigError(f"prompt: token id {token} lies outside the vocabulary of {vocabulary}")


def shared_prefix(held: Sequence[int], ids: Sequence[int]) -> int:
    """The number of leading ids that are equal in both sequences."""
    for index, (left, right) in enumerate(zip(held, ids, strict=False)):
        if left != right:
            return index
    return min(len(held), len(ids))
