"""Every op of the native backend against the reference, on random shapes, at every instruction set of this CPU."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mpo_formats import Dense, Quantized, Rope
from mpo_formats.architecture import EMBEDDING
from mpo_runtime.backends.ops import Span
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.layers.linear import block_transform
from tests.formats.tiny import GATE, arrays, model
from tests.runtime.native_cases import LEVELS, Held, layers, level, needs_native

with contextlib.suppress(ImportError):  # where it was not built every test here is skipped
    import mpo_runtime._native as native
    from mpo_runtime.backends.native import NativeOps

pytestmark = needs_native
Floats = NDArray[np.float32]
# A key on the edge between two stored values may fall to either side.
CACHE_ROUNDING = {"f32": 1e-5, "f16": 1e-3, "bf16": 8e-3, "int8": 0.03}
# Queries, keys, values and their weights may be rounded to bf16 where activations are rounded and the cache is not float32.
ATTENTION_ROUNDING = 0.012
levels = pytest.mark.parametrize("isa", LEVELS)


def normal(shape: tuple[int, ...], seed: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_close(found: Floats, expected: Floats, tolerance: float = 1e-5) -> None:
    """Equal up to a share of the largest value."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(float(np.abs(expected).max()), 1e-30))


def both(weights: Held, **options: Any) -> tuple[Any, Any]:
    """The two backends over the same weights."""
    chi = options.pop("chi", None)
    return NativeOps(weights, chi=chi, **options), ReferenceOps(weights, chi=chi, held=True)


def on_reference(ops: Any, x: Floats) -> Any:
    import torch

    return torch.from_numpy(x).to(ops.device)


@levels
@given(weights=layers(), rows=st.integers(1, 2), tokens=st.integers(1, 40), chi=st.none() | st.integers(1, 6))
@settings(max_examples=60)
def test_linear_layers_of_any_terms(isa: str, weights: Held, rows: int, tokens: int, chi: int | None) -> None:
    ours, reference = both(weights, chi=chi, activations="float")
    spec = weights.spec.linear(GATE)
    x = normal((rows, tokens, spec.in_features), tokens)
    with level(isa):
        found = ours.linear(ours.weights(GATE), x)
        rounded_ops = NativeOps(weights, chi=chi)
        rounded = rounded_ops.linear(rounded_ops.weights(GATE), x)
    expected = reference.to_numpy(reference.linear(reference.weights(GATE), on_reference(reference, x)))
    parts = [term.weight().numpy() for term in reference.weights(GATE).terms]
    # Terms may cancel, so errors are measured against what they add up; a stored transform may make inputs larger.
    taken = block_transform(torch.from_numpy(x).flatten(0, 1), reference.weights(GATE).transform)
    size = sum(float(np.linalg.norm(part)) for part in parts) * float(taken.norm()) / spec.in_features**0.5
    assert float(np.linalg.norm(found - expected)) <= 1e-5 * size
    assert float(np.linalg.norm(rounded - expected)) <= 0.01 * size


@levels
@given(weights=layers(), count=st.integers(1, 9))
def test_embedding_gathers_rows_of_any_terms(isa: str, weights: Held, count: int) -> None:
    ours, reference = both(weights)
    ids = np.random.default_rng(count).integers(0, weights.spec.linear(GATE).out_features, (2, count))
    with level(isa):
        found = ours.embed(ours.weights(GATE), ids, 3.0)
    expected = reference.embed(reference.weights(GATE), on_reference(reference, ids), 3.0)
    assert_close(found, reference.to_numpy(expected))


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    spec = model()
    return both(Held(spec, arrays(spec)))


