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
from mpo_runtime.weights.gguf import SUFFIX, Gguf, is_gguf
from mpo_runtime.weights.hub import ALIASES, cached_folder, is_identifier, split_revision
from mpo_runtime.weights.known import KNOWN, find_known
from mpo_runtime.weights.protocol import DenseWeights, Weights

# Bytes of dequantised tensors that are kept, for each is read dozens of times.
KEPT = 1 << 29


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A dense model's Hugging Face folder or GGUF file, a short name for files made from it, and its revision on the hub."""

    folder: Path
    name: str
    revision: str | None = None


class Source:
    """A dense model: its weights, and its tokenizer and chat template once they are asked for; a context manager.

        with open_source("demo") as source:
            print(source.architecture.hidden_size)

    Raises:
        CheckpointError: for a folder or GGUF file that is damaged or of an unknown architecture.
    """

    def __init__(self, model: ModelFolder) -> None:
        self.folder, self.name, self.revision = model.folder, model.name, model.revision
        self.weights: DenseWeights = open_dense(model.folder)

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


def open_dense(path: Path) -> DenseWeights:
    """Opens a Hugging Face folder or a GGUF file.

    What a GGUF file holds in integers is dequantised to two bytes a weight: as large as the model was, and as a plan stores
    a layer that it leaves dense.
    """
    return Checkpoint(path) if path.is_dir() else Gguf(path, dequantised="f16", kept=KEPT)


def open_source(model: str | Path) -> Source:
    """Opens a model by its name (`demo`, `smollm2`, `granite`, …), a Hugging Face folder, a GGUF file or a hub id.

    Raises:
        CheckpointError: if there is no such model, or it cannot be read.
    """
    return Source(find_source(str(model)))


def find_source(model: str) -> ModelFolder:
    """Finds a model by its name, a Hugging Face folder, a GGUF file or a hub id `owner/name`, downloaded if needed.

    Raises:
        CheckpointError: if there is no such file or folder and nothing can be downloaded.
    """
    if model == "demo":
        return ModelFolder(embedded_model(), "demo")
    path = Path(model)
    if model in KNOWN:
        found, revision = find_known(KNOWN[model], lambda text: print(text, flush=True))
        return ModelFolder(found, model, revision)
    if model not in ALIASES and path.is_dir():
        return ModelFolder(path, path.resolve().name)
    if path.is_file() and is_gguf(path):
        return ModelFolder(path, path.name.removesuffix(SUFFIX))
    identifier = ALIASES.get(model, model)
    file = path.is_file() or path.suffix == SUFFIX
    if file or not is_identifier(identifier):
        wrong = "no such folder" if not file else "is no GGUF file" if path.is_file() else "no such file"
        names = ", ".join(("demo", *ALIASES, *KNOWN))
        raise CheckpointError(
            f"{model}: {wrong}; give {names}, a Hugging Face folder, a GGUF file, or a hub id owner/name[@revision]"
        )
    folder = cached_folder(identifier)
    name = model if model in ALIASES else split_revision(identifier)[0].split("/")[1]
    return ModelFolder(folder, name, folder.name)


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
