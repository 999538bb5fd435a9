"""Decoding speed and memory of the dense model and of the file, measured in turns on this machine."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from mpo_exporter.progress import Progress
from mpo_exporter.report.facts import Memory, Speed
from mpo_exporter.report.footprint import in_child
from mpo_formats import ConfigError
from mpo_runtime.model import Model
from mpo_runtime.sampler import SamplingOptions

# Short stretches are repeated more often: a moment of another program's would hit most of few.
LEAST_ROUNDS, MOST_ROUNDS = 5, 25
ALL_SECONDS = 6.0
# A stretch that is timed lasts about so long, within these numbers of tokens.
STRETCH_SECONDS = 0.5
LEAST_TOKENS, MOST_TOKENS = 4, 128
PROMPT_TOKENS = 16
MEMORY_TOKENS = 16
GREEDY = SamplingOptions(temperature=0)


def decode_seconds(model: Model, prompt: list[int], tokens: int) -> float:
    """Seconds that the model takes to decode so many tokens after a prompt, the prompt itself not counted."""
    steps = model.engine.generate(prompt, GREEDY, max_tokens=tokens + 1, stop_ids=())
    next(steps)
    start = time.perf_counter()
    for _ in steps:
        pass
    return time.perf_counter() - start


def decode_speed(dense: Model, compressed: Model, progress: Progress) -> Speed:
    """Times both models in turns, each going first in every second round, after a stretch that only warms up.

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
    """The memory of both models, each in a process of its own, or why it was not measured."""
    tokens = min(MEMORY_TOKENS, context - 2)
    theirs, ours = in_child(dense, tokens, threads), in_child(compressed, tokens, threads)
    if isinstance(theirs, str):
        return theirs
    if isinstance(ours, str):
        return ours
    return Memory(theirs[1], ours[1], theirs[0], ours[0], tokens)
