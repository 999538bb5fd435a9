"""Cached measurements: read back as they were, and refused if they are stale, damaged or of something else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpo_exporter.measure.cache import Cached, CacheFile, cache_folder

FILE = CacheFile("survey", "a model", ("1" * 64, "2" * 64), {"version": 1, "windows": [3, 4]})
CACHED = Cached({"rows": [[1, 0.1, "x"]]}, {"table": np.arange(6, dtype=np.float32).reshape(2, 3)})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def read(file: CacheFile = FILE) -> tuple[Cached | None, list[str]]:
    told: list[str] = []
    return file.read(told.append), told


def test_what_is_cached_is_read_as_it_was(folder: Path) -> None:
    assert read() == (None, [])
    FILE.write(CACHED)
    cached, told = read()
    assert cached is not None and told == []
    assert cached.content == CACHED.content
    np.testing.assert_array_equal(cached.arrays["table"], CACHED.arrays["table"])
    assert [path.name for path in folder.iterdir()] == [FILE.path.name]
    assert FILE.path.name.startswith("survey-a_model-1111111111111111-2222222222222222")


def test_a_stale_one_is_told_with_what_changed() -> None:
    FILE.write(CACHED)
    cached, told = read(replace(FILE, key={"version": 1, "windows": [5, 4]}))
    assert cached is None
    assert len(told) == 1 and "is stale (windows [3, 4], now [5, 4]); measuring again" in told[0]


def test_other_weights_or_another_text_are_told() -> None:
    FILE.write(CACHED)
    cached, told = read(replace(FILE, parts=("3" * 64, "2" * 64)))
    assert cached is None
    assert told == ["survey: the measurement of a model is of other weights or another text; measuring again"]
    assert read(replace(FILE, name="another")) == (None, [])


@pytest.mark.parametrize("place", range(0, 400, 17))
def test_a_damaged_one_is_never_believed(place: int) -> None:
    """A flipped byte anywhere: refused and told, or, in bytes that mean nothing, read as it was."""
    FILE.write(CACHED)
    raw = bytearray(FILE.path.read_bytes())
    raw[place % len(raw)] ^= 0xFF
    FILE.path.write_bytes(raw)
    cached, told = read()
    if cached is None:
        assert len(told) == 1 and "is damaged" in told[0]
    else:
        assert cached.content == CACHED.content
        np.testing.assert_array_equal(cached.arrays["table"], CACHED.arrays["table"])


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x00" * 64])
def test_what_is_no_cache_file_is_measured_again(content: bytes, folder: Path) -> None:
    folder.mkdir()
    FILE.path.write_bytes(content)
    cached, told = read()
    assert cached is None and "is damaged; measuring again" in told[0]
    FILE.write(CACHED)
    assert read()[0] is not None


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_cache(folder: Path) -> None:
    folder.write_text("a file in the way")
    told: list[str] = []
    FILE.write(CACHED, told.append)
    assert len(told) == 1 and "cannot be cached" in told[0] and "MPO_CACHE" in told[0]


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MPO_CACHE")
    monkeypatch.setenv("MPO_HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / "cache"
    monkeypatch.delenv("MPO_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "mpo-runtime"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "mpo-runtime"
