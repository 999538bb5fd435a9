"""Exports that are fitted to calibration text: better where it counts, the promised size, the same bytes every time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mpo_exporter.calibrate.moments import Calibration, Moment
from mpo_exporter.calibrate.windows import cut_calibration
from mpo_exporter.fit.common import activation_error
from mpo_exporter.fit.layer import Method, build_linear
from mpo_exporter.measure.candidates import Sensitivity, candidates, table_sensitivity
from mpo_exporter.measure.survey import Survey, survey
from mpo_exporter.plan.budget import allocated_layers, file_bytes
from mpo_exporter.plan.named import plan_layers
from mpo_exporter.plan.options import Options, Target
from mpo_exporter.quantize.grid import Grid
from mpo_exporter.terms import stored_bytes
from mpo_formats import ConfigError, Dense, LinearSpec, Mpo, MpoFile, OutputError, PlanError, Quantized, Term
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.layers.linear import Linear
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import export_folder, granite_config, some_ids, write_folder

GRIDS = (Grid(2, 32), Grid(2, 32, True), Grid(3, 32), Grid(4, 32), Grid(8, 32))
TEXT = TokenText("calibration", np.array(some_ids(24 * 32), np.int64), 0, "1" * 64)
HELD_OUT = TokenText("held-out", np.array(some_ids(512, 9), np.int64), 0, "2" * 64)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = granite_config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, tie_word_embeddings=request.param
    )
    return write_folder(tmp_path_factory.mktemp("source") / "model", config, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def surveyed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Survey:
    source = Checkpoint(folder)
    windows = cut_calibration(TEXT, source.architecture, window=32)
    return survey(source, Calibration(source, windows, tmp_path_factory.mktemp("spill")), grids=GRIDS, chis=(2,))


def uniform(folder: Path, *terms: Term) -> tuple[LinearSpec, ...]:
    return tuple(dataclasses.replace(linear, terms=terms) for linear in Checkpoint(folder).spec.linears)


def divergence(folder: Path, target: Path, bits: int, **options: object) -> float:
    layers = uniform(folder, Quantized(bits, 32, False))
    result = export_folder(folder, target, Options("int4"), layers=layers, text=HELD_OUT, **options)
    assert result.comparison is not None
    return result.comparison.kl_mean


def test_calibration_lowers_the_divergence_from_the_dense_model(folder: Path, tmp_path: Path) -> None:
    plain = divergence(folder, tmp_path / "plain.mpo", 3)
    fitted = divergence(folder, tmp_path / "fitted.mpo", 3, calibration=TEXT)
    assert fitted < 0.9 * plain


def test_calibrated_exports_are_deterministic_and_leave_nothing_behind(folder: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.mpo" for name in "ab"]
    for path in paths:
        export_folder(folder, path, Options("auto", chi=4), calibration=TEXT)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == paths
    with MpoFile(paths[0]) as file:
        file.verify()
        origin = file.spec.provenance
        assert file.spec.linears == plan_layers(Checkpoint(folder).spec, Options("auto", chi=4))
    assert origin.calibration_sha256 == TEXT.sha256
    assert origin.options["calibration"] == "calibration"


def test_the_survey_lists_every_layer_and_finer_grids_cost_less(folder: Path, surveyed: Survey) -> None:
    spec = Checkpoint(folder).spec
    assert list(surveyed.candidates) == [linear.name for linear in spec.linears]
    for linear in spec.linears:
        row = surveyed.candidates[linear.name]
        integers = {one.terms[0]: one for one in row if len(one.terms) == 1}
        losses = [integers[Quantized(bits, 32, False)].loss for bits in (2, 3, 4, 8)]
        assert losses == sorted(losses, reverse=True) and losses[-1] > 0
        for one in row:
            assert one.bytes == stored_bytes(dataclasses.replace(linear, terms=one.terms))
            if len(one.terms) == 2:  # cores can only take away from what rounding left
                assert one.loss < integers[one.terms[0]].loss
                assert isinstance(one.terms[1], Mpo) and one.terms[1].bonds == (2,)
        assert any(len(one.terms) == 2 for one in row) == (linear.name not in (EMBEDDING, HEAD))


@pytest.mark.parametrize("share", [0.0, 0.4, 2.0])
def test_a_target_is_never_exceeded_and_nearly_used(
    folder: Path, surveyed: Survey, tmp_path: Path, share: float
) -> None:
    spec = Checkpoint(folder).spec
    smallest, largest = (
        file_bytes(dataclasses.replace(spec, linears=uniform(folder, Quantized(bits, 32, False)))) for bits in (2, 8)
    )
    # Provenance and layers say a little more than the source's.
    target = round(smallest + share * (largest - smallest)) + 900
    result = export_folder(
        folder, tmp_path / "out.mpo", Options("auto", target=Target(size=target)), calibration=TEXT, surveyed=surveyed
    )
    assert result.file_bytes <= target
    assert result.file_bytes == file_bytes(result.spec)
    assert share > 1 or result.file_bytes > 0.95 * target


def test_allocation_beats_one_width_at_the_same_bytes(folder: Path, surveyed: Survey, tmp_path: Path) -> None:
    flat = tmp_path / "flat.mpo"
    plain = divergence(folder, flat, 3, calibration=TEXT, surveyed=surveyed)
    options = Options("auto", target=Target(size=flat.stat().st_size))
    result = export_folder(folder, tmp_path / "ours.mpo", options, calibration=TEXT, surveyed=surveyed, text=HELD_OUT)
    assert result.comparison is not None and result.comparison.kl_mean < 1.05 * plain


def test_targets_that_cannot_be_met(folder: Path, surveyed: Survey, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="target: 1,000 bytes are too few, the smallest file of this model takes"):
        allocated_layers(Checkpoint(folder).spec, surveyed.candidates, 1000)
    with pytest.raises(ConfigError, match="give one with --calib"):
        export_folder(folder, tmp_path / "out.mpo", Options("auto", target=Target(size=10**6)))
    with pytest.raises(OutputError, match="cannot write"):
        export_folder(folder, tmp_path / "missing" / "out.mpo", Options("auto"), calibration=TEXT)
    assert not (tmp_path / "missing").exists()


def moment_of(size: int) -> NDArray[np.float64]:
    source = np.random.default_rng(0)
    inputs = source.standard_normal((500, size)) @ source.standard_normal((size, size))
    result: NDArray[np.float64] = inputs.T @ inputs / 500
    return result


@pytest.mark.parametrize(
    "terms",
    [
        (Mpo((16, 1), (1, 32), (4,), "f16", 0),),
        (Mpo((4, 4), (8, 4), (6,), "f32", 0),),
        (Mpo((4, 2, 2), (4, 4, 2), (6, 4), "f32", 0),),
        (Mpo((4, 2, 2), (4, 4, 2), (3, 4), "f32", 0),),
        (Quantized(2, 32, True),),
        (Quantized(2, 32, False), Mpo((16, 1), (1, 32), (2,), "int8", 16)),
    ],
    ids=["low rank", "balanced", "three cores", "rising bonds", "integers", "integers and cores"],
)
def test_terms_fitted_to_activations_have_less_error_there(terms: tuple[Term, ...]) -> None:
    linear = LinearSpec("layer", 16, 32, None, terms)
    values = np.random.default_rng(1).standard_normal((16, 32)).astype(np.float32)
    second = moment_of(32)
    fitted = build_linear(linear, values, "f32", Moment(second, None, 500))
    blind = build_linear(linear, values, "f32")
    errors = [activation_error(values - built.matrix, second) for built in (fitted, blind)]
    assert errors[0] < errors[1]
    again = build_linear(linear, values, "f32", Moment(second, None, 500), Method("nearest", "svd"))
    np.testing.assert_array_equal(again.matrix, blind.matrix)


def test_a_table_weighs_both_of_its_uses() -> None:
    """Rows seen more often count for more, and lookups add to the head's Hessian."""
    frequency, lookup = np.array([0.75, 0.25]), np.arange(1.0, 33.0)
    only = table_sensitivity(frequency, lookup)
    np.testing.assert_allclose(only.rows, [1.5, 0.5])
    np.testing.assert_allclose(only.hessian, np.diag(lookup / 2))
    residual = np.random.default_rng(0).standard_normal((2, 32))
    direct = 0.5 * float(frequency @ (np.square(residual) @ lookup))
    assert only.loss(residual, np.diag(only.hessian)) == pytest.approx(direct)
    both = table_sensitivity(frequency, lookup, moment_of(32), np.array([3.0, 1.0]))
    np.testing.assert_allclose(both.hessian, 2 * moment_of(32) + np.diag(lookup / 2))
    np.testing.assert_allclose(both.rows, [1.5, 0.5])


