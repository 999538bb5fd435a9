"""Opens a `.mpo` file: strict and memory-mapped. Only the header is read until a tensor is used."""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_formats import container
from mpo_formats.architecture import Architecture, ModelSpec
from mpo_formats.codec import VERSIONS, from_json, records_from_json, shorten
from mpo_formats.container import Entry
from mpo_formats.errors import FormatError
from mpo_formats.git_lfs import is_pointer, pointer_message
from mpo_formats.layout import CERTIFICATE, CHECKSUMS, FILE, PADDING, TensorSpec, file_tensors
from mpo_formats.packing import first_not_finite
from mpo_formats.provenance import Certificates, Provenance
from mpo_formats.spec import FileSpec, Layouts, LinearSpec, VectorSpec

FORMAT = "mpo"
METADATA_KEYS = ("format", "version", "layouts", "architecture", "layers", "vectors", "files", "provenance")
# The numpy type of each element type, little-endian; bf16 as its bit patterns.
NUMPY: dict[str, Any] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
    "u8": np.dtype("u1"),
}
# Bytes that are hashed at once.
CHUNK = 1 << 24
# Bytes that tell a Git LFS pointer.
POINTER_HEAD = 64


class MpoFile:
    """An open `.mpo` file.

    Arrays are read-only views of the mapped file and keep it mapped. Usable as a context manager, and from several
    threads at once. The file must not be changed in place while it is open; MpoWriter never does so.

    Args:
        verify: checks all checksums and values first, as `verify` does.

    Raises:
        FormatError: when any rule of SPEC.md is broken, naming the tensor or key.
        OSError: when the file cannot be opened.
    """

    def __init__(self, path: str | Path, *, verify: bool = False) -> None:
        self.path = Path(path)
        self.name = self.path.name
        with self.path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            head = file.read(POINTER_HEAD)
            if is_pointer(head):
                raise FormatError(pointer_message(self.name))
            length = container.header_length(head[: container.LENGTH_SIZE], self.size, self.name)
            file.seek(container.LENGTH_SIZE)
            metadata, rows = container.parse_header(file.read(length), self.name)
            self._header_size = container.LENGTH_SIZE + length
            self.spec = read_spec(metadata, self.name)
            entries = container.place_tensors(rows, self._header_size, self.size, self.name)
            self._check_tensors(entries)
            self._entries = {entry.tensor.name: entry for entry in entries}
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if verify:
            try:
                self.verify()
            except BaseException:
                self.close()
                raise

    def _check_tensors(self, entries: tuple[Entry, ...]) -> None:
        """Compares the container's tensors with those that the layer table requires."""
        expected = file_tensors(self.spec)
        if tuple(entry.tensor for entry in entries) != expected:
            difference = self._difference(entries, expected)
            raise FormatError(f"{self.name}: {difference}; the file is damaged, export it again")

    @staticmethod
    def _difference(entries: tuple[Entry, ...], expected: tuple[TensorSpec, ...]) -> str:
        """Names the first tensor that is missing, not in the layer table, or different from it."""
        pairs = zip_longest((entry.tensor for entry in entries), expected)
        found, wanted = next((found, wanted) for found, wanted in pairs if found != wanted)
        if wanted and wanted.name not in {entry.tensor.name for entry in entries}:
            return f"tensor {wanted.name} is missing"
        if found and found.name not in {tensor.name for tensor in expected}:
            return f"tensor {shorten(found.name)} is not in the layer table"
        return f"expected tensor {wanted} in this place, found {found}"

    def array(self, name: str) -> NDArray[Any]:
        """The tensor as a read-only view of the mapped file; bf16 comes as uint16 bit patterns.

        Raises:
            KeyError: when there is no such tensor.
        """
        entry = self._entries[name]
        count = math.prod(entry.tensor.shape)
        flat = np.frombuffer(self._map, NUMPY[entry.tensor.dtype], offset=entry.begin, count=count)
        return flat.reshape(entry.tensor.shape)

    def dtype(self, name: str) -> str:
        """The element type of a tensor: `f32`, `f16`, `bf16` or `u8`."""
        return self._entries[name].tensor.dtype

    def file(self, name: str) -> bytes | None:
        """The bytes of an embedded file, None where the file has none of that name."""
        tensor = f"{FILE}{name}"
        return self.array(tensor).tobytes() if tensor in self._entries else None

    def certificates(self) -> Certificates:
        """The measured quality that the exporter wrote; no entries where it measured nothing."""
        text = self.array(CERTIFICATE).tobytes().rstrip(b" ")
        return from_json(Certificates, text, f"{self.name}: certificate")

    def verify(self) -> int:
        """Checks every checksum, that padding is zero and that floating-point values are finite.

        Returns:
            The number of tensors checked.

        Raises:
            FormatError: naming the first tensor that fails.
        """
        digests = self.array(CHECKSUMS)
        self._check_digest("header", 0, self._header_size, digests[0])
        entries = [entry for entry in self._entries.values() if entry.tensor.name != CHECKSUMS]
        for entry, digest in zip(entries, digests[1:], strict=True):
            self._check_digest(entry.tensor.name, entry.begin, entry.end, digest)
            self._check_values(entry)
        self.certificates()
        return len(entries)

    def _check_digest(self, name: str, begin: int, end: int, digest: NDArray[np.uint8]) -> None:
        found = hashlib.sha256()
        view = memoryview(self._map)
        for start in range(begin, end, CHUNK):
            found.update(view[start : min(start + CHUNK, end)])
        view.release()
        if found.digest() != digest.tobytes():
            raise FormatError(f"{self.name}: {name}: wrong checksum; the file was damaged after it was written")

    def _check_values(self, entry: Entry) -> None:
        name, dtype = entry.tensor.name, entry.tensor.dtype
        if name.startswith(PADDING) and self.array(name).any():
            raise FormatError(f"{self.name}: {name}: padding is not zero; the file is damaged")
        index = first_not_finite(self.array(name), dtype)
        if index is not None:
            raise FormatError(f"{self.name}: {name}: element {index} is not finite; export the file again")

    def close(self) -> None:
        """Unmaps the file, now or when the last array that views it is gone."""
        try:
            self._map.close()
        except BufferError:  # arrays still view the mapping; it ends with the last of them
            return

    def __enter__(self) -> MpoFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_spec(metadata: Any, where: str) -> ModelSpec:
    """Builds the ModelSpec from a header's metadata strings.

    Raises:
        FormatError: for a foreign file, another version, an unknown key or an invalid value.
    """
    if metadata.get("format") != FORMAT:
        raise FormatError(f"{where}: not a .mpo file (safetensors without format 'mpo'); write one with mpo-export")
    version = metadata.get("version", "")
    if version not in VERSIONS:
        raise FormatError(
            f"{where}: format version {shorten(version)}, this program reads {', '.join(VERSIONS[:-1])} and {VERSIONS[-1]}; "
            "update mpo-runtime, or export the model again"
        )
    for key in metadata:
        if key not in METADATA_KEYS:
            raise FormatError(f"{where}: unknown metadata key {shorten(key)}; written by a newer version, or damaged")
    for key in METADATA_KEYS:
        if key not in metadata:
            raise FormatError(f"{where}: metadata key {key!r} is missing; the file is damaged, export it again")
    try:
        from_json(Layouts, metadata["layouts"], "layouts")
        return ModelSpec(
            architecture=from_json(Architecture, metadata["architecture"], "architecture", version),
            linears=records_from_json(LinearSpec, metadata["layers"], "layers", version),
            vectors=records_from_json(VectorSpec, metadata["vectors"], "vectors"),
            files=records_from_json(FileSpec, metadata["files"], "files"),
            provenance=from_json(Provenance, metadata["provenance"], "provenance"),
        )
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
