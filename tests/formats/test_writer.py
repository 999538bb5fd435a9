"""The writer: strict about what it is given, sparing with memory, and never leaves half a file."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mpo_formats import (
    Certificate,
    Certificates,
    Dense,
    FormatError,
    MpoFile,
    MpoWriter,
    OutputError,
    Quality,
    container,
    writer,
)
from mpo_formats.layout import linear_bytes
from tests.formats import tiny

ROOT = Path(__file__).resolve().parents[2]


def fill(out: MpoWriter, content: tiny.Arrays) -> None:
    """Writes every tensor."""
    for tensor in out.pending():
        out.write(tensor.name, content[tensor.name])


def test_memory_holds_no_more_than_one_tensor(tmp_path: Path) -> None:
    spec = tiny.model({}, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, vocab_size=512)
    largest = max(linear_bytes(linear) for linear in spec.linears)
    total = sum(linear_bytes(linear) for linear in spec.linears)
    assert total > 12 * largest
    random = np.random.default_rng(0)
    with MpoWriter(tmp_path / "a.mpo", spec) as out:
        tracemalloc.start()
        for tensor in out.pending():
            if tensor.name.startswith("file."):
                out.write(tensor.name, np.frombuffer(tiny.TOKENIZER, np.uint8))
            else:
                out.write(tensor.name, random.integers(0, 1 << 14, tensor.shape, np.uint16))
        out.commit()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # The test's own array and the check for finite values come on top of the layer.
    assert peak < 4 * largest


def test_an_existing_target_is_kept_without_force(tmp_path: Path) -> None:
    target = tmp_path / "a.mpo"
    target.write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"a\.mpo: exists already; .*--force"):
        MpoWriter(target, tiny.model())
    assert target.read_bytes() == b"precious"
    dangling = tmp_path / "link.mpo"
    dangling.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="exists already"):
        MpoWriter(dangling, tiny.model())
    assert sorted(os.listdir(tmp_path)) == ["a.mpo", "link.mpo"]
    tiny.write(target, tiny.model())  # with force
    MpoFile(target, verify=True).close()


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "a.mpo"
    spec = tiny.model()
    with pytest.raises(OutputError, match="exists already"), MpoWriter(target, spec) as out:
        fill(out, tiny.arrays(spec))
        target.write_bytes(b"precious")
        out.commit()
    assert target.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["a.mpo"]


def test_a_folder_is_no_target(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder; give the name of a file"):
        MpoWriter(tmp_path, tiny.model(), force=True)
    with pytest.raises(OutputError, match="No such file or directory"):
        MpoWriter(tmp_path / "missing" / "a.mpo", tiny.model())
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("model.norm.weight", np.zeros((8, 32), np.uint16), "found model.norm.weight uint16"),
        ("model.embed_tokens.0.weight", np.zeros((8, 31), np.uint16), r"found model.embed_tokens.0.weight .*\[8, 31\]"),
        ("model.embed_tokens.0.weight", np.zeros((8, 32), np.float32), r"float32 \[8, 32\]"),
        ("model.embed_tokens.0.weight", np.zeros((8, 32), ">u2"), r">u2 \[8, 32\]"),
        ("model.embed_tokens.0.weight", np.full((8, 32), 0x7F80, np.uint16), "element 0 is not finite"),
    ],
)
def test_only_the_next_tensor_is_taken(tmp_path: Path, name: str, array: tiny.Arrays, message: str) -> None:
    with pytest.raises(FormatError, match=message), MpoWriter(tmp_path / "a.mpo", tiny.model()) as out:
        out.write(name, array)
    assert not os.listdir(tmp_path)


def test_arrays_that_are_not_contiguous_are_written_in_order(tmp_path: Path) -> None:
    spec = tiny.model()
    content = tiny.arrays(spec)
    name = f"{tiny.VALUE}.0.weight"
    plain = content[name]
    content[name] = np.asfortranarray(plain)
    tiny.write(tmp_path / "a.mpo", spec, content)
    with MpoFile(tmp_path / "a.mpo", verify=True) as file:
        assert np.array_equal(file.array(name), plain)


def test_missing_tensors_and_errors_leave_nothing(tmp_path: Path) -> None:
    spec = tiny.model()
    content = tiny.arrays(spec)
    missing = r"tensor model\.embed_tokens\.0\.weight was never written"
    with pytest.raises(FormatError, match=missing), MpoWriter(tmp_path / "a.mpo", spec) as out:
        out.commit()
    with pytest.raises(KeyboardInterrupt), MpoWriter(tmp_path / "a.mpo", spec) as out:
        out.write("model.embed_tokens.0.weight", content["model.embed_tokens.0.weight"])
        assert len(os.listdir(tmp_path)) == 1
        raise KeyboardInterrupt
    with MpoWriter(tmp_path / "a.mpo", spec) as out:
        fill(out, content)  # and no commit
    assert not os.listdir(tmp_path)


def test_an_error_while_measuring_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> Certificates:
        MpoFile(path, verify=True).close()  # complete already, with an empty certificate
        raise RuntimeError("measuring failed")

    with pytest.raises(RuntimeError, match="measuring failed"):
        tiny.write(tmp_path / "a.mpo", tiny.model(), measure=fail)
    assert not os.listdir(tmp_path)


def test_a_certificate_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    quality = tiny.certificates().entries[0].quality
    long = Quality(*("é" * 4000 if name == "text" else getattr(quality, name) for name in Quality.__slots__))
    with pytest.raises(FormatError, match="mpo.certificate: .* bytes exceed 16384; record fewer prefixes"):
        tiny.write(tmp_path / "a.mpo", tiny.model(), measure=lambda _: Certificates((Certificate(None, long),)))
    assert not os.listdir(tmp_path)


def test_a_header_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "HEADER_LIMIT", 1000)
    with pytest.raises(FormatError, match="header: .* bytes exceed the limit of 1000; use fewer layers or terms"):
        MpoWriter(tmp_path / "a.mpo", tiny.model())
    assert not os.listdir(tmp_path)


# In a process of its own, because the limit stays. Without posix_fallocate the failure comes in the middle of writing.
FULL_DISK = """
import os, resource, sys
from pathlib import Path
from mpo_formats import OutputError, writer
from tests.formats import tiny
target, limit, reserve, old = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if reserve == "no":
    del os.posix_fallocate
