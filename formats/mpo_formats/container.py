"""The safetensors container, read strictly: bytes 0-7 the header's length, then JSON, then the tensors.

Stock readers accept duplicate names, holes that a later tensor hides, and misaligned tensors; this one refuses them.
Nothing is allocated before its declared size was compared with the size of the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from mpo_formats.codec import describe, parse_json, shorten
from mpo_formats.errors import FormatError
from mpo_formats.layout import ALIGNMENT, ELEMENTS, TensorSpec

HEADER_LIMIT = 4 * 1024 * 1024
MAGIC_SIZE = 8
ELEMENT_OF = {stored: name for name, (stored, _) in ELEMENTS.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: [begin, end) from the start of the file."""

    tensor: TensorSpec
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: metadata strings, tensors in file order, and the size of header and length field."""

    metadata: Mapping[str, str]
    entries: tuple[Entry, ...]
    size: int


def write_header(metadata: Mapping[str, str], tensors: tuple[TensorSpec, ...]) -> bytes:
    """Builds length field and header for tensors that follow one another; its size is a multiple of 64."""
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        stored = ELEMENTS[tensor.dtype][0]
        table[tensor.name] = {
            "dtype": stored,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-(len(text) + MAGIC_SIZE) % ALIGNMENT)
    if len(text) > HEADER_LIMIT:
        raise FormatError(f"header: {len(text)} bytes exceed the limit of {HEADER_LIMIT}; use fewer layers or terms")
    return len(text).to_bytes(MAGIC_SIZE, "little") + text


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """Reads the length field; raises FormatError when header and file size cannot fit."""
    if file_size < MAGIC_SIZE or len(prefix) < MAGIC_SIZE:
        raise FormatError(f"{where}: {file_size} bytes are too short for a header; the file is truncated")
    length = int.from_bytes(prefix[:MAGIC_SIZE], "little")
    if length > HEADER_LIMIT:
        raise FormatError(f"{where}: header length {length} exceeds the limit of {HEADER_LIMIT}; not a .mpo file")
    if length > file_size - MAGIC_SIZE:
        raise FormatError(f"{where}: header length {length} exceeds the file of {file_size} bytes; it is truncated")
    if (length + MAGIC_SIZE) % ALIGNMENT:
        raise FormatError(f"{where}: header length {length} does not end at a multiple of {ALIGNMENT}; not a .mpo file")
    return length


def parse_header(text: bytes, file_size: int, where: str) -> Header:
    """Parses the header's JSON and checks every tensor's type, shape, place and alignment against the file.

    Raises:
        FormatError: naming the tensor or key.
    """
    table = parse_json(text.rstrip(b" "), f"{where}: header")
    if not isinstance(table, dict):
        raise FormatError(f"{where}: header: expected an object, found {describe(table)}")
    metadata = table.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{where}: __metadata__: expected an object of strings; not a .mpo file")
    start = MAGIC_SIZE + len(text)
    entries, expected = [], start
    for name, row in table.items():
        entry = _parse_entry(name, row, start, file_size, where)
        if entry.begin != expected:
            kind = "overlaps the tensor before it" if entry.begin < expected else "leaves a hole before it"
            raise FormatError(f"{where}: tensor {shorten(name)} {kind}: expected offset {expected - start}, "
                              f"found {entry.begin - start}; the file is damaged")  # fmt: skip
        expected = entry.end
        entries.append(entry)
    if expected != file_size:
        what = "is truncated" if expected > file_size else "has surplus bytes at its end"
        raise FormatError(f"{where}: the tensors end at byte {expected}, the file at {file_size}; it {what}")
    return Header(metadata, tuple(entries), start)


def _parse_entry(name: str, row: object, start: int, file_size: int, where: str) -> Entry:
    what = f"{where}: tensor {shorten(name)}"
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{what}: expected dtype, shape and data_offsets; the file is damaged")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_OF:
        raise FormatError(f"{what}: dtype: expected one of {', '.join(ELEMENT_OF)}, found {describe(dtype)}")
    if not isinstance(shape, list) or not 1 <= len(shape) <= 4 or not all(_is_size(size) for size in shape):
        raise FormatError(f"{what}: shape: expected 1 to 4 sizes from 1 to 2^48, found {describe(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(size, 0) for size in offsets):
        raise FormatError(f"{what}: data_offsets: expected two offsets from 0 to 2^48, found {describe(offsets)}")
    tensor = TensorSpec(name, ELEMENT_OF[dtype], tuple(shape))
    begin, end = start + offsets[0], start + offsets[1]
    if end > file_size or begin > end:
        raise FormatError(f"{what}: offsets {offsets} lie outside the file's {file_size - start} data bytes; "
                          "it is truncated or damaged")  # fmt: skip
    if math.prod(shape) > file_size or tensor.size != end - begin:
        raise FormatError(f"{what}: {end - begin} bytes do not hold shape {shape} of {dtype}; the file is damaged")
    return Entry(tensor, begin, end)


def _is_size(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= 2**48
