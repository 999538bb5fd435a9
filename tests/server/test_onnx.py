"""A folder of export-onnx behind the server, in a process in which importing torch fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

from mpo_runtime import load
from mpo_runtime.onnx.export import OnnxRequest, export_onnx
from tests.server.conftest import NANO, PATHS, Server, eventually
from tests.server.test_load import begin, figure

PROMPT = "I want to book a table."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "nano-onnx"
    export_onnx(OnnxRequest(NANO, path))
    return path


@pytest.fixture(scope="module")
def onnx_server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    blocked = tmp_path_factory.mktemp("blocked")
    (blocked / "torch.py").write_text("raise ImportError('torch is blocked')")
    paths = os.pathsep.join([str(blocked), PATHS])
    server = Server("--engine", "onnx", "--alias", "nano", "--max-queue", 8, model=folder, paths=paths).wait()
    yield server
    assert server.stop()[0] == 0


def test_answers_are_those_of_the_folder(onnx_server: Server, folder: Path) -> None:
    with load(folder) as model:
        pieces = model.chat([{"role": "user", "content": PROMPT}], temperature=0, max_tokens=8)
        wanted = "".join(piece.text for piece in pieces)
        scores = model.score(PROMPT).logprobs
    assert onnx_server.chat(PROMPT).json["choices"][0]["message"]["content"] == wanted
    chunks = onnx_server.chat(PROMPT, stream=True).events()
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == wanted
    with ThreadPoolExecutor(6) as pool:  # texts take turns
        answers = list(pool.map(lambda _: onnx_server.chat(PROMPT).json["choices"][0]["message"]["content"], range(6)))
    assert answers == [wanted] * 6
    echoed = onnx_server.complete(PROMPT, echo=True, logprobs=1, max_tokens=0).json["choices"][0]["logprobs"]
    assert echoed["token_logprobs"][1:] == pytest.approx(scores, abs=1e-4)
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "integer", "minimum": 0, "maximum": 9}}}
    assert onnx_server.chat(PROMPT, response_format=form).json["choices"][0]["message"]["content"].isdecimal()


def test_what_the_server_tells_of_it(onnx_server: Server) -> None:
    props = onnx_server.get("/props").json
    assert props["kernels"]["native"].startswith("ONNX Runtime ") and props["layers"] == [] and props["bytes"] > 10**6
    assert onnx_server.get("/health").status == 200 and onnx_server.get("/v1/models").json["data"][0]["id"] == "nano"


def test_a_client_that_leaves_frees_the_place(onnx_server: Server) -> None:
    connections = [begin(onnx_server, stream=stream) for stream in (True, False, True)]
    assert eventually(lambda: figure(onnx_server, "mpo_running") == 1 and figure(onnx_server, "mpo_waiting") == 2)
    for connection in connections:
        connection.close()
    assert eventually(lambda: figure(onnx_server, "mpo_running") + figure(onnx_server, "mpo_waiting") == 0)
    assert onnx_server.chat(PROMPT, max_tokens=2).status == 200
