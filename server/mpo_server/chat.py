"""/v1/chat/completions: a conversation to an answer, in OpenAI's form."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request

from mpo_formats import ConfigError
from mpo_runtime.model import Model
from mpo_runtime.text.chat_template import TemplateOptions, encode_chat
from mpo_server.errors import ApiError, invalid
from mpo_server.fields import Field, Table, flag, read, required, text_field, whole
from mpo_server.generation import Answers, Piece, TokenFacts
from mpo_server.http import DONE, Event, Generating, Job, understood
from mpo_server.logprobs import chat_logprobs
from mpo_server.messages import Message, read_messages, split_prefill, template_data
from mpo_server.reader import THINK, Found, MessageReader
from mpo_server.sampling import MOST_LOGPROBS, MOST_TOKENS, SAMPLING, Drawing, read_drawing
from mpo_server.service import Service
from mpo_server.structure import Grammar, json_grammar, lark_grammar, read_format, with_options
from mpo_server.tools import (
    HERMES,
    Call,
    Dialect,
    Tools,
    described,
    dialect_of,
    forced_calls,
    read_tools,
    with_written_calls,
)

CHAT: Table = {
    "messages": Field(("array",), 1, 4096, items={"type": "object"}, text="The conversation; only text is supported."),
    **SAMPLING,
    "max_tokens": whole(1, MOST_TOKENS, None, "The most new tokens; as many as the context holds where left out."),
    "max_completion_tokens": whole(1, MOST_TOKENS, None, "The newer name of max_tokens."),
    "n_predict": whole(1, MOST_TOKENS, None, "llama.cpp's name of max_tokens."),
    "logprobs": flag(False, "Log-probabilities of the answer's tokens."),
    "top_logprobs": whole(0, MOST_LOGPROBS, None, "As many likely tokens in each place; needs logprobs."),
    "response_format": Field(("object",), text="{type: text | json_object | json_schema, …}"),
    "tools": Field(("array",), 0, 128, items={"type": "object"}, text="Functions that the model may call."),
    "tool_choice": Field(("string", "object"), text="none, auto, required, or one function."),
    "parallel_tool_calls": flag(True, "Whether the model may call several functions at once."),
    "chat_template_kwargs": Field(("object",), text="Variables for the chat template, such as enable_thinking."),
    "documents": Field(("array",), 0, 1024, items={"type": "object"}, text="Documents for the chat template."),
    "reasoning_format": text_field(16, "none leaves thoughts in the content.", ("none", "auto", "deepseek")),
    "reasoning_effort": text_field(16),
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the chat template is given, and how the answer is to be read.

    prefill: the beginning of the answer, which the model continues.
    """

    messages: tuple[Message, ...]
    prefill: str
    tools: Tools
    arguments: Mapping[str, Any]
    documents: tuple[Mapping[str, Any], ...] | None
    keep_thoughts: bool  # as content


