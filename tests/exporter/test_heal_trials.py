"""What a healing tries before its first step: single blocks, matched blocks and full rates are kept only where they help."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpo_exporter.heal import session
from mpo_exporter.heal.run import Healed
from mpo_exporter.heal.settings import HealJob, Settings
from mpo_exporter.heal.train import Trainer
from mpo_exporter.heal.trials import Trials
from mpo_exporter.plan.options import Options
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import BOS, export_folder, granite_config, heal_folder, some_ids, write_folder

# Eight steps of 4 windows of 31 new tokens.
SETTINGS = Settings(tokens=992, window=32, match_blocks=2, block_share=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher, a file of it in 4 bits, and a text."""
    root = tmp_path_factory.mktemp("trials")
    teacher = write_folder(root / "model", granite_config(), dtype=torch.bfloat16)
    export_folder(teacher, root / "rough.mpo", Options("int4"))
    np.save(root / "ids.npy", np.array(some_ids(930, 7, BOS)))
    return root


@pytest.fixture(autouse=True)
def long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of eight steps count as long ones."""
    monkeypatch.setattr(session, "FEWEST_STEPS", 5)


def healed(folder: Path, work: Path, **changes: Any) -> tuple[Healed, list[str]]:
    """What a healing gave, and what it said before its first step."""
    said: list[str] = []
    work.mkdir(exist_ok=True)

    def note(stage: str, done: float, words: str) -> None:
        if stage == "healing" and not words.startswith("step"):
            said.append(words)

    job = HealJob(
        folder / "rough.mpo",
        work / "healed.mpo",
        replace(SETTINGS, **changes),
        text=folder / "ids.npy",
        force=True,
        work=work / "work",
    )
    return heal_folder(folder / "model", job, progress=note), said


def answering(monkeypatch: pytest.MonkeyPatch, name: str, *values: float) -> None:
    """Makes a method of Trainer do its work and then answer these values in turn, the last one again and again."""
    answers, own = chain(values, repeat(values[-1])), getattr(Trainer, name)

    def answer(self: Trainer, *arguments: Any) -> float:
        own(self, *arguments)
        return next(answers)

    monkeypatch.setattr(Trainer, name, answer)


@pytest.mark.parametrize(("results", "kept"), [((0.5, 0.6), True), ((0.505, 0.5), True), ((0.6, 0.5), False)])
def test_blocks_are_matched_where_a_trial_says_so(
    folder: Path, tmp_path: Path, results: tuple[float, float], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then every step is that of a healing that was told so: nothing of the trials is left."""
    weight = Settings().matching(Checkpoint(folder / "model").architecture.parameters(), 930)
    answering(monkeypatch, "kl", 1.0)
    answering(monkeypatch, "trial", 0.9, *results)
    told, _ = healed(folder, tmp_path, match_weight=weight if kept else 0.0)
    found, said = healed(folder, tmp_path)
    assert said == [f"KL after a few steps {results[0]:.4f} with blocks matched, {results[1]:.4f} without"]
    np.testing.assert_allclose(found.curve, told.curve, rtol=1e-5)
    assert len(found.curve) == 8


def test_rates_fall_until_a_trial_does_not_raise_the_divergence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, "kl", 0.4)
    answering(monkeypatch, "trial", 0.5, 0.45, 0.4, 0.3)
    found, said = healed(folder, tmp_path / "a", match_weight=0.0)
    assert said == [
        "integers learn at 0.3 of their rate: more raised the KL from 0.4000 to 0.5000",
        "integers learn at 0.1 of their rate: more raised the KL from 0.4000 to 0.4500",
    ]
    rates = {"code_rate": 0.1 * SETTINGS.code_rate, "scale_rate": 0.1 * SETTINGS.scale_rate}
    told, _ = healed(folder, tmp_path / "b", match_weight=0.0, **rates)
    np.testing.assert_allclose(found.curve, told.curve, rtol=1e-5)


@pytest.mark.parametrize(("results", "kept"), [((0.5, 0.4), True), ((0.5, 0.6), False)])
def test_blocks_trained_one_by_one_are_kept_where_the_whole_is_better(
    folder: Path, tmp_path: Path, results: tuple[float, float], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trials, "choose", lambda self, steps, given: None)
    without, _ = healed(folder, tmp_path, match_weight=0.0)
    answering(monkeypatch, "kl", *results)
    found, said = healed(folder, tmp_path, match_weight=0.0, tokens=1104, block_share=0.1)
    assert said == [f"KL {results[0]:.4f}, {results[1]:.4f} with single blocks trained"]
    assert [len(curve) for curve in found.block_curves] == [1] * len(found.block_curves) and found.block_curves
    assert len(found.curve) == len(without.curve)
    assert np.allclose(found.curve, without.curve, rtol=1e-5) != kept


def test_a_stopped_healing_goes_on_as_the_trial_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, "kl", 0.4)
    answering(monkeypatch, "trial", *[0.6, 0.5, 0.3] * 2)
    whole, _ = healed(folder, tmp_path / "a", checkpoint_steps=3)
    own, left = Trainer.step, iter(range(27))  # 24 steps of trials and 3 more

    def stopping(self: Trainer, *arguments: Any) -> tuple[float, float]:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return own(self, *arguments)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(Trainer, "step", stopping)
        healed(folder, tmp_path / "b", checkpoint_steps=3)
    again, said = healed(folder, tmp_path / "b", checkpoint_steps=3)
    assert said == []
    np.testing.assert_allclose(again.curve, whole.curve, rtol=1e-5)


def test_short_trainings_do_without_both(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "FEWEST_STEPS", 100)
    found, said = healed(folder, tmp_path, block_share=None)
    assert said == [] and found.block_curves == []
    assert any((tmp_path / "work").glob("*scores*")) and not any((tmp_path / "work").glob("*states*"))
    asked, _ = healed(folder, tmp_path / "b", block_share=0.1, match_weight=1.0)
    assert asked.block_curves and any((tmp_path / "b" / "work").glob("*states*"))


def test_a_time_that_is_short_does_without_trials(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute was once nearly gone before the first step; a long time is still used for trials."""
    monkeypatch.setattr(session, "FEWEST_STEPS", 10**9)
    found, said = healed(folder, tmp_path / "a", tokens=None, minutes=0.02)
    assert not any("matched" in words for words in said) and found.curve
    monkeypatch.setattr(session, "FEWEST_STEPS", 0)
    found, said = healed(folder, tmp_path / "b", tokens=None, minutes=0.02)
    assert any("matched" in words for words in said) and found.curve
