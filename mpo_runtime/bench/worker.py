"""The process that holds one model and times it: `python -m mpo_runtime.bench.worker`, driven by lines of JSON.

A process for each model keeps their memory apart, and only one of them works at a time. Each line of standard input asks for
one thing (`load`, `prepare`, `time`, `peak`) and is answered by one line; an error of the input is answered as one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import IO, Any

import numpy as np

from mpo_formats import MpoError
from mpo_runtime import native
from mpo_runtime.bench.meters import Energy
from mpo_runtime.engine import PREFILL_CHUNK
from mpo_runtime.loading import load_network, open_weights, set_threads
from mpo_runtime.memory import peak_memory
from mpo_runtime.models.decoder import Decoder

# New tokens that warm a test up: a chunk of a prompt, and a few decoded ones.
WARM_DECODED = 4


class Session:
    """A loaded model with a KV cache of as many rows as the present group of tests has sequences."""

    def __init__(self, file: str, options: dict[str, Any]) -> None:
        start = time.perf_counter()
        self.weights = open_weights(file)
        self.network: Decoder = load_network(self.weights, **options)
        self.load_seconds = time.perf_counter() - start
        self.energy = Energy()
        self.random = np.random.default_rng(0)
        self.cache: Any = None
        self.rows = self.filled = 0

    def facts(self) -> dict[str, Any]:
        """What the parent wants to know of the loaded model."""
        backend = self.network.ops.name
        kernels = native.active() if backend == "native" else {"native": "not used"}
        return {
            "load_seconds": self.load_seconds,
            "backend": backend,
            "kernels": kernels,
            "loaded_bytes": peak_memory(),
        }

    def prepare(self, rows: int, capacity: int, depth: int) -> dict[str, Any]:
        """Makes a KV cache of `rows` sequences, and really runs the first `depth` tokens of each."""
        self.cache = None
        self.cache = self.network.ops.new_cache(self.network.architecture, rows, capacity)
        self.rows, self.filled = rows, depth
        if depth:
            self.advance(self.tokens(depth))
        return {"cache_bytes": getattr(self.cache, "nbytes", 0)}

    def tokens(self, count: int) -> list[list[int]]:
        """Random token ids [rows, count]."""
        return self.random.integers(0, self.network.architecture.vocab_size, (self.rows, count)).tolist()  # type: ignore[no-any-return]

    def advance(self, ids: list[list[int]]) -> list[int]:
        """Runs new tokens [rows, S] in chunks; returns the most likely next token of each row."""
        hidden: Any = None
        for start in range(0, len(ids[0]), PREFILL_CHUNK):
            part = [row[start : start + PREFILL_CHUNK] for row in ids]
            hidden = self.network.hidden(self.network.ops.ids(part), self.cache, [len(part[0])] * self.rows)
        logits = self.network.ops.to_numpy(self.network.logits(hidden[:, -1:]))
        return [int(token) for token in logits[:, 0].argmax(-1)]

    def time(self, kind: str, tokens: int, depth: int, threads: int, warm: bool) -> dict[str, Any]:
        """Seconds and joules of one test; a prompt's include the choice of the first new token."""
        if self.network.ops.name == "native":
            native.set_threads(threads)
        else:
            set_threads(threads)
        if warm:
            tokens = min(tokens, PREFILL_CHUNK if kind == "prompt" else WARM_DECODED)
        # Keys and values at the first `depth` positions may be those of another test: what they are does not change the time.
        self.cache.rewind(0)
        if depth:
            self.cache.advance([depth] * self.rows)
        ids = self.tokens(tokens if kind == "prompt" else 1)
        before, start = self.energy.now(), time.perf_counter()
        if kind == "prompt":
            self.advance(ids)
        else:
            for _ in range(tokens):
                ids = [[token] for token in self.advance(ids)]
        return {"seconds": time.perf_counter() - start, "joules": self.energy.since(before)}


def answer(session: Session | None, request: dict[str, Any]) -> tuple[Session | None, dict[str, Any]]:
    """Does what one line asks for."""
    task = request.pop("task")
    if task == "load":
        session = Session(**request)
        return session, session.facts()
    if task == "peak":
        return session, {"peak_bytes": peak_memory()}
    if session is None:
        raise MpoError(f"{task}: no model is loaded")
    return session, session.prepare(**request) if task == "prepare" else session.time(**request)


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answers lines until they end."""
    session: Session | None = None
    for line in requests:
        try:
            session, found = answer(session, json.loads(line))
        except (MpoError, MemoryError, OSError) as error:
            text = "out of memory; use smaller values of -d, -b or -p" if isinstance(error, MemoryError) else str(error)
            found = {"error": text}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def main() -> None:
    """Answers on standard output alone; what libraries print there goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
