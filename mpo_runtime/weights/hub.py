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


def pull(
    identifier: str,
    name: str | None = None,
    *,
    file: str | None = None,
    replace: bool = False,
    seconds: float | None = None,
) -> store.Entry:
    """Downloads `owner/name` into the store: its `.mpo` file where it has one, else its safetensors folder.

    An interrupted download is resumed by the next call.

    Args:
        name: of the new entry; the identifier where None.
        file: name of the `.mpo` file to take where the repository has several.
        replace: replaces an entry of that name.
        seconds: how long the hub may take to answer before it counts as out of reach; None for its client's own limit.

    Raises:
        MpoError: when the hub cannot be reached, has no such model, or the downloaded files are no model.
    """
    chosen = store.check_name(name or identifier)
    store.refuse_taken(chosen, replace)
    store.require_writable()
    partial = store.models_folder() / f".pulling-{chosen.replace('/', '--')}"
    target = fetch(identifier, file, partial, seconds)
    store.open_path(target).close()  # raises where it is no model
    with store.staging(chosen) as stage:
        staged = stage / ("folder" if target.is_dir() else "file.mpo")
        os.rename(target, staged)
        shutil.rmtree(staged / ".cache", ignore_errors=True)  # the hub client's own records
        shutil.rmtree(partial, ignore_errors=True)
        return store.publish(staged, chosen)


def fetch(identifier: str, file: str | None, folder: Path, seconds: float | None = None) -> Path:
    """Downloads into a folder and returns the `.mpo` file or the folder; raises CheckpointError where that fails."""
    with reach(identifier, "copy the model here and run: mpo-run pull FOLDER, or FILE.mpo") as hub:
        # Without a network list_repo_files retries for half a minute; model_info fails at once.
        siblings = hub.HfApi().model_info(identifier, timeout=seconds).siblings or []
        chosen = choose_file(identifier, [sibling.rfilename for sibling in siblings], file)
        if chosen:
            return Path(hub.hf_hub_download(identifier, chosen, local_dir=folder))
        hub.snapshot_download(identifier, allow_patterns=list(store.NEEDED), local_dir=folder)
        return folder


def cached_folder(identifier: str, *, seconds: float | None = None) -> Path:
    """The folder of a checkpoint in the hub client's own cache, downloaded if needed; its name is the revision.

    Args:
        seconds: how long the hub may take to answer before only what the cache holds is looked at; None for no such limit.

    Raises:
        CheckpointError: when the hub cannot be reached or has no such model.
    """
    with reach(identifier, "copy the model's folder here and run: mpo-export FOLDER") as hub:
        if seconds is not None:
            try:
                hub.HfApi().model_info(identifier, timeout=seconds)
            except Exception:
                if folder := earlier_download(hub, identifier):
                    return folder
                raise
        return Path(hub.snapshot_download(identifier, allow_patterns=list(store.NEEDED)))


def earlier_download(hub: Any, identifier: str) -> Path | None:
    """The folder of a checkpoint that the hub client's cache holds with its weights, without asking the hub."""
    try:
        folder = Path(hub.snapshot_download(identifier, local_files_only=True))
    except Exception:  # its kind depends on what the cache lacks
        return None
    return folder if (folder / "config.json").exists() and any(folder.glob("*.safetensors")) else None


@contextmanager
def reach(identifier: str, offline: str) -> Iterator[Any]:
    """Yields the hub's client library; its errors become a CheckpointError that ends with `offline`, the remedy.

    Args:
        offline: what to do on a machine without a network.
    """
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
    except Exception as error:  # its own errors, those of urllib, and those of its HTTP library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise CheckpointError(
            f"{identifier}: cannot be downloaded ({reason}); if this machine is offline, {offline}"
        ) from None


def choose_file(identifier: str, names: list[str], wanted: str | None) -> str | None:
    """The name of the `.mpo` file to download, None where the repository has none.

    Raises:
        ConfigError: when `wanted` is not in the repository, or is None and the repository has several.
    """
    files = sorted(name for name in names if name.endswith(store.SUFFIX))
    if wanted is not None:
        if wanted not in files:
            raise ConfigError(f"{identifier}: has no file {wanted}; it has {', '.join(files) or 'no .mpo file'}")
        return wanted
    if len(files) > 1:
        raise ConfigError(f"{identifier}: has several .mpo files; choose with --file: {', '.join(files)}")
    return files[0] if files else None
