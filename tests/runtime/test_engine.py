"""Steps of the engine: chunks, batches and several sequences in a step give the logits of one full forward."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_formats import ConfigError
from mpo_runtime.backends.ops import PAGE
from mpo_runtime.engine import Engine
from mpo_runtime.engine.pages import PagePool
from mpo_runtime.engine.sequence import Part, Sequence, run_step
from mpo_runtime.models.decoder import Decoder
from tests.helpers import VOCABULARY, forward, granite_config, network, some_ids, write_folder

CONTEXT = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    changes = {"max_position_embeddings": CONTEXT, "num_key_value_heads": 1, "attention_bias": True}
    config = granite_config(**changes, tie_word_embeddings=False)  # with a tied head it would repeat its last token
    return network(write_folder(tmp_path_factory.mktemp("engine") / "model", config, seed=3))


@pytest.fixture(scope="module", params=["native", "reference"])
def paged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A model whose texts take several pages, on each backend."""
    config = granite_config(max_position_embeddings=256, tie_word_embeddings=False)
    folder = write_folder(tmp_path_factory.mktemp("paged") / "model", config, seed=3)
    return network(folder, backend=request.param)


@given(chunk=st.integers(1, 30), count=st.integers(1, CONTEXT - 1))
@settings(max_examples=12)
def test_chunks_of_any_size_equal_one_forward(model: Decoder, chunk: int, count: int) -> None:
    """A chunk of one token is decoding."""
    ids = some_ids(count, chunk)
    logits = Engine(model, chunk=chunk).prefill(ids)
    np.testing.assert_allclose(logits, forward(model, [ids])[0, -1], atol=1e-5)


def test_token_by_token_equals_one_forward_at_every_position(model: Decoder) -> None:
    ids = some_ids(CONTEXT)
    cache = model.ops.new_cache(model.architecture, 1, CONTEXT)
    steps = [
        model.ops.to_numpy(model.logits(model.hidden(model.ops.ids([[token]]), cache, [1])))[0, 0] for token in ids
    ]
    assert cache.lengths == [CONTEXT]
    np.testing.assert_allclose(np.stack(steps), forward(model, [ids])[0], atol=1e-5)


@given(lengths=st.lists(st.integers(1, 12), min_size=2, max_size=4), first=st.integers(1, 12))
@settings(max_examples=12)
def test_a_batch_of_unequal_rows_equals_its_rows_alone(model: Decoder, lengths: list[int], first: int) -> None:
    """In two steps, so that the second starts at another position in every row, over what padding left behind."""
    rows = [some_ids(2 * length, index) for index, length in enumerate(lengths)]
    longest = max(lengths)
    cache = model.ops.new_cache(model.architecture, len(rows), 2 * longest)
    for part in (0, 1):
        new = [row[part * length : (part + 1) * length] for row, length in zip(rows, lengths, strict=True)]
        padded = [row + [VOCABULARY - 1] * (longest - len(row)) for row in new]
        logits = model.ops.to_numpy(model.logits(model.hidden(model.ops.ids(padded), cache, lengths)))
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            alone = forward(model, [row])[0, part * length : (part + 1) * length]
            np.testing.assert_allclose(logits[index, :length], alone, atol=1e-5)
    assert cache.lengths == [2 * length for length in lengths]


