"""What the survey saw spares the fit the dense model's run, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mpo_exporter.calibrate.fisher import Backwards
from mpo_exporter.calibrate.moments import Calibration, Moment
from mpo_exporter.calibrate.seen import Block, Seen
from mpo_exporter.calibrate.upstream import Upstream
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import VOCABULARY, write_folder

WINDOWS = np.random.default_rng(0).integers(0, VOCABULARY, (5, 24))
Single = NDArray[np.float32]


def compressed(source: Checkpoint, folder: Path, room: int) -> tuple[dict[str, Moment], Seen]:
    """The moments of a run that rounds every matrix, after a survey that may keep so many bytes; and what is left of it."""
    walk = Calibration(source, WINDOWS, folder, batch=2)
    walk.seen = Seen(room)
    list(Backwards(source, WINDOWS, batch=walk.batch, picks=np.arange(2), seen=walk.seen).inputs())
    kept = Seen(walk.seen.room, dict(walk.seen.blocks))
    found: dict[str, Moment] = {}

    def build(name: str, matrix: NDArray[np.float64], moment: Moment) -> Single:
        found[name] = moment
        return np.round(matrix, 1).astype(np.float32)

    walk.compress(build)
    assert not walk.seen.blocks  # the fit is past all of them
    return found, kept


def test_a_fit_is_the_same_with_any_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Checkpoint(write_folder(tmp_path / "model"))
    runs: list[int] = []
    run = Upstream.run

    def counted(self: Upstream, rows: slice, block: int, *others: object) -> object:
        runs.append(block)
        return run(self, rows, block, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(Upstream, "run", counted)
    without, kept = compressed(source, tmp_path, 0)
    whole, blocks = len(runs), source.architecture.num_hidden_layers
    assert not kept.blocks and blocks > 1
    plenty = 1 << 40
    taken = (plenty - compressed(source, tmp_path, plenty)[1].room) // blocks
    for room, held in ((blocks * taken, blocks), (taken, 1)):
        runs.clear()
        found, kept = compressed(source, tmp_path, room)
        assert (len(kept.blocks), kept.room) == (held, 0)
        assert len(runs) < whole
        assert found.keys() == without.keys()
        for name, moment in found.items():
            other = without[name]
            assert np.array_equal(moment.second, other.second), name
            for mine, theirs in ((moment.cross, other.cross), (moment.drift, other.drift)):
                assert (mine is None) == (theirs is None)
                assert mine is None or theirs is None or np.array_equal(mine, theirs), name


def test_batches_of_another_size_are_run_again() -> None:
    seen, block = Seen(0), Block(2)
    seen.blocks[0] = block
    assert seen.block(0, [slice(0, 2)]) is None
    block.batches = {(0, 2)}
    assert seen.block(0, [slice(0, 2)]) is block
    assert seen.block(0, [slice(0, 1), slice(1, 2)]) is None
    assert seen.block(1, [slice(0, 2)]) is None
