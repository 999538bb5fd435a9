"""Files of --prompt-cache: what is restored changes no text; damaged, other and old files are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpo_formats import ConfigError
from mpo_runtime import load
from mpo_runtime.cli.generate import Request as Asked
from mpo_runtime.cli.generate import run_generate
from mpo_runtime.cli.prompt_cache import cache_settings
from mpo_runtime.engine import Request, Scheduler
from mpo_runtime.engine.prompt_cache import DIGEST, MAGIC
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.sampler import SamplingOptions
from tests.helpers import granite_config, network, some_ids, write_folder

GREEDY = SamplingOptions(temperature=0)
SETTINGS = {"model": "abc", "kv_type": "f32"}
PROMPT = some_ids(100, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = granite_config(max_position_embeddings=256, tie_word_embeddings=False)
    return write_folder(tmp_path_factory.mktemp("kept") / "model", config, seed=3)


@pytest.fixture(scope="module", params=["native", "reference"])
def model(request: pytest.FixtureRequest, folder: Path) -> Decoder:
    return network(folder, backend=request.param)


def run(engine: Scheduler, ids: list[int]) -> tuple[list[int], int]:
    text = engine.submit(Request(tuple(ids), GREEDY, 10, ()))
    return [step.token for step in text], text.cached_tokens


@pytest.fixture
def saved(model: Decoder, tmp_path: Path) -> Path:
    engine = Scheduler(model, chunk=40)
    run(engine, PROMPT)
    assert engine.save_prefix(tmp_path / "a.kv", SETTINGS) == 109  # the last token was drawn, not run
    return tmp_path / "a.kv"


def test_a_restored_beginning_changes_no_text(model: Decoder, saved: Path) -> None:
    fresh, engine = Scheduler(model, chunk=40), Scheduler(model, chunk=40)
    assert len(engine.restore_prefix(saved, SETTINGS)) == 109
    longer = [*PROMPT, *some_ids(30, 2)]
    (found, cached), (expected, none) = run(engine, longer), run(fresh, longer)
    assert (found, none) == (expected, 0) and cached == (100 if model.ops.row_exact else 80)
    assert engine.pool.used_bytes == engine.tree.kept_bytes


def test_nothing_is_saved_where_nothing_was_run(model: Decoder, tmp_path: Path) -> None:
    assert Scheduler(model).save_prefix(tmp_path / "a.kv", SETTINGS) == 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="cannot be read"):
        Scheduler(model).restore_prefix(tmp_path / "a.kv", SETTINGS)


def with_header(content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    start = len(MAGIC) + 8
    end = start + int.from_bytes(content[len(MAGIC) : start], "little")
    header = json.loads(content[start:end])
    encoded = json.dumps(change(header)).encode()
    return MAGIC + len(encoded).to_bytes(8, "little") + encoded + content[end:]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "is no file of --prompt-cache": lambda content: b"GGUF" + content,
    "has version 2, expected 1": lambda content: with_header(content, lambda header: header | {"version": 2}),
    "has version None": lambda content: with_header(content, lambda header: [1]),
    "is not JSON": lambda content: content[: len(MAGIC) + 20],
    "it is not whole": lambda content: content[:-1],
    "expected [0-9]+: it is not whole": lambda content: content + b"x",
    "wrong checksum": lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
    "wrong checksum; the file was damaged": lambda content: content[:-DIGEST] + bytes(DIGEST),
    "has another form": lambda content: with_header(content, lambda header: header | {"more": 1}),
    "another form than version 1": lambda content: with_header(content, lambda header: header | {"ids": ["a"]}),
    "another form": lambda content: with_header(content, lambda header: header | {"exact": 1000}),
    "its pages have 1 bytes": lambda content: with_header(content, lambda header: header | {"page_bytes": 1}),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_files(model: Decoder, saved: Path, message: str) -> None:
    engine = Scheduler(model)
    saved.write_bytes(DAMAGES[message](saved.read_bytes()))
    with pytest.raises(ConfigError, match=message):
        engine.restore_prefix(saved, SETTINGS)
    assert (engine.pool.used, engine.tree.kept_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SETTINGS | {"model": "xyz"}, "made with model abc, this is model xyz"),
        (SETTINGS | {"chi": "8"}, "made with chi None, this is chi 8"),
        ({"model": "abc"}, "made with kv_type f32, this is kv_type None"),
    ],
)
def test_files_of_other_settings(model: Decoder, saved: Path, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Scheduler(model).restore_prefix(saved, settings)


def test_the_program_keeps_the_prompt(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text and tokens are the same with the file and without it; a file of another model is named, and then replaced."""
    path, prompt = tmp_path / "a.kv", "Once upon a time " * 5
    asked = Asked(GREEDY, 8, (), 0, as_json=False, verbose=False)
    shown = []
    for cache in (None, path, path):
        run_generate(folder, {}, prompt, None, asked, cache)
        shown.append(capsys.readouterr())
    assert len({each.out for each in shown}) == 1 and path.exists()
    assert "prompt is run in full" not in shown[-1].err
    other = write_folder(tmp_path / "other", granite_config(max_position_embeddings=256), seed=4)
    run_generate(other, {}, prompt, None, asked, path)
    assert "this is model" in capsys.readouterr().err
    with load(other) as opened:
        assert len(opened.engine.restore_prefix(path, cache_settings(opened, {}))) > 80
