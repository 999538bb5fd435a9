"""The API under the literature's names: what it measures and writes is what the exporter measures and writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mpo_exporter.compactifai import (
    CompactifAICompressor,
    GraniteSource,
    LayerSensitivityProfiler,
    load_granite_model,
    prepare_healing_data,
    prepare_validation_data,
)
from mpo_exporter.fit.layer import widen
from mpo_exporter.fit.shapes import balanced_shape
from mpo_exporter.plan.options import Choice, Options
from mpo_formats import CheckpointError, ConfigError, Mpo, MpoFile, OutputError
from mpo_formats.reference import matrix
from mpo_runtime.measure import log_softmax
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import BOS, export_folder, forward, granite_config, network, some_ids, write_folder

CONFIG = granite_config(hidden_size=64, intermediate_size=128, num_hidden_layers=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GraniteSource:
    return load_granite_model(write_folder(tmp_path_factory.mktemp("source") / "model", CONFIG, dtype=torch.bfloat16))


@pytest.fixture(scope="module")
def text(model: GraniteSource) -> TokenText:
    return TokenText("random", np.array(some_ids(96, model.architecture.vocab_size), np.int64), 0, "0" * 64)


def test_the_demo_model_loads_with_its_texts() -> None:
    demo = load_granite_model("demo")
    validation, healing = prepare_validation_data(demo, max_tokens=100), prepare_healing_data(demo, max_tokens=50)
    assert demo.architecture.model_type == "granite"
    assert (validation.ids.size, healing.ids.size) == (100, 50)
    assert validation.sha256 != healing.sha256  # nothing is judged on what it was trained on


def test_bad_arguments_are_named(model: GraniteSource, text: TokenText) -> None:
    with pytest.raises(ConfigError, match="bond_dimension: expected a whole number of at least 1, found 0"):
        CompactifAICompressor(bond_dimension=0)
    with pytest.raises(ConfigError, match=r"compression_ratio: expected more than 0 and at most 1, found 1\.5"):
        CompactifAICompressor(compression_ratio=1.5)
    with pytest.raises(ConfigError, match="top_k: expected a whole number of at least 1"):
        LayerSensitivityProfiler(model, text).get_compression_candidates(top_k=0)
    with pytest.raises(ConfigError, match="max_tokens"):
        prepare_validation_data(load_granite_model("demo"), max_tokens=1)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_granite_model("no-such-model")


def test_a_layers_sensitivity_is_what_an_export_of_that_layer_alone_measures(
    model: GraniteSource, text: TokenText, tmp_path: Path
) -> None:
    """The profile swaps a matrix in memory; the oracle exports a file in which that layer alone has cores."""
    name, chi = "model.layers.1.mlp.down_proj", 3
    [found] = [one for one in LayerSensitivityProfiler(model, text, chi).profile() if one.layer == name]
    source = Checkpoint(model.folder)
    dims = balanced_shape(*source.array(f"{name}.0.weight").shape, 2)
    cores = Mpo(*dims, (chi,), "f16", 0)
    layers = tuple(
        dataclasses.replace(linear, terms=(cores,)) if linear.name == name else linear for linear in source.spec.linears
    )
    path = export_folder(model.folder, tmp_path / "one.mpo", Options("dense"), layers=layers).path
    half = text.ids.size // 2
    rows = [[BOS, *text.ids[:half].tolist()], [BOS, *text.ids[half:].tolist()]]  # 96 tokens do not fit into 64
    q, p = (log_softmax(forward(network(place), rows)) for place in (path, model.folder))
    assert found.kl_mean == pytest.approx(float((np.exp(p) * (p - q)).sum(-1).mean()), rel=2e-3)
    assert found.same_top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).mean()))
    with MpoFile(path) as file:
        stored = matrix(file, file.spec.linear(name))
    dense = widen(source.array(f"{name}.0.weight"), "bf16")
    assert found.error == pytest.approx(float(np.linalg.norm(dense - stored) / np.linalg.norm(dense)), rel=1e-6)
    assert "mpo" in found.terms or "χ" in found.terms


def test_candidates_are_the_least_sensitive_layers(model: GraniteSource, text: TokenText) -> None:
    profiler = LayerSensitivityProfiler(model, text, bond_dimension=2)
    profile = profiler.profile()
    assert len(profile) == 14  # seven matrices in each of two blocks
    assert profile == sorted(profile, key=lambda item: item.kl_mean)
    assert profiler.get_compression_candidates(top_k=3) == profile[:3]
    assert profile[-1].kl_mean > profile[0].kl_mean >= 0


def test_compression_writes_cores_for_the_least_sensitive_share(
    model: GraniteSource, text: TokenText, tmp_path: Path
) -> None:
    compressor = CompactifAICompressor(bond_dimension=4, compression_ratio=0.3)
    profile = compressor.profile_layer_sensitivity(model, text)
    result = compressor.compress_model(model, tmp_path / "out.mpo", text)
    assert result.layers == tuple(item.layer for item in profile[:4])
    with MpoFile(result.path) as file:
        cores = {linear.name for linear in file.spec.linears if linear.terms[0].kind == "mpo"}
        assert cores == set(result.layers)
    stats, quality = result.compression_stats, result.evaluation_results
    assert stats["original_parameters"] == model.architecture.parameters()
    assert stats["parameter_reduction"] == 1 - stats["compressed_parameters"] / stats["original_parameters"]
    assert stats["size_reduction"] == 1 - result.path.stat().st_size / stats["original_bytes"]
    assert quality["perplexity_increase"] == quality["perplexity"] / quality["original_perplexity"] - 1
    assert quality["speedup"] > 0
    read = json.loads(result.to_json())
    assert read["compression_stats"] == stats and read["layers"] == list(result.layers)
    with pytest.raises(OutputError, match="exists already"):
        compressor.compress_model(model, result.path, text)


def test_a_plan_that_names_a_layer_that_does_not_exist_is_refused(model: GraniteSource, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.layers\.9\.mlp\.up_proj"):
        export_folder(
            model.folder, tmp_path / "out.mpo", Options("paper", choice=Choice(names=("model.layers.9.mlp.up_proj",)))
        )
    with MpoFile(
        export_folder(model.folder, tmp_path / "few.mpo", Options("paper", chi=2, choice=Choice(names=()))).path
    ) as file:
        assert all(linear.terms[0].kind == "quantized" for linear in file.spec.linears)
    source = Checkpoint(model.folder)
    assert source.architecture == model.architecture
    source.close()
