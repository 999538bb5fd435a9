"""Sequences of tokens with their pages of the KV cache, and one step of a model over several of them. Ids only, no text."""

from __future__ import annotations

import collections.abc as abc
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_formats import Architecture, ConfigError
from mpo_runtime.backends.ops import PAGE, Span
from mpo_runtime.engine.pages import PagePool, PrefixTree
from mpo_runtime.models.decoder import Decoder

Logits = NDArray[np.float32]
# Tokens of a prompt that are run at once.
PREFILL_CHUNK = 256


class Sequence:
    """A text whose keys and values are in pages of its own, and in pages that it shares with others.

    Attributes:
        held: the ids whose keys and values are in the pages.
        exact: how many of them, from the first one on, were run as parts of a prompt.

    Args:
        grain: where the tokens that are run together round one another's results, how many that is; else 1. Only whole runs
            of so many tokens are exact then.
    """

    def __init__(self, pool: PagePool, grain: int = 1) -> None:
        self.pool, self.grain = pool, grain
        self.held: list[int] = []
        self.pages: list[int] = []
        self.exact = 0

    def begin(self, tree: PrefixTree, ids: abc.Sequence[int], *, exact: bool) -> int:
        """Takes over what the tree keeps of the beginning of `ids`, and returns the number of tokens.

        Args:
            exact: takes over only what was run as parts of a prompt.
        """
        found = tree.match(ids, exact=exact)
        shared = sum(count for _, count in found)
        if exact:
            shared -= shared % self.grain
        for index, (node, _) in enumerate(found):
            count = min(PAGE, shared - index * PAGE)
            if count <= 0:
                break
            if count == PAGE:
                self.pages.append(self.pool.share(node.page))
            else:  # this sequence will write to the rest of the page
                self.pages.append(self.pool.take())
                self.pool.store.copy(node.page, self.pages[-1])
            if self.exact == index * PAGE:
                self.exact += min(count, node.exact)
        self.held = list(ids[:shared])
        return shared

    def reserve(self, count: int) -> None:
        """Takes pages for `count` more tokens; raises MemoryError where memory does not suffice."""
        while len(self.pages) * PAGE < len(self.held) + count:
            self.pages.append(self.pool.take())

    def extend(self, ids: abc.Sequence[int], *, few: bool) -> None:
        """Notes that the keys and values of these tokens are in the pages."""
        if not few and self.exact == len(self.held) and self.exact % self.grain == 0:
            self.exact += len(ids)
        self.held += ids

    def truncate(self, length: int) -> None:
        """Forgets all tokens from position `length` on."""
        del self.held[length:]
        self.exact = min(self.exact, length)
        while (len(self.pages) - 1) * PAGE >= length and self.pages:
            self.pool.release(self.pages.pop())

    def keep(self, tree: PrefixTree, *, whole: bool) -> None:
        """Lets the tree keep what is in the pages, for other sequences; with `whole` only full ones."""
        full = len(self.held) // PAGE if whole else -(-len(self.held) // PAGE)
        tree.insert(self.held, self.pages[:full], self.exact)

    def release(self) -> None:
        """Gives all pages back."""
        self.truncate(0)


@dataclass(frozen=True, slots=True)
class Part:
    """New tokens of one sequence in a step.

    Attributes:
        few: a generated token and drafts after it, otherwise a part of a prompt (Span).
        last: how many of the last tokens' logits are wanted for drawing the next token.
        scored: whether the logits of all tokens are wanted for scoring; they may be rounded differently.
    """

    sequence: Sequence
    ids: list[int]
    few: bool
    last: int = 1
    scored: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """The logits [last, vocabulary] of a part's last tokens, and [S, vocabulary] of all of them if they were asked for."""

    last: Logits
    scored: Logits | None = None


def run_step(model: Decoder, parts: abc.Sequence[Part], *, together: bool) -> list[Outcome]:
    """Runs the new tokens of several sequences in one step; those of generated text come first.

    Args:
        together: layers see the tokens of all sequences at once, so that weights are read once. Otherwise each sequence is run
            on its own: its result then does not depend on the others even where the backend is not `row_exact`.

    Raises:
        MemoryError: where memory does not suffice for new pages; nothing was run then.
    """
    for part in parts:
        part.sequence.reserve(len(part.ids))
    groups = [parts] if together else [[part] for part in parts]
    return [outcome for group in groups for outcome in _run_together(model, group)]


