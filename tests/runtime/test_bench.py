"""mpo-run bench: what is asked for is checked first, what is timed is what was asked for, and the figures add up."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo_exporter.plan.options import Options
from mpo_formats import ConfigError, MpoFile
from mpo_formats.reference import matrix
from mpo_runtime import native
from mpo_runtime.bench import report, worker
from mpo_runtime.bench import run as bench_run
from mpo_runtime.bench.contestant import Contestant, Worker, open_contestant, step_bytes
from mpo_runtime.bench.densify import write_densified
from mpo_runtime.bench.meters import Energy
from mpo_runtime.bench.run import Outcome, check_same_model, measure
from mpo_runtime.bench.settings import BenchSettings, groups, parse_counts
from tests.helpers import export_folder, granite_config, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = granite_config(hidden_size=64, num_hidden_layers=1, tie_word_embeddings=False, attention_bias=True)
    return write_folder(tmp_path_factory.mktemp("bench") / "little", config)


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_folder(folder, tmp_path_factory.mktemp("file") / "little.mpo", Options("corrected", chi=2)).path


def test_a_test_is_made_for_every_combination() -> None:
    settings = BenchSettings(prompt=(8, 0), tokens=(4,), depth=(0, 16), batch=(1, 2), threads=(1,))
    assert [case.name for case in settings.tests()] == ["pp8", "tg4", "pp8 @ 16", "tg4 @ 16"] * 2
    assert [{case.batch for case in group} for group in groups(settings.tests())] == [{1}, {2}]
    assert settings.capacity() == 24


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompt": (-1,)}, "-p: expected 0 or more, found -1"),
        ({"depth": (0, -4)}, "-d: expected 0 or more, found -4"),
        ({"batch": (0,)}, "-b: expected 1 or more, found 0"),
        ({"threads": (0,)}, "--threads: expected at least 1"),
        ({"repetitions": 0}, "-r: expected 1 or more repetitions, found 0"),
        ({"prompt": (0,), "tokens": (0,)}, "nothing is left to measure"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BenchSettings(**values)


def test_lists_of_numbers_are_read() -> None:
    assert parse_counts("0,4096", "-d") == (0, 4096)
    with pytest.raises(ConfigError, match="-d 0,x: expected whole numbers"):
        parse_counts("0,x", "-d")


def test_a_context_that_is_too_short_is_refused_by_name(folder: Path) -> None:
    one = open_contestant(folder, None)
    BenchSettings(prompt=(32,), tokens=(8,), depth=(32,)).check_context(one.name, one.spec.architecture)
    with pytest.raises(ConfigError, match="little: 33 tokens of depth and 32 new ones do not fit .* context of 64"):
        BenchSettings(prompt=(32,), tokens=(8,), depth=(33,)).check_context(one.name, one.spec.architecture)


def fake_zone(folder: Path, name: str, energy: int, limit: int = 1_000_000) -> Path:
    zone = folder / name
    zone.mkdir(parents=True)
    (zone / "energy_uj").write_text(f"{energy}\n")
    (zone / "max_energy_range_uj").write_text(f"{limit}\n")
    return zone / "energy_uj"


def test_energy_is_that_of_whole_packages_and_survives_an_overflow(tmp_path: Path) -> None:
    first, second = fake_zone(tmp_path, "intel-rapl:0", 999_000), fake_zone(tmp_path, "intel-rapl:1", 10)
    fake_zone(tmp_path, "intel-rapl:0:0", 5)
    energy = Energy(tmp_path)
    before = energy.now()
    assert before == [999_000, 10]
    first.write_text("499999")  # began again at 0
    second.write_text("500010")
    assert energy.since(before) == pytest.approx(1.001, abs=1e-3)


def test_energy_that_cannot_be_read_is_absent(tmp_path: Path) -> None:
    energy = Energy(tmp_path / "none")
    assert not energy.readable and energy.since(energy.now()) is None


def test_a_densified_model_is_the_sum_of_its_terms_in_bf16(exported: Path, tmp_path: Path) -> None:
    write_densified(exported, tmp_path / "dense.mpo")
    with MpoFile(exported) as compressed, MpoFile(tmp_path / "dense.mpo") as dense:
        dense.verify()
        for linear in dense.spec.linears:
            assert [str(term.kind) for term in linear.terms] == ["dense"] and linear.terms[0].dtype == "bf16"
            wanted = matrix(compressed, compressed.spec.linear(linear.name))
            found = matrix(dense, linear)
            assert np.abs(wanted - found).max() <= np.abs(wanted).max() / 256
        for vector in dense.spec.vectors:
            name = f"{vector.name}.weight"
            assert np.array_equal(compressed.array(name), dense.array(name))
        assert open_contestant(tmp_path / "dense.mpo", None).parameters == dense.spec.architecture.parameters()


def test_a_densified_model_that_does_not_fit_on_the_disk_is_refused(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000})())
    with pytest.raises(ConfigError, match="TMPDIR"):
        write_densified(exported, tmp_path / "dense.mpo")
    assert list(tmp_path.iterdir()) == []


def test_the_bytes_of_a_step_leave_out_an_embedding_that_is_not_the_head(exported: Path, folder: Path) -> None:
    whole, part = (open_contestant(exported, chi).read_bytes for chi in (None, 1))
    assert part < whole
    with MpoFile(exported) as file:
        embedding = sum(tensor.size for tensor in [*_tensors(file, "model.embed_tokens.")])
        layers = sum(tensor.size for linear in file.spec.linears for tensor in _tensors(file, f"{linear.name}."))
        assert step_bytes(file.spec, None) == layers - embedding


def _tensors(file: MpoFile, prefix: str) -> list[Any]:
    from mpo_formats.layout import content_tensors

    return [tensor for tensor in content_tensors(file.spec) if tensor.name.startswith(prefix)]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_session_runs_as_many_tokens_as_it_was_asked_for(
    folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "native" and not native.available():
        pytest.skip("the native kernels were not built")
    monkeypatch.setattr(worker, "PREFILL_CHUNK", 8)
    session = worker.Session(str(folder), {"backend": backend})
    session.prepare(rows=2, capacity=40, depth=20)
    assert session.cache.lengths == [20, 20]
    found = session.time("prompt", 12, 20, 1, warm=False)
    assert session.cache.lengths == [32, 32] and found["seconds"] > 0
    session.time("decode", 5, 0, 1, warm=False)
    assert session.cache.lengths == [5, 5]
    session.time("decode", 30, 10, 1, warm=True)
    assert session.cache.lengths == [14, 14]


def test_a_worker_answers_errors_in_words(folder: Path, tmp_path: Path) -> None:
    asked = [
        {"task": "time", "kind": "prompt", "tokens": 1, "depth": 0, "threads": 1, "warm": False},
        {"task": "load", "file": str(tmp_path / "none"), "options": {}},
        {"task": "peak"},
    ]
    out = io.StringIO()
    worker.serve(io.StringIO("".join(json.dumps(one) + "\n" for one in asked)), out)
    first, second, third = map(json.loads, out.getvalue().splitlines())
    assert "no model is loaded" in first["error"] and "none" in second["error"] and third["peak_bytes"] > 0


class FakeWorker(Worker):
    """Answers with times that are written down beforehand: one list for each model."""

    seconds: dict[str, list[float]] = {}  # noqa: RUF012
    interrupted_after: int | None = None

    def __init__(self, contestant: Contestant) -> None:
        self.contestant = contestant
        self.times = iter([9.0, *self.seconds[contestant.name]])  # the first one is the warm-up

    def ask(self, task: str, **request: Any) -> dict[str, Any]:
        if task == "load":
            return {"load_seconds": 0.1, "backend": "native", "kernels": {"native": "test"}}
        if task == "prepare":
            return {"cache_bytes": request["rows"] * request["capacity"] * 100}
        if task == "peak":
            return {"peak_bytes": 5000 if self.contestant.baseline else 2000}
        if FakeWorker.interrupted_after is not None:
            FakeWorker.interrupted_after -= 1
            if FakeWorker.interrupted_after < 0:
                raise KeyboardInterrupt
        seconds = next(self.times)
        return {"seconds": seconds, "joules": 4 * seconds}

    def close(self) -> None:
        """Nothing to end."""


@pytest.fixture
def fake(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Contestant]:
    one = open_contestant(folder, None, name="small")
    base = open_contestant(folder, None, name="dense", baseline=True)
    monkeypatch.setattr(bench_run, "Worker", FakeWorker)
    monkeypatch.setattr(bench_run, "read_bandwidth", lambda threads: 10.0)
    monkeypatch.setattr(FakeWorker, "interrupted_after", None)
    return [one, base]


DECODE = BenchSettings(prompt=(0,), tokens=(8,), depth=(16,), batch=(2,), threads=(1,), repetitions=2)


def run_fake(fake: list[Contestant], small: list[float], dense: list[float]) -> Outcome:
    FakeWorker.seconds = {"small": small, "dense": dense}
    return measure(fake, DECODE, {}, lambda stage, done, total: None)


def test_figures_are_those_of_the_repetitions(fake: list[Contestant]) -> None:
    outcome = run_fake(fake, [2.0, 4.0], [1.0, 1.0])
    row, dense = report.records(outcome)
    assert (row["model"], row["test"], row["batch"], row["repetitions"]) == ("small", "tg8 @ 16", 2, 2)
    assert row["samples"] == [8.0, 4.0] and row["tokens_per_second"] == 6.0
    assert row["tokens_per_second_deviation"] == pytest.approx(statistics.stdev([8.0, 4.0]))
    # Each of 3 steps a second (6 tokens over 2 sequences) reads the weights and 2 caches of 100 bytes a token, on average
    # over 16 to 24 tokens of context.
    moved = fake[0].read_bytes + 2 * 100 * 20.5
    assert row["gigabytes_per_second"] == pytest.approx(moved * 3 / 1e9)
    assert row["share_of_bandwidth"] == pytest.approx(moved * 3 / 1e10)
    assert row["joules_per_token"] == pytest.approx(12 / 16) and row["first_token_seconds"] is None
    assert dense["baseline"] and dense["peak_bytes"] == 5000


def test_the_verdict_says_when_the_model_is_slower(fake: list[Contestant]) -> None:
    [slow] = report.verdicts(run_fake(fake, [2.0, 2.0], [1.0, 1.0]))
    assert slow["speed"][0]["ratio"] == 0.5 and slow["memory"] == 0.4
    assert slow["text"].startswith(
        "small beside dense: 1.00 x the parameters, 1.00 x the bytes, 0.40 x the memory, "
        "0.50 ± 0.00 x the speed decoding."
    )
    assert "SLOWER than the baseline at tg8 @ 16, batch 2, 1 thread." in slow["text"]
    [fast] = report.verdicts(run_fake(fake, [1.0, 1.0], [3.0, 2.0]))
    assert fast["speed"][0]["ratio"] == 2.5 and "SLOWER" not in fast["text"] and "No difference" not in fast["text"]
    [level] = report.verdicts(run_fake(fake, [1.0, 1.1], [1.1, 1.0]))
    assert "No difference in speed beyond the spread" in level["text"] and "SLOWER" not in level["text"]


def test_an_interrupted_run_keeps_what_was_measured(fake: list[Contestant]) -> None:
    FakeWorker.interrupted_after = 5  # two warm up, two of the first round, one of the second
    outcome = run_fake(fake, [2.0, 4.0], [1.0, 1.0])
    assert not outcome.complete
    assert sorted(row["repetitions"] for row in report.records(outcome)) == [1, 2]
    assert len(report.verdicts(outcome)) == 1
    FakeWorker.interrupted_after = 1
    with pytest.raises(KeyboardInterrupt):
        run_fake(fake, [2.0, 4.0], [1.0, 1.0])


def test_tables_have_a_cell_for_every_head(fake: list[Contestant]) -> None:
    rows = report.records(run_fake(fake, [2.0, 4.0], [1.0, 1.0]))
    lines = report.table(rows)
    assert {len(line) for line in lines} == {len(lines[0])} and "J/token" in lines[0]
    for row in rows:
        row["joules_per_token"] = None
    assert "J/token" not in report.table(rows)[0]
    assert len(report.markdown(rows).splitlines()) == 4
    read = list(csv.DictReader(io.StringIO(report.csv_text(rows))))
    assert [float(row["tokens_per_second"]) for row in read] == [6.0, 16.0] and "samples" not in read[0]


def test_a_baseline_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", granite_config())
    with pytest.raises(ConfigError, match="hidden_size is 64, that of the baseline other 32"):
        check_same_model([open_contestant(folder, None)], open_contestant(other, None, baseline=True))


def test_a_process_that_dies_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with Worker(open_contestant(folder, None)) as dead, pytest.raises(ConfigError, match="has ended"):
        dead.ask("peak")
