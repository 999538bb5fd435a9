"""The scheduler: texts in one batch are what they are alone; joining, leaving, shared beginnings, failures, speculation."""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from mpo_formats import ConfigError, MpoError
from mpo_runtime.backends.ops import PAGE
from mpo_runtime.engine import Generation, Request, Scheduler, Step
from mpo_runtime.engine.speculation import NgramDrafter
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.sampler import SamplingOptions
from tests.helpers import EOS, VOCABULARY, forward, granite_config, network, some_ids, write_folder

GREEDY = SamplingOptions(temperature=0)
CONTEXT = 240


@pytest.fixture(scope="module", params=["native", "native, together", "reference"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """On each backend; and as if the native one were exact for float matrices, whose rounding shows in no token here."""
    changes: dict[str, Any] = {"max_position_embeddings": CONTEXT, "num_key_value_heads": 1, "attention_bias": True}
    config = granite_config(**changes, tie_word_embeddings=False)  # with a tied head it would repeat its last token
    backend, _, together = request.param.partition(", ")
    made = network(write_folder(tmp_path_factory.mktemp("texts") / "model", config, seed=3), backend=backend)
    if together:
        vars(made.ops)["row_exact"] = True
    return made


def ask(ids: list[int], options: SamplingOptions = GREEDY, count: int = 12, **more: Any) -> Request:
    return Request(tuple(ids), options, count, (), **more)


def tokens(generation: Generation) -> list[int]:
    return [step.token for step in generation]


def alone(model: Decoder, request: Request) -> list[int]:
    return tokens(Scheduler(model, chunk=40).submit(request))


def finishes(steps: list[Step]) -> list[str | None]:
    return [step.finish for step in steps]


def test_greedy_takes_the_largest_logit_of_a_full_forward(model: Decoder) -> None:
    prompt = some_ids(37)
    history = list(prompt)
    for step in Scheduler(model, chunk=10).submit(ask(prompt)):
        logits = forward(model, [history])[0, -1].astype(np.float64)
        np.testing.assert_allclose(step.logits, logits, atol=1e-5)
        assert step.token == int(step.logits.argmax())
        assert step.logprob == pytest.approx(logits[step.token] - np.log(np.exp(logits).sum()), abs=1e-5)
        history.append(step.token)
    assert len(history) == 49


def test_a_seed_makes_sampling_reproducible(model: Decoder) -> None:
    drawn = [
        alone(model, ask(some_ids(4), SamplingOptions(temperature=1.0, top_p=0.95, seed=seed))) for seed in (7, 7, 8)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_why_a_generation_ends(model: Decoder) -> None:
    """At a stop id, at the model's own end token, at max_tokens, at the end of the context; whichever comes first."""
    engine, prompt = Scheduler(model), some_ids(4)
    greedy = tokens(engine.submit(ask(prompt)))
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
    assert finishes(list(engine.generate(some_ids(CONTEXT - 1), GREEDY, stop_ids=()))) == ["length"]


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
    engine = Scheduler(model)
    with pytest.raises(ConfigError, match=words):
        engine.submit(ask(ids))
    assert engine.stats().requests == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": CONTEXT + 1}, f"the model was made for {CONTEXT}"),
        ({"context": 1}, "at least 2"),
        ({"parallel": 0}, "parallel: expected 1 to 64, found 0"),
        ({"parallel": 65}, "parallel: expected 1 to 64, found 65"),
        ({"speculate": "tree"}, "speculate tree: expected ngram"),
        ({"prefix_bytes": -1}, "prefix_bytes: expected 0 or more"),
    ],
)
def test_options_out_of_range(model: Decoder, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Scheduler(model, **options)


def requests() -> list[Request]:
    """Prompts of many lengths, greedy and drawn."""
    drawn = [SamplingOptions(temperature=1.0, seed=seed) for seed in range(9)]
    return [ask(some_ids(3 + 11 * index, index), drawn[index] if index % 2 else GREEDY, 20) for index in range(9)]


@pytest.mark.parametrize("parallel", [1, 3, 16])
def test_texts_of_many_threads_are_what_they_are_alone(model: Decoder, parallel: int) -> None:
    engine = Scheduler(model, parallel=parallel, chunk=40)
    expected = [alone(model, request) for request in requests()]
    with ThreadPoolExecutor(9) as pool:
        found = list(pool.map(lambda request: tokens(engine.submit(request)), requests(), timeout=300))
    assert found == expected
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.generated_tokens) == (0, 0, 180)
    assert stats.kv_bytes == stats.kept_bytes  # only what is kept for later prompts


def test_texts_share_steps_and_join_while_others_run(model: Decoder) -> None:
    engine = Scheduler(model, chunk=40)
    texts = [engine.submit(request) for request in requests()]
    for text in texts:
        list(text)
    steps, rows = engine.stats().steps, engine.stats().step_rows
    assert steps < 100 and rows > 6  # 180 tokens and 423 of prompts, were they alone: more than 190 steps
    assert all(text.prompt_seconds > 0 and text.decode_seconds > 0 and text.queued_seconds >= 0 for text in texts)


@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(seed=3), SamplingOptions()])
def test_beginnings_are_shared_as_far_as_the_text_stays_the_same(model: Decoder, options: SamplingOptions) -> None:
    """Where it is to be repeatable, only what was run as part of a prompt: generated tokens are rounded differently."""
    engine = Scheduler(model, chunk=40)
    prompt = some_ids(100, 1)
    first = engine.submit(ask(prompt, options, 40))
    answer = tokens(first)
    assert first.cached_tokens == 0
    follow = [*prompt, *answer, *some_ids(9, 2)]
    second = engine.submit(ask(follow, options))
    found = tokens(second)
    exact = 100 if model.ops.row_exact else 80
    assert second.cached_tokens == (exact if options.repeatable else 139)  # the last token was drawn, not run
    if options.repeatable:
        assert found == alone(model, ask(follow, options))
    branch = engine.submit(ask([*prompt[:50], *some_ids(20, 3)], options))
    list(branch)
    shared = 50 if model.ops.row_exact or not options.repeatable else 40
    assert branch.cached_tokens == shared