@levels
@given(width=st.integers(1, 300), count=st.integers(1, 5), size=st.sampled_from([1e-3, 1.0, 30.0]))
def test_elementwise_ops(isa: str, pair: tuple[Any, Any], width: int, count: int, size: float) -> None:
    ours, reference = pair
    x, y, weight = normal((1, count, width), 1) * np.float32(size), normal((1, count, width), 2), normal((width,), 3)
    tensors = [on_reference(reference, array) for array in (x, y, weight)]
    with level(isa):
        found = [ours.rms_norm(x, weight, 1e-5), ours.swiglu(x, y), ours.add_scaled(x, y, 0.22), ours.gelu(x)]
        found += [ours.layer_norm(x, weight, y[0, 0], 1e-5), ours.rms_norm(np.tile(x, 3), weight, 1e-5)]
    expected = [
        reference.rms_norm(tensors[0], tensors[2], 1e-5),
        reference.swiglu(tensors[0], tensors[1]),
        reference.add_scaled(tensors[0], tensors[1], 0.22),
        reference.gelu(tensors[0]),
        reference.layer_norm(tensors[0], tensors[2], tensors[1][0, 0], 1e-5),
        reference.rms_norm(tensors[0], tensors[2], 1e-5).tile(3),
    ]
    for one, other in zip(found, expected, strict=True):
        assert_close(one, reference.to_numpy(other), 2e-6)


@levels
@given(width=st.integers(1, 40), held=st.lists(st.integers(0, 9), min_size=1, max_size=3), count=st.integers(1, 9))
def test_positions(isa: str, pair: tuple[Any, Any], width: int, held: list[int], count: int) -> None:
    """Rows of unequal length; what is padding may lie beyond the table and means nothing, but reads nothing outside."""
    ours, reference = pair
    x, table = normal((len(held), count, width), 1), normal((12 * width,), 2)
    architecture = dataclasses.replace(model().architecture, max_position_embeddings=12)
    caches = [ops.new_cache(architecture, len(held), 12) for ops in pair]
    for cache in caches:
        cache.advance(held)
    with level(isa):
        found = ours.add_positions(x, table, caches[0])
    tensors = [on_reference(reference, array) for array in (x, table)]
    assert_close(found, reference.to_numpy(reference.add_positions(*tensors, caches[1])), 1e-6)
    rows = table.reshape(12, width)
    fits = min(count, 12 - held[0])
    np.testing.assert_allclose(found[0, :fits], x[0, :fits] + rows[held[0] : held[0] + fits], atol=1e-6)
    alone = reference.to_numpy(reference.add_positions(*tensors, None))
    np.testing.assert_allclose(alone, x + rows[:count], atol=1e-6)


@levels
def test_gelu_far_from_zero(isa: str, pair: tuple[Any, Any]) -> None:
    x = np.array([[[-1e30, -200, -88, -20, 0, 20, 88, 200, 1e30, np.nan] * 2]], np.float32)
    with level(isa):
        found = pair[0].gelu(x)
    np.testing.assert_allclose(found, np.where(x < 0, 0, x), atol=1e-30)


@levels
def test_swiglu_far_from_zero(isa: str, pair: tuple[Any, Any]) -> None:
    """Where exp overflows or vanishes the result is 0 or the gate itself; what is not a number stays so."""
    gate = np.array([[[-1e30, -200, -88, -20, 0, 20, 88, 200, 1e30, np.nan] * 2]], np.float32)
    with level(isa):
        found = pair[0].swiglu(gate, np.ones_like(gate))
    with np.errstate(over="ignore"):
        expected = (gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64)))).astype(np.float32)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-30)


