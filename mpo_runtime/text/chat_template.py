"""Chat templates: turn a list of messages into the text that a model was trained on, and into its token ids.

A template is a program that comes with the model's file. It is run by minijinja, which gives it no access to Python and
limits its steps (fuel). Fuel does not limit memory: `{% set x = x ~ x %}` doubles a string in one step, and a failed
allocation ends the process. So templates run in a helper process whose memory and time are limited.
"""

from __future__ import annotations

import json
import re
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpo_formats.errors import CheckpointError, ConfigError
from mpo_runtime.forks import renew_in_children
from mpo_runtime.helper_process import HelperProcess
from mpo_runtime.text.decode import decode_json, decode_text
from mpo_runtime.text.files import CONFIG, DEFAULT, REMEDY, TEMPLATE, default_template, named_templates
from mpo_runtime.text.template_helper import MEMORY, TemplateFailure, compile_template
from mpo_runtime.text.tokenizer import Disguise, Tokenizer

SECONDS = 5.0  # for one rendering in the helper process
LONGEST_TEMPLATE = 1 << 20  # characters
_DEEPEST = 64  # levels of lists and objects in a message
TOOL_USE = "tool_use"  # the name of the template that is taken where a request has tools
# A template that tests the type of a message's content, or loops over it, handles contents that are lists of parts.
_TAKES_PARTS = re.compile(
    r"content['\"\])]*\s+is\s+(?:not\s+)?(?:string|iterable|sequence|mapping)"
    r"|\bfor\s+\w+\s+in\s+[\w.\[\]'\"]*content\b"
)


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """The variables that a request gives to the chat template besides the messages; the template never sees a None.

    thinking: the template's variables `thinking` (Granite) and `enable_thinking` (Qwen).
    tools, documents: lists of objects in the form that the model's template expects.
    arguments: its other variables by name.
    template: the name of one of the model's templates, where it has several.
    """

    thinking: bool | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None

    def __post_init__(self) -> None:
        if self.thinking is not None and not isinstance(self.thinking, bool):
            raise ConfigError(f"thinking is {self.thinking!r}, expected true or false")
        reserved = ("messages", "tools", "documents", "add_generation_prompt", "template", "tokenizer", "trusted_roles")
        for name in self.arguments:
            if not isinstance(name, str) or not name.isidentifier() or name in reserved:
                raise ConfigError(f"template argument {name!r}: expected the name of a variable, none of {reserved}")

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of `encode_chat` and of `ChatTemplate.render`."""
        thinking = {} if self.thinking is None else {"thinking": self.thinking, "enable_thinking": self.thinking}
        return {"tools": self.tools, "documents": self.documents, **thinking, **self.arguments}


class ChatTemplate:
    """A Jinja chat template, rendered as transformers' `apply_chat_template` renders it.

    isolated: renders in a helper process that is started by the first rendering and may use 512 MiB and 5 seconds;
    without it (for templates you trust, or where a program cannot start a Python interpreter) only steps are limited.
    named: the model's other templates by name, for requests of another kind; `chosen` finds the one for a request.
    The text is byte for byte jinja2's, except that trimming keeps U+001C to U+001F, which only Python calls white
    space; Python's rarer string methods (`rsplit`, `zfill`, `removeprefix`) are errors, and so is the operator % except
    after a string literal.
    Safe to use from several threads, which take turns. `close` ends the helper early.
    """

    def __init__(self, source: str, *, isolated: bool = True, named: Mapping[str, str] | None = None) -> None:
        if not isinstance(source, str):
            raise ConfigError(f"chat template is a {type(source).__name__}, expected the template's text")
        if len(source) > LONGEST_TEMPLATE:
            raise ConfigError(f"chat template has {len(source)} characters, expected at most {LONGEST_TEMPLATE}")
        self.source = source
        self.named = {name: ChatTemplate(text, isolated=isolated) for name, text in (named or {}).items()}
        self.takes_parts = _TAKES_PARTS.search(source) is not None
        self._lock = threading.Lock()
        self._isolated = isolated
        self._renderer: Callable[[dict[str, Any]], str] | None = None
        self._finalizer: Callable[[], object] | None = None
        renew_in_children(self)

    @classmethod
    def from_files(cls, read: Callable[[str], bytes | None]) -> ChatTemplate | None:
        """Reads the chat templates of a model, or returns None where it has none.

        Args:
            read: gives the bytes of chat_template.jinja and tokenizer_config.json, None for one that is absent.

        Raises:
            CheckpointError: where a file is damaged.
        """
        settings = read(CONFIG)
        config = decode_json(settings, CONFIG, REMEDY, CheckpointError) if settings else {}
        named = named_templates(config, CONFIG) if isinstance(config, Mapping) else {}
        content = read(TEMPLATE)
        default = decode_text(content, TEMPLATE, CheckpointError) if content else ""
        if not default.strip():
            default = default_template(named) or ""
        if not default and not named:
            return None
        choose = f"has no default; choose one of {', '.join(named)} with --template"
        others = {name: text for name, text in named.items() if name != DEFAULT}
        return cls(default or "{{ raise_exception(" + json.dumps(choose) + ") }}", named=others)

    def chosen(self, options: TemplateOptions) -> ChatTemplate:
        """The template for a request: the one that it names, else the one for tools where it has tools, else this one.

        Raises:
            ConfigError: where there is no template of that name.
        """
        if options.template is None:
            return self if options.tools is None else self.named.get(TOOL_USE, self)
        if options.template == DEFAULT:
            return self
        if options.template not in self.named:
            known = ", ".join(self.named) or "no named ones"
            raise ConfigError(f"template {options.template!r}: the model has no such chat template; it has {known}")
        return self.named[options.template]

    def renew_after_fork(self) -> None:
        """Makes a forked child ready to render: the helper process and whoever holds the lock belong to the parent."""
        self._lock = threading.Lock()
        self._renderer = self._finalizer = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Renders a conversation to text.

        A message has a `role` and a `content`: a string, or a list of parts {"type": "text", "text": …}, which are
        joined by line breaks for a template that does not take lists. All data must be plain (JSON's types).
        `variables` are seen by the template (`bos_token`, `eos_token`, `thinking`, …).

        Raises:
            ConfigError: where a message has another form, or the template is wrong, refuses the conversation
                (`raise_exception`) or runs out of its limits.
        """
        data = _template_data(self, messages, tools, documents, variables)
        return self._render({**data, "add_generation_prompt": bool(add_generation_prompt)})

    def close(self) -> None:
        """Ends the helper process, if there is one; the next rendering starts another."""
        with self._lock:
            self._stop()
        for template in self.named.values():
            template.close()

    def _render(self, data: dict[str, Any]) -> str:
        with self._lock:
            try:
                if self._renderer is None:
                    self._renderer = self._start()
                return self._renderer(data)
            except TemplateFailure as error:
                if isinstance(error, _HelperEnded):
                    self._stop()
                raise ConfigError(f"chat template: {error}") from None
            except BaseException:
                self._stop()  # interrupted in the middle of an exchange
                raise

    def _start(self) -> Callable[[dict[str, Any]], str]:
        if not self._isolated:
            return compile_template(self.source)
        helper = _Helper(self.source)
        self._finalizer = weakref.finalize(self, helper.stop)
        return helper.render

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._renderer = self._finalizer = None


