"""The Python API: load a model, generate, chat, score."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from mpo_formats import ConfigError
from mpo_runtime.backends import check_activations, choose_backend
from mpo_runtime.forks import renew_in_children
from mpo_runtime.sampler import Choice, SamplingOptions, top_logprobs
from mpo_runtime.text.chat_template import ChatTemplate, encode_chat
from mpo_runtime.text.stopping import StopMatcher
from mpo_runtime.text.tokenizer import StreamDecoder, Tokenizer
from mpo_runtime.weights.protocol import Weights, open_weights

if TYPE_CHECKING:
    from mpo_runtime.backends.ops import Ops
    from mpo_runtime.engine import Engine
    from mpo_runtime.models.decoder import GraniteModel

Message = Mapping[str, Any]
FinishReason = Literal["stop", "length"]
MOST_THREADS = 1024


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of generated text.

    `text` may be empty while a character or a possible stop string is incomplete. `finish` is set on the last piece:
    `stop` at an end token or stop string, `length` when the limit or the context is reached. `logprob` is the token's
    log-probability in nats under the model's own distribution, before penalties, temperature and filters; `top` holds
    the most likely tokens with theirs, as many as were asked for.
    """

    text: str
    token: int
    logprob: float
    finish: FinishReason | None
    top: tuple[Choice, ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """The log-probability in nats of each token of a text after the first, and of their sum."""

    tokens: list[int]
    logprobs: list[float]

    @property
    def total(self) -> float:
        """The sum of the log-probabilities."""
        return sum(self.logprobs)


class Model:
    """A loaded model; a context manager.

    Safe to use from several threads. Generations take turns, because they share one KV cache: one that starts while
    another runs waits for its end. A generation ends when its iterator is read to the end, closed (`iterator.close()`)
    or dropped; one that is kept half read keeps other threads waiting, and a second one in the same thread, which would
    wait for itself, raises ConfigError. `score`, `encode_chat` and the tokenizer wait for nobody. Only `close` must not
    be called while another thread generates.
    """

    def __init__(self, weights: Weights, network: GraniteModel, *, context: int | None = None) -> None:
        from mpo_runtime.engine import Engine

        self.weights = weights
        self.network = network
        self.engine: Engine = Engine(network, context=context)
        self.tokenizer, self.template = read_text_files(weights)
        self._turn = threading.Lock()
        self._generating: int | None = None
        self._closed = False
        renew_in_children(self)

    def renew_after_fork(self) -> None:
        """Lets a child of this process generate: in it no other thread holds the turn."""
        self._turn, self._generating = threading.Lock(), None

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        sampling: SamplingOptions | None = None,
        stop: Sequence[str] = (),
        top_logprobs: int = 0,
        **options: Any,
    ) -> Generator[Piece, None, None]:
        """Continues a text, or token ids.

        Args:
            prompt: text, which is tokenised with the begin-of-text token that the tokenizer asks for, or ids.
            max_tokens: at most so many new tokens; None for as many as the context holds.
            sampling: all sampling options at once.
            stop: texts at which generation ends; they are not part of the result.
            top_logprobs: how many of the most likely tokens each piece names.
            options: single sampling options by name (temperature=0.7, top_p=0.9, seed=1, …).

        Raises:
            ConfigError: for an empty or too long prompt, or an option that is unknown or out of range.
        """
        ids = self.text_tokenizer().encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else list(prompt)
        return self._pieces(ids, ids, sampling_options(sampling, options), max_tokens, stop, top_logprobs)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        sampling: SamplingOptions | None = None,
        stop: Sequence[str] = (),
        top_logprobs: int = 0,
        **options: Any,
    ) -> Generator[Piece, None, None]:
        """Answers a conversation (`[{"role": "user", "content": "…"}]`) through the model's chat template.

        Raises:
            ConfigError: when the model has no chat template, or as `generate` does.
        """
        ids = self.encode_chat(messages)
        return self._pieces(ids, (), sampling_options(sampling, options), max_tokens, stop, top_logprobs)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation, up to where the answer begins."""
        if self.template is None:
            raise ConfigError("chat: the model has no chat template; use generate with a plain prompt")
        return encode_chat(self.template, self.text_tokenizer(), list(messages), add_generation_prompt=True)

    def score(self, text: str | Sequence[int]) -> Score:
        """The log-probability of each token of a text after its first, in one pass without generating.

        Raises:
            ConfigError: for fewer than two tokens, more than the model was made for, or an id outside its vocabulary.
        """
        import numpy as np

        self._check_open()
        from mpo_runtime.engine import PREFILL_CHUNK
        from mpo_runtime.measure import check_ids, log_softmax, piecewise_logits

        ids = self.text_tokenizer().encode(text, add_special_tokens=True) if isinstance(text, str) else list(text)
        if len(ids) < 2:
            raise ConfigError("score: expected at least 2 tokens")
        longest = self.network.architecture.max_position_embeddings + 1  # the last token is not run
        if len(ids) > longest:
            raise ConfigError(f"score: {len(ids)} tokens, the model was made for {longest}; score it in parts")
        check_ids(np.array(ids), self.network)
        rows = (
            row for part in piecewise_logits(self.network, np.array(ids), PREFILL_CHUNK) for row in log_softmax(part)
        )
        return Score(ids[1:], [float(row[token]) for row, token in zip(rows, ids[1:], strict=True)])

    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer; raises ConfigError where the model has none."""
        if self.tokenizer is None:
            raise ConfigError("the model has no tokenizer.json; give token ids instead of text")
        return self.tokenizer

    def _pieces(
        self,
        ids: list[int],
        continued: Sequence[int],
        sampling: SamplingOptions,
        max_tokens: int | None,
        stop: Sequence[str],
        top: int,
    ) -> Generator[Piece, None, None]:
        """Checks everything before the first step, and returns the pieces; `continued` are ids that the text goes on from."""
        from mpo_runtime.engine import check_prompt

        self._check_open()
        vocabulary = self.network.architecture.vocab_size
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"max_tokens: expected at least 1, found {max_tokens}")
        if not 0 <= top <= vocabulary:
            raise ConfigError(f"top_logprobs: expected 0 to {vocabulary}, found {top}")
        for token in sampling.logit_bias:
            if token >= vocabulary:
                raise ConfigError(f"logit_bias: token id {token} lies outside the vocabulary of {vocabulary}")
        check_prompt(ids, self.engine.context, vocabulary)
        decoder = StreamDecoder(self.tokenizer, context=continued) if self.tokenizer else None
        return self._run(ids, decoder, sampling, max_tokens, StopMatcher(stop), top)

    def _run(
        self,
        ids: list[int],
        decoder: StreamDecoder | None,
        sampling: SamplingOptions,
        max_tokens: int | None,
        matcher: StopMatcher,
        top: int,
    ) -> Generator[Piece, None, None]:
        with self._one_at_a_time():
            for step in self.engine.generate(ids, sampling, max_tokens=max_tokens):
                text = decoder.push(step.token) if decoder and step.finish != "stop" else ""
                if step.finish and decoder:
                    text += decoder.finish()
                text, stopped = matcher.push(text)
                if step.finish and not stopped:
                    text += matcher.flush()
                finish = "stop" if stopped else step.finish
                yield Piece(text, step.token, step.logprob, finish, tuple(top_logprobs(step.logits, top)))
                self._generating = threading.get_ident()  # a stream may be read by one thread after another
                if stopped:
                    return

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Waits until no other thread generates; raises ConfigError where this thread would wait for itself."""
        if self._generating == threading.get_ident():
            raise ConfigError("generate: this thread has a generation that is not read to its end; close() it first")
        with self._turn:
            self._generating = threading.get_ident()
            try:
                yield
            finally:
                self._generating = None

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("the model is closed; load it again")

    def close(self) -> None:
        """Gives the mapped file back and ends the chat template's helper process; the model is of no use after it."""
        self._closed = True
        if self.template:
            self.template.close()
        self.weights.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    path: str | Path,
    *,
    chi: int | None = None,
    device: str = "cpu",
    backend: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    kv_type: str = "auto",
    activations: str = "int8",
    verify: bool = False,
) -> Model:
    """Loads a `.mpo` file, a Hugging Face folder or a model of the local store.

    Args:
        path: a file, a folder, or a name that `mpo-run list` shows.
        chi: uses only the first `chi` values of every bond: a smaller, faster, rougher model from the same file.
        device: `cpu`, or a torch device such as `cuda`.
        backend: `native`, `reference`, or `auto`: native on a CPU where its kernels were built.
        threads: CPU threads of this process, for all its models; None leaves their number as it is, at first all cores.
        context: tokens of the KV cache; what the model was made for, at most 4,096, where None.
        kv_type: what the KV cache is stored in: f32, f16, bf16, or with the native backend int8. `auto` is f16 where the
            native backend rounds activations (int8, and integer weights), which loses far more, and f32 elsewhere.
        activations: what the native backend multiplies integer weights with: `int8` or `float`.
        verify: checks the file's checksums first.

    Raises:
        MpoError: for a missing, damaged or unsupported file, or an option out of range.
    """
    weights = open_weights(path, verify=verify)
    try:
        network = load_network(
            weights, chi=chi, device=device, backend=backend, threads=threads, kv_type=kv_type, activations=activations
        )
        return Model(weights, network, context=context)
    except BaseException:
        weights.close()
        raise


