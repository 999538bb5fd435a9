"""Takes a small valid file apart, so that a case can damage one thing and leave the rest consistent."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.formats import tiny

CHECKSUMS = "mpo.checksums"
CERTIFICATE = "mpo.certificate"


@functools.cache
def valid_file() -> bytes:
    """The bytes of a tiny valid file with every kind of term; the writer makes the same ones every time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "valid.mpo"
        tiny.write(path, tiny.model(), measure=lambda _: tiny.certificates())
        return path.read_bytes()


def frame(text: bytes, data: bytes) -> bytes:
    """Length field, header text filled to a multiple of 64, and data."""
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text + data


class Sample:
    """The header as plain data and the tensors' bytes, free to be changed."""

    def __init__(self) -> None:
        raw = valid_file()
        start = 8 + int.from_bytes(raw[:8], "little")
        self.table: dict[str, Any] = json.loads(raw[8:start])
        self.data = bytearray(raw[start:])

    def later(self, transform: dict[str, Any] | None = None) -> Sample:
        """This sample as version 0.5, whose fields it then has; q and k take the transform, whose tensors are missing."""
        record = json.loads(self.metadata["architecture"])
        record["windows"], record["rope"]["attention_factor"] = [], 1.0
        layers = [{**layer, "hadamard": 0, "transform": None} for layer in json.loads(self.metadata["layers"])]
        layers[1]["transform"] = layers[2]["transform"] = transform
        self.metadata.update(version="0.5", architecture=json.dumps(record), layers=json.dumps(layers))
        return self

    @property
    def metadata(self) -> dict[str, Any]:
        return self.table["__metadata__"]

    def bytes(self) -> bytes:
        """The whole file."""
        return frame(self.text().encode(), bytes(self.data))

    def text(self) -> str:
        """The header's JSON, written as MpoWriter writes it, so that an unchanged header keeps its checksum."""
        return json.dumps(self.table, separators=(",", ":"))

    def change(self, key: str, path: tuple[str | int, ...], value: Any) -> bytes:
        """Sets one value inside a metadata record."""
        record = json.loads(self.metadata[key])
        if path:
            inner = record
            for step in path[:-1]:
                inner = inner[step]
            inner[path[-1]] = value
        self.metadata[key] = json.dumps(record if path else value)
        return self.bytes()

    def remove(self, key: str, path: tuple[str | int, ...]) -> bytes:
        """Deletes one value inside a metadata record."""
        record = json.loads(self.metadata[key])
        inner = record
        for step in path[:-1]:
            inner = inner[step]
        del inner[path[-1]]
        self.metadata[key] = json.dumps(record)
        return self.bytes()

    def row(self, name: str, **fields: Any) -> bytes:
        """Sets fields of a tensor's row."""
        self.table[name].update(fields)
        return self.bytes()

    def replace(self, old: str, new: str, inside: str = "") -> bytes:
        """Replaces text of the header once, or of one metadata value."""
        if inside:
            assert old in self.metadata[inside]
            self.metadata[inside] = self.metadata[inside].replace(old, new, 1)
            return self.bytes()
        assert old in self.text()
        return frame(self.text().replace(old, new, 1).encode(), bytes(self.data))

    def span(self, name: str) -> tuple[int, int]:
        """Begin and end of a tensor in the data."""
        begin, end = self.table[name]["data_offsets"]
        return begin, end

    def drop(self, name: str, *, bytes_too: bool) -> bytes:
        """Deletes a tensor's row, and its bytes with it where asked, moving what follows."""
        begin, end = self.span(name)
        del self.table[name]
        if bytes_too:
            del self.data[begin:end]
            self.shift(begin, begin - end)
        return self.bytes()

    def shift(self, place: int, by: int) -> None:
        """Moves the rows of the tensors from `place` on."""
        for key, row in self.table.items():
            if key != "__metadata__" and row["data_offsets"][0] >= place:
                row["data_offsets"] = [offset + by for offset in row["data_offsets"]]

    def poke(self, name: str, value: bytes, offset: int = 0, *, sign: bool = True) -> bytes:
        """Overwrites bytes of a tensor; with `sign` the checksums are made to agree."""
        begin, _ = self.span(name)
        self.data[begin + offset : begin + offset + len(value)] = value
        return self.signed() if sign else self.bytes()

    def certificate(self, edit: Callable[[dict[str, Any]], Any] | None = None, text: str = "") -> bytes:
        """Replaces the certificate's text, or edits its record, and signs the file."""
        begin, end = self.span(CERTIFICATE)
        record = json.loads(self.data[begin:end])
        if edit:
            edit(record)
        return self.poke(CERTIFICATE, (text or json.dumps(record)).encode().ljust(end - begin))

    def signed(self) -> bytes:
        """The whole file with right checksums, as section 7 of SPEC.md defines them."""
        header = frame(self.text().encode(), b"")
        digests = [hashlib.sha256(header).digest()]
        for name, row in self.table.items():
            if name not in ("__metadata__", CHECKSUMS):
                begin, end = row["data_offsets"]
                digests.append(hashlib.sha256(self.data[begin:end]).digest())
        begin, end = self.span(CHECKSUMS)
        self.data[begin:end] = b"".join(digests)
        return self.bytes()

    def reordered(self, first: str, second: str) -> bytes:
        """Two tensors of the same size change places, names and all."""
        names = list(self.table)
        i, j = names.index(first), names.index(second)
        names[i], names[j] = second, first
        rows = copy.deepcopy(self.table)
        rows[first]["data_offsets"], rows[second]["data_offsets"] = (
            rows[second]["data_offsets"],
            rows[first]["data_offsets"],
        )
        self.table = {name: rows[name] for name in names}
        return self.bytes()