def encode_chat(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    trusted_roles: Collection[str] = (),
    **variables: Any,
) -> list[int]:
    """Renders a conversation to token ids in which only the template itself can write special tokens.

    Text in messages, tools, documents and variables that spells a special token, or an added token that the template
    spells, is encoded as plain text. To tell the two apart, the first character of each such spelling (and of the
    beginning of one at the end of a text, or the end of one at its start) is replaced by a private-use character
    before the template runs and put back after its special tokens were found. The replacement keeps length, order and
    white space, so trimming, splitting and slicing in the template do what they did; a template that looks for that
    very spelling in a message does not find it. A conversation without such text gives exactly the ids of the text
    that `render` returns. Not covered: a template that removes characters from the middle of a message could put a
    spelling together that was not there before.

    The tokenizer's `bos_token`, `eos_token` and other named tokens are variables of the template.

    Args:
        trusted_roles: roles whose messages may contain special tokens, such as ("assistant",) where the assistant's
            messages are the model's own output (a tool call that starts with `<|tool_call|>`).

    Raises:
        ConfigError: as `ChatTemplate.render`.
    """
    data = _template_data(template, messages, tools, documents, variables)
    literal = {
        text: index for text, index in tokenizer.added_tokens.items() if text.strip() and text in template.source
    }
    control = {**literal, **{text: index for text, index in tokenizer.special_tokens.items() if text.strip()}}
    disguise = Disguise(control, surrounding=json.dumps(data, ensure_ascii=False) + template.source)
    prepared = {key: disguise.apply(value) for key, value in data.items() if key != "messages"}
    prepared["messages"] = [
        message if message["role"] in trusted_roles else disguise.apply(message) for message in data["messages"]
    ]
    text = template._render(
        {**named_tokens(tokenizer), **prepared, "add_generation_prompt": bool(add_generation_prompt)}
    )
    return tokenizer.encode_disguised(text, disguise)


