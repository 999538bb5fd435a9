"""The latency table: real kernels on small shapes, cached for this machine, and timed once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mpo_exporter.measure import latency as latency_module
from mpo_exporter.measure.latency import Latency, no_slower_than, open_table, save_table, working_set_of
from mpo_exporter.terms import Candidate, operator
from mpo_formats import Dense, LinearSpec, ModelSpec, Quantized
from mpo_runtime import native
from tests.exporter.test_plan import dense_model

pytestmark = pytest.mark.skipif(not native.available(), reason="times the native kernels")

TERMS = (
    (Quantized(4, 32, False),),
    (Quantized(3, 32, True),),
    (Quantized(2, 64, False), operator((64, 1), (1, 64), 4, "int8")),
    (operator((8, 8), (8, 8), 5, "f16"),),
    (Dense("bf16"),),
)


@pytest.fixture
def spec() -> ModelSpec:
    return dense_model(blocks=2, tied=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPO_CACHE", str(tmp_path))


def test_every_kind_of_term_is_timed_once_and_kept(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [LinearSpec("layer", 64, 64, None, terms) for terms in TERMS]
    table = open_table(spec)
    table.fill([*layers, *layers])
    assert table.measured == len(TERMS) and all(0 < table.layer(layer) < 1 for layer in layers)
    planned = dataclasses.replace(
        spec,
        linears=tuple(
            dataclasses.replace(one, terms=TERMS[0]) if one.in_features == 64 else one for one in spec.linears
        ),
    )
    seconds = table.token(planned)
    assert seconds >= sum(table.layer(linear) for linear in planned.linears)
    told: list[str] = []
    save_table(table, told.append)
    assert "cached for the next plan" in told[0] and table.measured == 0

    def timed_again(*_: object) -> float:
        raise AssertionError("timed again")

    monkeypatch.setattr(latency_module, "time_layer", timed_again)
    monkeypatch.setattr(latency_module, "time_rest", timed_again)
    again = open_table(spec)
    assert [again.layer(layer) for layer in layers] == [table.layer(layer) for layer in layers]
    assert again.token(planned) == seconds


def test_another_cpu_number_of_threads_or_version_is_measured_anew(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = open_table(spec)
    table.layer(LinearSpec("layer", 64, 64, None, TERMS[0]))
    save_table(table)
    assert open_table(spec).seconds
    key = latency_module.machine_key()
    for change in ({"cpu": "another"}, {"threads": "99"}, {"native": "another level"}, {"version": "0.0"}):
        monkeypatch.setattr(latency_module, "machine_key", lambda change=change: key | change)
        told: list[str] = []
        assert open_table(spec, log=told.append).seconds == {}
        assert "is stale" in told[0] and next(iter(change)) in told[0]


def test_slower_candidates_are_dropped_but_never_all(spec: ModelSpec) -> None:
    linear = LinearSpec("layer", 64, 64, None, TERMS[0])
    rows = [Candidate(10 * index, 0.0, terms) for index, terms in enumerate(TERMS)]
    table = Latency(spec, 1 << 20, {}, {})
    for seconds, terms in zip((2.0, 3.0, 1.0, 2.0, 9.0), TERMS, strict=True):
        table.seconds[latency_module.signature(dataclasses.replace(linear, terms=terms))] = seconds
    assert no_slower_than(table, linear, rows, linear) == [rows[0], rows[2], rows[3]]
    assert no_slower_than(table, linear, rows[4:], linear) == rows[4:]
    assert table.measured == 0


def test_the_working_set_follows_the_model(spec: ModelSpec) -> None:
    sizes = [working_set_of(dense_model(hidden=hidden, blocks=4)) for hidden in (64, 256)]
    assert sizes == sorted(sizes) and all(size & (size - 1) == 0 for size in sizes)
