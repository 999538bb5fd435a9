"""Answers that are kept while they come, so that a run which was stopped goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


class Kept:
    """Rows by key, in a file of JSON lines; a line that was cut short is asked for again.

    Args:
        path: the file; None keeps the rows in memory alone.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        text = path.read_text(encoding="utf-8") if path is not None and path.exists() else ""
        for line in text.split("\n"):
            try:
                found = json.loads(line)
                self.rows[found.pop("key")] = found
            except (ValueError, KeyError, AttributeError, TypeError):
                continue

    def add(self, key: str, entry: dict[str, Any]) -> dict[str, Any]:
        """Appends a row, on a new line even if the last one was cut short."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" * (file.tell() > 0) + json.dumps({"key": key, **entry}))
        self.rows[key] = entry
        return entry


def weights_digest(path: Path) -> str:
    """The digest of a file, or of the safetensors files of a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