def test_the_same_prompt_again_runs_its_last_token_alone(model: Decoder) -> None:
    engine = Scheduler(model, chunk=40)
    prompt = some_ids(3 * PAGE, 1)
    texts = [engine.submit(ask(prompt, SamplingOptions(), 1)) for _ in range(2) if engine.stats().running == 0]
    list(texts[0])
    again = engine.submit(ask(prompt, SamplingOptions(), 1))
    list(again)
    assert (again.cached_tokens, again.prompt_done) == (3 * PAGE - 1, 3 * PAGE)


def test_kept_beginnings_stay_within_their_budget(model: Decoder) -> None:
    """The ones that were used last stay; a budget of nothing keeps nothing."""
    page = Scheduler(model).pool.store.page_bytes
    engine = Scheduler(model, prefix_bytes=4 * page)
    prompts = [some_ids(2 * PAGE, seed) for seed in range(3)]
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
        list(engine.submit(ask(prompt, SamplingOptions(), 1)))
        assert engine.stats().kept_bytes <= 4 * page
    cached = [engine.submit(ask(prompts[index], SamplingOptions(), 1)) for index in (0, 1)]
    assert [(list(text), text.cached_tokens)[1] for text in cached] == [2 * PAGE - 1, 0]
    nothing = Scheduler(model, prefix_bytes=0)
    list(nothing.submit(ask(prompts[0])))
    assert (nothing.stats().kept_bytes, nothing.stats().kv_bytes) == (0, 0)


