"""A conversation with a model: its messages, which of them fit the context, its settings, its file; no terminal code."""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mpo_formats.errors import ConfigError, OutputError
from mpo_runtime.cli.options import json_or_text, parse_biases
from mpo_runtime.filesystem import replace_file
from mpo_runtime.model import FinishReason, Model, Piece
from mpo_runtime.sampler import SamplingOptions
from mpo_runtime.text.chat_template import TemplateOptions
from mpo_runtime.text.decode import decode_text
from mpo_runtime.text.stopping import StopMatcher

FORMAT = "mpo-run conversation"
VERSION = 1
LARGEST_FILE = 64 << 20
# A part of the context that is kept free for the answer, where max_tokens asks for no less.
ANSWER_SHARE = 4
OFF = ("off", "none", "default")


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are drawn, how long they may be, where they stop, whether speed is shown, what the template is told."""

    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    verbose: bool = False
    template: TemplateOptions = field(default_factory=TemplateOptions)

    def __post_init__(self) -> None:
        if self.max_tokens is not None and (type(self.max_tokens) is not int or self.max_tokens < 1):
            raise ConfigError(f"max_tokens is {self.max_tokens!r}, expected a whole number of 1 or more")
        if not isinstance(self.verbose, bool):
            raise ConfigError(f"verbose is {self.verbose!r}, expected on or off")
        StopMatcher(self.stop)  # raises where one is not a text

    def named(self) -> dict[str, Any]:
        """All settings by the names that /set takes."""
        sampling = {name: getattr(self.sampling, name) for name in SamplingOptions.__dataclass_fields__}
        thinking = "default" if self.template.thinking is None else self.template.thinking
        own = {"max_tokens": self.max_tokens, "stop": self.stop, "thinking": thinking}
        return {**sampling, **own, "verbose": self.verbose}

    def changed(self, name: str, text: str) -> Settings:
        """A copy with one setting changed, its value as the user wrote it; `off` gives back the default.

        Raises:
            ConfigError: for a name that is unknown or a value that is out of range.
        """
        name = {"n": "max_tokens"}.get(name, name.lstrip("-").replace("-", "_"))
        if name not in self.named():
            raise ConfigError(f"{name}: no such setting; expected one of {', '.join(self.named())}")
        value = parse_value(name, text)
        if name in SamplingOptions.__dataclass_fields__:
            return replace(self, sampling=replace(self.sampling, **{name: value}))
        if name == "thinking":
            return replace(self, template=replace(self.template, thinking=value))
        return replace(self, **{name: value})


def parse_value(name: str, text: str) -> Any:
    """The value of a setting from what the user wrote."""
    if name in ("verbose", "thinking"):
        switch: dict[str, bool | None] = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}
        return {**switch, **({"default": None} if name == "thinking" else {})}.get(text.lower(), text)
    if text.lower() in OFF:
        return Settings().named()[name]
    if name == "stop":
        stop = json_or_text(text) if text[:1] in ('"', "[") else text
        return tuple(stop) if isinstance(stop, list) else (stop,)
    if name == "logit_bias":
        return parse_biases(text.split())
    return json_or_text(text)


@dataclass(slots=True)
class Totals:
    """What was generated since the program started, and the last answer's figures; times in seconds."""

    answers: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    reused: int = 0
    first_token: float = 0.0
    last_tokens: int = 0
    last_seconds: float = 0.0

    def speed(self) -> str:
        """The last answer's figures in one line: tokens per second after the first token, and the prompt's tokens."""
        rate = (self.last_tokens - 1) / self.last_seconds if self.last_tokens > 1 and self.last_seconds > 0 else 0.0
        shown = f"{rate:.1f} tokens/s" if rate else "too short for a speed"
        return (
            f"{self.last_tokens} tokens, {shown}; first token after {self.first_token:.2f} s "
            f"(prompt {self.prompt_tokens} tokens, {self.reused} of them cached)"
        )


