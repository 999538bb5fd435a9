"""Making plans: surveys that are kept, layers chosen by sensitivity, speed, files, and predictions against what came out."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mpo_exporter.export import ExportTask, Listener, planned_spec, planner_for
from mpo_exporter.measure import latency as latency_module
from mpo_exporter.measure import survey as survey_module
from mpo_exporter.measure.cache import Cached
from mpo_exporter.measure.latency import Latency
from mpo_exporter.measure.survey import packed, unpacked
from mpo_exporter.plan import budget as budget_module
from mpo_exporter.plan import planner as planner_module
from mpo_exporter.plan.budget import default_bytes, file_bytes
from mpo_exporter.plan.file import read_plan, write_plan
from mpo_exporter.plan.options import Choice, Options, Target
from mpo_exporter.plan.planner import Planner, with_default_target
from mpo_exporter.plan.predict import correction, outcomes_file, predict, record_outcome, within_kl
from mpo_exporter.request import plan_options
from mpo_exporter.source import Source, open_source
from mpo_exporter.terms import integers, operator
from mpo_formats import ConfigError, LinearSpec, ModelSpec, Mpo, MpoFile, OutputError, PlanError, Quantized
from mpo_formats.architecture import EMBEDDING
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import export_folder, granite_config, some_ids, write_folder

TEXT = TokenText("calibration", np.array(some_ids(24 * 63), np.int64), 0, "1" * 64)
HELD_OUT = TokenText("held-out", np.array(some_ids(512, 9), np.int64), 0, "2" * 64)
# Logits small enough that the random model's distribution is no single token's.
CONFIG = granite_config(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, logits_scaling=16.0, embedding_multiplier=1.0
)
WINDOWS = 12
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("source") / "model", CONFIG, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def source(folder: Path) -> Iterator[Source]:
    with open_source(folder) as source:
        yield source


@pytest.fixture(scope="module")
def planner(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Planner:
    """One planner for all tests, so that the model is surveyed once."""
    task = ExportTask(Path("none.mpo"), calibration=TEXT, windows=WINDOWS)
    made = planner_for(source, task, tmp_path_factory.mktemp("spill"), Listener())
    made.survey()
    return made


@pytest.fixture
def spec(folder: Path) -> ModelSpec:
    return Checkpoint(folder).spec


def bytes_of(spec: ModelSpec, linears: tuple[LinearSpec, ...]) -> int:
    return file_bytes(dataclasses.replace(spec, linears=linears))


def test_another_budget_does_not_survey_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPO_CACHE", str(tmp_path / "cache"))
    surveyed, original = [], survey_module.survey

    def counting(*arguments: object, **options: object) -> object:
        surveyed.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(survey_module, "survey", counting)
    told: list[str] = []
    sizes, files = (30_000, 40_000, 30_000), []
    least = default_bytes(Checkpoint(folder).spec)
    for number, more in enumerate(sizes):
        target = tmp_path / f"{number}.mpo"
        result = export_folder(
            folder,
            target,
            Options("auto", target=Target(size=least + more)),
            calibration=TEXT,
            windows=WINDOWS,
            listener=Listener(log=told.append),
        )
        assert 0.985 * (least + more) < result.file_bytes <= least + more
        files.append(target.read_bytes())
    assert len(surveyed) == 1
    assert "measured in" in told[0] and all("measured before" in line for line in told[1:])
    assert files[0] == files[2] != files[1]  # read from the cache or new: the same file
    [kept] = (tmp_path / "cache").glob("survey-*")
    raw = bytearray(kept.read_bytes())
    raw[-100] ^= 1
    kept.write_bytes(raw)
    told.clear()
    export_folder(
        folder,
        tmp_path / "again.mpo",
        Options("auto", target=Target(size=least + sizes[0])),
        calibration=TEXT,
        windows=WINDOWS,
        listener=Listener(log=told.append),
    )
    assert "is damaged; measuring again" in told[0] and len(surveyed) == 2
    assert (tmp_path / "again.mpo").read_bytes() == files[0]


def test_a_survey_is_kept_whole(planner: Planner) -> None:
    found, again = planner.survey(), unpacked(packed(planner.survey(), 1.0))
    assert again.candidates == found.candidates and again.alone == found.alone
    np.testing.assert_array_equal(again.table, found.table)


def test_the_least_sensitive_layers_are_chosen(planner: Planner, spec: ModelSpec) -> None:
    losses = {
        linear.name: planner.survey().loss(dataclasses.replace(linear, terms=(integers(64, 4),)))
        for linear in spec.linears
        if linear.in_features == 64 and linear.name != EMBEDDING
    }
    order = sorted(losses, key=lambda name: losses[name] or 0.0)
    planned = planner.layers(
        spec, Options("int4", choice=Choice(top_k=3, pattern="q_proj|k_proj|v_proj|o_proj|gate|up"))
    )
    changed = {linear.name for linear, plain in zip(planned, spec.linears, strict=True) if linear != plain}
    assert changed == set(order[:3])


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_paper_gives_cores_to_a_share_of_the_layers(planner: Planner, spec: ModelSpec, share: float) -> None:
    planned = planner.layers(spec, Options("paper", chi=4, choice=Choice(share=share)))
    cores = [linear.name for linear in planned if isinstance(linear.terms[0], Mpo)]
    assert len(cores) == round(share * 21) and EMBEDDING not in cores
    rest = [linear for linear in planned if linear.name not in cores]
    assert all(linear.terms == (integers(linear.in_features, 4),) for linear in rest)


def test_measured_sensitivity_ranks_by_what_was_measured(
    planner: Planner, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order is that of the measured KL, here given by hand: the last layers first."""

    def by_hand(source: object, text: object, walk: object, layers: list[LinearSpec], **_: object) -> list[object]:
        names = [linear.name for linear in layers]
        return [Row(name, 1.0 / (1 + index)) for index, name in enumerate(names)]

    monkeypatch.setattr(planner_module, "cached_sensitivities", by_hand)
    planned = planner.layers(spec, Options("paper", chi=4, choice=Choice(top_k=2, sensitivity="full")))
    cores = [linear.name for linear in planned if isinstance(linear.terms[0], Mpo)]
    assert cores == ["model.layers.2.mlp.up_proj", "model.layers.2.mlp.down_proj"]


