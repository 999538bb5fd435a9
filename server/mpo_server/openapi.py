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
from mpo_server.fields import Table, schema
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
    template = {"type": "object", "properties": messages["properties"], "required": ["messages"]}
    paths = {
        "/v1/chat/completions": _post("Answer a conversation", messages, streams=True),
        "/v1/completions": _post("Continue a text", schema(COMPLETION, ("prompt",)), streams=True),
        "/v1/responses": _post("Answer in the newer interface", schema(RESPONSE, ("input",)), streams=True),
        "/tokenize": _post("Token ids of a text", _of(TOKENIZE, "content")),
        "/detokenize": _post("Text of token ids", _of(DETOKENIZE, "tokens")),
        "/apply-template": _post("What the chat template makes of a conversation", template),
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


def _of(table: Table, *needed: str) -> dict[str, Any]:
    return schema(table, needed)


def _errors() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": text, "content": content} for status, text in _ERRORS.items()}


def _post(summary: str, body: dict[str, Any], streams: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
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
