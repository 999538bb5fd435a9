"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

# Called with a stage, the steps done and the steps in all.
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Progress that is not shown."""
