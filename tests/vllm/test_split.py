"""Shares of a layer for tensor parallelism: put together they are the layer, in one process and in two that talk by gloo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, multiprocessing

from mpo_formats import ConfigError, Dense, LinearSpec, Mpo, Quantized, Term, Transform
from mpo_formats.layout import linear_tensors, transform_tensors
from mpo_runtime.layers.linear import load_linear
from mpo_runtime.weights.protocol import Weights
from mpo_vllm.products import NativeProduct, Product, TorchProduct
from mpo_vllm.split import Axis, Layer, share
from tests.formats.tiny import values
from tests.runtime.native_cases import layers, needs_native

CPU = torch.device("cpu")
# [out, in] = [96, 64] in every form; cores are cut in the first factor, in the second, and below their full rank.
CASES: dict[str, tuple[Term, ...]] = {
    "integers of 4 bits": (Quantized(4, 32, False),),
    "3 bits with zeros": (Quantized(3, 16, True),),
    "dense": (Dense("bf16"),),
    "low rank": (Mpo((96, 1), (1, 64), (5,), "f16", 0),),
    "cores": (Mpo((8, 12), (8, 8), (6,), "bf16", 0),),
    "integer cores": (Mpo((8, 12), (8, 8), (6,), "int8", 32),),
    "second factor": (Mpo((1, 96), (1, 64), (1,), "f32", 0),),
    "three cores": (Mpo((4, 6, 4), (2, 8, 4), (7, 5), "f16", 0),),
    "full rank": (Mpo((96, 1), (1, 64), (64,), "f32", 0),),
    "integers and cores": (Quantized(6, 16, False), Mpo((8, 12), (8, 8), (3,), "int4", 16)),
}


def layer(terms: tuple[Term, ...], rows: int = 96, columns: int = 64) -> Layer:
    """A layer with random tensors."""
    spec = LinearSpec("model.layers.0.mlp.up_proj", rows, columns, None, terms)
    return Layer(spec, {tensor.name: values(tensor, 3) for tensor in linear_tensors(spec)})


def matrix(one: Layer) -> Tensor:
    """The matrix of a layer by the reference backend."""
    return load_linear(cast(Weights, one), one.spec, chi=None, held=False, device=CPU).weight()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("case", CASES)
def test_shares_put_together_are_the_layer(case: str, axis: Axis, ranks: int) -> None:
    whole = layer(CASES[case])
    size = (96 if axis == "rows" else 64) // ranks
    if case == "3 bits with zeros" and axis == "columns":
        assert size % 16 == 0
    parts = []
    for rank in range(ranks):
        if axis == "columns" and case == "integers of 4 bits" and ranks == 4:
            with pytest.raises(ConfigError, match=r"up_proj: columns \d+ to \d+ cut through a group of 32"):
                share(whole, axis, rank * size, (rank + 1) * size)
            return
        parts.append(matrix(share(whole, axis, rank * size, (rank + 1) * size)))
    found = torch.cat(parts, dim=0 if axis == "rows" else 1)
    torch.testing.assert_close(found, matrix(whole), rtol=1e-4, atol=1e-4 * float(matrix(whole).abs().max()))


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_shares_of_a_transformed_layer_hold_whole_blocks(axis: Axis) -> None:
    whole = layer((Quantized(4, 16, False), Mpo((96, 1), (1, 64), (3,), "f16", 0)))
    whole = replace(whole, spec=replace(whole.spec, hadamard=32))
    half = 48 if axis == "rows" else 32
    parts = [share(whole, axis, start, start + half) for start in (0, half)]
    found = torch.cat([matrix(part) for part in parts], dim=0 if axis == "rows" else 1)
    torch.testing.assert_close(found, matrix(whole), rtol=1e-4, atol=1e-4 * float(matrix(whole).abs().max()))
    x = torch.randn(3, parts[0].spec.in_features)
    torch.testing.assert_close(TorchProduct(parts[0], CPU).apply(x), x @ matrix(parts[0]).T, rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="cut through a transform of 32 inputs"):
        share(whole, "columns", 16, 32)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_shares_of_a_layer_with_a_stored_transform_hold_whole_blocks(axis: Axis, count: int) -> None:
    plain = layer((Quantized(4, 16, False),))
    stored = Transform(plain.spec.name, 16, count, Quantized(8, 16, False))
    turned = {tensor.name: values(tensor, 3) for tensor in transform_tensors(stored)}
    whole = Layer(replace(plain.spec, transform=stored), {**plain.arrays, **turned})
    half = 48 if axis == "rows" else 32
    parts = [share(whole, axis, start, start + half) for start in (0, half)]
    found = torch.cat([matrix(part) for part in parts], dim=0 if axis == "rows" else 1)
    torch.testing.assert_close(found, matrix(whole), rtol=1e-4, atol=1e-4 * float(matrix(whole).abs().max()))
    x = torch.randn(3, parts[0].spec.in_features)
    expected = x @ matrix(parts[0]).T
    size = float(expected.abs().max())
    torch.testing.assert_close(TorchProduct(parts[0], CPU).apply(x), expected, rtol=1e-3, atol=1e-5 * size)
    with pytest.raises(ConfigError, match="cut through a transform of 16 inputs"):
        share(whole, "columns", 8, 32)


def test_a_share_of_low_rank_becomes_a_matrix() -> None:
    whole = layer(CASES["full rank"])
    assert share(whole, "rows", 0, 48).spec.terms == (Dense("f32"),)
    assert share(whole, "rows", 0, 96).spec.terms == whole.spec.terms


def test_a_share_that_is_no_range_of_the_factors_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"0 to 48 is no range of the factors \[3, 32\] of its cores; use fewer ranks"
    ):
        share(layer((Mpo((3, 32), (8, 8), (6,), "f32", 0),)), "rows", 0, 48)


@settings(max_examples=60, deadline=None)
@given(layers(), st.data())
def test_torch_gives_the_products_of_the_reference(held: Any, data: st.DataObject) -> None:
    spec = held.spec.linear("model.layers.0.mlp.gate_proj")
    tensors = [*(transform_tensors(spec.transform) if spec.transform else ()), *linear_tensors(spec)]
    one = Layer(spec, {tensor.name: held.values[tensor.name] for tensor in tensors})
    reference = load_linear(held, spec, chi=None, held=False, device=CPU)
    x = torch.tensor(np.random.default_rng(data.draw(st.integers(0, 9))).standard_normal((3, spec.in_features))).float()
    found = TorchProduct(one, CPU)
    plain = matrix(one)
    torch.testing.assert_close(found.apply(x), x @ plain.T, rtol=1e-3, atol=1e-3 * float((x @ plain.T).abs().max()))
    ids = torch.tensor([0, spec.out_features - 1, 1])
    torch.testing.assert_close(found.rows(ids, torch.float32), reference.rows(ids), rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.parametrize("case", CASES)
def test_native_gives_the_products_of_torch(case: str) -> None:
    whole = layer(CASES[case])
    native: Product = NativeProduct(whole, exact=True)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    expected = TorchProduct(whole, CPU).apply(x)
    torch.testing.assert_close(native.apply(x), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert native.apply(x.bfloat16()).dtype == torch.bfloat16
    ids = torch.tensor([95, 0])
    torch.testing.assert_close(native.rows(ids, torch.float32), matrix(whole)[ids], rtol=1e-3, atol=1e-3)


def rank_of_two(rank: int, folder: str) -> None:
    """One of two processes: a gated MLP with rows, then columns, cut; the sum over both is the unsplit one's output."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    for case, terms in CASES.items():
        up, down = layer(terms), layer((Quantized(4, 16, False), Mpo((8, 8), (12, 8), (4,), "f16", 0)), 64, 96)
        hidden = TorchProduct(share(up, "rows", 48 * rank, 48 * (rank + 1)), CPU).apply(x)
        y = TorchProduct(share(down, "columns", 48 * rank, 48 * (rank + 1)), CPU).apply(torch.tanh(hidden))
        distributed.all_reduce(y)
        expected = TorchProduct(down, CPU).apply(torch.tanh(TorchProduct(up, CPU).apply(x)))
        if not torch.allclose(y, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise ValueError(f"{case}: rank {rank} differs by {float((y - expected).abs().max())}")
        if rank == 0:
            (Path(folder) / "done.txt").open("a").write(case + "\n")
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    multiprocessing.spawn(rank_of_two, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "done.txt").read_text().splitlines() == list(CASES)
