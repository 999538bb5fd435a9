"""Profiles: measured sensitivity against an oracle, what the summary says, and what mpo-export profile writes."""

from __future__ import annotations

import builtins
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpo_exporter.calibrate.moments import Calibration, Moment
from mpo_exporter.calibrate.windows import cut_calibration
from mpo_exporter.cli.profile import run_profile
from mpo_exporter.fit.layer import build_linear
from mpo_exporter.measure import sensitivity as full
from mpo_exporter.measure.profile import Judged, Profile, rank_correlation
from mpo_exporter.measure.sensitivity import cached_sensitivities, check_windows
from mpo_exporter.plan.options import Options
from mpo_exporter.report.profile_plots import DEPTH, HEAT
from mpo_exporter.request import CalibrationRequest, ProfileRequest
from mpo_exporter.terms import integers
from mpo_formats import ConfigError, LinearSpec, OutputError
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_runtime.loading import load_network, open_weights
from mpo_runtime.measure import compare
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import export_folder, granite_config, some_ids, write_folder

TEXT = TokenText("calibration", np.array(some_ids(16 * 63), np.int64), 0, "1" * 64)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = granite_config(
        hidden_size=64,
        intermediate_size=128,
        logits_scaling=16.0,
        embedding_multiplier=1.0,
        tie_word_embeddings=request.param,
    )
    return write_folder(tmp_path_factory.mktemp("source") / "model", config, dtype=torch.bfloat16)


def coarse(source: Checkpoint, bits: int = 2) -> list[LinearSpec]:
    return [dataclasses.replace(one, terms=(integers(one.in_features, bits, 64),)) for one in source.spec.linears]


