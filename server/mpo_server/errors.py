"""Errors that a client sees, in the form that OpenAI's clients expect: {"error": {message, type, param, code}}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    501: "not_supported_error",
    503: "unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer with a status of 400 or more.

    Args:
        param: the field of the request that is wrong.
        code: a short name of the fault that programs can compare.
        kind: the error's type; where None, the usual one of the status.
        extra: more members of the error object.
        headers: more headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        extra: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind = kind or _TYPES.get(status, "server_error")
        self.extra, self.headers = dict(extra or {}), dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error as JSON data."""
        facts = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": {**facts, **self.extra}}

    def response(self) -> Response:
        """The error as a response."""
        return json_response(self.body(), self.status, self.headers)


def json_response(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Data as a JSON response."""
    return Response(json_bytes(data), status, headers, "application/json")


def json_bytes(data: Any) -> bytes:
    """Data as JSON in UTF-8. A lone surrogate, which is no text, is written as an escape."""
    try:
        return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except UnicodeEncodeError:
        return json.dumps(data, separators=(",", ":"), allow_nan=False).encode()


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """A fault of one field of the request."""
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code=code)


def internal(message: str = "the server failed; its log says more") -> ApiError:
    """A fault of the server itself."""
    return ApiError(500, message, code="internal_error")


def too_long(prompt: int, context: int, param: str) -> ApiError:
    """The prompt leaves no room in the context."""
    return ApiError(
        400,
        f"This model's maximum context length is {context} tokens; the prompt has {prompt}. "
        "Shorten it, or start the server with a larger --ctx-size.",
        param=param,
        code="exceed_context_size_error",
        kind="exceed_context_size_error",
        extra={"n_prompt_tokens": prompt, "n_ctx": context},
    )


def overloaded(waiting: int, seconds: int) -> ApiError:
    """The queue is full."""
    return ApiError(
        503,
        f"the server is busy: {waiting} requests wait already; try again in {seconds} seconds",
        code="queue_full",
        headers={"Retry-After": str(seconds)},
    )
