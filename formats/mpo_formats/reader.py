"""Opens a `.mpo` file: strict, lazy, memory-mapped. Only the header is read until a tensor is asked for."""

from __future__ import annotations

import hashlib
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_formats import container
from mpo_formats.architecture import Architecture, ModelSpec
from mpo_formats.codec import from_json, records_from_json, shorten
from mpo_formats.container import Entry
from mpo_formats.errors import FormatError
from mpo_formats.layout import ALIGNMENT, CERTIFICATE, CHECKSUMS, DIGEST_SIZE, FILE, PADDING, file_tensors
from mpo_formats.spec import Certificates, FileSpec, LinearSpec, Provenance, VectorSpec

FORMAT = "mpo"
VERSION = "0.1"
METADATA_KEYS = ("format", "version", "architecture", "layers", "vectors", "files", "provenance")
# How numpy holds each element type; bf16 as its raw bits.
NUMPY: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "u8": np.uint8}
CHUNK = 1 << 24


class MpoFile:
    """An open `.mpo` file.

    Arrays are read-only views of the mapped file and must not outlive it. Usable as a context manager, and from several
    threads at once.

    Raises:
        FormatError: when any rule of SPEC.md is broken, naming the tensor or key.
        OSError: when the file cannot be opened.
    """

    def __init__(self, path: str | Path, *, verify: bool = False) -> None:
        self.path = Path(path)
        self.name = self.path.name
        with self.path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            length = container.header_length(file.read(container.MAGIC_SIZE), self.size, self.name)
            text = file.read(length)
            header = container.parse_header(text, self.size, self.name)
            self.spec = read_spec(header.metadata, self.name)
            self._check_tensors(header.entries)
            self._entries = {entry.tensor.name: entry for entry in header.entries}
            self._header_size = header.size
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if verify:
            self.verify()

    def _check_tensors(self, entries: tuple[Entry, ...]) -> None:
        expected = file_tensors(self.spec)
        for entry, tensor in zip(entries, expected, strict=False):
            if entry.tensor != tensor:
                found, wanted = entry.tensor, f"{tensor.name} {tensor.dtype} {list(tensor.shape)}"
                raise FormatError(f"{self.name}: tensor {shorten(found.name)} {found.dtype} {list(found.shape)}: expected "
                                  f"{wanted} in this place; the file is damaged, export it again")  # fmt: skip
            if (entry.begin % ALIGNMENT) and not tensor.name.startswith(PADDING):
                raise FormatError(
                    f"{self.name}: tensor {tensor.name} starts at byte {entry.begin}, not at a multiple of 64"
                )
        if len(entries) != len(expected):
            odd = expected[len(entries)] if len(entries) < len(expected) else entries[len(expected)].tensor
            what = "is missing" if len(entries) < len(expected) else "is not in the layer table"
            raise FormatError(f"{self.name}: tensor {shorten(odd.name)} {what}; the file is damaged, export it again")

    def array(self, name: str) -> NDArray[Any]:
        """The tensor as a read-only view of the mapped file; bf16 comes as uint16 bit patterns.

        Raises:
            KeyError: when there is no such tensor.
        """
        entry = self._entries[name]
        flat = np.frombuffer(self._map, NUMPY[entry.tensor.dtype], offset=entry.begin, count=_count(entry))
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
        if dtype == "u8":
            return
        flat = self.array(name).reshape(-1)
        for start in range(0, flat.size, CHUNK):
            part = flat[start : start + CHUNK]
            # bf16 is not finite where all eight exponent bits are set.
            finite = (part & 0x7F80) != 0x7F80 if dtype == "bf16" else np.isfinite(part)
            if not finite.all():
                index = start + int(np.argmin(finite))
                raise FormatError(f"{self.name}: {name}: element {index} is not finite; export the file again")

    def close(self) -> None:
        """Unmaps the file, as soon as no array views it any more."""
        try:
            self._map.close()
        except BufferError:  # arrays still view the mapping: it goes when the last of them goes
            return

    def __enter__(self) -> MpoFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _count(entry: Entry) -> int:
    count = 1
    for size in entry.tensor.shape:
        count *= size
    return count


def read_spec(metadata: Any, where: str) -> ModelSpec:
    """Builds the ModelSpec from a header's metadata strings.

    Raises:
        FormatError: for a foreign file, another version, an unknown key or an invalid value.
    """
    if metadata.get("format") != FORMAT:
        raise FormatError(f"{where}: not a .mpo file (safetensors without format 'mpo'); write one with mpo-export")
    version = metadata.get("version", "")
    if version != VERSION:
        raise FormatError(f"{where}: format version {shorten(version)}, this program reads {VERSION}; "
                          "update mpo-runtime, or export the model again")  # fmt: skip
    for key in metadata:
        if key not in METADATA_KEYS:
            raise FormatError(f"{where}: unknown metadata key {shorten(key)}; written by a newer version, or damaged")
    for key in METADATA_KEYS:
        if key not in metadata:
            raise FormatError(f"{where}: metadata key {key!r} is missing; the file is damaged, export it again")
    try:
        return ModelSpec(
            architecture=from_json(Architecture, metadata["architecture"], "architecture"),
            linears=records_from_json(LinearSpec, metadata["layers"], "layers"),
            vectors=records_from_json(VectorSpec, metadata["vectors"], "vectors"),
            files=records_from_json(FileSpec, metadata["files"], "files"),
            provenance=from_json(Provenance, metadata["provenance"], "provenance"),
        )
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
