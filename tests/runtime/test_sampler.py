"""The sampler against slow definitions of each method, and the draws against the distribution (chi-square)."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mpo_formats.errors import ConfigError, MpoError
from mpo_runtime.sampler import Choice, Sampler, SamplingOptions, filtered_distribution, top_logprobs

# Few distinct values, so that there are ties; -inf is a token that the model itself excludes.
LOGIT = st.sampled_from([-math.inf, -3.0, -1.5, -0.25, 0.0, 0.5, 0.75, 2.0, 4.0])
ROW = st.lists(LOGIT, min_size=1, max_size=40).filter(lambda row: max(row) > -math.inf)


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / math.fsum(powers) for power in powers]


def slow_log_softmax(scores: list[float]) -> list[float]:
    total = math.log(math.fsum(math.exp(score - max(scores)) for score in scores)) + max(scores)
    return [score - total for score in scores]


def slow_distribution(scores: list[float], options: SamplingOptions) -> dict[int, float]:
    """Every filter by its definition, one token at a time; the result maps token to probability."""
    by_score = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    kept = by_score[: options.top_k] if options.top_k else by_score
    probability = dict(zip(kept, softmax([scores[token] / options.temperature for token in kept]), strict=True))
    nucleus: list[int] = []
    for token in sorted(kept, key=lambda token: (-probability[token], token)):
        mass = math.fsum(probability[token] for token in nucleus)
        if mass < options.top_p or options.top_p == 1:
            nucleus.append(token)
    largest = max(probability[token] for token in nucleus)
    likely = [token for token in nucleus if probability[token] >= options.min_p * largest]
    total = math.fsum(probability[token] for token in likely)
    return {token: probability[token] / total for token in likely if probability[token] > 0}


def fast_distribution(scores: list[float], options: SamplingOptions) -> dict[int, float]:
    tokens, probabilities = filtered_distribution(np.array(scores), options)
    assert (np.diff(tokens) > 0).all()
    return {int(token): float(p) for token, p in zip(tokens, probabilities, strict=True) if p > 0}


def check_filters(row: list[float], **settings: Any) -> None:
    """Compares the two, except where a threshold is so close to an edge that rounding decides."""
    options = SamplingOptions(**settings)
    for name in ("top_p", "min_p"):
        value = getattr(options, name)
        if 0 < value < 1:
            around = [
                SamplingOptions(**{**settings, name: min(value * factor, 1.0)}) for factor in (1 - 1e-9, 1 + 1e-9)
            ]
            assume(len({frozenset(slow_distribution(row, near)) for near in around}) == 1)
    assert fast_distribution(row, options) == pytest.approx(slow_distribution(row, options), abs=1e-12)


@given(ROW, st.integers(0, 45))
def test_top_k(row: list[float], top_k: int) -> None:
    check_filters(row, temperature=1.0, top_k=top_k)


@given(ROW, st.floats(0.01, 1.0))
def test_top_p(row: list[float], top_p: float) -> None:
    check_filters(row, temperature=1.0, top_p=top_p)


@given(ROW, st.floats(0.0, 1.0))
def test_min_p(row: list[float], min_p: float) -> None:
    check_filters(row, temperature=1.0, min_p=min_p)


@given(ROW, st.floats(0.1, 5.0), st.integers(0, 45), st.floats(0.01, 1.0), st.floats(0.0, 1.0))
def test_the_filters_together(row: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    check_filters(row, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


@pytest.mark.parametrize("top_p", [0.0501, 0.5001, 0.9001, 0.9991])
@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
def test_top_p_over_a_large_vocabulary(top_p: float, spread: float) -> None:
    """The nucleus is found by sorting a part of the row only; spread 0 makes all of it one tie."""
    row = np.round(np.random.default_rng(7).normal(size=3000) * spread, 2).tolist()
    expected = slow_nucleus(row, top_p)
    assert sorted(fast_distribution(row, SamplingOptions(temperature=1.0, top_p=top_p))) == expected


def slow_nucleus(row: list[float], top_p: float) -> list[int]:
    probabilities = softmax(row)
    nucleus, mass = [], 0.0
    for token in sorted(range(len(row)), key=lambda token: (-probabilities[token], token)):
        if mass >= top_p:
            break
        nucleus.append(token)
        mass += probabilities[token]
    return sorted(nucleus)


# Penalties and bias, seen through greedy choices with one token raised above all others


def slow_scores(row: list[float], history: list[int], start: int, options: SamplingOptions) -> list[float]:
    scores = []
    for token, score in enumerate(row):
        if token in history:
            score = score / options.repetition_penalty if score > 0 else score * options.repetition_penalty
        count = history[start:].count(token)
        score -= options.frequency_penalty * count + (options.presence_penalty if count else 0)
        scores.append(score + options.logit_bias.get(token, 0.0))
    return scores


@given(
    st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=6, max_size=6),
    st.lists(st.integers(0, 5), max_size=8),
    st.data(),
)
def test_penalties_and_bias(row: list[float], history: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(history)))
    options = SamplingOptions(
        temperature=0,
        repetition_penalty=data.draw(st.sampled_from([0.5, 1.0, 2.0])),
        frequency_penalty=data.draw(st.sampled_from([-0.5, 0.0, 1.0])),
        presence_penalty=data.draw(st.sampled_from([-0.5, 0.0, 0.25])),
        logit_bias=data.draw(st.dictionaries(st.integers(0, 5), st.sampled_from([-100.0, -0.5, 2.0]), max_size=3)),
    )
    choice = Sampler(options).sample(row, history, prompt_length=start)
    scores = slow_scores(row, history, start, options)
    assert choice.token == scores.index(max(scores))  # all values are exact in binary
    assert choice.logprob == pytest.approx(slow_log_softmax(row)[choice.token])


def test_the_prompt_counts_for_the_repetition_penalty_only() -> None:
    row, history = [1.0, 0.9], [0, 0]
    assert (
        Sampler(SamplingOptions(temperature=0, repetition_penalty=2)).sample(row, history, prompt_length=2).token == 1
    )
    assert Sampler(SamplingOptions(temperature=0, frequency_penalty=2)).sample(row, history, prompt_length=2).token == 0
    assert Sampler(SamplingOptions(temperature=0, frequency_penalty=2)).sample(row, history).token == 1


def test_the_documented_order() -> None:
    """Penalties before temperature (or 1.0 and 0.6 would not swap), top-k before top-p, top-p on what top-k left."""
    swapped = SamplingOptions(temperature=0.01, presence_penalty=0.5, seed=1)
    assert Sampler(swapped).sample([1.0, 0.6], [0]).token == 1
    row = np.log([0.4, 0.3, 0.2, 0.1])
    kept, _ = filtered_distribution(row, SamplingOptions(temperature=1.0, top_k=2, top_p=0.56))
    assert kept.tolist() == [0]  # 0.4 / 0.7 > 0.56; of the whole row it would take two
    kept, probabilities = filtered_distribution(row, SamplingOptions(temperature=1.0, top_p=0.85, min_p=0.6))
    assert kept.tolist() == [0, 1]
    assert probabilities == pytest.approx([4 / 7, 3 / 7])


def test_the_callers_logits_are_left_alone() -> None:
    for kind in (np.float32, np.float64):
        logits = np.array([1.0, 2.0, 3.0], dtype=kind)
        options = SamplingOptions(seed=1, repetition_penalty=2, presence_penalty=1, logit_bias={0: 3.0})
        Sampler(options).sample(logits, [0, 1])
        assert logits.tolist() == [1.0, 2.0, 3.0]


# Greedy, log probabilities


def test_temperature_zero_takes_the_first_maximum() -> None:
    sampler = Sampler(SamplingOptions(temperature=0, top_k=1, top_p=0.1, min_p=1.0))
    for _ in range(5):
        assert sampler.sample(np.array([1, 5, 2, 5], dtype=np.float32)).token == 1


@given(ROW, st.integers(0, 2**32))
def test_logprob_is_that_of_the_raw_logits(row: list[float], seed: int) -> None:
    options = SamplingOptions(temperature=0.5, top_k=3, logit_bias={0: 1.0}, seed=seed)
    choice = Sampler(options).sample(np.array(row, dtype=np.float32))
    assert choice.logprob == pytest.approx(slow_log_softmax(row)[choice.token], abs=1e-6)


@given(ROW, st.data())
def test_top_logprobs(row: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(row)))
    expected = slow_log_softmax(row)
    best = sorted(range(len(row)), key=lambda token: (-row[token], token))[:count]
    choices = top_logprobs(np.array(row, dtype=np.float32), count)
    assert [choice.token for choice in choices] == best
    assert [choice.logprob for choice in choices] == pytest.approx([expected[token] for token in best], abs=1e-6)


# Drawing


def chi_square_limit(freedom: int) -> float:
    """The 99.99 % quantile of the chi-square distribution (Wilson and Hilferty 1931)."""
    return float(freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3)


def statistic(draws: list[int], probabilities: dict[int, float]) -> float:
    counts = Counter(draws)
    assert set(counts) <= set(probabilities)  # nothing that is filtered out
    return sum((counts[token] - len(draws) * p) ** 2 / (len(draws) * p) for token, p in probabilities.items())


ROW_TO_DRAW = [0.1, 2.0, -0.4, 1.1, 1.7, 0.9, -math.inf, 0.3, 1.2, -0.1]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.8},
        {"temperature": 1.0, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.3},
        {"temperature": 1.3, "top_k": 7, "top_p": 0.9, "min_p": 0.25},
        {"temperature": 1.0, "logit_bias": {2: 2.0, 1: -100.0}},
        {"temperature": 1.0, "repetition_penalty": 1.5, "frequency_penalty": 0.4, "presence_penalty": 0.3},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(settings: dict[str, Any]) -> None:
    options = SamplingOptions(**settings, seed=20240607)
    history = [1, 4, 4]
    expected = slow_distribution(slow_scores(ROW_TO_DRAW, history, 0, options), options)
    sampler = Sampler(options)
    draws = [sampler.sample(ROW_TO_DRAW, history).token for _ in range(5000)]
    assert statistic(draws, expected) < chi_square_limit(len(expected) - 1)


def test_the_chi_square_test_can_fail() -> None:
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=20240607))
    draws = [sampler.sample(ROW_TO_DRAW).token for _ in range(5000)]
    wrong = slow_distribution(ROW_TO_DRAW, SamplingOptions(temperature=1.2))
    assert statistic(draws, wrong) > chi_square_limit(len(wrong) - 1)


def draw_many(sampler: Sampler, count: int = 50) -> list[Choice]:
    row = np.linspace(-1, 1, 1000, dtype=np.float32)
    return [sampler.sample(row) for _ in range(count)]


@given(st.integers(0, 2**64 - 1))
def test_a_seed_repeats_its_tokens(seed: int) -> None:
    options = SamplingOptions(temperature=1.0, seed=seed)
    first = draw_many(Sampler(options))
    np.random.default_rng(0).random(10)  # nothing global is involved
    other = Sampler(SamplingOptions(temperature=1.0, seed=seed ^ 1))
    second = Sampler(options)
    mixed = []
    for _ in range(50):
        mixed += draw_many(second, 1)
        draw_many(other, 1)
    assert mixed == first


def test_the_draws_of_a_seed_stay_what_they_are() -> None:
    """Golden: a change of these numbers breaks every recorded transcript."""
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=42))
    assert [choice.token for choice in draw_many(sampler, 8)] == [891, 668, 934, 848, 235, 989, 884, 897]


def test_without_a_seed_every_sampler_has_its_own() -> None:
    first, second = Sampler(), Sampler()
    assert first.seed != second.seed
    assert draw_many(first) != draw_many(second)
    again = Sampler(SamplingOptions(seed=first.seed))
    assert draw_many(again) == draw_many(Sampler(SamplingOptions(seed=first.seed)))


def test_filters_that_change_nothing_do_not_change_the_draws() -> None:
    row = np.random.default_rng(3).normal(size=3000)
    plain = Sampler(SamplingOptions(temperature=1.0, seed=5))
    filtered = Sampler(SamplingOptions(temperature=1.0, seed=5, top_k=3000, min_p=1e-300, top_p=1.0))
    assert [plain.sample(row) for _ in range(50)] == [filtered.sample(row) for _ in range(50)]


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    sampler = Sampler(SamplingOptions(temperature=temperature, seed=1))
    tokens = {sampler.sample([1.0, 3.0, -math.inf, 2.0]).token for _ in range(200)}
    assert tokens == ({1} if temperature < 1 else {0, 1, 3})


def test_extreme_logits() -> None:
    row = np.array([0.0, -3e38, 3e38, -math.inf], dtype=np.float32)
    for temperature in (0.0, 0.5, 2.0):
        options = SamplingOptions(
            temperature=temperature, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.1, seed=1
        )
        assert Sampler(options).sample(row, [0, 1, 2, 3]) == Choice(2, 0.0)
    assert [choice.token for choice in top_logprobs(row, 4)] == [2, 0, 1, 3]


# Bad input


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("temperature", value) for value in (-0.1, math.nan, math.inf, "1", None, True)),
        *(("top_k", value) for value in (-1, 1.5, "1", True)),
        *(("top_p", value) for value in (0, -0.1, 1.1, math.nan)),
        *(("min_p", value) for value in (-0.1, 1.1, math.nan)),
        *(("repetition_penalty", value) for value in (0, -1, 1e9, math.inf)),
        *(("frequency_penalty", value) for value in (-2.1, 2.1, math.nan)),
        *(("presence_penalty", value) for value in (-2.1, 2.1, "x")),
        *(("logit_bias", value) for value in ([1], {-1: 1.0}, {"1": 1.0}, {1: math.inf}, {1: 101}, {1: "x"})),
        *(("seed", value) for value in (-1, 2**64, 1.5, "1", False)),
    ],
)
def test_bad_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{option}"):
        SamplingOptions(**{option: value})


def test_options_cannot_be_changed() -> None:
    bias = {1: 1.0}
    options = SamplingOptions(logit_bias=bias)
    bias[2] = 5.0
    assert dict(options.logit_bias) == {1: 1.0}
    with pytest.raises(AttributeError):
        options.temperature = 1.0
    with pytest.raises(TypeError):
        options.logit_bias[1] = 2.0


@pytest.mark.parametrize(
    ("logits", "named"),
    [
        ([0.0, math.nan, 1.0], "NaN .first at token 1."),
        ([math.inf, math.nan], "NaN .first at token 1."),
        ([0.0, math.inf], "infinity"),
        ([-math.inf, -math.inf], "-infinity for every token"),
        ([], r"shape \(0,\)"),
        ([[0.0, 1.0]], r"shape \(1, 2\)"),
    ],
)
def test_bad_logits_are_named(logits: list[Any], named: str) -> None:
    for call in (lambda: Sampler().sample(logits), lambda: top_logprobs(logits, 1)):
        with pytest.raises(MpoError, match=f"^logits .*{named}"):
            call()


def test_ids_outside_the_vocabulary_are_named() -> None:
    with pytest.raises(ConfigError, match="^history holds token 3, expected ids from 0 to 1"):
        Sampler(SamplingOptions(presence_penalty=1)).sample([0.0, 1.0], [0, 3])
    with pytest.raises(ConfigError, match="^history holds token -1"):
        Sampler(SamplingOptions(repetition_penalty=2)).sample([0.0, 1.0], [-1])
    with pytest.raises(ConfigError, match="^prompt_length is 3"):
        Sampler(SamplingOptions(repetition_penalty=2)).sample([0.0, 1.0], [1], prompt_length=3)
    with pytest.raises(ConfigError, match="^logit_bias names token 2"):
        Sampler(SamplingOptions(logit_bias={2: 1.0})).sample([0.0, 1.0])
    for count in (-1, 3, 1.5, True):
        with pytest.raises(ConfigError, match="^top_logprobs is"):
            top_logprobs([0.0, 1.0], count)