@dataclasses.dataclass(frozen=True)
class Row:
    layer: str
    kl_mean: float


def test_more_layers_than_there_are(planner: Planner, spec: ModelSpec) -> None:
    with pytest.raises(PlanError, match="--top-k 22: the plan paper can act on 21 layers of this model"):
        planner.layers(spec, Options("paper", choice=Choice(top_k=22)))


def test_auto_by_itself_may_choose_cores_of_at_most_32(planner: Planner, spec: ModelSpec) -> None:
    rows = planner.candidates(Options("auto", target=Target(size=2 * default_bytes(spec))), spec.linears)
    bonds = {max(term.bonds) for row in rows.values() for one in row for term in one.terms if isinstance(term, Mpo)}
    assert bonds == {1, 2, 4, 8, 16, 32}


@pytest.mark.parametrize("chi", [1, 3, 8, 1000])
def test_demanded_cores_are_in_every_matrix_and_the_size_stays(planner: Planner, spec: ModelSpec, chi: int) -> None:
    """3 is not on the survey's ladder, 1,000 above every full rank."""
    target = round(1.1 * planner.least_with_cores(spec, Options("auto", chi=chi)))
    planned = planner.layers(spec, Options("auto", chi=chi, target=Target(size=target)))
    assert 0.95 * target < bytes_of(spec, planned) <= target
    for linear in planned:
        if linear.name == EMBEDDING:
            assert linear.terms[0].kind in ("quantized", "dense") and len(linear.terms) == 1
            continue
        base, cores = linear.terms
        full = min(linear.out_features, linear.in_features)
        assert base.kind == "quantized"
        assert cores == operator((linear.out_features, 1), (1, linear.in_features), min(chi, full), "int8")


