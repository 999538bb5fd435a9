"""Every family against transformers: random configurations on both backends, token by token, and where settings differ."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from mpo_formats.architecture import ModelType
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.weights.checkpoint import Checkpoint
from mpo_runtime.weights.names import checkpoint_name, spec_names
from tests.families import EVERY, FAMILIES, family_config, write_family
from tests.helpers import Config, forward, network, some_ids
from tests.runtime.native_cases import needs_native

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 37
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SCALINGS: dict[str, Config] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": YARN,
    "yarn of the older spelling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
    "yarn with settings": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 0.8},
    "yarn of DeepSeek": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]


def theirs(model: PreTrainedModel, rows: list[list[int]]) -> NDArray[np.float32]:
    """Logits [B, S, vocabulary] of transformers."""
    with torch.inference_mode():
        return model(torch.tensor(rows)).logits.numpy()


def stepwise(model: Decoder, row: list[int], first: int) -> NDArray[np.float32]:
    """Logits [1, S, vocabulary] of a prompt of `first` tokens, and then of one token at a time."""
    cache = model.ops.new_cache(model.architecture, 1, len(row))
    parts = []
    for ids in (row[:first], *([token] for token in row[first:])):
        hidden = model.hidden(model.ops.ids([ids]), cache, [len(ids)])
        parts.append(model.ops.to_numpy(model.logits(hidden)))
    return np.concatenate(parts, 1)


@st.composite
def configs(draw: st.DrawFn, kind: str) -> Config:
    """Any small model of a family."""
    keys, size, blocks = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6, 16])), draw(st.integers(1, 4))
    heads = keys * draw(st.integers(1, 3))
    window = draw(st.sampled_from([1, 5, 16, 36, 37, 64, 4096]))
    epsilon, inner = draw(st.sampled_from([1e-6, 1e-5, 1e-2])), draw(st.integers(1, 40))
    tied = {"tie_word_embeddings": draw(st.booleans()), "hidden_size": heads * size}
    if kind == "gpt_neo":
        kinds = draw(st.sampled_from([["global"], ["local"], ["global", "local"], ["local", "global", "local"]]))
        types = [[kinds, 1]] * blocks
        sizes = {"num_layers": len(kinds) * blocks, "num_heads": heads, "layer_norm_epsilon": epsilon}
        inner_size = draw(st.sampled_from([None, inner]))
        window = {"attention_types": types, "window_size": window}
        return family_config(kind, **sizes, **tied, **window, intermediate_size=inner_size)
    changes: Config = {
        **tied,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "num_hidden_layers": blocks,
        "intermediate_size": inner,
        "rms_norm_eps": epsilon,
        "rope_theta": draw(st.sampled_from([100.0, 10000.0, 1e6])),
    }
    if scaling := draw(st.sampled_from([None, *SCALINGS.values()])):
        changes["rope_scaling"] = scaling
    if kind in ("mistral", "qwen3"):
        changes["head_dim"] = draw(st.sampled_from([2, 8, 10]))
    if kind in ("qwen3", "granitemoehybrid"):
        changes["attention_bias"] = draw(st.booleans())
    if kind == "mistral":
        changes["sliding_window"] = draw(st.sampled_from([None, window]))
    elif kind == "granitemoehybrid":
        changes |= {"layer_types": ["attention"] * blocks, "shared_intermediate_size": inner}
        changes |= {"mamba_n_heads": 1, "mamba_d_head": 2 * heads * size}
    else:
        changes |= {"sliding_window": window, "use_sliding_window": draw(st.booleans())}
        changes["max_window_layers"] = draw(st.integers(0, 4))
    return family_config(kind, **changes)


@pytest.mark.parametrize("kind", FAMILIES)
@given(data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_any_configuration_equals_transformers(kind: str, data: st.DataObject, seed: int) -> None:
    config = data.draw(configs(kind))
    with tempfile.TemporaryDirectory() as name:
        model = write_family(Path(name), config, seed)
        rows = [some_ids(LENGTH, seed), some_ids(LENGTH, seed + 1)]
        expected = theirs(model, rows)
        assert expected.std() > 0.05  # numbers so small would be equal to anything
        np.testing.assert_allclose(forward(network(Path(name)), rows), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", EVERY)
def test_both_backends_as_a_whole_and_token_by_token(tmp_path: Path, kind: str, backend: str) -> None:
    model = write_family(tmp_path, family_config(kind))
    row = some_ids(LENGTH)
    expected = theirs(model, [row])
    ours = network(tmp_path, backend=backend, activations="float")
    np.testing.assert_allclose(forward(ours, [row, row])[1:], expected, atol=1e-4)
    for first in (1, 20):
        np.testing.assert_allclose(stepwise(ours, row, first), expected, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", EVERY)
def test_tensors_of_several_types_in_one_folder(tmp_path: Path, kind: str, backend: str) -> None:
    """Partners such as q, k and v differ in type; each tensor is used as it is stored."""
    model = write_family(tmp_path, family_config(kind))
    types = [torch.float32, torch.bfloat16, torch.float16]
    tensors = load_file(tmp_path / "model.safetensors")
    mixed = {name: tensors[name].to(types[place % 3]) for place, name in enumerate(sorted(tensors))}
    save_file(mixed, tmp_path / "model.safetensors", {"format": "pt"})
    model.load_state_dict({name: tensor.float() for name, tensor in mixed.items()}, strict=False)
    row = some_ids(LENGTH)
    ours = network(tmp_path, backend=backend, activations="float")
    np.testing.assert_allclose(forward(ours, [row]), theirs(model, [row]), atol=1e-4)


@needs_native
@pytest.mark.parametrize("kind", ["mistral", "gpt_neo"])
def test_windows_in_a_long_context(tmp_path: Path, kind: str) -> None:
    """Contexts so long that the native backend shares a row's positions out among threads, and windows that leave most out."""
    window = {"mistral": {"sliding_window": 700}, "gpt_neo": {"window_size": 700}}[kind]
    model = write_family(tmp_path, family_config(kind, max_position_embeddings=2100, **window))
    row = some_ids(2000)
    expected = theirs(model, [row])
    ours = network(tmp_path, backend="native", activations="float")
    np.testing.assert_allclose(forward(ours, [row]), expected, atol=2e-4)
    np.testing.assert_allclose(stepwise(ours, row, 1990)[:, 1980:], expected[:, 1980:], atol=2e-4)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"max_window_layers": 0}),
        ("qwen2", {"use_sliding_window": False}),
        ("gpt_neo", {"window_size": 3}),
        *(("qwen2", {"rope_scaling": scaling}) for name, scaling in SCALINGS.items() if name != "dynamic"),
    ],
    ids=str,
)
def test_a_setting_changes_the_logits(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    """The oracle test would pass if both sides ignored the setting."""
    write_family(tmp_path / "plain", family_config(kind))
    model = write_family(tmp_path / "changed", family_config(kind, **changes))
    rows = [some_ids(LENGTH)]
    found = forward(network(tmp_path / "changed"), rows)
    assert np.abs(forward(network(tmp_path / "plain"), rows) - found).max() > 1e-2
    np.testing.assert_allclose(found, theirs(model, rows), atol=1e-4)


def test_the_table_of_architectures_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.split("\n## Architectures\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.M)) == {*get_args(ModelType), "model_type"}
    notes = dict(re.findall(r"^(\d+)\. ((?:.+\n?)+?)(?=^\d+\. |\n)", section, re.M))
    assert set(notes) == set(re.findall(r"\((\d+)\)", section.split("\n1. ")[0]))
    for number, text in notes.items():
        source = ""
        for file, test in re.findall(r"`(?:(tests/[\w/]+\.py)|(test_\w+))`", text):
            source = (ROOT / file).read_text(encoding="utf-8") if file else source
            assert not test or f"def {test}(" in source, f"{number}: {test}"


@pytest.mark.parametrize("kind", EVERY)
def test_names_in_a_checkpoint_and_back(tmp_path: Path, kind: str) -> None:
    """Every tensor of the file has its name in what transformers writes; parts of one matrix come in their order."""
    write_family(tmp_path, family_config(kind))
    model_type = cast(ModelType, kind)
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        stored = set(opened.keys())
    spec = Checkpoint(tmp_path).spec
    ours = [f"{linear.name}.weight" for linear in spec.linears] + [f"{vector.name}.weight" for vector in spec.vectors]
    ours += [f"{linear.name}.bias" for linear in spec.linears if linear.bias]
    found: dict[str, list[str]] = {}
    for name in ours:
        found.setdefault(checkpoint_name(model_type, name), []).append(name)
    assert set(found) == stored
    assert all(spec_names(model_type, name) == tuple(parts) for name, parts in found.items())
