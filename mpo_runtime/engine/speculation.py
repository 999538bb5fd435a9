"""Drafts of the next tokens without a second model: what followed the last tokens when they occurred before.

This is prompt lookup (Saxena 2023). The model then runs the drafted tokens in one step and keeps those that it would have
drawn itself, each drawn from its own logits, so that a draft changes the time that a text takes and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Speculation = Literal["ngram"]
# Tokens that must have occurred before in the same order.
PATTERN = 3
SHORTEST, LONGEST = 3, 15
# After drafts of which nothing was kept, so many steps pass without one; each time twice as many.
FIRST_PAUSE, LONGEST_PAUSE = 1, 64
# Above so many sequences in a step their drafts would cost more than they give.
MOST_SEQUENCES = 4


class NgramDrafter:
    """The drafts of one text. Their length follows how many of them were kept."""

    def __init__(self) -> None:
        self.drafted = 0
        self.accepted = 0
        self._after: dict[tuple[int, ...], int] = {}  # where the text goes on after its last occurrence of a pattern
        self._indexed = PATTERN
        self._length = SHORTEST
        self._pause = FIRST_PAUSE
        self._waiting = 0

    def draft(self, text: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow the text, or none."""
        for end in range(self._indexed, len(text)):
            self._after[tuple(text[end - PATTERN : end])] = end
        self._indexed = max(self._indexed, len(text))
        at = self._after.get(tuple(text[-PATTERN:])) if len(text) > PATTERN else None
        if at is None:
            return []
        if self._waiting > 0:
            self._waiting -= 1
            return []
        tokens = [*text[at : at + min(self._length, most)]]
        while tokens and len(tokens) < min(self._length, most):  # the pattern is a part of what it repeats
            tokens.append(tokens[len(tokens) - (len(text) - at)])
        return tokens

    def observe(self, drafted: int, accepted: int) -> None:
        """Learns how many tokens of a draft were kept."""
        if not drafted:
            return
        self.drafted += drafted
        self.accepted += accepted
        if accepted == drafted:
            self._length = min(2 * self._length, LONGEST)
        elif 2 * accepted < drafted:
            self._length = max(self._length // 2, SHORTEST)
        if accepted:
            self._pause = FIRST_PAUSE
        else:
            self._waiting = self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
