"""Batches side by side: the same results in the same order, and what threads must not share."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mpo_exporter.calibrate import lanes, precision
from mpo_exporter.calibrate.fisher import output_fisher
from mpo_exporter.calibrate.lanes import in_lanes, lane_count
from mpo_exporter.calibrate.moments import Calibration
from mpo_exporter.calibrate.sums import Sums, joined
from mpo_formats import ConfigError
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import VOCABULARY, write_folder

WINDOWS = np.random.default_rng(0).integers(0, VOCABULARY, (7, 24))


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(precision, "uses_tiles", lambda: False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_items_are_shared_and_stay_in_order() -> None:
    def work(lane: int, item: int) -> tuple[int, int]:
        assert threading.current_thread() is not threading.main_thread()
        assert torch.get_num_threads() == 1
        assert not torch.is_grad_enabled()
        return lane, item

    with torch.no_grad():
        found = in_lanes(work, range(7))
    assert found == [(item % 2, item) for item in range(7)]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_products_are_fast_in_all_lanes_or_in_none() -> None:
    with precision.fast_products():
        assert in_lanes(lambda lane, item: precision.are_fast(), range(4)) == [precision.has_units()] * 4
    assert in_lanes(lambda lane, item: precision.are_fast(), range(4)) == [False] * 4


@pytest.mark.usefixtures("two_threads")
def test_an_error_ends_all_lanes_and_is_raised() -> None:
    seen = []

    def work(lane: int, item: int) -> None:
        seen.append(item)
        if item == 1:
            raise ConfigError("one is bad")
        time.sleep(0.001)

    with pytest.raises(ConfigError, match="one is bad"):
        in_lanes(work, range(1000))
    assert len(seen) < 500


def test_many_threads_share_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: lanes.MOST + 1)
    assert lane_count() == 1
    here = threading.current_thread()
    assert in_lanes(lambda lane, item: threading.current_thread() is here, range(3)) == [True] * 3


@pytest.mark.parametrize("symmetric", [True, False])
def test_sums_of_lanes_are_those_of_all_tokens(symmetric: bool) -> None:
    source = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 20, 30, generator=source) for _ in range(2))
    parts = [Sums() for _ in range(4)]  # one lane saw nothing
    for index in range(3):
        parts[index].add(x[index], None if symmetric else y[index])
    wanted = torch.einsum("bti,btj->ij", x.double(), (x if symmetric else y).double()) / 60
    np.testing.assert_allclose(joined(parts).mean(symmetric=symmetric), wanted.numpy(), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("two_threads", "exact_products")
def test_moments_and_gradients_are_those_of_one_lane(tmp_path: Path) -> None:
    source = Checkpoint(write_folder(tmp_path / "model"))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        moments = {names: one.second for names, one in Calibration(source, WINDOWS, tmp_path).dense()}
        found.append((moments, output_fisher(source, WINDOWS)))
    (one, fisher), (two, other) = found
    assert lane_count() == 2
    for names in one:
        np.testing.assert_allclose(two[names], one[names], rtol=0, atol=1e-5 * np.abs(one[names]).max())
    for name in fisher:
        np.testing.assert_allclose(other[name], fisher[name], rtol=0, atol=1e-5 * np.abs(fisher[name]).max())
