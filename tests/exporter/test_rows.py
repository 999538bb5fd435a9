"""Rounding that minds outputs: against the best correction by dense solves, on its own error, and the moments it needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mpo_exporter.calibrate.fisher import OutputOps, Squares, drawn_chances, head_gradient, output_fisher
from mpo_exporter.calibrate.moments import Moment
from mpo_exporter.calibrate.outputs import Outputs
from mpo_exporter.calibrate.store import Memory
from mpo_exporter.effort import BEST
from mpo_exporter.plan.options import Options, Target
from mpo_exporter.quantize.gptq import compensated
from mpo_exporter.quantize.rows import DAMPING, SHRINKAGE, compensated_rows, row_root
from mpo_formats import ConfigError
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import VOCABULARY, export_folder, granite_config, write_folder

Matrix = NDArray[np.float64]
WINDOWS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 12))


def correlated(size: int, samples: int, seed: int) -> Matrix:
    """A second moment with strong correlations and diagonal entries of very different sizes."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((samples, 4)) @ random.standard_normal((4, size))
    values = (values + random.standard_normal((samples, size))) * random.uniform(0.2, 3, size)
    return values.T @ values / samples


def case(seed: int, rows: int = 40, columns: int = 64) -> tuple[Matrix, Moment, Matrix]:
    """W, a moment of its inputs, and one of the gradients by its outputs."""
    matrix = np.random.default_rng(seed).standard_normal((rows, columns))
    return matrix, Moment(correlated(columns, 4 * columns, seed + 1)), correlated(rows, 4 * rows, seed + 2)


def damped(outputs: Matrix) -> Matrix:
    """G as the rounding takes it, in units of its mean."""
    mean = outputs.diagonal().mean()
    diagonal = np.diag(outputs.diagonal())
    return ((1 - SHRINKAGE) * outputs + SHRINKAGE * diagonal) / mean + DAMPING * np.eye(len(outputs))


def reference(matrix: Matrix, moment: Moment, outputs: Matrix, bits: int, group: int, rows: int) -> Matrix:
    """The same rounding, each block aimed at the best correction of all rows that are left, by solves with G itself."""
    whole = damped(outputs)
    order = np.argsort(-outputs.diagonal(), kind="stable")
    lost, found = np.zeros_like(matrix), np.zeros_like(matrix)
    for start in range(0, len(matrix), rows):
        done, left = order[:start], order[start:]
        block = left[:rows]
        best = -np.linalg.solve(whole[np.ix_(left, left)], whole[np.ix_(left, done)] @ lost[done])
        aim = matrix[block] - best[: len(block)]
        found[block] = compensated(aim, moment, bits, group).matrix()
        lost[block] = matrix[block] - found[block]
    return found


def loss(matrix: Matrix, found: Matrix, moment: Moment, outputs: Matrix) -> float:
    """tr[G Δ C Δᵀ]."""
    change = matrix - found
    return float(np.sum((outputs @ change) * (change @ moment.second)))


@pytest.mark.parametrize(("rows", "bits"), [(1, 2), (7, 3), (16, 2)])
def test_each_block_is_aimed_at_the_best_correction(rows: int, bits: int) -> None:
    matrix, moment, outputs = case(rows)
    found = compensated_rows(matrix, moment, outputs, bits, 32, rows=rows).matrix()
    wanted = reference(matrix, moment, outputs, bits, 32, rows)
    # A value on the edge between two codes may fall to either side.
    assert np.mean(np.abs(found - wanted) > 1e-3) < 0.02


def test_the_error_in_both_norms_falls() -> None:
    for seed in range(5):
        matrix, moment, outputs = case(100 + seed)
        for bits, zeros in ((2, False), (3, True)):
            alone = compensated(matrix, moment, bits, 32, zeros=zeros)
            found = compensated_rows(matrix, moment, outputs, bits, 32, zeros=zeros)
            assert (found.zero is None) == (not zeros) and found.bits == bits
            ratio = loss(matrix, found.matrix(), moment, outputs) / loss(matrix, alone.matrix(), moment, outputs)
            assert ratio < 0.8, (seed, bits)


