"""Stop strings: text is released as soon as it can no longer be part of one.

The matcher is Knuth-Morris-Pratt run for every stop string at once, one character at a time, so where the pieces are
cut never changes the answer: the text ends before the stop string that is completed first (the longest one, where two
are completed by the same character).
"""

from __future__ import annotations

from collections.abc import Sequence

from mpo_formats.errors import ConfigError


class StopMatcher:
    """Receives text pieces and releases the text that no stop string can reach back into any more."""

    __slots__ = ("_failures", "_held", "_states", "_stops", "matched")

    def __init__(self, stop: Sequence[str] = ()) -> None:
        """Takes the stop strings; raises ConfigError where one is empty or not a string."""
        if isinstance(stop, str):
            raise ConfigError(f"stop is the string {stop!r}, expected a list of strings; write [{stop!r}]")
        for index, text in enumerate(stop):
            if not isinstance(text, str) or not text:
                raise ConfigError(f"stop[{index}] is {text!r}, expected a string of at least one character; remove it")
        self._stops = tuple(dict.fromkeys(stop))
        self._failures = tuple(_failure_table(text) for text in self._stops)
        self._states = [0] * len(self._stops)
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text, or None while there is none."""

    def push(self, piece: str) -> tuple[str, bool]:
        """Takes the next piece and returns the text released by it and whether a stop string has ended the text.

        The stop string itself and everything after it are dropped; after a stop nothing more is released.
        """
        if self.matched is not None:
            return "", True
        if not self._stops:
            return piece, False
        text = self._held + piece
        for end, character in enumerate(piece, start=len(self._held) + 1):
            found = self._advance(character)
            if found is not None:
                self.matched, self._held = found, ""
                return text[: end - len(found)], True
        cut = len(text) - max(self._states)
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """Returns the text held back, at the end of the generation, where no stop string was completed."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held

    def _advance(self, character: str) -> str | None:
        """Moves every stop string by one character; the longest one completed by it, or None."""
        completed: str | None = None
        for index, stop in enumerate(self._stops):
            state = self._states[index]
            while state and stop[state] != character:
                state = self._failures[index][state - 1]
            state += stop[state] == character
            if state == len(stop):
                if completed is None or len(stop) > len(completed):
                    completed = stop
                state = 0  # never used again: the text ends here
            self._states[index] = state
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
