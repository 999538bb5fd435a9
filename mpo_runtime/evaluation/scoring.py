"""Log-probabilities of continuations. Requests that begin alike share what they begin with, and many are run in one step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mpo_runtime.engine import PREFILL_CHUNK, shared_prefix
from mpo_runtime.engine.pages import PagePool, PrefixTree
from mpo_runtime.engine.sequence import Part, run_step
from mpo_runtime.engine.sequence import Sequence as Text
from mpo_runtime.measure import Logits, log_softmax
from mpo_runtime.models.decoder import Decoder

# Token ids of a prompt, and of what follows it.
Pair = tuple[list[int], list[int]]
# Bytes of the KV cache that keep beginnings of texts for the texts after them.
KEPT_BYTES = 256 << 20
# Texts whose continuations are run together at most.
TOGETHER = 64


@dataclass(frozen=True, slots=True)
class Score:
    """The log-probability of a continuation in nats, and whether greedy decoding gives it."""

    nats: float
    greedy: bool


@dataclass(slots=True)
class Asked:
    """A row of token ids, whose last `count` positions are scored, for the requests (index, continuation) that share it."""

    row: tuple[int, ...]
    count: int
    requests: list[tuple[int, NDArray[np.int64]]] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)

    @property
    def prompt(self) -> tuple[int, ...]:
        """What comes before the scored positions."""
        return self.row[: len(self.row) - self.count]

    def add(self, index: int, following: list[int]) -> None:
        """Notes a request for this row."""
        self.requests.append((index, np.array(following[-self.count :])))
        self.nats.append(0.0)
        self.greedy.append(True)

    def count_in(self, position: int, logits: Logits) -> None:
        """Adds what the logits [S, vocabulary] say of the continuations from their token `position` on."""
        scores = log_softmax(logits)
        best = scores.argmax(-1)
        for place, (_, following) in enumerate(self.requests):
            ids = following[position : position + len(scores)]
            self.nats[place] += float(np.take_along_axis(scores, ids[:, None], -1).astype(np.float64).sum())
            self.greedy[place] &= bool((best == ids).all())


class Scorer:
    """Scores continuations; what texts have in common with earlier ones is kept in pages of the KV cache.

    Args:
        chunk: tokens that are run at once.
    """

    def __init__(self, network: Decoder, *, chunk: int = PREFILL_CHUNK) -> None:
        self.network = network
        self.longest = network.architecture.max_position_embeddings
        self.chunk = chunk
        self.ran = 0  # tokens that went through the model
        self._pool = PagePool(network.ops.new_pages(network.architecture))
        self._tree = PrefixTree(self._pool, KEPT_BYTES)

    def scores(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
        """Yields the index and the score of every pair, in the order in which they share most.

        A prompt that is too long for the model loses tokens at its beginning, as in lm-eval. Prompts and continuations hold
        at least one token.
        """
        asked: dict[tuple[tuple[int, ...], int], Asked] = {}
        for index, (prompt, following) in enumerate(pairs):
            row = tuple((prompt + following)[-(self.longest + 1) :][:-1])
            count = min(len(following), len(row))
            asked.setdefault((row, count), Asked(row, count)).add(index, following)
        for batch in self._batches([asked[key] for key in sorted(asked)]):
            prompts = sorted({one.prompt for one in batch})
            common = prompts[0][: shared_prefix(prompts[0], prompts[-1])]
            if len(prompts) > 1:
                self._run([Asked(common, 0)])
            self._run([Asked(prompt, 0) for prompt in prompts])
            self._run(batch)
            for one in batch:
                for (index, _), nats, greedy in zip(one.requests, one.nats, one.greedy, strict=True):
                    yield index, Score(nats, greedy)

    def _batches(self, asked: Iterable[Asked]) -> Iterator[list[Asked]]:
        """The rows in groups that are run together: as many as have about `chunk` tokens of their own."""
        batch: list[Asked] = []
        tokens = 0
        for one in asked:
            own = len(one.row) - (shared_prefix(batch[-1].row, one.row) if batch else 0)
            if batch and (tokens + own > self.chunk or len(batch) == TOGETHER):
                yield batch
                batch, tokens = [], 0
            batch.append(one)
            tokens += own
        if batch:
            yield batch

    def _run(self, asked: Sequence[Asked]) -> None:
        """Runs rows after what is kept of their prompts, `chunk` tokens at a time, and keeps those that are prompts."""
        texts: list[tuple[Asked, Text]] = []
        try:
            for one in asked:
                texts.append((one, Text(self._pool)))
                texts[-1][1].begin(self._tree, one.prompt, exact=False)
            left = [(one, text) for one, text in texts if len(text.held) < len(one.row)]
            while left:
                parts, scored = [], []
                room = self.chunk
                for one, text in left:
                    at = len(text.held)
                    end = len(one.prompt) if at < len(one.prompt) else len(one.row)
                    ids = list(one.row[at : min(end, at + room)])
                    room -= len(ids)
                    parts.append(Part(text, ids, few=False, last=0, scored=at >= len(one.prompt)))
                    scored.append((one, at - len(one.prompt)))
                    if room == 0:
                        break
                outcomes = run_step(self.network, parts, together=True)
                for part, outcome, (one, position) in zip(parts, outcomes, scored, strict=True):
                    self.ran += len(part.ids)
                    if outcome.scored is not None:
                        one.count_in(position, outcome.scored)
                left = [(one, text) for one, text in left if len(text.held) < len(one.row)]
            for one, text in texts:
                if one.count == 0 and text.held:
                    text.keep(self._tree, whole=False)
        finally:
            for _, text in texts:
                text.release()
