"""Clients that come together, leave early or wait too long; a server that is told to end."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.server.conftest import Server, Start, eventually

LONG = {"messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 1, "ignore_eos": True}


def figure(server: Server, name: str) -> float:
    lines = server.get("/metrics").body.decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0].partition(" ")[0] == name)


def begin(server: Server, **fields: Any) -> socket.socket:
    """Sends a chat request and leaves the answer unread."""
    body = json.dumps(LONG | fields).encode()
    lines = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=120)
    connection.sendall(head.encode() + body)
    return connection


def test_texts_do_not_depend_on_what_else_runs(server: Server) -> None:
    def text(seed: int) -> str:
        fields: Any = {"seed": seed, "temperature": 1, "max_tokens": 20, "ignore_eos": True}
        found = server.chat(f"Tell me about number {seed}.", **fields)
        return str(found.json["choices"][0]["message"]["content"])

    alone = [text(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(text, range(6))) == alone
        assert list(pool.map(text, reversed(range(6)))) == alone[::-1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(start: Start, stream: bool) -> None:
    server = start("--parallel", 1, "--max-queue", 4)
    connections = [begin(server, stream=stream) for _ in range(3)]
    assert eventually(lambda: figure(server, "mpo_running") >= 1)
    for connection in connections:
        connection.close()
    assert eventually(lambda: figure(server, "mpo_clients_departed_total") == 3)
    assert eventually(lambda: figure(server, "mpo_running") + figure(server, "mpo_waiting") == 0)
    generated = figure(server, "mpo_generated_tokens_total")
    assert generated < 1000, "nothing ran to the end of the context"
    reply = server.chat(max_tokens=2)
    assert reply.status == 200


def test_beyond_the_queue_the_answer_is_503(start: Start) -> None:
    server = start("--parallel", 1, "--max-queue", 1)
    connections = [begin(server, stream=True) for _ in range(2)]
    try:
        assert eventually(lambda: figure(server, "mpo_requests_refused_total") == 0 and server.chat().status == 503)
        began = time.monotonic()
        reply = server.chat(stream=True)
        assert reply.status == 503 and int(reply.headers["retry-after"]) >= 1
        assert reply.error["type"] == "unavailable_error" and time.monotonic() - began < 30
        assert server.chat(n=3).status == 503
        assert server.get("/health").status == 200
    finally:
        for connection in connections:
            connection.close()
    assert eventually(lambda: server.chat(max_tokens=1).status == 200)


def test_a_request_that_takes_too_long(start: Start) -> None:
    server = start("--timeout", 0.5)
    reply = server.post("/v1/chat/completions", LONG)
    assert reply.status in (200, 504)  # a fast machine fills the context in time
    if reply.status == 504:
        assert reply.error["code"] == "timeout"
        events = server.post("/v1/chat/completions", LONG | {"stream": True}).events()
        assert events[-1]["error"]["code"] == "timeout"


def test_a_client_that_never_ends_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    import uvicorn

    from mpo_server import run

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def talk(port: int, *parts: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        reading, found = asyncio.create_task(reader.readuntil(b"no such end")), b""
        for part in parts:
            if not reading.done():
                writer.write(part)
                await asyncio.sleep(0.05)
        try:
            await reading
        except asyncio.IncompleteReadError as error:  # the server has closed
            found = error.partial
        writer.close()
        return found

    async def both() -> list[bytes]:
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            app, http=run.Connection, ws="none", lifespan="off", log_config=None, timeout_keep_alive=1
        )
        server = run.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        port = listener.getsockname()[1]
        slow = [b"GET / HTTP/1.1\r\n", *(b"X-%d: 1\r\n" % index for index in range(20))]
        whole = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        found = await asyncio.gather(
            talk(port), talk(port, *slow), talk(port, *slow, b"\r\n"), talk(port, whole, *slow)
        )
        server.should_exit = True
        await serving
        return found

    monkeypatch.setattr(run, "HEAD_SECONDS", 0.4)
    silent, slow, late, second = asyncio.run(both())
    assert silent == slow == late == b""
    assert second.count(b"HTTP/1.1 200") == 1, "of the second request on a connection the head counts too"


def test_the_first_signal_lets_answers_end(start: Start) -> None:
    server = start("--parallel", 1)
    connection = server.connect()
    body = json.dumps(LONG | {"stream": True, "max_tokens": 60})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    server.process.send_signal(signal.SIGTERM)
    found = response.read().decode()
    connection.close()
    assert found.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in found
    assert server.process.wait(60) == 0
    with pytest.raises(OSError):
        server.get("/health")


def test_the_second_signal_ends(start: Start) -> None:
    server = start("--parallel", 1)
    connections = [begin(server, stream=True) for _ in range(8)]  # one after another: far longer than the signals take
    try:
        assert connections[0].recv(20).startswith(b"HTTP/1.1 200")
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)  # SIGINT is ignored by what a shell starts in the background
        assert server.process.wait(30) != 0
    except subprocess.TimeoutExpired:
        pytest.fail("a second signal did not end the server")
    finally:
        for connection in connections:
            connection.close()


def test_a_quiet_stream_is_kept_alive() -> None:
    import asyncio

    from mpo_server import http

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)
        response._sent = time.monotonic()

    async def run() -> None:
        task = asyncio.create_task(response._keep_alive(send))
        await asyncio.sleep(0.5)
        task.cancel()

    response = http.Generating(None, 1, None)  # type: ignore[arg-type]
    before, http.KEEP_ALIVE = http.KEEP_ALIVE, 0.05
    try:
        asyncio.run(run())
    finally:
        http.KEEP_ALIVE = before
    assert before == 15 and len(sent) >= 2
    assert {message["body"] for message in sent} == {b": keep-alive\n\n"}


# In a process of its own: two hundred clients in this one would delay the measurement, not the answer.
WATCH = """
import sys, time, urllib.request
end, slowest = time.monotonic() + 60, 0.0
while time.monotonic() < end:
    began = time.monotonic()
    urllib.request.urlopen(sys.argv[1] + "/health", timeout=60).close()
    slowest = max(slowest, time.monotonic() - began)
    time.sleep(0.25)
