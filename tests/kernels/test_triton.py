"""The GPU backend against the reference, in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'mpo-runtime[gpu]'")

from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_formats import Quantized
from mpo_formats.layout import PLANES
from mpo_runtime.backends.ops import PAGE, Span
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.backends.triton import Tile, TritonOps
from mpo_runtime.models.registry import decoder_for
from tests.formats.tiny import GATE, arrays, model
from tests.runtime.native_cases import Held, layer, layers

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def both(weights: Held, **options: Any) -> tuple[TritonOps, ReferenceOps]:
    """The two backends over the same weights."""
    chi = options.pop("chi", None)
    ours = TritonOps(weights, device=DEVICE, kv_type="f32", chi=chi, **options)
    return ours, ReferenceOps(weights, held=True, chi=chi)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Equal up to a share of the largest value."""
    assert found.shape == expected.shape
    assert float((found.cpu() - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("bits", sorted(PLANES))
@pytest.mark.parametrize(("group", "zeros"), [(16, False), (64, True)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_products_with_integers(bits: int, group: int, zeros: bool, tokens: int) -> None:
    weights = layer((Quantized(bits, group, zeros),), 20, 192, False, bits)
    x = normal(1, tokens, 192, seed=bits)
    # Triton's interpreter multiplies the bits of bf16 as if they were integers: that path needs a GPU.
    ways = ((True, 1e-5), (False, 1e-5 if tokens == 1 else 2e-2)) if DEVICE == "cuda" else ((True, 1e-5),)
    for exact, tolerance in ways:
        ours, reference = both(weights, exact=exact)
        expected = reference.linear(reference.weights(GATE), x)
        assert_near(ours.linear(ours.weights(GATE), x.to(DEVICE)), expected, tolerance)


@given(weights=layers(), tokens=st.sampled_from([1, 2, 7]), chi=st.none() | st.integers(1, 6))
@settings(max_examples=10)
def test_layers_of_any_terms(weights: Held, tokens: int, chi: int | None) -> None:
    ours, reference = both(weights, chi=chi, exact=True)
    inner = weights.spec.linear(GATE).in_features
    x, ids = normal(1, tokens, inner, seed=tokens), torch.arange(tokens) * 3
    parts = [term.weight() for term in reference.weights(GATE).terms]
    # Terms may cancel, so errors are measured against what they add up.
    size = sum(float(part.norm()) for part in parts) * float(x.norm()) / inner**0.5
    expected = reference.linear(reference.weights(GATE), x)
    assert float((ours.linear(ours.weights(GATE), x.to(DEVICE)).cpu() - expected).norm()) <= 1e-5 * size
    rows = reference.embed(reference.weights(GATE), ids, 2.0)
    largest = 2 * sum(float(part.abs().max()) for part in parts)
    assert float((ours.embed(ours.weights(GATE), ids.to(DEVICE), 2.0).cpu() - rows).abs().max()) <= 1e-5 * largest


@pytest.mark.parametrize("shape", [(1, 1, 32), (2, 3, 96), (1, 5, 300)])
def test_norms_and_gates(shape: tuple[int, ...]) -> None:
    ours, reference = both(Held(spec := model(), arrays(spec, 1)))
    x, y, weight = normal(*shape, seed=1), normal(*shape, seed=2), normal(shape[-1], seed=3)
    found = ours.rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5)
    assert_near(found, reference.rms_norm(x, weight, 1e-5), 1e-6)
    assert_near(ours.swiglu(x.to(DEVICE), y.to(DEVICE)), reference.swiglu(x, y), 1e-6)


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("size", [8, 24])
def test_steps_of_several_sequences(window: int, size: int) -> None:
    """Prompts, single tokens and drafts of three sequences, which are in pages out of order."""
    changes: dict[str, Any] = {
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": size,
    }
    spec = model({}, **changes)
    ours, reference = both(Held(spec, arrays(spec, 2)), exact=True)
    architecture, scale = spec.architecture, size**-0.5
    stores = [ops.new_pages(architecture) for ops in (ours, reference)]
    for store in stores:
        store.grow(1)
        store.grow(9)
    tables = ([5, 0], [8, 2, 1], [3, 4])
    steps = [
        [Span(tables[0], 0, 40, False), Span(tables[1], 0, 65, False)],
        [Span(tables[0], 40, 1, True), Span(tables[2], 0, 3, False), Span(tables[1], 65, 1, True)],
        [Span(tables[0], 41, 3, True), Span(tables[1], 66, 1, True), Span(tables[2], 3, 1, True)],
    ]
    for number, spans in enumerate(steps):
        count = sum(span.count for span in spans)
        q, k, v = (normal(1, count, heads * size, seed=number * 3 + heads) for heads in (4, 2, 2))
        results = []
        for ops, store in zip((ours, reference), stores, strict=True):
            cache, place = ops.spans(store, spans), ops.device
            rotated = ops.rope_and_append(q.to(place), k.to(place), v.to(place), cache, 0)
            results.append(ops.attention(rotated, cache, 0, scale, window).cpu())
        assert_near(results[0], results[1], 1e-5)
    assert stores[0].read(8) == pytest.approx(stores[1].read(8)) or np.allclose(
        *(np.frombuffer(store.read(8), np.float32) for store in stores), atol=1e-5
    )
    assert stores[0].page_bytes == stores[1].page_bytes == 2 * 2 * PAGE * size * 4


def test_a_whole_model_step_by_step() -> None:
    spec = model(num_hidden_layers=1)
    ours, reference = both(Held(spec, arrays(spec, 4)), exact=True)
    hidden = []
    for ops in (ours, reference):
        network, store = decoder_for(spec.architecture, ops), ops.new_pages(spec.architecture)
        store.grow(2)
        parts, start = [], 0
        for count in (5, 1, 1):
            cache = ops.spans(store, [Span([1, 0], start, count, count == 1)])
            x = ops.run(network.forward, ops.ids([[(start + i) % 8 for i in range(count)]]), cache)
            parts.append(network.logits(x).cpu())
            start += count
        hidden.append(torch.cat(parts, 1))
    assert_near(hidden[0], hidden[1], 1e-4)


def test_tiles_fit_the_product() -> None:
    one, many = Tile.choose(1, 4096, 4096, 64), Tile.choose(300, 4096, 4096, 32)
    assert one.tokens == 1 and one.parts > 1 and many.tokens == 64 and many.parts == 1
    assert all(tile.columns % 32 == 0 and tile.parts & (tile.parts - 1) == 0 for tile in (one, many))
