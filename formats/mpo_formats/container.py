"""The safetensors container, read strictly: the length of the header in bytes 0-7, then JSON, then the tensors.

Common readers accept duplicate names, gaps between tensors and misaligned tensors; this one refuses them. Declared sizes are
compared with the size of the file before anything is allocated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from mpo_formats.codec import describe, parse_json, shorten
from mpo_formats.errors import FormatError
from mpo_formats.layout import ALIGNMENT, ELEMENTS, PADDING, TensorSpec

HEADER_LIMIT = 4 * 1024 * 1024
LARGEST_OFFSET = 1 << 48
LENGTH_SIZE = 8
ELEMENT_OF = {stored: name for name, (stored, _) in ELEMENTS.items()}
ROW_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor and its bytes [begin, end), counted from the start of the file."""

    tensor: TensorSpec
    begin: int
    end: int


def write_header(metadata: Mapping[str, str], tensors: tuple[TensorSpec, ...]) -> bytes:
    """Builds length field and header for tensors that follow one another; its size is a multiple of 64.

    Raises:
        FormatError: when it exceeds the limit.
    """
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.size
        stored = ELEMENTS[tensor.dtype][0]
        table[tensor.name] = {"dtype": stored, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-(len(text) + LENGTH_SIZE) % ALIGNMENT)
    if len(text) > HEADER_LIMIT:
        raise FormatError(f"header: {len(text)} bytes exceed the limit of {HEADER_LIMIT}; use fewer layers or terms")
    return len(text).to_bytes(LENGTH_SIZE, "little") + text


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """The header's length in bytes, from its length field; raises FormatError when it does not fit the size of the file."""
    if file_size < LENGTH_SIZE or len(prefix) < LENGTH_SIZE:
        raise FormatError(f"{where}: {file_size} bytes are too short for a header; the file is truncated")
    length = int.from_bytes(prefix[:LENGTH_SIZE], "little")
    if length > HEADER_LIMIT:
        raise FormatError(f"{where}: header length {length} exceeds the limit of {HEADER_LIMIT}; not a .mpo file")
    if length > file_size - LENGTH_SIZE:
        raise FormatError(f"{where}: header length {length} exceeds the file of {file_size} bytes; it is truncated")
    if (length + LENGTH_SIZE) % ALIGNMENT:
        raise FormatError(f"{where}: header length {length} does not end at a multiple of {ALIGNMENT}; not a .mpo file")
    return length


def parse_header(text: bytes, where: str) -> tuple[dict[str, str], dict[str, object]]:
    """Parses the header's JSON into its metadata strings and the rows of its tensors, in file order.

    Raises:
        FormatError: naming the key.
    """
    if not text.startswith(b"{"):
        raise FormatError(f"{where}: header: expected '{{' as its first byte; not a .mpo file")
    table = parse_json(text.rstrip(b" "), f"{where}: header")
    metadata = table.pop("__metadata__", None)
    if not isinstance(metadata, dict):
        raise FormatError(f"{where}: __metadata__: expected an object, found {describe(metadata)}; not a .mpo file")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise FormatError(
                f"{where}: metadata key {shorten(key)}: expected a string, found {describe(value)}; the file is damaged"
            )
    return metadata, table


def place_tensors(rows: Mapping[str, object], start: int, file_size: int, where: str) -> tuple[Entry, ...]:
    """Checks type, shape, place and alignment of every tensor against the file; the first one begins at byte `start`.

    Raises:
        FormatError: naming the tensor.
    """
    entries, expected = [], start
    for name, row in rows.items():
        entry = _place(name, row, start, file_size, where)
        if entry.begin != expected:
            kind = "overlaps the tensor before it" if entry.begin < expected else "leaves a hole before it"
            raise FormatError(
                f"{where}: tensor {shorten(name)} {kind}: expected offset {expected - start}, "
                f"found {entry.begin - start}; the file is damaged"
            )
        if entry.begin % ALIGNMENT and not name.startswith(PADDING):
            raise FormatError(
                f"{where}: tensor {shorten(name)} is misaligned: it starts at byte {entry.begin}, "
                f"not at a multiple of {ALIGNMENT}; the file is damaged"
            )
        expected = entry.end
        entries.append(entry)
    if expected != file_size:
        raise FormatError(
            f"{where}: the tensors end at byte {expected}, the file at {file_size}: it has surplus bytes "
            "at its end; copy it again"
        )
    return tuple(entries)


def _place(name: str, row: object, start: int, file_size: int, where: str) -> Entry:
    if not isinstance(row, dict) or row.keys() != ROW_KEYS:
        raise _refusal(where, name, "expected dtype, shape and data_offsets")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_OF:
        raise _refusal(where, name, f"dtype: expected one of {', '.join(ELEMENT_OF)}, found {describe(dtype)}")
    if not _are_sizes(shape, least=1) or not 1 <= len(shape) <= 4:
        raise _refusal(where, name, f"shape: expected 1 to 4 sizes from 1 to 2^48, found {describe(shape)}")
    if not _are_sizes(offsets, least=0) or len(offsets) != 2:
        raise _refusal(where, name, f"data_offsets: expected two offsets from 0 to 2^48, found {describe(offsets)}")
    begin, end = start + offsets[0], start + offsets[1]
    if end > file_size or begin > end:
        raise _refusal(where, name, f"offsets {offsets} lie outside the {file_size - start} data bytes (truncated?)")
    tensor = TensorSpec(name, ELEMENT_OF[dtype], tuple(shape))
    if tensor.size != end - begin:
        raise _refusal(where, name, f"{end - begin} bytes do not hold shape {shape} of {dtype}")
    return Entry(tensor, begin, end)


def _refusal(where: str, name: str, problem: str) -> FormatError:
    return FormatError(f"{where}: tensor {shorten(name)}: {problem}; the file is damaged, export it again")


def _are_sizes(values: object, least: int) -> bool:
    # A boolean is an int in Python, not in JSON.
    if not isinstance(values, list) or not set(map(type, values)) <= {int}:
        return False
    return not values or (least <= min(values) and max(values) <= LARGEST_OFFSET)
