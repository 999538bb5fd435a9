"""What stands before every endpoint: host names, origins of web pages, keys, headers of safety, a line in the log.

A page on the web may send requests to a server on this machine from its visitor's browser. Two checks stop it: the `Host`
header must name this machine (a name of the attacker's may resolve to 127.0.0.1), and the `Origin` header, which browsers
add, must be this server's own or one that `--cors` allows.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import socket
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mpo_server.errors import ApiError
from mpo_server.service import Service
from mpo_server.settings import LARGEST_HEAD, Settings

log = logging.getLogger("mpo_server")
# Nothing outside the page's own files is loaded or contacted, and no other page may frame it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
SAFETY = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_ALLOWED_HEADERS = "Authorization, Content-Type, X-Api-Key"


class Guard:
    """The outermost ASGI application.

    Args:
        public: paths that need no key; every other path does where the server has keys.
        known: all paths, for the log and the counts: what a client makes up is never written there.
    """

    def __init__(self, app: ASGIApp, service: Service, public: frozenset[str], known: frozenset[str]) -> None:
        self._app, self._service = app, service
        self._public, self._known = public, known
        self._keys = Keys(service.settings.keys)
        self._hosts = Hosts(service.settings)
        self._origins = frozenset(service.settings.origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Checks a request and passes it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, started, status = Headers(scope=scope), time.monotonic(), 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._add_headers(MutableHeaders(raw=message.setdefault("headers", [])), headers.get("origin"))
            await send(message)

        try:
            response = self._refusal(scope, headers)
            await (response or self._app)(scope, receive, answer)
        finally:
            path = scope["path"] if scope["path"] in self._known else "other"
            self._service.metrics.requests.labels(path, str(status)).inc()
            milliseconds = (time.monotonic() - started) * 1e3
            method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "OPTIONS") else "other"
            log.info("%s %s %d %.0f ms", method, path, status, milliseconds)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to a request that is not passed on."""
        try:
            if sum(len(name) + len(value) for name, value in headers.raw) + len(scope["raw_path"]) > LARGEST_HEAD:
                raise ApiError(431, f"the headers are larger than {LARGEST_HEAD} bytes", code="headers_too_large")
            self._hosts.check(headers.getlist("host"))
            origin = headers.get("origin")
            if origin is not None:
                self._check_origin(origin, headers.get("host", ""))
                if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                    return Response(
                        None, 204, {"access-control-allow-methods": "GET, POST", "access-control-max-age": "600"}
                    )
            if scope["path"] not in self._public:
                self._keys.check(headers)
        except ApiError as error:
            return error.response()
        return None

    def _check_origin(self, origin: str, host: str) -> None:
        if origin in self._origins or "*" in self._origins or urlsplit(origin).netloc.lower() == host.lower():
            return
        raise ApiError(403, "pages of this origin may not use the server; --cors allows one", code="origin_not_allowed")

    def _add_headers(self, headers: MutableHeaders, origin: str | None) -> None:
        for name, value in SAFETY.items():
            headers.setdefault(name, value)
        headers.setdefault("cache-control", "no-store")
        if origin is not None and (origin in self._origins or "*" in self._origins):
            headers["access-control-allow-origin"] = origin if origin in self._origins else "*"
            headers["access-control-allow-headers"] = _ALLOWED_HEADERS
            headers["cross-origin-resource-policy"] = "cross-origin"
            headers.add_vary_header("Origin")


class Keys:
    """Compares keys in a time that does not depend on them."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises ApiError unless the request has one of the keys, where the server has any."""
        if not self._digests:
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [bearer.strip()] if scheme.lower() == "bearer" else []
        given.append(headers.get("x-api-key", ""))
        found = False
        for key in given:
            digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
            for known in self._digests:  # all of them, whichever matches
                found |= hmac.compare_digest(digest, known)
        if not found:
            raise ApiError(
                401,
                "this server needs a key: Authorization: Bearer KEY, or X-Api-Key: KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


class Hosts:
    """The names by which this server may be called.

    Any IP address will do, since no name has to be resolved for it, and so do names of this machine. Other names are only
    taken on an address that is reached from elsewhere, where a key is needed that an attacker's page does not have.
    """

    def __init__(self, settings: Settings) -> None:
        self._any = not settings.local and bool(settings.keys)
        self._names = {"localhost", settings.host.lower(), socket.gethostname().lower()}

    def check(self, given: list[str]) -> None:
        """Raises ApiError for a Host header that is missing, double or names something else."""
        if len(given) == 1 and (self._any or self._is_ours(given[0])):
            return
        raise ApiError(403, "the Host header does not name this server", code="host_not_allowed")

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        name = name.removesuffix(".")
        if name in self._names or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
