"""Generation with ONNX Runtime: the tokenizer, chat template, sampler and stop strings are this runtime's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from mpo_formats import Architecture, ConfigError
from mpo_runtime.engine import (
    Figures,
    FinishReason,
    Generation,
    Request,
    Scheduler,
    Step,
    check_prompt,
    default_context,
    shared_prefix,
)
from mpo_runtime.engine.job import Job, SchedulerStats
from mpo_runtime.model import Model
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.onnx.manifest import Folder, is_exported, read_manifest
from mpo_runtime.onnx.session import CHUNK, Logits, Session
from mpo_runtime.sampler import Sampler, logprob, without
from mpo_runtime.text.chat_template import ChatTemplate
from mpo_runtime.text.files import TextFiles
from mpo_runtime.text.tokenizer import Tokenizer
from mpo_runtime.weights.protocol import Weights

READER_SECONDS = 10.0  # that a text waits for a reader who is far behind


class OnnxGeneration(Generation):
    """A text that is made while it is read."""

    def __init__(self, steps: Generator[Step, None, None], figures: Figures) -> None:
        self._steps, self._figures = steps, figures
        self.done = False

    @property
    def figures(self) -> Figures:
        """Tokens and times so far."""
        return self._figures

    @property
    def prompt_logprobs(self) -> None:
        """Not with ONNX Runtime."""
        return

    def __next__(self) -> Step:
        """Makes the next step."""
        if self.done:
            raise StopIteration
        step = next(self._steps)
        self.done = step.finish is not None
        return step

    def poll(self) -> Step | None:
        """Makes the next step; None after the last one."""
        return next(self, None)

    def cancel(self) -> None:
        """Ends the text."""
        self.done = True
        self._steps.close()

    close = cancel


class OnnxEngine:
    """One text's state in ONNX Runtime, in the place of a Scheduler.

    A prompt that begins with the tokens in the cache reuses them. Tokens that are run together are rounded differently from
    tokens that are run one by one, so a reproducible generation (with a seed, or at temperature 0) reuses nothing. Texts take
    turns, since they share one cache.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.context = session, session.capacity
        self.held: list[int] = []  # the ids in the cache
        self.unused_ids = np.zeros(0, np.int64)  # rows of the model's output that stand for no token
        self.lock = threading.Lock()
        self._reader: int | None = None
        self._changed = threading.Condition()  # guards what follows
        self._jobs: list[Job] = []  # texts of the worker, the running one first
        self._worker: threading.Thread | None = None
        self._closed, self._requests = False, 0

    def reusable(self, ids: Sequence[int], *, repeatable: bool = False) -> int:
        """How many leading ids of a prompt are in the cache and need not be run again."""
        return 0 if repeatable else shared_prefix(self.held, ids[:-1])

    def submit(self, request: Request, *, notify: Callable[[], None] | None = None) -> Generation:
        """A text that is made after those before it; as Scheduler.submit else. Without `notify` it is made while it is read.

        Raises:
            ConfigError: for a prompt that cannot be run, and where its log-probabilities are asked for.
        """
        check_prompt(request.ids, self.context, self.session.architecture.vocab_size)
        if request.prompt_logprobs:
            raise ConfigError("prompt_logprobs: not with ONNX Runtime; load the .mpo file")
        figures = Figures(len(request.ids))
        if notify is None:
            return OnnxGeneration(self._steps(request, figures), figures)
        sampler, ends = Sampler(request.sampling), frozenset(request.stop_ids or ())
        now = time.monotonic()
        job = Job(request, notify, sampler, self.context, ends, [], figures, None, now, None)
        with self._changed:
            if self._closed:
                raise ConfigError("the model is closed; load it again")
            self._jobs.append(job)
            self._requests += 1
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="mpo-onnx", daemon=True)
                self._worker.start()
        return Generation(job, self._wake)

    def prompt_logits(self, ids: Sequence[int]) -> Iterator[Logits]:
        """The logits [S, vocabulary] after each of the ids but the last, some at a time."""
        with self._one_at_a_time():
            self.held = []
            self.session.rewind(0)
            for start in range(0, len(ids) - 1, CHUNK):
                yield self.session.run_all(list(ids[start : min(start + CHUNK, len(ids) - 1)]))

    def stats(self) -> SchedulerStats:
        """What it is doing; the KV cache has one place, whose bytes are not counted."""
        with self._changed:
            count, requests = len(self._jobs), self._requests
        running = min(count, 1)
        return SchedulerStats(running, count - running, 0, 0, requests, 0, 0, 0, 0, 1.0, 0, 0)

    def close(self) -> None:
        """Ends all texts and waits for the running step."""
        with self._changed:
            self._closed, worker = True, self._worker
            for job in self._jobs:
                job.cancelled = True
                job.put(None)
            self._changed.notify_all()
        if worker is not None:
            worker.join()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _work(self) -> None:
        """The thread that makes the texts which others are told of, one after the other."""
        while True:
            with self._changed:
                self._jobs = [job for job in self._jobs if not job.cancelled]
                if not self._jobs:
                    self._worker = None
                    return
                job = self._jobs[0]
            job.figures.queued_seconds = time.monotonic() - job.submitted
            try:
                with closing(self._steps(job.request, job.figures)) as steps:
                    for step in steps:
                        if job.cancelled:
                            break
                        job.put(step)
                        self._await_reader(job)
            except Exception as error:  # its reader gets it
                job.put(error)
            with self._changed:
                self._jobs.remove(job)

    def _await_reader(self, job: Job) -> None:
        """Waits for a reader that is far behind; raises ConfigError where it takes too long, since all others wait, too."""
        with self._changed:
            if not self._changed.wait_for(lambda: job.cancelled or not job.waits, READER_SECONDS):
                raise ConfigError("generate: the text is not read while others wait; read it faster")

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Waits until no other thread generates; raises ConfigError where this thread would wait for itself."""
        if self._reader == threading.get_ident():
            raise ConfigError("generate: this thread has a generation that is not read to its end; close() it first")
        with self.lock:
            self._reader = threading.get_ident()
            try:
                yield
            finally:
                self._reader = None

    def _steps(self, request: Request, figures: Figures) -> Generator[Step, None, None]:
        ids, options = request.ids, request.sampling
        ends = self.session.architecture.eos_token_ids if request.stop_ids is None else request.stop_ids
        room = self.context - len(ids)
        limit = room if request.max_tokens is None else min(request.max_tokens, room)
        sampler, history = Sampler(options), list(ids)
        with self._one_at_a_time():
            figures.cached_tokens = shared = self.reusable(ids, repeatable=options.repeatable)
            self.held = self.held[:shared]
            self.session.rewind(shared)
            new, begun = list(ids[shared:]), time.monotonic()
            for index in range(limit):
                logits = without(self.session.run(new), self.unused_ids)
                if index == 0:
                    figures.prompt_seconds = time.monotonic() - begun
                figures.decode_seconds = time.monotonic() - begun - figures.prompt_seconds
                self.held += new
                figures.prompt_done, figures.tokens = len(ids), index + 1
                allowed = logits
                if request.logits_hook is not None:
                    allowed = logits.copy()
                    request.logits_hook(history[len(ids) :], allowed)
                choice = sampler.sample(allowed, history, prompt_length=len(ids))
                history.append(choice.token)
                finish: FinishReason | None = "stop" if choice.token in ends else None
                if finish is None and index + 1 == limit:
                    finish = "length"
                yield Step(choice.token, logprob(logits, choice.token), logits, finish)
                self._reader = threading.get_ident()  # another thread may read on from here
                if finish:
                    return
                new = [choice.token]


@dataclass(frozen=True, slots=True)
class OnnxNetwork:
    """What a Model asks of its forward pass besides generating: the architecture. It has no operations to score texts with."""

    architecture: Architecture


class OnnxModel(Model):
    """A Model whose texts ONNX Runtime generates."""

    def prompt_logits(self, ids: Sequence[int]) -> Iterator[Logits]:
        """As Model.prompt_logits, after the texts of other threads."""
        return cast(OnnxEngine, self.engine).prompt_logits(ids)


def load_folder(path: Path, *, context: int | None = None, threads: int | None = None) -> Model:
    """Loads a folder of `export-onnx` to generate.

    Raises:
        CheckpointError: where a file of the folder is missing or not whole.
        ConfigError: where it is no such folder, the runtime is not installed, or the context is too long for the model.
    """
    if not is_exported(path):
        name = path.stem or "model"
        raise ConfigError(
            f"{path}: is no folder of export-onnx, which --engine onnx needs; "
            f"make one: mpo-run export-onnx {path} --out {name}-onnx"
        )
    manifest = read_manifest(path)
    architecture = manifest.architecture
    capacity = default_context(architecture, context)
    files = TextFiles(path).read
    tokenizer = Tokenizer.from_files(files, f"{path}/")
    template = None if tokenizer is None else ChatTemplate.from_files(files)
    session = Session(path, capacity=capacity, threads=threads)
    network, weights = cast(Decoder, OnnxNetwork(architecture)), cast(Weights, Folder(manifest))
    return OnnxModel(weights, network, tokenizer, template, engine=cast(Scheduler, OnnxEngine(session)))
