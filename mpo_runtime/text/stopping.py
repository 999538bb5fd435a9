"""Stop strings: text is released as soon as it can no longer be part of one.

The matcher is Knuth-Morris-Pratt run for every stop string at once, one character at a time, so where the pieces are
cut never changes the answer: the text ends before the stop string that is completed first (the longest one, where two
are completed by the same character).

Special tokens are no part of the text, yet a stop string may spell one. So every stop string is looked for twice: in the
text, and in the text with the special tokens spelled out between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice

from mpo_formats.errors import ConfigError


class StopMatcher:
    """Receives text pieces and releases the text that no stop string can reach back into any more."""

    __slots__ = ("_failures", "_held", "_in_all", "_in_text", "_run", "_shown", "_stops", "matched")

    def __init__(self, stop: Sequence[str] = ()) -> None:
        """Takes the stop strings; raises ConfigError where one is empty or not a string."""
        if isinstance(stop, str):
            raise ConfigError(f"stop is the string {stop!r}, expected a list of strings; write [{stop!r}]")
        for index, text in enumerate(stop):
            if not isinstance(text, str) or not text:
                raise ConfigError(f"stop[{index}] is {text!r}, expected a string of at least one character; remove it")
        self._stops = tuple(dict.fromkeys(stop))
        self._failures = tuple(_failure_table(text) for text in self._stops)
        self._in_text = [0] * len(self._stops)  # how much of each stop string the text ends with
        self._in_all = [0] * len(self._stops)  # the same with special tokens spelled out
        self._held = ""
        # Of the last characters, special tokens included: which of them are text.
        self._shown: deque[bool] = deque(maxlen=max(map(len, self._stops), default=0))
        self._run = 0  # how many of the very last characters are text
        self.matched: str | None = None
        """The stop string that ended the text, or None while there is none."""

    @property
    def active(self) -> bool:
        """Whether there are stop strings to look for."""
        return bool(self._stops)

    def push(self, piece: str, *, special: bool = False) -> tuple[str, bool]:
        """Takes the next piece and returns the text released by it and whether a stop string has ended the text.

        The stop string itself and everything after it are dropped; after a stop nothing more is released.

        Args:
            special: the piece is the spelling of a special token, which is no part of the text.
        """
        if self.matched is not None:
            return "", True
        if not self._stops:
            return "" if special else piece, False
        for character in piece:
            self._shown.append(not special)
            self._run = 0 if special else self._run + 1
            if not special:
                self._held += character
            found = [] if special else self._advance(self._in_text, character)
            cut = max(map(len, found), default=0)
            spelled = self._advance(self._in_all, character)
            cut = max([cut, *(self._shown_among(len(stop)) for stop in spelled)])
            if found or spelled:
                self.matched = max([*found, *spelled], key=len)
                released, self._held = self._held[: len(self._held) - cut], ""
                return released, True
        reach = max([*self._in_text, *(self._shown_among(state) for state in self._in_all)])
        place = len(self._held) - reach
        released, self._held = self._held[:place], self._held[place:]
        return released, False

    def flush(self) -> str:
        """Returns the text held back, at the end of the generation, where no stop string was completed."""
        held, self._held = self._held, ""
        self._in_text, self._in_all = [0] * len(self._stops), [0] * len(self._stops)
        self._shown.clear()
        self._run = 0
        return held

    def _shown_among(self, count: int) -> int:
        """How many of the last `count` characters are text."""
        return count if count <= self._run else sum(islice(reversed(self._shown), count))

    def _advance(self, states: list[int], character: str) -> list[str]:
        """Moves every stop string by one character; those that it completes."""
        completed = []
        for index, stop in enumerate(self._stops):
            state = states[index]
            while state and stop[state] != character:
                state = self._failures[index][state - 1]
            state += stop[state] == character
            if state == len(stop):
                completed.append(stop)
                state = 0  # never used again: the text ends here
            states[index] = state
        return completed


def _failure_table(text: str) -> list[int]:
    """For each prefix of the text, the length of its longest proper prefix that also ends it (Knuth, Morris, Pratt)."""
    table = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[index] != text[length]:
            length = table[length - 1]
        length += text[index] == text[length]
        table[index] = length
    return table
