"""Files written whole or not at all with the umask's rights, and users without a home folder."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpo_formats import ConfigError, OutputError
from mpo_runtime.cli import chat
from mpo_runtime.filesystem import expand_user, home_folder, replace_file, user_folder
from mpo_runtime.weights import store
from tests.helpers import write_folder


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_new_files_have_the_rights_of_the_umask(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "new"
    replace_file(path, b"one")
    assert rights(path) == 0o666 & ~umask
    path.chmod(0o640)
    replace_file(path, b"two")
    assert (rights(path), path.read_bytes()) == (0o640, b"two")
    assert [file.name for file in tmp_path.iterdir()] == ["new"]


def test_what_the_store_copies_has_the_rights_of_the_umask(
    tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no hard links here")))
    entry = store.add(write_folder(tmp_path / "model"))
    assert {rights(file) for file in entry.path.iterdir()} == {0o666 & ~umask}
    assert rights(entry.path) == 0o777 & ~umask


def test_a_failed_write_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom no file knows, as `docker run --user 12345` makes them."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    for name in ("HOME", "MPO_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert home_folder() is None and user_folder("XDG_DATA_HOME", ".local/share") is None
    assert expand_user("~/x") == Path("~/x") and expand_user("~nobody-of-that-name/x") == Path("~nobody-of-that-name/x")
    assert store.find("granite") is None
    for action in (store.entries, lambda: store.add(tmp_path)):
        with pytest.raises(ConfigError, match="no home folder; set MPO_HOME to a folder"):
            action()
    assert chat.history_file() is None
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert store.home() == tmp_path / "mpo-runtime"
    monkeypatch.setenv("HOME", "")
    assert home_folder() is None


def test_home_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert home_folder() == tmp_path and expand_user("~/x") == tmp_path / "x"
    assert user_folder("XDG_DATA_HOME", ".local/share") == tmp_path / ".local/share"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert user_folder("XDG_DATA_HOME", ".local/share") == tmp_path / ".local/share"
    monkeypatch.setenv("HOME", "")
    assert home_folder() == Path(pwd.getpwuid(os.getuid()).pw_dir)


def test_a_store_that_cannot_be_written_is_named_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpo_runtime.weights import hub

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MPO_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(hub, "fetch", lambda *_: pytest.fail("the download began"))
    monkeypatch.setattr(store, "open_path", lambda *_: pytest.fail("the model was opened"))
    for action in (lambda: hub.pull("owner/model"), lambda: store.add(tmp_path, "model")):
        with pytest.raises(OutputError, match=r"file/models: cannot be written .*; set MPO_HOME to another folder"):
            action()
