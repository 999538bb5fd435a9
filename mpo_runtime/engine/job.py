"""A text on its way through the scheduler, and what is told of all of them."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass, field

from mpo_formats import MpoError
from mpo_runtime.engine.generation import Figures, Request, Step
from mpo_runtime.engine.sequence import Sequence
from mpo_runtime.engine.speculation import NgramDrafter
from mpo_runtime.sampler import Sampler

# Steps that a text may be ahead of its reader.
AHEAD = 32


@dataclass(eq=False, slots=True)
class Job:
    """A text on its way through the scheduler; its reader holds the Generation instead."""

    request: Request
    notify: Callable[[], None] | None
    sampler: Sampler
    limit: int
    ends: frozenset[int]
    history: list[int]
    figures: Figures
    drafter: NgramDrafter | None
    submitted: float
    prompt_logprobs: list[float | None] | None
    sequence: Sequence | None = None
    begun: float = 0.0
    steps: queue.SimpleQueue[Step | BaseException | None] = field(default_factory=queue.SimpleQueue)
    cancelled: bool = False
    paused: bool = False

    @property
    def waits(self) -> bool:
        """Whether the reader is so far behind that the text pauses."""
        self.paused = self.steps.qsize() >= AHEAD
        return self.paused

    @property
    def prompt_left(self) -> int:
        """Tokens of the prompt that are not yet run."""
        held = 0 if self.sequence is None else len(self.sequence.held)
        return max(len(self.request.ids) - held, 0)

    def put(self, item: Step | BaseException | None) -> None:
        """Gives the reader a step, an error, or None for the end."""
        self.steps.put(item)
        if self.notify:
            self.notify()

    @property
    def running(self) -> Sequence:
        """The sequence of a text that has begun."""
        if self.sequence is None:
            raise MpoError("scheduler: a text without a sequence")
        return self.sequence


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """What a scheduler is doing, and what it did so far.

    `running` texts are in the steps, `waiting` ones are not yet; `kv_bytes` are in use, of them `kept_bytes` for beginnings
    that later prompts may share; `step_rows` is the mean number of tokens in a step so far.
    """

    running: int
    waiting: int
    kv_bytes: int
    kept_bytes: int
    requests: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    steps: int
    step_rows: float
    drafted: int
    accepted: int
