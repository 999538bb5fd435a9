"""What the dense model and the file do when they run on this machine: decoding speed, memory, and generated text."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from mpo_exporter.progress import Progress
from mpo_exporter.report.facts import Memory, Prompt, Sample, Speed, Texts
from mpo_exporter.report.footprint import in_child
from mpo_formats import ConfigError
from mpo_runtime.model import Model
from mpo_runtime.sampler import SamplingOptions

# Rounds that speed is measured in; short ones are repeated more often, because another program disturbs them more.
LEAST_ROUNDS, MOST_ROUNDS = 5, 25
# About the seconds that all rounds together and that one decoding take, the latter within these numbers of tokens.
ALL_SECONDS = 6.0
STRETCH_SECONDS = 0.5
LEAST_TOKENS, MOST_TOKENS = 4, 128
PROMPT_TOKENS = 16
MEMORY_TOKENS = 16
GREEDY = SamplingOptions(temperature=0)
# Prompts of the generated text, and whether each is a chat turn.
PROMPTS = (
    ("Once upon a time, there was a little", False),
    ("Water is important for life because", False),
    ("The main difference between the two is", False),
    ("I want to book a table at a restaurant.", True),
    ("Why is the sky blue?", True),
    ("Write a short story about a dog that finds a key.", True),
)
# The most tokens of a continuation, and the fewest where the time is limited.
TEXT_TOKENS = 96
LEAST_TEXT_TOKENS = 8
TEMPERATURE, SEED = 0.7, 1
SAMPLING = SamplingOptions(temperature=TEMPERATURE, seed=SEED)
# The length of the sequences whose repetition is counted.
GRAM = 4
# A continuation that ends within this share of the limit ends early.
EARLY_SHARE = 1 / 8
# Seconds that all continuations together may take.
TEXT_SECONDS = 20.0


def decode_seconds(model: Model, prompt: list[int], tokens: int) -> float:
    """Seconds that a model takes to decode `tokens` tokens after a prompt, without the time for the prompt."""
    steps = model.engine.generate(prompt, GREEDY, max_tokens=tokens + 1, stop_ids=())
    next(steps)
    start = time.perf_counter()
    for _ in steps:
        pass
    return time.perf_counter() - start


def decode_speed(dense: Model, compressed: Model, progress: Progress) -> Speed:
    """Measures the decoding speed of both models in turns, after one decoding that only warms up.

    The model that goes first alternates from round to round.

    Raises:
        ConfigError: for a context that is too short to decode in.
    """
    room = min(dense.engine.context, compressed.engine.context) - PROMPT_TOKENS - 2
    if room < LEAST_TOKENS:
        raise ConfigError(f"speed: a context of {room + PROMPT_TOKENS + 2} tokens is too short to time decoding")
    vocabulary = dense.network.architecture.vocab_size
    prompt = [(7 * place + 3) % vocabulary for place in range(PROMPT_TOKENS)]
    slowest = max(decode_seconds(model, prompt, LEAST_TOKENS) for model in (dense, compressed)) / LEAST_TOKENS
    tokens = max(LEAST_TOKENS, min(MOST_TOKENS, room, int(STRETCH_SECONDS / max(slowest, 1e-9))))
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(ALL_SECONDS / (2 * tokens * max(slowest, 1e-9))))) | 1
    rates: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for index in (0, 1) if number % 2 == 0 else (1, 0):
            rates[index].append(tokens / decode_seconds((dense, compressed)[index], prompt, tokens))
        progress("speed", number + 1, rounds)
    medians = statistics.median(rates[0]), statistics.median(rates[1])
    return Speed(
        dense=tuple(rates[0]),
        compressed=tuple(rates[1]),
        dense_median=medians[0],
        median=medians[1],
        tokens=tokens,
        prompt_tokens=PROMPT_TOKENS,
        slower=medians[1] < medians[0],
    )


def memory_use(dense: Path, compressed: Path, context: int, threads: int | None) -> Memory | str:
    """The memory of both models, each in a process of its own, or the reason why it was not measured."""
    tokens = min(MEMORY_TOKENS, context - 2)
    theirs, ours = in_child(dense, tokens, threads), in_child(compressed, tokens, threads)
    if isinstance(theirs, str):
        return theirs
    if isinstance(ours, str):
        return ours
    return Memory(theirs[1], ours[1], theirs[0], ours[0], tokens)


def write_texts(dense: Model | None, compressed: Model, slowest: float | None, progress: Progress) -> Texts | str:
    """Continuations of the prompts by both models, or the reason why there are none.

    Chat turns are left out where the model has no chat template.

    Args:
        slowest: the speed of the slower model in tokens per second, None where it is not known.
    """
    if compressed.tokenizer is None:
        return "the model has no tokenizer.json"
    bounds = limits(compressed.engine.context, slowest)
    room = compressed.engine.context - bounds.tokens
    found = []
    for number, (text, chat) in enumerate(PROMPTS, 1):
        if (chat and compressed.template is None) or prompt_length(compressed, text, chat) > room:
            continue
        theirs = sample(dense, text, chat, bounds) if dense else None
        found.append(Prompt(text, chat, theirs, sample(compressed, text, chat, bounds)))
        progress("texts", number, len(PROMPTS))
    if not found:
        return "no prompt fits into the context"
    ours, theirs_all = [one.compressed for one in found], [one.dense for one in found if one.dense]
    return Texts(
        temperature=TEMPERATURE,
        seed=SEED,
        limit=bounds.tokens,
        early_tokens=bounds.early,
        dense_repeated=sum(one.repeated for one in theirs_all) / len(theirs_all) if theirs_all else None,
        repeated=sum(one.repeated for one in ours) / len(ours),
        dense_early=sum(one.early for one in theirs_all) if theirs_all else None,
        early=sum(one.early for one in ours),
        prompts=tuple(found),
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """The most new tokens of a continuation, and the number of tokens before which its end counts as early."""

    tokens: int
    early: int


def limits(context: int, slowest: float | None) -> Limits:
    """The limits for a context length and the speed of the slower model in tokens per second."""
    allowed = (
        TEXT_TOKENS if slowest is None else max(LEAST_TEXT_TOKENS, int(TEXT_SECONDS * slowest / (2 * len(PROMPTS))))
    )
    tokens = max(1, min(TEXT_TOKENS, allowed, context // 2))
    return Limits(tokens, max(1, int(tokens * EARLY_SHARE)))


def sample(model: Model, prompt: str, chat: bool, bounds: Limits) -> Sample:
    """One continuation by a model."""
    pieces = list(
        model.chat([{"role": "user", "content": prompt}], max_tokens=bounds.tokens, sampling=SAMPLING)
        if chat
        else model.generate(prompt, max_tokens=bounds.tokens, sampling=SAMPLING)
    )
    finish = pieces[-1].finish or "length"
    tokens = [piece.token for piece in pieces]
    said = tokens[:-1] if finish == "stop" else tokens
    early = finish == "stop" and len(said) < bounds.early
    return Sample("".join(piece.text for piece in pieces), len(said), finish, repeated_share(said), early)


def prompt_length(model: Model, text: str, chat: bool) -> int:
    """The number of tokens of a prompt, as the model is given it."""
    if chat:
        return len(model.encode_chat([{"role": "user", "content": text}]))
    return len(model.text_tokenizer().encode(text, add_special_tokens=True))


def repeated_share(tokens: list[int], size: int = GRAM) -> float:
    """The share of a text's n-grams of tokens that occurred in it before; 0 for a text without any."""
    grams = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
