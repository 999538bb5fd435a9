"""A running server of the embedded model, and a plain HTTP client for what OpenAI's client would not send."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "exporter" / "mpo_exporter" / "data" / "granite-nano"
PATHS = os.pathsep.join(str(ROOT / folder) for folder in (".", "formats", "exporter", "server"))
SECONDS_TO_START = 120


@dataclass
class Reply:
    """A response: status, headers in lower case, body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found = self.json["error"]
        assert {"message", "type", "param", "code"} <= set(found)
        assert isinstance(found["message"], str) and found["message"]
        return found

    def events(self) -> list[Any]:
        """The data of the server-sent events; the last one must be [DONE]."""
        lines = [line for line in self.body.decode().split("\n\n") if line and not line.startswith(":")]
        data = [line.rpartition("data: ")[2] for line in lines]
        assert data[-1] == "[DONE]"
        return [json.loads(item) for item in data[:-1]]


class Server:
    """A server in a process of its own."""

    def __init__(self, *arguments: object, model: Path = NANO, paths: str = PATHS) -> None:
        boot = "import sys; from mpo_runtime.cli.main import main; sys.argv[0] = 'mpo-run'; main()"
        command = [sys.executable, "-c", boot, "serve", model, "--port", 0, *arguments]
        # A pipe that nobody reads gets full, and then the server waits.
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - ended() closes it
        self.printed = ""
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=os.environ | {"PYTHONPATH": paths},
        )
        self.port = 0

    def wait(self) -> Server:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        assert "http://" in line, (line, self.ended())
        self.port = int(line.partition("http://")[2].partition("/")[0].rpartition(":")[2])
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, timeout: float = 120) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout: float = 120,
    ) -> Reply:
        sent = {} if body is None else {"Content-Type": "application/json"}
        content = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
        connection = self.connect(timeout)
        try:
            connection.request(method, path, content, sent | (headers or {}))
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, found, response.read())
        finally:
            connection.close()

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        return self.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})

    def get(self, path: str, **headers: str) -> Reply:
        return self.request("GET", path, None, {name.replace("_", "-"): value for name, value in headers.items()})

    def chat(self, text: str = "I want to book a table.", **fields: Any) -> Reply:
        message = {"role": "user", "content": text}
        return self.post("/v1/chat/completions", {"messages": [message], "temperature": 0, "max_tokens": 8} | fields)

    def complete(self, prompt: Any = "I want to", **fields: Any) -> Reply:
        return self.post("/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 8} | fields)

    def stop(self) -> tuple[int, str, str]:
        """Ends the server; its exit code and what it printed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.ended(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.ended()

    def ended(self, timeout: float = 120) -> tuple[int, str, str]:
        """The same of a server that has reasons of its own to end."""
        out, _ = self.process.communicate(timeout=timeout)
        if not self.errors.closed:
            with self.errors:
                self.errors.seek(0)
                self.printed = self.errors.read().decode()
        return self.process.returncode, out.decode(), self.printed


Start = Callable[..., Server]


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The server that most tests share."""
    started = Server("--alias", "nano", "--parallel", 4, "--verbose").wait()
    yield started
    code, _, _ = started.stop()
    assert code == 0


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts servers with options of their own; they are ended after the test."""
    started: list[Server] = []

    def begin(*arguments: object, wait: bool = True, **options: Any) -> Server:
        started.append(Server(*arguments, **options))
        return started[-1].wait() if wait else started[-1]

    yield begin
    for one in started:
        one.stop()


def eventually(check: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether something becomes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if check():
            return True
        time.sleep(0.02)
    return False
