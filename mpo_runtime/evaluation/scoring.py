"""Log-probabilities of continuations. Requests that begin alike follow one another, and what they share is run once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpo_runtime.engine import PREFILL_CHUNK, shared_prefix
from mpo_runtime.measure import Logits, log_softmax
from mpo_runtime.models.decoder import Decoder

# Token ids of a prompt, and of what follows it.
Pair = tuple[list[int], list[int]]


@dataclass(frozen=True, slots=True)
class Score:
    """The log-probability of a continuation in nats, and whether greedy decoding gives it."""

    nats: float
    greedy: bool


class Scorer:
    """Scores continuations with one KV cache, whose tokens are reused as far as two requests agree.

    Args:
        chunk: tokens that are run at once.
    """

    def __init__(self, network: Decoder, *, chunk: int = PREFILL_CHUNK) -> None:
        self.network = network
        self.longest = network.architecture.max_position_embeddings
        self.chunk = chunk
        self.ran = 0  # tokens that went through the model
        self._cache: Any = None
        self._held: tuple[int, ...] = ()
        self._last: tuple[tuple[int, ...], int, Logits] | None = None

    def scores(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
        """Yields the index and the score of every pair, in the order in which they share most.

        A prompt that is too long for the model loses tokens at its beginning, as in lm-eval. Prompts and continuations hold
        at least one token.
        """
        if not pairs:
            return
        inputs = [tuple((prompt + following)[-(self.longest + 1) :][:-1]) for prompt, following in pairs]
        self._reserve(max(map(len, inputs)))
        for index in sorted(range(len(pairs)), key=lambda place: inputs[place]):
            yield index, self._score(inputs[index], pairs[index][1])

    def _reserve(self, capacity: int) -> None:
        if self._cache is None or self._cache.capacity < capacity:
            self._held, self._last = (), None
            self._cache = self.network.ops.new_cache(self.network.architecture, 1, capacity)

    def _score(self, row: tuple[int, ...], following: list[int]) -> Score:
        count = min(len(following), len(row))
        scores = log_softmax(self._logits(row, count))
        ids = np.array(following[-count:])
        nats = np.take_along_axis(scores, ids[:, None], -1).astype(np.float64).sum()
        return Score(float(nats), bool((scores.argmax(-1) == ids).all()))

    def _logits(self, row: tuple[int, ...], count: int) -> Logits:
        """The logits [count, vocabulary] after each of the last `count` tokens of a row."""
        if self._last is not None and self._last[:2] == (row, count):
            return self._last[2]
        ops, found = self.network.ops, []
        shared = min(shared_prefix(self._held, row), len(row) - count)
        self._held = row[:shared]  # in this order: an interrupt leaves it shorter than the cache, never longer
        self._cache.rewind(shared)
        for start in range(shared, len(row), self.chunk):
            part = list(row[start : start + self.chunk])
            hidden = self.network.hidden(ops.ids([part]), self._cache, [len(part)])
            self._held += tuple(part)
            self.ran += len(part)
            wanted = start + len(part) - (len(row) - count)
            if wanted > 0:
                found.append(ops.to_numpy(self.network.logits(hidden[:, -min(wanted, len(part)) :]))[0])
        logits: Logits = np.concatenate(found)
        self._last = (row, count, logits)
        return logits
