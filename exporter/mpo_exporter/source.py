"""Finds the source model: the embedded one, an alias, a folder or a hub id."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpo_formats import CheckpointError
from mpo_formats.packing import first_not_finite
from mpo_runtime.weights.hub import cached_folder
from mpo_runtime.weights.protocol import Weights

ALIASES = {
    "granite": "ibm-granite/granite-3.3-8b-instruct",
    "granite-2b": "ibm-granite/granite-3.3-2b-instruct",
}


@dataclass(frozen=True, slots=True)
class Source:
    """A model's folder, a short name for files made from it, and the hub revision if it came from there."""

    folder: Path
    name: str
    revision: str | None


def require_finite_weights(source: Weights, name: str) -> None:
    """Raises CheckpointError naming the first tensor of a dense model that holds a NaN or an infinity."""
    tensors = [f"{linear.name}.0.weight" for linear in source.spec.linears]
    tensors += [f"{linear.name}.bias" for linear in source.spec.linears if linear.bias]
    for tensor in (*tensors, *(f"{vector.name}.weight" for vector in source.spec.vectors)):
        array = source.array(tensor)
        index = first_not_finite(array, source.dtype(tensor))
        if index is not None:
            place = ", ".join(str(int(axis)) for axis in np.unravel_index(index, array.shape))
            raise CheckpointError(
                f"{name}: {tensor.replace('.0.weight', '.weight')} is not finite at [{place}]; "
                "get the model again, or repair that tensor"
            )


def data_folder() -> Path:
    """The folder of the embedded model and texts."""
    return Path(str(importlib.resources.files("mpo_exporter") / "data"))


def embedded_model() -> Path:
    """The folder of the embedded model, in Hugging Face layout."""
    return data_folder() / "granite-nano"


def find_source(model: str) -> Source:
    """Resolves `demo`, `granite`, `granite-2b`, a folder or a hub id `owner/name`, downloading the last if needed.

    Raises:
        CheckpointError: when there is no such folder and nothing can be downloaded.
    """
    if model == "demo":
        return Source(embedded_model(), "demo", None)
    folder = Path(model)
    if model not in ALIASES and folder.is_dir():
        return Source(folder, folder.resolve().name, None)
    identifier = ALIASES.get(model, model)
    if identifier.count("/") != 1 or identifier.startswith((".", "/", "~")) or folder.is_absolute():
        known = ", ".join(("demo", *ALIASES))
        raise CheckpointError(f"{model}: no such folder; give {known}, a Hugging Face folder, or a hub id owner/name")
    folder = cached_folder(identifier)
    return Source(folder, model if model in ALIASES else identifier.split("/")[1], folder.name)