def _run_together(model: Decoder, parts: abc.Sequence[Part]) -> list[Outcome]:
    ops, store = model.ops, parts[0].sequence.pool.store
    spans = [Span(part.sequence.pages, len(part.sequence.held), len(part.ids), part.few) for part in parts]
    ids = [token for part in parts for token in part.ids]
    if all(len(part.ids) == part.last == 1 and part.few and not part.scored for part in parts):
        found = ops.next_logits(model.forward, model.logits, ids, store, spans)
        if found is not None:
            for part in parts:
                part.sequence.extend(part.ids, few=True)
            return [Outcome(found[index : index + 1]) for index in range(len(parts))]
    hidden = ops.run(model.forward, ops.ids([ids]), ops.spans(store, spans))
    for part in parts:
        part.sequence.extend(part.ids, few=part.few)
    ends = np.cumsum([len(part.ids) for part in parts]).tolist()
    rows = [row for part, end in zip(parts, ends, strict=True) for row in range(end - part.last, end)]
    last = _logits(model, hidden, rows)
    outcomes, at = [], 0
    for part, end in zip(parts, ends, strict=True):
        scored = None
        if part.scored:
            scored = ops.to_numpy(model.logits(hidden[:, end - len(part.ids) : end]))[0]
        outcomes.append(Outcome(last[at : at + part.last], scored))
        at += part.last
    return outcomes


def _logits(model: Decoder, hidden: Any, rows: list[int]) -> Logits:
    """The logits [R, vocabulary] of some tokens of hidden [1, S, E], each as a row of one token."""
    if not rows:
        return np.empty((0, model.architecture.vocab_size), np.float32)
    every = len(rows) == hidden.shape[1]
    chosen = hidden[0] if every else hidden[0][rows]
    logits: Logits = model.ops.to_numpy(model.logits(chosen[:, None]))[:, 0]
    return logits


class Engine:
    """One sequence, run step by step by the caller: for measurements. Texts are generated by the Scheduler.

    Args:
        context: tokens that the sequence may have; where None, the longest context of the model, but at most 4,096.
        chunk: tokens of a prompt that are run at once; None for what suits the backend.

    Raises:
        ConfigError: for a context of less than 2 tokens or above the model's longest.
    """

    def __init__(self, model: Decoder, *, context: int | None = None, chunk: int | None = None) -> None:
        self.model = model
        self.context = checked_context(model.architecture, context)
        self.chunk = chunk or model.ops.prompt_tokens
        self.sequence = Sequence(PagePool(model.ops.new_pages(model.architecture)))

    def prefill(self, ids: abc.Sequence[int]) -> Logits:
        """Runs a prompt after nothing else, and returns the logits [vocabulary] after its last id.

        Raises:
            ConfigError: when the prompt is empty, longer than the context, or has an id outside the vocabulary.
        """
        check_prompt(ids, self.context, self.model.architecture.vocab_size)
        self.sequence.truncate(0)
        for start in range(0, len(ids), self.chunk):
            [outcome] = run_step(
                self.model, [Part(self.sequence, list(ids[start : start + self.chunk]), few=False)], together=True
            )
        logits: Logits = outcome.last[0]
        return logits

    def advance(self, ids: abc.Sequence[int]) -> Logits:
        """Runs generated tokens after those held, and returns the logits [vocabulary] after the last one."""
        [outcome] = run_step(self.model, [Part(self.sequence, list(ids), few=True)], together=True)
        logits: Logits = outcome.last[0]
        return logits


def default_context(architecture: Architecture, context: int | None) -> int:
    """The context to allocate in tokens: as asked; where None, the model's longest, but at most 4,096.

    Raises:
        ConfigError: for more than the model's longest context.
    """
    longest = architecture.max_position_embeddings
    if context is not None and context > longest:
        raise ConfigError(f"context of {context} tokens: the model was made for {longest}; lower --ctx-size")
    return context if context is not None else min(longest, 4096)


def checked_context(architecture: Architecture, context: int | None) -> int:
    """As `default_context`; raises ConfigError for less than 2 tokens, too."""
    chosen = default_context(architecture, context)
    if chosen < 2:
        raise ConfigError(f"context: expected at least 2 tokens, found {chosen}; raise --ctx-size")
    return chosen


def check_prompt(ids: abc.Sequence[int], context: int, vocabulary: int) -> None:
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
