"""Drawing the next token from one row of logits, in numpy alone.

The order is fixed: repetition penalty, frequency and presence penalties, logit bias, temperature, top-k, top-p, min-p,
draw. Each filter takes the renormalised result of the one before it. Temperature 0 takes the largest logit after penalties
and bias (of equal ones the lowest token id) and applies no filter.

The draw is computed in float64 from float32 logits, so equal logits and an equal seed give the same token.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from mpo_formats.errors import ConfigError, MpoError

_Floats = npt.NDArray[np.float64]
_Ids = npt.NDArray[np.int64]
_FIRST_NUCLEUS = 256  # most probable tokens that top-p sorts first; it takes more where they do not suffice


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How the next token is drawn; the defaults sample at temperature 0.7 from the whole distribution.

    temperature ≥ 0 (0 is greedy); top_k ≥ 0 (0 is off); 0 < top_p ≤ 1 (1 is off); 0 ≤ min_p ≤ 1 (0 is off);
    repetition_penalty in 0.01 … 100 (1 is off); frequency_penalty and presence_penalty in -2 … 2 (0 is off);
    logit_bias maps token ids to numbers in -100 … 100 that are added to their logits; seed in 0 … 2^64 - 1, or None
    for one drawn from the system.

    Raises:
        ConfigError: naming the option that is out of range.
    """

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        _check(_is_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _check(_is_integer(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "a whole number, 0 for no limit")
        _check(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        penalty = self.repetition_penalty
        good = _is_number(penalty) and 0.01 <= penalty <= 100
        _check(good, "repetition_penalty", penalty, "between 0.01 and 100 (1 is off)")
        for name in ("frequency_penalty", "presence_penalty"):
            penalty = getattr(self, name)
            _check(_is_number(penalty) and -2 <= penalty <= 2, name, penalty, "between -2 and 2")
        _check(isinstance(self.logit_bias, Mapping), "logit_bias", self.logit_bias, "a mapping of token id to number")
        for token, bias in self.logit_bias.items():
            _check(_is_integer(token) and token >= 0, "logit_bias", token, "token ids of 0 or more as keys")
            good = _is_number(bias) and -100 <= bias <= 100
            _check(good, f"logit_bias[{token}]", bias, "between -100 (never) and 100 (always)")
        seed_is_good = self.seed is None or (_is_integer(self.seed) and 0 <= self.seed < 2**64)
        _check(seed_is_good, "seed", self.seed, "a whole number between 0 and 2^64 - 1")
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias)))

    @property
    def repeatable(self) -> bool:
        """Whether the same logits give the same token each time: with a seed, or at temperature 0."""
        return self.seed is not None or self.temperature == 0


@dataclass(frozen=True, slots=True)
class Choice:
    """A token and its log-probability in nats under the model's own distribution.

    This is the log-softmax of the raw logits, before penalties, bias, temperature and filters, as in OpenAI's `logprobs`.
    """

    token: int
    logprob: float


class Sampler:
    """Draws tokens with one set of options and a random stream of its own; not to be shared between threads.

    `seed` is the seed in use: that of the options, or one drawn from the system where that is None.
    """

    def __init__(self, options: SamplingOptions | None = None) -> None:
        self.options = options if options is not None else SamplingOptions()
        self.seed = self.options.seed if self.options.seed is not None else secrets.randbits(64)
        self._generator = np.random.Generator(np.random.PCG64(self.seed))

    def sample(self, logits: npt.ArrayLike, history: Sequence[int] = (), *, prompt_length: int = 0) -> Choice:
        """Draws the next token from logits [vocab].

        Args:
            history: the token ids so far, which the repetition penalty counts.
            prompt_length: how many of them are the prompt; the frequency and presence penalties count only those after it,
                as OpenAI defines them.

        Raises:
            MpoError: when the logits have NaN or infinity, or allow no token.
            ConfigError: when the history or the bias has a token outside the vocabulary.
        """
        raw = _checked(logits)
        scores = raw.copy()
        _penalise(scores, history, prompt_length, self.options)
        _add_bias(scores, self.options.logit_bias)
        token = int(scores.argmax()) if self.options.temperature == 0 else self._draw(scores)
        return Choice(token, float(raw[token] - _log_sum_exp(raw)))

    def _draw(self, scores: _Floats) -> int:
        """Applies temperature and filters, and draws by inverting the cumulative distribution in order of token id."""
        tokens, probabilities = filtered_distribution(scores, self.options)
        cumulative = np.cumsum(probabilities)
        index = int(np.searchsorted(cumulative, self._generator.random() * cumulative[-1], side="right"))
        # Where the product rounds up to the total, the index would be past the last token of non-zero probability.
        return int(tokens[min(index, int(np.flatnonzero(probabilities)[-1]))])