def test_rewinding_the_cache_forgets_what_came_after(model: Decoder) -> None:
    rows = [some_ids(9, 1), some_ids(9, 2)]
    cache = model.ops.new_cache(model.architecture, 2, 9)
    model.hidden(model.ops.ids([[*row[:4], 0, 0, 0] for row in rows]), cache, [7, 7])
    cache.rewind(4)
    assert cache.lengths == [4, 4]
    logits = model.logits(model.hidden(model.ops.ids([row[4:] for row in rows]), cache, [5, 5]))
    np.testing.assert_allclose(model.ops.to_numpy(logits), forward(model, rows)[:, 4:], atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], "prompt: is empty"),
        (some_ids(CONTEXT), f"prompt: {CONTEXT} tokens do not fit into a context of {CONTEXT}; shorten it"),
        ([3, VOCABULARY], f"prompt: token id {VOCABULARY} lies outside the vocabulary of {VOCABULARY}"),
        ([-1, 3], "prompt: token id -1 lies outside"),
    ],
    ids=["empty", "long", "large", "negative"],
)
def test_prompts_that_cannot_be_run(model: Decoder, ids: list[int], words: str) -> None:
    engine = Engine(model)
    with pytest.raises(ConfigError, match=words):
        engine.prefill(ids)
    np.testing.assert_allclose(engine.prefill([1, 2]), forward(model, [[1, 2]])[0, -1], atol=1e-5)


@pytest.mark.parametrize(
    ("context", "words"),
    [(CONTEXT + 1, f"the model was made for {CONTEXT}"), (1, "at least 2"), (0, "at least 2"), (-5, "at least 2")],
)
def test_contexts_that_cannot_be_allocated(model: Decoder, context: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Engine(model, context=context)


def test_steps_by_hand_are_a_full_forward(model: Decoder) -> None:
    """A prompt in chunks, single tokens, then several at once, and a second prompt in the same engine."""
    engine = Engine(model, chunk=6)
    for seed in (1, 2):
        ids = some_ids(20, seed)
        for end, logits in (
            (15, engine.prefill(ids[:15])),
            (16, engine.advance(ids[15:16])),
            (20, engine.advance(ids[16:])),
        ):
            np.testing.assert_allclose(logits, forward(model, [ids[:end]])[0, -1], atol=1e-5)


@given(
    starts=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    counts=st.lists(st.integers(1, 40), min_size=5, max_size=5),
    together=st.booleans(),
)
@settings(max_examples=12)
def test_one_step_over_several_sequences_equals_each_alone(
    paged: Decoder, starts: list[int], counts: list[int], together: bool
) -> None:
    """Prompts and generated tokens of texts of different lengths, across the ends of pages, by either backend."""
    pool = PagePool(paged.ops.new_pages(paged.architecture))
    texts = [some_ids(start + count, index) for index, (start, count) in enumerate(zip(starts, counts, strict=False))]
    rows = [Sequence(pool) for _ in texts]
    for row, text, start in zip(rows, texts, starts, strict=False):
        if start:
            run_step(paged, [Part(row, text[:start], few=False)], together=True)
    parts = [
        Part(row, text[start:], few=len(text) - start < 4, last=1, scored=True)
        for row, text, start in zip(rows, texts, starts, strict=False)
    ]
    order = sorted(range(len(parts)), key=lambda index: not parts[index].few)
    outcomes = dict(zip(order, run_step(paged, [parts[index] for index in order], together=together), strict=True))
    for index, (text, start) in enumerate(zip(texts, starts, strict=False)):
        outcome = outcomes[index]
        alone = forward(paged, [text])[0, start:]
        assert outcome.scored is not None
        np.testing.assert_allclose(outcome.scored, alone, atol=1e-5)
        np.testing.assert_allclose(outcome.last[0], alone[-1], atol=1e-5)
    assert [row.held for row in rows] == texts
    used = sum(-(-len(text) // PAGE) for text in texts)
    assert (pool.used, pool.used_bytes) == (used, used * pool.store.page_bytes)
    for row in rows:
        row.release()
    assert pool.used == 0


def test_pages_are_copied_read_and_written(paged: Decoder) -> None:
    store = paged.ops.new_pages(paged.architecture)
    architecture = paged.architecture
    values = 2 * architecture.num_hidden_layers * architecture.num_key_value_heads * architecture.head_dim
    assert store.page_bytes == values * PAGE * 4  # float32
    store.grow(2)
    content = np.random.default_rng(0).bytes(store.page_bytes)
    store.write(1, content)
    store.copy(1, 0)
    assert store.read(0) == store.read(1) == content
    with pytest.raises(ValueError, match="a page has"):
        store.write(0, content[1:])
