"""What each effort does and takes: plans without text, predicted costs, progress with what is left, the disk."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mpo_exporter.basis import PLAIN, Basis
from mpo_exporter.calibrate.moments import Moment
from mpo_exporter.cli import export as cli
from mpo_exporter.cli import progress
from mpo_exporter.cli.progress import Pace, export_progress
from mpo_exporter.effort import BEST, EFFORTS, NORMAL, QUICK
from mpo_exporter.export import ExportTask
from mpo_exporter.fit import layer
from mpo_exporter.fit.layer import build_linear, rounded_rows
from mpo_exporter.measure.blind import blind_survey, sampled_matrix
from mpo_exporter.measure.candidates import GRIDS
from mpo_exporter.measure.cost import NOMINAL, export_cost, measured_rates
from mpo_exporter.plan.budget import default_bytes
from mpo_exporter.plan.options import Options, Target
from mpo_exporter.quantize import native
from mpo_exporter.quantize.gptq import expected_errors, expected_residuals
from mpo_exporter.source import open_source
from mpo_formats import ConfigError, LinearSpec, OutputError, Quantized
from mpo_formats.packing import f32_to_bf16
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import export_folder, granite_config, write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", granite_config(hidden_size=64, intermediate_size=128))


@pytest.mark.parametrize("torch_alone", [False, True])
def test_errors_without_a_moment_are_those_of_inputs_all_alike(torch_alone: bool) -> None:
    matrix = np.random.default_rng(0).standard_normal((90, 128))
    with native.torch_alone():
        residuals, _ = expected_residuals(matrix, Moment(np.eye(128)), GRIDS)
        wanted = np.array([np.square(residual).sum(1) for residual in residuals])
        found = expected_errors(matrix, None, GRIDS)
    if not torch_alone:
        found = expected_errors(matrix, None, GRIDS)
    np.testing.assert_allclose(found, wanted, rtol=3e-3)


def test_a_blind_survey_counts_errors_relative_to_each_matrix(folder: Path) -> None:
    source = Checkpoint(folder)
    survey = blind_survey(source)
    assert list(survey.candidates) == [linear.name for linear in source.spec.linears]
    for name, row in survey.candidates.items():
        losses = {one.terms: one.loss for one in row}
        two, eight = losses[(Quantized(2, 32, False),)], min(one.loss for one in row[:-1])
        assert 0.01 < two < 0.5 and eight < 1e-3 and row[-1].loss == 0, name
    assert survey.table is None


def stored(matrix: NDArray[np.float64]) -> Any:
    """Weights that hold one matrix in bf16, under the name `layer`."""
    raw = f32_to_bf16(matrix.astype(np.float32))
    return SimpleNamespace(array=lambda name: raw, dtype=lambda name: "bf16")


def test_a_blind_survey_takes_rows_at_equal_distances_and_looks_at_all() -> None:
    matrix = np.random.default_rng(0).standard_normal((1000, 64))
    rows = sampled_matrix(stored(matrix), "layer", 10)
    np.testing.assert_allclose(rows, matrix[50::100], rtol=4e-3)
    assert len(sampled_matrix(stored(matrix), "layer", 500)) == 1000
    matrix[3, 5] = 5000  # 16 times as much is beyond the scales of half precision
    assert len(sampled_matrix(stored(matrix), "layer", 10)) == 1000
    for bad in (np.nan, np.inf):
        matrix[3, 5] = bad
        with pytest.raises(ConfigError, match="row 3, column 5"):
            sampled_matrix(stored(matrix), "layer", 10)


@pytest.mark.parametrize(("bits", "zeros", "hadamard"), [(4, False, 0), (3, True, 0), (2, False, 64), (5, False, 32)])
def test_rows_are_rounded_as_the_whole_matrix_is(
    bits: int, zeros: bool, hadamard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer, "AT_ONCE", 7 * 128)
    raw = f32_to_bf16(np.random.default_rng(0).standard_normal((40, 128), np.float32))
    linear = LinearSpec("l", 40, 128, None, (Quantized(bits, 32, zeros),), hadamard)
    basis = Basis(hadamard)
    wanted = build_linear(linear, raw, "bf16", basis=basis).tensors
    found = rounded_rows(linear, raw, "bf16", basis)
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found[name], tensor)


def test_values_too_small_for_scales_are_refused_though_few_rows_have_them() -> None:
    linear = LinearSpec("l", 40, 128, None, (Quantized(4, 32, False),))
    tiny = f32_to_bf16(np.random.default_rng(0).standard_normal((40, 128), np.float32) * np.float32(1e-8))
    with pytest.raises(ConfigError, match="l: .*below the range of half-precision scales"):
        rounded_rows(linear, tiny, "bf16", PLAIN)
    tiny[20:] = f32_to_bf16(np.ones((20, 128), np.float32))
    rounded_rows(linear, tiny, "bf16", PLAIN)


def test_quick_meets_a_target_without_text(folder: Path, tmp_path: Path) -> None:
    for target in (Target(default=True), Target(size=60_000)):
        result = export_folder(folder, tmp_path / "out.mpo", Options(target=target), effort=QUICK, force=True)
        wanted = target.size or default_bytes(result.source)
        assert 0.95 * wanted < result.file_bytes <= wanted
        assert result.spec.provenance.options["effort"] == "quick"
        assert result.spec.provenance.calibration_sha256 is None
    with pytest.raises(ConfigError, match="give one with --calib"):
        export_folder(folder, tmp_path / "none.mpo", Options(target=Target(size=60_000)))


def test_more_care_costs_more(folder: Path) -> None:
    architecture = Checkpoint(folder).spec.architecture
    given: dict[str, Any] = {"window": 256, "file_bytes": 10**6, "source_bytes": 10**7}
    costs = [export_cost(architecture, NOMINAL, effort, windows=effort.windows, **given) for effort in EFFORTS.values()]
    assert costs[0].seconds < costs[1].seconds < costs[2].seconds
    assert costs[0].disk < costs[1].disk <= costs[2].disk
    assert list(costs[0].stages) == ["surveying", "fitting", "measuring"]
    assert list(costs[1].stages) == ["gradients", "surveying", "fitting", "measuring"]
    cached = export_cost(architecture, NOMINAL, NORMAL, windows=NORMAL.windows, surveyed=False, **given)
    assert list(cached.stages) == ["fitting", "measuring"] and cached.seconds < costs[1].seconds
    measured = export_cost(architecture, NOMINAL, BEST, windows=96, measured_tokens=5000, **given)
    assert measured.stages["measuring"] > 0 == costs[2].stages["measuring"]


@pytest.mark.parametrize(
    ("weights", "windows", "judged"),
    [(400_000_000, 80, 32), (1_600_000_000, 40, 16), (2_500_000_000, 32, 8), (10**11, 32, 8)],
)
def test_large_models_are_given_fewer_windows(weights: int, windows: int, judged: int) -> None:
    suited = NORMAL.suited(weights)
    assert (suited.name, suited.windows, suited.care.windows, suited.care.rows) == ("normal", windows, judged, 512)
    assert (QUICK.suited(weights), BEST.suited(weights)) == (QUICK, BEST)


def test_wide_inputs_cost_less_than_their_square(folder: Path) -> None:
    """Twice the inner width of an MLP is twice its weights: in parts, fitting takes less than three times as long."""
    small = dataclasses.replace(
        Checkpoint(folder).spec.architecture, hidden_size=2048, intermediate_size=8192, num_hidden_layers=1
    )
    given: dict[str, Any] = {"windows": 32, "window": 256, "file_bytes": 10**6, "source_bytes": 10**7}
    seconds = [
        export_cost(dataclasses.replace(small, intermediate_size=inner), NOMINAL, NORMAL, **given).stages["fitting"]
        for inner in (8192, 16384)
    ]
    assert 1.5 < seconds[1] / seconds[0] < 2.5


def test_rates_are_measured_on_the_models_widths(folder: Path) -> None:
    rates = measured_rates(Checkpoint(folder).spec.architecture)
    assert min(rates.product, rates.exact, rates.rounding, rates.grid, rates.nearest) > 0


def test_the_pace_counts_the_work_of_this_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    pace = Pace({"surveying": 1.0, "fitting": 3.0}, 8.0)
    assert pace.text("surveying", 1, 10) == "surveying 1/10 layers, 0 s left"
    clock.now = 110.0
    assert pace.text("surveying", 10, 10) == "surveying 10/10 layers, 30 s left"
    clock.now = 120.0
    assert pace.text("fitting", 5, 15) == "fitting 5/15 layers, 3 of 8 MB, 20 s left"
    resumed = Pace({"surveying": 1.0, "fitting": 3.0}, 8.0)
    assert resumed.left("fitting", 5, 10) is None
    clock.now = 125.0
    assert resumed.left("fitting", 6, 10) == pytest.approx(5.0 * 0.3 / 0.075)
    assert resumed.text("other", 1, 2).startswith("other 1/2 layers")


def test_progress_without_a_terminal_is_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    pace = Pace({"fitting": 1.0}, 8.0)
    with export_progress(pace) as update:
        for done in range(1, 31):
            clock.now += 1
            if done == 15:
                pace.planned(12_000_000)
            update("fitting", done, 30)
    assert capsys.readouterr().err.splitlines() == [
        "export: fitting 10/30 layers, 3 of 8 MB, 20 s left",
        "export: fitting 20/30 layers, 8 of 12 MB, 10 s left",
        "export: fitting 30/30 layers, 12 of 12 MB, 0 s left",
    ]


def test_a_disk_without_room_is_refused_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage: Callable[[Path], Any] = lambda _: SimpleNamespace(free=1000)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    task = ExportTask(tmp_path / "out.mpo", Options(target=Target(size=60_000)), effort=QUICK)
    with open_source(folder) as source, pytest.raises(OutputError, match=r"takes about 120 kB of disk, 1 kB are free"):
        cli.check_disk(source, task)
