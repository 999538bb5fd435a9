"""/v1/responses: OpenAI's newer interface, for text and calls of functions; nothing is stored between requests."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from starlette.requests import Request

from mpo_runtime.model import Model
from mpo_server.chat import ChatRequest, Conversation, prepare_chat
from mpo_server.errors import ApiError, invalid
from mpo_server.fields import Field, Table, flag, number, read, required, text_field, whole
from mpo_server.generation import Answers, Piece
from mpo_server.http import Event, Generating, Job, understood
from mpo_server.messages import LONGEST_CONTENT, MOST_MESSAGES, Message, read_messages, split_prefill, template_data
from mpo_server.reader import Found
from mpo_server.sampling import MOST_TOKENS, SAMPLING, read_drawing
from mpo_server.service import Service
from mpo_server.structure import read_format
from mpo_server.tools import Call, read_tools

_SHARED = ("model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "logit_bias", "stream", "ignore_eos")
RESPONSE: Table = {
    "input": Field(("string", "array"), 1, LONGEST_CONTENT, text="A message, or a list of messages and calls."),
    "instructions": text_field(LONGEST_CONTENT, "The system message."),
    **{name: SAMPLING[name] for name in _SHARED},
    "max_output_tokens": whole(1, MOST_TOKENS, None, "The most new tokens."),
    "text": Field(("object",), text="{format: {type: text | json_object | json_schema, …}}"),
    "tools": Field(("array",), 0, 128, items={"type": "object"}, text="Functions that the model may call."),
    "tool_choice": Field(("string", "object"), text="none, auto, required, or one function."),
    "parallel_tool_calls": flag(True),
    "chat_template_kwargs": Field(("object",), text="Variables for the chat template."),
    "metadata": Field(("object",), 0, 16),
    "reasoning": Field(("object",)),
    "store": flag(False, "Ignored: nothing is stored."),
    "frequency_penalty": number(-2, 2, 0.0),
    "presence_penalty": number(-2, 2, 0.0),
}
# Fields that need what this server does not have, with the values that leave them off.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "background": (False,),
    "conversation": (),
    "previous_response_id": (),
    "prompt": (),
    "top_logprobs": (0,),
    "include": ([],),
    "truncation": ("disabled",),
}


def read_response(model: Model, data: Mapping[str, Any]) -> tuple[ChatRequest, dict[str, Any]]:
    """The request as a conversation, and the fields that the response repeats."""
    for name, off in _UNSUPPORTED.items():
        if data.get(name) is not None and data[name] not in off:
            raise ApiError(
                400, f"{name}: this server does not support it; leave it out", param=name, code="unsupported"
            )
    values = read(RESPONSE, data)
    required(values, "input")
    drawing = read_drawing(model, {**data, "n": None, "stream_options": None}, values["max_output_tokens"], None)
    tools = read_tools(values["tools"], values["tool_choice"], values["parallel_tool_calls"])
    messages = read_input(values["input"])
    if values["instructions"]:
        messages.insert(0, {"role": "system", "content": values["instructions"]})
    conversation, prefill = split_prefill(messages)
    form = (values["text"] or {}).get("format")
    if form is not None and not isinstance(form, dict):
        raise invalid("text.format", "expected an object", "invalid_type")
    arguments = template_data(values["chat_template_kwargs"], "chat_template_kwargs")
    asked = Conversation(tuple(conversation), prefill, tools, arguments, None, False)
    return ChatRequest(asked, drawing, read_format(form, "text.format")), _repeated(values, data)


def _repeated(values: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the request that the response repeats, as OpenAI's clients expect them."""
    return {
        "instructions": values["instructions"],
        "max_output_tokens": values["max_output_tokens"],
        "temperature": values["temperature"],
        "top_p": values["top_p"],
        "tools": values["tools"] or [],
        "tool_choice": values["tool_choice"] or "auto",
        "parallel_tool_calls": values["parallel_tool_calls"],
        "metadata": values["metadata"] or {},
        "text": data.get("text") or {"format": {"type": "text"}},
        "previous_response_id": None,
        "store": False,
        "truncation": "disabled",
    }


