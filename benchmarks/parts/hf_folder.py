"""A model as a Hugging Face folder in float32, whatever it was read from: for oracles that read nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpo_exporter.convert.families import model_config, require_expressible
from mpo_exporter.convert.folder import FolderWriter
from mpo_exporter.convert.hf import stored_modules, write_module
from mpo_formats.architecture import POSITIONS
from mpo_runtime.layers.linear import float_tensor
from mpo_runtime.weights.names import checkpoint_name


def write_hf_folder(weights: Any, folder: Path) -> None:
    """Writes weights (terms summed), config, tokenizer and template; `weights` are a `.mpo` file, a GGUF file or a folder."""
    spec = weights.spec
    require_expressible(spec.architecture, folder.name, "a Hugging Face folder")
    with FolderWriter(folder, force=False) as writer:
        for name, parts in stored_modules(weights).items():
            write_module(writer, weights, name, parts, None, "f32")
        for vector in spec.vectors:
            values = float_tensor(weights, f"{vector.name}.weight")
            shaped = values.view(-1, spec.architecture.hidden_size) if vector.name == POSITIONS else values
            writer.tensor(checkpoint_name(spec.architecture.model_type, f"{vector.name}.weight"), shaped)
        writer.text_files(weights, model_config(spec.architecture, "float32"))
