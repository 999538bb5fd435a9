"""The local store: what goes in comes out by name, whole or not at all, and nothing outside it is touched."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import mpo_runtime
from mpo_formats import CheckpointError, ConfigError, FormatError, MpoError, OutputError
from mpo_runtime.cli.main import app
from mpo_runtime.loading import open_weights
from mpo_runtime.weights import hub, store
from tests.formats import tiny
from tests.gguf_files import write_gguf
from tests.helpers import granite_config, random_tensors, write_folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store of its own."""
    monkeypatch.setenv("MPO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.mpo"
    tiny.write(path, tiny.model())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = write_folder(tmp_path / "source" / "tiny")
    (path / "README.md").write_text("not needed to run")
    return path


def everything(folder: Path) -> list[str]:
    """Relative paths of all files and folders."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_gguf_file_is_an_entry_like_any_other(tmp_path: Path, home: Path) -> None:
    config = granite_config(num_hidden_layers=1)
    tensors = {name: tensor.numpy() for name, tensor in random_tensors(config, 0, torch.float32).items()}
    path = write_gguf(tmp_path / "small.gguf", config, tensors)
    entry = store.add(path)
    assert (entry.name, entry.kind, entry.size) == ("small", "gguf", path.stat().st_size)
    assert everything(home) == ["models", "models/small.gguf"] and store.entries() == [entry]
    assert open_weights("small").spec.architecture.num_hidden_layers == 1
    with pytest.raises(ConfigError, match=r"'a\.gguf' is no name for the store"):
        store.add(path, "a.gguf")
    with pytest.raises(CheckpointError, match="truncated or damaged GGUF file"):
        path.with_name("cut.gguf").write_bytes(path.read_bytes()[:3000])
        store.add(path.with_name("cut.gguf"))
    file = tmp_path / "small.mpo"
    tiny.write(file, tiny.model())
    assert store.add(file, replace=True).kind == "mpo"  # whatever its kind, there is one entry of a name
    assert everything(home) == ["models", "models/small.mpo"]
    store.add(path, replace=True)
    assert everything(home) == ["models", "models/small.gguf"]
    store.remove("small")
    assert store.entries() == []


def test_a_file_is_linked_and_found_by_its_name(file: Path, home: Path) -> None:
    entry = store.add(file)
    assert (entry.name, entry.kind, entry.size) == ("small", "mpo", file.stat().st_size)
    assert os.path.samefile(entry.path, file)
    assert store.resolve("small") == entry.path
    assert store.entries() == [entry]
    assert everything(home) == ["models", "models/small.mpo"]
    weights = open_weights("small")
    assert weights.spec == tiny.model()
    weights.close()


def test_a_folder_is_taken_without_what_is_not_needed(folder: Path) -> None:
    entry = store.add(folder, "owner/tiny")
    assert entry.kind == "folder"
    assert everything(entry.path) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    with mpo_runtime.load("owner/tiny") as ours, mpo_runtime.load(folder) as original:
        assert ours.score("hello") == original.score("hello")


def test_where_links_do_not_work_it_is_copied(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Path) -> None:
        raise PermissionError(1, "not here")

    monkeypatch.setattr(os, "link", refuse)
    entry = store.add(file)
    assert not os.path.samefile(entry.path, file)
    assert entry.path.read_bytes() == file.read_bytes()


def test_a_path_comes_before_a_name(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add(file, "mine")
    monkeypatch.chdir(tmp_path)
    Path("mine").write_text("a file that is here")
    assert store.resolve("mine") == Path("mine")
    with pytest.raises(CheckpointError, match="no such file or folder, nor a name in the store"):
        store.resolve("absent")


def test_a_name_is_replaced_only_when_asked(file: Path, folder: Path, home: Path) -> None:
    store.add(file, "one")
    with pytest.raises(OutputError, match="in the store already; add --force"):
        store.add(folder, "one")
    assert store.add(folder, "one", replace=True).kind == "folder"
    assert [path.name for path in (home / "models").iterdir()] == ["one"]
    assert store.add(file, "one", replace=True).kind == "mpo"
    assert [path.name for path in (home / "models").iterdir()] == ["one.mpo"]


def test_what_is_no_model_does_not_get_in(tmp_path: Path, home: Path) -> None:
    (tmp_path / "bad.mpo").write_bytes(b"x" * 100)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError):
        store.add(tmp_path / "bad.mpo")
    with pytest.raises(CheckpointError):
        store.add(tmp_path / "empty")
    assert store.entries() == []


def test_a_failure_leaves_nothing_behind(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "link_or_copy", full)
    with pytest.raises(OutputError, match="No space left on device"):
        store.add(folder)
    assert everything(home) == ["models"]


BAD_NAMES = [
    "",
    ".",
    "..",
    "../x",
    "a/../b",
    "/etc",
    "a/b/c",
    "a--b",
    "-a",
    ".hidden",
    "a\\b",
    "a b",
    "é",
    "x.mpo",
    "a.",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_cannot_lead_out(name: str, file: Path, tmp_path: Path) -> None:
    before = everything(tmp_path)
    with pytest.raises(ConfigError):
        store.remove(name)
    if name:
        with pytest.raises(ConfigError, match="is no name for the store"):
            store.add(file, name)
    assert everything(tmp_path) == before


def test_removing_never_follows_links(folder: Path, file: Path, home: Path) -> None:
    store.add(file, "kept")
    (home / "models" / "linked").symlink_to(folder, target_is_directory=True)
    before = everything(folder)
    store.remove("linked")
    assert everything(folder) == before
    assert [entry.name for entry in store.entries()] == ["kept"]
    store.remove("kept")
    assert file.exists()


def test_the_folder_of_the_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MPO_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert store.home() == tmp_path / "mpo-runtime"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert store.home() == tmp_path / "me" / ".local" / "share" / "mpo-runtime"


def test_the_commands(file: Path) -> None:
    runner = CliRunner()
    assert "no models in" in runner.invoke(app, ["list"]).output
    assert "mpo-run chat small" in runner.invoke(app, ["pull", str(file)]).output
    listed = json.loads(runner.invoke(app, ["list", "--json"]).output)
    assert [(row["name"], row["kind"], row["bytes"]) for row in listed] == [("small", "mpo", file.stat().st_size)]
    assert runner.invoke(app, ["list"]).output.startswith("small  mpo")
    assert runner.invoke(app, ["verify", "small"]).exit_code == 0
    assert "small: deleted" in runner.invoke(app, ["rm", "small"]).output
    assert isinstance(runner.invoke(app, ["rm", "small"]).exception, ConfigError)
    assert "or a hub id owner/name" in str(runner.invoke(app, ["pull", "./absent"]).exception)


class FakeHub:
    """Stands for the hub's client: gives the files of a folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
        import huggingface_hub

        self.source = source
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self.model_info)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot)

    def model_info(self, identifier: str, revision: str | None, timeout: float | None, files_metadata: bool) -> Any:
        self.asked = (identifier, revision)
        paths = [path for path in self.source.rglob("*") if path.is_file()]
        files = [SimpleNamespace(rfilename=str(one.relative_to(self.source)), size=one.stat().st_size) for one in paths]
        return SimpleNamespace(siblings=files)

    def download(self, identifier: str, name: str, local_dir: Path, revision: str | None = None) -> str:
        (local_dir / ".cache").mkdir(parents=True, exist_ok=True)
        (local_dir / name).write_bytes((self.source / name).read_bytes())
        return str(local_dir / name)

    def snapshot(self, identifier: str, revision: str | None, allow_patterns: list[str], local_dir: Path) -> str:
        for name in {path.name for pattern in allow_patterns for path in self.source.glob(pattern)}:
            self.download(identifier, name, local_dir)
        return str(local_dir)


