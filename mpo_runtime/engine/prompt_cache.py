"""Files that hold the KV cache of the beginning of a text, so that another process need not run it again.

A file is: the line MAGIC; the length of the header in 8 bytes, little endian; the header, JSON; the pages; the SHA-256 of all
that. The header has exactly these keys: version, settings (what the content depends on: model, types, kernels), page_bytes,
ids, and exact, the number of leading tokens that were run as parts of a prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mpo_formats import ConfigError
from mpo_runtime.backends.ops import PAGE
from mpo_runtime.engine.pages import PrefixTree
from mpo_runtime.filesystem import replace_file

MAGIC = b"MPO KV cache\n"
VERSION = 1
LARGEST_HEADER = 64 << 20
KEYS = {"version", "settings", "page_bytes", "ids", "exact"}
DIGEST = hashlib.sha256().digest_size


def save(path: Path, tree: PrefixTree, settings: Mapping[str, str], wanted: Sequence[int] | None = None) -> int:
    """Writes the beginning that was used last, and returns the number of its tokens; 0, and no file, where none is kept.

    Args:
        wanted: the ids of a text, of which as much is written as is kept.

    Raises:
        ConfigError: where the file cannot be written.
    """
    found = [(node, len(node.tokens)) for node in tree.latest()] if wanted is None else tree.match(wanted, exact=False)
    nodes = [node for node, _ in found]
    ids = [token for node, count in found for token in node.tokens[:count]]
    if not ids:
        return 0
    exact = 0
    for index, (node, count) in enumerate(found):
        if exact == index * PAGE:
            exact += min(node.exact, count)
    header = {"version": VERSION, "settings": dict(settings), "page_bytes": tree.pool.store.page_bytes}
    encoded = json.dumps({**header, "ids": ids, "exact": exact}).encode()

    def content() -> Iterator[bytes]:
        digest = hashlib.sha256()
        for part in (MAGIC, len(encoded).to_bytes(8, "little"), encoded):
            digest.update(part)
            yield part
        for node in nodes:
            page = tree.pool.store.read(node.page)
            digest.update(page)
            yield page
        yield digest.digest()

    try:
        replace_file(path, content())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); give another name") from None
    return len(ids)


def restore(path: Path, tree: PrefixTree, settings: Mapping[str, str]) -> list[int]:
    """Lets the tree keep what a file holds, and returns its ids.

    Raises:
        ConfigError: where the file cannot be read, is damaged or of another version, or belongs to another model or settings;
            nothing is kept then.
    """
    try:
        with path.open("rb") as file:
            return _restore(path, file, tree, settings)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def _restore(path: Path, file: BinaryIO, tree: PrefixTree, settings: Mapping[str, str]) -> list[int]:
    digest = hashlib.sha256()
    header = _header(path, file, digest, settings)
    ids, size = header["ids"], tree.pool.store.page_bytes
    if header["page_bytes"] != size:
        raise ConfigError(f"{path}: its pages have {header['page_bytes']} bytes, this model's {size}")
    count = -(-len(ids) // PAGE)
    expected = file.tell() + count * size + DIGEST
    found = path.stat().st_size
    if found != expected:
        raise ConfigError(f"{path}: has {found} bytes, expected {expected}: it is not whole")
    pages: list[int] = []
    try:
        for _ in range(count):
            content = file.read(size)
            digest.update(content)
            pages.append(tree.pool.take())
            tree.pool.store.write(pages[-1], content)
        if file.read(DIGEST) != digest.digest():
            raise ConfigError(f"{path}: wrong checksum; the file was damaged after it was written")
        tree.insert(ids, pages, header["exact"])
    finally:
        for page in pages:
            tree.pool.release(page)
    return list(ids)


def _header(path: Path, file: BinaryIO, digest: Any, settings: Mapping[str, str]) -> dict[str, Any]:
    """The checked header of a file."""
    magic, length = file.read(len(MAGIC)), file.read(8)
    size = int.from_bytes(length, "little")
    if magic != MAGIC or len(length) != 8 or size > LARGEST_HEADER:
        raise ConfigError(f"{path}: is no file of --prompt-cache")
    encoded = file.read(size)
    digest.update(magic + length + encoded)
    try:
        header = json.loads(encoded)
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: its header is not JSON: it is not whole") from None
    if not isinstance(header, dict) or header.get("version") != VERSION:
        found = header.get("version") if isinstance(header, dict) else None
        raise ConfigError(f"{path}: has version {found!r}, expected {VERSION}")
    if not _has_form(header):
        raise ConfigError(f"{path}: its header has another form than version {VERSION} says")
    stored: dict[str, Any] = header["settings"]
    for name in sorted({*settings, *stored}):
        if stored.get(name) != settings.get(name):
            raise ConfigError(f"{path}: was made with {name} {stored.get(name)}, this is {name} {settings.get(name)}")
    return header


def _has_form(header: dict[str, Any]) -> bool:
    """Whether a header has exactly the keys of this version, each of its type and within its range."""
    if set(header) != KEYS or type(header["exact"]) is not int or type(header["page_bytes"]) is not int:
        return False
    ids, settings = header["ids"], header["settings"]
    if not isinstance(settings, dict) or not isinstance(ids, list) or not 0 <= header["exact"] <= len(ids):
        return False
    return bool(ids) and all(type(token) is int and token >= 0 for token in ids)
