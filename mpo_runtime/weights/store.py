"""The local store: models kept under a name, so that every command and `load` take the name in place of a path.

An entry is a file `NAME.mpo` or a Hugging Face folder `NAME` in `models` of the store's folder; in a name `owner/name` the
slash is stored as two hyphens. What is added is checked first and appears whole or not at all.
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

from mpo_formats.errors import CheckpointError, ConfigError, OutputError

SUFFIX = ".mpo"
# Parts of names are file names everywhere, and cannot lead out of the store's folder.
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._]|-(?!-)){0,95}"
_NAME = re.compile(rf"(?:{_PART}/)?{_PART}")
# What a Hugging Face folder needs to run; nothing else is copied or downloaded.
NEEDED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "*.safetensors",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A model in the store: its name, where it lies and its size in bytes."""

    name: str
    path: Path
    size: int

    @property
    def kind(self) -> str:
        """`mpo`, or `folder` for a Hugging Face folder."""
        return "folder" if self.path.is_dir() else "mpo"


def home() -> Path:
    """The store's folder: MPO_HOME, or mpo-runtime in the user's data folder (XDG_DATA_HOME, ~/.local/share)."""
    if chosen := os.environ.get("MPO_HOME"):
        return Path(chosen).expanduser().absolute()
    data = os.environ.get("XDG_DATA_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(data) if os.path.isabs(data) else Path.home() / ".local" / "share") / "mpo-runtime"


def models_folder() -> Path:
    """Where the entries lie."""
    return home() / "models"


def check_name(name: str) -> str:
    """The name itself; raises ConfigError where it is not `name` or `owner/name` of plain characters."""
    if not _NAME.fullmatch(name) or name.endswith((".", SUFFIX)):
        raise ConfigError(
            f"{name!r} is no name for the store; expected letters, digits, '.', '_' and single '-', "
            "as in granite or owner/granite; choose one with --name"
        )
    return name


def find(name: str) -> Entry | None:
    """The entry of that name, or None."""
    if not _NAME.fullmatch(name):
        return None
    plain = models_folder() / name.replace("/", "--")
    file = plain.with_name(plain.name + SUFFIX)
    path = file if file.is_file() else plain
    return Entry(name, path, size_of(path)) if file.is_file() or plain.is_dir() else None


def resolve(path: str | Path) -> Path:
    """A path that exists as it is, else the entry of that name.

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
            "give a .mpo file or a Hugging Face folder"
        )
    return entry.path


def entries() -> list[Entry]:
    """All models in the store, by name."""
    folder = models_folder()
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    names = [(path.name.removesuffix(SUFFIX).replace("--", "/"), path) for path in paths]
    return [
        Entry(name, path, size_of(path))
        for name, path in names
        if _NAME.fullmatch(name) and (path.suffix == SUFFIX or path.is_dir())
    ]


def add(source: Path, name: str | None = None, *, replace: bool = False) -> Entry:
    """Takes a `.mpo` file or a Hugging Face folder into the store, by hard links where the file system has them.

    Args:
        name: what to call it; the name of the file or folder where None.
        replace: takes the place of an entry of that name.

    Raises:
        MpoError: when the source is no model, the name is taken or not a name, or the store cannot be written.
    """
    chosen = check_name(name or source.resolve().name.removesuffix(SUFFIX))
    refuse_taken(chosen, replace)
    check_model(source)
    with staging(chosen) as stage:
        if source.is_dir():
            target = stage / "folder"
            target.mkdir()
            for file in sorted({match for pattern in NEEDED for match in source.glob(pattern)}):
                link_or_copy(file, target / file.name)
        else:
            target = stage / "file.mpo"
            link_or_copy(source, target)
        return publish(target, chosen)


def refuse_taken(name: str, replace: bool) -> None:
    """Raises OutputError for a name that is in the store, unless it is to be replaced."""
    if not replace and find(name):
        raise OutputError(f"{name}: is in the store already; add --force to replace it, or --name for another name")


def check_model(path: Path) -> None:
    """Opens a model and closes it again; raises MpoError where that fails."""
    from mpo_runtime.weights.protocol import open_weights

    open_weights(path).close()


@contextmanager
def staging(name: str) -> Iterator[Path]:
    """A new folder inside the store in which an entry is put together; raises OutputError where there can be none."""
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
    """Moves a finished file or folder to its place; what had the name before goes once the new entry is complete."""
    place = models_folder() / (name.replace("/", "--") + ("" if target.is_dir() else SUFFIX))
    old = find(name)
    if old and (old.kind == "folder" or old.path != place):
        aside = target.parent / "old"
        os.rename(old.path, aside)  # removed with the staging folder
    os.replace(target, place)
    return Entry(name, place, size_of(place))


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy that is on the disk when this returns."""
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
    """Deletes an entry and returns what it was; never touches anything outside the store's folder.

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
