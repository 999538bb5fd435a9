"""Where weights come from: one view of a `.mpo` file, a GGUF file and a Hugging Face folder, so that all load the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from mpo_formats import Architecture, ModelSpec


class Weights(Protocol):
    """A model's description and its tensors, named as in SPEC.md; arrays are views of a mapped file."""

    @property
    def spec(self) -> ModelSpec:
        """Architecture, layer table and embedded files."""
        ...

    def array(self, name: str) -> NDArray[Any]:
        """The tensor of that name; bf16 comes as uint16 bit patterns."""
        ...

    def dtype(self, name: str) -> str:
        """The tensor's element type: `f32`, `f16`, `bf16` or `u8`."""
        ...

    def file(self, name: str) -> bytes | None:
        """An embedded file such as tokenizer.json, or None."""
        ...

    def close(self) -> None:
        """Unmaps the files."""
        ...


class DenseWeights(Weights, Protocol):
    """The weights of a dense model that an export starts from: a Hugging Face folder or a GGUF file."""

    @property
    def folder(self) -> Path:
        """The folder, or the GGUF file."""
        ...

    @property
    def architecture(self) -> Architecture:
        """The model's architecture."""
        ...

    def sha256(self) -> str:
        """The digest of the files that hold the tensors."""
        ...