def test_the_log_probabilities_of_a_prompt(model: Decoder) -> None:
    prompt = some_ids(50, 4)
    text = Scheduler(model, chunk=20).submit(ask(prompt, GREEDY, 5, prompt_logprobs=True))
    assert tokens(text) == alone(model, ask(prompt, GREEDY, 5))
    logits = forward(model, [prompt])[0].astype(np.float64)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = text.prompt_logprobs
    assert found is not None and found[0] is None
    np.testing.assert_allclose(np.array(found[1:], float), scores[np.arange(49), prompt[1:]], atol=1e-5)


def test_a_hook_chooses_what_may_come(model: Decoder) -> None:
    seen: list[list[int]] = []

    def only_even(generated: Any, logits: Any) -> None:
        seen.append(list(generated))
        logits[1::2] = -np.inf

    steps = list(Scheduler(model).submit(ask(some_ids(5), SamplingOptions(seed=1), 12, logits_hook=only_even)))
    assert seen == [[step.token for step in steps[:count]] for count in range(12)]
    assert all(step.token % 2 == 0 for step in steps) and np.isfinite(steps[0].logits).all()
    odd = steps[0].logits.astype(np.float64)
    assert steps[0].logprob == pytest.approx(odd[steps[0].token] - np.log(np.exp(odd).sum()), abs=1e-5)


def forbids_all(generated: Any, logits: Any) -> None:
    logits[:] = -np.inf


def raises(generated: Any, logits: Any) -> None:
    if len(generated) == 3:
        raise RuntimeError("no")


def test_a_failing_hook_ends_its_own_text_alone(model: Decoder) -> None:
    engine = Scheduler(model)
    good = engine.submit(ask(some_ids(5)))
    bad = engine.submit(ask(some_ids(6), logits_hook=raises))
    with pytest.raises(MpoError, match="forbids every token"):
        list(engine.submit(ask(some_ids(6), logits_hook=forbids_all)))
    assert len([next(bad) for _ in range(3)]) == 3
    with pytest.raises(RuntimeError, match="no"):
        next(bad)
    assert bad.done and list(bad) == []
    assert tokens(good) == alone(model, ask(some_ids(5)))
    assert engine.stats().running == 0


