"""Many texts in one batch: each step runs the next token of every text, and a part of a prompt beside them.

A text joins at any step and leaves at any step. A step is the one unit of work: chunks of prompts are small enough for the
others not to wait for long, and cancelling takes effect between two steps. Results do not depend on what else is in a step
(Span of backends/ops.py), so that a text with a seed is the same alone and in a full batch.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpo_formats import ConfigError, MpoError
from mpo_runtime.backends.ops import PAGE
from mpo_runtime.engine import prompt_cache
from mpo_runtime.engine.generation import Figures, FinishReason, Generation, Request, Step
from mpo_runtime.engine.job import Job, SchedulerStats
from mpo_runtime.engine.pages import PagePool, PrefixTree
from mpo_runtime.engine.sequence import (
    PREFILL_CHUNK,
    Outcome,
    Part,
    check_prompt,
    checked_context,
    run_step,
)
from mpo_runtime.engine.sequence import Sequence as Tokens
from mpo_runtime.engine.speculation import MOST_SEQUENCES, NgramDrafter, Speculation
from mpo_runtime.forks import renew_in_children
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.sampler import Sampler, SamplingOptions, logprob, without

# Texts in a step, where nothing else is said, and at most.
PARALLEL, MOST_PARALLEL = 16, 64
# Tokens of prompts in a step that generates, too.
BESIDE = 128


class Scheduler:
    """Generates texts, many at a time, in a thread of its own, which runs while there is something to do.

    Args:
        context: tokens of a text, prompt and answer; where None, the longest of the model, but at most 4,096.
        parallel: texts that are in a step at most, 1 to 64; others wait in order of arrival.
        prefix_bytes: of the KV cache that are kept for later prompts with the same beginning; None for one whole context.
        speculate: `ngram` drafts tokens from what the text repeats; None drafts nothing. The text is the same.
        chunk: tokens of prompts that are run in a step; None for what suits the backend.
        deterministic: a text with a seed, or at temperature 0, is the same whatever else runs. Where the backend's kernels
            round a row differently beside others (Ops.row_exact), the texts of a step are then run one by one.

    Raises:
        ConfigError: for a context of less than 2 tokens or above the model's longest, and options out of range.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        context: int | None = None,
        parallel: int = PARALLEL,
        prefix_bytes: int | None = None,
        speculate: Speculation | None = None,
        chunk: int | None = None,
        deterministic: bool = True,
    ) -> None:
        self.model = model
        self.context = checked_context(model.architecture, context)
        if not 1 <= parallel <= MOST_PARALLEL:
            raise ConfigError(f"parallel: expected 1 to {MOST_PARALLEL}, found {parallel}")
        if speculate not in (None, "ngram"):
            raise ConfigError(f"speculate {speculate}: expected ngram")
        if prefix_bytes is not None and prefix_bytes < 0:
            raise ConfigError(f"prefix_bytes: expected 0 or more, found {prefix_bytes}")
        self.parallel, self.speculate, self.deterministic = parallel, speculate, deterministic
        # Where results depend on it, only whole runs of so many tokens are shared: shorter ones then.
        self.chunk = chunk or (PREFILL_CHUNK if deterministic else model.ops.prompt_tokens)
        self.pool = PagePool(model.ops.new_pages(model.architecture))
        whole = -(-self.context // PAGE) * self.pool.store.page_bytes
        self.tree = PrefixTree(self.pool, whole if prefix_bytes is None else prefix_bytes)
        self.unused_ids = np.zeros(0, np.int64)  # rows of the model's output that stand for no token
        self._jobs: list[Job] = []
        self._changed = threading.Condition()  # guards _jobs, _worker and _closed
        self._turn = threading.Lock()  # held during a step: guards pool, tree and sequences
        self._worker: threading.Thread | None = None
        self._closed = False
        self._totals = {"requests": 0, "prompt": 0, "cached": 0, "generated": 0, "steps": 0, "rows": 0}
        self._drafts = [0, 0]
        renew_in_children(self)

    @cached_property
    def together(self) -> bool:
        """Whether the texts of a step are run together: rows do not depend on one another, or need not be the same."""
        return not self.deterministic or self.model.ops.row_exact

    def renew_after_fork(self) -> None:
        """Prepares a forked child to generate; texts that the parent was generating stay with the parent."""
        self._changed, self._turn, self._worker = threading.Condition(), threading.Lock(), None
        for job in self._jobs:
            job.steps = queue.SimpleQueue()
            job.steps.put(ConfigError("generate: the text was begun in the parent process; begin it again in this one"))
        self._jobs = []
        self.pool = PagePool(self.pool.store)
        self.tree = PrefixTree(self.pool, self.tree.budget)

    def submit(self, request: Request, *, notify: Callable[[], None] | None = None) -> Generation:
        """Begins a text and returns at once; safe from any thread.

        Args:
            notify: called in the scheduler's thread after each new step, error or end; it must return quickly.

        Raises:
            ConfigError: for a prompt that is empty, too long or has ids outside the vocabulary; for a closed scheduler.
        """
        architecture = self.model.architecture
        check_prompt(request.ids, self.context, architecture.vocab_size)
        room = self.context - len(request.ids)
        ends = architecture.eos_token_ids if request.stop_ids is None else request.stop_ids
        job = Job(
            request,
            notify,
            Sampler(request.sampling),
            room if request.max_tokens is None else min(request.max_tokens, room),
            frozenset(ends),
            list(request.ids),
            Figures(len(request.ids)),
            NgramDrafter() if self.speculate else None,
            time.monotonic(),
            [None] if request.prompt_logprobs else None,
        )
        with self._changed:
            if self._closed:
                raise ConfigError("the model is closed; load it again")
            self._jobs.append(job)
            self._totals["requests"] += 1
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="mpo-scheduler", daemon=True)
                self._worker.start()
            self._changed.notify_all()
        return Generation(job, self._wake)

    def generate(
        self,
        ids: Sequence[int],
        options: SamplingOptions,
        *,
        max_tokens: int | None = None,
        stop_ids: Sequence[int] | None = None,
    ) -> Generation:
        """Continues a prompt; `submit` of a request with these fields."""
        ends = None if stop_ids is None else tuple(stop_ids)
        return self.submit(Request(tuple(ids), options, max_tokens, ends))

    def save_prefix(self, path: Path, settings: Mapping[str, str], ids: Sequence[int] | None = None) -> int:
        """Writes the KV cache of the text that was used last (prompt_cache.py); returns its tokens, 0 where there is none.

        Args:
            settings: what it depends on besides the tokens; a file is restored under the same settings only.
            ids: writes what is kept of the beginning of these instead.
        """
        with self._turn:
            return prompt_cache.save(path, self.tree, settings, ids)

    def restore_prefix(self, path: Path, settings: Mapping[str, str]) -> list[int]:
        """Keeps what `save_prefix` wrote for later prompts; returns its ids. Raises ConfigError as prompt_cache.restore."""
        with self._turn:
            return prompt_cache.restore(path, self.tree, settings)

    def stats(self) -> SchedulerStats:
        """What it is doing, and totals."""
        with self._changed:
            totals, jobs = dict(self._totals), list(self._jobs)
        running = sum(job.sequence is not None for job in jobs)
        return SchedulerStats(
            running=running,
            waiting=len(jobs) - running,
            kv_bytes=self.pool.used_bytes,
            kept_bytes=self.tree.kept_bytes,
            requests=totals["requests"],
            prompt_tokens=totals["prompt"],
            cached_tokens=totals["cached"],
            generated_tokens=totals["generated"],
            steps=totals["steps"],
            step_rows=totals["rows"] / max(totals["steps"], 1),
            drafted=self._drafts[0],
            accepted=self._drafts[1],
        )

    def close(self) -> None:
        """Ends all texts and waits for the running step; nothing can be submitted afterwards."""
        with self._changed:
            self._closed, worker = True, self._worker
            for job in self._jobs:
                job.cancelled = True
                job.put(None)
            self._changed.notify_all()
        if worker is not None and worker is not threading.current_thread():
            worker.join()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # -- the scheduler's thread

    def _work(self) -> None:
        while True:
            with self._changed:
                while True:
                    gone = [job for job in self._jobs if job.cancelled]
                    ready = [job for job in self._jobs if not (job.cancelled or job.waits)][: self.parallel]
                    if gone or ready:
                        break
                    if not self._jobs:
                        self._worker = None
                        return
                    self._changed.wait()
            with self._turn:
                for job in gone:
                    self._leave(job)
                chosen = self._choose(ready)
                if chosen:
                    self._run(chosen)

    def _leave(self, job: Job) -> None:
        """Takes a text out; what it holds is kept for later prompts."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
        if job.sequence is not None:
            job.sequence.keep(self.tree, whole=False)
            job.sequence.release()
            job.sequence = None

    def _choose(self, ready: list[Job]) -> list[tuple[Job, Part]]:
        """What the next step runs: the next token of each text, and of prompts as much as fits beside."""
        chosen: list[tuple[Job, Part]] = []
        decoding = [job for job in ready if job.sequence is not None and not job.prompt_left]
        for job in decoding:
            chosen.append((job, self._next_part(job, len(decoding))))
        room = min(self.chunk, BESIDE) if decoding and self.together else self.chunk
        for job in ready:
            if job in decoding or room <= 0:
                continue
            try:
                part = self._prompt_part(job, room)
            except Exception as error:  # of one text, whose reader gets it
                self._fail(job, error)
                continue
            chosen.append((job, part))
            room -= len(part.ids)
        return chosen

    def _next_part(self, job: Job, sequences: int) -> Part:
        """The last token of a text, and what may follow it."""
        tokens = job.history[len(job.running.held) :]
        draft: list[int] = []
        if job.drafter is not None and sequences <= MOST_SEQUENCES:
            draft = job.drafter.draft(job.history, job.limit - job.figures.tokens - 1)
        return Part(job.running, [*tokens, *draft], few=True, last=1 + len(draft))

    def _prompt_part(self, job: Job, room: int) -> Part:
        """The next part of a prompt, at most `room` tokens; where rounding depends on it, in chunks that begin at multiples."""
        ids, figures = job.request.ids, job.figures
        if job.sequence is None:
            job.sequence = Tokens(self.pool, 1 if self.together else self.chunk)
            job.begun = time.monotonic()
            figures.queued_seconds = job.begun - job.submitted
            if not job.request.prompt_logprobs:
                exact = job.request.sampling.repeatable
                figures.cached_tokens = figures.prompt_done = job.sequence.begin(self.tree, ids[:-1], exact=exact)
                self._totals["cached"] += figures.cached_tokens
            self._totals["prompt"] += len(ids)
        held = len(job.sequence.held)
        if not self.together:
            room = self.chunk - held % self.chunk
        part = list(ids[held : held + room])
        return Part(
            job.sequence,
            part,
            few=False,
            last=int(held + len(part) == len(ids)),
            scored=job.request.prompt_logprobs,
        )

    def _run(self, chosen: list[tuple[Job, Part]]) -> None:
        """Runs a step and hands its results out; an error of the step ends the texts that were in it."""
        before = [len(part.sequence.held) for _, part in chosen]
        try:
            outcomes = run_step(self.model, [part for _, part in chosen], together=self.together)
        except MemoryError as error:
            if self.tree.kept_bytes:  # the next step has what they held
                self.tree.clear()
            else:
                self._fail(chosen[-1][0], error)
            return
        except BaseException as error:  # the readers get it
            for job, _ in chosen:
                self._fail(job, error)
            return
        self._totals["steps"] += 1
        self._totals["rows"] += sum(len(part.ids) for _, part in chosen)
        for (job, part), start, outcome in zip(chosen, before, outcomes, strict=True):
            if job.cancelled:
                continue
            try:
                self._deliver(job, part, start, outcome)
            except Exception as error:  # of a hook or of logits that are no numbers; only this text's
                self._fail(job, error)

    def _deliver(self, job: Job, part: Part, start: int, outcome: Outcome) -> None:
        """Draws the next tokens of a text from the logits of its part, which began at position `start`."""
        now, figures, sequence = time.monotonic(), job.figures, part.sequence
        if not part.few:
            figures.prompt_done = len(sequence.held)
            figures.prompt_seconds = now - job.begun
            if outcome.scored is not None and job.prompt_logprobs is not None:
                following = job.request.ids[start + 1 : start + 1 + len(part.ids)]
                job.prompt_logprobs += [
                    logprob(row, token) for row, token in zip(outcome.scored, following, strict=False)
                ]
            sequence.keep(self.tree, whole=True)
            if not part.last:
                return
        draft = part.ids[len(part.ids) + 1 - part.last :]
        accepted = 0
        for index, row in enumerate(outcome.last):
            step = self._draw(job, row)
            job.put(step)
            if step.finish is not None:
                break
            if index < len(draft) and draft[index] == step.token:
                accepted += 1
            else:
                break
        figures.decode_seconds = time.monotonic() - job.begun - figures.prompt_seconds
        if draft and job.drafter is not None:
            job.drafter.observe(len(draft), accepted)
            figures.drafted, figures.accepted = job.drafter.drafted, job.drafter.accepted
            self._drafts[0] += len(draft)
            self._drafts[1] += accepted
            sequence.truncate(len(sequence.held) - len(draft) + accepted)
        if step.finish is not None:
            self._leave(job)

    def _draw(self, job: Job, logits: NDArray[np.float32]) -> Step:
        """The next token of a text."""
        request, asked = job.request, len(job.request.ids)
        logits = without(logits, self.unused_ids)
        allowed = logits
        if request.logits_hook is not None:
            allowed = logits.copy()
            request.logits_hook(job.history[asked:], allowed)
            if not allowed.max() > -np.inf:
                raise MpoError("logits hook: it forbids every token; allow at least an end token")
        choice = job.sampler.sample(allowed, job.history, prompt_length=asked)
        job.history.append(choice.token)
        job.figures.tokens += 1
        self._totals["generated"] += 1
        finish: FinishReason | None = "stop" if choice.token in job.ends else None
        if finish is None and job.figures.tokens >= job.limit:
            finish = "length"
        score = choice.logprob if allowed is logits else logprob(logits, choice.token)
        return Step(choice.token, score, logits, finish)

    def _fail(self, job: Job, error: BaseException) -> None:
        job.put(error)
        self._leave(job)
