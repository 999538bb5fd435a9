"""Finds the source model: the embedded one, an alias, a folder or a hub id."""

from __future__ import annotations

import importlib.resources
import os
from dataclasses import dataclass
from pathlib import Path

from mpo_formats import CheckpointError

ALIASES = {
    "granite": "ibm-granite/granite-3.3-8b-instruct",
    "granite-2b": "ibm-granite/granite-3.3-2b-instruct",
}
NEEDED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")


@dataclass(frozen=True, slots=True)
class Source:
    """A model's folder, a short name for files made from it, and the hub revision if it came from there."""

    folder: Path
    name: str
    revision: str | None


def data_folder() -> Path:
    """The folder of the embedded model and texts."""
    return Path(str(importlib.resources.files("mpo_exporter") / "data"))


def find_source(model: str) -> Source:
    """Resolves `demo`, `granite`, `granite-2b`, a folder or a hub id `owner/name`, downloading the last if needed.

    Raises:
        CheckpointError: when there is no such folder and nothing can be downloaded.
    """
    if model == "demo":
        return Source(data_folder() / "granite-stand-in", "demo", None)
    folder = Path(model)
    if model not in ALIASES and folder.is_dir():
        return Source(folder, folder.resolve().name, None)
    identifier = ALIASES.get(model, model)
    if identifier.count("/") != 1 or identifier.startswith((".", "/", "~")) or folder.is_absolute():
        known = ", ".join(("demo", *ALIASES))
        raise CheckpointError(f"{model}: no such folder; give {known}, a Hugging Face folder, or a hub id owner/name")
    return download(identifier, model if model in ALIASES else identifier.split("/")[1])


def download(identifier: str, name: str) -> Source:
    """Downloads a model from the hub, or finds it in the hub's cache.

    Raises:
        CheckpointError: when the hub cannot be reached or has no such model.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(f"{identifier}: downloading needs the export extra: pip install 'mpo-runtime[export]'; "
                              "or give a Hugging Face folder") from None  # fmt: skip
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        folder = Path(huggingface_hub.snapshot_download(identifier, allow_patterns=list(NEEDED)))
    except Exception as error:  # the hub's client raises its own, urllib's and the HTTP library's errors
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{identifier}: cannot be downloaded ({reason}); if this machine is offline, copy the "
                              f"model's folder here and run: mpo-export FOLDER") from None  # fmt: skip
    return Source(folder, name, folder.name)
