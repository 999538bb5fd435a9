"""Perplexity, Kullback-Leibler divergence and agreement of the most likely token, over windows of a text.

A text of N tokens is cut into consecutive windows of W tokens, the last one shorter. Each window is run on its own. Where the
model has a begin-of-text token it is put in front of each window, and every token of the text is predicted once; without it
the first token of each window is not predicted. Means are over predicted tokens. The standard error is that of the mean over
windows, which are taken as independent (tokens of one window are not); of a single window, over its tokens.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mpo_formats import ConfigError
from mpo_runtime.models.decoder import Decoder

Logits = NDArray[np.float32]
# Called with the number of windows done and their total.
Progress = Callable[[int, int], None]
# Tokens of a window where none is given, the begin-of-text token included.
DEFAULT_WINDOW = 512
# Logits that are compared at a time.
PIECE = 1 << 18
Item = TypeVar("Item")
Found = TypeVar("Found")


class Over(Protocol):
    """Does a piece of work for every item and returns what it finds, in their order."""

    def __call__(self, work: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
        """`work` of every item."""
        ...


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean negative log-likelihood in nats, with its standard error, over `tokens` predictions."""

    perplexity: float
    error: float
    nats: float
    tokens: int
    windows: int
    window: int

    def bits_per_byte(self, content_bytes: int) -> float:
        """The summed loss in bits, divided by the number of UTF-8 bytes of the text."""
        return self.nats * self.tokens / math.log(2) / content_bytes


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model against a reference on the same tokens.

    `kl_mean` and `kl_999` are the mean and the 99.9 % quantile of KL(reference ‖ model) in nats a token, `same_top1` the
    share of tokens where both have the same most likely token, `cosine` and `mse` compare the logits.
    """

    model: Perplexity
    reference: Perplexity
    kl_mean: float
    kl_999: float
    same_top1: float
    cosine: float
    mse: float


def cut_windows(ids: NDArray[np.int64], model: Decoder, window: int | None) -> list[NDArray[np.int64]]:
    """Cuts a text into windows, each beginning with the begin-of-text token where the model has one.

    Args:
        ids: the token ids [N] of the text.
        window: tokens of a window, the begin-of-text token included; None for 512, or the model's context if shorter.

    Raises:
        ConfigError: for a window that does not fit into the model's context, an id outside its vocabulary, or a text of
            fewer than 2 tokens.
    """
    architecture = model.architecture
    longest = architecture.max_position_embeddings
    size = min(DEFAULT_WINDOW, longest) if window is None else window
    if not 2 <= size <= longest:
        raise ConfigError(f"window: expected 2 to {longest} tokens, found {size}")
    check_ids(ids, model)
    lead = [] if architecture.bos_token_id is None else [architecture.bos_token_id]
    step = size - len(lead)
    windows = [
        np.concatenate((np.array(lead, np.int64), ids[start : start + step])) for start in range(0, ids.size, step)
    ]
    windows = [part for part in windows if part.size >= 2]
    if not windows:
        raise ConfigError("text: too short, expected at least 2 tokens")
    return windows


def check_ids(ids: NDArray[np.int64], model: Decoder) -> None:
    """Raises ConfigError for a token id outside the model's vocabulary."""
    size = model.architecture.vocab_size
    outside = ids[(ids < 0) | (ids >= size)]
    if outside.size:
        raise ConfigError(
            f"text: token id {outside[0]} lies outside the vocabulary of {size}; "
            "tokenise it with this model's tokenizer"
        )


def window_logits(model: Decoder, window: NDArray[np.int64]) -> Logits:
    """The logits [S − 1, vocabulary] that predict tokens 1 … S − 1 of a window."""
    [logits] = piecewise_logits(model, window, window.size)
    return logits


def piecewise_logits(model: Decoder, window: NDArray[np.int64], size: int) -> Iterator[Logits]:
    """Yields the rows of `window_logits` in order, at most `size` rows at a time."""
    inputs = window[:-1].tolist()
    cache = model.ops.new_cache(model.architecture, 1, len(inputs))
    for start in range(0, len(inputs), size):
        part = inputs[start : start + size]
        hidden = model.hidden(model.ops.ids([part]), cache, [len(part)])
        yield model.ops.to_numpy(model.logits(hidden))[0]


