"""The report: its figures are those that are measured elsewhere, its JSON reads back, its folder is treated with care."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from mpo_exporter.calibrate.hessian import cholesky_root
from mpo_exporter.calibrate.moments import Calibration
from mpo_exporter.calibrate.windows import cut_calibration
from mpo_exporter.cli.export import print_next_step
from mpo_exporter.export import Listener, Result
from mpo_exporter.fit.common import activation_error
from mpo_exporter.measure.survey import survey
from mpo_exporter.plan.options import Options
from mpo_exporter.progress import silent
from mpo_exporter.report import facts, footprint
from mpo_exporter.report.facts import Point, Report, from_text, to_text
from mpo_exporter.report.gather import gather
from mpo_exporter.report.job import JSON, PAGE, Job, prepare, write
from mpo_exporter.report.layers import Recorder, spectrum
from mpo_exporter.report.runs import repeated_share, write_texts
from mpo_exporter.report.sizes import earlier_points, predicted_curve
from mpo_exporter.report.terminal import print_whole
from mpo_exporter.source import open_source
from mpo_formats import ConfigError, FormatError, MpoFile, OutputError
from mpo_formats.layout import linear_bytes
from mpo_formats.reference import matrix
from mpo_runtime.loading import load
from mpo_runtime.measure import compare
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import byte_tokenizer, export_folder, granite_config, network, some_ids, write_folder

ROOT = Path(__file__).resolve().parents[2]
CALIBRATION = TokenText("calibration.txt", np.array(some_ids(700, 1)), 700, "1" * 64)
TEXT = TokenText("held out.txt", np.array(some_ids(150, 2)), 150, "2" * 64)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = granite_config(num_hidden_layers=2, hidden_size=64, intermediate_size=96, max_position_embeddings=128)
    return write_folder(tmp_path_factory.mktemp("source") / "model", config)


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def exported(source: Path, recorder: Recorder, tmp_path_factory: pytest.TempPathFactory) -> Result:
    target = tmp_path_factory.mktemp("file") / "little.mpo"
    return export_folder(
        source,
        target,
        Options("auto", chi=3),
        text=TEXT,
        prefixes=(1,),
        calibration=CALIBRATION,
        windows=8,
        listener=Listener(recorder.progress, fitted=recorder.fitted),
    )


@pytest.fixture(scope="module")
def job(source: Path, exported: Result, recorder: Recorder, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(
        file=exported.path,
        name="little",
        folder=tmp_path_factory.mktemp("report"),
        text=TEXT,
        calibration=CALIBRATION,
        fit_windows=8,
        threads=1,
        comparison=exported.comparison,
        compression=recorder.compression(),
    )


@pytest.fixture(scope="module")
def report(source: Path, job: Job) -> Report:
    return gathered(source, job)


def gathered(folder: Path, job: Job) -> Report:
    with open_source(folder) as source:
        return gather(source, job)


def test_the_json_reads_back(report: Report) -> None:
    assert from_text(to_text(report)) == report
    for change, words in (
        ({"version": 2}, "version: expected 1, found 2"),
        ({"format": "other"}, "expected one of mpo-report"),
        ({"surplus": 1}, "unknown key 'surplus'"),
        ({"core_layers": 1.5}, "core_layers: expected an integer"),
    ):
        with pytest.raises(FormatError, match=re.escape(words)):
            from_text(json.dumps(json.loads(to_text(report)) | change))


def test_quality_is_what_the_measure_says(report: Report, job: Job, source: Path, exported: Result) -> None:
    expected = compare(network(exported.path), network(source), TEXT.ids)
    alone = gathered(source, dataclasses.replace(job, comparison=None, calibration=None, compression=None))
    for made in (report, alone):
        found = made.quality
        assert found is not None
        # An export attends to whole windows at once, which is rounded otherwise.
        models = [found.perplexity, found.error, found.dense_perplexity, found.dense_error]
        sides = (expected.model, expected.reference)
        assert models == pytest.approx([value for one in sides for value in (one.perplexity, one.error)], rel=1e-4)
        differences = [found.kl_mean, found.kl_999, found.cosine, found.mse]
        wanted = [expected.kl_mean, expected.kl_999, expected.cosine, expected.mse]
        assert differences == pytest.approx(wanted, rel=1e-4, abs=1e-8) and found.same_top1 == expected.same_top1
        assert (found.text, found.tokens, found.window) == (TEXT.name, TEXT.ids.size, expected.model.window)
    assert alone.compression is None and "give --report to the export" in alone.missing["compression"]
    assert {layer.norm for layer in alone.layers} == {"weights"}


def test_sizes_are_those_of_the_file(report: Report, exported: Result) -> None:
    sizes = report.sizes
    parameters = exported.source.architecture.parameters()
    assert sizes.file_bytes == exported.path.stat().st_size
    assert (sizes.dense_parameters, sizes.bits_per_weight) == (parameters, exported.bits_per_weight)
    # The source stores four bytes a weight; the comparison is with two.
    assert sizes.source_bytes - sizes.dense_bytes == 2 * parameters
    assert report.ratios.bytes == sizes.file_bytes / sizes.dense_bytes
    assert report.ratios.parameters == sizes.parameters / parameters > 1
    for layer, linear in zip(report.layers, exported.spec.linears, strict=True):
        assert layer.name == linear.name
        assert sum(term.bytes for term in layer.terms) == linear_bytes(linear) <= layer.bytes
        assert [term.chi for term in layer.terms] == [max(getattr(term, "bonds", (0,))) for term in linear.terms]
    assert report.core_layers == exported.core_layers > 0


def test_errors_and_spectra_are_in_the_activation_norm(
    report: Report, source: Path, exported: Result, tmp_path: Path
) -> None:
    dense = Checkpoint(source)
    windows = cut_calibration(CALIBRATION, dense.architecture, count=32)
    found = {layer.name: layer for layer in report.layers}
    assert report.calibrated is not None and report.calibrated.tokens == windows.size
    seen = set()
    with MpoFile(exported.path) as file:
        for names, moment in Calibration(dense, windows, tmp_path).dense():
            for name in names:
                original = dense.array(f"{name}.0.weight").astype(np.float64)
                rest = original - matrix(file, file.spec.linear(name))
                expected = activation_error(rest, moment.second) / activation_error(original, moment.second)
                assert found[name].norm == "activations"
                assert found[name].error == pytest.approx(expected, rel=1e-9)
                values = np.linalg.svd(original @ cholesky_root(moment.second), compute_uv=False)
                measured = found[name].spectrum
                assert measured is not None and measured.whitened and measured.rank == values.size
                wanted = values[np.array(measured.ranks) - 1] / values[0]
                np.testing.assert_allclose(measured.values, wanted, atol=1e-6)
                seen.add(name)
    assert seen == set(found)


def test_spectra_without_a_moment_and_of_nothing() -> None:
    values = np.random.default_rng(0).standard_normal((9, 5))
    found = spectrum(values, None)
    assert not found.whitened and found.ranks == (1, 2, 3, 4, 5)
    singular = np.linalg.svd(values, compute_uv=False)
    np.testing.assert_allclose(found.values, singular / singular[0])
    energy = np.cumsum(singular**2) / np.sum(singular**2)
    assert found.rank_90 == int(np.argmax(energy >= 0.9)) + 1
    assert set(spectrum(np.zeros((3, 4)), np.eye(4)).values) == {0.0}


def test_the_progress_is_that_of_the_export(report: Report, exported: Result) -> None:
    went = report.compression
    assert went is not None
    assert {step.layer for step in went.steps} == {linear.name for linear in exported.spec.linears}
    assert [stage.name for stage in went.stages] == ["fitting", "measuring", "measuring χ=1"]
    assert went.stages[0].steps == len(went.steps)
    ends = [step.end for step in went.steps]
    assert ends == sorted(ends) and all(0 < step.error < 1 and step.seconds > 0 for step in went.steps)
    assert all(early.end <= late.start + 1e-9 for early, late in zip(went.stages, went.stages[1:], strict=False))


def test_the_same_bytes_without_cores_are_measured(report: Report, source: Path, job: Job) -> None:
    plain = report.without_cores
    assert plain is not None and plain.kl_mean > 0
    assert 0.9 * report.sizes.file_bytes < plain.file_bytes <= report.sizes.file_bytes + 256
    kinds = [point.kind for point in report.points]
    assert sorted(kinds) == ["dense", "prefix", "this file", "without cores"]
    assert [point.bytes for point in report.points] == sorted((point.bytes for point in report.points), reverse=True)
    refused = gathered(source, dataclasses.replace(job, without_cores=False))
    assert refused.without_cores is None and "--without-cores" in refused.missing["without_cores"]


def test_the_survey_predicts_less_loss_for_more_bytes(source: Path, exported: Result, tmp_path: Path) -> None:
    dense = Checkpoint(source)
    surveyed = survey(dense, Calibration(dense, cut_calibration(CALIBRATION, dense.architecture, count=8), tmp_path))
    curve = predicted_curve(surveyed, exported.spec, exported.file_bytes)
    sizes, losses = [one.bytes for one in curve], [one.loss for one in curve]
    assert len(curve) > 5
    assert sizes == sorted(set(sizes)) and losses == sorted(losses, reverse=True)


def test_speed_memory_and_texts(report: Report, source: Path, exported: Result) -> None:
    speed, memory, texts = report.speed, report.memory, report.texts
    assert speed is not None and memory is not None and texts is not None
    assert len(speed.dense) == len(speed.compressed) >= 5
    middle = len(speed.dense) // 2
    assert speed.median == sorted(speed.compressed)[middle] and speed.dense_median == sorted(speed.dense)[middle]
    assert report.ratios.speed == speed.median / speed.dense_median
    assert speed.slower == (report.ratios.speed < 1)
    assert 0 < memory.base < memory.peak and 0 < memory.dense_base < memory.dense_peak
    assert report.ratios.memory == memory.peak / memory.dense_peak
    # No chat template here, so that only the plain prompts are continued; the prompt itself is no part of the text.
    assert texts.prompts and not any(prompt.chat for prompt in texts.prompts)
    for prompt in texts.prompts:
        assert prompt.dense is not None
        assert prompt.compressed.tokens <= texts.limit and 0 <= prompt.compressed.repeated <= 1
    assert texts.repeated == sum(prompt.compressed.repeated for prompt in texts.prompts) / len(texts.prompts)
    with load(exported.path, context=128, threads=1) as ours, load(source, context=128, threads=1) as dense:
        assert write_texts(dense, ours, None, silent) == texts


def test_repeated_shares() -> None:
    assert repeated_share([]) == repeated_share([1, 2, 3]) == repeated_share([1, 2, 3, 4, 5]) == 0
    assert repeated_share([7] * 8) == pytest.approx(4 / 5)
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_a_process_that_fails_is_a_reason(tmp_path: Path) -> None:
    found = footprint.in_child(tmp_path / "none.mpo", 4, 1)
    assert found == "the process that measures none.mpo failed"


def test_a_file_of_another_model_is_refused(job: Job, tmp_path: Path) -> None:
    config = granite_config(num_hidden_layers=2, hidden_size=64, intermediate_size=96, max_position_embeddings=128)
    other = write_folder(tmp_path / "other", config, seed=1)
    with pytest.raises(ConfigError, match="was made from model with SHA-256 .* give that one with --teacher"):
        gathered(other, job)
    smaller = write_folder(tmp_path / "smaller", granite_config())
    with pytest.raises(ConfigError, match="its architecture is not that of smaller"):
        gathered(smaller, job)


def test_points_of_earlier_reports_are_kept_where_they_compare(report: Report) -> None:
    quality = report.quality
    assert quality is not None
    origin = report.subject.source_sha256
    kept = earlier_points(report, quality, origin)
    assert {point.kind for point in kept} == {"earlier", "without cores"}
    assert kept[0].bytes in {point.bytes for point in report.points}
    twice = dataclasses.replace(report, points=(*report.points, Point("earlier", "old", 5, 0.5, 9.0)))
    assert Point("earlier", "old", 5, 0.5, 9.0) in earlier_points(twice, quality, origin)
    assert earlier_points(report, quality, "another") == []
    assert earlier_points(report, dataclasses.replace(quality, tokens=7), origin) == []
    assert earlier_points(None, quality, origin) == []


def test_a_folder_that_is_no_report_is_refused(report: Report, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "report"
    assert prepare(folder, force=False) is None and folder.is_dir()
    write(folder, report, "<p>page</p>")
    assert sorted(os.listdir(folder)) == [PAGE, JSON]
    assert prepare(folder, force=False) == report
    (folder / JSON).write_text(to_text(report).replace('"version": 1', '"version": 99'))
    assert prepare(folder, force=False) is None  # of another version: it is replaced
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"other: holds something else than a report \('thesis.tex'\).*--force"):
        prepare(other, force=False)
    assert prepare(other, force=True) is None
    write(other, report, "<p>page</p>")
    assert (other / "thesis.tex").read_text() == "years of work"
    with pytest.raises(OutputError, match="thesis.tex: is a file"):
        prepare(other / "thesis.tex", force=True)


def test_a_disk_that_refuses_leaves_the_old_report(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, report, "old page")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match=r"report.json: cannot write \(No space left on device\)"):
        write(tmp_path, report, "new page")
    assert sorted(os.listdir(tmp_path)) == [PAGE, JSON]
    assert (tmp_path / PAGE).read_text() == "old page"


def test_the_table_says_plainly_what_is_slower(
    report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.speed is not None and report.quality is not None
    slow = dataclasses.replace(report.speed, dense_median=20.0, median=10.0, slower=True)
    named = dataclasses.replace(report.quality, text="[bold]text")
    print_whole(dataclasses.replace(report, speed=slow, quality=named), tmp_path)
    out = capsys.readouterr().out
    plain = " ".join(out.split())
    assert "decodes more slowly than the dense model on this machine: 10.0 against 20.0 tokens/s" in plain
    assert "[bold]text" in plain
    for word in (
        "parameters",
        "file bytes",
        "memory",
        "decoding, tokens/s",
        "perplexity",
        "logits, cosine",
        "repeated 4-grams",
        "early stops",
        "layers with cores",
        "the same bytes without cores",
    ):
        assert word in plain


def test_the_documentation_names_every_figure() -> None:
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(\w+)`", text))
    records = [found for found in vars(facts).values() if dataclasses.is_dataclass(found)]
    assert len(records) > 15
    missing = {field.name for record in records for field in dataclasses.fields(record)} - documented
    assert missing == set()


@pytest.mark.parametrize(
    ("files", "command"),
    [
        ((), "mpo-run info"),
        (("tokenizer.json",), "mpo-run generate"),
        (("tokenizer.json", "chat_template.jinja"), "mpo-run chat"),
    ],
)
def test_the_command_that_suits_a_file(
    tmp_path: Path, files: tuple[str, ...], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "model", granite_config())
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    if "tokenizer.json" in files:
        (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    if "chat_template.jinja" in files:
        (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    path = tmp_path / "model.mpo"
    export_folder(folder, path, Options("int4"))
    print_next_step(path)
    assert command in capsys.readouterr().out