def test_a_measured_layer_is_what_an_export_of_that_layer_alone_gives(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle writes a file in which only that layer is stored otherwise, and compares it with the dense model."""
    monkeypatch.setenv("MPO_CACHE", str(tmp_path / "cache"))
    source = Checkpoint(folder)
    walk = Calibration(source, cut_calibration(TEXT, source.architecture, count=8), tmp_path)
    windows = check_windows(TEXT, walk)
    assert not {row.tobytes() for row in windows} & {row.tobytes() for row in walk.windows}
    wanted = [
        one
        for one in coarse(source)
        if one.name.endswith(("1.mlp.down_proj", "0.self_attn.k_proj")) or one.name in (EMBEDDING, HEAD)
    ]
    found = {one.layer: one for one in cached_sensitivities(source, TEXT, walk, wanted)}
    moments: dict[str, Moment] = {name: moment for names, moment in walk.dense() for name in names}
    dense = load_network(open_weights(folder), backend="reference")
    for linear in wanted:
        raw, kind = source.array(f"{linear.name}.0.weight"), source.dtype(f"{linear.name}.0.weight")
        built = build_linear(linear, raw, kind, moments.get(linear.name))
        changed = load_network(open_weights(folder), backend="reference")
        changed.ops.replace(linear.name, torch.from_numpy(built.matrix.astype(np.float32)))
        results = [compare(changed, dense, window[1:], window=window.size) for window in windows]
        kl = np.mean([one.kl_mean for one in results])
        losses = [np.mean([getattr(one, side).nats for one in results]) for side in ("model", "reference")]
        measured = found[linear.name]
        # The last token's prediction is in the profile's mean and not in the comparison's.
        assert measured.kl_mean == pytest.approx(kl, rel=0.15)
        assert measured.perplexity_increase == pytest.approx(np.exp(losses[0] - losses[1]) - 1, abs=2e-4)
        assert 0.5 < measured.output_cosine < 1 and abs(measured.norm_drift) < 0.5
        assert 0 < measured.error < 0.7 and (0 < measured.activation_drift < 1) == (linear.name != HEAD)


def test_what_was_measured_is_kept_layer_by_layer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPO_CACHE", str(tmp_path / "cache"))
    source = Checkpoint(folder)
    walk = Calibration(source, cut_calibration(TEXT, source.architecture, count=8), tmp_path)
    first = cached_sensitivities(source, TEXT, walk, coarse(source)[:3])
    built: list[str] = []
    original = full.build_linear

    def counting(linear: LinearSpec, *rest: Any) -> Any:
        built.append(linear.name)
        return original(linear, *rest)

    monkeypatch.setattr(full, "build_linear", counting)
    told: list[str] = []
    again = cached_sensitivities(source, TEXT, walk, coarse(source)[:4], log=told.append)
    assert again[:3] == first and set(built) == {coarse(source)[3].name}
    assert "3 of 4 measured before" in told[0]


def test_a_text_that_was_used_up_is_judged_on_itself(folder: Path, tmp_path: Path) -> None:
    source = Checkpoint(folder)
    walk = Calibration(source, cut_calibration(TEXT, source.architecture, count=99), tmp_path)
    assert {row.tobytes() for row in check_windows(TEXT, walk)} <= {row.tobytes() for row in walk.windows}


def judged(costs: list[float], table: float = 1.0) -> Profile:
    layers = [
        Judged(f"model.layers.{block}.mlp.{part}_proj", 1000, cost * factor, cost)
        for block, cost in enumerate(costs)
        for part, factor in (("up", 1.0), ("down", 2.0))
    ]
    return Profile("m", "fast", "2 bits", "χ = 4", (Judged(EMBEDDING, 1000, table, None), *layers))


def test_the_summary_answers_by_depth_and_by_type() -> None:
    profile = judged([4.0, 3.0, 2.0, 1.0], table=99.0)
    assert profile.depth_answer("integers").startswith("yes (rank correlation of cost and depth -1.00")
    assert judged([1.0, 2.0, 3.0]).depth_answer("cores").startswith("no, worse")
    assert judged([1.0, 3.0, 3.5, 0.5]).depth_answer("cores").startswith("no clear trend")
    assert judged([1.0, 2.0]).depth_answer("cores") == "too few blocks to tell"
    assert [one.layer for one in profile.precious()] == [EMBEDDING]
    assert judged([1.0, 1.0, 1.0]).precious() == []
    types = {group.name: group for group in profile.by_type()}
    assert types["mlp.down_proj"].integers == 20 and types["mlp.up_proj"].cores == 10
    assert types[EMBEDDING].cores is None
    assert [group.name for group in profile.by_block()] == [f"block {block}" for block in range(4)]
    assert profile.by_block()[0].integers_each == pytest.approx(1e6 * 12 / 2000)
    assert rank_correlation([1, 5, 9]) == pytest.approx(1)


def profile_of(folder: Path, text: Path, level: str, out: Path | None, plots: bool = True) -> Profile:
    calibration = CalibrationRequest(text, 8)
    return run_profile(ProfileRequest(str(folder), level, 3, 4, out, plots, calibration))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "calib.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 14)
    return path


@pytest.mark.parametrize("level", ["fast", "full"])
def test_a_profile_is_a_table_json_and_plots(
    folder: Path, text: Path, tmp_path: Path, level: str, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = profile_of(folder, text, level, tmp_path / "out")
    printed = capsys.readouterr().out
    for word in ("by block", "by type", "deeper blocks compress better", "better left alone", "profile.json"):
        assert word in printed
    assert ("output cosine" in printed or "cosine" in printed) == (level == "full")
    plain = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert [row["layer"] for row in plain["layers"]] == [linear.name for linear in Checkpoint(folder).spec.linears]
    assert plain == json.loads(json.dumps(profile.plain()))
    assert all(row["integers"] >= 0 for row in plain["layers"])
    assert all(
        len(row["measured"]) == (0 if level == "fast" else 1 + (row["cores"] is not None)) for row in plain["layers"]
    )
    for name in (HEAT, DEPTH):
        assert (tmp_path / "out" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_plots_without_matplotlib_name_the_extra(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ConfigError, match=r"plots need matplotlib; pip install 'mpo-runtime\[report\]', or give --no-plots"
    ):
        profile_of(folder, text, "fast", tmp_path / "out")
    profile_of(folder, text, "fast", tmp_path / "out", plots=False)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["profile.json"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file: is a file; give a folder with --out"):
        run_profile(ProfileRequest("demo", out=tmp_path / "file", plots=False))


def test_key_projections_keep_their_norm(folder: Path, tmp_path: Path) -> None:
    from mpo_exporter.plan.options import KeyOptions
    from mpo_formats import MpoFile
    from mpo_formats.reference import matrix

    source = Checkpoint(folder)
    ratios = {}
    for norm in (True, False):
        options = Options("k-proj", keys=KeyOptions(4, 16, norm, 16))
        with MpoFile(export_folder(folder, tmp_path / f"{norm}.mpo", options).path) as file:
            for linear in file.spec.linears:
                raw = source.array(f"{linear.name}.0.weight")
                dense = build_linear(source.spec.linear(linear.name), raw, "bf16").matrix
                ratio = np.linalg.norm(matrix(file, linear)) / np.linalg.norm(dense)
                if linear.name.endswith("k_proj"):
                    ratios[norm, linear.name] = ratio
                else:
                    assert ratio == pytest.approx(1, abs=1e-6)
    for (norm, _), ratio in ratios.items():
        assert ratio == pytest.approx(1, abs=0.002) if norm else ratio < 0.95
