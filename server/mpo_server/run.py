"""Runs the server: binds its address, loads the model, drains when it is told to end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mpo_formats import ConfigError
from mpo_runtime import load
from mpo_runtime.model import Model
from mpo_runtime.weights import store
from mpo_server.app import build
from mpo_server.service import Service
from mpo_server.settings import LARGEST_HEAD, Settings

log = logging.getLogger("mpo_server")
BACKLOG = 1024
HEAD_SECONDS = 15.0  # in which a client must send the head of a request
SWITCH_SECONDS = (
    0.0005  # for which Python lets the engine's thread keep the others waiting; 0.005 delays answers under load
)


def run(settings: Settings) -> None:
    """Serves until a signal ends it.

    Raises:
        MpoError: for an address in use, or a file that is no model; nothing is left running then.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    store.resolve(settings.file)  # the most common mistake, checked before anything is started
    listener = bind(settings)
    try:
        asyncio.run(serve(settings, listener))
    finally:
        listener.close()


async def serve(settings: Settings, listener: socket.socket) -> None:
    """Loads the model beside the running server, which answers 503 until then."""
    set_up_log(settings.verbose)
    service = Service(settings)
    config = uvicorn.Config(
        build(service),
        log_config=None,
        access_log=False,
        http=Connection,
        ws="none",
        lifespan="off",
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        h11_max_incomplete_event_size=LARGEST_HEAD,
    )
    server = Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    loading = in_thread(lambda: load(settings.file, **settings.loading))
    both: set[asyncio.Future[Any]] = {serving, loading}
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():  # told to end while the model is loaded, which cannot be interrupted
        end_now(0)
    try:
        model = loading.result()
    except BaseException:
        server.should_exit = True
        await serving
        raise
    with model:
        check_model(model, settings)
        service.open(model)
        announce(settings, listener)
        await serving
        service.close()
        if server.force_exit:
            end_now(1)


def announce(settings: Settings, listener: socket.socket) -> None:
    """Prints where the page is."""
    host, port = listener.getsockname()[:2]
    print(f"{settings.name}: http://{f'[{host}]' if ':' in host else host}:{port}/ (Ctrl-C ends)", flush=True)


def end_now(code: int) -> NoReturn:
    """Ends the process with everything that still runs in it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def check_model(model: Model, settings: Settings) -> None:
    """Raises ConfigError for a model without a tokenizer."""
    if model.tokenizer is None:
        raise ConfigError(f"{settings.file}: has no tokenizer, which a server needs")


class Connection(H11Protocol):
    """A connection whose client must send the head of a request in time, so that slow ones do not pile up."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first request."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Takes a part of a request; the time counts from the first part of its head on."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits for nothing more."""
        self._stop_watching()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:  # the head is complete
            self._stop_watching()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_watching(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class Server(uvicorn.Server):
    """Ends when what runs has ended; at once on a second signal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles SIGINT, SIGTERM and SIGHUP while the server runs; the process then ends as if by itself."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        numbers = [
            number
            for number in map(signal.Signals.__getitem__, names)
            if signal.getsignal(number) is not signal.SIG_IGN
        ]
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains on the first signal, ends on the second."""
        if self.should_exit:
            self.force_exit = True
        else:
            print("ending when what runs has ended; a second signal ends at once", file=sys.stderr, flush=True)
        self.should_exit = True


def bind(settings: Settings) -> socket.socket:
    """The listening socket; raises ConfigError where the address cannot be had."""
    where = f"{settings.host}:{settings.port}"
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # IPv4 first: clients that are told `localhost` try 127.0.0.1
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    except (OSError, UnicodeError):
        raise ConfigError(f"--host {settings.host}: is no address of this machine") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(f"{where}: cannot be listened on ({error.strerror}); choose another --port") from None
    return listener


def in_thread(function: Callable[[], Model]) -> asyncio.Future[Model]:
    """Runs a function in a thread that does not keep the process alive."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Model] = loop.create_future()

    def work() -> None:
        finish: Callable[[], None]
        try:
            finish = partial(done.set_result, function())
        except BaseException as error:
            finish = partial(done.set_exception, error)
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(finish)

    threading.Thread(target=work, daemon=True, name="load").start()
    return done


def set_up_log(verbose: bool) -> None:
    """Sends the server's own lines to standard error; requests only with --verbose."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
