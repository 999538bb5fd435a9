"""Healing on a GPU, where there is one: the same curve as on the CPU, and the recorded steps are the plain ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mpo_exporter.heal import train
from mpo_exporter.heal.run import Healed
from mpo_exporter.heal.settings import HealJob, Settings
from mpo_exporter.heal.workers import Workers
from mpo_exporter.plan.options import Options
from mpo_formats import LinearSpec, Mpo, Quantized
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import BOS, export_folder, granite_config, heal_folder, some_ids, write_folder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
# 60 steps, of which 3 a block.
SETTINGS = Settings(tokens=8000, window=32, block_share=0.05, checkpoint_steps=25)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("teacher") / "model", granite_config(), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, np.array(some_ids(930, 7, BOS)))
    return path


@pytest.fixture(scope="module")
def file(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2-bit matrices, fp16 cores beside the MLP's."""
    path = tmp_path_factory.mktemp("file") / "rough.mpo"

    def rough(linear: LinearSpec) -> LinearSpec:
        base = Quantized(2, 16, False)
        cores = Mpo((linear.out_features, 1), (1, linear.in_features), (4,), "f16", 0)
        return replace(linear, terms=(base, cores) if ".mlp." in linear.name else (base,))

    export_folder(teacher, path, Options("int4"), layers=tuple(map(rough, Checkpoint(teacher).spec.linears)))
    return path


def healed(file: Path, teacher: Path, text: Path, target: Path, device: str, settings: Settings = SETTINGS) -> Healed:
    return heal_folder(teacher, HealJob(file, target, settings, text=text), workers=Workers(device=device))


def test_a_gpu_heals_as_a_cpu_does(
    file: Path, teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "STEPS_BEFORE_GRAPH", 10**9)
    # What blocks are weighed by follows labels that are drawn on the device: not the same ones.
    settings = replace(SETTINGS, block_share=0.0, match_blocks=0)
    here = healed(file, teacher, text, tmp_path / "cpu.mpo", "cpu", settings)
    there = healed(file, teacher, text, tmp_path / "gpu.mpo", "cuda", settings)
    assert len(here.curve) == len(there.curve) > 50
    np.testing.assert_allclose(there.curve, here.curve, rtol=0.05)


@pytest.mark.parametrize("micro_batch", [4, 2])
def test_recorded_steps_are_the_plain_ones(
    file: Path, teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int
) -> None:
    made = []

    class Noted(train.GraphedStep):
        def __init__(self, *arguments: object) -> None:
            made.append(self)
            super().__init__(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "GraphedStep", Noted)
    curves = []
    for steps in (10**9, 2):
        monkeypatch.setattr(train, "STEPS_BEFORE_GRAPH", steps)
        target = tmp_path / f"{steps}.mpo"
        curves.append(healed(file, teacher, text, target, "cuda", replace(SETTINGS, micro_batch=micro_batch)).curve)
    # The whole model's steps and those of both blocks; with parts of a batch none are recorded.
    assert len(made) == (3 if micro_batch == 4 else 0)
    np.testing.assert_allclose(curves[1], curves[0], rtol=0.02)
