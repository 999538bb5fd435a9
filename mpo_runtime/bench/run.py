"""Runs a benchmark: every round times each model once at each test, and the read bandwidth of the machine beside them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from mpo_formats import ConfigError
from mpo_runtime.bench.contestant import Contestant, Worker
from mpo_runtime.bench.meters import read_bandwidth
from mpo_runtime.bench.settings import BenchSettings, Case, groups

# Called with the stage, the number of measurements done and their total.
Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class Series:
    """The repetitions of one test with one model: seconds of each, and joules where they can be read."""

    contestant: Contestant
    test: Case
    cache_token_bytes: float = 0.0
    seconds: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each repetition, all sequences of the batch together."""
        return [self.test.tokens * self.test.batch / seconds for seconds in self.seconds]

    def moved_bytes(self) -> float | None:
        """Bytes that decoding one token of each sequence reads: the weights once, and every sequence's cache."""
        if self.test.kind == "prompt":
            return None
        context = self.test.depth + (self.test.tokens + 1) / 2
        return self.contestant.read_bytes + self.test.batch * self.cache_token_bytes * context


@dataclass(slots=True)
class Outcome:
    """All that was measured, also where the benchmark was interrupted.

    series: by model and test, in the order of the table.
    bandwidths: GB/s of each round, by number of threads.
    facts: of each model's process, by name: seconds to load, backend, kernels, `loaded_bytes` and `peak_bytes`.
    """

    settings: BenchSettings
    contestants: Sequence[Contestant]
    series: dict[tuple[str, tuple[Any, ...]], Series] = field(default_factory=dict)
    bandwidths: dict[int, list[float]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    complete: bool = False

    def find(self, contestant: Contestant, test: Case) -> Series:
        """The series of a model at a test; made where there is none yet."""
        return self.series.setdefault((contestant.name, test.key), Series(contestant, test))

    def bandwidth(self, threads: int) -> float | None:
        """The median read bandwidth in GB/s, None where none was measured."""
        found = self.bandwidths.get(threads)
        return statistics.median(found) if found else None


def measure(
    contestants: Sequence[Contestant],
    settings: BenchSettings,
    options: Mapping[str, Any],
    progress: Progress,
) -> Outcome:
    """Times all models in turns; Ctrl-C ends it early with what there is.

    Args:
        options: of `load_network`; a baseline is loaded without `chi`.

    Raises:
        ConfigError: for a model that cannot be loaded, or a context that is too short for a test.
    """
    for contestant in contestants:
        settings.check_context(contestant.name, contestant.spec.architecture)
    outcome = Outcome(settings, contestants)
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(contestant)) for contestant in contestants]
        try:
            for worker in workers:
                contestant = worker.contestant
                chosen = {**options, "chi": None} if contestant.baseline else dict(options)
                outcome.facts[contestant.name] = worker.ask("load", file=str(contestant.path), options=chosen)
            _time_all(workers, outcome, progress)
            outcome.complete = True
        except KeyboardInterrupt:
            if not any(series.seconds for series in outcome.series.values()):
                raise
    return outcome


def _time_all(workers: Sequence[Worker], outcome: Outcome, progress: Progress) -> None:
    settings = outcome.settings
    tests = settings.tests()
    total, done = len(tests) * len(workers) * (settings.repetitions + 1), 0
    for group in groups(tests):
        rows, capacity = group[0].batch, settings.capacity()
        per_token = {}
        for worker in workers:
            progress("filling the context", done, total)
            found = worker.ask("prepare", rows=rows, capacity=capacity, depth=max(test.depth for test in group))
            per_token[worker.contestant.name] = found["cache_bytes"] / (rows * capacity)
        for number in range(-1, settings.repetitions):  # −1 warms up
            for test in group:
                if number >= 0:
                    outcome.bandwidths.setdefault(test.threads, []).append(read_bandwidth(test.threads))
                for worker in _turn(workers, number):
                    found = worker.ask(
                        "time",
                        kind=test.kind,
                        tokens=test.tokens,
                        depth=test.depth,
                        threads=test.threads,
                        warm=number < 0,
                    )
                    done += 1
                    progress("measuring" if number >= 0 else "warming up", done, total)
                    if number < 0:
                        continue
                    series = outcome.find(worker.contestant, test)
                    series.cache_token_bytes = per_token[worker.contestant.name]
                    series.seconds.append(found["seconds"])
                    if found["joules"] is not None:
                        series.joules.append(found["joules"])
            for worker in workers:  # after each round, so that an interrupted run has the figure too
                outcome.facts[worker.contestant.name] |= worker.ask("peak")


def _turn(workers: Sequence[Worker], number: int) -> list[Worker]:
    """The models in the order of one round: another one begins each time."""
    first = max(number, 0) % len(workers)
    return [*workers[first:], *workers[:first]]


def check_same_model(contestants: Sequence[Contestant], baseline: Contestant) -> None:
    """Raises ConfigError where the baseline has other sizes than the models that are compared with it."""
    for contestant in contestants:
        for field_name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"):
            ours = getattr(contestant.spec.architecture, field_name)
            theirs = getattr(baseline.spec.architecture, field_name)
            if ours != theirs:
                raise ConfigError(
                    f"{contestant.name}: {field_name} is {ours}, that of the baseline {baseline.name} {theirs}; "
                    "give the dense model that the file was made from"
                )
