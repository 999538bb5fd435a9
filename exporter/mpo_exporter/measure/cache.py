"""Measurements cached between runs: one file each, written atomically, checked against its key and digest when read.

A file is a safetensors container with a header tensor (JSON: the key and a digest of the rest), the content as JSON and
any arrays. Its name holds the digests of the model and the text; its key holds everything else that the measurement
depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mpo_exporter.progress import Log, no_log
from mpo_formats import FormatError
from mpo_formats.codec import describe, parse_json
from mpo_runtime.filesystem import expand_user, replace_file, user_folder

HEADER, CONTENT = "mpo.header", "mpo.content"
SUFFIX = ".measured"
Arrays = Mapping[str, NDArray[Any]]


def cache_folder() -> Path:
    """The folder of cached measurements: MPO_CACHE, else `cache` in MPO_HOME, else mpo-runtime in the user's cache folder.

    The user's cache folder is XDG_CACHE_HOME, or ~/.cache where that is unset or relative; without a home folder it is the
    folder for temporary files.
    """
    if chosen := os.environ.get("MPO_CACHE"):
        return expand_user(chosen).absolute()
    if home := os.environ.get("MPO_HOME"):
        return expand_user(home).absolute() / "cache"
    base = user_folder("XDG_CACHE_HOME", ".cache") or Path(tempfile.gettempdir())  # a user without a home folder
    return base / "mpo-runtime"


@dataclass(frozen=True, slots=True)
class Cached:
    """The contents of a cache file: plain JSON data, and arrays by name."""

    content: Any
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CacheFile:
    """Where one measurement is cached, and what it depends on.

    Args:
        kind, name, parts: make the file's name: the kind of measurement, a name of what is measured, and the digests of
            model and text.
        key: everything else that the measurement depends on, as plain JSON data; a file with another key is stale.
    """

    kind: str
    name: str
    parts: tuple[str, ...]
    key: dict[str, Any]

    @property
    def stem(self) -> str:
        """The beginning of the file's name, shared by all measurements of this kind and name."""
        return f"{self.kind}-{re.sub(r'[^A-Za-z0-9._-]', '_', self.name)[:60]}-"

    @property
    def path(self) -> Path:
        """The path of the file."""
        return cache_folder() / f"{self.stem}{'-'.join(part[:16] for part in self.parts)}{SUFFIX}"

    def read(self, log: Log = no_log) -> Cached | None:
        """The cached measurement, or None; logs the reason if a file exists that cannot be used."""
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            if any(self.path.parent.glob(f"{self.stem}*{SUFFIX}")):
                log(f"{self.kind}: the measurement of {self.name} is of other weights or another text; measuring again")
            return None
        except OSError as error:
            log(f"{self.kind}: {self.path} cannot be read ({error.strerror}); measuring again")
            return None
        try:
            key, cached = unpack(raw)
        except (SafetensorError, FormatError, KeyError, TypeError, ValueError):
            log(f"{self.kind}: {self.path} is damaged; measuring again")
            return None
        if key != self.key:
            log(f"{self.kind}: {self.path} is stale ({difference(key, self.key)}); measuring again")
            return None
        return cached

    def write(self, cached: Cached, log: Log = no_log) -> None:
        """Writes a measurement; a failure is logged and has no other effect."""
        path = self.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, pack(self.key, cached))
        except OSError as error:
            log(f"{self.kind}: cannot be cached in {path.parent} ({error.strerror}); set MPO_CACHE to another folder")


def pack(key: dict[str, Any], cached: Cached) -> bytes:
    """The bytes of a cache file."""
    content = json.dumps(cached.content, allow_nan=False).encode()
    header = json.dumps({"key": key, "sha256": digest(key, content, cached.arrays)}).encode()
    plain = {HEADER: np.frombuffer(header, np.uint8), CONTENT: np.frombuffer(content, np.uint8)}
    return save({**plain, **{name: np.ascontiguousarray(array) for name, array in cached.arrays.items()}})


def unpack(raw: bytes) -> tuple[dict[str, Any], Cached]:
    """The key and the contents of a cache file's bytes; damaged bytes raise ValueError, KeyError and the like."""
    tensors = load(raw)
    header = parse_json(tensors.pop(HEADER).tobytes(), "header")
    content = tensors.pop(CONTENT).tobytes()
    if header["sha256"] != digest(header["key"], content, tensors):
        raise ValueError("the digest differs")
    return header["key"], Cached(json.loads(content), tensors)


def digest(key: Any, content: bytes, arrays: Arrays) -> str:
    """SHA-256 of the key, the content and the arrays."""
    sum_ = hashlib.sha256(json.dumps(key).encode() + content)
    for name in sorted(arrays):
        sum_.update(name.encode())
        sum_.update(np.ascontiguousarray(arrays[name]).tobytes())
    return sum_.hexdigest()


def difference(found: Any, wanted: dict[str, Any]) -> str:
    """The first entry in which two keys differ, for a message."""
    if isinstance(found, dict):
        for name, value in wanted.items():
            if found.get(name) != value:
                return f"{name} {describe(found.get(name))}, now {describe(value)}"
    return "measured by another version"
