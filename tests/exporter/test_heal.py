"""Healing from end to end on a tiny model: it helps, what is saved is what was trained, and it survives interruptions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpo_exporter.cli.main import main
from mpo_exporter.compactifai import CompactifAICompressor, load_granite_model
from mpo_exporter.heal import run as run_module
from mpo_exporter.heal import session as session_module
from mpo_exporter.heal.checkpoint import NAME, load_checkpoint
from mpo_exporter.heal.run import Healed, out_of_memory
from mpo_exporter.heal.settings import HealJob, Settings
from mpo_exporter.heal.student import fits
from mpo_exporter.heal.train import Trainer as RealTrainer
from mpo_exporter.plan.options import Options
from mpo_formats import CheckpointError, ConfigError, LinearSpec, Mpo, MpoFile, OutputError, Quantized
from mpo_formats.layout import file_tensors
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.measure import compare
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import BOS, export_folder, granite_config, heal_folder, some_ids, write_folder

CONFIG = granite_config()
# 30 windows of 31 new tokens; a step takes 4 of them.
SETTINGS = Settings(
    tokens=1200,
    window=32,
    batch=4,
    micro_batch=4,
    checkpoint_steps=3,
    core_rate=1e-2,
    scale_rate=1e-2,
    block_share=0.1,
    cross_entropy=0,
    train_codes=False,
)
STEPS = 9


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("teacher") / "model", CONFIG, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, np.array(some_ids(930, 7, BOS)))
    return path


@pytest.fixture(scope="module")
def file(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2-bit matrices, corrected by int8 cores in the MLP."""
    path = tmp_path_factory.mktemp("file") / "rough.mpo"
    source = Checkpoint(teacher)

    def rough(linear: LinearSpec) -> LinearSpec:
        base = Quantized(2, 16, False)
        rows, columns = linear.out_features, linear.in_features
        if ".mlp." not in linear.name:
            return replace(linear, terms=(base,))
        return replace(linear, terms=(base, Mpo((rows, 1), (1, columns), (4,), "int8", 16)))

    held_out = TokenText("t", np.array(some_ids(100, 3, BOS)), 0, "0" * 64)
    layers = tuple(rough(linear) for linear in source.spec.linears)
    export_folder(teacher, path, Options("int4"), layers=layers, text=held_out, prefixes=(2,))
    source.close()
    return path


def healed(file: Path, teacher: Path, text: Path, target: Path, **options: Any) -> Healed:
    return heal_folder(teacher, HealJob(file, target, options.pop("settings", SETTINGS), text=text, **options))


def test_healing_helps_and_the_file_says_so(file: Path, teacher: Path, text: Path, tmp_path: Path) -> None:
    target = tmp_path / "healed.mpo"
    held_out = TokenText("other", np.array(some_ids(300, 11, BOS)), 0, "1" * 64)
    settings = replace(SETTINGS, tokens=4000, recompute=False)
    result = healed(file, teacher, text, target, settings=settings, held_out=held_out)
    dense, *ours = (
        decoder_for(weights.spec.architecture, ReferenceOps(weights))
        for weights in (Checkpoint(teacher), MpoFile(file), MpoFile(target))
    )
    before, after = (compare(model, dense, held_out.ids).kl_mean for model in ours)
    assert after < 0.85 * before
    assert result.comparison is not None and result.comparison.kl_mean == pytest.approx(after, rel=1e-6)
    assert len(result.curve) == 29 and [len(curve) for curve in result.block_curves] == [3, 3]
    with MpoFile(file) as old, MpoFile(target, verify=True) as new:
        assert new.spec.linears == old.spec.linears and new.spec.vectors == old.spec.vectors
        facts = new.spec.provenance.options
        assert facts["healed_tokens"] == str(result.tokens) and facts["plan"] == "int4"
        assert facts["healed_teacher_sha256"] == old.spec.provenance.source_sha256
        assert [entry.chi for entry in new.certificates().entries] == [None, 2]
        name = "model.layers.0.self_attn.q_proj.0"
        np.testing.assert_array_equal(new.array(f"{name}.q2"), old.array(f"{name}.q2"))  # codes are frozen
        assert (new.array(f"{name}.scale") != old.array(f"{name}.scale")).any()
        np.testing.assert_array_equal(new.file("tokenizer.json"), old.file("tokenizer.json"))
    assert list(tmp_path.iterdir()) == [target]


