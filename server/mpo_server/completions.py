"""/v1/completions: texts or token ids continued, in OpenAI's older form."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from starlette.requests import Request

from mpo_formats import ConfigError
from mpo_runtime.model import Model
from mpo_server.errors import invalid
from mpo_server.fields import Field, Table, flag, read, required, whole
from mpo_server.generation import Answers, Piece, TokenFacts, check_length
from mpo_server.http import DONE, Event, Generating, Job, understood
from mpo_server.logprobs import completion_logprobs, prompt_facts
from mpo_server.sampling import (
    LONGEST_PROMPT,
    MOST_LOGPROBS,
    MOST_TOKENS,
    SAMPLING,
    Drawing,
    read_drawing,
)
from mpo_server.service import Service
from mpo_server.structure import json_grammar, read_format

MOST_PROMPTS = 64
DEFAULT_TOKENS = 16  # OpenAI's
COMPLETION: Table = {
    "prompt": Field(
        ("string", "array"), 0, LONGEST_PROMPT, text="A text, token ids, or a list of texts or of lists of token ids."
    ),
    **SAMPLING,
    "max_tokens": whole(0, MOST_TOKENS, None, f"The most new tokens; {DEFAULT_TOKENS} where left out."),
    "max_completion_tokens": whole(0, MOST_TOKENS, None, "Another name of max_tokens."),
    "n_predict": whole(0, MOST_TOKENS, None, "llama.cpp's name of max_tokens."),
    "logprobs": Field(("integer", "boolean"), 0, MOST_LOGPROBS, None, text="As many likely tokens in each place."),
    "echo": flag(False, "The text begins with the prompt; with logprobs, its log-probabilities too."),
    "response_format": Field(("object",), text="{type: text | json_object | json_schema, …}"),
}
Prompt = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A request that was checked, before its prompts are tokenised."""

    prompts: tuple[Prompt, ...]
    drawing: Drawing
    echo: bool
    schema: Mapping[str, Any] | None


def read_completion(model: Model, data: Mapping[str, Any]) -> CompletionRequest:
    """The request; raises ApiError naming the field that is wrong."""
    values = read(COMPLETION, data)
    required(values, "prompt")
    limits = [values[name] for name in ("max_tokens", "max_completion_tokens", "n_predict")]
    limit = next((one for one in limits if one is not None), DEFAULT_TOKENS)
    logprobs = values["logprobs"]
    if isinstance(logprobs, bool):
        logprobs = 1 if logprobs else None
    drawing = read_drawing(model, data, limit, logprobs)
    if limit == 0 and not values["echo"]:
        raise invalid("max_tokens", "0 needs echo: true")
    prompts = read_prompts(values["prompt"], model.network.architecture.vocab_size)
    if len(prompts) * drawing.choices > MOST_PROMPTS:
        raise invalid("n", f"expected at most {MOST_PROMPTS} texts in all prompts together", "out_of_range")
    return CompletionRequest(prompts, drawing, values["echo"], read_format(values["response_format"]))


def read_prompts(given: str | list[Any], vocabulary: int) -> tuple[Prompt, ...]:
    """The prompts of a request: texts or token ids."""
    if isinstance(given, str):
        return (given,)
    if not given:
        raise invalid("prompt", "is an empty list")
    if all(isinstance(item, int) for item in given):
        return (_ids(given, "prompt", vocabulary),)
    if len(given) > MOST_PROMPTS:
        raise invalid("prompt", f"expected at most {MOST_PROMPTS} prompts, found {len(given)}", "out_of_range")
    prompts: list[Prompt] = []
    for index, item in enumerate(given):
        if isinstance(item, str):
            prompts.append(item)
        elif isinstance(item, list) and item:
            prompts.append(_ids(item, f"prompt[{index}]", vocabulary))
        else:
            raise invalid(f"prompt[{index}]", "expected a text or a list of token ids", "invalid_type")
    return tuple(prompts)


def _ids(given: list[Any], where: str, vocabulary: int) -> tuple[int, ...]:
    for token in given:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
            raise invalid(where, f"expected token ids from 0 to {vocabulary - 1}")
    return tuple(given)


def beginning(model: Model) -> list[int]:
    """The prompt in place of an empty one: the token that begins a text, or that ends the one before."""
    tokenizer = model.text_tokenizer()
    return [token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None][:1]


