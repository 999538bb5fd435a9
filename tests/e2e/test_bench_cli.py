"""mpo-run bench as a user runs it: real processes on a tiny model, and every bad input as one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpo_exporter.plan.options import Options
from mpo_runtime import native
from mpo_runtime.bench import run as bench_run
from tests.e2e.conftest import Run
from tests.helpers import export_folder, granite_config, write_folder

SMALL = ("-p", "8", "-n", "4", "-d", "0,8", "-b", "1,2", "-t", "1", "-r", "2")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bench")
    dense = write_folder(folder / "little", granite_config(hidden_size=64, num_hidden_layers=1))
    return dense, export_folder(dense, folder / "little.mpo", Options("int4")).path


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_run, "read_bandwidth", lambda threads: 12.5)


def test_every_form_of_the_output(run: Run, files: tuple[Path, Path]) -> None:
    dense, file = files
    found = run("mpo-run", "bench", file, "--baseline", *SMALL, "--json")
    assert found.code == 0, found.err
    document = json.loads(found.out)
    assert set(document) >= {"date", "machine", "commit", "command", "rows", "verdicts", "read_bandwidth"}
    rows = document["rows"]
    assert len(rows) == 2 * 2 * 2 * 2 and document["complete"]
    assert {row["model"] for row in rows} == {"little.mpo", "densified (bf16)"}
    assert all(row["peak_bytes"] > 1e6 and len(row["samples"]) == 2 for row in rows)
    decoding = [row for row in rows if row["kind"] == "decode"]
    assert all((row["gigabytes_per_second"] is not None) == native.available() for row in decoding)
    assert all(row["first_token_seconds"] > 0 for row in rows if row["kind"] == "prompt")
    [verdict] = document["verdicts"]
    assert verdict["bytes"] < 1 and verdict["parameters"] == 1 and len(verdict["speed"]) == 8

    few = ("-p", "0", "-n", "2", "-r", "1", "-t", "1")
    table = run("mpo-run", "bench", file, "--dense", dense, *few)
    assert table.code == 0 and "little.mpo beside little (baseline)" in table.out and "reads at 12.5 GB/s" in table.out
    assert run("mpo-run", "bench", dense, dense, *few, "--csv").out.count("\n") == 3
    assert run("mpo-run", "bench", dense, *few, "--md").out.startswith("| model | MB |")


def test_bad_input_is_refused_before_any_work(run: Run, files: tuple[Path, Path], tmp_path: Path) -> None:
    _, file = files
    run("mpo-run", "bench", tmp_path / "none.mpo").assert_error("mpo-run", "none.mpo")
    run("mpo-run", "bench", file, "-d", "0,x").assert_error("mpo-run", "-d 0,x", "whole numbers")
    run("mpo-run", "bench", file, "-p", "512").assert_error("mpo-run", "little.mpo", "context of 64", "lower -d")
    run("mpo-run", "bench", file, "--json", "--csv").assert_error("mpo-run", "--json and --csv", "one of them")
    run("mpo-run", "bench", file, *SMALL, "--backend", "fast").assert_error("mpo-run", "backend fast")
    run("mpo-run", "bench", file, *SMALL, "--chi", "0").assert_error("mpo-run", "chi")
    other = write_folder(tmp_path / "other", granite_config())
    run("mpo-run", "bench", file, *SMALL, "--dense", other).assert_error("mpo-run", "hidden_size", "baseline other")