if old == "old":
    target.write_bytes(b"precious")
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    tiny.write(target, tiny.model(), measure=lambda _: tiny.certificates())
except OutputError as error:
    print(error)
"""


@pytest.mark.parametrize("old", ["none", "old"])
@pytest.mark.parametrize(("limit", "reserve"), [(20_000, "yes"), (20_000, "no"), (100, "no")])
def test_a_full_disk_leaves_nothing(tmp_path: Path, limit: int, reserve: str, old: str) -> None:
    pytest.importorskip("resource", reason="RLIMIT_FSIZE makes a full disk; this system has none")
    folders = os.pathsep.join([str(ROOT), str(ROOT / "formats")])
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "a.mpo"), str(limit), reserve, old],
        env={**os.environ, "PYTHONPATH": folders},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "a.mpo: cannot write 0.0 MB (File too large); free some space or give another folder" in done.stdout
    assert os.listdir(tmp_path) == (["a.mpo"] if old == "old" else [])
    if old == "old":
        assert (tmp_path / "a.mpo").read_bytes() == b"precious"


def test_a_failing_rename_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(writer.os, "replace", refuse)
    with pytest.raises(OutputError, match="Permission denied"):
        tiny.write(tmp_path / "a.mpo", tiny.model({}, vocab_size=16))
    assert not os.listdir(tmp_path)


def test_file_systems_that_cannot_sync_folders_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def refuse_folders(descriptor: int, number: int = 22) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(writer.os, "fsync", refuse_folders)
    tiny.write(tmp_path / "a.mpo", tiny.model({tiny.VALUE: (Dense("f16"),)}))
    MpoFile(tmp_path / "a.mpo", verify=True).close()
    monkeypatch.setattr(writer.os, "fsync", lambda descriptor: refuse_folders(descriptor, 5))
    with pytest.raises(OutputError, match="Input/output error"):
        tiny.write(tmp_path / "a.mpo", tiny.model())