@levels
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (9, 3)]),
    size=st.sampled_from([2, 6, 8, 16, 32, 40, 64, 80, 128]),
    held=st.lists(st.integers(0, 90), min_size=1, max_size=3),
    count=st.integers(1, 40),
    kv_type=st.sampled_from(["f32", "f16", "bf16", "int8"]),
    activations=st.sampled_from(["float", "int8"]),
    scaling=st.sampled_from(["default", "linear", "llama3", "yarn"]),
    window=st.sampled_from([0, 1, 7, 30, 64, 4096]),
)
@settings(max_examples=40)
def test_rope_and_attention(
    isa: str,
    heads: tuple[int, int],
    size: int,
    held: list[int],
    count: int,
    kv_type: str,
    activations: str,
    scaling: Any,
    window: int,
) -> None:
    """Rows of unequal length, then more tokens than fit for the longest one, whose last ones are padding."""
    numbers = {"linear": (2.0, 0.0, 0.0, 0), "llama3": (8.0, 1.0, 4.0, 64), "yarn": (8.0, 1.0, 32.0, 64)}
    rope = Rope(1e4, scaling, *numbers.get(scaling, (1.0, 0.0, 0.0, 0)))
    changes = {
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": size,
        "rope": rope,
        "max_position_embeddings": 4096,
    }
    spec = model({}, **changes)
    weights = Held(spec, arrays(spec))
    ours = NativeOps(weights, kv_type=kv_type, activations=activations)
    reference = ReferenceOps(weights, kv_type="f32" if kv_type == "int8" else kv_type)
    rounded = activations == "int8" and kv_type != "f32"
    capacity = max(held) + max(1, count // 2)
    rows, steps = len(held), [max(max(held), 1), count]
    caches = [ops.new_cache(spec.architecture, rows, capacity) for ops in (ours, reference)]
    for index, step in enumerate(steps):
        q, k, v = (normal((rows, step, n * size), index * 3 + n) for n in (heads[0], heads[1], heads[1]))
        with level(isa):
            turned = ours.rope_and_append(q, k, v, caches[0], 0)
            found = ours.attention(turned, caches[0], 0, size**-0.5, window)
        tensors = [on_reference(reference, array) for array in (q, k, v)]
        other = reference.rope_and_append(*tensors, caches[1], 0)
        expected = reference.to_numpy(reference.attention(other, caches[1], 0, size**-0.5, window))
        assert_close(turned, reference.to_numpy(other).swapaxes(1, 2).reshape(q.shape), 1e-5)
        assert_close(found, expected, CACHE_ROUNDING[kv_type] + ATTENTION_ROUNDING * rounded)
        for cache in caches:
            cache.advance(held if index == 0 else [0] * rows)
        assert caches[0].lengths == caches[1].lengths


@levels
@pytest.mark.parametrize("size", [2, 16, 40])
def test_a_half_precision_cache_holds_its_largest_value_in_the_place_of_an_infinity(isa: str, size: int) -> None:
    spec = model({}, num_attention_heads=1, num_key_value_heads=1, head_dim=size)
    ours = NativeOps(Held(spec, arrays(spec)), kv_type="f16")
    cache = ours.new_cache(spec.architecture, 1, 4)
    q, k, v = (np.full((1, 1, size), value, np.float32) for value in (1e-6, 1e30, -1e6))
    with level(isa):
        found = ours.attention(ours.rope_and_append(q, k, v, cache, 0), cache, 0, 1.0, 0)
    np.testing.assert_array_equal(found, np.full_like(found, -65504))


@levels
@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16", "int8"])
def test_what_is_not_a_number_is_not_hidden_by_the_cache(isa: str, kv_type: str) -> None:
    spec = model({}, num_attention_heads=1, num_key_value_heads=1, head_dim=40)
    ours = NativeOps(Held(spec, arrays(spec)), kv_type=kv_type)
    for place in (0, 17, 39):
        cache = ours.new_cache(spec.architecture, 1, 4)
        q, k, v = (normal((1, 1, 40), n) for n in range(3))
        v[0, 0, place] = np.nan
        with level(isa):
            found = ours.attention(ours.rope_and_append(q, k, v, cache, 0), cache, 0, 1.0, 0)
        assert np.isnan(found[..., place]).all()


@levels
@pytest.mark.parametrize(("threads", "window"), [(1, 0), (3, 0), (1, 700), (3, 1), (3, 1100)])
@pytest.mark.parametrize("kv_type", ["f32", "f16"])
def test_long_contexts_are_split_over_positions(isa: str, threads: int, window: int, kv_type: str) -> None:
    spec = model({}, num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=4096)
    weights = Held(spec, arrays(spec))
    ours, reference = NativeOps(weights, kv_type=kv_type), ReferenceOps(weights, kv_type=kv_type)
    # Scores of up to 70 take what is rounded to bf16 by more than the tolerance.
    tolerance, spread = (1e-5, 4) if kv_type == "f32" else (CACHE_ROUNDING[kv_type] + ATTENTION_ROUNDING, 1)
    caches = [ops.new_cache(spec.architecture, 1, 3000) for ops in (ours, reference)]
    before = native.threads()
    native.set_threads(threads)
    try:
        for step in (2500, 1):
            q, k, v = (spread * normal((1, step, n * 16), step + n) for n in (2, 1, 1))
            with level(isa):
                found = ours.attention(ours.rope_and_append(q, k, v, caches[0], 0), caches[0], 0, 0.25, window)
            turned = reference.rope_and_append(*(on_reference(reference, x) for x in (q, k, v)), caches[1], 0)
            assert_close(found, reference.to_numpy(reference.attention(turned, caches[1], 0, 0.25, window)), tolerance)
            for cache in caches:
                cache.advance([step])
    finally:
        native.set_threads(before)


@levels
@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16", "int8"])
@pytest.mark.parametrize("window", [0, 37, 300])
def test_attention_of_prompts_does_not_depend_on_the_step(isa: str, kv_type: str, window: int) -> None:
    """A token has the same bits in one long step, in steps of odd lengths, and beside other texts, on any number of threads."""
    heads, size, length = 6, 40, 700
    spec = model({}, num_attention_heads=heads, num_key_value_heads=2, head_dim=size, max_position_embeddings=4096)
    ours = NativeOps(Held(spec, arrays(spec)), kv_type=kv_type)
    q, k, v = (normal((length, n * size), n) for n in (heads, 2, 3))
    v = v[:, : 2 * size]

    def attend(steps: list[list[int]]) -> Floats:
        """Attention of a text in such steps, [row, tokens]: the other rows hold the text from its beginning."""
        pages = ours.new_pages(spec.architecture)
        each, held, found = 2 * length // 32 + 1, [0] * len(steps[0]), []
        pages.grow(each * len(held))
        for counts in steps:
            spans = [
                Span(list(range(row * each, (row + 1) * each)), held[row], count, few=False)
                for row, count in enumerate(counts)
            ]
            x = [
                np.concatenate([part[held[row] : held[row] + count] for row, count in enumerate(counts)])[None]
                for part in (q, k, v)
            ]
            cache = ours.spans(pages, spans)
            found.append(
                ours.attention(ours.rope_and_append(*x, cache, 0), cache, 0, size**-0.5, window)[0, -counts[-1] :]
            )
            held = [row + count for row, count in zip(held, counts, strict=True)]
        return np.concatenate(found)

    before = native.threads()
    try:
        with level(isa):
            expected = attend([[length]])
            for threads in (1, 3):
                native.set_threads(threads)
                for steps in ([[length]], [[1], [255], [200], [13], [length - 469]], [[100, 640], [31, 7], [9, 53]]):
                    np.testing.assert_array_equal(attend(steps), expected)
    finally:
        native.set_threads(before)


def test_logits_are_divided_by_the_scaling() -> None:
    spec = model({EMBEDDING: (Quantized(6, 32, False),)})
    ours, reference = both(Held(spec, arrays(spec)), activations="float")
    x = normal((2, 1, 32), 0)
    for scaling in (1.0, 7.0):
        expected = reference.logits(reference.weights(EMBEDDING), on_reference(reference, x), scaling)
        assert_close(ours.logits(ours.weights(EMBEDDING), x, scaling), reference.to_numpy(expected))


def test_two_terms_of_a_kind_are_added() -> None:
    terms = (Dense("f16"), Quantized(3, 16, True), Dense("bf16"))
    spec = model({GATE: terms})
    ours, reference = both(Held(spec, arrays(spec)), activations="float")
    x = normal((1, 3, 32), 0)
    expected = reference.linear(reference.weights(GATE), on_reference(reference, x))
    assert_close(ours.linear(ours.weights(GATE), x), reference.to_numpy(expected))
