"""The dense model that an export starts from: found by its name, opened once, closed in one place."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mpo_formats import Architecture, CheckpointError, ModelSpec
from mpo_formats.packing import first_not_finite
from mpo_runtime.loading import read_text_files
from mpo_runtime.text.chat_template import ChatTemplate
from mpo_runtime.text.tokenizer import Tokenizer
from mpo_runtime.weights.checkpoint import Checkpoint
from mpo_runtime.weights.hub import cached_folder
from mpo_runtime.weights.protocol import Weights

ALIASES = {
    "granite": "ibm-granite/granite-3.3-8b-instruct",
    "granite-2b": "ibm-granite/granite-3.3-2b-instruct",
}


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A dense model's Hugging Face folder, a short name for files made from it, and its revision if it is from the hub."""

    folder: Path
    name: str
    revision: str | None = None


class Source:
    """A dense model: its weights, and its tokenizer and chat template once they are asked for; a context manager.

        with open_source("demo") as source:
            print(source.architecture.hidden_size)

    Raises:
        CheckpointError: for a folder that is damaged or of an unknown architecture.
    """

    def __init__(self, model: ModelFolder) -> None:
        self.folder, self.name, self.revision = model.folder, model.name, model.revision
        self.weights = Checkpoint(model.folder)

    @property
    def spec(self) -> ModelSpec:
        """The model's layers, all dense, its norms and embedded files."""
        return self.weights.spec

    @property
    def architecture(self) -> Architecture:
        """The model's architecture."""
        return self.weights.architecture

    @cached_property
    def text_files(self) -> tuple[Tokenizer | None, ChatTemplate | None]:
        """The tokenizer and the chat template; None for what the model lacks."""
        return read_text_files(self.weights)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, None if the model has none."""
        return self.text_files[0]

    def close(self) -> None:
        """Closes the weights."""
        self.weights.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_source(model: str | Path) -> Source:
    """Opens `demo`, `granite`, `granite-2b`, a Hugging Face folder or a hub id `owner/name`, downloaded if needed.

    Raises:
        CheckpointError: if there is no such model, or it cannot be read.
    """
    return Source(find_source(str(model)))


def find_source(model: str) -> ModelFolder:
    """Finds `demo`, `granite`, `granite-2b`, a Hugging Face folder or a hub id `owner/name`, downloaded if needed.

    Raises:
        CheckpointError: if there is no such folder and nothing can be downloaded.
    """
    if model == "demo":
        return ModelFolder(embedded_model(), "demo")
    folder = Path(model)
    if model not in ALIASES and folder.is_dir():
        return ModelFolder(folder, folder.resolve().name)
    identifier = ALIASES.get(model, model)
    if identifier.count("/") != 1 or identifier.startswith((".", "/", "~")) or folder.is_absolute():
        known = ", ".join(("demo", *ALIASES))
        raise CheckpointError(f"{model}: no such folder; give {known}, a Hugging Face folder, or a hub id owner/name")
    folder = cached_folder(identifier)
    return ModelFolder(folder, model if model in ALIASES else identifier.split("/")[1], folder.name)


def data_folder() -> Path:
    """The folder of the embedded model and texts."""
    return Path(str(importlib.resources.files("mpo_exporter") / "data"))


def embedded_model() -> Path:
    """The folder of the embedded model, in Hugging Face layout."""
    return data_folder() / "granite-nano"


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
