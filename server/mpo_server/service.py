"""What all endpoints share: the model once it is loaded, the places in the queue, counts, the server's settings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.concurrency import run_in_threadpool

from mpo_runtime import __version__
from mpo_server.errors import ApiError, overloaded
from mpo_server.metrics import Metrics
from mpo_server.settings import Settings

if TYPE_CHECKING:
    from mpo_runtime.model import Model
    from mpo_server.structure import Compiler, Grammar

Result = TypeVar("Result")
BUSY_SECONDS = 2  # what Retry-After says where nothing is known yet


class Service:
    """The server's state. Everything here belongs to the event loop's thread, except the model, which is thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.created = int(time.time())
        self.metrics = Metrics()
        self.draining = False
        self.fingerprint = f"mpo-runtime-{__version__}"
        self._model: Model | None = None
        self._compiler: Compiler | None = None
        self._compiling = asyncio.Lock()
        self.props: dict[str, Any] | None = None  # what /props tells, once it was asked
        self.slots: list[list[int]] = [[] for _ in range(settings.parallel)]  # ids of the last text of each
        self._next_slot = 0
        self._taken = 0  # texts that are generated or wait
        self._seconds = 0.0  # a running mean of how long a request takes

    @property
    def model(self) -> Model:
        """The model; raises ApiError while it is loaded."""
        if self._model is None:
            raise ApiError(503, "the model is being loaded", code="loading", headers={"Retry-After": "1"})
        return self._model

    @property
    def compiler(self) -> Compiler:
        """Compiles grammars for the model."""
        if self._compiler is None:
            from mpo_server.structure import Compiler

            self._compiler = Compiler(self.model)
        return self._compiler

    def open(self, model: Model) -> None:
        """Takes the loaded model."""
        self._model = model
        self.metrics.watch(model)

    def close(self) -> None:
        """Ends what was started for the model."""
        if self._compiler is not None:
            self._compiler.close()

    @property
    def taken(self) -> int:
        """Texts that are generated or wait."""
        return self._taken

    @contextmanager
    def place(self, count: int) -> Iterator[None]:
        """Places for the texts of a request, in the batch or in the queue; raises ApiError where the queue is full."""
        most = self.settings.parallel + self.settings.max_queue
        if self._taken + count > most:
            self.metrics.refused.inc()
            waiting = max(0, self._taken - self.settings.parallel)
            raise overloaded(waiting, max(1, round(self._seconds * waiting / self.settings.parallel) or BUSY_SECONDS))
        start = time.monotonic()
        self._taken += count
        try:
            yield
        finally:
            self._taken -= count
            self._seconds += 0.2 * (time.monotonic() - start - self._seconds)

    def remember(self, slot: int, ids: list[int]) -> None:
        """Notes the ids of a text that ended as a slot's; -1 takes the slots in turn."""
        if slot < 0:
            slot, self._next_slot = self._next_slot, (self._next_slot + 1) % len(self.slots)
        self.slots[slot] = ids

    def deadline(self) -> float:
        """When a request that begins now must have ended, on the event loop's clock."""
        return asyncio.get_running_loop().time() + self.settings.timeout

    async def compile(self, source: str, param: str) -> Grammar:
        """Compiles a grammar in a thread, one at a time; raises ApiError where that fails (Compiler.compile)."""
        compiler = self.compiler
        async with self._compiling:
            return await run_in_threadpool(lambda: compiler.compile(source, param))

    async def work(self, function: Callable[[], Result]) -> Result:
        """Runs what takes long (templates, tokenising, compiling) in a thread."""
        return await run_in_threadpool(function)
