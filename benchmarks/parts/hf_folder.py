"""A model as a Hugging Face folder in float32, whatever it was read from: for oracles that read nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpo_exporter.convert.folder import FolderWriter, model_config, require_expressible
from mpo_exporter.convert.hf import write_linear
from mpo_runtime.layers.linear import float_tensor


def write_hf_folder(weights: Any, folder: Path) -> None:
    """Writes weights (terms summed), config, tokenizer and template; `weights` are a `.mpo` file, a GGUF file or a folder."""
    spec = weights.spec
    require_expressible(spec.architecture, folder.name, "a Hugging Face folder")
    with FolderWriter(folder, force=False) as writer:
        for linear in spec.linears:
            write_linear(writer, weights, linear, None, "f32")
        for vector in spec.vectors:
            writer.tensor(f"{vector.name}.weight", float_tensor(weights, f"{vector.name}.weight"))
        writer.text_files(weights, model_config(spec.architecture, "float32"))
