"""Layers that take the Hadamard transform of their input: when it is chosen, how they are fitted, what follows from it."""

from __future__ import annotations

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
from mpo_exporter.fit.common import activation_error
from mpo_exporter.fit.layer import build_linear
from mpo_exporter.measure.candidates import Sensitivity, candidates
from mpo_exporter.measure.survey import Survey, packed, survey, unpacked
from mpo_exporter.measure.tried import transform_gain
from mpo_exporter.plan.file import read_plan, write_plan
from mpo_exporter.plan.options import Options, Target
from mpo_exporter.quantize.grid import Grid
from mpo_exporter.terms import hadamard_block
from mpo_formats import ConfigError, Dense, LinearSpec, Mpo, Quantized
from mpo_formats.packing import hadamard_transform
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import export_folder, forward, granite_config, network, some_ids, write_folder

LAYER = LinearSpec("layer", 48, 64, None, (Dense("f32"),))
TEXT = TokenText("calibration", np.array(some_ids(24 * 32), np.int64), 0, "1" * 64)
HELD_OUT = TokenText("held-out", np.array(some_ids(512, 9), np.int64), 0, "2" * 64)
Matrix = NDArray[np.float64]


def outliers(columns: int = 64, seed: int = 0) -> Matrix:
    """The moment of inputs of which a few are 30 times as large as the others."""
    source = np.random.default_rng(seed)
    x = source.standard_normal((2000, columns)) * np.where(np.arange(columns) % 23 == 5, 30.0, 1.0)
    return np.asarray(x.T @ x / len(x))


