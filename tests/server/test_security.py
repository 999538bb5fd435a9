"""Who may use the server, what it tells, what it writes into its log."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from mpo_formats import ConfigError
from mpo_server.run import bind
from mpo_server.settings import Settings, read_keys
from tests.server.conftest import Server, Start

SECRET = "sesame-" + "k" * 20
FIRST_PROMPT = "Never tell the parrot about the treasure"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("# of the house\nother-key\n\nthird-key\n")
    arguments = ("--api-key", SECRET, "--api-key-file", keys, "--cors", "http://localhost:3000")
    started = Server(*arguments).wait()
    yield started
    started.stop()


def test_keys_open_everything_but_the_public_paths(locked: Server) -> None:
    for path in ("/v1/models", "/props", "/metrics", "/openapi.json", "/nothing"):
        refused = locked.get(path)
        assert refused.status == 401 and refused.error["code"] == "invalid_api_key"
        assert refused.headers["www-authenticate"] == "Bearer"
    for key in (SECRET, "other-key", "third-key"):
        assert locked.get("/v1/models", Authorization=f"Bearer {key}").status == 200
        assert locked.get("/v1/models", X_Api_Key=key).status == 200
    for key in ("", "sesame", SECRET[:-1], SECRET + "x", "# of the house", "é"):
        assert locked.get("/v1/models", Authorization=f"Bearer {key}").status == 401
        assert locked.get("/v1/models", X_Api_Key=key).status == 401
    assert locked.get("/v1/models", Authorization=f"Basic {SECRET}").status == 401
    assert locked.get("/health").status == 200
    assert locked.get("/").status == 200
    assert locked.post("/v1/chat/completions", b"{", Authorization="Bearer wrong").status == 401


def test_pages_of_other_origins(locked: Server, server: Server) -> None:
    assert server.get("/health", Origin="http://evil.example").status == 403
    assert server.get("/health", Origin="null").status == 403
    assert server.get("/health", Origin=server.url).status == 200
    assert "access-control-allow-origin" not in server.get("/health").headers
    allowed = locked.get("/health", Origin="http://localhost:3000")
    assert (
        allowed.headers["access-control-allow-origin"] == "http://localhost:3000"
        and "Origin" in allowed.headers["vary"]
    )
    assert locked.get("/health", Origin="http://localhost:3001").status == 403
    preflight = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    asked = locked.request("OPTIONS", "/v1/chat/completions", None, preflight)
    assert asked.status == 204 and "POST" in asked.headers["access-control-allow-methods"]
    assert "Authorization" in asked.headers["access-control-allow-headers"]
    assert locked.request("OPTIONS", "/v1/models", None, preflight | {"Origin": "http://evil.example"}).status == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example", ""]
)
def test_names_that_are_not_ours(server: Server, host: str) -> None:
    assert server.get("/health", Host=host).status == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:8080", "LOCALHOST:99", "app.localhost"])
def test_names_that_are_ours(server: Server, host: str) -> None:
    assert server.get("/health", Host=host).status == 200


def raw(server: Server, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while part := connection.recv(65536):
            found += part
        return found


def test_heads_that_are_wrong(server: Server) -> None:
    assert raw(server, b"GET /health HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 4")
    assert raw(server, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 4")
    two = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    assert raw(server, two).startswith(b"HTTP/1.1 4")
    long = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n"
    assert raw(server, long).startswith(b"HTTP/1.1 4")
    assert server.get("/health").status == 200


def test_every_answer_has_headers_of_safety(server: Server) -> None:
    for reply in (server.get("/"), server.get("/nothing"), server.get("/v1/models"), server.chat(stream=True)):
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "server" not in reply.headers


def test_the_log_shows_neither_prompts_nor_keys_nor_what_clients_forge(start: Start) -> None:
    server = start("--api-key", SECRET)
    key = {"Authorization": f"Bearer {SECRET}"}
    message = {"role": "user", "content": FIRST_PROMPT}
    assert server.post("/v1/chat/completions", {"messages": [message], "max_tokens": 1}, **key).status == 200
    assert server.post("/v1/chat/completions", {"messages": [message], "stop": FIRST_PROMPT * 9}, **key).status == 400
    server.get("/x%0a18:00:00%20GET%20/forged%20200", **key)
    server.get("/v1/models?key=" + SECRET, Authorization="Bearer wrong-" + SECRET)
    raw(server, b"GET /\nforged HTTP/1.1\r\n\r\n")
    _, out, err = server.stop()
    for text in (FIRST_PROMPT, "parrot", SECRET, "forged"):
        assert text not in out + err


def test_a_verbose_log_shows_prompts_on_one_line_and_no_keys(start: Start) -> None:
    server = start("--api-key", SECRET, "--verbose")
    message = {"role": "user", "content": f"{FIRST_PROMPT}\n12:00:00 forged \x1b[31m\u202e"}
    body = {"messages": [message], "max_tokens": 1}
    assert server.post("/v1/chat/completions", body, Authorization=f"Bearer {SECRET}").status == 200
    _, _, err = server.stop()
    assert FIRST_PROMPT in err and SECRET not in err and "\x1b" not in err and "\u202e" not in err
    assert not any(line.startswith("12:00:00 forged") for line in err.splitlines())


def outcome(server: Server) -> tuple[int, str]:
    code, out, err = server.ended()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("mpo-run: error: "), lines
    return code, lines[0]


def test_starts_that_fail(start: Start, tmp_path: Path, server: Server) -> None:
    text = tmp_path / "text.mpo"
    text.write_text("no model")
    cases: list[tuple[tuple[object, ...], dict[str, Any], str]] = [
        (("--port", server.port), {}, "cannot be listened on"),
        (("--api-key-file", tmp_path / "none"), {}, "cannot be read"),
        (("--ctx-size", 10**6), {}, "context"),
        ((), {"model": text}, "text.mpo"),
        ((), {"model": tmp_path / "gone.mpo"}, "gone.mpo"),
    ]
    started = [(start(*arguments, wait=False, **options), words) for arguments, options, words in cases]
    for one, words in started:
        code, line = outcome(one)
        assert code == 1 and words in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"host": "0.0.0.0"}, "--insecure"),
        ({"host": "::"}, "--insecure"),
        ({"host": "example.org"}, "--insecure"),
        ({"port": 65536}, "--port"),
        ({"parallel": 0}, "--parallel"),
        ({"parallel": 65}, "--parallel"),
        ({"max_queue": -1}, "--max-queue"),
        ({"timeout": 0}, "--timeout"),
        ({"timeout": float("nan")}, "--timeout"),
        ({"alias": ""}, "--alias"),
        ({"keys": ("two words",)}, "--api-key"),
        ({"keys": ("",)}, "--api-key"),
        ({"origins": ("localhost:3000",)}, "--cors"),
        ({"origins": ("http://localhost:3000/",)}, "--cors"),
        ({"slot_path": Path("/no/such/folder")}, "no folder"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        Settings(Path("model.mpo"), **options)


def test_key_files(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the house\n one \n\ntwo\none\n")
    assert read_keys("zero", file) == ("zero", "one", "two")
    for content in (b"# nothing\n", b"", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match="--api-key-file"):
            read_keys(None, file)


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(ConfigError, match="cannot be listened on"):
        bind(Settings(Path("model.mpo"), host="203.0.113.7", insecure=True))


def test_another_address_with_a_key(start: Start) -> None:
    server = start("--host", "0.0.0.0", "--api-key", SECRET)
    assert server.get("/health", Host="my-box.lan").status == 200
    assert server.get("/v1/models", Host="my-box.lan").status == 401
    open_to_all = start("--host", "0.0.0.0", "--insecure")
    assert open_to_all.get("/v1/models", Host="my-box.lan").status == 403
    assert open_to_all.get("/v1/models", Host="192.168.1.7:8080").status == 200


def test_the_document_of_the_interface(server: Server) -> None:
    document = server.get("/openapi.json").json
    assert document["openapi"].startswith("3.1")
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"):
        assert "requestBody" in document["paths"][path]["post"]
    assert "http" not in json.dumps(document["paths"])


def test_facts(server: Server) -> None:
    assert server.get("/health").json == {"status": "ok"}
    props = server.get("/props").json
    assert props["n_ctx"] == 1024 and props["total_slots"] == 4 and "start_of_role" in props["chat_template"]
    assert props["quality"] == [] and props["layers"][0]["bits"] == 16
    assert "/" not in props["model"]
    server.chat()
    text = server.get("/metrics").body.decode()
    assert 'mpo_requests_total{endpoint="/v1/chat/completions",status="200"}' in text
    for name in ("mpo_generated_tokens_total", "mpo_running", "mpo_waiting", "mpo_first_token_seconds_count"):
        assert f"\n{name} " in text
