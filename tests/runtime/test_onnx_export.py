"""The ONNX export: graphs give the reference's logits for every kind of term, layer and cache, and errors come early."""

from __future__ import annotations

import errno
import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

import onnx

from mpo_formats import Architecture, CheckpointError, ConfigError, MpoFile, OutputError
from mpo_runtime.onnx import support
from mpo_runtime.onnx.export import OnnxRequest, export_onnx
from mpo_runtime.onnx.graph import Graph
from mpo_runtime.onnx.manifest import DATA, MANIFEST, MODEL, read_manifest
from mpo_runtime.onnx.session import Session
from tests.families import EVERY, family_config, write_family
from tests.helpers import forward, granite_config, network, some_ids, write_folder
from tests.runtime.onnx_cases import Plain, folder_of, reference

FILES = sorted((Path(__file__).resolve().parents[1] / "golden").glob("*.mpo"))
NO_TOKENIZER = "files-certificate"  # its files about text are no real ones
GOLDEN = [path for path in FILES if path.stem != NO_TOKENIZER]
# Heads of 16 elements, which the fused attention takes, in groups of two queries to a key.
CONFIG = granite_config(hidden_size=64, max_position_embeddings=96, attention_bias=True, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("source") / "model", CONFIG)


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(source, tmp_path_factory.mktemp("onnx") / "fused")


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(source, tmp_path_factory.mktemp("onnx") / "plain", plain=True)


def ids_for(architecture: Architecture, rows: int, count: int) -> list[list[int]]:
    return [some_ids(count, seed, architecture.vocab_size) for seed in range(rows)]


