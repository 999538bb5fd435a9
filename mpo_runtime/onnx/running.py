"""Generation with ONNX Runtime: the tokenizer, chat template, sampler and stop strings are this runtime's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mpo_formats import Architecture, ConfigError
from mpo_runtime.engine import Engine, FinishReason, Step, check_prompt, default_context, shared_prefix
from mpo_runtime.model import Model, Score
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.onnx.manifest import is_exported, read_manifest
from mpo_runtime.onnx.session import Session
from mpo_runtime.sampler import Sampler, SamplingOptions
from mpo_runtime.text.chat_template import ChatTemplate
from mpo_runtime.text.files import TextFiles
from mpo_runtime.text.tokenizer import Tokenizer
from mpo_runtime.weights.protocol import Weights


class OnnxEngine:
    """One conversation's state in ONNX Runtime. A prompt that begins with the tokens in the cache reuses them.

    Tokens that are run together are rounded differently from tokens that are run one by one, so a reproducible generation
    (with a seed, or at temperature 0) reuses nothing.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.context = session, session.capacity
        self.held: list[int] = []  # the ids in the cache
        self.lock = threading.Lock()

    def reusable(self, ids: Sequence[int], *, repeatable: bool = False) -> int:
        """How many leading ids of a prompt are in the cache and need not be run again."""
        return 0 if repeatable else shared_prefix(self.held, ids[:-1])

    def generate(
        self,
        ids: Sequence[int],
        options: SamplingOptions,
        *,
        max_tokens: int | None = None,
        stop_ids: Sequence[int] | None = None,
    ) -> Iterator[Step]:
        """Yields tokens after the prompt `ids` until an end token, `max_tokens` or the end of the context."""
        architecture = self.session.architecture
        check_prompt(ids, self.context, architecture.vocab_size)
        ends = architecture.eos_token_ids if stop_ids is None else stop_ids
        room = self.context - len(ids)
        limit = room if max_tokens is None else min(max_tokens, room)
        sampler, history = Sampler(options), list(ids)
        with self.lock:
            shared = self.reusable(ids, repeatable=options.repeatable)
            self.held = self.held[:shared]
            self.session.rewind(shared)
            new = list(ids[shared:])
            for index in range(limit):
                logits = self.session.run(new)
                self.held += new
                choice = sampler.sample(logits, history, prompt_length=len(ids))
                history.append(choice.token)
                finish: FinishReason | None = "stop" if choice.token in ends else None
                if finish is None and index + 1 == limit:
                    finish = "length"
                yield Step(choice.token, choice.logprob, logits, finish)
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
    return OnnxModel(weights, network, tokenizer, template, engine=cast(Engine, OnnxEngine(session)))
