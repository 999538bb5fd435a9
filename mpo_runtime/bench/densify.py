"""Writes a model's terms as dense bf16 matrices: what the same model is without compression, in bytes and time."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from mpo_formats import ConfigError, Dense, ModelSpec, MpoWriter, Provenance
from mpo_formats.layout import content_tensors
from mpo_runtime.loading import open_weights


def dense_spec(spec: ModelSpec) -> ModelSpec:
    """The spec with one bf16 matrix in the place of every layer's terms, and without embedded files."""
    linears = tuple(replace(linear, terms=(Dense("bf16"),), hadamard=0) for linear in spec.linears)
    origin = Provenance(spec.provenance.source, None, "", "mpo-run bench", {}, None)
    return replace(spec, linears=linears, files=(), provenance=origin)


def write_densified(source: Path, target: Path) -> None:
    """Writes the densified model of `source` to `target`, a layer at a time.

    Raises:
        ConfigError: where the disk has no room for it.
    """
    import torch

    from mpo_runtime.layers.linear import load_linear

    weights = open_weights(source)
    try:
        spec = dense_spec(weights.spec)
        wanted, free = sum(tensor.size for tensor in content_tensors(spec)), shutil.disk_usage(target.parent).free
        if wanted * 1.02 > free:
            raise ConfigError(
                f"--baseline: the densified model takes {wanted / 1e9:.1f} GB and {target.parent} has {free / 1e9:.1f} GB "
                "free; set TMPDIR to another folder, or give a dense model with --dense"
            )
        layers = {linear.name: linear for linear in weights.spec.linears}
        with MpoWriter(target, spec) as writer:
            for tensor in writer.pending():
                layer = layers.get(tensor.name.rpartition(".")[0].rpartition(".")[0])
                if layer is None or not tensor.name.endswith(".0.weight"):
                    writer.write(tensor.name, np.ascontiguousarray(weights.array(tensor.name)))
                    continue
                loaded = load_linear(weights, layer, chi=None, held=False, device=torch.device("cpu"))
                bits = loaded.weight().to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
                writer.write(tensor.name, bits)
            writer.commit()
    finally:
        weights.close()
