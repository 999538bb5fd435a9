"""The reader: lazy, strict at verification, safe to close and to share."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from mpo_formats import FormatError, MpoFile, reference
from tests.formats import tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A tiny valid file."""
    tiny.write(tmp_path / "a.mpo", tiny.model(), measure=lambda _: tiny.certificates())
    return tmp_path / "a.mpo"


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc")
def test_opening_a_large_file_reads_only_its_header(tmp_path: Path) -> None:
    # 5 GB of tensors that are a hole in a sparse file; the benchmark also measures the time.
    result = tmp_path / "result.json"
    script = ROOT / "benchmarks" / "bench_format_open.py"
    folders = os.pathsep.join([str(ROOT), str(ROOT / "formats")])
    environment = {**os.environ, "PYTHONPATH": folders, "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(script), "--runs", "1", "--out", str(result)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    [measured] = json.loads(result.read_text())["rows"]
    assert measured["tensors"] > 2000
    assert measured["file_bytes"] > 4.9e9
    assert measured["peak_mb"] < 20
    assert measured["process_growth_mb"] < 20


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_git_lfs_pointer_is_named(tmp_path: Path, mark: bytes) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9473488\n"
    (tmp_path / "a.mpo").write_bytes(mark + pointer)
    with pytest.raises(FormatError, match=r"^a\.mpo: is a Git LFS pointer, not the file itself; .* git lfs pull$"):
        MpoFile(tmp_path / "a.mpo")


def test_arrays_are_read_only_views_of_the_map(path: Path) -> None:
    with MpoFile(path) as file:
        first, second = (file.array(f"{tiny.VALUE}.0.weight") for _ in range(2))
        assert np.shares_memory(first, second)
        with pytest.raises(ValueError, match="read-only"):
            first[0, 0] = 1


def test_arrays_survive_the_closing_of_their_file(path: Path) -> None:
    with MpoFile(path) as file:
        array = file.array(f"{tiny.VALUE}.0.weight")
        copy = array.copy()
    assert np.array_equal(array, copy)
    file.close()  # a second time does no harm


def test_an_unknown_tensor_is_a_key_error_and_a_missing_file_an_os_error(path: Path) -> None:
    with MpoFile(path) as file, pytest.raises(KeyError):
        file.array("model.norm")
    with pytest.raises(FileNotFoundError):
        MpoFile(path.with_name("b.mpo"))


def test_a_file_can_be_read_from_several_threads(path: Path) -> None:
    results: list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = []
    with MpoFile(path) as file:
        linear = file.spec.linear(tiny.GATE)
        expected = reference.matrix(file, linear)
        threads = [threading.Thread(target=lambda: results.append(reference.matrix(file, linear))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 4
    assert all(np.array_equal(result, expected) for result in results)


def test_verification_counts_its_tensors_and_finds_every_changed_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    del header["__metadata__"]
    with MpoFile(path) as file:
        assert file.verify() == len(header) - 1
    for name, row in header.items():
        begin, end = row["data_offsets"]
        place = start + (begin + end) // 2
        raw[place] ^= 1
        path.write_bytes(raw)
        raw[place] ^= 1
        with MpoFile(path) as file, pytest.raises(FormatError, match="wrong checksum") as caught:
            file.verify()
        # A changed checksum is noticed at the tensor that it belongs to.
        assert f"a.mpo: {name}: " in str(caught.value) or name == "mpo.checksums"
        with pytest.raises(FormatError, match="wrong checksum"):
            MpoFile(path, verify=True)
    path.write_bytes(raw)
    MpoFile(path, verify=True).close()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc for open files")
def test_a_refused_file_is_not_kept_open(path: Path) -> None:
    def held() -> int:
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return sum(os.path.lexists(link) and os.readlink(link) == str(path.resolve()) for link in links)

    with MpoFile(path):
        assert held() == 1  # the mapping's
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    for _ in range(5):
        with pytest.raises(FormatError):
            MpoFile(path, verify=True)
    assert held() == 0


def test_the_same_values_give_the_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for name in ("a.mpo", "b.mpo"):
        tiny.write(tmp_path / name, tiny.model(), measure=lambda _: tiny.certificates())
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1