@dataclass(frozen=True, slots=True)
class Reading:
    """How an answer is read: what the template lets the model write besides its content."""

    thinks: bool
    thinking: bool
    responds: bool
    dialect: Dialect | None
    single: bool

    def reader(self) -> MessageReader:
        """A reader for one answer."""
        return MessageReader(
            thinks=self.thinks,
            thinking=self.thinking,
            responds=self.responds,
            dialect=self.dialect,
            single=self.single,
        )


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request that was checked, before its conversation is rendered."""

    conversation: Conversation
    drawing: Drawing
    schema: Mapping[str, Any] | None


def read_chat(model: Model, data: Mapping[str, Any]) -> ChatRequest:
    """The request; raises ApiError naming the field that is wrong."""
    values = read(CHAT, data)
    required(values, "messages")
    top = values["top_logprobs"]
    if top and not values["logprobs"]:
        raise invalid("top_logprobs", "needs logprobs: true")
    limits = [values[name] for name in ("max_completion_tokens", "max_tokens", "n_predict")]
    drawing = read_drawing(
        model, data, next((one for one in limits if one is not None), None), (top or 0) if values["logprobs"] else None
    )
    tools = read_tools(values["tools"], values["tool_choice"], values["parallel_tool_calls"])
    messages, prefill = split_prefill(read_messages(values["messages"]))
    documents = values["documents"]
    if documents is not None and not all(isinstance(document, dict) for document in documents):
        raise invalid("documents", "expected a list of objects", "invalid_type")
    conversation = Conversation(
        tuple(messages),
        prefill,
        tools,
        template_data(values["chat_template_kwargs"], "chat_template_kwargs"),
        None if documents is None else tuple(documents),
        values["reasoning_format"] == "none",
    )
    return ChatRequest(conversation, drawing, read_format(values["response_format"]))


def render(model: Model, conversation: Conversation) -> tuple[list[int], Dialect, str]:
    """The prompt's token ids, how calls are written, and the source of the template. Takes long; runs in a thread."""
    if model.template is None:
        raise ApiError(400, "the model has no chat template; use /v1/completions", param="messages", code="unsupported")
    tools, tokenizer = conversation.tools, model.text_tokenizer()
    definitions = tools.definitions() if tools.usable else None
    try:
        options = TemplateOptions(None, definitions, conversation.documents, conversation.arguments)
        template = model.template.chosen(options)
        dialect = dialect_of(template.source)
        messages: Sequence[Message] = conversation.messages
        keywords = options.keywords()
        if dialect is None:
            messages, keywords["tools"] = described(messages, tools), None
        elif "tool_calls" not in template.source:
            messages = with_written_calls(messages, dialect)
        trusted = ("assistant",) if messages_are_tame(conversation.messages, tokenizer.special_tokens) else ()
        ids = encode_chat(template, tokenizer, messages, add_generation_prompt=True, trusted_roles=trusted, **keywords)
        if conversation.prefill:
            ids += tokenizer.encode(conversation.prefill)
    except ConfigError as error:
        raise invalid("messages", str(error)) from None
    return ids, dialect or HERMES, template.source


def messages_are_tame(messages: Sequence[Message], special: Mapping[str, int]) -> bool:
    """Whether nothing that the client wrote as the assistant's spells a special token: the marks of calls then count."""
    said = [str(message) for message in messages if message["role"] == "assistant"]
    return any("tool_calls" in text for text in said) and not any(token in text for text in said for token in special)


def reading_of(
    model: Model, ids: Sequence[int], source: str, dialect: Dialect, request: ChatRequest, forced: bool
) -> Reading:
    """How the answers to this prompt are read.

    Args:
        forced: a grammar decides the text from its first character on, so that no thoughts come.
    """
    conversation = request.conversation
    thinks = THINK in source and not conversation.keep_thoughts and not forced and not conversation.prefill
    ending = model.text_tokenizer().decode(ids[-8:], skip_special_tokens=False).rstrip()
    tools = conversation.tools
    return Reading(
        thinks=thinks,
        thinking=thinks and ending.endswith(THINK),
        responds="<response>" in source and not conversation.keep_thoughts,
        dialect=dialect if tools.usable else None,
        single=not tools.parallel,
    )


def grammar_of(model: Model, request: ChatRequest, dialect: Dialect) -> tuple[str, str] | None:
    """The grammar of the answer, from its schema and from calls that are demanded, and the field that it comes from."""
    tools = request.conversation.tools
    if tools.usable and (tools.forced or request.schema is not None):
        special = dialect.open in model.text_tokenizer().special_tokens
        rules = forced_calls(tools, dialect, special)
        if tools.forced:
            return lark_grammar(f"start: calls\n{rules}"), "tools"
        answer = json.dumps(with_options(request.schema or {}))
        return lark_grammar(f"start: calls | answer\nanswer: %json {answer}\n{rules}"), "tools"
    return None if request.schema is None else (json_grammar(request.schema), "response_format")


async def prepare_chat(
    service: Service, model: Model, request: ChatRequest
) -> tuple[list[int], Reading, Grammar | None]:
    """The prompt's token ids, how answers are read, and their grammar."""
    ids, dialect, source = await service.work(lambda: render(model, request.conversation))
    found = grammar_of(model, request, dialect)
    grammar = None if found is None else await service.compile(*found)
    return ids, reading_of(model, ids, source, dialect, request, grammar is not None), grammar


