"""`mpo-export to-vllm`: the folder holds every tensor of the file, and a table from which its layers are read again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mpo_exporter.convert.vllm import tensor_names, write_vllm
from mpo_formats import ConfigError, Dense, MpoFile, Quantized, Transform
from mpo_formats.architecture import EMBEDDING
from mpo_runtime.weights.vllm_folder import flat_name, partners, plain_layers, read_layers
from tests.exporter.convert_cases import llama, write
from tests.formats import tiny
from tests.formats.tiny import DOWN, GATE, KEY, QUERY, TERMS, UP, VALUE


def test_every_tensor_is_there_as_it_was(tmp_path: Path) -> None:
    file = write(tmp_path / "a.mpo", TERMS, **llama(attention_bias=True))
    [said] = write_vllm(file, tmp_path / "out", force=False)
    assert said.endswith(f"vllm serve {tmp_path / 'out'}")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    layers = read_layers(config["quantization_config"])
    with MpoFile(file) as opened:
        assert list(layers.values()) == list(opened.spec.linears)
        for linear in opened.spec.linears:
            for name in tensor_names(linear):
                plain = linear.name in (EMBEDDING, "model.layers.0.self_attn.o_proj")
                found = tensors.pop(f"{linear.name}.weight" if plain else flat_name(linear.name, name))
                raw = found.view(torch.uint16) if found.dtype == torch.bfloat16 else found
                assert raw.numpy().tobytes() == opened.array(name).tobytes()
    biases = {f"model.layers.0.self_attn.{part}_proj.bias" for part in "qkvo"}
    assert {name for name in tensors if not name.endswith("norm.weight")} == biases
    assert config["model_type"] == "llama" and config["quantization_config"]["quant_method"] == "mpo"


def test_names_are_flat_and_fused_layers_stay_together(tmp_path: Path) -> None:
    assert flat_name(GATE, f"{GATE}.0.core1.scale") == f"{GATE}.mpo_0_core1_scale"
    assert partners(KEY) == (QUERY, KEY, VALUE) and partners(UP) == (GATE, UP) and partners(DOWN) == (DOWN,)
    file = write(tmp_path / "a.mpo", {KEY: TERMS[KEY]})
    with MpoFile(file) as opened:
        plain = plain_layers(opened.spec.linears)
        assert opened.spec.linear(VALUE).terms == (Dense("bf16"),)
    assert not plain & {QUERY, KEY, VALUE} and {GATE, UP, DOWN, EMBEDDING} < plain


def test_every_layer_has_its_own_copy_of_a_shared_transform(tmp_path: Path) -> None:
    shared, file = Transform(QUERY, 16, 1, Quantized(4, 16, False)), tmp_path / "b.mpo"
    with MpoFile(write(tmp_path / "a.mpo", TERMS, **llama())) as plain:
        spec = plain.spec
    linears = (replace(one, transform=shared if one.name in (QUERY, KEY) else None) for one in spec.linears)
    spec = replace(spec, linears=tuple(linears))
    tiny.write(file, spec)
    write_vllm(file, tmp_path / "out", force=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    layers = read_layers(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"])
    with MpoFile(file) as opened:
        for name in (QUERY, KEY):
            assert layers[name].transform == replace(shared, name=name)
            codes = tensors[f"{name}.mpo_transform_q4"].numpy()
            assert codes.tobytes() == opened.array(f"{QUERY}.transform.q4").tobytes()
    assert layers[VALUE].transform is None and f"{VALUE}.mpo_transform_q4" not in tensors


def test_other_tables_are_refused() -> None:
    with pytest.raises(ConfigError, match="quantization_config: expected version 3, found 1; mpo-export to-vllm again"):
        read_layers({"version": 1, "layers": []})
    with pytest.raises(ConfigError, match=r"quantization_config: layers\[0\].*; mpo-export to-vllm again"):
        read_layers({"version": 3, "layers": [{"name": "a"}]})