def matrix(seed: int = 1) -> Matrix:
    return np.random.default_rng(seed).standard_normal((48, 64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose norms make some inputs of every layer ten times as large as the others."""
    place = tmp_path_factory.mktemp("source") / "model"
    write_folder(place, granite_config(hidden_size=32, intermediate_size=64, model_type="granite"))
    from safetensors.torch import load_file, save_file

    tensors = load_file(place / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor[5::11] *= 10
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


@pytest.fixture(scope="module")
def surveyed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Survey:
    source = Checkpoint(folder)
    windows = cut_calibration(TEXT, source.architecture, window=32)
    return survey(source, Calibration(source, windows, tmp_path_factory.mktemp("spill")))


def test_moments_are_turned_in_place_and_back() -> None:
    second, cross, drift = outliers(), np.float32(outliers(seed=1)), np.float32(matrix())
    moment = Moment(second.copy(), cross.copy(), 7, drift.copy())
    before = moment.hessian(32).matrix.clone()
    transform = hadamard_transform(np.eye(64), 32)
    moment.turn(Basis(32))
    np.testing.assert_allclose(moment.second, transform @ second @ transform, atol=1e-9)
    np.testing.assert_allclose(moment.cross, transform @ cross @ transform, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(moment.drift, drift @ transform, atol=1e-5)
    np.testing.assert_allclose(moment.root @ moment.root.T, moment.second, atol=1e-9)
    assert not torch.allclose(moment.hessian(32).matrix.diagonal().sort()[0], before.diagonal().sort()[0])
    moment.turn(Basis(16))
    moment.turn(PLAIN)
    np.testing.assert_allclose(moment.second, second, atol=1e-9)
    torch.testing.assert_close(moment.hessian(32).matrix, before)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_integers_of_transformed_inputs_lose_less_where_inputs_have_outliers(bits: int) -> None:
    errors = []
    for block in (0, 64):
        linear = replace(LAYER, terms=(Quantized(bits, 32, False),), hadamard=block)
        built = build_linear(linear, matrix().astype(np.float32), "f32", Moment(outliers()))
        errors.append(activation_error(matrix() - built.matrix, outliers()))
    assert errors[1] < 0.7 * errors[0]
    basis, gain = transform_gain(LAYER, matrix(), Sensitivity(Moment(outliers()), np.ones(48)))
    assert basis == Basis(64) and gain > 1.5


def test_cores_beside_integers_are_fitted_in_the_same_basis() -> None:
    terms = (Quantized(3, 32, False), Mpo((48, 1), (1, 64), (8,), "f16", 0))
    linear = replace(LAYER, terms=terms, hadamard=64)
    moment = Moment(outliers())
    both = build_linear(linear, matrix().astype(np.float32), "f32", moment)
    alone = build_linear(replace(linear, terms=terms[:1]), matrix().astype(np.float32), "f32", moment)
    errors = [activation_error(matrix() - one.matrix, outliers()) for one in (both, alone)]
    assert errors[0] < 0.95 * errors[1]


def test_candidates_with_a_transform_expect_what_is_measured() -> None:
    found = candidates(
        LAYER, matrix(), Sensitivity(Moment(outliers()), np.ones(48)), (Grid(3, 32),), (), basis=Basis(64)
    )
    assert [one.hadamard for one in found] == [64, 0] and found[-1].terms == LAYER.terms
    built = build_linear(found[0].stored(LAYER), matrix().astype(np.float32), "f32", Moment(outliers()))
    difference = matrix() - built.matrix
    measured = float(np.trace(difference @ outliers() @ difference.T)) / 2
    assert 0.6 < measured / found[0].loss < 1.3


@pytest.mark.parametrize(("columns", "block"), [(64, 64), (576, 64), (12800, 128), (4096, 128), (48, 16), (172, 0)])
def test_blocks_divide_the_inputs(columns: int, block: int) -> None:
    assert hadamard_block(columns) == block


def test_the_survey_says_what_the_transform_gains_and_is_kept_whole(folder: Path, surveyed: Survey) -> None:
    turned = [name for name, gain in surveyed.gains.items() if gain > 1]
    assert len(turned) > len(surveyed.candidates) / 2
    assert unpacked(packed(surveyed, 1.0)).gains == surveyed.gains
    for linear in Checkpoint(folder).spec.linears:
        blocks = {one.hadamard for one in surveyed.candidates[linear.name][:-1]}
        assert blocks == {hadamard_block(linear.in_features) if linear.name in turned else 0}
        plain = replace(linear, terms=(Quantized(3, 32, False),))
        loss, other = surveyed.loss(plain), surveyed.loss(replace(plain, hadamard=max(blocks)))
        assert loss and other and loss == pytest.approx(other * surveyed.gains[linear.name])


def test_files_with_transforms_are_better_at_the_same_size_and_plans_keep_them(
    folder: Path, surveyed: Survey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPO_HOME", str(tmp_path / "home"))
    size, found = Target(bits_per_weight=13), []
    for name, options in {
        "plain": Options("auto", target=size, transforms="none"),
        "turned": Options("auto", target=size),
    }.items():
        result = export_folder(folder, tmp_path / f"{name}.mpo", options, calibration=TEXT, text=HELD_OUT)
        assert result.comparison is not None
        found.append(result)
    plain, turned = found
    assert not any(linear.hadamard for linear in plain.spec.linears) and plain.spec.version == "0.2"
    assert plain.spec.provenance.options["transforms"] == "none"
    assert any(linear.hadamard for linear in turned.spec.linears) and turned.spec.version == "0.4"
    assert turned.comparison.kl_mean < 0.8 * plain.comparison.kl_mean
    write_plan(tmp_path / "plan.json", turned.spec.linears)
    read = read_plan(tmp_path / "plan.json").layers(Checkpoint(folder).spec)
    assert tuple(read.values()) == turned.spec.linears


def test_what_a_hugging_face_folder_gets_of_such_a_file(folder: Path, tmp_path: Path) -> None:
    terms = (Quantized(4, 32, False),)
    layers = tuple(replace(one, terms=terms, hadamard=32) for one in Checkpoint(folder).spec.linears)
    file = tmp_path / "a.mpo"
    export_folder(folder, file, Options("int4"), layers=layers, calibration=TEXT)
    with pytest.raises(ConfigError, match="q_proj takes a Hadamard transform of its input .*--as dense"):
        write_hf(HfRequest(file, tmp_path / "hf"))
    ids = [some_ids(30)]
    expected = forward(network(file), ids)
    write_hf(HfRequest(file, tmp_path / "hf", form="dense", dtype="f32"))
    np.testing.assert_allclose(forward(network(tmp_path / "hf"), ids), expected, atol=1e-4 * np.abs(expected).max())
