"""Rotations that are fitted to layers and stored: what they gain, when they are chosen, and what becomes of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mpo_exporter.basis import PLAIN, Basis
from mpo_exporter.calibrate.moments import Calibration, Moment
from mpo_exporter.calibrate.windows import cut_calibration
from mpo_exporter.convert.hf import HfRequest, write_hf
from mpo_exporter.export import ExportTask, export
from mpo_exporter.fit.common import activation_error
from mpo_exporter.fit.layer import build_linear
from mpo_exporter.fit.rotation import (
    balance,
    conditional,
    fit,
    price,
    rotated,
    rotation_block,
    row_step,
    squared_ranges,
)
from mpo_exporter.heal.trainable import Trainables
from mpo_exporter.measure.survey import Survey, packed, survey, unpacked
from mpo_exporter.plan.file import read_plan, write_plan
from mpo_exporter.plan.options import Options, Target
from mpo_exporter.source import open_source
from mpo_formats import ConfigError, Dense, LinearSpec, MpoFile, PlanError, Quantized, reference
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import export_folder, forward, granite_config, network, some_ids, write_folder
from tests.transform_cases import random_basis, turned

LAYER = LinearSpec("layer", 96, 64, None, (Dense("f32"),))
TEXT = TokenText("calibration", np.array(some_ids(24 * 32), np.int64), 0, "1" * 64)
Matrix = NDArray[np.float64]


def moment(seed: int = 0) -> Moment:
    """The moment of 64 inputs of which a few are much larger than the others."""
    source = np.random.default_rng(seed)
    x = source.standard_normal((2000, 64)) @ source.standard_normal((64, 64)) / 8
    x *= np.where(np.arange(64) % 23 == 5, 20.0, 1.0)
    return Moment(x.T @ x / len(x))


def matrix(seed: int = 1) -> Matrix:
    return np.random.default_rng(seed).standard_normal((96, 64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("source") / "model"
    write_folder(place, granite_config(hidden_size=64, intermediate_size=256, model_type="granite"))
    return place


@pytest.fixture(scope="module")
def surveyed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Survey:
    source = Checkpoint(folder)
    windows = cut_calibration(TEXT, source.architecture, window=32)
    return survey(source, Calibration(source, windows, tmp_path_factory.mktemp("spill")), transforms="fitted")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_integers_in_a_fitted_basis_lose_less_than_in_the_hadamard_basis(bits: int) -> None:
    fitted = rotated([LAYER], [(matrix(), np.ones(96))], moment(), 32)
    errors = []
    for basis in (Basis(32), fitted):
        linear = replace(basis.of(LAYER), terms=(Quantized(bits, 32, False),))
        built = build_linear(linear, matrix().astype(np.float32), "f32", moment(), None, None, basis)
        errors.append(activation_error(matrix() - built.matrix, moment().second))
    assert errors[1] < 0.93 * errors[0]


def test_the_gradient_by_hand_is_that_of_the_ranges() -> None:
    torch.manual_seed(0)
    weights, places, cost = torch.randn(50, 16), torch.arange(50) % 3, torch.tensor([1.0, 3.0, 0.5])
    turn = torch.linalg.qr(torch.randn(16, 16)).Q.requires_grad_()
    ranges, gradient = squared_ranges(weights, turn.detach(), places, cost)
    expected = ((weights @ turn) ** 8).mean(1) ** 0.25
    torch.testing.assert_close(ranges, torch.stack([expected[places == one].sum() for one in range(3)]).detach())
    (cost[places] * expected).sum().backward()
    torch.testing.assert_close(gradient, turn.grad, rtol=1e-4, atol=1e-4)


def test_costs_of_a_block_are_those_of_the_whole_hessian_in_any_basis() -> None:
    second = moment().second
    blocks = conditional(second, 16)
    found = np.array([np.linalg.slogdet(one)[1] for one in blocks])
    plain = Moment(second.copy()).pivots(16, PLAIN).astype(np.float64)
    np.testing.assert_allclose(found, np.log(plain).reshape(4, 16).sum(1), rtol=1e-3, atol=1e-2)


def test_a_whitening_spreads_blocks_alike_and_keeps_volumes() -> None:
    torch.manual_seed(1)
    weights = torch.randn(4000, 16) @ torch.diag(torch.linspace(1, 3, 16))
    whitening, inverse = balance(weights)
    torch.testing.assert_close(whitening @ inverse, torch.eye(16), rtol=0, atol=1e-5)
    assert math.isclose(float(torch.linalg.det(whitening)), 1, rel_tol=1e-4)
    values = torch.linalg.eigvalsh((weights @ inverse).T @ (weights @ inverse))
    assert float(values[-1] / values[0]) < 1.001
    flat, _ = balance(torch.zeros(5, 16))
    assert torch.isfinite(flat).all()


def test_what_is_stored_is_inverted_exactly() -> None:
    basis, plain = random_basis("layer", 16, 4, bits=4), matrix()
    np.testing.assert_allclose(basis.back(basis.turned(plain)), plain, atol=1e-10)
    x = np.random.default_rng(2).standard_normal((5, 64))
    assert basis.matrices is not None
    transformed = np.concatenate([x[:, 16 * k : 16 * k + 16] @ basis.matrices[k].T for k in range(4)], 1)
    np.testing.assert_allclose(transformed @ basis.turned(plain).T, x @ plain.T, atol=1e-10)
    one, before = moment(), moment().second
    one.turn(basis)
    one.turn(Basis(32))
    one.turn(PLAIN)
    np.testing.assert_allclose(one.second, before, atol=1e-8 * before.max())


def test_when_rotations_pay() -> None:
    assert rotation_block([replace(LAYER, out_features=8)]) == 0
    assert rotation_block([replace(LAYER, out_features=4096)]) == 64
    wide = replace(LAYER, out_features=16384, in_features=2048)
    assert rotation_block([wide]) == 128 and row_step([wide]) == 8
    basis = random_basis("layer", 16, 1, bits=8)
    assert math.isclose(price(basis, [LAYER]), 4 ** (8 * (16 * 16 + 2 * 16) / (96 * 64)))
    assert price(Basis(16), [LAYER]) == 1


def test_fits_do_not_depend_on_the_scale_and_take_any_numbers() -> None:
    rows = matrix().astype(np.float32)
    second = moment().second
    first, scaled = fit([rows], second, 16, 5), fit([1e-4 * rows], 1e6 * second, 16, 5)
    np.testing.assert_allclose(first, scaled, atol=1e-3)
    assert np.isfinite(fit([0 * rows], 0 * second, 16, 3)).all()


def test_the_survey_shares_a_rotation_among_layers_with_one_input(folder: Path, surveyed: Survey) -> None:
    stored = {name: row[0].transform for name, row in surveyed.candidates.items()}
    used = {name: one for name, one in stored.items() if one is not None}
    assert used and {one.name for one in used.values()} == set(surveyed.bases)
    for name, one in used.items():
        if name.endswith("up_proj"):
            assert one.name == name.replace("up_proj", "gate_proj") and stored[one.name] == one
        assert surveyed.gains[name] > 1
    again = unpacked(packed(surveyed, 1.0))
    assert again.candidates == surveyed.candidates and again.bases == surveyed.bases
    for name, basis in surveyed.bases.items():
        assert basis.matrices is not None and again.bases[name].matrices is not None
        np.testing.assert_array_equal(again.bases[name].matrices, basis.matrices)
    source = Checkpoint(folder)
    assert source.spec.linears[0].transform is None


def test_a_file_keeps_the_rotations_of_its_plan(
    folder: Path, surveyed: Survey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPO_HOME", str(tmp_path / "home"))
    file, options = tmp_path / "a.mpo", Options("auto", target=Target(bits_per_weight=11))
    export_folder(folder, file, options, calibration=TEXT, surveyed=surveyed)
    with MpoFile(file, verify=True) as opened, open_source(folder) as source:
        spec = opened.spec
        assert spec.version == "0.5" and spec.transforms()
        for one in spec.linears:
            if one.transform is not None:
                np.testing.assert_allclose(
                    reference.transform_matrices(opened, one.transform), surveyed.bases[one.transform.name].matrices
                )
                dense = source.weights.array(f"{one.name}.0.weight").astype(np.float64)
                assert np.linalg.norm(reference.matrix(opened, one) - dense) < 0.5 * np.linalg.norm(dense)
        trained = Trainables(opened, [one.name for one in spec.linears], moving=True)
        trained.aim(source.weights)
        for name, layer in trained.layers.items():
            expected = reference.matrix(opened, spec.linear(name))
            found = layer.linear(None).weight().detach().numpy()
            np.testing.assert_allclose(found, expected, atol=0.5 * np.abs(expected).max())
    write_plan(tmp_path / "plan.json", spec.linears)
    read = read_plan(tmp_path / "plan.json").layers(Checkpoint(folder).spec)
    assert tuple(read.values()) == spec.linears
    with pytest.raises(PlanError, match="the stored transform of .*, which was not fitted to this model"):
        export_folder(folder, tmp_path / "b.mpo", options, layers=spec.linears, surveyed=replace(surveyed, bases={}))


def test_what_a_hugging_face_folder_gets_of_such_a_file(folder: Path, tmp_path: Path) -> None:
    layers, bases = turned(Checkpoint(folder).spec.linears, 16)
    layers = tuple(replace(one, terms=(Quantized(4, 32, False),)) for one in layers)
    file = tmp_path / "a.mpo"
    with open_source(folder) as source:
        export(source, ExportTask(file, Options("int4"), layers=layers, calibration=TEXT, surveyed=bases))
    with pytest.raises(ConfigError, match="q_proj takes a stored transform of its input .*--as dense"):
        write_hf(HfRequest(file, tmp_path / "hf"))
    ids = [some_ids(30)]
    expected = forward(network(file), ids)
    write_hf(HfRequest(file, tmp_path / "hf", form="dense", dtype="f32"))
    np.testing.assert_allclose(forward(network(tmp_path / "hf"), ids), expected, atol=1e-4 * np.abs(expected).max())
