"""The OpenAPI document, made from the same tables that check the requests."""

from __future__ import annotations

from functools import cache
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mpo_runtime import __version__
from mpo_server.chat import CHAT
from mpo_server.completions import COMPLETION
from mpo_server.errors import json_response
from mpo_server.fields import schema
from mpo_server.responses import RESPONSE
from mpo_server.texts import DETOKENIZE, TOKENIZE

_ERRORS = {
    "400": "The request is wrong; `param` names the field.",
    "401": "The key is missing or wrong.",
    "403": "The Host or Origin header is not allowed.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "415": "The body is no JSON.",
    "500": "The server failed.",
    "503": "The model is being loaded, or the queue is full; Retry-After says when to try again.",
    "504": "The request took too long.",
}


async def endpoint(request: Request) -> Response:
    """The document."""
    return json_response(document())


@cache
def document() -> dict[str, Any]:
    """The interface in OpenAPI 3.1."""
    messages = schema(CHAT, ("messages",))
    messages["properties"]["messages"] = message_list()
    messages["properties"]["response_format"] = response_format()
    messages["properties"] |= choice_of_tools()
    messages["allOf"] = [_STREAM, needs("top_logprobs", {"type": "integer", "minimum": 1}, "logprobs"), _TOOLS]
    completion = schema(COMPLETION, ("prompt",))
    completion["properties"]["response_format"] = response_format()
    tokens = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
    texts = {"type": "array", "items": {"anyOf": [{"type": "string"}, tokens]}, "minItems": 1, "maxItems": 64}
    completion["properties"]["prompt"] = {"anyOf": [{"type": "string"}, tokens, texts]}
    no_tokens = {"anyOf": [{"required": [name], "properties": {name: {"const": 0}}} for name in _LIMITS]}
    completion["allOf"] = [_STREAM, {"if": no_tokens, "then": _true("echo")}]
    response = schema(RESPONSE, ("input",))
    response["properties"] |= choice_of_tools()
    response["properties"]["input"] = {"anyOf": [{"type": "string", "minLength": 1}, message_list()]}
    response["allOf"] = [_TOOLS]
    detokenize = schema(DETOKENIZE, ("tokens",))
    detokenize["properties"]["tokens"]["anyOf"][0]["items"] = {"type": "integer", "minimum": 0}
    paths = {
        "/v1/chat/completions": _post("Answer a conversation", messages, streams=True),
        "/v1/completions": _post("Continue a text", completion, streams=True),
        "/v1/responses": _post("Answer in the newer interface", response, streams=True),
        "/tokenize": _post("Token ids of a text", schema(TOKENIZE, ("content",))),
        "/detokenize": _post("Text of token ids", detokenize),
        "/apply-template": _post("What the chat template makes of a conversation", messages),
        "/v1/models": _get("The model"),
        "/props": _get("The model's template, context, certificate and layers; the server's limits"),
        "/health": _get("Whether the server can answer", public=True),
        "/metrics": _get("Counts for Prometheus", kind="text/plain"),
    }
    error = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "mpo-runtime", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": {"Error": error},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
        "security": [{}, {"bearer": []}, {"key": []}],
    }


def message_list() -> dict[str, Any]:
    """The messages of a conversation."""
    part = {
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"enum": ["text"]}, "text": {"type": "string"}},
    }
    message = {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": part}]},
        },
    }
    return {"type": "array", "items": message, "minItems": 1, "maxItems": 4096}


def _true(name: str) -> dict[str, Any]:
    return {"required": [name], "properties": {name: {"const": True}}}


def needs(name: str, value: dict[str, Any], other: str) -> dict[str, Any]:
    """A field that, where it has such a value, needs another one to be true."""
    return {"if": {"required": [name], "properties": {name: value}}, "then": _true(other)}


_STREAM = needs("stream_options", {"type": "object"}, "stream")
_LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")
_DEMANDED = {"required": ["tool_choice"], "properties": {"tool_choice": {"not": {"enum": ["auto", "none", None]}}}}
_TOOLS = {"if": _DEMANDED, "then": {"required": ["tools"], "properties": {"tools": {"type": "array", "minItems": 1}}}}


def choice_of_tools() -> dict[str, Any]:
    """The functions of a request, and whether the model must call."""
    name = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
    function = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": name, "description": {"type": ["string", "null"], "maxLength": 8192}},
    }
    tool = {
        "type": "object",
        "required": ["type", "function"],
        "properties": {"type": {"const": "function"}, "function": function},
    }
    return {
        "tools": {"anyOf": [{"type": "array", "items": tool, "maxItems": 128}, {"type": "null"}]},
        "tool_choice": {"enum": ["auto", "none", "required", None]},
    }


def response_format() -> dict[str, Any]:
    """What the text must be like."""
    plain = {"type": "object", "required": ["type"], "properties": {"type": {"enum": ["text", "json_object"]}}}
    described = {
        "type": "object",
        "required": ["type", "json_schema"],
        "properties": {
            "type": {"const": "json_schema"},
            "json_schema": {"type": "object", "required": ["schema"], "properties": {"schema": {"type": "object"}}},
        },
    }
    return {"anyOf": [plain, described, {"type": "null"}]}


def _errors() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": text, "content": content} for status, text in _ERRORS.items()}


def _post(summary: str, body: dict[str, Any], streams: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {"schema": {}}
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
            "responses": {"200": {"description": "Done.", "content": content}, **_errors()},
        }
    }


def _get(summary: str, kind: str = "application/json", public: bool = False) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": "Done.", "content": {kind: {"schema": {}}}}, **_errors()},
    }
    if public:
        operation["security"] = []
    return {"get": operation}
