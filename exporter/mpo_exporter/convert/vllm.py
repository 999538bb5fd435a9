"""`mpo-export to-vllm`: a folder with the tensors of a `.mpo` file as they are, which vLLM serves with the plugin mpo_vllm."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mpo_exporter.convert.families import model_config, require_expressible
from mpo_exporter.convert.folder import FolderWriter
from mpo_formats import LinearSpec, MpoFile
from mpo_formats.layout import term_tensors, transform_tensors
from mpo_runtime.layers.linear import float_tensor
from mpo_runtime.weights.vllm_folder import flat_name, plain_layers, quantization_config, with_own_transform

# What vLLM calculates in unless --dtype says otherwise.
DTYPE = "bfloat16"
# The families that the plugin was tested with.
KINDS = ("granite", "llama")


def write_vllm(path: Path, out: Path, *, force: bool) -> list[str]:
    """Writes the folder; returns what there is to say about it.

    Raises:
        FormatError: for a damaged file.
        ConfigError: for an architecture that the plugin does not serve, or a folder that holds something, without `force`.
    """
    with MpoFile(path) as file:
        architecture = file.spec.architecture
        require_expressible(architecture, file.name, "a folder for vLLM", KINDS)
        writer = FolderWriter(out, force=force)
        file.verify()
        config = model_config(architecture, DTYPE) | {"quantization_config": quantization_config(file.spec.linears)}
        plain = plain_layers(file.spec.linears)
        with writer:
            for linear in file.spec.linears:
                names = zip(tensor_names(linear), tensor_names(with_own_transform(linear)), strict=True)
                for name, own in names:
                    stored = f"{linear.name}.weight" if linear.name in plain else flat_name(linear.name, own)
                    writer.tensor(stored, as_stored(file, name))
                if linear.bias is not None:
                    writer.tensor(f"{linear.name}.bias", float_tensor(file, f"{linear.name}.bias"))
            for vector in file.spec.vectors:
                writer.tensor(f"{vector.name}.weight", float_tensor(file, f"{vector.name}.weight"))
            writer.text_files(file, config)
    return [f"wrote {out}, {writer.total:,} bytes of tensors; with the extra vllm installed: vllm serve {out}"]


def tensor_names(linear: LinearSpec) -> list[str]:
    """The names of the tensors of a layer's terms, and of its stored transform, in a `.mpo` file."""
    found = [] if linear.transform is None else [tensor.name for tensor in transform_tensors(linear.transform)]
    for index, term in enumerate(linear.terms):
        tensors = term_tensors(f"{linear.name}.{index}", term, linear.out_features, linear.in_features)
        found += [tensor.name for tensor in tensors]
    return found


def as_stored(file: MpoFile, name: str) -> Tensor:
    """A tensor of the file in its own type."""
    values = torch.from_numpy(file.array(name).copy())
    return values.view(torch.bfloat16) if file.dtype(name) == "bf16" else values
