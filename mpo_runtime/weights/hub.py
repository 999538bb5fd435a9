"""Downloads a model from the Hugging Face hub into the local store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpo_formats.errors import CheckpointError, ConfigError, MpoError
from mpo_runtime.weights import store


def pull(identifier: str, name: str | None = None, *, file: str | None = None, replace: bool = False) -> store.Entry:
    """Downloads `owner/name` into the store: its `.mpo` file where it has one, else its safetensors folder.

    An interrupted download goes on where it stopped when it is started again.

    Args:
        name: what to call it; the identifier where None.
        file: which `.mpo` file, where the repository has several.
        replace: takes the place of an entry of that name.

    Raises:
        MpoError: when the hub cannot be reached, has no such model, or what came is no model.
    """
    chosen = store.check_name(name or identifier)
    store.refuse_taken(chosen, replace)
    partial = store.models_folder() / f".pulling-{chosen.replace('/', '--')}"
    target = fetch(identifier, file, partial)
    store.check_model(target)
    with store.staging(chosen) as stage:
        staged = stage / ("folder" if target.is_dir() else "file.mpo")
        os.rename(target, staged)
        shutil.rmtree(staged / ".cache", ignore_errors=True)  # the hub client's notes
        shutil.rmtree(partial, ignore_errors=True)
        return store.publish(staged, chosen)


def fetch(identifier: str, file: str | None, folder: Path) -> Path:
    """Downloads into a folder and returns the `.mpo` file or the folder; raises CheckpointError where that fails."""
    with reach(identifier, "copy the model here and run: mpo-run pull FOLDER, or FILE.mpo") as hub:
        # Unlike list_repo_files, model_info does not retry for half a minute where there is no network.
        siblings = hub.HfApi().model_info(identifier).siblings or []
        chosen = choose_file(identifier, [sibling.rfilename for sibling in siblings], file)
        if chosen:
            return Path(hub.hf_hub_download(identifier, chosen, local_dir=folder))
        hub.snapshot_download(identifier, allow_patterns=list(store.NEEDED), local_dir=folder)
        return folder


def cached_folder(identifier: str) -> Path:
    """The folder of a checkpoint in the hub client's own cache, downloaded if needed; its name is the revision.

    Raises:
        CheckpointError: when the hub cannot be reached or has no such model.
    """
    with reach(identifier, "copy the model's folder here and run: mpo-export FOLDER") as hub:
        return Path(hub.snapshot_download(identifier, allow_patterns=list(store.NEEDED)))


@contextmanager
def reach(identifier: str, offline: str) -> Iterator[Any]:
    """Yields the hub's client; its errors become a CheckpointError that says what to do without a network."""
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"{identifier}: the hub needs the package huggingface_hub: pip install 'mpo-runtime[export]'; or {offline}"
        ) from None
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        yield huggingface_hub
    except MpoError:
        raise
    except Exception as error:  # the client raises its own, urllib's and the HTTP library's errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise CheckpointError(
            f"{identifier}: cannot be downloaded ({reason}); if this machine is offline, {offline}"
        ) from None


def choose_file(identifier: str, names: list[str], wanted: str | None) -> str | None:
    """The `.mpo` file of a repository to download, None where it has none; raises ConfigError where it is not clear."""
    files = sorted(name for name in names if name.endswith(store.SUFFIX))
    if wanted is not None:
        if wanted not in files:
            raise ConfigError(f"{identifier}: has no file {wanted}; it has {', '.join(files) or 'no .mpo file'}")
        return wanted
    if len(files) > 1:
        raise ConfigError(f"{identifier}: has several .mpo files; choose with --file: {', '.join(files)}")
    return files[0] if files else None