def test_without_correlations_it_is_the_rounding_row_by_row() -> None:
    matrix, moment, outputs = case(3)
    wanted = compensated(matrix, moment, 3, 32)
    for plain in (np.diag(outputs.diagonal()), np.zeros_like(outputs)):
        found = compensated_rows(matrix, moment, plain, 3, 32)
        assert np.mean(found.codes != wanted.codes) < 0.01


def test_the_root_is_that_of_the_damped_moment() -> None:
    outputs = correlated(30, 100, 0)
    order, root = row_root(outputs)
    np.testing.assert_allclose(root @ root.T, damped(outputs)[np.ix_(order, order)], atol=1e-12)
    assert np.array_equal(root, np.triu(root)) and np.all(np.diff(outputs.diagonal()[order]) <= 0)


def test_what_does_not_fit_is_refused() -> None:
    matrix, moment, outputs = case(1)
    with pytest.raises(ConfigError, match="outputs: expected a second moment of 40 x 40, found"):
        compensated_rows(matrix, moment, outputs[:9, :9], 2, 32)
    outputs[2, 3] = np.nan
    with pytest.raises(ConfigError, match="outputs: row 2, column 3 is nan"):
        compensated_rows(matrix, moment, outputs, 2, 32)


def by_autograd(source: Checkpoint, seed: int) -> dict[str, Matrix]:
    """G of every layer from one graph of the whole model, with the same labels."""
    ops = OutputOps(source)
    model = decoder_for(source.spec.architecture, ops)
    states = [model.embed(ops.ids(WINDOWS.tolist())).requires_grad_()]
    for block in range(source.spec.architecture.num_hidden_layers):
        states.append(model.block(states[-1], ops.block_cache(model.architecture, *WINDOWS.shape), block))
    outputs = dict(ops.outputs)
    last = head_gradient(model, Squares(), states[-1].detach(), drawn_chances(seed, *WINDOWS.shape))
    gradients = torch.autograd.grad(states[-1], list(outputs.values()), last)
    flat = [gradient.reshape(-1, gradient.shape[-1]).double().numpy() for gradient in gradients]
    return {name: one.T @ one / WINDOWS.size for name, one in zip(outputs, flat, strict=True)}


@pytest.mark.usefixtures("exact_products")
def test_moments_of_outputs_are_those_of_the_whole_graph(tmp_path: Path) -> None:
    source = Checkpoint(write_folder(tmp_path))
    outputs, wanted = Outputs(source, WINDOWS, seed=5), by_autograd(source, 5)
    outputs.measure()
    fisher = output_fisher(source, WINDOWS, 5)
    assert len(wanted) == 7 * source.spec.architecture.num_hidden_layers
    for name, matrix in wanted.items():
        moment = outputs.moment(name)
        assert moment is not None
        np.testing.assert_allclose(moment, matrix, rtol=1e-4, atol=1e-6 * np.abs(matrix).max())
        np.testing.assert_allclose(moment.diagonal(), fisher[name], rtol=1e-4)
    assert outputs.moment("model.embed_tokens") is None


def test_moments_of_a_finished_run_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, store, told = Checkpoint(write_folder(tmp_path)), Memory(), list[Any]()
    first, again = Outputs(source, WINDOWS, store), Outputs(source, WINDOWS, store)
    first.measure(lambda *done: told.append(done))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    monkeypatch.setattr(type(source), "array", lambda *_: pytest.fail("the model was run again"))
    again.measure()
    name = "model.layers.1.mlp.down_proj"
    moment = again.moment(name)
    assert moment is not None and moment is first.moment(name)
    assert not [part for part in store.held if "state" in part]


def test_the_best_effort_rounds_so_and_the_same_twice(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", granite_config(hidden_size=64, intermediate_size=128))
    text = TokenText("text", np.random.default_rng(0).integers(0, 256, 3000), 0, "0" * 64)
    options = Options(target=Target(size=60_000))
    efforts = {"a": BEST, "b": BEST, "c": replace(BEST, outputs=0)}
    a, b, c = (
        export_folder(folder, tmp_path / f"{name}.mpo", options, calibration=text, windows=20, effort=effort).path
        for name, effort in efforts.items()
    )
    assert a.read_bytes() == b.read_bytes()
    assert a.stat().st_size == c.stat().st_size and a.read_bytes() != c.read_bytes()