print(slowest)
"""


@pytest.mark.long
@pytest.mark.timeout(600)
def test_two_hundred_clients_for_a_minute(start: Start) -> None:
    server = start("--parallel", 2, "--max-queue", 16)
    end = time.monotonic() + 60
    statuses: list[int] = []

    def ask(number: int) -> None:
        while time.monotonic() < end:
            reply = server.chat(f"Number {number}", max_tokens=4)
            statuses.append(reply.status)
            if reply.status == 503:
                time.sleep(min(2.0, float(reply.headers["retry-after"])))

    def leave() -> None:
        for index in range(100):
            connection = begin(server, stream=bool(index % 2), messages=[{"role": "user", "content": "sea " * 400}])
            time.sleep(0.01 if index % 4 < 2 else 0.3)
            connection.close()

    server.chat(max_tokens=2)
    watcher = subprocess.Popen([sys.executable, "-c", WATCH, server.url], stdout=subprocess.PIPE)
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(200)]
    threads.append(threading.Thread(target=leave))
    for thread in threads:
        thread.start()
    time.sleep(15)
    early = memory(server)
    for thread in threads:
        thread.join(180)
    assert not any(thread.is_alive() for thread in threads), "a request hangs"
    assert set(statuses) <= {200, 503} and statuses.count(200) > 20
    assert watcher.stdout is not None
    assert float(watcher.communicate(timeout=60)[0]) < 1, "seconds until /health answers, at most"
    assert memory(server) < 1.1 * early
    assert eventually(lambda: figure(server, "mpo_running") + figure(server, "mpo_waiting") == 0)
    assert server.chat().status == 200


def memory(server: Server) -> float:
    """MB of memory of the server's process."""
    with open(f"/proc/{server.process.pid}/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))