def named_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The tokens that tokenizer_config.json names, as transformers gives them to a template (`bos_token`, …)."""
    named: dict[str, str] = {}
    for key, token in tokenizer.config.items():
        text = token.get("content") if isinstance(token, Mapping) else token
        if key.endswith("_token") and isinstance(text, str) and text:
            named[key] = text
    return named


def _template_data(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> dict[str, Any]:
    """Checked plain copies of everything that a template sees, except add_generation_prompt."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ConfigError("messages: expected a list of at least one {role, content}")
    checked = [_message(message, f"messages[{index}]", template) for index, message in enumerate(messages)]
    data: dict[str, Any] = {"messages": checked}
    for name, items in (("tools", tools), ("documents", documents)):
        data[name] = None if items is None else _plain(items, name)
        if items is not None and not (isinstance(data[name], list) and all(isinstance(i, dict) for i in data[name])):
            raise ConfigError(f"{name}: expected a list of objects")
    return {**{name: _plain(value, name) for name, value in variables.items()}, **data}


def _message(message: object, where: str, template: ChatTemplate) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ConfigError(f"{where} is a {type(message).__name__}, expected an object with role and content")
    copy: dict[str, Any] = _plain(message, where)
    if not isinstance(copy.get("role"), str) or not copy["role"]:
        raise ConfigError(f"{where}.role is {copy.get('role')!r}, expected a role such as 'user'")
    content = copy.get("content")
    if isinstance(content, list):
        for index, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ConfigError(
                    f'{where}.content[{index}] is no {{"type": "text", "text": …}}; only text is supported'
                )
        if not template.takes_parts:
            copy["content"] = "\n".join(part["text"] for part in content)
    elif not isinstance(content, str) and not (content is None and copy.get("tool_calls")):
        raise ConfigError(f"{where}.content is a {type(content).__name__}, expected a string or a list of text parts")
    return copy


def _plain(value: object, where: str, depth: int = 0) -> Any:
    """A copy of JSON-like data in exact built-in types; raises ConfigError naming what is not."""
    if depth > _DEEPEST:
        raise ConfigError(f"{where}: nested deeper than {_DEEPEST} levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        text = str.__str__(value)
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise ConfigError(f"{where}: holds a lone surrogate; it is not Unicode text")
        return text
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{where}: has the key {key!r}, expected strings as keys")
        return {_plain(key, where): _plain(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise ConfigError(f"{where} is a {type(value).__name__}, expected plain data (text, numbers, lists, objects)")


class _HelperEnded(TemplateFailure):
    """The helper process ended in the middle of a rendering."""


class _Helper:
    """The parent's end of a helper process that renders one template."""

    def __init__(self, source: str) -> None:
        remedy = "; ChatTemplate(…, isolated=False) renders without one"
        self._process = HelperProcess("mpo_runtime.text.template_helper", "chat template", remedy)
        self.stop = self._process.stop
        try:
            self._answer(source.encode())
        except BaseException:
            self.stop()
            raise

    def render(self, data: dict[str, Any]) -> str:
        """Renders in the helper; raises TemplateFailure where the template fails or ends the helper."""
        return self._answer(json.dumps(data).encode())

    def _answer(self, request: bytes) -> str:
        answer = self._process.ask(request, SECONDS)
        if answer is None:
            limits = f"needs more than {MEMORY >> 20} MiB of memory, or crashed its helper process"
            raise _HelperEnded(f"takes longer than {SECONDS:g} seconds" if self._process.expired else limits)
        if answer[:1] != b"+":
            raise TemplateFailure(answer[1:].decode())
        return answer[1:].decode()
