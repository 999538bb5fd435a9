"""The server as an ASGI application: its paths, and errors of any kind in OpenAI's form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mpo_formats import ConfigError, MpoError
from mpo_server import chat, completions, facts, openapi, responses, slots, texts
from mpo_server.errors import ApiError, internal, json_response
from mpo_server.http import log_failure
from mpo_server.security import Guard
from mpo_server.service import Service

PAGE = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


def build(service: Service) -> ASGIApp:
    """The application."""
    pages = {"/": PAGE / "index.html"} | {f"/{path.name}": path for path in PAGE.iterdir() if path.suffix in _TYPES}
    routes = [
        *(Route(path, static(file), methods=["GET"]) for path, file in sorted(pages.items())),
        Route("/health", facts.health, methods=["GET"]),
        Route("/metrics", facts.metrics, methods=["GET"]),
        Route("/props", facts.props, methods=["GET"]),
        Route("/slots", slots.slots, methods=["GET"]),
        Route("/slots/{number}", slots.change, methods=["POST"]),
        Route("/openapi.json", openapi.endpoint, methods=["GET"]),
        Route("/v1/models", facts.models, methods=["GET"]),
        Route("/v1/models/{name:path}", facts.one_model, methods=["GET"]),
        Route("/v1/chat/completions", chat.chat_completions, methods=["POST"]),
        Route("/v1/completions", completions.completions, methods=["POST"]),
        Route("/v1/responses", responses.responses, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/tokenize", texts.tokenize, methods=["POST"]),
        Route("/detokenize", texts.detokenize, methods=["POST"]),
        Route("/apply-template", texts.apply_template, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {
        ApiError: api_error,
        HTTPException: http_error,
        MpoError: model_error,
        ClientDisconnect: departed,
        Exception: failure,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    app.state.service = service
    public = frozenset({"/health", *pages})
    known = frozenset(route.path for route in routes)
    return Guard(app, service, public, known)


def static(file: Path) -> Any:
    """An endpoint that serves one file of the page."""

    async def serve(request: Request) -> Response:
        return FileResponse(file, media_type=_TYPES[file.suffix], headers={"cache-control": "no-cache"})

    return serve


async def embeddings(request: Request) -> Response:
    """Refused: the models here make text."""
    raise ApiError(501, "this server makes no embeddings; it runs models that write text", code="not_supported")


async def api_error(request: Request, error: Exception) -> Response:
    """An error of this server's own."""
    return error.response() if isinstance(error, ApiError) else internal().response()


async def model_error(request: Request, error: Exception) -> Response:
    """An error of the runtime: the request's where it is about its values."""
    if isinstance(error, ConfigError):
        return ApiError(400, str(error), code="invalid_value").response()
    return internal(str(error)).response()


async def http_error(request: Request, error: Exception) -> Response:
    """An error of the framework: an unknown path or method."""
    if not isinstance(error, HTTPException):
        return internal().response()
    messages = {404: "there is no such path", 405: "this path does not take that method"}
    codes = {404: "not_found", 405: "method_not_allowed"}
    status = error.status_code
    found = ApiError(
        status, messages.get(status, error.detail), code=codes.get(status), headers=dict(error.headers or {})
    )
    return json_response(found.body(), status, found.headers)


async def departed(request: Request, error: Exception) -> Response:
    """The client left before its request was complete: nobody reads this."""
    return Response(status_code=499)


async def failure(request: Request, error: Exception) -> Response:
    """A fault of this program; the log has where it is."""
    log_failure(error)
    return internal().response()