def log_softmax(logits: Logits) -> Logits:
    """Log-probabilities along the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    result: Logits = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def summarise(losses: list[NDArray[np.float64]], window: int) -> Perplexity:
    """Perplexity and its standard error from the losses in nats of each window's tokens."""
    tokens = sum(part.size for part in losses)
    nats = float(sum(part.sum() for part in losses)) / tokens
    if not math.isfinite(nats):
        raise ConfigError("perplexity: the model's output is not finite; run mpo-run verify on the file")
    # The standard error of a ratio estimator over windows of unequal length; of one window, over its tokens.
    parts = losses if len(losses) > 1 else list(losses[0][:, None])
    deviations = np.array([part.sum() - nats * part.size for part in parts])
    count = len(parts)
    spread = math.sqrt(float((deviations**2).sum()) * count / max(count - 1, 1)) / tokens
    value = math.exp(min(nats, 700.0))
    return Perplexity(value, value * spread, nats, tokens, len(losses), window)


def perplexity(
    model: Decoder, ids: NDArray[np.int64], window: int | None = None, progress: Progress | None = None
) -> Perplexity:
    """The perplexity of a model on the token ids [N] of a text; windows and errors as in `cut_windows`."""
    windows = cut_windows(ids, model, window)
    losses = []
    for index, part in enumerate(windows):
        scores = log_softmax(window_logits(model, part))
        losses.append(-np.take_along_axis(scores, part[1:, None], -1)[:, 0].astype(np.float64))
        if progress:
            progress(index + 1, len(windows))
    return summarise(losses, int(windows[0].size))


@dataclass(frozen=True, slots=True)
class Differences:
    """Two models on a window: the losses in nats [S − 1] of both, KL(reference ‖ model), and what compares their logits."""

    losses: NDArray[np.float64]
    reference_losses: NDArray[np.float64]
    divergences: NDArray[np.float64]
    same: int
    cosines: NDArray[np.float32]
    squares: float


def differences(ours: Logits, theirs: Logits, labels: NDArray[np.int64]) -> Differences:
    """Compares logits [S − 1, vocabulary] with a reference's; `labels` [S − 1] are the tokens that followed.

    Raises:
        ConfigError: when the two have different vocabularies.
    """
    if ours.shape != theirs.shape:
        raise ConfigError(
            f"compare: vocabularies of {ours.shape[-1]} and {theirs.shape[-1]} tokens differ; "
            "give the model that the file was made from"
        )
    count = len(labels)
    losses, reference_losses, divergences = (np.empty(count) for _ in range(3))
    cosines, same, squares = np.empty(count, np.float32), 0, 0.0
    step = max(1, PIECE // ours.shape[-1])
    for start in range(0, count, step):  # pieces that stay in the caches
        rows = slice(start, start + step)
        a, b, named = ours[rows], theirs[rows], labels[rows, None]
        q, p = log_softmax(a), log_softmax(b)
        divergences[rows] = (np.exp(p) * (p - q)).sum(-1, dtype=np.float64)
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        cosines[rows] = (a * b).sum(-1) / np.maximum(norms, 1e-30)
        squares += float(np.square(a - b).mean(-1, dtype=np.float64).sum())
        losses[rows], reference_losses[rows] = (-np.take_along_axis(x, named, -1)[:, 0] for x in (q, p))
    return Differences(losses, reference_losses, divergences, same, cosines, squares)


def one_by_one(work: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
    """`work` of every item."""
    return [work(item) for item in items]


def compare(
    model: Decoder,
    reference: Decoder | Callable[[NDArray[np.int64]], Logits],
    ids: NDArray[np.int64],
    window: int | None = None,
    progress: Progress | None = None,
    over: Over = one_by_one,
) -> Comparison:
    """Compares a model with a reference on the token ids [N] of a text.

    Args:
        reference: another model, or a function from a window [S] to its logits [S − 1, vocabulary].
        window: as in `cut_windows`.
        over: does a piece of work for every window and returns what it finds in their order, perhaps with several threads.

    Raises:
        ConfigError: when the two have different vocabularies, and as `cut_windows` does.
    """
    windows = cut_windows(ids, model, window)
    lock, finished = threading.Lock(), 0

    def measure(part: NDArray[np.int64]) -> Differences:
        nonlocal finished
        ours = window_logits(model, part)
        theirs = window_logits(reference, part) if isinstance(reference, Decoder) else reference(part)
        found = differences(ours, theirs, part[1:])
        with lock:
            finished += 1
            if progress:
                progress(finished, len(windows))
        return found

    parts = over(measure, windows)
    divergence = np.concatenate([part.divergences for part in parts])
    return Comparison(
        model=summarise([part.losses for part in parts], int(windows[0].size)),
        reference=summarise([part.reference_losses for part in parts], int(windows[0].size)),
        kl_mean=float(divergence.mean()),
        kl_999=float(np.quantile(divergence, 0.999)),
        same_top1=sum(part.same for part in parts) / divergence.size,
        cosine=float(np.concatenate([part.cosines for part in parts]).mean()),
        mse=sum(part.squares for part in parts) / divergence.size,
    )