def test_a_width_without_a_group_stays_dense() -> None:
    for dtype in ("f16", "bf16", "f32"):
        linear = LinearSpec("layer", 4, 24, None, (Dense(dtype),))
        found = candidates(linear, np.ones((4, 24)), table_sensitivity(np.ones(4) / 4, np.ones(24)), (Grid(4, 128),))
        kept = {"f16": ["f16"], "bf16": ["bf16"], "f32": ["bf16", "f32"]}  # two bytes are not narrowed to two bytes
        assert [one.terms[0].dtype for one in found] == kept[dtype] and found[-1].loss == 0


@pytest.mark.parametrize(("columns", "groups"), [(96, {32}), (48, {16}), (64, {32, 64}), (128, {32, 64, 128})])
def test_every_width_is_tried_with_the_largest_group_that_divides(columns: int, groups: set[int]) -> None:
    linear = LinearSpec("layer", 4, columns, None, (Dense("bf16"),))
    matrix = np.random.default_rng(0).standard_normal((4, columns))
    found = candidates(linear, matrix, Sensitivity(Moment(np.eye(columns)), np.ones(4)), chis=())
    terms = [one.terms[0] for one in found[:-1]]
    assert {term.bits for term in terms} == {2, 3, 4, 5, 6, 8}
    assert {term.group for term in terms} == groups and len(set(terms)) == len(terms)


