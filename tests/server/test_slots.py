"""Prompt caches in files: a prompt that was read once is not read again, also after a restart; damaged files are refused."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Server, Start

PROMPT = "Tell me about the sea, the mountains, the cities and the people. " * 26


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "slots"
    found.mkdir()
    return found


def cached(server: Server, **fields: Any) -> int:
    reply = server.complete(PROMPT, max_tokens=8, **fields).json
    assert reply["timings"]["cache_n"] == reply["usage"]["prompt_tokens_details"]["cached_tokens"]
    return int(reply["timings"]["cache_n"])


def test_a_cache_survives_a_restart(start: Start, folder: Path) -> None:
    first = start("--slot-save-path", folder, "--parallel", 2)
    text = first.complete(PROMPT, max_tokens=8, id_slot=1).json["choices"][0]["text"]
    assert first.get("/slots").json[1]["n_tokens"] > 100
    saved = first.post("/slots/1?action=save", {"filename": "sea.bin"}).json
    assert saved["n_saved"] > 100 and saved["n_written"] == (folder / "sea.bin").stat().st_size
    first.stop()
    again = start("--slot-save-path", folder, "--parallel", 2)
    restored = again.post("/slots/0?action=restore", {"filename": "sea.bin"}).json
    assert restored["n_restored"] == saved["n_saved"] and restored["n_read"] == saved["n_written"]
    reply = again.complete(PROMPT, max_tokens=8, id_slot=0).json
    assert reply["timings"]["cache_n"] > 100 and reply["choices"][0]["text"] == text
    assert again.post("/slots/0?action=erase", {}).json["n_erased"] > 0
    assert again.get("/slots").json[0]["n_tokens"] == 0

    content = (folder / "sea.bin").read_bytes()
    for index, damaged in enumerate(
        (content[:-1], content[:100], b"", b"x" * 200, content[:500] + b"\x00" + content[501:])
    ):
        (folder / f"bad{index}.bin").write_bytes(damaged)
        refused = again.post("/slots/0?action=restore", {"filename": f"bad{index}.bin"})
        assert refused.status == 400 and refused.error["code"] == "wrong_file"
    other = start("--slot-save-path", folder, "--kv-type", "int8")
    refused = other.post("/slots/0?action=restore", {"filename": "sea.bin"})
    assert refused.status == 400 and "kv_type" in refused.error["message"]
    assert str(folder) not in refused.error["message"]


NAMES = ["../x", "/etc/passwd", ".hidden", "a/b", "a\\b", "", "x" * 129, "a\x00b", "ü"]


def test_names_that_are_no_plain_names(start: Start, folder: Path) -> None:
    server = start("--slot-save-path", folder)
    for action, name in product(("save", "restore"), NAMES):
        assert server.post(f"/slots/0?action={action}", {"filename": name}).status == 400
    assert list(folder.iterdir()) == []


def test_slots_that_are_not_there(server: Server) -> None:
    assert server.post("/slots/0?action=save", {"filename": "a"}).status == 501
    assert server.post("/slots/99?action=erase", {}).status == 404
    assert server.post("/slots/x?action=erase", {}).status == 404
    assert server.post("/slots/0?action=dance", {}).status == 400
    assert server.chat(id_slot=60).error["param"] == "id_slot"
