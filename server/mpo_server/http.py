"""A generation as an HTTP response: streamed as server-sent events or whole, and ended when its client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from mpo_runtime.model import Model
from mpo_server.errors import ApiError, internal, invalid, json_bytes, json_response
from mpo_server.fields import parse_json
from mpo_server.generation import Answers, Piece, check_length
from mpo_server.sampling import Drawing
from mpo_server.service import Service
from mpo_server.settings import LARGEST_BODY

log = logging.getLogger("mpo_server")
KEEP_ALIVE = 15.0  # seconds without an event after which a stream sends a comment
GRACE_SECONDS = 10.0  # that a client has to read its answer to the end, after the time of its request
LARGE_BODY = 1 << 16  # bytes from which on a body is understood in a thread
BODY_SECONDS = 60.0  # in which a client must send its request
DONE = "[DONE]"
Asked = TypeVar("Asked")


class Event(NamedTuple):
    """One server-sent event; `name` is None for events without a name."""

    data: Any
    name: str | None = None

    def bytes(self) -> bytes:
        """The event as it is sent."""
        data = self.data.encode() if isinstance(self.data, str) else json_bytes(self.data)
        head = b"" if self.name is None else f"event: {self.name}\n".encode()
        return head + b"data: " + data + b"\n\n"


class Job(ABC):
    """A request that was understood: what to generate, and how the result is told.

    `prompts` are the prompts, `continued` whether the text continues the prompt's (and is no new message), `param` the field
    that the prompt came from.
    """

    continued = False
    param = "messages"

    def __init__(self, prompts: Sequence[Sequence[int]], drawing: Drawing) -> None:
        self.prompts, self.drawing = prompts, drawing

    @abstractmethod
    def begin(self) -> Iterable[Event]:
        """The events before the first token."""

    @abstractmethod
    def take(self, index: int, piece: Piece, answers: Answers) -> Iterable[Event]:
        """Takes a piece of one of the texts; its events."""

    @abstractmethod
    def end(self, answers: Answers) -> Iterable[Event]:
        """The events after the last token."""

    @abstractmethod
    def result(self, answers: Answers) -> dict[str, Any]:
        """The whole result."""

    def fail(self, error: ApiError) -> Iterable[Event]:
        """The events that tell of an error in the middle: the error, and the end of the stream."""
        return (Event(error.body()), Event(DONE))

    def stops_early(self, index: int) -> bool:
        """Whether a text has all that is wanted of it."""
        return False


Prepare = Callable[[Service, Model], Awaitable[Job]]


async def understood(request: Request, reader: Callable[[Model, dict[str, Any]], Asked]) -> Asked:
    """What a function makes of the model and the request's JSON object, in a thread where that takes long.

    Raises ApiError while the model is loaded, for a body that is too long, too slow or no object, and as the function.
    """
    service: Service = request.app.state.service
    model = service.model
    body = await read_body(request)

    def understand() -> Asked:
        return reader(model, parse_json(body))

    return understand() if len(body) < LARGE_BODY else await service.work(understand)


async def read_body(request: Request) -> bytes:
    """The bytes of a request's JSON; raises ApiError for a body that is too long, too slow or of another kind."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "expected a body of Content-Type: application/json", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "compressed bodies are not supported", code="unsupported_media_type")
    length = request.headers.get("content-length", "")
    too_large = ApiError(413, f"the body is larger than {LARGEST_BODY} bytes", code="body_too_large")
    if length.isdecimal() and int(length[:20]) > LARGEST_BODY:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > LARGEST_BODY:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS:g} seconds", code="timeout") from None
    return bytes(body)


class Generating:
    """A response that generates. Everything after reading the body happens here, so that a client that leaves ends it."""

    def __init__(self, service: Service, count: int, prepare: Prepare) -> None:
        """Takes the number of texts and a function that understands the request."""
        self._service, self._count, self._prepare = service, count, prepare
        self._sent = 0.0  # when the last bytes were sent; 0 before the first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs as an ASGI application."""
        work = asyncio.create_task(self._run(scope, receive, send))
        leaving = asyncio.create_task(_departure(receive))
        try:
            most = self._service.settings.timeout + GRACE_SECONDS
            await asyncio.wait({work, leaving}, timeout=most, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():  # the client has left, or does not read
                self._service.metrics.departed.inc()
        finally:
            for task in (work, leaving):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            await send(message)
            self._sent = time.monotonic()

        try:
            await self._generate(answer)
        except ApiError as error:
            if not self._sent:
                await error.response()(scope, receive, send)
        except (asyncio.CancelledError, ClientDisconnect):
            raise
        except Exception as error:
            log_failure(error)
            if not self._sent:
                await internal().response()(scope, receive, send)

    async def _generate(self, send: Send) -> None:
        service, deadline = self._service, self._service.deadline()
        with service.place(self._count):
            job = await self._prepare(service, service.model)
            if job.drawing.slot >= len(service.slots):
                raise invalid("id_slot", f"expected -1 to {len(service.slots) - 1}", "out_of_range")
            for ids in job.prompts:
                check_length(ids, service.model.engine.context, job.param)
            if service.settings.verbose:
                for ids in job.prompts:
                    log.info("prompt %s", ascii(service.model.text_tokenizer().decode(ids, skip_special_tokens=False)))
            answers = Answers(service.model, job.prompts, job.drawing, deadline, job.continued)
            try:
                if job.drawing.stream:
                    await self._stream(job, answers, send)
                else:
                    await self._whole(job, answers, send)
            finally:
                answers.close()
                service.remember(job.drawing.slot, answers.answers[0].ids)
                service.metrics.generation(answers, time.monotonic())

    async def _whole(self, job: Job, answers: Answers, send: Send) -> None:
        async for index, piece in answers.pieces():
            for _ in job.take(index, piece, answers):
                pass
            if job.stops_early(index):
                answers.stop(index)
        if job.drawing.logprobs is None:
            response = json_response(job.result(answers))
        else:  # thousands of numbers, those of the prompt among them
            response = await self._service.work(lambda: json_response(job.result(answers)))
        headers = response.raw_headers
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": response.body})

    async def _stream(self, job: Job, answers: Answers, send: Send) -> None:
        headers = {
            b"content-type": b"text/event-stream; charset=utf-8",
            b"cache-control": b"no-cache",
            b"x-accel-buffering": b"no",
        }

        async def write(events: Iterable[Event]) -> None:
            if body := b"".join(event.bytes() for event in events):
                await send({"type": "http.response.body", "body": body, "more_body": True})

        await send({"type": "http.response.start", "status": 200, "headers": list(headers.items())})
        beat = asyncio.create_task(self._keep_alive(send))
        try:
            await write(job.begin())
            async for index, piece in answers.pieces():
                await write(job.take(index, piece, answers))
                if job.stops_early(index):
                    answers.stop(index)
            await write(job.end(answers))
        except ApiError as error:
            await write(job.fail(error))
        finally:
            beat.cancel()
        await send({"type": "http.response.body", "body": b""})

    async def _keep_alive(self, send: Send) -> None:
        while True:
            rest = self._sent + KEEP_ALIVE - time.monotonic()
            if rest > 0:
                await asyncio.sleep(rest)
            else:
                await send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})


def log_failure(error: BaseException) -> None:
    """Writes where a fault of this program is, without the error's text, which may quote a request."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("a request failed with %s:\n%s", type(error).__name__, frames)


async def _departure(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
