"""Progress of an export: one bar on a terminal, else a line every ten seconds, with what is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from mpo_exporter.progress import Progress

# Seconds between two lines.
EVERY = 10.0
# What is counted in each stage.
COUNTED = {"gradients": "blocks", "outputs": "blocks", "measuring": "windows"}


@dataclass(slots=True)
class Pace:
    """How far an export is, told from the share of work that its stages are expected to have.

    Args:
        stages: the work of each stage, in any unit, in the order of the stages; a stage that is not named has none.
        megabytes: of the file to write; an estimate until the plan is made (`planned`).
    """

    stages: Mapping[str, float]
    megabytes: float
    started: float = field(default_factory=lambda: time.monotonic())
    first: float | None = None

    def planned(self, file_bytes: int) -> None:
        """Takes the size of the file from its plan."""
        self.megabytes = file_bytes / 1e6

    def share(self, stage: str, done: int, total: int) -> float:
        """The share of all work that is done, 0 to 1."""
        names = list(self.stages)
        if stage not in names:
            return self.first or 0.0
        before = sum(self.stages[name] for name in names[: names.index(stage)])
        return (before + self.stages[stage] * done / max(total, 1)) / max(sum(self.stages.values()), 1e-9)

    def text(self, stage: str, done: int, total: int) -> str:
        """The state in words, such as `fitting 12/90 layers, 3 of 9 MB, 2 min left`."""
        words = f"{stage} {done}/{total} {COUNTED.get(stage, 'layers')}"
        if stage == "fitting":
            words += f", {self.megabytes * done / max(total, 1):.0f} of {self.megabytes:.0f} MB"
        left = self.left(stage, done, total)
        if left is None:
            return words
        return f"{words}, {left:.0f} s left" if left < 90 else f"{words}, {left / 60:.0f} min left"

    def left(self, stage: str, done: int, total: int) -> float | None:
        """Seconds that are left; None before anything is known. Work that a run before has done does not count."""
        share = self.share(stage, done, total)
        if self.first is None:
            self.first = share if done > 1 else 0.0
        done_here, seconds = share - self.first, time.monotonic() - self.started
        return seconds * (1 - share) / done_here if done_here > 0.005 else None


@contextmanager
def export_progress(pace: Pace) -> Iterator[Progress]:
    """Shows progress on standard error; yields the function that it is told to."""
    if not sys.stderr.isatty():
        last = time.monotonic()

        def line(stage: str, done: int, total: int) -> None:
            nonlocal last
            text = pace.text(stage, done, total)
            if time.monotonic() - last >= EVERY:
                last = time.monotonic()
                print(f"export: {text}", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    with Bars(BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("reading", total=1.0)

        def bar(stage: str, done: int, total: int) -> None:
            bars.update(task, completed=pace.share(stage, done, total), description=pace.text(stage, done, total))

        yield bar