class ChatJob(Job):
    """A conversation to be answered; the result in the form of chat completions."""

    def __init__(self, service: Service, request: ChatRequest, ids: list[int], reading: Reading) -> None:
        super().__init__([ids], request.drawing)
        self._tokenizer = service.model.text_tokenizer()
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self._model, self._fingerprint = service.settings.name, service.fingerprint
        self._readers = [reading.reader() for _ in range(request.drawing.choices)]
        self._messages: list[dict[str, Any]] = [{"content": "", "reasoning": "", "calls": []} for _ in self._readers]
        self._tokens: list[list[TokenFacts]] = [[] for _ in self._readers]
        self._finishes: list[str | None] = [None for _ in self._readers]

    @classmethod
    async def prepare(cls, request: ChatRequest, service: Service, model: Model) -> ChatJob:
        """Renders and tokenises the conversation and compiles its grammar."""
        ids, reading, grammar = await prepare_chat(service, model, request)
        return cls(service, replace(request, drawing=replace(request.drawing, grammar=grammar)), ids, reading)

    def begin(self) -> Iterator[Event]:
        """The first event of each answer names its role."""
        for index in range(len(self._readers)):
            yield Event(self._chunk(index, {"role": "assistant", "content": ""}))

    def take(self, index: int, piece: Piece, answers: Answers) -> Iterator[Event]:
        """Reads a piece; an event for everything that became certain."""
        reader, message = self._readers[index], self._messages[index]
        tokens = piece.tokens if self.drawing.logprobs is not None else []
        self._tokens[index] += tokens
        told = False
        for found in reader.push(piece.parts, piece.finish is not None):
            delta = self._delta(message, found)
            if self.drawing.stream:
                yield Event(self._chunk(index, delta, None if told else tokens, answers))
            told = True
        if tokens and not told and self.drawing.stream:
            yield Event(self._chunk(index, {"content": ""}, tokens, answers))
        if piece.finish or reader.done:
            self._finishes[index] = "tool_calls" if reader.called else piece.finish
            if self.drawing.stream:
                yield Event(self._chunk(index, {}, None, answers, finish=self._finishes[index]))

    def _delta(self, message: dict[str, Any], found: Found) -> dict[str, Any]:
        """Adds what was found to the message; the same as a delta of a stream."""
        if found.call is not None:
            number = len(message["calls"])
            message["calls"].append(found.call)
            return {"tool_calls": [{"index": number, **call_data(found.call)}]}
        message["content"] += found.content
        message["reasoning"] += found.reasoning
        return {"reasoning_content": found.reasoning} if found.reasoning else {"content": found.content}

    def end(self, answers: Answers) -> Iterator[Event]:
        """The counts, where they are wanted, and the end of the stream."""
        if self.drawing.include_usage:
            usage = {"choices": [], "usage": answers.usage(), "timings": answers.answers[0].timings()}
            yield Event({**self._head("chat.completion.chunk"), **usage})
        yield Event(DONE)

    def stops_early(self, index: int) -> bool:
        """Whether the one call that was wanted is complete."""
        return self._readers[index].done

    def result(self, answers: Answers) -> dict[str, Any]:
        """The whole answer."""
        choices = []
        for index, message in enumerate(self._messages):
            told: dict[str, Any] = {"role": "assistant", "content": message["content"], "refusal": None}
            if message["reasoning"]:
                told["reasoning_content"] = message["reasoning"]
            if message["calls"]:
                told["content"] = message["content"] or None
                told["tool_calls"] = [call_data(call) for call in message["calls"]]
            choices.append(
                {
                    "index": index,
                    "message": told,
                    "logprobs": self._logprobs(self._tokens[index]),
                    "finish_reason": self._finishes[index],
                }
            )
        counts = {"usage": answers.usage(), "timings": answers.answers[0].timings()}
        return {**self._head("chat.completion"), "choices": choices, **counts}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
        }

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        tokens: Sequence[TokenFacts] | None = None,
        answers: Answers | None = None,
        finish: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": self._logprobs(tokens or ()), "finish_reason": finish}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self.drawing.include_usage:
            chunk["usage"] = None
        if answers is not None and (finish or self.drawing.timings_per_token):
            chunk["timings"] = answers.answers[index].timings()
        return chunk

    def _logprobs(self, tokens: Sequence[TokenFacts]) -> dict[str, Any] | None:
        if self.drawing.logprobs is None:
            return None
        return {"content": chat_logprobs(self._tokenizer, tokens), "refusal": None}


def call_data(call: Call) -> dict[str, Any]:
    """A call in the form of chat completions."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


async def chat_completions(request: Request) -> Generating:
    """Answers a conversation."""
    service: Service = request.app.state.service
    chat = await understood(request, read_chat)

    async def prepare(service: Service, model: Model) -> ChatJob:
        return await ChatJob.prepare(chat, service, model)

    return Generating(service, chat.drawing.choices, prepare)
