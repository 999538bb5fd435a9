"""mpo-export --report and mpo-export report, as a user gives them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpo_exporter.report.facts import Report, from_text
from mpo_formats import MpoFile
from tests.e2e.conftest import Run
from tests.helpers import granite_config, write_folder

WORDS = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "little", granite_config(max_position_embeddings=128))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(30 * WORDS)
    return path


def read(folder: str) -> Report:
    return from_text(Path(folder, "report.json").read_bytes())


def test_an_export_with_a_report_and_a_report_of_its_file(run: Run, folder: Path, text: Path) -> None:
    texts = ("--calib", text, "--eval-text", text, "--measure-tokens", 200, "--threads", 1)
    done = run("mpo-export", folder, "--plan", "int4", *texts, "--report", "out")
    assert done.code == 0, done
    first = read("out")
    assert "logits, cosine" in done.out and "wrote out/report.html" in done.out
    assert first.compression is not None and first.quality is not None and first.missing.keys() == {"without_cores"}
    with MpoFile("little.mpo") as file:
        (entry,) = file.certificates().entries
    assert (first.quality.perplexity, first.quality.kl_mean) == (entry.quality.perplexity, entry.quality.kl_mean)
    assert Path("out/report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")

    again = run("mpo-export", "report", "little.mpo", "--teacher", folder, *texts, "--out", "out")
    assert again.code == 0, again
    second = read("out")
    assert second.quality == first.quality and second.sizes == first.sizes and second.compression is None
    assert [(layer.name, layer.error) for layer in second.layers] == [
        (layer.name, layer.error) for layer in first.layers
    ]
    bare = run(
        "mpo-export",
        "report",
        "little.mpo",
        "--teacher",
        folder,
        "--measure-tokens",
        0,
        "--calib-windows",
        0,
        "--out",
        "bare",
    )
    assert bare.code == 0 and "quality was not measured: --measure-tokens 0" in bare.out
    assert read("bare").quality is None


def test_a_folder_in_use_is_refused_before_the_work(run: Run, folder: Path, text: Path) -> None:
    Path("mine").mkdir()
    Path("mine", "notes.txt").write_text("mine")
    run("mpo-export", folder, "--plan", "int4", "--measure-tokens", 0, "--report", "mine").assert_error(
        "mpo-export", "mine", "notes.txt", "--force"
    )
    assert not Path("little.mpo").exists()
    done = run("mpo-export", folder, "--plan", "int4", "--measure-tokens", 0, "--report", "mine", "--force")
    assert done.code == 0, done
    assert read("mine").quality is None and Path("mine", "notes.txt").read_text() == "mine"
    refused = run("mpo-export", "report", "none.mpo", "--teacher", folder, "--out", "other")
    refused.assert_error("mpo-export report", "none.mpo", "no such file")
