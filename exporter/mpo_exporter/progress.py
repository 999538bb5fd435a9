"""What long-running work is given to report with: a callback for progress and one for messages."""

from __future__ import annotations

from collections.abc import Callable

# Called with the name of a stage, the steps done and the steps in all.
Progress = Callable[[str, int, int], None]
# Called with a sentence for the user, such as that a measurement was found in the cache.
Log = Callable[[str], None]


def silent(stage: str, done: int, total: int) -> None:
    """Discards progress."""


def no_log(message: str) -> None:
    """Discards a message."""