def test_blocks_learn(file: Path, teacher: Path, text: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, tokens=16000, block_share=0.9, core_rate=1e-2)
    result = healed(file, teacher, text, tmp_path / "healed.mpo", settings=settings)
    for curve in result.block_curves:
        assert np.mean(curve[-8:]) < 0.95 * np.mean(curve[:8])


def test_epochs_count_the_whole_text(file: Path, teacher: Path, text: Path, tmp_path: Path) -> None:
    """Half an epoch once counted only the windows that it uses, and trained on a quarter: on 248 of 465 tokens."""
    settings = replace(SETTINGS, tokens=None, epochs=0.5)
    result = healed(file, teacher, text, tmp_path / "healed.mpo", settings=settings)
    assert result.tokens == 3 * 4 * 31  # three whole steps, the most that 465 tokens are enough for


def test_codes_move_where_asked(file: Path, teacher: Path, text: Path, tmp_path: Path) -> None:
    target = tmp_path / "healed.mpo"
    settings = replace(SETTINGS, train_codes=True, code_rate=3.0)
    healed(file, teacher, text, target, settings=settings)
    name = "model.layers.0.self_attn.q_proj.0.q2"
    with MpoFile(file) as old, MpoFile(target, verify=True) as new:
        assert (new.array(name) != old.array(name)).any()


def test_cores_first_leaves_integers_and_scales(file: Path, teacher: Path, text: Path, tmp_path: Path) -> None:
    """With the whole training as the first share, only cores and norms move."""
    target = tmp_path / "healed.mpo"
    settings = replace(SETTINGS, train_codes=True, code_rate=3.0, cores_first=1.0)
    healed(file, teacher, text, target, settings=settings)
    with MpoFile(file) as old, MpoFile(target, verify=True) as new:
        assert new.spec.provenance.options["healed_cores_first"] == "1.0"
        for part in ("self_attn.q_proj.0.q2", "self_attn.q_proj.0.scale", "mlp.up_proj.0.q2", "mlp.up_proj.0.scale"):
            name = f"model.layers.0.{part}"
            np.testing.assert_array_equal(new.array(name), old.array(name))
        names = [tensor.name for tensor in file_tensors(old.spec)]
        cores = [name for name in names if name.startswith("model.layers.0.mlp.up_proj.1.")]
        assert cores and any((new.array(name) != old.array(name)).any() for name in cores)


class Killed(BaseException):
    """What a kill looks like to the code."""


def killing(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends the program in the middle of the whole model's step `step` (from 1)."""

    class Trainer(RealTrainer):
        def step(self, parts: Any, done: float, chi: int | None, where: str, *steps: float) -> Any:
            if where == f"step {step}":
                raise Killed
            return super().step(parts, done, chi, where, *steps)

    monkeypatch.setattr(session_module, "Trainer", Trainer)


@pytest.fixture(scope="module")
def undisturbed(
    file: Path, teacher: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Settings], Healed]:
    """Healings that nobody interrupts, each done once."""
    folder = tmp_path_factory.mktemp("undisturbed")
    known: dict[Settings, Healed] = {}

    def get(settings: Settings) -> Healed:
        if settings not in known:
            known[settings] = healed(file, teacher, text, folder / f"{len(known)}.mpo", settings=settings)
        return known[settings]

    return get


