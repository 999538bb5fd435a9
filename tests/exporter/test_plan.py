"""The named plans: which terms each layer gets, on models of any size."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_exporter.fit.shapes import parameters
from mpo_exporter.plan import CORE_SHARE, EMBEDDING_BITS, PLANS, Options, plan_layers
from mpo_formats import Dense, LinearSpec, ModelSpec, Mpo, PlanError, Quantized, Term
from mpo_formats.architecture import EMBEDDING, HEAD, full_rank
from tests.formats import tiny

BF16 = Dense("dense", "bf16")
INT4 = Quantized("quantized", 4, 32, False)


def dense_model(
    hidden: int = 64, inner: int = 128, blocks: int = 8, dtype: str = "bf16", tied: bool = False
) -> ModelSpec:
    """A model as the checkpoint reader describes it: every layer dense."""
    changes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": blocks, "head_dim": hidden // 2,
               "vocab_size": 96, "tie_word_embeddings": tied}  # fmt: skip
    spec = tiny.model({}, **changes)
    terms: tuple[Term, ...] = (Dense("dense", dtype),)
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
    assert small.terms == (Quantized("quantized", 4, 16, False),)


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
    hidden=st.sampled_from([16, 64, 72, 100]), inner=st.sampled_from([128, 172, 96, 101]), cores=st.integers(2, 4),
    chi=st.integers(1, 64),
)  # fmt: skip
def test_auto_corrects_int4_with_few_small_cores(hidden: int, inner: int, cores: int, chi: int) -> None:
    """At most χ, at most their share of a matrix's parameters, and none where nothing was rounded."""
    layers = planned(dense_model(hidden, inner, blocks=1), plan="auto", cores=cores, chi=chi)
    for name, layer in layers.items():
        base, *correction = layer.terms
        if name in (EMBEDDING, HEAD):
            assert base == (BF16 if hidden % 16 else Quantized("quantized", EMBEDDING_BITS, base.group, False))
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


def test_auto_uses_the_room_that_it_has() -> None:
    """A large matrix takes χ whole, in int8; a small one as many bonds as fit."""
    layers = planned(dense_model(hidden=256, inner=256, blocks=1), plan="auto", chi=4)
    assert layers["model.layers.0.mlp.up_proj"].terms == (INT4, Mpo("mpo", (256, 1), (1, 256), (4,), "int8", 64))
    (_, most) = planned(dense_model(hidden=256, inner=256, blocks=1), plan="auto", chi=99)[
        "model.layers.0.mlp.up_proj"
    ].terms
    assert isinstance(most, Mpo) and most.bonds == (256 * 256 // 16 // 512,)


def test_a_tied_model_has_no_head() -> None:
    for plan in PLANS:
        assert HEAD not in planned(dense_model(tied=True), plan=plan)
        assert HEAD in planned(dense_model(tied=False), plan=plan)


@pytest.mark.parametrize(("options", "words"), [
    ({"plan": "best"}, "--plan best: expected one of auto, paper, int4, dense"),
    ({"chi": 0}, "--chi 0: the bond dimension must be at least 1"),
    ({"chi": -1}, "--chi -1: the bond dimension must be at least 1"),
    ({"cores": 1}, "--cores 1: expected 2 to 8"),
    ({"cores": 9}, "--cores 9: expected 2 to 8"),
])  # fmt: skip
def test_options_that_cannot_be_honoured(options: dict[str, object], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Options(**options)
