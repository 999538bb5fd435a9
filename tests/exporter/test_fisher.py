"""Output gradients against transformers' autograd and against the loss that an error really causes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from mpo_exporter.calibrate.fisher import LOOKUP, output_fisher
from mpo_formats import ConfigError
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import VOCABULARY, granite_config, write_folder

WINDOWS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 12))


def fisher_in_transformers(folder: Path, draws: int) -> dict[str, NDArray[np.float64]]:
    """F_o by whole-model backpropagation, averaged over draws of the labels."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    outputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, __, y, name=name: outputs.update({name: y}))
    source = torch.Generator().manual_seed(1)
    totals: dict[str, torch.Tensor] = {}
    for _ in range(draws):
        logits = model(torch.from_numpy(WINDOWS)).logits
        labels = torch.distributions.Categorical(logits=logits).probs.flatten(0, 1).multinomial(1, generator=source)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 0], reduction="sum")
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        for name, gradient in zip(outputs, gradients, strict=True):
            totals[name] = totals.get(name, torch.zeros(())) + gradient.double().square().mean((0, 1))
    return {name: (total / draws).numpy() for name, total in totals.items()}


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("tied", [True, False])
def test_they_are_those_of_whole_model_backpropagation(tmp_path: Path, tied: bool) -> None:
    """Two means over different draws of the labels: close in every layer's sum, and over its outputs."""
    folder = write_folder(tmp_path, granite_config(tie_word_embeddings=tied))
    wanted = fisher_in_transformers(folder, 120)
    source = Checkpoint(folder)
    draws = [output_fisher(source, WINDOWS, seed, batch=2) for seed in range(120)]
    found = {name: np.mean([draw[name] for draw in draws], axis=0) for name in draws[0]}
    found_head = EMBEDDING if tied else HEAD
    assert set(found) == {found_head if name == HEAD else name for name in wanted} | {LOOKUP}
    for name, values in wanted.items():
        ours = found[found_head if name == HEAD else name]
        assert ours.sum() == pytest.approx(values.sum(), rel=0.3), name
        assert np.corrcoef(ours, values)[0, 1] > 0.8, name


@pytest.mark.usefixtures("exact_products")
def test_the_head_has_the_exact_expectation(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        chances = model(torch.from_numpy(WINDOWS)).logits.softmax(-1).double()
    wanted = (chances * (1 - chances)).mean((0, 1)).numpy() / granite_config()["logits_scaling"] ** 2
    np.testing.assert_allclose(output_fisher(Checkpoint(folder), WINDOWS)[EMBEDDING], wanted, rtol=1e-4)


def test_the_seed_decides(tmp_path: Path) -> None:
    source = Checkpoint(write_folder(tmp_path))
    first, again, other = (output_fisher(source, WINDOWS, seed) for seed in (0, 0, 1))
    name = "model.layers.0.mlp.down_proj"
    np.testing.assert_array_equal(first[name], again[name])
    assert not np.array_equal(first[name], other[name])


def test_lookups_tell_what_an_error_in_the_table_costs(tmp_path: Path) -> None:
    """½ Σ F Δ² of random errors in all rows, untied from the head, against the divergence that they cause."""
    folder = write_folder(tmp_path, granite_config(tie_word_embeddings=False))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().double()
    source = Checkpoint(folder)
    fisher = np.mean([output_fisher(source, WINDOWS, seed)[LOOKUP] for seed in range(10)], axis=0)
    ids = torch.from_numpy(WINDOWS)
    size, costs = 1e-3, []
    with torch.no_grad():
        dense = model(ids).logits.log_softmax(-1)
        table = model.model.embed_tokens.weight
        clean = table.clone()
        for seed in range(20):
            noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            table.copy_(clean + size * noise)
            costs.append((dense.exp() * (dense - model(ids).logits.log_softmax(-1))).sum(-1).mean().item())
    assert np.mean(costs) == pytest.approx(0.5 * fisher.sum() * size**2, rel=0.2)


def test_activations_that_overflow_name_the_block(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    source = Checkpoint(folder)
    arrays = {name: source.array(name) for name in ("model.layers.1.mlp.up_proj.0.weight",)}
    whole = source.array

    def array(name: str) -> NDArray[np.float32]:
        return np.full(arrays[name].shape, 1e38, np.float32) if name in arrays else whole(name)

    source.array = array  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"model\.layers\.1: its output is not finite on the calibration text"):
        output_fisher(source, WINDOWS)
