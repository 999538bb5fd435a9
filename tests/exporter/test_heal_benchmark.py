"""The healing benchmark: the files that it plans, and a row that is measured once and taken from the file afterwards."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import heal_cost
import healing
from parts import heal_rows
from parts.judge import Judge
from quality import Bench, Kept

from mpo_exporter.fit.layer import Method
from mpo_exporter.heal.settings import Settings
from mpo_exporter.plan.options import Options
from mpo_exporter.source import find_source
from mpo_formats import Mpo, MpoFile
from mpo_formats.architecture import EMBEDDING
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import BOS, export_folder, granite_config, some_ids, write_folder


def text(seed: int, count: int) -> TokenText:
    return TokenText(f"text {seed}", np.array(some_ids(count, seed, BOS)), 0, str(seed) * 64)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    config = granite_config(hidden_size=64, intermediate_size=96, max_position_embeddings=64)
    source = Checkpoint(write_folder(folder / "model", config, dtype=torch.bfloat16))
    judge = Judge.of(source, {name: text(seed, 130) for seed, name in enumerate(healing.DOMAINS, 1)})
    return Bench(source, text(7, 700), 8, judge, Kept(folder / "rows.jsonl"))


@pytest.mark.parametrize("balanced", [False, True])
def test_cores_fill_their_share_of_the_parameters_and_of_the_file(bench: Bench, balanced: bool) -> None:
    linears = bench.source.spec.linears
    dense = sum(one.out_features * one.in_features for one in heal_rows.matrices(linears))
    layers = heal_rows.of_parameters(0.3, balanced=balanced)(bench)
    assert 0.25 * dense < heal_rows.core_parameters(layers) <= 0.3 * dense
    chis = {term.bonds for one in heal_rows.matrices(layers) for term in one.terms if isinstance(term, Mpo)}
    assert len(chis) == 1
    parameters = bench.source.spec.architecture.parameters()
    for bits in (6.0, 8.0):
        layers = heal_rows.of_bytes(bits, balanced=balanced)(bench)
        size = heal_rows.whole_bytes(bench.source.spec, layers)
        assert size <= bits * parameters / 8 or {t.bonds for t in (layers[1].terms[0],) if isinstance(t, Mpo)} == {(1,)}


def test_the_largest_that_fits() -> None:
    assert [heal_rows.largest_chi(lambda chi, most=most: chi <= most) for most in (0, 1, 2, 7, 64, 1000)] == [
        1,
        1,
        2,
        7,
        64,
        1000,
    ]


def test_the_smallest_file_has_cores_alone(bench: Bench) -> None:
    cores = heal_rows.core_candidates(bench)
    assert set(cores) == {one.name for one in heal_rows.matrices(bench.source.spec.linears)}
    for row in cores.values():
        losses = [one.loss for one in sorted(row, key=lambda one: one.bytes)]
        assert losses == sorted(losses, reverse=True) and min(losses) > 0


def test_a_row_is_measured_once(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(tokens=300, window=32, batch=4, scale_rate=0.3, norm_rate=0.1)
    own = replace(bench, kept=Kept(tmp_path / "quality.jsonl"))
    row = heal_rows.Row("4 bits", heal_rows.based(4, 16, 4), Method("nearest", "svd"))
    table = healing.Table(own, settings, text(9, 600), tmp_path / "rows.jsonl")
    first = table.row(row)
    assert "4 bits: about" in capsys.readouterr().out
    for side in ("before", "after"):
        assert set(first[side]) == {"full", "half", "quarter"}
        assert 0 <= first[side]["full"]["accuracy"] <= 1 and first[side]["full"]["kl_mean"] > 0
    assert first["before"] != first["after"] and first["tokens"] >= 248
    again = healing.Table(own, settings, text(9, 600), tmp_path / "rows.jsonl").row(row)
    assert again == first and not capsys.readouterr().out
    none = table.row(replace(row, tokens=0))
    assert none["before"] == none["after"] == first["before"] and none["tokens"] == 0
    assert "by the row before" not in healing.markdown([first, none]) and "Dense: perplexity" in healing.markdown(
        [first]
    )


def test_accuracy_is_the_share_of_tokens_foretold() -> None:
    windows = [np.array([5, 1, 2, 3]), np.array([5, 4])]
    assert healing.accuracy([np.array([1, 0, 3]), np.array([4])], windows) == 0.75


def test_a_dense_step_trains_all_weights_and_is_the_model(bench: Bench, tmp_path: Path) -> None:
    trainables = heal_cost.DenseTrainables(bench.source)
    found = heal_cost.measure(bench.source, trainables, 2, 33, False)
    assert found["trained"] == bench.source.spec.architecture.parameters() and found["seconds"] > 0
    before = heal_cost.DenseTrainables(bench.source)
    assert not torch.equal(trainables.layers[EMBEDDING].values, before.layers[EMBEDDING].values)
    path = tmp_path / "cores.mpo"
    layers = heal_rows.of_parameters(0.3, balanced=True)(bench)
    export_folder(bench.source.folder, path, Options("int4"), layers=layers)
    asked = {
        "file": str(path),
        "dense": False,
        "codes": False,
        "batch": 2,
        "window": 33,
        "recompute": False,
        "threads": 1,
        "device": "cpu",
    }
    assert 0 < heal_cost.child(asked)["trained"] < found["trained"]
    with MpoFile(path) as file:
        assert file.spec.largest_bond() > 1
    rows = {"dense": found | {"peak_bytes": 1e6}, "cores": found | {"peak_bytes": 5e5}}
    assert "| 0.50 |" in heal_cost.markdown(rows)


def test_the_healing_text_is_the_embedded_one_without_a_corpus() -> None:
    source = Checkpoint(find_source("demo").folder)
    found = healing.healing_text(
        Bench(source, text(1, 10), 1, Judge.of(source, {}), Kept(Path("rows.jsonl"))), None, 1000
    )
    assert found.name == "healing.jsonl" and found.ids.size > 100_000


def test_options_are_parsed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["healing.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        healing.main()
    assert ended.value.code == 0 and "--ablation" in capsys.readouterr().out


def test_the_ablation_takes_its_lengths() -> None:
    rows = list(healing.ablation_rows(healing.parse_lengths(["0", "100k"])))
    assert [row.tokens for row in rows] == [0, 100_000] * len(healing.CHIS)
    assert len({row.name for row in rows}) == len(rows)
    assert healing.parse_lengths(None) == healing.LENGTHS


def test_rows_are_chosen_by_name_or_by_a_part_of_it() -> None:
    rows = [heal_rows.Row(name, heal_rows.auto(3.0)) for name in ("auto, 3.0 bits", "auto, 3.0 bits, cores", "k-proj")]
    chosen = {
        tuple(wanted or ()): [row.name for row in healing.chosen_rows(rows, wanted)]
        for wanted in (None, ["auto, 3.0 bits"], ["auto"], ["k-", "cores"], ["paper"])
    }
    assert chosen[()] == [row.name for row in rows]
    assert chosen["auto, 3.0 bits",] == ["auto, 3.0 bits"]
    assert chosen["auto",] == ["auto, 3.0 bits", "auto, 3.0 bits, cores"]
    assert chosen["k-", "cores"] == ["auto, 3.0 bits, cores", "k-proj"] and chosen["paper",] == []
