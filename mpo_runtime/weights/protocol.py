"""Where weights come from: one view of a `.mpo` file and of a Hugging Face folder, so that both load the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from mpo_formats import ModelSpec, MpoFile
from mpo_runtime.weights.gguf import Gguf, is_gguf
from mpo_runtime.weights.store import resolve


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
        """Gives the mapped files back."""
        ...


def open_weights(path: str | Path, *, verify: bool = False) -> Weights:
    """Opens a `.mpo` or GGUF file or a Hugging Face folder, given by its path or by its name in the local store.

    Raises:
        CheckpointError: when there is nothing at `path` and no such name in the store.
        FormatError: when a `.mpo` file breaks a rule.
    """
    place = resolve(path)
    if place.is_dir():
        from mpo_runtime.weights.checkpoint import Checkpoint

        return Checkpoint(place)
    if is_gguf(place):
        return Gguf(place)
    return MpoFile(place, verify=verify)
