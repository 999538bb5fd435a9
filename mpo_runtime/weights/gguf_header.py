"""Reads the header of a GGUF file: its metadata, and where each tensor lies.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The class
GGUFReader of the package `gguf` reads the same, but makes several numpy objects of every string: 3 seconds and 350 MB for a
vocabulary of 49,152 tokens, where this takes 0.2 seconds. It does not check bounds either.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpo_formats.errors import CheckpointError
from mpo_formats.git_lfs import is_pointer, pointer_message

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # where the metadata names none
MOST_AXES = 4
LONGEST_NAME = 200
# struct codes of the scalar types, by their numbers.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: its type number, its shape in numpy's order, and the byte at which it begins."""

    kind: int
    shape: tuple[int, ...]
    begin: int


@dataclass(frozen=True, slots=True)
class Header:
    """The metadata and the tensors of a GGUF file, by name. Strings inside arrays are bytes, all others text."""

    metadata: dict[str, Any]
    tensors: dict[str, Entry]


def read_header(data: mmap.mmap, path: Path) -> Header:
    """Reads the header of a mapped GGUF file; where tensors end is for the caller to check.

    Raises:
        CheckpointError: for another kind of file, an unsupported version or byte order, or a damaged header.
    """
    check_version(data[:64], path)
    cursor = Cursor(data, path)
    cursor.place = 8
    tensor_count, pair_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.text()
        if key in metadata:
            raise cursor.damaged(f"the key {key[:LONGEST_NAME]!r} is there twice")
        metadata[key] = cursor.value(cursor.scalar("I"))
    rows: dict[str, Entry] = {}
    for _ in range(tensor_count):
        name = cursor.text()
        if name in rows or len(name) > LONGEST_NAME:
            raise cursor.damaged(f"the tensor {name[:LONGEST_NAME]!r} is there twice, or has too long a name")
        axes = cursor.scalar("I")
        if axes > MOST_AXES:
            raise cursor.damaged(f"the tensor {name!r} has {axes} axes")
        shape = tuple(cursor.scalar("Q") for _ in range(axes))[::-1]
        rows[name] = Entry(cursor.scalar("I"), shape, cursor.scalar("Q"))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment is {alignment!r}, expected a power of two")
    start = math.ceil(cursor.place / alignment) * alignment
    for name, row in rows.items():
        if row.begin % alignment:
            raise cursor.damaged(f"the tensor {name!r} does not begin at a multiple of {alignment}")
    return Header(metadata, {name: Entry(row.kind, row.shape, start + row.begin) for name, row in rows.items()})


def check_version(begin: bytes, path: Path) -> None:
    """Raises CheckpointError unless a file that begins with these bytes (64 are enough) is a GGUF file of a known version."""
    if is_pointer(begin):
        raise CheckpointError(pointer_message(path))
    if begin[:4] != MAGIC:
        raise CheckpointError(f"{path}: is not a GGUF file, it begins with {begin[:4]!r}; download it again")
    if len(begin) < 8:
        raise CheckpointError(
            f"{path}: truncated or damaged GGUF file: it ends at byte {len(begin)}; download it again"
        )
    version = int.from_bytes(begin[4:8], "little")
    if version in VERSIONS:
        return
    if int.from_bytes(begin[4:8], "big") in VERSIONS:
        raise CheckpointError(f"{path}: is big-endian, which is not supported; get the little-endian file")
    raise CheckpointError(
        f"{path}: has GGUF version {version}, expected {' or '.join(map(str, VERSIONS))}; "
        "get a newer file, or convert the model again with llama.cpp"
    )


class Cursor:
    """Reads values one after another; each step checks that the file holds them."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.size = data, path, len(data)
        self.place = 0

    def damaged(self, what: str) -> CheckpointError:
        """The error for a header that breaks a rule."""
        return CheckpointError(f"{self.path}: truncated or damaged GGUF file: {what}; download it again")

    def take(self, count: int) -> int:
        """Moves `count` bytes on and returns where they begin."""
        begin = self.place
        if count > self.size - begin:
            raise self.damaged(f"its header goes on to byte {begin + count}, the file ends at {self.size}")
        self.place = begin + count
        return begin

    def scalar(self, code: str) -> Any:
        """A number or truth value."""
        code = "<" + code
        return struct.unpack_from(code, self.data, self.take(struct.calcsize(code)))[0]

    def raw(self) -> bytes:
        """A string, as it is stored."""
        length = self.scalar("Q")
        begin = self.take(length)
        return self.data[begin : begin + length]

    def text(self) -> str:
        """A string as text."""
        raw = self.raw()
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{raw[:40]!r} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """A metadata value: an array of numbers as a list, of strings as a list of bytes."""
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise self.damaged(f"a value has the unknown type {kind}")
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in SCALARS:
            code = "<" + SCALARS[inner]
            begin = self.take(count * struct.calcsize(code))
            return np.frombuffer(self.data, code, count, begin).tolist()
        if inner != STRING:
            raise self.damaged(f"an array holds values of the unsupported type {inner}")
        return self.strings(count)

    def strings(self, count: int) -> list[bytes]:
        """An array of strings; a plain loop, for there may be hundreds of thousands."""
        data, place, size, found = self.data, self.place, self.size, []
        for _ in range(count):
            begin = place + 8
            place = begin + int.from_bytes(data[place:begin], "little")
            if place > size or begin > size:
                raise self.damaged(f"its header goes on to byte {place}, the file ends at {size}")
            found.append(data[begin:place])
        self.place = place
        return found