class CompletionJob(Job):
    """Texts to be continued; the result in the form of completions."""

    continued = True
    param = "prompt"

    def __init__(
        self, service: Service, request: CompletionRequest, prompts: list[list[int]], known: list[list[TokenFacts]]
    ) -> None:
        """Takes the prompts' ids, and the log-probabilities of their tokens where they are wanted."""
        super().__init__(prompts, request.drawing)
        self._tokenizer = service.model.text_tokenizer()
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self._model, self._fingerprint = service.settings.name, service.fingerprint
        count = len(prompts) * request.drawing.choices
        choices = request.drawing.choices
        echoes = [self._echo(request, number) if request.echo else "" for number in range(len(prompts))]
        self._texts = [echoes[index // choices] for index in range(count)]
        self._tokens = [list(known[index // choices]) if known else [] for index in range(count)]
        self._finishes: list[str | None] = [None for _ in range(count)]

    def _echo(self, request: CompletionRequest, number: int) -> str:
        prompt = request.prompts[number]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt, skip_special_tokens=False)

    @classmethod
    async def prepare(cls, request: CompletionRequest, service: Service, model: Model) -> CompletionJob:
        """Tokenises the prompts, compiles the grammar, and runs the prompts whose log-probabilities are echoed."""
        drawing, context = request.drawing, model.engine.context

        def encode() -> list[list[int]]:
            return [
                model.encode(one, parse_special=True) or beginning(model) if isinstance(one, str) else list(one)
                for one in request.prompts
            ]

        try:
            prompts = await service.work(encode)
        except ConfigError as error:
            raise invalid("prompt", str(error)) from None
        if request.schema is not None:
            grammar = await service.compile(json_grammar(request.schema), "response_format")
            request = replace(request, drawing=replace(drawing, grammar=grammar))
        known: list[list[TokenFacts]] = []
        for ids in prompts:
            check_length(ids, context, "prompt")
            if request.echo and drawing.logprobs is not None:
                known.append(await service.work(partial(prompt_facts, model, ids, drawing.logprobs or 0)))
        return cls(service, request, prompts, known)

    def begin(self) -> Iterator[Event]:
        """The prompts, where they are echoed."""
        for index, text in enumerate(self._texts):
            if text:
                yield Event(self._chunk(index, text, self._tokens[index]))

    def take(self, index: int, piece: Piece, answers: Answers) -> Iterator[Event]:
        """Adds a piece to its text; an event for it."""
        text = piece.text
        if self.drawing.stream and (text or (piece.tokens and self.drawing.logprobs is not None)):
            yield Event(self._chunk(index, text, piece.tokens, answers))
        self._texts[index] += text
        self._tokens[index] += piece.tokens
        if piece.finish:
            self._finishes[index] = piece.finish
            if self.drawing.stream:
                yield Event(self._chunk(index, "", (), answers, piece.finish))

    def end(self, answers: Answers) -> Iterator[Event]:
        """The counts, where they are wanted, and the end of the stream."""
        if self.drawing.include_usage:
            yield Event({**self._head(), "choices": [], "usage": answers.usage()})
        yield Event(DONE)

    def result(self, answers: Answers) -> dict[str, Any]:
        """The whole texts."""
        choices = [
            {
                "index": index,
                "text": text,
                "logprobs": self._logprobs(self._tokens[index], 0),
                "finish_reason": self._finishes[index],
            }
            for index, text in enumerate(self._texts)
        ]
        counts = {"usage": answers.usage(), "timings": answers.answers[0].timings()}
        return {**self._head(), "choices": choices, **counts}

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
        }

    def _chunk(
        self,
        index: int,
        text: str,
        tokens: Sequence[TokenFacts],
        answers: Answers | None = None,
        finish: str | None = None,
    ) -> dict[str, Any]:
        offset = len(self._texts[index]) if finish is None and answers is not None else 0
        choice = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(tokens, offset) if tokens else None,
            "finish_reason": finish,
        }
        chunk = {**self._head(), "choices": [choice]}
        if self.drawing.include_usage:
            chunk["usage"] = None
        if answers is not None and (finish or self.drawing.timings_per_token):
            chunk["timings"] = answers.answers[index].timings()
        return chunk

    def _logprobs(self, tokens: Sequence[TokenFacts], offset: int) -> dict[str, Any] | None:
        if self.drawing.logprobs is None:
            return None
        return completion_logprobs(self._tokenizer, tokens, offset, self.drawing.logprobs)


async def completions(request: Request) -> Generating:
    """Continues texts."""
    service: Service = request.app.state.service
    asked = await understood(request, read_completion)

    async def prepare(service: Service, model: Model) -> CompletionJob:
        return await CompletionJob.prepare(asked, service, model)

    return Generating(service, len(asked.prompts) * asked.drawing.choices, prepare)