def test_pulling_prefers_the_mpo_file(file: Path, folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeHub(monkeypatch, folder)
    entry = hub.pull("owner/tiny")
    assert (entry.name, entry.kind) == ("owner/tiny", "folder")
    assert everything(home / "models") == [
        "owner--tiny",
        *(f"owner--tiny/{name}" for name in everything(folder) if name != "README.md"),
    ]
    (folder / "model-a.mpo").write_bytes(file.read_bytes())
    assert hub.pull("owner/tiny", replace=True).kind == "mpo"
    assert everything(home / "models") == ["owner--tiny.mpo"]
    (folder / "model-b.mpo").write_bytes(b"")
    with pytest.raises(ConfigError, match="choose with --file: model-a.mpo, model-b.mpo"):
        hub.pull("owner/tiny", "other")
    assert hub.pull("owner/tiny", "other", file="model-a.mpo").size == file.stat().st_size
    with pytest.raises(FormatError):
        hub.pull("owner/tiny", "third", file="model-b.mpo")
    assert [entry.name for entry in store.entries()] == ["other", "owner/tiny"]


def test_pulling_a_revision_and_a_short_name(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(monkeypatch, folder)
    assert hub.pull("owner/tiny@v1.0").name == "owner/tiny" and fake.asked == ("owner/tiny", "v1.0")
    with pytest.raises(ConfigError, match="owner/tiny@: expected a branch, tag or commit after @"):
        hub.pull("owner/tiny@", replace=True)
    assert CliRunner().invoke(app, ["pull", "granite-4-micro"]).exit_code == 0
    assert fake.asked == ("ibm-granite/granite-4.0-micro", "56111ae135df9c53a78c99028e7bc24035a9e979")
    assert [entry.name for entry in store.entries()] == ["granite-4-micro", "owner/tiny"]


def test_a_download_that_does_not_fit_is_refused_before_it_starts(
    folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeHub(monkeypatch, folder)
    monkeypatch.setattr("mpo_runtime.weights.hub.shutil.disk_usage", lambda place: SimpleNamespace(free=100))
    with pytest.raises(OutputError, match=r"^owner/tiny: the download takes 0\.00 GB, and .* free; free space there"):
        hub.pull("owner/tiny")
    assert store.entries() == []


@pytest.mark.parametrize(
    ("kind", "words"),
    [("GatedRepoError", "is gated; accept its licence"), ("RepositoryNotFoundError", "has no such model or revision")],
)
def test_gated_and_absent_models_are_named(home: Path, monkeypatch: pytest.MonkeyPatch, kind: str, words: str) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*_: Any, **__: Any) -> None:
        raise getattr(errors, kind).__new__(getattr(errors, kind))  # without the answer that its __init__ wants

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(CheckpointError, match=words):
        hub.pull("owner/tiny")


def test_without_a_network_pulling_says_what_to_do(home: Path) -> None:
    with pytest.raises(MpoError, match=r"^owner/tiny: cannot be downloaded \(.*mpo-run pull FOLDER") as caught:
        hub.pull("owner/tiny")  # conftest.py sets HF_HUB_OFFLINE
    assert "\n" not in str(caught.value)
    assert store.entries() == []
