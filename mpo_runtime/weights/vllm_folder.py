"""A folder for vLLM: what mpo-export writes and the plugin reads. Tensors of a layer under flat names, its terms in config.json.

A tensor `<layer>.0.core1.scale` of a `.mpo` file is called `<layer>.mpo_0_core1_scale`, because vLLM takes what stands before
the last dot for a module. A stored transform is there once for every layer that takes it, under that layer's name. Biases,
norms and everything else have the names of a Hugging Face folder. The entry `quantization_config` of config.json has the layer
table as the header of a `.mpo` file has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from mpo_formats import ConfigError, Dense, FormatError, LinearSpec
from mpo_formats.codec import records_from_json, to_json

METHOD = "mpo"
VERSION = 3
PREFIX = "mpo_"
# vLLM's layers that hold several matrices.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def flat_name(layer: str, tensor: str) -> str:
    """The name in the folder of a tensor of a layer's terms; `tensor` is its name in a `.mpo` file."""
    return f"{layer}.{PREFIX}{tensor.removeprefix(f'{layer}.').replace('.', '_')}"


def quantization_config(linears: Iterable[LinearSpec]) -> dict[str, Any]:
    """The entry `quantization_config` of config.json."""
    own = (with_own_transform(linear) for linear in linears)
    return {"quant_method": METHOD, "version": VERSION, "layers": [json.loads(to_json(linear)) for linear in own]}


def with_own_transform(linear: LinearSpec) -> LinearSpec:
    """The layer, its stored transform under its own name."""
    return (
        linear if linear.transform is None else replace(linear, transform=replace(linear.transform, name=linear.name))
    )


def plain_layers(linears: Iterable[LinearSpec]) -> set[str]:
    """The layers that are stored as in any folder, as `<layer>.weight`: dense ones whose partners in FUSED are dense too."""
    dense = {
        linear.name
        for linear in linears
        if len(linear.terms) == 1 and isinstance(linear.terms[0], Dense) and not linear.transformed
    }
    return {name for name in dense if dense.issuperset(partners(name))}


def partners(name: str) -> tuple[str, ...]:
    """The layers that vLLM runs as one matrix with this one, itself among them and in order."""
    module, _, part = name.rpartition(".")
    for parts in FUSED.values():
        if part in parts:
            return tuple(f"{module}.{other}" for other in parts)
    return (name,)


def read_layers(config: Mapping[str, Any]) -> dict[str, LinearSpec]:
    """The layers of that entry by name.

    Raises:
        ConfigError: for another version, or a table that breaks a rule of SPEC.md.
    """
    if config.get("version") != VERSION:
        found = config.get("version")
        raise ConfigError(f"quantization_config: expected version {VERSION}, found {found!r}; mpo-export to-vllm again")
    try:
        linears = records_from_json(LinearSpec, json.dumps(config.get("layers")), "layers")
    except FormatError as error:
        raise ConfigError(f"quantization_config: {error}; mpo-export to-vllm again") from None
    return {linear.name: linear for linear in linears}
