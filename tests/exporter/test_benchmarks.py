"""The quality benchmark's rows: the layers that it plans, its table, and the figures of several texts together."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import quality
from parts import columns, judge, quality_tables, rows, verdict

from mpo_exporter.measure.survey import Survey
from mpo_exporter.plan.budget import file_bytes
from mpo_exporter.source import embedded_model
from mpo_exporter.terms import Candidate, stored_bytes
from mpo_formats import Mpo, PlanError, Quantized
from mpo_formats.architecture import EMBEDDING
from mpo_runtime.measure import Comparison, summarise
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import BOS, some_ids, write_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(write_folder(tmp_path_factory.mktemp("source") / "model"))


def surveyed(source: Checkpoint) -> Survey:
    """Widths of 2 to 8 bits for every layer, of losses that fall with the bits."""
    found = {}
    for linear in source.spec.linears:
        terms = [(Quantized(bits, 16, False),) for bits in (2, 3, 4, 6, 8)]
        found[linear.name] = [
            Candidate(stored_bytes(replace(linear, terms=part)), 4.0 ** -part[0].bits, part) for part in terms
        ]
    return Survey(found, np.eye(1))


@pytest.mark.parametrize("balanced", [False, True])
def test_cores_alone_fill_the_file_that_they_are_given(source: Checkpoint, balanced: bool) -> None:
    least = file_bytes(replace(source.spec, linears=rows.alone(source.spec, balanced, 10**9)))
    for target in (least, least - 4000):
        layers = rows.alone(source.spec, balanced, target)
        assert file_bytes(replace(source.spec, linears=layers)) <= target - rows.PROVENANCE
        for linear in layers:
            [term] = linear.terms
            if linear.name == EMBEDDING:
                assert isinstance(term, Quantized)
            else:
                assert isinstance(term, Mpo) and (term.out_dims[1] > 1) == balanced
    with pytest.raises(PlanError, match="not even one bond"):
        rows.alone(source.spec, balanced, 1000)


def test_cores_take_their_bytes_from_the_widths(source: Checkpoint) -> None:
    target = file_bytes(replace(source.spec, linears=rows.allocated(source.spec, surveyed(source), 10**9, 2)))
    bare, cores = (rows.allocated(source.spec, surveyed(source), target, chi) for chi in (0, 2))
    for layers, chi in ((bare, 0), (cores, 2)):
        assert file_bytes(replace(source.spec, linears=layers)) <= target - rows.PROVENANCE
        for linear in layers:
            assert len(linear.terms) == (2 if chi and linear.name != EMBEDDING else 1)
    assert sum(linear.terms[0].bits for linear in cores) < sum(linear.terms[0].bits for linear in bare)
    with pytest.raises(PlanError):
        rows.make_row(source, surveyed(source), "compensated", 0.5, 8)


def test_the_plan_has_every_row_once_and_the_quick_one_is_part_of_it() -> None:
    whole, quick = (list(rows.planned_rows(short)) for short in (False, True))
    assert len(set(whole)) == len(whole) and set(quick) < set(whole)
    assert {size for _, size, _ in whole} == set(rows.SIZES)


def test_rows_are_kept_and_a_torn_line_is_not(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "rows.jsonl"
    kept = quality.Kept(place)
    kept.add("one", {"chi": 1})
    kept.add("two", {"chi": 2})
    assert quality.Kept(place).rows == {"one": {"chi": 1}, "two": {"chi": 2}}
    place.write_text(place.read_text()[:-5])
    again = quality.Kept(place)
    assert again.rows == {"one": {"chi": 1}}
    again.add("three", {"chi": 3})
    assert quality.Kept(place).rows == {"one": {"chi": 1}, "three": {"chi": 3}}


def entry(family: str, size: float, chi: int, kl: float) -> dict[str, object]:
    return {"family": family, "size": size, "chi": chi, "measured": {"all": {"kl_mean": kl}}}


def test_where_cores_help_is_said_from_the_rows() -> None:
    table = [
        entry("compensated", 2.3, 0, 0.1),
        entry("compensated", 2.3, 8, 0.05),
        entry("compensated", 2.3, 16, 0.2),
        entry("compensated", 4.8, 0, 0.01),
        entry("compensated", 4.8, 8, 0.02),
        entry("compensated", 8.0, 0, 0.01),
        entry("compensated", 8.0, 8, 0.0101),
        entry("naive MPO", 2.3, 0, 3.0),
    ]
    words = verdict.where_cores_help(table)
    assert "| 2.3 | 0.50 | 2.00 |" in words and "| 4.8 | 2.00 | – |" in words
    assert "lowers the KL at 2.3 bits; even the best χ raises it at 4.8 bits; the best χ changes it by less" in words
    assert "naive MPO alone: KL 30× at 2.3 bits that of compensated integers; never better." in words


def test_figures_of_several_texts_are_those_of_one_long_text() -> None:
    losses = [np.random.default_rng(seed).exponential(2, 20) for seed in range(5)]
    parts = [summarise(losses[:2], 20), summarise(losses[2:], 20)]
    whole = summarise(losses, 20)
    found = judge.figures([Comparison(part, part, 0.1 * n, 0.2, 0.5, 1, 0) for n, part in enumerate(parts, 1)])
    assert found["perplexity"] == pytest.approx(whole.perplexity)
    assert found["kl_mean"] == pytest.approx((2 * 0.1 + 3 * 0.2) / 5)
    assert found["tokens"] == 100


def test_domains_of_the_embedded_text() -> None:
    source = Checkpoint(embedded_model())
    texts = judge.domain_texts(source, None, "test", 500)
    assert list(texts) == list(judge.DOMAINS) and {text.ids.size for text in texts.values()} == {500}
    only = judge.calibration_tokens(source, None, "web")
    assert 0 < only.ids.size < judge.calibration_tokens(source, None, None).ids.size


def column(name: str, size: float, chi: int, before: float, after: float) -> dict[str, object]:
    return {"column": name, "size": size, "chi": chi, "before": {"kl_mean": before}, "after": {"kl_mean": after}}


def test_columns_show_the_best_cores_and_say_what_is_not_there() -> None:
    found = [
        column("integers", 2.5, 0, 0.15, 0.08),
        column("rotated", 2.5, 0, 0.125, 0.07),
        column("with cores", 2.5, 4, 0.135, 0.06),
        column("with cores", 2.5, 8, 0.165, 0.05),
        column("rotated", 2.25, 0, 0.25, 0.09),
        {"column": "with cores", "size": 2.25, "chi": 8, "no_such_file": "too small"},
    ]
    lines = quality_tables.columns_table({"demo": found}).split("\n")
    assert lines[2] == "| demo | 2.25 | no | not measured | 0.250 | not measured | – |"
    assert lines[4] == "| demo | 2.5 | no | 0.1500 | 0.1250 | not measured | 0.1350 (χ = 4) |"
    assert lines[5] == "| demo | 2.5 | yes | 0.0800 | 0.0700 | not measured | 0.0500 (χ = 8) |"


def test_columns_make_heal_and_keep_files_of_at_most_the_bytes(tmp_path: Path, source: Checkpoint) -> None:
    text = tmp_path / "ids.npy"
    np.save(text, np.array(some_ids(700, 3, BOS)))
    words = [
        "--model",
        str(source.folder),
        "--columns",
        "--size",
        "20",
        "--chi",
        "2",
        "--tokens",
        "64",
        "--windows",
        "4",
    ]
    words += [word for name in ("--text", "--calib", "--heal-text") for word in (name, str(text))]
    arguments = quality.parsed([*words, "--heal-tokens", "2k", "--rows", str(tmp_path / "rows.jsonl")])
    columns.measure_columns(arguments)
    found = list(quality.Kept(tmp_path / "rows.jsonl").rows.values())
    assert [row["column"] for row in found] == ["integers", "rotated", "rotated, fitted", "with cores"]
    parameters = source.spec.architecture.parameters()
    for row in found:
        assert row["file_bytes"] <= 20 * parameters / 8
        assert row["before"]["kl_mean"] > 0 and row["after"]["kl_mean"] > 0
    assert found[3]["layers_with_cores"] > 0
    columns.measure_columns(arguments)
    assert len(quality.Kept(tmp_path / "rows.jsonl").rows) == 4
