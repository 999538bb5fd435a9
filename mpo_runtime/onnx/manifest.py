"""mpo.json, by which a folder of `export-onnx` is recognised, and which says what must lie beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mpo_formats import Architecture, CheckpointError, FormatError
from mpo_formats.codec import from_json, to_json

MANIFEST, MODEL, DATA = "mpo.json", "model.onnx", "model.onnx.data"
VERSION = 1
Dtype = Literal["fp32", "fp16"]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder holds.

    source: the name of what was exported. shares_buffer: past and present keys and values may be one buffer.
    """

    version: int
    source: str
    dtype: Dtype
    accuracy_level: int
    shares_buffer: bool
    graph_bytes: int
    data_bytes: int
    architecture: Architecture

    def to_bytes(self) -> bytes:
        """The file's content."""
        return (json.dumps(json.loads(to_json(self)), indent=1) + "\n").encode()


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder in the place of weights; nothing of it is open, since the session has read it."""

    manifest: Manifest

    @property
    def size(self) -> int:
        """Bytes of the graph and its tensors."""
        return self.manifest.graph_bytes + self.manifest.data_bytes

    def close(self) -> None:
        """Does nothing: the session ends with the model."""


def is_exported(folder: Path) -> bool:
    """Whether a path is a folder that `export-onnx` wrote."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Reads mpo.json and checks that the graph and its tensors are there and whole.

    Raises:
        CheckpointError: naming the file that is missing, damaged or shorter than it was.
    """
    path = folder / MANIFEST
    remedy = "export it again, or copy the whole folder"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); give a folder of mpo-run export-onnx"
        ) from None
    manifest = _parsed(content, path)
    for name, size in ((MODEL, manifest.graph_bytes), (DATA, manifest.data_bytes)):
        file = folder / name
        found: Any = file.stat().st_size if file.is_file() else None
        if found is None:
            raise CheckpointError(f"{file}: is missing, {size:,} bytes; {remedy}")
        if found != size:
            raise CheckpointError(f"{file}: has {found:,} bytes, expected {size:,}; {remedy}")
    return manifest


def _parsed(content: bytes, path: Path) -> Manifest:
    try:
        manifest = from_json(Manifest, content, str(path))
    except FormatError as error:
        raise CheckpointError(f"{error}; the file is damaged or of another version, export it again") from None
    if manifest.version != VERSION:
        raise CheckpointError(f"{path}: version {manifest.version}, this program reads {VERSION}; export it again")
    return manifest
