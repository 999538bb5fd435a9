"""The Python API of a loaded model: generate, chat, score. `mpo_runtime.load` (loading.py) makes one."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_formats import ConfigError
from mpo_runtime.engine import PREFILL_CHUNK, LogitsHook, Request, Scheduler, check_prompt
from mpo_runtime.engine import FinishReason as FinishReason
from mpo_runtime.measure import check_ids, log_softmax, piecewise_logits
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.pieces import Piece as Piece
from mpo_runtime.pieces import Pieces
from mpo_runtime.sampler import SamplingOptions
from mpo_runtime.text.chat_template import ChatTemplate, TemplateOptions, encode_chat
from mpo_runtime.text.stopping import StopMatcher
from mpo_runtime.text.tokenizer import StreamDecoder, Tokenizer
from mpo_runtime.weights.protocol import Weights

log = logging.getLogger(__name__)
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Score:
    """The tokens of a text after its first, and the log-probability of each in nats."""

    tokens: list[int]
    logprobs: list[float]

    @property
    def total(self) -> float:
        """The sum of the log-probabilities."""
        return sum(self.logprobs)


class Model:
    """A loaded model; a context manager.

    Safe to use from several threads: texts of all of them are generated in one batch (engine/scheduler.py), and a text with
    a seed or at temperature 0 is the same whatever else runs. A text ends when its iterator is read to the end, closed
    (`iterator.close()`) or dropped; one that is kept half read pauses. `score`, `encode_chat` and the tokenizer never wait.

    Args:
        weights: closed with the model.
        network: the forward pass over these weights.
        tokenizer: None for a model that takes and gives token ids only.
        template: None for a model that cannot chat.
        engine: what generates, in the place of a Scheduler over the network.
        options: of the scheduler: context, parallel, prefix_bytes, speculate.
    """

    def __init__(
        self,
        weights: Weights,
        network: Decoder,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        *,
        engine: Scheduler | None = None,
        **options: Any,
    ) -> None:
        self.weights = weights
        self.network = network
        self.engine = engine or Scheduler(network, **options)
        self.tokenizer, self.template = tokenizer, template
        if tokenizer is not None:
            self.engine.unused_ids = np.array(tokenizer.unused_ids(network.architecture.vocab_size), np.int64)
        self.end_ids = end_ids(network.architecture.eos_token_ids, network.architecture.vocab_size, tokenizer)
        self._closed = False

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        sampling: SamplingOptions | None = None,
        stop: Sequence[str] = (),
        top_logprobs: int = 0,
        parse_special: bool = False,
        logits_hook: LogitsHook | None = None,
        prompt_logprobs: bool = False,
        notify: Callable[[], None] | None = None,
        **options: Any,
    ) -> Pieces:
        """Continues a text, or token ids. Everything is checked at the call; it begins when the first piece is asked for.

        Args:
            prompt: text, which is tokenised with the begin-of-text token if the tokenizer adds one, or token ids.
            max_tokens: the most new tokens; None for as many as fit into the context.
            sampling: all sampling options at once.
            stop: texts at which generation ends, special tokens such as `<|im_end|>` among them; they are not part of the
                result.
            top_logprobs: number of most likely tokens that each piece lists.
            parse_special: text that spells a special token becomes that token, instead of plain text.
            logits_hook, prompt_logprobs: as in `Request`.
            notify: as in `Scheduler.submit`.
            options: single sampling options by name (temperature=0.7, top_p=0.9, seed=1, …); they override `sampling`.

        Raises:
            ConfigError: for an empty or too long prompt, or an option that is unknown or out of range.
        """
        ids = self.encode(prompt, parse_special=parse_special) if isinstance(prompt, str) else list(prompt)
        more = {"logits_hook": logits_hook, "prompt_logprobs": prompt_logprobs}
        drawn = sampling_options(sampling, options)
        return self._pieces(ids, ids, drawn, max_tokens, stop, top_logprobs, notify, **more)

    def encode(self, prompt: str, *, parse_special: bool = False) -> list[int]:
        """The token ids of a raw prompt, with the begin-of-text token in front if the tokenizer adds one.

        Args:
            parse_special: text that spells a special token becomes that token. A prompt that then begins with the
                begin-of-text token does not get a second one.
        """
        tokenizer = self.text_tokenizer()
        ids = tokenizer.encode(prompt, add_special_tokens=True, parse_special=parse_special)
        twice = parse_special and ids[:2] == [tokenizer.bos_id] * 2
        return ids[1:] if twice else ids

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        sampling: SamplingOptions | None = None,
        stop: Sequence[str] = (),
        top_logprobs: int = 0,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        logits_hook: LogitsHook | None = None,
        prompt_logprobs: bool = False,
        notify: Callable[[], None] | None = None,
        **options: Any,
    ) -> Pieces:
        """Answers a conversation (`[{"role": "user", "content": "…"}]`) through the model's chat template.

        Args:
            thinking, tools, documents, template, template_args: what the template sees besides (`TemplateOptions`).
            logits_hook, prompt_logprobs, notify: as in `generate`.
            options: single sampling options by name, and variables that the template has (`controls={…}`).

        Raises:
            ConfigError: when the model has no chat template, or as `generate` does.
        """
        drawn = {name: value for name, value in options.items() if not self._is_template_variable(name)}
        others = {name: value for name, value in options.items() if name not in drawn}
        asked = TemplateOptions(thinking, tools, documents, {**(template_args or {}), **others}, template)
        ids = self.encode_chat(messages, asked)
        more = {"logits_hook": logits_hook, "prompt_logprobs": prompt_logprobs}
        return self._pieces(ids, (), sampling_options(sampling, drawn), max_tokens, stop, top_logprobs, notify, **more)

    def _is_template_variable(self, name: str) -> bool:
        """Whether the chat template mentions a name that is no sampling option."""
        if self.template is None or name in SamplingOptions.__dataclass_fields__:
            return False
        sources = [template.source for template in (self.template, *self.template.named.values())]
        return any(re.search(rf"\b{re.escape(name)}\b", source) for source in sources)

    def encode_chat(self, messages: Sequence[Message], options: TemplateOptions | None = None) -> list[int]:
        """The token ids of a conversation, up to where the answer begins; raises ConfigError without a chat template."""
        if self.template is None:
            raise ConfigError("chat: the model has no chat template; use generate with a plain prompt")
        options = options or TemplateOptions()
        template = self.template.chosen(options)
        return encode_chat(
            template, self.text_tokenizer(), list(messages), add_generation_prompt=True, **options.keywords()
        )

    def score(self, text: str | Sequence[int]) -> Score:
        """The log-probability of each token of a text after its first, in one pass without generating.

        Raises:
            ConfigError: for fewer than two tokens, more than the model's longest context and one, or an id outside its
                vocabulary.
        """
        self._check_open()
        ids = self.encode(text) if isinstance(text, str) else list(text)
        if len(ids) < 2:
            raise ConfigError("score: expected at least 2 tokens")
        longest = self.network.architecture.max_position_embeddings + 1  # the last token is not run
        if len(ids) > longest:
            raise ConfigError(f"score: {len(ids)} tokens, the model was made for {longest}; score it in parts")
        check_ids(np.array(ids), self.network)
        rows = (row for part in self.prompt_logits(ids) for row in log_softmax(part))
        return Score(ids[1:], [float(row[token]) for row, token in zip(rows, ids[1:], strict=True)])

    def prompt_logits(self, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """The logits [S, vocabulary] after each of the ids but the last, some at a time, besides the texts of the batch."""
        return piecewise_logits(self.network, np.array(ids), PREFILL_CHUNK)

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
        notify: Callable[[], None] | None,
        **more: Any,
    ) -> Pieces:
        """Checks everything before the first step, and returns the pieces.

        Args:
            continued: ids whose text the generated text follows: they decide about a space at its beginning.
            more: further fields of the request.
        """
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
        request = Request(tuple(ids), sampling, max_tokens, self.end_ids, **more)
        decoder = StreamDecoder(self.tokenizer, context=continued) if self.tokenizer else None
        begin = partial(self.engine.submit, request, notify=notify)
        return Pieces(begin, self.tokenizer, decoder, StopMatcher(stop), top)

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("the model is closed; load it again")

    def close(self) -> None:
        """Ends all texts, unmaps the file and ends the chat template's helper process; nothing can be used afterwards."""
        self._closed = True
        self.engine.close()
        if self.template:
            self.template.close()
        self.weights.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def end_ids(configured: Sequence[int], vocabulary: int, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The tokens that end a text: those of config.json and generation_config.json, and the tokenizer's own.

    Models that were trained on a base model often name their end of a turn in tokenizer_config.json alone.
    """
    own = None if tokenizer is None else tokenizer.eos_id
    if own is None or own in configured:
        return tuple(configured)
    if own >= vocabulary:
        log.warning("tokenizer_config.json: eos_token has the id %d and is ignored: the model has %d", own, vocabulary)
        return tuple(configured)
    return (*configured, own)


def sampling_options(sampling: SamplingOptions | None, options: Mapping[str, Any]) -> SamplingOptions:
    """`sampling`, or the defaults, with single options replaced by name; raises ConfigError for an unknown name."""
    try:
        return replace(sampling or SamplingOptions(), **options)
    except TypeError:
        known = ", ".join(SamplingOptions.__dataclass_fields__)
        raise ConfigError(f"options {', '.join(options)}: expected some of {known}") from None
