"""The local store: models kept under a name, so that every command and `load` take the name in place of a path.

An entry is a file `NAME.mpo` or `NAME.gguf` or a Hugging Face folder `NAME` in the folder `models` of the store; in a name
`owner/name` the slash is stored as two hyphens. A model is checked before it is added, and it appears complete or not at all.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mpo_formats import MpoFile
from mpo_formats.errors import CheckpointError, ConfigError, OutputError
from mpo_runtime.filesystem import expand_user, user_folder
from mpo_runtime.weights import gguf
from mpo_runtime.weights.checkpoint import Checkpoint
from mpo_runtime.weights.protocol import Weights

SUFFIX = ".mpo"
SUFFIXES = (SUFFIX, gguf.SUFFIX)
# Such a part is a valid file name on every system, and no path that leads out of the store's folder.
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._]|-(?!-)){0,95}"
_NAME = re.compile(rf"(?:{_PART}/)?{_PART}")
# What a Hugging Face folder needs to run; nothing else is copied or downloaded.
NEEDED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "chat_templates/*.jinja",
    "model.safetensors.index.json",
    "*.safetensors",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A model in the store: its name, its path and its size in bytes."""

    name: str
    path: Path
    size: int

    @property
    def kind(self) -> str:
        """`mpo`, `gguf`, or `folder` for a Hugging Face folder."""
        return "folder" if self.path.is_dir() else self.path.suffix[1:]


def home() -> Path:
    """The store's folder: MPO_HOME, else mpo-runtime in the user's data folder (XDG_DATA_HOME, or ~/.local/share).

    Raises:
        ConfigError: where the user has no such folder.
    """
    if chosen := os.environ.get("MPO_HOME"):
        return expand_user(chosen).absolute()
    data = user_folder("XDG_DATA_HOME", ".local/share")
    if data is None:
        raise ConfigError("the store has no place: this user has no home folder; set MPO_HOME to a folder for it")
    return data / "mpo-runtime"


def models_folder() -> Path:
    """The folder that holds the entries."""
    return home() / "models"


def check_name(name: str) -> str:
    """The name itself; raises ConfigError unless it is `name` or `owner/name` of plain characters."""
    if not _NAME.fullmatch(name) or name.endswith((".", *SUFFIXES)):
        raise ConfigError(
            f"{name!r} is no name for the store; expected letters, digits, '.', '_' and single '-', "
            "as in granite or owner/granite; choose one with --name"
        )
    return name


def find(name: str) -> Entry | None:
    """The entry of that name, or None."""
    if not _NAME.fullmatch(name):
        return None
    try:
        plain = models_folder() / name.replace("/", "--")
    except ConfigError:  # no store, and so nothing in it
        return None
    files = [plain.with_name(plain.name + suffix) for suffix in SUFFIXES]
    found = [path for path in files if path.is_file()] + [plain] * plain.is_dir()
    return Entry(name, found[0], size_of(found[0])) if found else None


def resolve(path: str | Path) -> Path:
    """The path itself where a file or folder exists there, else the path of the entry of that name.

    Raises:
        CheckpointError: when there is neither.
    """
    place = Path(path)
    if place.exists():
        return place
    entry = find(str(path))
    if entry is None:
        raise CheckpointError(
            f"{place}: no such file or folder, nor a name in the store (see mpo-run list); "
            "give a .mpo file or a Hugging Face folder, or a GGUF file"
        )
    return entry.path


def open_path(path: Path, *, verify: bool = False) -> Weights:
    """Opens a `.mpo` or GGUF file or a Hugging Face folder; `verify` checks the checksums of a `.mpo` file.

    Raises:
        CheckpointError: when a folder or GGUF file is no complete model of a known architecture.
        FormatError: when a `.mpo` file breaks a rule of SPEC.md.
    """
    if not path.is_dir() and gguf.is_gguf(path):
        return gguf.Gguf(path)
    return Checkpoint(path) if path.is_dir() else MpoFile(path, verify=verify)


def entries() -> list[Entry]:
    """All models in the store, by name."""
    folder = models_folder()
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    names = [(without_suffix(path.name).replace("--", "/"), path) for path in paths]
    return [
        Entry(name, path, size_of(path))
        for name, path in names
        if _NAME.fullmatch(name) and (path.suffix in SUFFIXES or path.is_dir())
    ]


def without_suffix(name: str) -> str:
    """The name of a file without .mpo or .gguf, or of a folder as it is."""
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def add(source: Path, name: str | None = None, *, replace: bool = False) -> Entry:
    """Adds a `.mpo` or GGUF file or a Hugging Face folder to the store, by hard links where the file system has them.

    Args:
        name: of the new entry; where None, the name of the file or folder.
        replace: replaces an entry of that name.

    Raises:
        MpoError: when the source is no model, the name is taken or not valid, or the store cannot be written.
    """
    chosen = check_name(name or without_suffix(source.resolve().name))
    refuse_taken(chosen, replace)
    require_writable()
    open_path(source).close()  # raises where it is no model
    with staging(chosen) as stage:
        if source.is_dir():
            target = stage / "folder"
            for file in sorted({match for pattern in NEEDED for match in source.glob(pattern)}):
                place = target / file.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(file, place)
        else:
            target = stage / f"file{gguf.SUFFIX if gguf.is_gguf(source) else SUFFIX}"
            link_or_copy(source, target)
        return publish(target, chosen)


def refuse_taken(name: str, replace: bool) -> None:
    """Raises OutputError for a name that is in the store, unless `replace`."""
    if not replace and find(name):
        raise OutputError(f"{name}: is in the store already; add --force to replace it, or --name for another name")


def require_writable() -> None:
    """Raises OutputError where the store cannot be written: known before a model is opened or downloaded."""
    with staging("a model"):
        return


@contextmanager
def staging(name: str) -> Iterator[Path]:
    """Yields a new temporary folder inside the store for a new entry; raises OutputError where the store is not writable."""
    folder = models_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".adding-", dir=folder))
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); set MPO_HOME to another folder") from None
    try:
        yield stage
    except OSError as error:
        raise OutputError(
            f"{name}: cannot be stored in {folder} ({error.strerror}); free space there, or set "
            "MPO_HOME to another folder"
        ) from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def publish(target: Path, name: str) -> Entry:
    """Moves a finished file or folder to its place; an older entry of that name is removed afterwards."""
    place = models_folder() / (name.replace("/", "--") + ("" if target.is_dir() else target.suffix))
    old = find(name)
    if old and (old.kind == "folder" or old.path != place):
        aside = target.parent / "old"
        os.rename(old.path, aside)  # removed with the staging folder
    os.replace(target, place)
    return Entry(name, place, size_of(place))


def link_or_copy(source: Path, target: Path) -> None:
    """Makes a hard link, or else a copy that is flushed to the disk."""
    real = source.resolve()
    try:
        os.link(real, target)
        return
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
    shutil.copyfile(real, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())


def remove(name: str) -> Entry:
    """Deletes an entry and returns it; never touches anything outside the store's folder.

    Raises:
        ConfigError: when there is no entry of that name.
        OutputError: when it cannot be deleted.
    """
    entry = find(name)
    if entry is None or entry.path.parent != models_folder():
        raise ConfigError(f"{name}: no such name in the store; see mpo-run list")
    try:
        if entry.path.is_symlink() or not entry.path.is_dir():
            entry.path.unlink()
        else:
            shutil.rmtree(entry.path)
    except OSError as error:
        raise OutputError(f"{entry.path}: cannot be deleted ({error.strerror})") from None
    return entry


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size
