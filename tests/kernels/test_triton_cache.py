"""The KV cache, attention and recorded steps of the GPU backend against the reference, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'mpo-runtime[gpu]'")

from mpo_formats import ConfigError, ModelSpec, Quantized
from mpo_runtime.backends.ops import PAGE, Span
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.backends.triton import TritonOps
from mpo_runtime.backends.triton.lazy import resolved
from mpo_runtime.engine import Engine, Request, Scheduler
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.sampler import SamplingOptions
from tests.formats.tiny import DOWN, GATE, KEY, QUERY, UP, VALUE, arrays, model
from tests.kernels.triton_cases import DEVICE, Recording, assert_near, both, normal, poisoned
from tests.runtime.native_cases import Held, needs_native

BOUNDS = {"f32": 1e-5, "f16": 2e-3, "bf16": 2e-2, "int8": 2e-2}
INTEGERS = {name: (Quantized(4, 16, False),) for name in (QUERY, KEY, VALUE, GATE, UP, DOWN)}


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned():
        yield


def attending(size: int) -> ModelSpec:
    """A model of one block with two key-value heads and four query heads."""
    changes: dict[str, Any] = {
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": size,
    }
    return model({}, **changes)


def steps_agree(kv_type: str, size: int, window: int, bound: float) -> None:
    """Prompts, single tokens and drafts of three sequences, which are in pages out of order."""
    spec = attending(size)
    ours, reference = both(Held(spec, arrays(spec, 2)), kv_type=kv_type, exact=kv_type == "f32")
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
        [Span(tables[2], 4, 9, False)],
    ]
    for number, spans in enumerate(steps):
        count = sum(span.count for span in spans)
        q, k, v = (normal(1, count, heads * size, seed=number * 3 + heads) for heads in (4, 2, 2))
        results = []
        for ops, store in zip((ours, reference), stores, strict=True):
            cache, place = ops.spans(store, spans), ops.device
            rotated = ops.rope_and_append(q.to(place), k.to(place), v.to(place), cache, 0)
            results.append(ops.attention(rotated, cache, 0, scale, window).cpu())
        assert_near(results[0], results[1], bound)


@pytest.mark.parametrize("kv_type", BOUNDS)
def test_steps_of_several_sequences(kv_type: str) -> None:
    steps_agree(kv_type, 8, 20 if kv_type in ("f16", "int8") else 0, BOUNDS[kv_type])


@pytest.mark.long
@pytest.mark.parametrize("kv_type", BOUNDS)
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("size", [8, 24, 64])
def test_steps_of_all_shapes(kv_type: str, window: int, size: int) -> None:
    steps_agree(kv_type, size, window, BOUNDS[kv_type])


@needs_native
@pytest.mark.parametrize("kv_type", ["f16", "bf16", "int8"])
def test_pages_hold_what_the_native_ones_hold(kv_type: str) -> None:
    """Up to a unit in the last place, since angles differ in theirs; with large, zero and infinite entries."""
    from mpo_runtime.backends.native import NativeOps

    spec = attending(16)
    weights = Held(spec, arrays(spec, 2))
    ours, native = TritonOps(weights, device=DEVICE, kv_type=kv_type), NativeOps(weights, kv_type=kv_type)
    k, v = normal(1, 9, 32, seed=1), normal(1, 9, 32, seed=2)
    v[0, 3] *= 1e6  # above the largest half
    v[0, 4] = 0
    v[0, 5, 7] = float("inf")
    stores = []
    for ops in (ours, native):
        store = ops.new_pages(spec.architecture)
        store.grow(2)
        ours_here = ops is ours
        given = [(x.to(DEVICE) if ours_here else x.numpy()) for x in (normal(1, 9, 64), k, v)]
        ops.rope_and_append(*given, ops.spans(store, [Span([1], 0, 9, True)]), 0)
        stores.append(store)
    assert stores[0].page_bytes == stores[1].page_bytes
    pages = [np.frombuffer(store.read(1), np.uint8) for store in stores]
    kind = {"f16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}[kv_type]
    codes = 2 * 2 * PAGE * 16 * kind.itemsize
    held = [torch.from_numpy(page[:codes].copy()).view(kind).float().view(2, 2, PAGE, 16)[:, :, :9] for page in pages]
    found, expected = held[0], held[1].transpose(0, 1)  # the native pages have heads outside, keys and values inside
    if kv_type == "int8":
        scales = [page[codes:].view(np.float32).reshape(2, 2, PAGE)[:, :, :9] for page in pages]
        np.testing.assert_allclose(scales[0], scales[1].swapaxes(0, 1), rtol=1e-5)
        assert float((found - expected).abs().max()) <= 1
    else:
        torch.testing.assert_close(found, expected, rtol=2e-3 if kv_type == "f16" else 1e-2, atol=1e-3)
    stores[0].write(0, stores[0].read(1))
    assert stores[0].read(0) == stores[0].read(1)
    stores[0].copy(0, 1)
    with pytest.raises(ValueError, match="page has"):
        stores[0].write(0, b"short")


def test_unknown_types_of_the_cache() -> None:
    spec = attending(8)
    with pytest.raises(ConfigError, match="f32, f16, bf16, int8 with backend triton"):
        TritonOps(Held(spec, arrays(spec, 2)), device=DEVICE, kv_type="int4")
    with pytest.raises(ConfigError, match="bf16 with backend reference"):
        ReferenceOps(Held(spec, arrays(spec, 2)), kv_type="int8")


def networks(**changes: Any) -> tuple[Decoder, Decoder]:
    """The same small model on both backends."""
    spec = model(INTEGERS, vocab_size=16, num_hidden_layers=changes.pop("num_hidden_layers", 1), **changes)
    ours, reference = both(Held(spec, arrays(spec, 4)), exact=True)
    return decoder_for(spec.architecture, ours), decoder_for(spec.architecture, reference)


def test_a_whole_model_step_by_step() -> None:
    ids = [3, 1, 4, 1, 5, 9, 2]
    found = []
    for network in networks():
        engine = Engine(network, context=20)
        found.append([engine.prefill(ids[:5]), engine.advance(ids[5:6]), engine.advance(ids[6:])])
    for ours, expected in zip(*found, strict=True):
        assert_near(torch.from_numpy(ours), torch.from_numpy(expected), 1e-4)


def test_replayed_steps_read_their_texts_from_tensors() -> None:
    """A step recorded for some texts is right for others: other tokens, positions and pages, and fewer texts."""
    network, reference = networks()
    stores = [one.ops.new_pages(one.architecture) for one in (network, reference)]
    prompts = {0: ([4, 1], 33), 1: ([2], 7), 2: ([5, 3], 40)}  # pages and lengths
    for one, store in zip((network, reference), stores, strict=True):
        store.grow(6)
        for pages, length in prompts.values():
            ids = one.ops.ids([[(3 * i + length) % 16 for i in range(length)]])
            one.ops.run(one.forward, ids, one.ops.spans(store, [Span(pages, 0, length, False)]))

    def expected(ids: list[int], spans: list[Span]) -> torch.Tensor:
        hidden = reference.forward(reference.ops.ids([ids]), reference.ops.spans(stores[1], spans))
        return reference.logits(hidden)[0]

    from mpo_runtime.backends.triton.step import Steps

    step = Steps(stores[0], 16).find(2, 2)
    first = [Span([4, 1], 33, 1, True), Span([2], 7, 1, True)]
    step.inputs.fill([5, 6], first)
    recording = Recording()
    with recording.recorded():
        step.body(network.forward, network.logits)
    assert not recording.read  # no value goes to the host or comes from it
    assert recording.launches == len([action for action in recording.work if "launch" in action.__qualname__])
    assert_near(step.logits, expected([5, 6], first), 1e-4)

    for ids, spans in (
        ([9, 2], [Span([5, 3], 40, 1, True), Span([4, 1], 34, 1, True)]),
        ([7, 1], [Span([2], 8, 1, True), Span([5, 3], 41, 1, True)]),
        ([8], [Span([4, 1], 35, 1, True)]),
    ):
        step.inputs.fill(ids, spans)
        step.logits.fill_(float("nan"))
        recording.replay()
        assert_near(step.logits[: len(ids)], expected(ids, spans), 1e-4)


def test_steps_are_recorded_again_for_a_larger_store() -> None:
    network, _ = networks(max_position_embeddings=64)
    ops, store = network.ops, network.ops.new_pages(network.architecture)
    store.grow(1)
    ops.next_logits(network.forward, network.logits, [1], store, [Span([0], 0, 1, True)])
    before, generation = dict(store.steps.held), store.generation
    store.grow(2)  # the first growth made a whole context
    assert store.generation == generation
    ops.next_logits(network.forward, network.logits, [1], store, [Span([0], 1, 1, True)])
    assert dict(store.steps.held) == before
    store.grow(40)
    ops.next_logits(network.forward, network.logits, [1], store, [Span([0], 2, 1, True)])
    assert store.generation == generation + 1 and store.steps.held != before
    assert ops.next_logits(network.forward, network.logits, [1, 2], store, [Span([0], 3, 2, True)]) is None


def test_texts_of_a_scheduler_join_and_leave() -> None:
    """Texts of different lengths, generated together, are those that the reference generates."""
    network, reference = networks()
    made = []
    for one in (network, reference):
        scheduler = Scheduler(one, context=48, parallel=3, deterministic=False)
        asked = [
            scheduler.submit(Request(tuple(prompt), SamplingOptions(temperature=0), count, ()))
            for prompt, count in (([1, 2, 3], 5), ([4], 2), ([7, 7, 9, 11, 2, 1, 3], 4), ([12, 5], 3))
        ]
        made.append([[step.token for step in text] for text in asked])
        stats = scheduler.stats()
        scheduler.close()
        assert stats.step_rows > 1  # several texts were in a step
    assert made[0] == made[1]


def test_a_model_with_int8_cache_is_near() -> None:
    spec = model(INTEGERS, vocab_size=16)
    weights = Held(spec, arrays(spec, 4))
    rough, fine = (TritonOps(weights, device=DEVICE, kv_type=kind, exact=True) for kind in ("int8", "f32"))
    logits = []
    for ops in (rough, fine):
        network = decoder_for(spec.architecture, ops)
        engine = Engine(network, context=20)
        logits.append([engine.prefill([3, 1, 4]), engine.advance([5])])
        cache = ops.new_cache(spec.architecture, 1, 8)  # as measurements run it
        hidden = network.hidden(ops.ids([[3, 1, 4, 5]]), cache, [4])
        logits[-1].append(resolved(network.logits(hidden)).cpu().numpy()[0, -1])
    for found, expected in zip(*logits, strict=True):
        assert_near(torch.from_numpy(found), torch.from_numpy(expected), 5e-2)
    assert np.abs(logits[0][1] - logits[0][2]).max() <= 1e-4 * np.abs(logits[0][2]).max()
