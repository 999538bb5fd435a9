"""The engine: chunks, batches and reused prefixes give the logits of one full forward; generation is reproducible."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_formats import ConfigError
from mpo_runtime.engine import Engine, Step
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.sampler import SamplingOptions
from tests.helpers import EOS, VOCABULARY, forward, granite_config, network, some_ids, write_folder

GREEDY = SamplingOptions(temperature=0)
CONTEXT = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    changes = {"max_position_embeddings": CONTEXT, "num_key_value_heads": 1, "attention_bias": True}
    config = granite_config(**changes, tie_word_embeddings=False)  # with a tied head it would repeat its last token
    return network(write_folder(tmp_path_factory.mktemp("engine") / "model", config, seed=3))


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


@pytest.mark.parametrize("shared", [0, 1, 7, 19, 20])
def test_a_shared_prefix_is_reused_and_changes_nothing(model: Decoder, shared: int) -> None:
    engine = Engine(model, chunk=6)
    first = some_ids(20, 1)
    engine.prefill(first)
    second = first[:shared] + [token ^ 1 for token in some_ids(20, 1)[shared:]] + [5, 6]
    seen: list[int] = []
    ids = model.ops.ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.ops, "ids", lambda rows: (seen.extend(rows[0]), ids(rows))[1])
        logits = engine.prefill(second)
    assert seen == second[shared:]
    np.testing.assert_allclose(logits, Engine(model).prefill(second), atol=1e-5)
    np.testing.assert_allclose(engine.prefill(first[:3]), Engine(model).prefill(first[:3]), atol=1e-5)
    np.testing.assert_allclose(engine.prefill(first[:3]), forward(model, [first[:3]])[0, -1], atol=1e-5)


def test_rewinding_the_cache_forgets_what_came_after(model: Decoder) -> None:
    rows = [some_ids(9, 1), some_ids(9, 2)]
    cache = model.ops.new_cache(model.architecture, 2, 9)
    model.hidden(model.ops.ids([[*row[:4], 0, 0, 0] for row in rows]), cache, [7, 7])
    cache.rewind(4)
    assert cache.lengths == [4, 4]
    logits = model.logits(model.hidden(model.ops.ids([row[4:] for row in rows]), cache, [5, 5]))
    np.testing.assert_allclose(model.ops.to_numpy(logits), forward(model, rows)[:, 4:], atol=1e-5)


def test_greedy_takes_the_largest_logit_of_a_full_forward(model: Decoder) -> None:
    prompt = some_ids(5)
    steps = list(Engine(model).generate(prompt, GREEDY, max_tokens=12, stop_ids=()))
    history = list(prompt)
    for step in steps:
        logits = forward(model, [history])[0, -1].astype(np.float64)
        np.testing.assert_allclose(step.logits, logits, atol=1e-5)
        assert step.token == int(step.logits.argmax())
        assert step.logprob == pytest.approx(logits[step.token] - np.log(np.exp(logits).sum()), abs=1e-5)
        history.append(step.token)
    assert [step.finish for step in steps] == [None] * 11 + ["length"]


def tokens(model: Decoder, options: SamplingOptions, count: int = 16) -> list[int]:
    return [step.token for step in Engine(model).generate(some_ids(4), options, max_tokens=count, stop_ids=())]


def test_a_seed_makes_sampling_reproducible(model: Decoder) -> None:
    options = SamplingOptions(temperature=1.0, top_p=0.95, seed=7)
    assert tokens(model, options) == tokens(model, options)
    assert tokens(model, options) != tokens(model, SamplingOptions(temperature=1.0, top_p=0.95, seed=8))
    assert tokens(model, GREEDY) == tokens(model, GREEDY)


def finishes(steps: list[Step]) -> list[str | None]:
    return [step.finish for step in steps]


def test_why_a_generation_ends(model: Decoder) -> None:
    """At a stop id, at the model's own end token, at max_tokens, at the end of the context; whichever comes first."""
    engine = Engine(model)
    prompt = some_ids(4)
    greedy = tokens(model, GREEDY)
    stop = next(token for token in greedy if greedy.index(token) >= 2)
    index = greedy.index(stop)
    stopped = list(engine.generate(prompt, GREEDY, stop_ids=[stop]))
    assert [step.token for step in stopped] == greedy[: index + 1]
    assert finishes(stopped) == [None] * index + ["stop"]
    assert finishes(list(engine.generate(prompt, GREEDY, max_tokens=index + 1, stop_ids=[stop])))[-1] == "stop"
    assert finishes(list(engine.generate(prompt, GREEDY, max_tokens=index, stop_ids=[stop])))[-1] == "length"
    always_end = SamplingOptions(temperature=0, logit_bias={EOS: 100})
    assert [(step.token, step.finish) for step in engine.generate(prompt, always_end)] == [(EOS, "stop")]
    full = list(engine.generate(prompt, GREEDY, stop_ids=()))
    assert len(full) == CONTEXT - len(prompt) and full[-1].finish == "length"
    longest = list(engine.generate(some_ids(CONTEXT - 1), GREEDY, stop_ids=()))
    assert finishes(longest) == ["length"]


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
    with pytest.raises(ConfigError, match=words):
        next(engine.generate(ids, GREEDY))
    assert not engine.lock.locked()
    np.testing.assert_allclose(engine.prefill([1, 2]), forward(model, [[1, 2]])[0, -1], atol=1e-5)


@pytest.mark.parametrize(
    ("context", "words"),
    [(CONTEXT + 1, f"the model was made for {CONTEXT}"), (1, "at least 2"), (0, "at least 2"), (-5, "at least 2")],
)
def test_contexts_that_cannot_be_allocated(model: Decoder, context: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Engine(model, context=context)


def test_a_smaller_context_holds_fewer_tokens(model: Decoder) -> None:
    engine = Engine(model, context=6)
    assert len(list(engine.generate([1, 2], GREEDY, stop_ids=()))) == 4
    with pytest.raises(ConfigError, match="6 tokens do not fit into a context of 6"):
        engine.prefill(some_ids(6))


@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(seed=5), SamplingOptions()])
def test_only_a_repeatable_generation_runs_again_what_was_run_in_other_pieces(
    model: Decoder, options: SamplingOptions
) -> None:
    """Of a prompt that the cache holds: from the last whole chunk on where rounding is to be the same, else its last token."""
    prompt = some_ids(20, 7)
    engine = Engine(model, chunk=6)
    [first] = engine.generate(prompt, options, max_tokens=1)
    longer = [*prompt, first.token, 3]
    assert engine.reusable(longer, repeatable=options.repeatable) == (18 if options.repeatable else 20)
    assert engine.reusable(prompt[:12], repeatable=options.repeatable) == (6 if options.repeatable else 11)
    list(engine.generate(longer, options, max_tokens=8))  # token by token, from here on in no whole chunk
    held = [*engine.held, 1]
    assert len(held) > 24 and engine.reusable(held, repeatable=True) == 18
    engine.prefill(prompt[:7])
    assert engine.reusable(longer, repeatable=True) == 6


def test_generations_after_one_another_are_those_of_an_empty_cache_to_the_last_bit(model: Decoder) -> None:
    engine = Engine(model, chunk=6)
    for round_ in range(6):
        prompt = some_ids(8 + 3 * (round_ % 3), round_ % 2)
        found = [step.logits for step in engine.generate(prompt, GREEDY, max_tokens=9)]
        fresh = [step.logits for step in Engine(model, chunk=6).generate(prompt, GREEDY, max_tokens=9)]
        np.testing.assert_array_equal(found, fresh)
