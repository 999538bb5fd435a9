"""Generation with ONNX Runtime: the tokenizer, chat template, sampler and stop strings are this runtime's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

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
from mpo_runtime.model import Model, Score
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.onnx.manifest import is_exported, read_manifest
from mpo_runtime.onnx.session import Session
from mpo_runtime.sampler import Sampler, logprob
from mpo_runtime.text.chat_template import ChatTemplate
from mpo_runtime.text.files import TextFiles
from mpo_runtime.text.tokenizer import Tokenizer
from mpo_runtime.weights.protocol import Weights


class OnnxGeneration(Generation):
    """A text that is made while it is read."""

    def __init__(self, steps: Generator[Step, None, None], figures: Figures) -> None:
        self._steps, self._figures = steps, figures
        self.done = False

    @property
    def figures(self) -> Figures:
        """Tokens so far, without times."""
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
    """One conversation's state in ONNX Runtime. A prompt that begins with the tokens in the cache reuses them.

    Tokens that are run together are rounded differently from tokens that are run one by one, so a reproducible generation
    (with a seed, or at temperature 0) reuses nothing. Texts take turns, since they share one cache.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.context = session, session.capacity
        self.held: list[int] = []  # the ids in the cache
        self.lock = threading.Lock()
        self._reader: int | None = None

    def reusable(self, ids: Sequence[int], *, repeatable: bool = False) -> int:
        """How many leading ids of a prompt are in the cache and need not be run again."""
        return 0 if repeatable else shared_prefix(self.held, ids[:-1])

    def submit(self, request: Request, *, notify: Callable[[], None] | None = None) -> Generation:
        """A text that is made while it is read, after those of other threads; as Scheduler.submit else.

        Raises:
            ConfigError: for a prompt that cannot be run, where its log-probabilities are asked for, and with `notify`: nothing
                is made before it is read, so a server would wait forever.
        """
        if notify is not None:
            raise ConfigError("serve: not with ONNX Runtime; serve the .mpo file that the folder was made from")
        check_prompt(request.ids, self.context, self.session.architecture.vocab_size)
        if request.prompt_logprobs:
            raise ConfigError("prompt_logprobs: not with ONNX Runtime; load the .mpo file")
        figures = Figures(len(request.ids))
        return OnnxGeneration(self._steps(request, figures), figures)

    def close(self) -> None:
        """Does nothing: the session ends with the model."""

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
            new = list(ids[shared:])
            for index in range(limit):
                logits = self.session.run(new)
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


class Folder:
    """The folder in the place of weights; nothing of it is open, since the session has read it."""

    def close(self) -> None:
        """Does nothing: the session ends with the model."""


class OnnxModel(Model):
    """A Model whose texts ONNX Runtime generates; it does not score texts."""

    def score(self, text: str | Sequence[int]) -> Score:
        """Raises ConfigError: the runtime is asked for the logits of the last token only."""
        raise ConfigError("score: not with ONNX Runtime; load the .mpo file")


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
    architecture = read_manifest(path).architecture
    capacity = default_context(architecture, context)
    files = TextFiles(path).read
    tokenizer = Tokenizer.from_files(files, f"{path}/")
    template = None if tokenizer is None else ChatTemplate.from_files(files)
    session = Session(path, capacity=capacity, threads=threads)
    network, weights = cast(Decoder, OnnxNetwork(architecture)), cast(Weights, Folder())
    return OnnxModel(weights, network, tokenizer, template, engine=cast(Scheduler, OnnxEngine(session)))
