"""Shows how healing goes on: stage, steps, tokens a second and the loss."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

# Seconds between lines where standard error is no terminal.
EVERY = 10.0


class Progress(Protocol):
    """Takes a stage, the share of it that is done, and figures to show."""

    def __call__(self, stage: str, done: float, detail: str = "") -> None:
        """Shows them."""
        ...


def silent(stage: str, done: float, detail: str = "") -> None:
    """Progress that is not shown."""


@contextmanager
def shown(description: str) -> Iterator[Progress]:
    """A bar on standard error, or a line every ten seconds where that is no terminal."""
    if not sys.stderr.isatty():
        yield _Lines(description)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def update(stage: str, done: float, detail: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=1.0, detail=detail)
            bars.update(tasks[stage], completed=done, detail=detail)

        yield update


class _Lines:
    def __init__(self, description: str) -> None:
        self.description = description
        self.last = time.monotonic()

    def __call__(self, stage: str, done: float, detail: str = "") -> None:
        now = time.monotonic()
        if now - self.last >= EVERY:
            self.last = now
            print(f"{self.description}: {stage} {100 * done:.0f} % {detail}".rstrip(), file=sys.stderr, flush=True)
