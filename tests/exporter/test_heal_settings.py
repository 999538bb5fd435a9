"""The settings of healing: what they refuse, the order of the windows, the rates, dropped bonds."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mpo_exporter.heal.settings import FEWEST_STEPS, MOST_MATCHING, Settings
from mpo_exporter.heal.train import (
    CORE_FACTORS,
    FULL_RATE_INTEGERS,
    FULL_RATE_STEPS,
    LAST_RATE,
    Trainer,
    chosen_chi,
    chosen_windows,
    learning_rate,
    walking_rate,
)
from mpo_exporter.heal.workers import Workers
from mpo_formats import ConfigError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 10, "minutes": 1}, "tokens and minutes were both given"),
        ({"tokens": 0}, "tokens: expected more than 0, found 0"),
        ({"block_share": 2.0}, "block_share: expected 0 to 1, found 2.0"),
        ({"core_rate": float("nan")}, "core_rate: expected at least 0, found nan"),
    ],
)
def test_settings_that_cannot_be_honoured(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(**changes)


def test_codes_train_where_their_memory_is_small() -> None:
    assert Settings().moves_codes(20_000_000) and not Settings().moves_codes(8_000_000_000)
    assert Settings(train_codes=True).moves_codes(8_000_000_000) and not Settings(train_codes=False).moves_codes(1)


def test_every_window_is_seen_once_an_epoch() -> None:
    order = np.concatenate([chosen_windows(10, 4, step, 0) for step in range(5)])
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10].tolist() != order[10:].tolist()


def test_rates_rise_then_fall() -> None:
    rates = [learning_rate(done) for done in np.linspace(0, 1, 101)]
    assert max(rates) == pytest.approx(1) and rates[0] == pytest.approx(0.1) and rates[-1] == pytest.approx(LAST_RATE)
    assert rates.index(max(rates)) == 3 and all(a >= b for a, b in pairwise(rates[3:]))


def test_long_trainings_cool_faster() -> None:
    halfway = learning_rate(0.6)
    assert learning_rate(0.6, 10) == learning_rate(0.6, 250) == halfway
    assert halfway**2 < learning_rate(0.6, 350) < halfway
    assert learning_rate(0.6, 500) == pytest.approx(halfway**2)
    assert learning_rate(0.6, 4000) == learning_rate(0.6, 1_000_000) == pytest.approx(halfway**3)
    assert learning_rate(0.01, 4000) == learning_rate(0.01)


def test_dropped_bonds_are_prefixes_of_all_sizes() -> None:
    settings = Settings(chi_dropout=0.5)
    found = [chosen_chi(settings, 16, step) for step in range(400)]
    assert 150 < found.count(None) < 250
    assert {chi for chi in found if chi is not None} == set(range(1, 17))


def test_integers_move_less_in_few_steps_and_no_farther_in_many() -> None:
    assert walking_rate(FEWEST_STEPS) == walking_rate(FULL_RATE_STEPS) == 1.0
    assert walking_rate(FEWEST_STEPS / 4) == walking_rate(4 * FULL_RATE_STEPS) == 0.25
    assert walking_rate(FEWEST_STEPS, FULL_RATE_INTEGERS) == 1.0
    assert walking_rate(FEWEST_STEPS, 4 * FULL_RATE_INTEGERS) == 0.5


def test_blocks_are_matched_where_text_is_scarce() -> None:
    assert Settings().matching(18_000_000, 250_000) == MOST_MATCHING
    assert Settings().matching(260_000, 200_000) == 1.3
    assert Settings(match_weight=0.0).matching(18_000_000, 250_000) == 0.0


class Bowl(torch.nn.Module):
    """The loss Σ x² of 64 numbers, all 1: a step of h leaves 64 (1 − h)², which is less than before for h below 2."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.ones(64))

    def forward(self, batch: torch.Tensor, chi: int | None) -> torch.Tensor:
        loss = (self.x * batch).square().sum()
        return torch.stack((loss, loss.detach()))


@pytest.mark.parametrize(("rate", "factor"), [(1.9, 1.0), (2.1, 0.3), (21.0, 0.03), (1e9, CORE_FACTORS[-1])])
def test_the_rate_of_cores_falls_until_a_step_does_no_harm(rate: float, factor: float) -> None:
    bowl = Bowl()
    learning = [("core", bowl.x, 1.0)]
    trainer = Trainer(bowl, SimpleNamespace(learning=lambda: learning), Settings(core_rate=rate), Workers())  # type: ignore[arg-type]
    assert trainer.tame([torch.ones(64)]) == factor
    assert bowl.x.tolist() == [1.0] * 64 and bowl.x.grad is None
    assert trainer.rates() == pytest.approx([rate * factor])
    trainer.restart()
    assert trainer.rates() == pytest.approx([rate * factor])


def test_without_cores_no_rate_falls() -> None:
    bowl = Bowl()
    trainer = Trainer(
        bowl,
        SimpleNamespace(learning=lambda: [("scale", bowl.x, 1.0)]),  # type: ignore[arg-type]
        Settings(scale_rate=5.0),
        Workers(),
    )
    assert trainer.tame([torch.ones(64)]) == 1.0 and trainer.rates() == [5.0]
