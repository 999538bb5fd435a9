"""The named plans: which terms each layer gets, on models of any size."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_exporter.cli.export import print_cut_bonds
from mpo_exporter.fit.shapes import parameters
from mpo_exporter.plan.file import PlanFile
from mpo_exporter.plan.named import CORE_SHARE, EMBEDDING_BITS, PLANS, plan_layers
from mpo_exporter.plan.options import Choice, KeyOptions, Options, Target
from mpo_formats import ConfigError, Dense, LinearSpec, ModelSpec, Mpo, PlanError, Quantized, Term
from mpo_formats.architecture import EMBEDDING, HEAD, full_rank
from tests.formats import tiny

BF16 = Dense("bf16")
INT4 = Quantized(4, 32, False)


def dense_model(
    hidden: int = 64, inner: int = 128, blocks: int = 8, dtype: str = "bf16", tied: bool = False
) -> ModelSpec:
    """A model as the checkpoint reader describes it: every layer dense."""
    changes = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "head_dim": hidden // 2,
        "vocab_size": 96,
        "tie_word_embeddings": tied,
    }
    spec = tiny.model({}, **changes)
    terms: tuple[Term, ...] = (Dense(dtype),)
    return dataclasses.replace(spec, linears=tuple(dataclasses.replace(row, terms=terms) for row in spec.linears))


def planned(source: ModelSpec, **options: object) -> dict[str, LinearSpec]:
    return {linear.name: linear for linear in plan_layers(source, Options(**options))}


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_dense_keeps_the_stored_type(dtype: str) -> None:
    source = dense_model(dtype=dtype)
    assert plan_layers(source, Options("dense")) == source.linears


def test_int4_rounds_everything_that_a_group_divides() -> None:
    layers = planned(dense_model(), plan="int4")
    assert {layer.terms for layer in layers.values()} == {(INT4,)}
    odd = planned(dense_model(inner=172), plan="int4")
    assert {name for name, layer in odd.items() if layer.terms == (BF16,)} == {
        f"model.layers.{block}.mlp.down_proj" for block in range(8)
    }
    small = planned(dense_model(inner=48), plan="int4")["model.layers.0.mlp.down_proj"]
    assert small.terms == (Quantized(4, 16, False),)


def test_paper_spares_early_blocks_and_the_last_mlp() -> None:
    layers = planned(dense_model(blocks=8), plan="paper", chi=5)
    whole = {name for name, layer in layers.items() if layer.terms == (INT4,)}
    cores = {name for name, layer in layers.items() if isinstance(layer.terms[0], Mpo)}
    assert whole | cores == set(layers)
    early = {name for name in layers if name.startswith(("model.layers.0.", "model.layers.1."))}
    last = {f"model.layers.7.mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert whole == early | last | {EMBEDDING, HEAD}
    for name in cores:
        (term,) = layers[name].terms
        assert isinstance(term, Mpo) and term.bonds == (5,) and term.dtype == "f16"


@pytest.mark.parametrize(("blocks", "spared"), [(1, {0}), (2, {0}), (4, {0}), (5, {0, 1}), (9, {0, 1, 2})])
def test_paper_spares_a_quarter_of_the_blocks_rounded_up(blocks: int, spared: set[int]) -> None:
    layers = planned(dense_model(blocks=blocks), plan="paper")
    found = {block for block in range(blocks) if layers[f"model.layers.{block}.self_attn.q_proj"].terms == (INT4,)}
    assert found == spared


@given(cores=st.integers(2, 5), chi=st.integers(1, 200))
def test_paper_cores_have_bonds_of_chi_or_full_rank(cores: int, chi: int) -> None:
    for layer in planned(dense_model(inner=172), plan="paper", cores=cores, chi=chi).values():
        for term in layer.terms:
            if isinstance(term, Mpo):
                assert len(term.out_dims) == cores
                assert term.bonds == tuple(min(chi, most) for most in full_rank(term.out_dims, term.in_dims))


@given(
    hidden=st.sampled_from([16, 64, 72, 100]),
    inner=st.sampled_from([128, 172, 96, 101]),
    cores=st.integers(2, 4),
    chi=st.integers(1, 64),
)
def test_corrected_has_few_small_cores_beside_int4(hidden: int, inner: int, cores: int, chi: int) -> None:
    """At most χ, at most their share of a matrix's parameters, and none where nothing was rounded."""
    layers = planned(dense_model(hidden, inner, blocks=1), plan="corrected", cores=cores, chi=chi)
    for name, layer in layers.items():
        base, *correction = layer.terms
        if name in (EMBEDDING, HEAD):
            assert base == (BF16 if hidden % 16 else Quantized(EMBEDDING_BITS, base.group, False))
            assert not correction
        elif isinstance(base, Dense):
            assert base == BF16 and layer.in_features % 16
            assert not correction
        else:
            assert base.kind == "quantized" and base.bits == 4
            for term in correction:
                assert isinstance(term, Mpo) and len(term.out_dims) == cores
                assert max(term.bonds) <= chi
                size = parameters(term.out_dims, term.in_dims, term.bonds)
                assert size == sum(math.prod(shape) for shape in term.core_shapes())
                assert size <= CORE_SHARE * layer.out_features * layer.in_features


