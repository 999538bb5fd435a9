"""Downloads a model from the Hugging Face hub into the local store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mpo_formats.errors import CheckpointError, ConfigError, MpoError, OutputError
from mpo_runtime.weights import store

# Short names of models on the hub, for export and pull, with the commits that they mean. The id alone takes the newest.
ALIASES = {
    "granite": "ibm-granite/granite-3.3-8b-instruct@51dd4bc2ade4059a6bd87649d68aa11e4fb2529b",
    "granite-2b": "ibm-granite/granite-3.3-2b-instruct@707f574c62054322f6b5b04b6d075f0a8f05e0f0",
    "granite-4-micro": "ibm-granite/granite-4.0-micro@56111ae135df9c53a78c99028e7bc24035a9e979",
}


def is_identifier(text: str) -> bool:
    """Whether a text has the form of a hub id: `owner/name`, or `owner/name@revision`."""
    name = text.split("@", 1)[0]
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(store.SUFFIXES)


def split_revision(identifier: str) -> tuple[str, str | None]:
    """`owner/name@revision` as the id and its revision (a branch, tag or commit); None for the newest.

    Raises:
        ConfigError: for an empty revision.
    """
    name, at, revision = identifier.partition("@")
    if at and not revision:
        raise ConfigError(f"{identifier}: expected a branch, tag or commit after @; leave @ out for the newest")
    return name, revision or None


def pull(
    identifier: str,
    name: str | None = None,
    *,
    file: str | None = None,
    replace: bool = False,
    seconds: float | None = None,
) -> store.Entry:
    """Downloads `owner/name[@revision]` into the store: its `.mpo` file where it has one, else its safetensors folder.

    An interrupted download is resumed by the next call.

    Args:
        name: of the new entry; the identifier without its revision where None.
        file: name of the `.mpo` file to take where the repository has several.
        replace: replaces an entry of that name.
        seconds: how long the hub may take to answer before it counts as out of reach; None for its client's own limit.

    Raises:
        MpoError: when the hub cannot be reached, has no such model, or the downloaded files are no model.
    """
    chosen = store.check_name(name or split_revision(identifier)[0])
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
    model, revision = split_revision(identifier)
    with reach(identifier, "copy the model here and run: mpo-run pull FOLDER, or FILE.mpo") as hub:
        # Without a network list_repo_files retries for half a minute; model_info fails at once.
        facts = hub.HfApi().model_info(model, revision=revision, timeout=seconds, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in facts.siblings or []}
        chosen = choose_file(identifier, list(sizes), file)
        wanted = [chosen] if chosen else [name for name in sizes if any(fnmatch(name, rule) for rule in store.NEEDED)]
        require_room(identifier, sum(sizes[name] for name in wanted), folder)
        if chosen:
            return Path(hub.hf_hub_download(model, chosen, revision=revision, local_dir=folder))
        hub.snapshot_download(model, revision=revision, allow_patterns=list(store.NEEDED), local_dir=folder)
        return folder


def require_room(identifier: str, needed: int, folder: Path) -> None:
    """Raises OutputError where the disk has not room for what is still to be downloaded of `needed` bytes into a folder."""
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    here = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    free = shutil.disk_usage(place).free
    if needed - here > free:
        raise OutputError(
            f"{identifier}: the download takes {(needed - here) / 1e9:.2f} GB, and {place} has {free / 1e9:.2f} GB free; "
            "free space there, or set MPO_HOME (for pull) or HF_HOME (for export) to another disk"
        )


def cached_folder(identifier: str, *, seconds: float | None = None) -> Path:
    """The folder of a checkpoint in the hub client's own cache, downloaded if needed; its name is the revision.

    Args:
        seconds: how long the hub may take to answer before only what the cache holds is looked at; None for no such limit.

    Raises:
        CheckpointError: when the hub cannot be reached or has no such model.
    """
    model, revision = split_revision(identifier)
    with reach(identifier, "copy the model's folder here and run: mpo-export FOLDER") as hub:
        if seconds is not None:
            try:
                hub.HfApi().model_info(model, revision=revision, timeout=seconds)
            except Exception:
                if folder := earlier_download(hub, identifier):
                    return folder
                raise
        return Path(hub.snapshot_download(model, revision=revision, allow_patterns=list(store.NEEDED)))


def earlier_download(hub: Any, identifier: str) -> Path | None:
    """The folder of a checkpoint that the hub client's cache holds with its weights, without asking the hub."""
    try:
        model, revision = split_revision(identifier)
        folder = Path(hub.snapshot_download(model, revision=revision, local_files_only=True))
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
        if type(error).__name__ == "GatedRepoError":
            raise CheckpointError(
                f"{identifier}: is gated; accept its licence on the model's page and give your token: hf auth login, or HF_TOKEN"
            ) from None
        if type(error).__name__ in ("RepositoryNotFoundError", "RevisionNotFoundError"):
            raise CheckpointError(
                f"{identifier}: the hub has no such model or revision, or it is private; check the name, or give your token "
                "(hf auth login, or HF_TOKEN)"
            ) from None
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