def test_a_failing_step_ends_the_texts_that_were_in_it(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Scheduler(model)
    with monkeypatch.context() as patch:
        patch.setattr(model.ops, "run", broken)
        texts = [engine.submit(ask(some_ids(5, seed))) for seed in range(2)]
        for text in texts:
            with pytest.raises(OSError, match="disk"):
                next(text)
    assert tokens(engine.submit(ask(some_ids(5)))) == alone(model, ask(some_ids(5)))


def broken(*_: Any) -> Any:
    raise OSError("disk")


def test_without_memory_what_is_kept_goes_first(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Scheduler(model)
    list(engine.submit(ask(some_ids(100, 1), GREEDY, 1)))
    pages = engine.pool.store.count
    grow = engine.pool.take

    def full() -> int:
        if engine.pool.used >= pages:
            raise MemoryError
        return grow()

    monkeypatch.setattr(engine.pool, "take", full)
    assert len(tokens(engine.submit(ask(some_ids(90, 2), GREEDY, 3)))) == 3
    with pytest.raises(MemoryError):
        list(engine.submit(ask(some_ids(200, 3), GREEDY, 3)))
    assert engine.stats().running == 0 and engine.pool.used_bytes == engine.stats().kept_bytes


def wait_until(holds: Any) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_cancelled_and_dropped_texts_leave(model: Decoder) -> None:
    engine = Scheduler(model)
    kept = [engine.submit(ask(some_ids(4, seed), GREEDY, 100)) for seed in range(3)]
    next(kept[0])
    kept[0].cancel()
    kept[0].cancel()
    assert list(kept[0]) == [] and kept[0].done
    next(kept[1])
    del kept[1]
    gc.collect()
    assert len(tokens(kept[1])) == 100
    wait_until(lambda: engine.stats().running == 0)
    assert engine.stats().kv_bytes == engine.stats().kept_bytes


def test_a_text_pauses_where_its_reader_is_far_behind(model: Decoder) -> None:
    engine = Scheduler(model, parallel=1)
    slow = engine.submit(ask(some_ids(4), GREEDY, 200))
    next(slow)
    fast = engine.submit(ask(some_ids(5), GREEDY, 20))
    assert len(tokens(fast)) == 20  # although there is one place
    wait_until(lambda: slow.figures.tokens == 33)
    time.sleep(0.1)
    assert slow.figures.tokens == 33
    assert len(tokens(slow)) == 199


def test_polling_and_notification(model: Decoder) -> None:
    calls: list[int] = []
    ready = threading.Event()
    engine = Scheduler(model)

    def notify() -> None:
        calls.append(threading.get_ident())
        ready.set()

    text = engine.submit(ask(some_ids(4), GREEDY, 30), notify=notify)
    found: list[int] = []
    while not text.done:
        assert ready.wait(60)
        ready.clear()
        while (step := text.poll()) is not None:
            found.append(step.token)
    assert found == alone(model, ask(some_ids(4), GREEDY, 30))
    assert len(calls) == 30 and threading.get_ident() not in calls
    assert text.poll() is None


def test_closing_ends_everything(model: Decoder) -> None:
    engine = Scheduler(model)
    text = engine.submit(ask(some_ids(4), GREEDY, 200))
    next(text)
    engine.close()
    assert len(list(text)) <= 33
    with pytest.raises(ConfigError, match="closed"):
        engine.submit(ask(some_ids(4)))
    engine.close()


# -- speculation


@pytest.fixture
def repeating() -> Iterator[list[int]]:
    """A prompt that says the same twice."""
    yield [*some_ids(40, 5), *some_ids(9, 6), *some_ids(40, 5)[:20]]


@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(temperature=0.3, seed=4)])
def test_speculation_changes_nothing(model: Decoder, repeating: list[int], options: SamplingOptions) -> None:
    engine = Scheduler(model, speculate="ngram", chunk=40)
    text = engine.submit(ask(repeating, options, 150))
    assert tokens(text) == alone(model, ask(repeating, options, 150))
    figures = text.figures
    assert 0 < figures.accepted <= figures.drafted and engine.stats().drafted == figures.drafted
    assert engine.stats().steps < 150


def test_speculation_in_a_batch_and_with_end_tokens(model: Decoder, repeating: list[int]) -> None:
    engine = Scheduler(model, speculate="ngram", chunk=40)
    asked = [Request((*repeating, seed), GREEDY, 60, (some_ids(1, seed)[0],)) for seed in range(3)]
    together = [engine.submit(request) for request in asked]
    assert [tokens(text) for text in together] == [alone(model, request) for request in asked]


def test_drafted_texts_have_the_distribution_of_plain_ones(model: Decoder) -> None:
    """Counts of three drawn tokens over many seeds: the same seeds give the same texts, so the counts are equal."""
    prompt, options = some_ids(3, 1) * 4, [SamplingOptions(temperature=1.2, top_k=4, seed=seed) for seed in range(60)]
    counts = []
    for speculate in ("ngram", None):
        engine = Scheduler(model, speculate=speculate)  # type: ignore[arg-type]
        counts.append(Counter(tuple(tokens(engine.submit(ask(prompt, each, 3)))) for each in options))
    assert counts[0] == counts[1] and len(counts[0]) > 10


def test_drafts_are_what_followed_before() -> None:
    drafter = NgramDrafter()
    assert drafter.draft([1, 2, 3], 9) == []
    text = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]
    assert drafter.draft(text, 9) == [4, 5, 6]
    drafter.observe(3, 3)
    assert drafter.draft(text, 9) == [4, 5, 6, 7, 8, 1]
    assert drafter.draft(text, 2) == [4, 5]
    assert drafter.draft(text, 0) == []
    assert NgramDrafter().draft([7, 7, 7, 7], 9) == [7, 7, 7]  # a pattern that goes on into itself
    drafter.observe(6, 0)
    assert drafter.draft(text, 9) == []  # a pause after a draft that was wrong
    assert drafter.draft(text, 9) == [4, 5, 6]