def test_losses_beside_demanded_cores_fall_with_bits_and_chi(planner: Planner, spec: ModelSpec) -> None:
    """Those on the ladder are the survey's own; one between two of them lies between theirs."""
    linear, base = spec.linear(UP), Quantized(3, 64, False)

    def losses(chi: int) -> dict[tuple[object, ...], float]:
        options = Options("auto", chi=chi, target=Target(size=10**6))
        return {one.terms[:1]: one.loss for one in planner.candidates(options, spec.linears)[UP]}

    two, three, four = (losses(chi)[(base,)] for chi in (2, 3, 4))
    assert four < three < two < planner.survey().loss(dataclasses.replace(linear, terms=(base,)))
    cores = operator((linear.out_features, 1), (1, linear.in_features), 4, "int8")
    assert [four] == [one.loss for one in planner.survey().candidates[UP] if one.terms == (base, cores)]
    widths = [losses(3)[(Quantized(bits, 64, False),)] for bits in (2, 3, 4, 5, 6)]
    assert widths == sorted(widths, reverse=True)


def test_a_size_without_room_for_the_cores_is_refused_before_anything_is_measured(
    source: Source, planner: Planner, spec: ModelSpec
) -> None:
    blind = Planner(source.weights)  # it has no text to measure on
    options = Options("auto", chi=16, target=Target(size=10**5))
    with pytest.raises(
        PlanError, match=r"of --chi 16 .* the smallest such file takes [0-9,]+; .* --chi [0-9]+, the"
    ) as said:
        blind.layers(spec, options)
    least = int(re.search(r"file takes ([0-9,]+)", str(said.value))[1].replace(",", ""))
    largest = int(re.search(r"or --chi ([0-9]+)", str(said.value))[1])
    planned = planner.layers(spec, dataclasses.replace(options, target=Target(size=least)))
    assert 0 <= least - bytes_of(spec, planned) < 600  # layers without a transform have a shorter entry in the header
    fitting = planner.layers(spec, dataclasses.replace(options, chi=largest))
    assert bytes_of(spec, fitting) <= 10**5 and largest < 16
    for demanded, size in ((largest + 1, 10**5), (1, 20_000)):
        refused = dataclasses.replace(options, chi=demanded, target=Target(size=size))
        with pytest.raises(PlanError, match=r"not even --chi 1" if size < 10**5 else rf"--chi {largest}, the largest"):
            blind.layers(spec, refused)