def without(logits: npt.NDArray[np.float32], unused: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Logits [vocabulary] in which ids that stand for no token are impossible: models pad their tables."""
    if not unused.size:
        return logits
    kept = logits.copy()
    kept[unused] = -np.inf
    return kept


def top_logprobs(logits: npt.ArrayLike, count: int) -> list[Choice]:
    """The `count` most probable tokens of logits [vocab], most probable first, of equal ones the lower token id first.

    Raises:
        ConfigError: for a count that is negative or larger than the vocabulary.
        MpoError: when the logits have NaN or infinity.
    """
    raw = _checked(logits)
    if not _is_integer(count) or not 0 <= count <= raw.size:
        raise ConfigError(f"top_logprobs is {count!r}, expected 0 to {raw.size}, the size of the vocabulary")
    if count == 0:
        return []
    tokens = _top_k(raw, count)
    tokens = tokens[np.argsort(-raw[tokens], kind="stable")]
    normaliser = _log_sum_exp(raw)
    return [Choice(int(token), float(raw[token] - normaliser)) for token in tokens]


def logprob(logits: npt.ArrayLike, token: int) -> float:
    """The log-probability of a token under logits [vocab], in nats; raises MpoError as `Sampler.sample` does."""
    raw = _checked(logits)
    return float(raw[token] - _log_sum_exp(raw))


def filtered_distribution(scores: _Floats, options: SamplingOptions) -> tuple[_Ids, _Floats]:
    """The distribution from which a token is drawn, given scores [vocab] after penalties and bias; temperature is not 0.

    Returns token ids in ascending order and their probabilities, which sum to 1.

    - temperature T: softmax(scores / T) (Ackley, Hinton, Sejnowski 1985).
    - top-k: the k largest scores, ties by the lower token id (Fan, Lewis, Dauphin 2018, arXiv:1805.04833).
    - top-p: the smallest set of most probable tokens whose probabilities sum to p or more, ties by the lower token id
      (nucleus sampling: Holtzman et al. 2019, arXiv:1904.09751).
    - min-p: the tokens whose probability is at least min_p times the largest one (Nguyen et al. 2024,
      arXiv:2407.01082).
    """
    peak = scores.max()
    tokens = np.arange(scores.size)
    if 0 < options.top_k < scores.size:
        tokens = _top_k(scores, options.top_k)
        scores = scores[tokens]
    with np.errstate(over="ignore"):  # a tiny temperature makes all but the largest score -inf, which is right
        probabilities = np.exp((scores - peak) / options.temperature)
    probabilities /= probabilities.sum()
    if options.top_p < 1:
        kept = _nucleus(probabilities, options.top_p)
        tokens, probabilities = tokens[kept], probabilities[kept]
    if options.min_p > 0:
        likely = probabilities >= options.min_p * probabilities.max()
        tokens, probabilities = tokens[likely], probabilities[likely]
    return tokens, probabilities / probabilities.sum()


def _top_k(scores: _Floats, count: int) -> _Ids:
    """The ids of the `count` largest scores, ascending; of equal scores at the edge the lower ids. O(vocab)."""
    edge = np.partition(scores, scores.size - count)[scores.size - count]
    above = np.flatnonzero(scores > edge)
    equal = np.flatnonzero(scores == edge)[: count - above.size]
    return np.sort(np.concatenate([above, equal]))


def _nucleus(probabilities: _Floats, mass: float) -> _Ids:
    """The indices, ascending, of the smallest most probable set with at least this mass; sorts only what it needs."""
    size = _FIRST_NUCLEUS
    while True:
        if size < probabilities.size:
            edge = np.partition(probabilities, probabilities.size - size)[probabilities.size - size]
            candidates = np.flatnonzero(
                probabilities >= edge
            )  # with all ties at the edge, so that the order is defined
        else:
            candidates = np.arange(probabilities.size)
        candidates = candidates[np.argsort(-probabilities[candidates], kind="stable")]
        cumulative = np.cumsum(probabilities[candidates])
        if cumulative[-1] >= mass or candidates.size == probabilities.size:
            count = int(np.searchsorted(cumulative, mass, side="left")) + 1
            return np.sort(candidates[:count])
        size *= 8


def _penalise(scores: _Floats, history: Sequence[int], prompt_length: int, options: SamplingOptions) -> None:
    """Applies the penalties on repetition to scores [vocab] in place.

    - repetition_penalty θ, on every token of the history once: s/θ where s > 0, s·θ elsewhere (Keskar et al. 2019,
      arXiv:1909.05858, in the form for logits of both signs that transformers uses).
    - frequency_penalty α, presence_penalty β, with c the count of the token after the prompt: s - α·c - β·[c > 0]
      (OpenAI API reference, "Frequency and presence penalties").
    """
    counted = bool(options.frequency_penalty or options.presence_penalty)
    if not len(history) or not (counted or options.repetition_penalty != 1):
        return
    if not 0 <= prompt_length <= len(history):
        raise ConfigError(f"prompt_length is {prompt_length}, expected 0 to {len(history)}, the length of the history")
    tokens = np.asarray(history, dtype=np.int64)
    if tokens.min() < 0 or tokens.max() >= scores.size:
        outside = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
        raise ConfigError(f"history holds token {outside}, expected ids from 0 to {scores.size - 1}")
    if options.repetition_penalty != 1:
        seen = np.unique(tokens)
        penalty = options.repetition_penalty
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    if counted:
        counts = np.bincount(tokens[prompt_length:], minlength=scores.size)
        scores -= options.frequency_penalty * counts + options.presence_penalty * (counts > 0)


def _add_bias(scores: _Floats, bias: Mapping[int, float]) -> None:
    """Adds logit_bias to scores [vocab] in place (OpenAI API reference, `logit_bias`)."""
    for token, value in bias.items():
        if token >= scores.size:
            raise ConfigError(f"logit_bias names token {token}, expected ids from 0 to {scores.size - 1}; remove it")
        scores[token] += value


def _checked(logits: npt.ArrayLike) -> _Floats:
    """The logits as float64 [vocab]; raises MpoError unless they are one row without NaN whose maximum is finite."""
    row = np.asarray(logits, dtype=np.float64)
    if row.ndim != 1 or row.size == 0:
        raise MpoError(f"logits have shape {row.shape}, expected one row [vocab]")
    if not math.isfinite(row.max()):  # the maximum of a row with NaN is NaN
        if np.isnan(row).any():
            token = int(np.flatnonzero(np.isnan(row))[0])
            raise MpoError(f"logits hold NaN (first at token {token}), expected numbers; the model file is damaged")
        found = "infinity" if row.max() > 0 else "-infinity for every token"
        raise MpoError(f"logits hold {found}, expected numbers; the model file is damaged")
    return row


def _log_sum_exp(row: _Floats) -> float:
    """log Σ exp(row), accurate to about 1e-7: exp in float32, which is several times faster, and the sum in float64."""
    peak = float(row.max())
    differences = np.maximum(row - peak, -200.0).astype(np.float32)  # exp(-200) is 0 in float32
    return peak + math.log(float(np.exp(differences).sum(dtype=np.float64)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.floating) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check(good: bool, name: str, value: object, expected: str) -> None:
    if not good:
        raise ConfigError(f"{name} is {value!r}, expected {expected}")
