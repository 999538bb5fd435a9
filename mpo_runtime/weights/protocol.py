"""Where weights come from: one view of a `.mpo` file and of a Hugging Face folder, so that both load the same way."""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

from mpo_formats import ModelSpec


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
