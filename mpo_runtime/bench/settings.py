"""What a benchmark measures: the tests of one run (`Case`), checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mpo_formats import Architecture, ConfigError
from mpo_runtime.loading import checked_threads
from mpo_runtime.machine import usable_cpus

Kind = Literal["prompt", "decode"]


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that is timed: `tokens` of a prompt, or decoded one by one, after `depth` tokens of context.

    batch: sequences that are run at once; each has `depth` tokens before and gets `tokens` new ones.
    """

    kind: Kind
    tokens: int
    depth: int
    batch: int
    threads: int

    @property
    def name(self) -> str:
        """A short name in llama-bench's manner: `pp512`, `tg128 @ 4096`."""
        short = f"{'pp' if self.kind == 'prompt' else 'tg'}{self.tokens}"
        return short if self.depth == 0 else f"{short} @ {self.depth}"

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells one test from another."""
        return (self.kind, self.tokens, self.depth, self.batch, self.threads)


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """The values of every option; a test is made for each combination.

    Raises:
        ConfigError: for a value out of range, or where nothing is left to measure.
    """

    prompt: tuple[int, ...] = (512,)
    tokens: tuple[int, ...] = (128,)
    depth: tuple[int, ...] = (0,)
    batch: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = ()
    repetitions: int = 5

    def __post_init__(self) -> None:
        for name, values, least in (
            ("-p", self.prompt, 0),
            ("-n", self.tokens, 0),
            ("-d", self.depth, 0),
            ("-b", self.batch, 1),
        ):
            for value in values:
                if value < least:
                    raise ConfigError(f"{name}: expected {least} or more, found {value}")
        for value in self.threads:
            checked_threads(value)
        if self.repetitions < 1:
            raise ConfigError(f"-r: expected 1 or more repetitions, found {self.repetitions}")
        if not self.tests():
            raise ConfigError("-p 0 and -n 0: nothing is left to measure; give a number of tokens to one of them")

    def tests(self) -> list[Case]:
        """All tests, those of equal batch side by side."""
        kinds: tuple[tuple[Kind, tuple[int, ...]], ...] = (("prompt", self.prompt), ("decode", self.tokens))
        return [
            Case(kind, tokens, depth, batch, threads)
            for batch in dict.fromkeys(self.batch)
            for threads in dict.fromkeys(self.threads or (usable_cpus(),))
            for depth in dict.fromkeys(self.depth)
            for kind, counts in kinds
            for tokens in dict.fromkeys(counts)
            if tokens
        ]

    def capacity(self) -> int:
        """Tokens of context that the longest test needs."""
        return max(self.depth) + max(*self.prompt, *self.tokens)

    def check_context(self, name: str, architecture: Architecture) -> None:
        """Raises ConfigError where the model's longest context is too short for a test."""
        longest = architecture.max_position_embeddings
        if self.capacity() > longest:
            raise ConfigError(
                f"{name}: {max(self.depth)} tokens of depth and {max(*self.prompt, *self.tokens)} new ones do not fit into "
                f"the model's context of {longest}; lower -d, -p or -n"
            )


def parse_counts(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers separated by commas; raises ConfigError for anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text}: expected whole numbers separated by commas, such as 0,4096") from None


def groups(tests: Sequence[Case]) -> list[list[Case]]:
    """The tests by batch: those of one group share a KV cache."""
    found: dict[int, list[Case]] = {}
    for test in tests:
        found.setdefault(test.batch, []).append(test)
    return list(found.values())