@pytest.mark.parametrize("chi", [None, 4])
@pytest.mark.parametrize("most", [1e-6, 1e9])
def test_the_default_size_is_the_larger_of_two(
    planner: Planner, spec: ModelSpec, chi: int | None, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By bits where any KL will do, by KL where hardly any will; cores may need more than either."""
    monkeypatch.setattr(budget_module, "DEFAULT_KL", most)
    told: list[str] = []
    monkeypatch.setattr(planner, "log", told.append)
    options = with_default_target(Options("auto", chi=chi))
    sized = planner.sized(spec, options)
    assert sized.target.size is not None and not sized.target.default
    planned = planner.layers(spec, sized)
    assert planner.layers(spec, options) == planned
    expected = planner.survey().total_loss(planned)
    assert expected is not None
    by_bits = default_bytes(planner.source.spec)
    if most > 1 and chi is None:
        assert sized.target.size == by_bits
        assert told[0].startswith(
            f"no target was given: took 4.25 bits per weight, {by_bits:,} bytes, with an expected KL"
        )
        assert "; an expected KL of " in told[0] and " would take " in told[0]
    else:
        assert sized.target.size > by_bits
        assert "took the size with an expected KL of" in told[0] and f"{by_bits:,} bytes, would have given" in told[0]
        assert chi is not None or expected <= most


def test_layers_that_a_pattern_leaves_out_stay_dense_in_an_allocation(planner: Planner, spec: ModelSpec) -> None:
    options = Options("auto", target=Target(size=2 * default_bytes(spec)), choice=Choice(pattern="mlp"))
    for linear, dense in zip(planner.layers(spec, options), spec.linears, strict=True):
        assert ".mlp." in linear.name or linear == dense


def test_below_integers_cores_alone_and_below_these_the_minimum(planner: Planner, spec: ModelSpec) -> None:
    integers_least = bytes_of(
        spec, tuple(dataclasses.replace(linear, terms=(Quantized(2, 64, False),)) for linear in spec.linears)
    )
    planned = planner.layers(spec, Options("auto", target=Target(size=integers_least - 2000)))
    assert any(linear.terms[0].kind == "mpo" for linear in planned)
    assert bytes_of(spec, planned) <= integers_least - 2000
    with pytest.raises(PlanError, match="the smallest file of this model takes [0-9,]+; give a larger target"):
        planner.layers(spec, Options("auto", target=Target(size=20_000)))


def test_shapes_slower_than_int4_are_not_chosen(
    planner: Planner, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine on which 3 bits take longer than 4, 2 bits less, and cores beside a base always longer."""

    def seconds(linear: LinearSpec) -> float:
        base = linear.terms[0]
        bits = base.bits if isinstance(base, Quantized) else 16
        return (5.0 if bits == 3 else bits) + len(linear.terms) - 1

    monkeypatch.setattr(Latency, "layer", lambda table, linear: seconds(linear))
    monkeypatch.setattr(planner_module, "open_table", lambda source, **_: Latency(source, 1 << 20, {}, {}))
    target = round(1.1 * default_bytes(spec))
    free = planner.layers(spec, Options("auto", target=Target(size=target)))
    fast = planner.layers(spec, Options("auto", target=Target(size=target), for_speed=True))
    assert any(seconds(linear) > 4 for linear in free)
    assert all(seconds(linear) <= 4 for linear in fast)
    with pytest.raises(PlanError, match="are too few"):
        planner.layers(spec, Options("auto", target=Target(size=20_000), for_speed=True))


def test_without_native_kernels_there_is_nothing_to_time(
    planner: Planner, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_module.native, "available", lambda: False)
    with pytest.raises(ConfigError, match="no native kernels to time here .*; plan without --for-speed"):
        planner.layers(spec, Options("auto", target=Target(size=default_bytes(spec)), for_speed=True))


def test_plans_that_need_text_say_so(source: Source, spec: ModelSpec) -> None:
    blind = Planner(source.weights)
    for options in (
        Options("auto", target=Target(size=10**6)),
        Options("paper", choice=Choice(top_k=1)),
        Options("auto", target=Target(max_kl=0.1)),
    ):
        with pytest.raises(ConfigError, match="give one with --calib"):
            blind.layers(spec, options)


def test_predictions_against_what_came_out(folder: Path, source: Source, planner: Planner, tmp_path: Path) -> None:
    """Bytes exactly; KL within a factor of two before an export was measured, and nearly exactly after it."""
    options = Options("auto", target=Target(size=round(0.9 * default_bytes(planner.source.spec))))
    spec = planned_spec(source, ExportTask(Path("none.mpo"), options, calibration=TEXT), planner)
    first = predict(planner, spec)
    result = export_folder(folder, tmp_path / "out.mpo", options, calibration=TEXT, windows=WINDOWS, text=HELD_OUT)
    assert result.comparison is not None and first.kl is not None
    assert first.file_bytes == result.file_bytes
    assert result.spec.linears == spec.linears
    assert 0.5 < first.kl / result.comparison.kl_mean < 2
    second = predict(planner, spec)
    assert second.kl == pytest.approx(result.comparison.kl_mean, rel=1e-6)
    assert first.memory_bytes > first.file_bytes and all(
        cost.seconds > 0 and cost.disk > first.file_bytes for cost in first.costs.values()
    )


def test_a_prediction_is_corrected_by_the_nearest_outcome(
    planner: Planner, spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPO_CACHE", str(tmp_path))
    assert correction(planner, 0.1) == 1
    for bits, factor in ((4, 2.0), (2, 3.0)):
        linears = tuple(dataclasses.replace(one, terms=(integers(one.in_features, bits, 64),)) for one in spec.linears)
        loss = planner.survey().total_loss(linears)
        assert loss is not None
        record_outcome(planner, dataclasses.replace(spec, linears=linears), factor * loss)
        if loss <= 1:
            assert correction(planner, 1.01 * loss) == pytest.approx(factor)


def test_an_export_that_missed_teaches_the_next_one(
    planner: Planner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the correction was looked up at the KL that was asked for, and the third export repeated the second."""
    monkeypatch.setenv("MPO_CACHE", str(tmp_path))
    asked = Options("auto", target=Target(max_kl=5e-4))
    outcomes = [(0.99 * 5e-4, 1.04), (0.97 * 5e-4, 1.06)]  # expected, and measured over expected
    planned, file = [asked.target.max_kl], outcomes_file(planner)
    assert file is not None
    for count in (1, 2):
        file.write(Cached([[expected, expected * ratio] for expected, ratio in outcomes[:count]]))
        planned.append(within_kl(planner, asked).target.max_kl)
    np.testing.assert_allclose(planned, [5e-4, 5e-4 / 1.04, 5e-4 / 1.06])


def test_max_kl_is_met_by_the_expected_loss(planner: Planner, spec: ModelSpec) -> None:
    sizes = []
    coarse = sum(
        planner.survey().loss(dataclasses.replace(one, terms=(integers(one.in_features, 2, 64),))) or 0.0
        for one in spec.linears
    )
    for most in (coarse / 100, coarse / 10, coarse):
        planned = planner.layers(spec, Options("auto", target=Target(max_kl=most)))
        losses = [planner.survey().loss(linear) for linear in planned]
        assert sum(loss or 0.0 for loss in losses) <= most
        sizes.append(bytes_of(spec, planned))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


def write(path: Path, content: object) -> Path:
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_plan_file_overrides_single_layers(folder: Path, spec: ModelSpec, tmp_path: Path, planner: Planner) -> None:
    path = write(
        tmp_path / "plan.json",
        {
            "version": 1,
            "plan": "int4",
            "layers": [
                {"layer": UP, "terms": [{"kind": "quantized", "bits": 2, "group": 64}, {"kind": "mpo", "chi": 3}]},
                {
                    "match": "layers.0.*q_proj",
                    "terms": [{"kind": "mpo", "chi": 5, "shape": "balanced", "dtype": "f16"}],
                },
                {"layer": EMBEDDING, "terms": [{"kind": "dense"}]},
            ],
        },
    )
    options = plan_options(f"file:{path}", None, 2)
    result = export_folder(folder, tmp_path / "out.mpo", options)
    with MpoFile(result.path) as file:
        file.verify()
        layers = {linear.name: linear for linear in file.spec.linears}
        assert file.spec.provenance.options["file"] == "plan.json"
    assert [term.kind for term in layers[UP].terms] == ["quantized", "mpo"]
    assert layers[UP].terms[0] == Quantized(2, 64, False)
    assert layers["model.layers.0.self_attn.q_proj"].terms[0].bonds == (5,)
    assert layers[EMBEDDING] == spec.linear(EMBEDDING)
    assert layers["model.layers.2.mlp.up_proj"].terms == (integers(64, 4),)
    # Over an allocation: the rest shares what the pinned layers leave.
    target = default_bytes(spec) + 30_000
    mixed = planner.layers(spec, dataclasses.replace(options, plan="auto", target=Target(size=target)))
    assert mixed[0] == spec.linear(EMBEDDING) and 0.97 * target < bytes_of(spec, mixed) <= target


def test_a_saved_plan_is_read_as_it_was(spec: ModelSpec, planner: Planner, tmp_path: Path) -> None:
    planned = planner.layers(spec, Options("auto", target=Target(size=default_bytes(spec))))
    write_plan(tmp_path / "plan.json", planned)
    options = plan_options(f"file:{tmp_path / 'plan.json'}", 32, 2)
    assert planner.layers(spec, options) == planned
    with pytest.raises(
        OutputError, match=r"plan.json: cannot write \(File exists\); give another name with --save-plan"
    ):
        write_plan(tmp_path / "plan.json", planned)
    write_plan(tmp_path / "plan.json", spec.linears, force=True)
    assert read_plan(tmp_path / "plan.json").layers(spec) == {one.name: one for one in spec.linears}


def layer(**changes: object) -> str:
    row = {"layer": UP, "terms": [{"kind": "quantized", "bits": 4}]} | changes
    return json.dumps({"version": 1, "layers": [row]})


BAD_PLANS: dict[str, tuple[str, str]] = {
    "not JSON": ("{", "not valid JSON"),
    "UTF-16": ("{}".encode("utf-16"), "not UTF-8 at byte 0, it is UTF-16; convert it with: iconv"),
    "Latin-1": (b'{"version": "\xe9"}', r"not UTF-8 at byte 13 \(0xE9\); convert it with: iconv"),
    "a list": ("[]", "expected a JSON object, found "),
    "NaN": ('{"version": NaN}', "NaN is not a JSON number"),
    "no version": ("{}", "version: expected 1, found null"),
    "another version": ('{"version": 2}', "version: expected 1, found 2"),
    "unknown key": ('{"version": 1, "layer": []}', "unknown key 'layer'; expected version, plan, chi, cores, layers"),
    "unknown plan": ('{"version": 1, "plan": "best"}', "plan: expected one of auto, paper"),
    "bad chi": ('{"version": 1, "chi": 0}', "chi: expected an integer of at least 1, found 0"),
    "layers no list": ('{"version": 1, "layers": {}}', "layers: expected a list of objects"),
    "unknown layer": (layer(layer="model.layers.9.mlp.up_proj"), "'model.layers.9.mlp.up_proj' is no layer"),
    "a layer twice": (
        json.dumps({"version": 1, "layers": [json.loads(layer())["layers"][0]] * 2}),
        rf"layers\[1\]: {UP} is given twice; keep one entry for each layer",
    ),
    "by name and by match": (
        json.dumps(
            {
                "version": 1,
                "layers": [
                    {"match": "up_proj", "terms": [{"kind": "dense"}]},
                    {"layer": UP, "terms": [{"kind": "dense"}]},
                ],
            }
        ),
        rf"{UP} is given twice",
    ),
    "a JSON key twice": (
        '{"version": 1, "layers": [{"layer": "a", "layer": "b", "terms": []}]}',
        "the key 'layer' is given twice in one object",
    ),
    "the list twice": ('{"version": 1, "layers": [], "layers": []}', "the key 'layers' is given twice"),
    "match nothing": (layer(layer=None, match="nothing"), "match: 'nothing' matches no layer of this model"),
    "match no regex": (layer(layer=None, match="("), "match: not a regular expression"),
    "neither name": (layer(layer=None), "expected a string under one of layer and match"),
    "no terms": (layer(terms=[]), "terms: expected a list of at least one term"),
    "unknown kind": (layer(terms=[{"kind": "magic"}]), "kind: expected one of dense, quantized, mpo, found 'magic'"),
    "unknown term key": (layer(terms=[{"kind": "dense", "bits": 4}]), "unknown key 'bits'; expected kind, dtype"),
    "7 bits": (layer(terms=[{"kind": "quantized", "bits": 7}]), "bits: expected one of 8, 6, 5, 4, 3, 2, found 7"),
    "no bits": (layer(terms=[{"kind": "quantized"}]), "bits: missing"),
    "a group that does not divide": (
        layer(terms=[{"kind": "quantized", "bits": 4, "group": 128}]),
        "group 128 does not divide the 64 inputs",
    ),
    "chi no integer": (layer(terms=[{"kind": "mpo", "chi": 1.5}]), "chi: expected an integer of at least 1, found 1.5"),
    "chi and bonds": (layer(terms=[{"kind": "mpo", "chi": 2, "bonds": [2]}]), "bonds: left out where chi is given"),
    "wrong factors": (
        layer(terms=[{"kind": "mpo", "out_dims": [3, 3], "in_dims": [8, 8], "bonds": [2], "dtype": "f16"}]),
        r"out_dims \[3, 3\] multiply to 9, expected 128",
    ),
    "a bond above full rank": (
        layer(terms=[{"kind": "mpo", "out_dims": [128, 1], "in_dims": [1, 64], "bonds": [65], "dtype": "f16"}]),
        "expected at most the full rank 64, found 65",
    ),
    "dims no integers": (
        layer(terms=[{"kind": "mpo", "out_dims": ["128", 1], "in_dims": [1, 64], "bonds": [2], "dtype": "f16"}]),
        "out_dims: expected an integer of at least 1",
    ),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_a_bad_plan_file_is_named_with_what_is_wrong(spec: ModelSpec, tmp_path: Path, case: str) -> None:
    content, words = BAD_PLANS[case]
    with pytest.raises(PlanError, match=words) as caught:
        read_plan(write(tmp_path / "mine.json", content)).layers(spec)
    assert "mine.json" in str(caught.value)


def test_an_absent_plan_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="none.json: cannot be read .No such file or directory"):
        read_plan(tmp_path / "none.json")