def ones(rows: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.ones((rows, count), np.int64)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("level", [0, 4])
def test_every_kind_of_term_gives_the_references_logits(path: Path, level: int, tmp_path: Path) -> None:
    with MpoFile(path) as file:
        architecture = file.spec.architecture
    rows = ids_for(architecture, 2, min(12, architecture.max_position_embeddings))
    out = folder_of(path, tmp_path / "out", level=level)
    found = Plain(out).run(np.array(rows), ones(2, len(rows[0])))
    expected = reference(path, rows)
    # At level 4 activations are rounded to int8, which the random weights of golden files amplify.
    assert np.abs(found - expected).max() < (1e-3 if level == 0 else 0.1 * np.abs(expected).max())


def test_the_golden_files_have_what_they_should(tmp_path: Path) -> None:
    with MpoFile(next(path for path in GOLDEN if path.stem == "int4")) as file:
        assert any(term.kind == "quantized" and term.zeros for layer in file.spec.linears for term in layer.terms)
    out = folder_of(next(path for path in GOLDEN if path.stem == "int4"), tmp_path / "out", level=4)
    nodes = onnx.load(str(out / MODEL), load_external_data=False).graph.node
    assert {"MatMulNBits"} <= {node.op_type for node in nodes}


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("is_plain", [False, True])
def test_a_cache_gives_what_one_run_gives(source: Path, tmp_path: Path, dtype: str, is_plain: bool) -> None:
    out = folder_of(source, tmp_path / "out", dtype=dtype, plain=is_plain)
    rows = np.array([some_ids(40, seed) for seed in range(4)])
    expected = reference(source, rows.tolist())
    close = 1e-3 if dtype == "fp32" else 0.1
    one = Plain(out)
    assert np.abs(one.run(rows, ones(4, 40)) - expected).max() < close
    # GroupQueryAttention takes one row where several tokens follow others.
    for count, cuts in ((1, (0, 7, 8, 30, 31, 40)), (4, (0, 36, 37, 38, 39, 40))):
        steps = Plain(out)
        for start, stop in pairwise(cuts):
            found = steps.run(rows[:count, start:stop], ones(count, stop))
            assert np.abs(found - expected[:count, start:stop]).max() < close


@pytest.mark.parametrize("which", ["folder", "plain"])
def test_rows_of_different_lengths(source: Path, which: str, request: pytest.FixtureRequest) -> None:
    out: Path = request.getfixturevalue(which)
    lengths = [9, 4, 1, 7]
    rows = [some_ids(length + 3, seed) for seed, length in enumerate(lengths)]
    expected = [reference(source, [row])[0] for row in rows]
    longest = max(lengths)
    ids, mask = np.zeros((4, longest), np.int64), np.zeros((4, longest), np.int64)
    for row, length in enumerate(lengths):
        ids[row, :length], mask[row, :length] = rows[row][:length], 1
    run = Plain(out)
    found = run.run(ids, mask)
    for row, length in enumerate(lengths):
        assert np.abs(found[row, :length] - expected[row][:length]).max() < 1e-3
    for step in range(3):
        mask = np.concatenate((mask, ones(4, 1)), 1)
        new = np.array([[rows[row][length + step]] for row, length in enumerate(lengths)])
        found = run.run(new, mask)
        for row, length in enumerate(lengths):
            assert np.abs(found[row, 0] - expected[row][length + step]).max() < 1e-3


@pytest.mark.parametrize("which", ["folder", "plain"])
def test_a_session_rewinds_and_goes_on(source: Path, which: str, request: pytest.FixtureRequest) -> None:
    session = Session(request.getfixturevalue(which), capacity=64, threads=1)
    ids, other = some_ids(50), some_ids(50, 7)
    expected = reference(source, [ids])[0]
    assert np.abs(session.run(ids[:30]) - expected[29]).max() < 1e-3
    assert np.abs(session.run(ids[30:31]) - expected[30]).max() < 1e-3
    session.run(other[:10])
    session.rewind(31)
    assert np.abs(session.run_all(ids[31:]) - expected[31:]).max() < 1e-3
    session.rewind(0)
    assert np.abs(session.run(other) - reference(source, [other])[0][-1]).max() < 1e-3
    with pytest.raises(ConfigError, match="65 tokens do not fit into a context of 64"):
        session.run(some_ids(15))


def test_chi_cuts_the_bonds(tmp_path: Path) -> None:
    path = next(path for path in GOLDEN if path.stem == "mpo-3-cores")
    with MpoFile(path) as file:
        architecture = file.spec.architecture
    rows = ids_for(architecture, 1, 8)
    out = folder_of(path, tmp_path / "out", chi=2)
    found = Plain(out).run(np.array(rows), ones(1, 8))
    assert np.abs(found - forward(network(path, chi=2), rows)).max() < 1e-3
    assert np.abs(found - reference(path, rows)).max() > 1e-2


def test_an_old_runtime_is_named_with_the_version_that_has_the_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "installed", lambda: (1, 21))
    path = next(path for path in GOLDEN if path.stem == "int8")
    with pytest.raises(ConfigError, match=r"q_proj: MatMulNBits with 8 bits in fp32 needs onnxruntime 1\.22, 1\.21 is"):
        folder_of(path, tmp_path / "out", level=4)
    assert list(tmp_path.iterdir()) == []
    folder_of(path, tmp_path / "out", level=0)


