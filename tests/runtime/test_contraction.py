"""MPO contraction: every order against a float64 sum over all bonds, the cost model against a count of its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mpo_formats import Mpo, MpoFile
from mpo_formats.architecture import full_rank
from mpo_formats.reference import matrix
from mpo_runtime.layers import linear
from mpo_runtime.layers.contraction import Order, choose_order, densify_cost, densify_from, sweep_cost
from mpo_runtime.layers.linear import MpoTerm, load_linear
from tests.formats import tiny

ORDERS: tuple[Order, ...] = ("left", "right", "densify")


@st.composite
def operators(draw: st.DrawFn) -> Mpo:
    """An operator of 2 to 4 cores with any factors, 1 included."""
    count = draw(st.integers(2, 4))
    factors = st.lists(st.integers(1, 3), min_size=count, max_size=count)
    out_dims, in_dims = tuple(draw(factors)), tuple(draw(factors))
    bonds = tuple(draw(st.integers(1, most)) for most in full_rank(out_dims, in_dims))
    return Mpo(out_dims, in_dims, bonds, "f32", 0)


def random_term(spec: Mpo) -> MpoTerm:
    source = np.random.default_rng(1)
    stored = (source.standard_normal(shape) for shape in spec.core_shapes())
    return MpoTerm(spec, [torch.from_numpy(core.transpose(1, 2, 3, 0).copy()) for core in stored])


def defined_matrix(term: MpoTerm) -> NDArray[np.float64]:
    """W[(o_1 …), (i_1 …)] = Σ_α Π_k G_k, entry by entry, as the format defines it."""
    cores = [core.numpy() for core in term.cores]
    rows = list(itertools.product(*(range(size) for size in term.spec.out_dims)))
    columns = list(itertools.product(*(range(size) for size in term.spec.in_dims)))
    result = np.empty((len(rows), len(columns)))
    for (row, outs), (column, ins) in itertools.product(enumerate(rows), enumerate(columns)):
        product = np.ones((1, 1))
        for core, out, inner in zip(cores, outs, ins, strict=True):
            product = product @ core[:, out, inner]
        result[row, column] = product[0, 0]
    return result


@given(spec=operators(), rows=st.integers(1, 5))
def test_every_order_equals_the_definition(spec: Mpo, rows: int) -> None:
    term = random_term(spec)
    expected = defined_matrix(term)
    x = np.random.default_rng(2).standard_normal((rows, math.prod(spec.in_dims)))
    np.testing.assert_allclose(term.weight().numpy(), expected, atol=1e-10)
    chosen = {}
    for order in ORDERS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear, "choose_order", lambda spec, rows, order=order: order)
            chosen[order] = term.apply(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(chosen[order], x @ expected.T, atol=1e-10, err_msg=order)
    np.testing.assert_array_equal(term.apply(torch.from_numpy(x)).numpy(), chosen[choose_order(spec, rows)])
    ids = np.random.default_rng(3).integers(0, expected.shape[0], 7)
    np.testing.assert_allclose(term.rows(torch.from_numpy(ids)).numpy(), expected[ids], atol=1e-10)


def contraction_cost(parts: Sequence[dict[str, int]]) -> int:
    """Multiply-adds of contracting tensors pairwise in the given order, each a mapping of index name to size.

    A pair costs the product of all its indices; those that both have are summed, which is right here because no index
    occurs in three tensors.
    """
    state, total = dict(parts[0]), 0
    for part in parts[1:]:
        total += math.prod((state | part).values())
        state = {name: size for name, size in (state | part).items() if (name in state) != (name in part)}
    return total


def named_indices(spec: Mpo, rows: int) -> tuple[dict[str, int], list[dict[str, int]]]:
    """The indices of the activations and of each core."""
    bonds = (1, *spec.bonds, 1)
    x = {"t": rows, **{f"i{k}": size for k, size in enumerate(spec.in_dims)}}
    cores = [
        {f"a{k}": bonds[k], f"o{k}": spec.out_dims[k], f"i{k}": spec.in_dims[k], f"a{k + 1}": bonds[k + 1]}
        for k in range(len(spec.out_dims))
    ]
    return x, cores


@given(spec=operators(), rows=st.sampled_from([1, 2, 7, 300]))
def test_the_cheapest_order_is_chosen(spec: Mpo, rows: int) -> None:
    x, cores = named_indices(spec, rows)
    start = {"a0": 1}  # the unit tensor that the matrix is built from
    size = math.prod(spec.out_dims) * math.prod(spec.in_dims)
    counted = {
        "left": contraction_cost([x, *cores]),
        "right": contraction_cost([x, *reversed(cores)]),
        "densify": contraction_cost([start, *cores]) + rows * size,
    }
    costs = {
        "left": sweep_cost(spec, rows, reverse=False),
        "right": sweep_cost(spec, rows, reverse=True),
        "densify": densify_cost(spec, rows),
    }
    assert costs == counted
    assert costs[choose_order(spec, rows)] == min(counted.values())


def test_each_order_is_cheapest_somewhere() -> None:
    low_rank = Mpo((64, 1), (1, 64), (4,), "f32", 0)
    assert choose_order(low_rank, 1) == "right"
    assert choose_order(Mpo((1, 64), (64, 1), (4,), "f32", 0), 1) == "left"
    assert choose_order(Mpo((8, 8), (8, 8), (64,), "f32", 0), 1000) == "densify"


@pytest.mark.parametrize("chi", [None, 1, 3, 100])
@pytest.mark.parametrize("held", [True, False])
def test_a_loaded_layer_equals_the_format_s_reference(tmp_path: Path, chi: int | None, held: bool) -> None:
    """Every kind of term, whole and cut to a prefix of its bonds: the matrix, its rows, and its product."""
    spec = tiny.model(attention_bias=True)
    tiny.write(tmp_path / "tiny.mpo", spec)
    with MpoFile(tmp_path / "tiny.mpo") as file:
        for layer in file.spec.linears:
            loaded = load_linear(file, layer, chi=chi, held=held, device=torch.device("cpu"))
            expected = matrix(file, layer, chi)
            scale = np.abs(expected).max()
            np.testing.assert_allclose(loaded.weight().numpy() / scale, expected / scale, atol=1e-5, err_msg=layer.name)
            ids = torch.tensor([[1, 0], [layer.out_features - 1, 1]])
            np.testing.assert_allclose(loaded.rows(ids).numpy() / scale, expected[ids] / scale, atol=1e-5)
            x = np.random.default_rng(0).standard_normal((2, 3, layer.in_features)).astype(np.float32)
            bias = file.array(f"{layer.name}.bias") if layer.bias else 0
            y = loaded.apply(torch.from_numpy(x)).numpy()
            np.testing.assert_allclose((y - bias) / scale, x @ expected.T / scale, atol=1e-4, err_msg=layer.name)


@given(operators())
def test_from_how_many_rows_on_the_matrix_is_built(term: Mpo) -> None:
    first = densify_from(term)
    rows = [1, 2, 3, 10, 10**9] if first == 0 else [first, first + 1, 10 * first]
    assert {choose_order(term, count) == "densify" for count in rows} == {first > 0}
    if first > 1:
        assert choose_order(term, first - 1) != "densify"
