"""Reads what a model writes into what a client gets: reasoning, content, and calls of functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mpo_server.tools import Call, Dialect, parse_calls

THINK, END_THINK = "<think>", "</think>"
RESPONSE = ("<response>", "</response>")  # Granite's marks around what follows its thoughts


@dataclass(frozen=True, slots=True)
class Found:
    """A part of an answer: more `content`, more `reasoning`, or one call."""

    content: str = ""
    reasoning: str = ""
    call: Call | None = None


class MessageReader:
    """A state machine over the parts of an answer as they come. Text is held back only while it may begin a mark.

    Args:
        thinks: the model may write its thoughts first, between `<think>` and `</think>`.
        thinking: the prompt ends inside the thoughts.
        responds: the model may put marks around its answer, which are left out.
        dialect: how the model writes calls; None where it may not call.
        single: only one call is wanted; `done` is set after it.
    """

    def __init__(
        self,
        *,
        thinks: bool = False,
        thinking: bool = False,
        responds: bool = False,
        dialect: Dialect | None = None,
        single: bool = False,
    ) -> None:
        self._state = "reasoning" if thinking else "start" if thinks else "content"
        self._marks = (*(RESPONSE if responds else ()), *([dialect.open] if dialect else []))
        self._dialect, self._single = dialect, single
        self._held = ""
        self._spaces = ""  # at the end of the content, which counts only if more follows
        self._begun = not thinks and not thinking  # whether spaces at the beginning of the content count
        self._thought = False
        self.done = False
        self.called = False

    def push(self, parts: Sequence[tuple[str, bool]], last: bool) -> Iterator[Found]:
        """Takes parts (text, whether it spells a special token); yields what is certain.

        Args:
            last: no more parts come.
        """
        for text, special in parts:
            if not special:
                self._held += text
                yield from self._advance(False)
            elif self._dialect and text in (self._dialect.open, self._dialect.close):
                yield from self._advance(False)
                yield from self._mark(text)
            elif text in (THINK, END_THINK, *RESPONSE):
                self._held += text
                yield from self._advance(False)
        if last:
            yield from self._advance(True)

    def _mark(self, mark: str) -> Iterator[Found]:
        """A mark that came as a special token: what is held before it cannot begin another one."""
        if self._dialect and self._state == "call" and mark == self._dialect.close:
            yield from self._finish_call()
        elif self._dialect and self._state != "call" and mark == self._dialect.open:
            yield from self._emit(self._held)
            self._held, self._state = "", "call"

    def _advance(self, last: bool) -> Iterator[Found]:
        steps = {"start": self._start, "reasoning": self._reason, "content": self._content, "call": self._call}
        state = ""
        while state != self._state and not self.done:
            state = self._state
            yield from steps[state](last)

    def _start(self, last: bool) -> Iterator[Found]:
        begun = self._held.lstrip()
        if begun.startswith(THINK):
            self._held, self._state = begun[len(THINK) :], "reasoning"
        elif last or not THINK.startswith(begun):
            self._state = "content"
        yield from ()

    def _reason(self, last: bool) -> Iterator[Found]:
        if not self._thought:
            self._held = self._held.lstrip("\n")
        text, mark, rest = self._cut((END_THINK,), last)
        kept = text.rstrip("\n")  # line breaks around the thoughts are left out
        self._held = rest if mark else text[len(kept) :] + rest
        if mark:
            self._state = "content"
        if kept:
            self._thought = True
            yield Found(reasoning=kept)

    def _content(self, last: bool) -> Iterator[Found]:
        while True:
            text, mark, self._held = self._cut(self._marks, last)
            yield from self._emit(text)
            if not mark:
                return
            if self._dialect and mark == self._dialect.open:
                self._state = "call"
                return
            self._begun = False

    def _call(self, last: bool) -> Iterator[Found]:
        close = self._dialect.close if self._dialect else ""
        if (close and close in self._held) or last:
            yield from self._finish_call()

    def _finish_call(self) -> Iterator[Found]:
        """Ends a call where its closing mark, or the end of the answer, is reached."""
        if self._dialect is None:
            return
        body, close, rest = self._held.partition(self._dialect.close) if self._dialect.close else (self._held, "", "")
        self._held, self._state = rest, "content"
        calls = parse_calls(body)
        if calls is None:  # no call after all: the client gets what was written
            yield from self._emit(f"{self._dialect.open}{body}{close}")
            return
        self._spaces = ""
        for call in calls[:1] if self._single else calls:
            self.called = True
            yield Found(call=call)
        self._begun, self.done = False, self._single

    def _emit(self, text: str) -> Iterator[Found]:
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        if self._dialect:  # spaces before a call are not content
            text = self._spaces + text
            kept = text.rstrip()
            self._spaces, text = text[len(kept) :], kept
        if text:
            yield Found(content=text)

    def _cut(self, marks: Sequence[str], last: bool) -> tuple[str, str, str]:
        """The held text before the first mark, the mark, and the text after it; without one what may begin one is held."""
        places = [(self._held.find(mark), mark) for mark in marks if mark in self._held]
        if places:
            place, mark = min(places)
            return self._held[:place], mark, self._held[place + len(mark) :]
        if last:
            return self._held, "", ""
        longest = max(map(len, marks), default=1)
        for start in range(max(0, len(self._held) - longest + 1), len(self._held)):
            if any(mark.startswith(self._held[start:]) for mark in marks):
                return self._held[:start], "", self._held[start:]
        return self._held, "", ""
