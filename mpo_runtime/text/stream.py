"""The text of a generation, token by token: what is certain of it, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from mpo_runtime.text.stopping import StopMatcher
from mpo_runtime.text.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """Turns tokens into text and finds stop strings in it, also those that spell special tokens.

    Args:
        tokenizer: None for a model without one: all its text is empty.
        context: ids whose text this text continues; they decide about a space at its beginning.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = (), context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer, context=context)
        self._matcher = StopMatcher(stop)

    def push(self, token: int, *, ended: bool = False, last: bool = False) -> tuple[str, str]:
        """Takes the next token; returns the text that is now certain, and the spelling of a special token that follows it.

        Special tokens are no part of the text. `stopped` is set where a stop string has ended the text.

        Args:
            ended: the token ends the text and gives none.
            last: no more tokens come.
        """
        text = self._decoder.push(token) if self._decoder and not ended else ""
        spelling = "" if ended else self._special_spelling(token)
        if self._decoder and (last or ended or spelling):
            text += self._decoder.finish() if last or ended else self._decoder.settle()
        text, stopped = self._matcher.push(text)
        if spelling and not stopped:
            more, stopped = self._matcher.push(spelling, special=True)
            text += more
        if (last or ended) and not stopped:
            text += self._matcher.flush()
        return text, "" if stopped else spelling

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._matcher.matched is not None

    def _special_spelling(self, token: int) -> str:
        if self._tokenizer is None or token not in self._tokenizer.special_ids:
            return ""
        return self._tokenizer.id_to_token(token) or ""