@pytest.mark.parametrize(("step", "chi_dropout"), [(2, 0.0), (5, 0.5), (13, 0.0)])
def test_killed_and_resumed_is_the_same(
    step: int,
    chi_dropout: float,
    file: Path,
    teacher: Path,
    text: Path,
    tmp_path: Path,
    undisturbed: Callable[[Settings], Healed],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the first checkpoint of the whole model, after it, and after bonds were sorted, before step 12 of 13."""
    settings = replace(SETTINGS, tokens=1790, chi_dropout=chi_dropout)
    whole = undisturbed(settings)
    target = tmp_path / "resumed.mpo"
    with monkeypatch.context() as patch:
        killing(step, patch)
        with pytest.raises(Killed):
            healed(file, teacher, text, target, settings=settings)
    found = load_checkpoint(tmp_path / ".resumed.mpo.healing", _digest(tmp_path / ".resumed.mpo.healing"))
    assert found is not None and found[0].step == (step - 1) // 3 * 3
    resumed = healed(file, teacher, text, target, settings=settings)
    np.testing.assert_allclose(resumed.curve, whole.curve, atol=1e-6)
    assert len(whole.curve) == 13
    assert resumed.block_curves == whole.block_curves and resumed.tokens == whole.tokens
    with MpoFile(whole.path) as first, MpoFile(target) as second:
        for linear in first.spec.linears:
            name = f"{linear.name}.0.scale"
            np.testing.assert_array_equal(first.array(name), second.array(name))


def _digest(folder: Path) -> str:
    from safetensors import safe_open

    with safe_open(folder / NAME, "pt") as opened:
        digest: str = json.loads(opened.metadata()["healing"])["digest"]
    return digest


def test_a_checkpoint_of_another_healing_is_refused(
    file: Path, teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "healed.mpo"
    with monkeypatch.context() as patch:
        killing(5, patch)
        with pytest.raises(Killed):
            healed(file, teacher, text, target)
    with pytest.raises(ConfigError, match="is of a healing with other settings, data or models"):
        healed(file, teacher, text, target, settings=replace(SETTINGS, seed=1))
    checkpoint = tmp_path / ".healed.mpo.healing" / NAME
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(ConfigError, match="is damaged"):
        healed(file, teacher, text, target)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    file: Path, teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trainer(RealTrainer):
        def step(self, parts: Any, done: float, chi: int | None, where: str, *steps: float) -> Any:
            if where == "step 5":
                parts[0].weight[0, 0] = float("nan")
            return super().step(parts, done, chi, where, *steps)

    monkeypatch.setattr(session_module, "Trainer", Trainer)
    with pytest.raises(ConfigError, match=r"not finite at step 5; the last good checkpoint, after step 3, is in"):
        healed(file, teacher, text, tmp_path / "healed.mpo")
    folder = tmp_path / ".healed.mpo.healing"
    found = load_checkpoint(folder, _digest(folder))
    assert found is not None and found[0].step == 3
    assert all(bool(tensor.isfinite().all()) for tensor in found[1].values())
    assert not (tmp_path / "healed.mpo").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: …")])
def test_out_of_memory_says_what_to_lower(
    error: Exception, file: Path, teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(RealTrainer, "step", fail)
    with pytest.raises(ConfigError, match="out of memory at step 1 of block 0; lower --micro-batch"):
        healed(file, teacher, text, tmp_path / "healed.mpo")
    assert not out_of_memory(RuntimeError("shapes do not fit"))
    assert run_module.out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


def test_teachers_that_do_not_fit(file: Path, text: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", granite_config(intermediate_size=64))
    with pytest.raises(CheckpointError, match="teacher other: intermediate_size is 64, the file has 48"):
        healed(file, other, text, tmp_path / "healed.mpo")
    renamed = write_folder(tmp_path / "renamed", CONFIG)
    content = json.loads((renamed / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (renamed / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"teacher renamed: token \d+ is .*, in the file"):
        healed(file, renamed, text, tmp_path / "healed.mpo")


def test_targets_and_texts_that_do_not_fit(file: Path, teacher: Path, text: Path, tmp_path: Path) -> None:
    target = tmp_path / "healed.mpo"
    short = tmp_path / "short.txt"
    short.write_text("too little")
    with pytest.raises(ConfigError, match=r"short\.txt: .* fill 0 windows of 32, expected at least 4"):
        healed(file, teacher, short, target)
    target.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        healed(file, teacher, text, target)
    assert target.read_text() == "mine"


def test_no_time_left_still_ends(file: Path, teacher: Path, text: Path, tmp_path: Path) -> None:
    """Teacher and blocks may take all of the time: a busy machine once trained on for ever then."""
    settings = replace(SETTINGS, tokens=None, minutes=1e-5)
    result = healed(file, teacher, text, tmp_path / "healed.mpo", settings=settings)
    assert result.curve and result.minutes < 0.3


def test_minutes_bound_the_training(file: Path, teacher: Path, text: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, tokens=None, minutes=0.03)
    result = healed(file, teacher, text, tmp_path / "healed.mpo", settings=settings)
    assert result.curve and 0.03 <= result.minutes < 0.3


@pytest.fixture
def launched(tmp_path: Path, file: Path, teacher: Path, text: Path) -> Callable[[int], dict[str, Any]]:
    def launch(processes: int) -> dict[str, Any]:
        root = Path(__file__).resolve().parent.parent.parent
        asked = {
            "file": str(file),
            "teacher": str(teacher),
            "text": str(text),
            "target": str(tmp_path / f"{processes}.mpo"),
            "settings": {"tokens": 1200, "window": 32, "batch": 4, "micro_batch": 1},
        }
        settings, result = tmp_path / "asked.json", tmp_path / "result.json"
        settings.write_text(json.dumps(asked))
        child = [str(Path(__file__).with_name("heal_child.py")), str(settings), str(result)]
        alone = [sys.executable, *child]
        together = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            *child,
        ]
        roots = os.pathsep.join(str(root / part) for part in (".", "formats", "exporter"))
        environment = os.environ | {"PYTHONPATH": roots, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            alone if processes == 1 else together, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(result.read_text())
        return found

    return launch


@pytest.mark.long
def test_two_processes_follow_the_curve_of_one(launched: Callable[[int], dict[str, Any]], tmp_path: Path) -> None:
    """torchrun with gloo: the same global batch, so the same losses but for the order of sums in float32."""
    one, two = launched(1), launched(2)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["left"] == [], "threads of the process group, which may abort a process that ends"
    assert len(one["curve"]) == len(two["curve"]) == STEPS
    np.testing.assert_allclose(two["curve"], one["curve"], rtol=1e-4)
    np.testing.assert_allclose(two["blocks"], one["blocks"], rtol=1e-4)
    with MpoFile(tmp_path / "1.mpo") as first, MpoFile(tmp_path / "2.mpo") as second:
        name = "model.layers.1.mlp.up_proj.0.scale"
        np.testing.assert_allclose(first.array(name).astype(float), second.array(name).astype(float), rtol=2e-3)


def test_the_command_heals_and_prints_a_table(
    file: Path,
    teacher: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "healed.mpo"
    options = ["--heal-tokens", "300", "--window", "32", "--batch", "4", "--rate", "0.5", "--measure-tokens", "200"]
    words = [
        "mpo-export",
        "heal",
        str(file),
        "--teacher",
        str(teacher),
        "--text",
        str(text),
        "--out",
        str(target),
        *options,
    ]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and target.exists()
    assert "KL to dense, mean" in printed and "trained on 248 tokens" in printed
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and "exists already" in capsys.readouterr().err


def test_the_literature_s_name(file: Path, teacher: Path, text: Path, tmp_path: Path) -> None:
    words = TokenText("given", np.load(text), 0, "2" * 64)
    target = tmp_path / "named.mpo"
    result = CompactifAICompressor().heal_model(
        file, load_granite_model(teacher), healing=words, path=target, tokens=300, window=32, batch=4, block_share=0.0
    )
    assert result.path == target and len(result.curve) == 2
    with MpoFile(target) as written:
        assert written.spec.provenance.options["healed_text"] == "given"


def test_blocks_are_run_again_only_where_memory_is_short(file: Path, teacher: Path, text: Path, tmp_path: Path) -> None:
    """And the losses are the same."""
    curves = []
    for again in (False, True):
        settings = replace(SETTINGS, tokens=600, recompute=again)
        curves.append(healed(file, teacher, text, tmp_path / f"{again}.mpo", settings=settings).curve)
    np.testing.assert_allclose(*curves, rtol=1e-5)
    with MpoFile(file) as opened:
        assert fits(opened.spec.architecture, 4, 31, "cpu") and not fits(opened.spec.architecture, 10**9, 31, "cpu")


def test_the_teacher_s_scores_serve_shorter_healings(file: Path, teacher: Path, text: Path, tmp_path: Path) -> None:
    """Of the same text in the same folder; a longer one needs more of them."""
    curves = {}
    for tokens in (600, 300, 900):
        target = tmp_path / f"{tokens}.mpo"
        settings = replace(SETTINGS, tokens=tokens)
        curves[tokens] = healed(
            file, teacher, text, target, settings=settings, work=tmp_path / "kept", discard_other=True
        ).curve
        [done] = (tmp_path / "kept").glob("teacher-*-done.npy")
        assert int(np.load(done)) == {600: 16, 300: 16, 900: 28}[tokens]
        alone = healed(file, teacher, text, target, settings=settings, force=True).curve
        np.testing.assert_array_equal(curves[tokens], alone)
