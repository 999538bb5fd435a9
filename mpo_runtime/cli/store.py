"""pull, list and rm: the local store."""

from __future__ import annotations

from mpo_formats.errors import ConfigError
from mpo_runtime.cli.console import json_text, size_text
from mpo_runtime.filesystem import expand_user
from mpo_runtime.weights import hub, store
from mpo_runtime.weights.known import KNOWN, pull_known


def pull_model(source: str, name: str | None, file: str | None, replace: bool) -> None:
    """Takes a path of this machine, a known model such as smollm2 or granite-2b, or else a hub id into the store."""
    path = expand_user(source)
    if path.exists():
        if file is not None:
            raise ConfigError("--file: is for hub ids; give the path of the .mpo file itself")
        entry = store.add(path, name, replace=replace)
    elif source in KNOWN:
        if file is not None:
            raise ConfigError(f"--file: is for hub ids; {source} is one model")
        entry = pull_known(KNOWN[source], name, lambda text: print(text, flush=True), replace=replace)
    elif source in hub.ALIASES:
        entry = hub.pull(hub.ALIASES[source], name or source, file=file, replace=replace)
    elif hub.is_identifier(source):
        entry = hub.pull(source, name, file=file, replace=replace)
    else:
        known = ", ".join((*KNOWN, *hub.ALIASES))
        raise ConfigError(f"{source}: no such file or folder; give one, {known}, or a hub id owner/name")
    print(f"{entry.name}: {size_text(entry.size)}, in the store; talk to it: mpo-run chat {entry.name}")


def list_models(as_json: bool) -> None:
    """Prints the store's models with their kinds and sizes."""
    found = store.entries()
    if as_json:
        print(
            json_text(
                [
                    {"name": entry.name, "kind": entry.kind, "bytes": entry.size, "path": str(entry.path)}
                    for entry in found
                ]
            )
        )
        return
    if not found:
        print(f"no models in {store.models_folder()}; take one in with mpo-run pull")
        return
    width = max(len(entry.name) for entry in found)
    for entry in found:
        print(f"{entry.name:<{width}}  {entry.kind:<6}  {size_text(entry.size):>8}")


def remove_models(names: list[str]) -> None:
    """Deletes models by name; stops at the first that is not there."""
    for name in names:
        entry = store.remove(name)
        print(f"{entry.name}: deleted ({size_text(entry.size)})")