def test_values_beyond_what_a_scale_reaches_leave_the_wider_integers_and_the_dense_matrix() -> None:
    linear = LinearSpec("layer", 4, 64, None, (Dense("f32"),))
    sensitivity = Sensitivity(Moment(np.eye(64)), np.ones(4))
    for peak, bits in ((2e5, {3, 4, 5, 6, 8}), (1e9, set())):
        matrix = np.ones((4, 64))
        matrix[1, 2] = peak
        terms = [one.terms[0] for one in candidates(linear, matrix, sensitivity, chis=())]
        assert {term.bits for term in terms if term.kind == "quantized"} == bits
        assert terms[-1] == linear.terms[0]


def test_rows_of_a_large_matrix_stand_for_all() -> None:
    """Row norms and their weights both spread over orders of magnitude, as a vocabulary's do."""
    generator = np.random.default_rng(4)
    size = np.exp(generator.standard_normal(3000))[:, None]
    matrix = size * generator.standard_normal((3000, 32))
    sensitivity = Sensitivity(Moment(moment_of(32)), np.exp(2 * generator.standard_normal(3000)))
    linear = LinearSpec("layer", 3000, 32, None, (Dense("bf16"),))
    quick = candidates(linear, matrix, sensitivity, GRIDS, ())
    full = candidates(linear, matrix, sensitivity, GRIDS, (), sampled=len(matrix))
    assert [(one.bytes, one.terms) for one in quick] == [(one.bytes, one.terms) for one in full]
    ratios = [one.loss / other.loss for one, other in zip(quick[:-1], full[:-1], strict=True)]
    assert all(0.8 < ratio < 1.25 for ratio in ratios) and max(ratios) < 1.1 * min(ratios)
    assert any(ratio != 1 for ratio in ratios)


def test_a_sampled_matrix_is_checked_in_full() -> None:
    matrix = np.ones((3000, 32))
    matrix[7, 3] = np.nan
    linear = LinearSpec("layer", 3000, 32, None, (Dense("bf16"),))
    with pytest.raises(ConfigError, match="not finite"):
        candidates(linear, matrix, Sensitivity(Moment(moment_of(32)), np.r_[np.zeros(2999), 1.0]), GRIDS, ())


class Listening(ReferenceOps):
    """The reference ops, that keep what the first output projection is given."""

    def linear(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        if layer.spec.name == "model.layers.0.self_attn.o_proj":
            self.heard = x.flatten(0, 1).double().numpy()
        result: torch.Tensor = super().linear(layer, x)
        return result


@pytest.mark.usefixtures("exact_products")
def test_drift_is_what_the_stream_has_lost(folder: Path, tmp_path: Path) -> None:
    """Only the embedding is changed, so at the first output projection the stream differs by the embedded tokens."""
    source = Checkpoint(folder)
    architecture = source.architecture
    windows = cut_calibration(TEXT, architecture, window=32)
    ops = Listening(source)
    table = ops.weights(EMBEDDING).weight()
    changed = table + 0.1 * torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
    seen: dict[str, Moment] = {}

    def build(name: str, matrix: NDArray[np.float64], moment: Moment) -> NDArray[np.float32]:
        seen[name] = moment
        return matrix.astype(np.float32)

    Calibration(source, windows, tmp_path).compress(build, embedding=changed.numpy())
    ops.replace(EMBEDDING, changed)
    model = decoder_for(architecture, ops)
    model.hidden(ops.ids(windows.tolist()), ops.new_cache(architecture, len(windows), 32), [32] * len(windows))
    lost = architecture.embedding_multiplier * (table - changed)[windows.reshape(-1)].double().numpy()
    wanted = lost.T @ ops.heard / windows.size / architecture.residual_multiplier
    drift = seen["model.layers.0.self_attn.o_proj"].drift
    assert drift is not None
    np.testing.assert_allclose(drift, wanted, atol=1e-4 * np.abs(wanted).max())
    assert seen["model.layers.0.mlp.down_proj"].drift is not None
    assert seen["model.layers.0.self_attn.q_proj"].drift is None