class Conversation:
    """The messages exchanged with a model. `system` is kept separately; the oldest `forgotten` ones no longer fit."""

    def __init__(self, model: Model, settings: Settings, system: str | None = None) -> None:
        self.model = model
        self.settings = settings
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.forgotten = 0
        self.totals = Totals()
        self.finish: FinishReason | None = None
        self._ids: list[int] = []

    def add(self, text: str) -> int:
        """Adds a user's message, to be answered by `answer`; returns how many old exchanges no longer fit.

        Raises:
            ConfigError: when the message alone does not fit the context, or the template refuses it; it is taken back.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            return self._fit()
        except BaseException:
            self.messages.pop()
            raise

    def answer(self) -> Generator[Piece, None, None]:
        """Streams the answer, which becomes part of the conversation when the iterator ends or is closed.

        One that is closed early is kept as far as it came; where nothing came the user's message is taken back.
        """
        parts: list[str] = []
        try:
            with closing(self._measured()) as pieces:
                for piece in pieces:
                    parts.append(piece.text)
                    yield piece
        finally:
            if "".join(parts).strip():
                self.messages.append({"role": "assistant", "content": "".join(parts)})
            else:
                self.messages.pop()

    def again(self) -> str:
        """Takes the last exchange back and returns its message, to be asked again; raises ConfigError without one."""
        if not self.messages:
            raise ConfigError("there is no answer yet to generate again")
        question = self.messages[-2]["content"]
        del self.messages[-2:]
        self.forgotten = min(self.forgotten, len(self.messages))
        return question

    def clear(self) -> None:
        """Forgets all messages; the system message and the settings stay."""
        self.messages, self.forgotten = [], 0

    def sent(self) -> list[dict[str, str]]:
        """The messages that the model sees."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.messages[self.forgotten :]

    def used(self) -> int:
        """Tokens of the context that the conversation takes so far."""
        return len(self.model.encode_chat(self.sent(), self.settings.template)) if self.messages else 0

    def _fit(self) -> int:
        """Leaves out the oldest exchanges until the rest fits the context, and returns how many it newly left out."""
        context, before = self.model.engine.context, self.forgotten
        room = context - min(self.settings.max_tokens or context, context // ANSWER_SHARE)
        while len(ids := self.model.encode_chat(self.sent(), self.settings.template)) > room:
            if self.forgotten + 2 < len(self.messages):
                self.forgotten += 2
            elif len(ids) < context:
                break  # a long message may have the answer's part, too
            else:
                self.forgotten = before
                raise ConfigError(
                    f"the message does not fit: it takes {len(ids)} tokens, what the template and a system "
                    f"message add included, and the context holds {context}; shorten it, or start with "
                    "a larger --ctx-size"
                )
        self._ids = ids
        return (self.forgotten - before) // 2

    def _measured(self) -> Generator[Piece, None, None]:
        """Yields the pieces of the next answer and updates the totals."""
        settings, totals, ids = self.settings, self.totals, self._ids
        sampling = settings.sampling
        if sampling.seed is not None:  # another stream for each answer, so that a regenerated one differs
            sampling = replace(sampling, seed=(sampling.seed + totals.answers) % 2**64)
        totals.answers += 1
        totals.prompt_tokens, totals.reused = len(ids), 0
        totals.last_tokens, totals.last_seconds, self.finish = 0, 0.0, None
        start = first = time.monotonic()
        pieces = self.model.generate(ids, max_tokens=settings.max_tokens, sampling=sampling, stop=settings.stop)
        with closing(pieces):
            for piece in pieces:
                now = time.monotonic()
                if totals.last_tokens == 0:
                    first, totals.first_token = now, now - start
                    totals.reused = pieces.start().cached_tokens
                totals.last_tokens += 1
                totals.tokens += 1
                totals.last_seconds = now - first
                self.finish = piece.finish
                yield piece

    def save(self, path: Path) -> None:
        """Writes the conversation as JSON, whole or not at all.

        Raises:
            OutputError: when the path cannot be written, or holds a file that is not a saved conversation.
        """
        if path.exists():
            try:
                read_conversation(path)
            except ConfigError:
                raise OutputError(f"{path}: exists and is not a saved conversation; give another name") from None
        messages = ([{"role": "system", "content": self.system}] if self.system else []) + self.messages
        content = json.dumps({"format": FORMAT, "version": VERSION, "messages": messages}, ensure_ascii=False, indent=1)
        try:
            replace_file(path, f"{content}\n".encode())
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror}); give another name") from None

    def load(self, path: Path) -> None:
        """Continues a saved conversation in place of this one; raises ConfigError where the file is none."""
        messages = read_conversation(path)
        self.system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None
        self.messages, self.forgotten = messages, 0


def read_conversation(path: Path) -> list[dict[str, str]]:
    """The messages of a saved conversation: a system message or none, then users' and answers in turn.

    Raises:
        ConfigError: where the file cannot be read or holds anything else.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(f"{path}: larger than {LARGEST_FILE >> 20} MiB, no saved conversation")
        data = json.loads(decode_text(path.read_bytes(), path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a file that /save wrote") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: is not JSON; give a file that /save wrote") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ConfigError(f"{path}: is not a saved conversation; give a file that /save wrote")
    if data.get("version") != VERSION:
        raise ConfigError(f"{path}: has version {data.get('version')!r}, expected {VERSION}; update mpo-runtime")
    messages = data.get("messages")
    if not isinstance(messages, list):
        raise ConfigError(f"{path}: messages: expected a list")
    for index, message in enumerate(messages):
        if (
            not isinstance(message, dict)
            or set(message) != {"role", "content"}
            or not all(isinstance(value, str) for value in message.values())
        ):
            raise ConfigError(f"{path}: messages[{index}]: expected a role and a content, both texts")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise ConfigError(f"{path}: messages: expected a system message or none, then user and assistant in turn")
    return messages
