"""Weights in the mapped file or in the process's own memory: the choice, and the move at unchanged addresses."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mpo_formats import ConfigError
from mpo_runtime import loading, native, residence
from mpo_runtime.residence import PAGE, Choice, Residence, Run
from tests.helpers import granite_config, write_folder

linux = pytest.mark.skipif(sys.platform != "linux", reason="pages are moved on Linux only")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model."""
    return write_folder(tmp_path_factory.mktemp("residence") / "model", granite_config(), seed=4)


def mapped(path: Path, size: int) -> tuple[mmap.mmap, NDArray[np.uint8]]:
    """A file of random bytes, mapped as weights are, and its bytes as a view."""
    path.write_bytes(np.random.default_rng(3).integers(0, 256, size, np.uint8).tobytes())
    with path.open("rb") as file:
        held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return held, np.frombuffer(held, np.uint8)


@linux
def test_moved_pages_keep_their_bytes_and_leave_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces; what is written to the file afterwards is seen in pages that were not moved, and only there."""
    monkeypatch.setattr(residence, "PIECE", 2 * PAGE)
    path = tmp_path / "weights"
    held, content = mapped(path, 8 * PAGE)
    before, start = content.copy(), content.ctypes.data
    moving = Residence([Run(start + PAGE, start + 6 * PAGE, held)])
    moving.wait()
    assert moving.moved == moving.size == 5 * PAGE
    np.testing.assert_array_equal(content, before)
    with path.open("r+b") as file:
        file.write(bytes(8 * PAGE))
    np.testing.assert_array_equal(content[PAGE : 6 * PAGE], before[PAGE : 6 * PAGE])
    assert not content[:PAGE].any()
    assert not content[6 * PAGE :].any()


@linux
def test_a_refusal_of_the_system_leaves_the_file_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that cannot be had ends the move and nothing else."""
    monkeypatch.setattr(residence, "PIECE", 1 << 62)
    held, content = mapped(tmp_path / "weights", 2 * PAGE)
    assert not residence.move(content.ctypes.data, 1 << 62)
    np.testing.assert_array_equal(content, np.frombuffer((tmp_path / "weights").read_bytes(), np.uint8))
    assert held.size() == 2 * PAGE


def test_only_views_of_mapped_files_are_moved(tmp_path: Path) -> None:
    """An array of the heap must never be replaced by read-only pages."""
    held, content = mapped(tmp_path / "weights", PAGE)
    assert residence.mapping_of(content[5:].view(np.uint8).reshape(-1)) is held
    assert residence.mapping_of(content.copy()) is None
    assert residence.mapping_of(np.frombuffer(bytes(16), np.uint8)) is None


@pytest.mark.parametrize(("mapped_speed", "own_speed", "expected"), [(10.0, 11.4, "map"), (10.0, 11.6, "copy")])
def test_auto_takes_the_faster_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mapped_speed: float, own_speed: float, expected: str
) -> None:
    """From 1.15 times the speed on, the copy."""
    speeds = iter((mapped_speed, own_speed))
    monkeypatch.setattr(residence, "SMALLEST", 0)
    monkeypatch.setattr(residence, "WINDOW", PAGE)
    monkeypatch.setattr(residence, "read_speed", lambda windows: next(speeds))
    monkeypatch.setattr(residence, "is_cached", lambda window: True)
    weights = loading.open_weights(folder)
    try:
        if sys.platform != "linux" or not native.available():
            expected = "map"
        assert residence.choose(weights, "auto").load == expected
    finally:
        weights.close()


def test_auto_maps_what_is_small_or_has_no_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is said."""
    weights = loading.open_weights(folder)
    try:
        small = residence.choose(weights, "auto")
        monkeypatch.setattr(residence, "SMALLEST", 0)
        monkeypatch.setattr(residence, "available_memory", lambda: 1000)
        crowded = residence.choose(weights, "auto")
    finally:
        weights.close()
    assert small.load == crowded.load == "map"
    assert "not measured" in small.reason
    if sys.platform == "linux" and native.available():
        assert "has no room in memory" in crowded.reason


def test_unknown_wish_is_refused(folder: Path) -> None:
    """The message lists what there is."""
    with pytest.raises(ConfigError, match="load fast: expected one of auto, map, copy"):
        loading.load(folder, load="fast")


@linux
@pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
def test_a_model_generates_the_same_from_both(folder: Path) -> None:
    """Before, during and after the move."""
    found = []
    for load in ("map", "copy"):
        model = loading.load(folder, load=load, backend="native", threads=1)
        ops: Any = model.network.ops
        found.append([piece.token for piece in model.generate([5, 6, 7], max_tokens=12, temperature=0)])
        assert ops.load == Choice(load, "as asked")
        if load == "copy":
            ops.residence.wait()
            assert 0 < ops.residence.moved == ops.residence.size
            found.append([piece.token for piece in model.generate([5, 6, 7], max_tokens=12, temperature=0)])
        model.close()
    assert found[0] == found[1] == found[2]