def read_input(given: str | list[Any]) -> list[Message]:
    """The messages of a request: a text is the user's; calls and their results become messages of their own."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if len(given) > MOST_MESSAGES:
        raise invalid("input", f"expected at most {MOST_MESSAGES} items", "out_of_range")
    messages = [_input_item(item, f"input[{index}]") for index, item in enumerate(given)]
    joined: list[dict[str, Any]] = []
    for message in (message for message in messages if message is not None):
        calls = message.get("tool_calls")
        if calls and joined and joined[-1].get("tool_calls"):
            joined[-1]["tool_calls"] = [*joined[-1]["tool_calls"], *calls]
        else:
            joined.append(message)
    return read_messages(joined, "input")


def _input_item(item: Any, where: str) -> dict[str, Any] | None:
    """One item as a message of chat completions; None for one that says nothing to the model."""
    if not isinstance(item, dict):
        raise invalid(where, "expected an object", "invalid_type")
    kind = item.get("type", "message")
    if kind == "message":
        return {"role": item.get("role"), "content": item.get("content")}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if kind == "function_call_output":
        return {"role": "tool", "content": item.get("output"), "tool_call_id": item.get("call_id")}
    if kind == "reasoning":
        return None
    raise invalid(f"{where}.type", "expected message, function_call or function_call_output", "unsupported")


class ResponseJob(Job):
    """A conversation to be answered; the result in the form of responses, with the events in OpenAI's order."""

    param = "input"

    def __init__(
        self, service: Service, request: ChatRequest, repeated: dict[str, Any], ids: list[int], reader: Any
    ) -> None:
        super().__init__([ids], request.drawing)
        self._reader = reader
        self._repeated = repeated
        self._id, self._created = f"resp_{secrets.token_hex(16)}", int(time.time())
        self._model = service.settings.name
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the item that is being written
        self._number = 0
        self._finish = "stop"

    @classmethod
    async def prepare(
        cls, request: ChatRequest, repeated: dict[str, Any], service: Service, model: Model
    ) -> ResponseJob:
        """Renders and tokenises the conversation and compiles its grammar."""
        ids, reading, grammar = await prepare_chat(service, model, request)
        request = replace(request, drawing=replace(request.drawing, grammar=grammar))
        return cls(service, request, repeated, ids, reading.reader())

    def begin(self) -> Iterator[Event]:
        """The response, empty and in progress."""
        for name in ("response.created", "response.in_progress"):
            yield self._event(name, response=self._response("in_progress", None))

    def take(self, index: int, piece: Piece, answers: Answers) -> Iterator[Event]:
        """Reads a piece; events for everything that became certain."""
        for found in self._reader.push(piece.parts, piece.finish is not None):
            yield from self._add(found)
        if piece.finish:
            self._finish = piece.finish
            yield from self._close()

    def _add(self, found: Found) -> Iterator[Event]:
        if found.call is not None:
            yield from self._close()
            yield from self._add_call(found.call)
            return
        kind, text = ("reasoning", found.reasoning) if found.reasoning else ("message", found.content)
        if self._open is None or self._open["type"] != kind:
            yield from self._close()
            yield from self._begin_item(kind)
        if self._open is not None:
            self._open["content"][0]["text"] += text
            yield self._event(f"response.{_TEXT[kind]}.delta", **self._place(), delta=text, **_extra(kind))

    def _begin_item(self, kind: str) -> Iterator[Event]:
        """Begins a message, or thoughts."""
        head: dict[str, Any] = {"id": f"{_PREFIX[kind]}_{secrets.token_hex(16)}", "type": kind, "status": "in_progress"}
        more: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
        head |= more
        yield self._event("response.output_item.added", output_index=len(self._items), item={**head, "content": []})
        part: dict[str, Any] = {"type": _TEXT[kind], "text": ""} | (
            {"annotations": [], "logprobs": []} if kind == "message" else {}
        )
        self._open = {**head, "content": [part]}
        self._items.append(self._open)
        if kind == "message":
            yield self._event("response.content_part.added", **self._place(), part=dict(part))

    def _close(self) -> Iterator[Event]:
        """Ends the item that is being written."""
        if self._open is None:
            return
        kind, part = self._open["type"], self._open["content"][0]
        yield self._event(f"response.{_TEXT[kind]}.done", **self._place(), text=part["text"], **_extra(kind))
        if kind == "message":
            yield self._event("response.content_part.done", **self._place(), part=dict(part))
        self._open["status"] = "completed" if self._finish == "stop" else "incomplete"
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=self._open)
        self._open = None

    def _add_call(self, call: Call) -> Iterator[Event]:
        item = {
            "id": f"fc_{secrets.token_hex(16)}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
        }
        place = {"item_id": item["id"], "output_index": len(self._items)}
        yield self._event("response.output_item.added", output_index=len(self._items), item=dict(item))
        yield self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
        yield self._event("response.function_call_arguments.done", **place, arguments=call.arguments, name=call.name)
        item |= {"arguments": call.arguments, "status": "completed"}
        self._items.append(item)
        yield self._event("response.output_item.done", output_index=place["output_index"], item=item)

    def end(self, answers: Answers) -> Iterator[Event]:
        """The whole response."""
        name = "response.incomplete" if self._finish == "length" else "response.completed"
        yield self._event(name, response=self.result(answers))

    def fail(self, error: ApiError) -> Iterator[Event]:
        """The response that failed."""
        told = {**self._response("failed", None), "error": {"code": "server_error", "message": error.message}}
        yield self._event("response.failed", response=told)

    def stops_early(self, index: int) -> bool:
        """Whether the one call that was wanted is complete."""
        return bool(self._reader.done)

    def result(self, answers: Answers) -> dict[str, Any]:
        """The whole response."""
        counts = answers.usage()
        usage = {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": counts["prompt_tokens_details"],
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"],
        }
        cut = self._finish == "length"
        whole = self._response("incomplete" if cut else "completed", usage)
        return whole | ({"incomplete_details": {"reason": "max_output_tokens"}} if cut else {})

    def _response(self, status: str, usage: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self._model,
            "output": list(self._items),
            "usage": usage,
            **self._repeated,
        }

    def _event(self, name: str, /, **facts: Any) -> Event:
        number, self._number = self._number, self._number + 1
        return Event({"type": name, "sequence_number": number, **facts}, name)

    def _place(self) -> dict[str, Any]:
        identity = self._open["id"] if self._open else ""
        return {"item_id": identity, "output_index": len(self._items) - 1, "content_index": 0}


_TEXT = {"message": "output_text", "reasoning": "reasoning_text"}
_PREFIX = {"message": "msg", "reasoning": "rs"}


def _extra(kind: str) -> dict[str, Any]:
    return {"logprobs": []} if kind == "message" else {}


async def responses(request: Request) -> Generating:
    """Answers a conversation."""
    service: Service = request.app.state.service
    asked, repeated = await understood(request, read_response)

    async def prepare(service: Service, model: Model) -> ResponseJob:
        return await ResponseJob.prepare(asked, repeated, service, model)

    return Generating(service, 1, prepare)