def load_network(
    weights: Weights,
    *,
    chi: int | None = None,
    device: str = "cpu",
    backend: str = "auto",
    threads: int | None = None,
    kv_type: str = "auto",
    activations: str = "int8",
) -> GraniteModel:
    """Loads the weights into a backend and returns the model over it; the options are those of `load`.

    Raises:
        ConfigError: for a χ or a number of threads below one, or a backend or device that is absent.
    """
    from mpo_runtime.models.decoder import GraniteModel

    if chi is not None and chi < 1:
        raise ConfigError(f"chi: expected at least 1, found {chi}")
    check_activations(activations)
    ops: Ops
    if choose_backend(backend, device) == "native":
        from mpo_runtime import native
        from mpo_runtime.backends.native import NativeOps

        native.instruction_set()
        native.set_threads(checked_threads(threads))
        if kv_type == "auto":
            kv_type = "f16" if activations == "int8" and has_integers(weights) else "f32"
        ops = NativeOps(weights, chi=chi, kv_type=kv_type, activations=activations)
    else:
        from mpo_runtime.backends.reference import ReferenceOps

        set_threads(threads)
        check_device(device)
        ops = ReferenceOps(weights, chi=chi, device=device, kv_type="f32" if kv_type == "auto" else kv_type)
    return GraniteModel(weights.spec.architecture, ops)


