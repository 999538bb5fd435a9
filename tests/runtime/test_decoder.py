"""The forward pass against transformers: the shared model, and random configurations in every spelling."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import GraniteForCausalLM, LlamaForCausalLM
from transformers.utils import logging

from mpo_formats.architecture import ModelType
from mpo_runtime.backends.ops import Array
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.models.registry import MODELS
from tests.helpers import (
    Config,
    forward,
    granite_config,
    network,
    random_tensors,
    some_ids,
    write_folder,
    write_weights,
)
from tests.runtime.native_cases import needs_native

logging.set_verbosity_error()
logging.disable_progress_bar()

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# What a Llama's config.json does not have.
MULTIPLIERS = dict.fromkeys(
    ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"), None
)


def model_type(folder: Path) -> str:
    """The model_type of a folder's config.json."""
    return str(json.loads((folder / "config.json").read_text())["model_type"])


def oracle(folder: Path, rows: list[list[int]]) -> NDArray[np.float32]:
    """Logits [B, S, vocabulary] as transformers computes them in fp32 from the same folder."""
    kind = {"granite": GraniteForCausalLM, "llama": LlamaForCausalLM}[model_type(folder)]
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor(rows)).logits
    return logits.numpy()


def rope(draw: st.DrawFn) -> Config:
    """RoPE settings: each scaling, under transformers 4's keys or under those of transformers 5."""
    theta = draw(st.sampled_from([100.0, 10000.0, 5e5]))
    kind = draw(st.sampled_from(["default", "linear", "llama3"]))
    scaling: Config = {"rope_type": kind}
    if kind != "default":
        scaling["factor"] = draw(st.sampled_from([2.0, 8.0]))
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    spelling = draw(st.sampled_from(["rope_parameters", "rope_scaling", "type"]))
    if spelling == "rope_parameters":
        return {"rope_theta": None, "rope_parameters": {**scaling, "rope_theta": theta}}
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if spelling == "type" and kind == "linear":
        scaling["type"] = scaling.pop("rope_type")
    return {"rope_theta": theta, "rope_scaling": scaling}


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Any small Granite or Llama."""
    keys, size = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6, 16]))
    heads = keys * draw(st.integers(1, 3))
    changes: Config = {
        "vocab_size": 40,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "hidden_size": heads * size,
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "bos_token_id": 0,
        "eos_token_id": draw(st.sampled_from([1, [1, 2]])),
        **{name: draw(st.booleans()) for name in ("tie_word_embeddings", "attention_bias", "mlp_bias")},
        **rope(draw),
    }
    if draw(st.booleans()):
        changes["head_dim"] = draw(st.sampled_from([2, 8, 10]))
    if draw(st.integers(0, 3)) == 0:
        return granite_config(**changes, **MULTIPLIERS, model_type="llama", architectures=["LlamaForCausalLM"])
    multipliers = {
        "embedding_multiplier": draw(st.sampled_from([1.0, 12.0])),
        "residual_multiplier": draw(st.sampled_from([0.22, 1.0])),
        "attention_multiplier": draw(st.sampled_from([0.0078125, 0.25, 1.0])),
        "logits_scaling": draw(st.sampled_from([0.5, 8.0])),
    }
    left_out = {name: None for name in multipliers if draw(st.integers(0, 4)) == 0}
    return granite_config(**changes, **multipliers | left_out)


@given(config=configs(), dtype=st.sampled_from(sorted(TYPES)), shards=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_any_configuration_equals_transformers(config: Config, dtype: str, shards: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = write_folder(Path(name), config, seed=seed, dtype=TYPES[dtype], shards=shards)
        rows = [some_ids(21, seed, 40), some_ids(21, seed + 1, 40)]
        expected = oracle(folder, rows)
        assert expected.std() > 0.05  # numbers so small would be equal to anything
        np.testing.assert_allclose(forward(network(folder), rows), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=["linear", "llama3"],
)
def test_rope_scaling_changes_the_logits(tmp_path: Path, scaling: dict[str, Any]) -> None:
    """The oracle test would pass if both sides ignored the scaling."""
    plain = write_folder(tmp_path / "plain")
    scaled = write_folder(tmp_path / "scaled", granite_config(rope_scaling=scaling))
    rows = [some_ids(40)]
    difference = np.abs(forward(network(plain), rows) - forward(network(scaled), rows))
    assert difference.max() > 1e-2
    np.testing.assert_allclose(forward(network(scaled), rows), oracle(scaled, rows), atol=1e-4)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["stories260K-granite", "stories260K-llama"])
def test_the_shared_model_equals_transformers(shared: Path, name: str) -> None:
    folder = shared / "models" / name
    model = network(folder)
    # The whole context: rotations at the last positions are the hardest to get right.
    rows = [[1, *some_ids(model.architecture.max_position_embeddings - 1, seed, 512)] for seed in (1, 2)]
    np.testing.assert_allclose(forward(model, rows), oracle(folder, rows), atol=1e-4)


def test_weights_rebuilt_at_every_use_give_the_same_logits(tmp_path: Path) -> None:
    """The path of machines whose memory does not hold the matrices in float32."""
    from mpo_runtime.backends.reference import ReferenceOps
    from mpo_runtime.loading import open_weights
    from mpo_runtime.models.registry import decoder_for

    weights = open_weights(write_folder(tmp_path / "model", dtype=torch.bfloat16))
    rows = [some_ids(9)]
    held, rebuilt = (
        forward(decoder_for(weights.spec.architecture, ReferenceOps(weights, held=held)), rows)
        for held in (True, False)
    )
    np.testing.assert_array_equal(held, rebuilt)


def test_every_model_type_has_a_file_of_its_name() -> None:
    assert set(MODELS) == set(get_args(ModelType))
    for kind, model in MODELS.items():
        assert model.__module__ == f"mpo_runtime.models.{kind}" and issubclass(model, Decoder)


class WithoutMlp(Decoder):
    """An architecture that differs in one part."""

    def feed_forward(self, h: Array, name: str) -> Array:
        return self.ops.add_scaled(h, h, -1.0)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_an_overridden_part_is_what_a_backend_runs(tmp_path: Path, backend: str) -> None:
    folder, rows = write_folder(tmp_path / "model"), [some_ids(9)]
    whole = network(folder, backend=backend, activations="float")
    found = forward(WithoutMlp(whole.architecture, whole.ops), rows)
    tensors = random_tensors(granite_config(), 0, torch.float32)
    zeroed = {name: torch.zeros_like(array) if "down_proj" in name else array for name, array in tensors.items()}
    without = write_folder(tmp_path / "without")
    write_weights(without, zeroed)
    np.testing.assert_allclose(found, oracle(without, rows), atol=1e-4)
    assert np.abs(found - forward(whole, rows)).max() > 1e-2