def test_the_folder_is_checked_and_says_what_it_is(folder: Path) -> None:
    onnx.checker.check_model(str(folder / MODEL))
    model = onnx.load(str(folder / MODEL), load_external_data=False)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 21, "com.microsoft": 1}
    assert [value.name for value in model.graph.input][:4] == [
        "input_ids",
        "attention_mask",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert [value.name for value in model.graph.output][:3] == ["logits", "present.0.key", "present.0.value"]
    assert sum(node.op_type == "GroupQueryAttention" for node in model.graph.node) == CONFIG["num_hidden_layers"]
    manifest = read_manifest(folder)
    assert (manifest.dtype, manifest.accuracy_level, manifest.shares_buffer) == ("fp32", 0, True)
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["type"] == "granite" and config["model"]["eos_token_id"] == [CONFIG["eos_token_id"]]
    assert config["search"]["past_present_share_buffer"] is True
    assert (folder / "tokenizer.json").read_bytes()


def test_a_folder_works_in_another_place(source: Path, folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "a b" / "moved"
    shutil.copytree(folder, moved)
    ids = some_ids(5)
    assert np.abs(Session(moved, capacity=8, threads=1).run_all(ids) - reference(source, [ids])[0]).max() < 1e-3


@pytest.mark.parametrize("name", [MODEL, DATA])
def test_missing_and_cut_files_are_named_before_the_runtime_starts(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    def never(*arguments: object, **options: object) -> None:
        pytest.fail("the runtime was started")

    monkeypatch.setattr(onnxruntime, "InferenceSession", never)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    size = (copy / name).stat().st_size
    os.truncate(copy / name, size - 1)
    with pytest.raises(CheckpointError, match=rf"{name}: has {size - 1:,} bytes, expected {size:,}; export it again"):
        Session(copy, capacity=8)
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: is missing, {size:,} bytes; export it again"):
        Session(copy, capacity=8)
    (copy / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="the file is damaged or of another version"):
        Session(copy, capacity=8)


def test_what_is_in_the_way_stays(source: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(OutputError, match="exists and is no folder of export-onnx"):
        folder_of(source, out, force=True)
    shutil.copytree(folder, tmp_path / "old")
    with pytest.raises(OutputError, match="exists; give another --out, or --force"):
        folder_of(source, tmp_path / "old")
    (tmp_path / "old" / "left over").write_text("x")
    folder_of(source, tmp_path / "old", force=True)
    assert not (tmp_path / "old" / "left over").exists()
    with pytest.raises(OutputError, match="is no folder; make it first"):
        folder_of(source, tmp_path / "none" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "out"]


def test_a_full_disk_leaves_nothing_behind(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Graph.tensor

    def full(self: Graph, name: str, array: Any) -> str:
        if "layers.1" in name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, name, array)

    monkeypatch.setattr(Graph, "tensor", full)
    with pytest.raises(OutputError, match="out: No space left on device; nothing was kept"):
        folder_of(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_options_that_cannot_be_honoured(source: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"dtype": "fp8"}, "--dtype fp8: expected one of fp32, fp16"),
        ({"level": 3}, "--accuracy-level 3: expected 0"),
        ({"chi": 0}, "--chi: expected at least 1, found 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            export_onnx(OnnxRequest(source, tmp_path / "out", **options))


def test_damaged_files_about_text_are_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpo_runtime.onnx.export.write_decoder", lambda *_, **__: pytest.fail("the graph was written"))
    with pytest.raises(CheckpointError, match="tokenizer.json is not a tokenizer"):
        folder_of(next(path for path in FILES if path.stem == NO_TOKENIZER), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("is_plain", [False, True])
def test_every_family(family: str, is_plain: bool, tmp_path: Path) -> None:
    source = tmp_path / "model"
    config = family_config(family, hidden_size=64)
    write_family(source, config)
    rows = [some_ids(30, 2, config["vocab_size"])]
    found = Plain(folder_of(source, tmp_path / "out", plain=is_plain)).run(np.array(rows), ones(1, 30))
    assert np.abs(found - reference(source, rows)).max() < 1e-3


def test_an_architecture_without_a_graph_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpo_runtime.onnx.decoder.WRITTEN", ("llama",))
    with pytest.raises(ConfigError, match="has no graph for the architecture granite, only for llama; "):
        folder_of(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"export-onnx: needs nothing_of_that_name; pip install 'mpo-runtime\[onnx\]'"
    ):
        support.require_packages("onnx", "nothing_of_that_name", what="export-onnx")


def test_float16_that_overflows_is_named(tmp_path: Path) -> None:
    graph = Graph(tmp_path, np.float16)
    with pytest.raises(ConfigError, match="x: has values beyond the range of float16; export with --dtype fp32"):
        graph.floats("x", np.array([1e6], np.float32))
    graph.close()