def has_integers(weights: Weights) -> bool:
    """Whether any layer has an integer matrix; integer cores alone do not count."""
    return any(term.kind == "quantized" for linear in weights.spec.linears for term in linear.terms)


def checked_threads(threads: int | None) -> int | None:
    """The number of threads as given; raises ConfigError for less than one or more than 1,024."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        expected = "at least 1" if threads < 1 else f"at most {MOST_THREADS}"
        raise ConfigError(f"--threads: expected {expected}, found {threads}")
    return threads


def set_threads(threads: int | None) -> None:
    """Sets the number of torch's CPU threads, all cores where None; raises ConfigError for less than one."""
    count = checked_threads(threads)
    if count is None:
        return
    import torch

    torch.set_num_threads(count)


def check_device(device: str) -> None:
    """Raises ConfigError for a device that torch does not know or that this machine does not have."""
    if device == "cpu":
        return
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ConfigError(f"device {device}: expected cpu, cuda or another device of torch; use --device cpu") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device}: torch finds no CUDA device; use --device cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # each backend that is missing says so in its own way
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"device {device}: torch cannot use it here ({why}); use --device cpu") from None


def read_text_files(weights: Weights) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """The tokenizer and chat template of a model, None for what it lacks."""
    content = weights.file("tokenizer.json")
    if content is None:
        return None, None
    settings = weights.file("tokenizer_config.json")
    tokenizer = Tokenizer.from_bytes(content, json.loads(settings) if settings else None)
    template = weights.file("chat_template.jinja")
    return tokenizer, ChatTemplate(template.decode()) if template else None


def sampling_options(sampling: SamplingOptions | None, options: Mapping[str, Any]) -> SamplingOptions:
    """Sampling options with single ones replaced by name; raises ConfigError for an unknown name."""
    try:
        return replace(sampling or SamplingOptions(), **options)
    except TypeError:
        known = ", ".join(SamplingOptions.__dataclass_fields__)
        raise ConfigError(f"options {', '.join(options)}: expected some of {known}") from None
