"""A model that takes part: its sizes, and the process that times it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mpo_formats import ConfigError, ModelSpec, MpoError, MpoFile
from mpo_formats.layout import content_tensors, linear_bytes
from mpo_runtime.loading import open_weights
from mpo_runtime.weights.store import resolve


@dataclass(frozen=True, slots=True)
class Contestant:
    """One model.

    bytes: of the file; of a folder, those of its tensors.
    parameters: numbers that it stores.
    read_bytes: of the weights that one step of decoding reads, at the χ that is used.
    """

    name: str
    path: Path
    spec: ModelSpec
    bytes: int
    parameters: int
    read_bytes: int
    baseline: bool = False


def open_contestant(
    file: str | Path, chi: int | None, *, baseline: bool = False, name: str | None = None
) -> Contestant:
    """Reads a model's sizes; raises MpoError where it cannot be opened."""
    place = resolve(file)
    weights = open_weights(place)
    try:
        spec = weights.spec
        tensors = sum(tensor.size for tensor in content_tensors(spec))
        size = weights.size if isinstance(weights, MpoFile) else tensors if place.is_dir() else place.stat().st_size
        return Contestant(
            name or place.name, place, spec, size, spec.stored_parameters(), step_bytes(spec, chi), baseline
        )
    finally:
        weights.close()


def step_bytes(spec: ModelSpec, chi: int | None) -> int:
    """Bytes of the weights that one step of decoding reads: all but an embedding that is not the head too."""
    used = spec.linears if spec.architecture.tie_word_embeddings else spec.linears[1:]
    return sum(linear_bytes(linear if chi is None else linear.truncated(chi)) for linear in used)


class Worker:
    """The process of one contestant; a context manager."""

    def __init__(self, contestant: Contestant) -> None:
        self.contestant = contestant
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mpo_runtime.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent alone
        )

    def ask(self, task: str, **request: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            ConfigError: with the worker's message, or where the process has ended.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise ConfigError(f"{self.contestant.name}: the process that times it has no pipes")
        try:
            self._process.stdin.write(json.dumps({"task": task, **request}) + "\n")
            self._process.stdin.flush()
            found = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            code = self._process.wait()
            why = "it was killed, probably for want of memory" if code in (-9, 137) else f"exit code {code}"
            raise ConfigError(f"{self.contestant.name}: the process that times it has ended ({why})") from None
        if "error" in found:
            raise MpoError(f"{self.contestant.name}: {found['error']}")
        return dict(found)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # what was never read
                    continue

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
