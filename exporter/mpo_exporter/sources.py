"""Finds the source model: the embedded one, an alias, a folder or a hub id."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path

from mpo_formats import CheckpointError
from mpo_runtime.hub import cached_folder

ALIASES = {
    "granite": "ibm-granite/granite-3.3-8b-instruct",
    "granite-2b": "ibm-granite/granite-3.3-2b-instruct",
}


@dataclass(frozen=True, slots=True)
class Source:
    """A model's folder, a short name for files made from it, and the hub revision if it came from there."""

    folder: Path
    name: str
    revision: str | None


def data_folder() -> Path:
    """The folder of the embedded model and texts."""
    return Path(str(importlib.resources.files("mpo_exporter") / "data"))


def embedded_model() -> Path:
    """The folder of the embedded model, in Hugging Face layout."""
    return data_folder() / "granite-nano"


def find_source(model: str) -> Source:
    """Resolves `demo`, `granite`, `granite-2b`, a folder or a hub id `owner/name`, downloading the last if needed.

    Raises:
        CheckpointError: when there is no such folder and nothing can be downloaded.
    """
    if model == "demo":
        return Source(embedded_model(), "demo", None)
    folder = Path(model)
    if model not in ALIASES and folder.is_dir():
        return Source(folder, folder.resolve().name, None)
    identifier = ALIASES.get(model, model)
    if identifier.count("/") != 1 or identifier.startswith((".", "/", "~")) or folder.is_absolute():
        known = ", ".join(("demo", *ALIASES))
        raise CheckpointError(f"{model}: no such folder; give {known}, a Hugging Face folder, or a hub id owner/name")
    folder = cached_folder(identifier)
    return Source(folder, model if model in ALIASES else identifier.split("/")[1], folder.name)