def test_corrected_uses_the_room_that_it_has() -> None:
    """A large matrix takes χ whole, in int8; a small one as many bonds as fit."""
    layers = planned(dense_model(hidden=256, inner=256, blocks=1), plan="corrected", chi=4)
    assert layers["model.layers.0.mlp.up_proj"].terms == (INT4, Mpo((256, 1), (1, 256), (4,), "int8", 64))
    (_, most) = planned(dense_model(hidden=256, inner=256, blocks=1), plan="corrected", chi=99)[
        "model.layers.0.mlp.up_proj"
    ].terms
    assert isinstance(most, Mpo) and most.bonds == (256 * 256 // 16 // 512,)


@pytest.mark.parametrize("cores", [2, 3])
def test_without_text_auto_gives_every_matrix_the_cores_that_are_demanded(cores: int) -> None:
    for name, layer in planned(dense_model(inner=172, blocks=1), plan="auto", chi=40, cores=cores).items():
        _, *rest = layer.terms
        bare = name in (EMBEDDING, HEAD) or layer.in_features == 172  # no group of integers divides 172
        assert [term.kind for term in rest] == ([] if bare else ["mpo"])
        for term in rest:
            assert isinstance(term, Mpo) and len(term.out_dims) == cores
            assert term.bonds == tuple(min(40, most) for most in full_rank(term.out_dims, term.in_dims))
    undemanded = plan_layers(dense_model(), Options("auto"))
    assert undemanded == plan_layers(dense_model(), Options("corrected", chi=32))


def test_a_tied_model_has_no_head() -> None:
    for plan in PLANS:
        keys = KeyOptions(min_dim=16)
        assert HEAD not in planned(dense_model(tied=True), plan=plan, keys=keys)
        assert HEAD in planned(dense_model(tied=False), plan=plan, keys=keys)


def key_ranks(layers: dict[str, LinearSpec]) -> list[int]:
    return [
        term.bonds[0]
        for name, layer in layers.items()
        for term in layer.terms
        if isinstance(term, Mpo) and name.endswith("k_proj")
    ]


def test_k_proj_replaces_key_projections_alone_and_spares_boundary_blocks() -> None:
    source = dense_model(hidden=256, inner=512, blocks=4)
    layers = planned(source, plan="k-proj", keys=KeyOptions(rank=24))
    rows, columns = layers["model.layers.0.self_attn.k_proj"].out_features, 256
    assert key_ranks(layers) == [36, 24, 24, 36]
    for name, layer in layers.items():
        if name.endswith("k_proj"):
            [term] = layer.terms
            assert isinstance(term, Mpo) and term.dtype == "int8" and term.out_dims == (rows, 1)
            assert parameters(term.out_dims, term.in_dims, term.bonds) < rows * columns
        else:
            assert layer.terms == (BF16,)


@given(hidden=st.sampled_from([64, 128, 256]), rank=st.integers(1, 400), bits=st.sampled_from([4, 8, 16]))
def test_factors_of_key_projections_always_save(hidden: int, rank: int, bits: int) -> None:
    layers = planned(dense_model(hidden=hidden, blocks=3), plan="k-proj", keys=KeyOptions(rank, bits, min_dim=16))
    for ranks, layer in zip(key_ranks(layers), [one for name, one in layers.items() if "k_proj" in name], strict=True):
        assert ranks >= 1 and ranks * (layer.out_features + layer.in_features) < layer.out_features * layer.in_features
        assert layer.terms[0].dtype == {4: "int4", 8: "int8", 16: "f16"}[bits]


def test_k_proj_without_a_matrix_to_replace_is_refused() -> None:
    with pytest.raises(
        PlanError, match="no key projection .* of at least --min-dim 65 .the largest smaller side is 32"
    ):
        planned(dense_model(), plan="k-proj", keys=KeyOptions(min_dim=65))
    with pytest.raises(PlanError, match="the largest smaller side is 0"):
        planned(dense_model(), plan="k-proj", choice=Choice(pattern="q_proj"), keys=KeyOptions(min_dim=1))


@pytest.mark.parametrize("plan", ["int4", "corrected", "auto"])
def test_a_pattern_leaves_other_layers_as_they_are(plan: str) -> None:
    layers = planned(dense_model(blocks=3), plan=plan, choice=Choice(pattern=r"layers\.1\..*(up|down)_proj$"))
    changed = {name for name, layer in layers.items() if layer.terms != (BF16,)}
    assert changed == {"model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"}


def test_a_pattern_takes_the_place_of_what_paper_spares() -> None:
    layers = planned(dense_model(), plan="paper", chi=3, choice=Choice(pattern="layers.0.*q_proj|embed"))
    cores = {name for name, layer in layers.items() if isinstance(layer.terms[0], Mpo)}
    assert cores == {"model.layers.0.self_attn.q_proj"}
    assert layers["model.layers.5.mlp.up_proj"].terms == (INT4,)


def test_pinned_layers_keep_their_terms_in_every_plan() -> None:
    def pins(name: str) -> PlanFile:
        terms = [{"kind": "quantized", "bits": 2, "group": 64, "zeros": True}]
        return PlanFile(Path("mine"), "int4", None, None, ({"layer": name, "terms": terms},))

    for plan in PLANS:
        layers = planned(dense_model(), plan=plan, keys=KeyOptions(min_dim=16), file=pins(EMBEDDING))
        assert layers[EMBEDDING].terms == (Quantized(2, 64, True),)
    with pytest.raises(PlanError, match=r"mine: layers\[0\]: 'other' is no layer of this model"):
        planned(dense_model(), plan="int4", file=pins("other"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"plan": "best"},
            "--plan best: expected one of auto, paper, k-proj, corrected, int4, dense, or file:PLAN.json",
        ),
        ({"chi": 0}, "--chi 0: the bond dimension must be at least 1"),
        ({"chi": -1}, "--chi -1: the bond dimension must be at least 1"),
        ({"cores": 1}, "--cores 1: expected 2 to 8"),
        ({"cores": 9}, "--cores 9: expected 2 to 8"),
        ({"plan": "int4", "target": Target(max_kl=0.1)}, "--max-kl: expected the plan auto, found int4"),
        ({"plan": "paper", "target": Target(ratio=0.1)}, "--target-ratio: expected the plan auto, found paper"),
        ({"plan": "paper", "for_speed": True}, "--for-speed: expected the plan auto, found paper"),
        ({"choice": Choice(top_k=3)}, "expected the plan paper, k-proj, corrected, int4, found auto"),
        ({"plan": "dense", "choice": Choice(share=0.5)}, "expected the plan paper, k-proj, corrected, int4, found"),
    ],
)
def test_options_that_cannot_be_honoured_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Options(**options)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"sensitivity": "exact"}, "--sensitivity exact: expected one of fast, full"),
        ({"pattern": "("}, r"--layers \(: not a regular expression"),
        ({"top_k": 0}, "--top-k 0: expected at least 1"),
        ({"share": 1.5}, "--compression-ratio 1.5: expected more than 0 and at most 1"),
        ({"share": 0.5, "top_k": 1}, "--top-k and --compression-ratio: give one of them"),
    ],
)
def test_choices_of_layers_that_cannot_be_honoured(choice: dict[str, object], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Choice(**choice)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"size": 0}, "--target-size 0: expected at least 1 byte"),
        ({"bits_per_weight": float("inf")}, "--target-bpw inf: expected more than 0 and at most 32"),
        ({"bits_per_weight": float("nan")}, "--target-bpw nan: expected more than 0"),
        ({"bits_per_weight": 33.0}, "--target-bpw 33: expected more than 0"),
        ({"ratio": 1.5}, "--target-ratio 1.5: expected more than 0 and at most 1"),
        ({"max_kl": -1.0}, "--max-kl -1: expected more than 0"),
        ({"max_kl": 0.1, "size": 5}, "--target-size and --max-kl: give one of them"),
    ],
)
def test_targets_that_cannot_be_honoured(target: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Target(**target)


def test_targets_in_bytes() -> None:
    spec = dense_model()
    assert Target(size=10**6).bytes_of(spec) == 10**6
    assert Target(bits_per_weight=3.0).bytes_of(spec) == int(3 * spec.architecture.parameters() / 8)
    dense = sum(2 * linear.out_features * linear.in_features for linear in spec.linears)
    assert Target(ratio=0.5).bytes_of(spec) == pytest.approx(dense / 2, rel=0.02)  # norms aside
    assert Target().bytes_of(spec) is None and Target(max_kl=0.1).bytes_of(spec) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "--rank 0"),
        ({"bits": 5}, "--quant-bits 5: expected one of 4, 8, 16"),
        ({"min_dim": 0}, "--min-dim 0"),
    ],
)
def test_key_options_that_cannot_be_honoured(options: dict[str, object], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        KeyOptions(**options)


def test_a_pattern_that_matches_nothing_names_an_example() -> None:
    with pytest.raises(
        PlanError, match="--layers nothing: matches no layer of this model, whose names are like model."
    ):
        planned(dense_model(), plan="int4", choice=Choice(pattern="nothing"))


def test_only_what_was_given_is_recorded() -> None:
    spec = dense_model()
    assert Options("paper", chi=4).recorded(spec) == {"plan": "paper", "chi": "4", "cores": "2"}
    demanding = {"plan": "auto", "chi": "4", "cores": "2", "cored": "every matrix"}
    assert Options("auto", chi=4).recorded(spec) == demanding
    found = Options("auto", target=Target(max_kl=0.05), for_speed=True, choice=Choice(pattern="mlp")).recorded(spec)
    assert found == {
        "plan": "auto",
        "chi": "32",
        "cores": "2",
        "max_kl": "0.05",
        "for_speed": "True",
        "pattern": "mlp",
    }
    assert Options("auto", target=Target(bits_per_weight=3.0)).recorded(spec)["target_bytes"] == str(
        Target(bits_per_weight=3.0).bytes_of(spec)
    )
    assert Options("k-proj", keys=KeyOptions(rank=7)).recorded(spec)["keys.rank"] == "7"


def test_a_chi_far_above_the_full_rank_is_planned_at_once() -> None:
    source = dense_model(hidden=64, inner=128)
    corrected = plan_layers(source, Options("corrected", chi=10**12))
    assert corrected == plan_layers(source, Options("corrected", chi=64))


def test_a_layer_that_no_group_divides_keeps_its_two_bytes() -> None:
    source = dense_model(hidden=76, inner=131)
    narrow = dataclasses.replace(
        source, linears=tuple(dataclasses.replace(linear, terms=(Dense("f16"),)) for linear in source.linears)
    )
    for plan in ("int4", "corrected"):
        assert {linear.terms for linear in plan_layers(narrow, Options(plan))} == {(Dense("f16"),)}


def test_a_chi_above_the_full_rank_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    source = dense_model(hidden=64, inner=128)
    for chi, words in ((10_000, "χ of 10,000 is above the full rank of"), (2, "")):
        options = Options("paper", chi=chi)
        print_cut_bonds(dataclasses.replace(source, linears=plan_layers(source, options)), options)
        assert words in (said := capsys.readouterr().out) and bool(said) == bool(words)
