"""What is asked of the scheduler, and the text that comes back from it token by token."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpo_runtime.sampler import SamplingOptions

FinishReason = Literal["stop", "length"]
# Called with the tokens generated so far and the logits [vocabulary] of the next one, which it may change in place.
LogitsHook = Callable[[Sequence[int], NDArray[np.float32]], None]


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token; `finish` is set on the last one.

    `logits` [vocabulary] and `logprob` (in nats) are the model's own, before a logits hook, penalties, bias and temperature.
    """

    token: int
    logprob: float
    logits: NDArray[np.float32]
    finish: FinishReason | None


@dataclass(frozen=True, slots=True)
class Request:
    """A text to continue.

    Args:
        ids: the prompt.
        sampling: with a seed, or at temperature 0, the text does not depend on what else runs.
        max_tokens: None for as many as fit into the context.
        stop_ids: token ids that end the text; the model's end-of-text ids where None.
        logits_hook: called in the scheduler's thread before each token is drawn; -inf forbids a token. An exception ends this
            text alone. It must not wait for anything.
        prompt_logprobs: whether the log-probability of each token of the prompt is wanted; all of the prompt is run then.
    """

    ids: tuple[int, ...]
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    max_tokens: int | None = None
    stop_ids: tuple[int, ...] | None = None
    logits_hook: LogitsHook | None = None
    prompt_logprobs: bool = False


@dataclass(slots=True)
class Figures:
    """What is known of a generation so far; times in seconds.

    cached_tokens were taken from kept beginnings of earlier texts, prompt_done are in the cache. queued_seconds go from
    `submit` to the first chunk of the prompt, prompt_seconds from there to the prompt's logits, decode_seconds from there to the
    last step. Of the `drafted` tokens of speculation `accepted` were kept.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    prompt_done: int = 0
    tokens: int = 0
    queued_seconds: float = 0.0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    drafted: int = 0
    accepted: int = 0


class Generation(Iterator[Step]):
    """A text in the making, read by one thread at a time; made by `Scheduler.submit`.

    The steps come as the scheduler makes them, which pauses this text where its reader is far behind. A generation that is
    dropped is cancelled.
    """

    def __init__(self, job: Any, wake: Callable[[], None]) -> None:
        self._job, self._wake = job, wake
        self.done = False

    @property
    def figures(self) -> Figures:
        """Tokens and times so far."""
        figures: Figures = self._job.figures
        return figures

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.figures.prompt_tokens

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were taken from kept beginnings; known when the first step has come."""
        return self.figures.cached_tokens

    @property
    def prompt_done(self) -> int:
        """Tokens of the prompt that are in the cache so far."""
        return self.figures.prompt_done

    @property
    def queued_seconds(self) -> float:
        """From `submit` to the first chunk of the prompt."""
        return self.figures.queued_seconds

    @property
    def prompt_seconds(self) -> float:
        """From the first chunk of the prompt to its logits."""
        return self.figures.prompt_seconds

    @property
    def decode_seconds(self) -> float:
        """From the logits of the prompt to the last step so far."""
        return self.figures.decode_seconds

    @property
    def prompt_logprobs(self) -> list[float | None] | None:
        """Where asked for, the log-probability of each token of the prompt, None for the first; with the first step."""
        scores: list[float | None] | None = self._job.prompt_logprobs
        return scores

    def __next__(self) -> Step:
        """The next step, waiting for it; raises what went wrong while it was made."""
        if self.done:
            raise StopIteration
        return self._given(self._job.steps.get())

    def poll(self) -> Step | None:
        """The next step if there is one; never waits. Raises as `next` does, except that None stands for StopIteration."""
        if self.done:
            return None
        try:
            return self._given(self._job.steps.get_nowait())
        except (queue.Empty, StopIteration):
            return None

    def _given(self, item: Step | BaseException | None) -> Step:
        if self._job.paused:
            self._wake()
        if isinstance(item, Step):
            self.done = self.done or item.finish is not None
            return item
        self.done = True
        if item is None:
            raise StopIteration
        raise item

    def cancel(self) -> None:
        """Ends the text; its place is free after the running step at most. From any thread, any number of times."""
        if not self.done:
            self.done = self._job.cancelled = True
            self._job.steps.put(None)
            self._wake()

    close = cancel

    def __del__(self) -> None:
        self.cancel()
