"""Functions that a model may call: the request's definitions, how models write calls, grammars that force them.

Two ways of writing are known. Granite writes `<|tool_call|>` and a JSON list of calls; Hermes, and Qwen and others after
it, writes each call as JSON between `<tool_call>` and `</tool_call>`. The chat template says which one a model was trained
on. A model whose template knows no tools gets them described in the system message, in Hermes' way.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpo_server.errors import invalid
from mpo_server.fields import read, text_field
from mpo_server.messages import Message
from mpo_server.structure import check_schema, with_options

MOST_TOOLS = 128
MOST_CALLS = 16  # in one answer that is forced to call
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Dialect:
    """How calls are written: between two marks, or from one mark to the end (`close` is empty); `many`: as a list."""

    open: str
    close: str
    many: bool


GRANITE = Dialect("<|tool_call|>", "", many=True)
HERMES = Dialect("<tool_call>", "</tool_call>", many=False)


@dataclass(frozen=True, slots=True)
class Call:
    """One call: the function's name and its arguments as JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions of a request.

    choice: `auto`, `none`, `required`, or `function` where one is demanded, which `functions` then has alone.
    """

    functions: tuple[Mapping[str, Any], ...] = ()
    choice: str = "none"
    parallel: bool = True

    @property
    def usable(self) -> bool:
        """Whether the model may call."""
        return bool(self.functions) and self.choice != "none"

    @property
    def forced(self) -> bool:
        """Whether the model must call."""
        return self.choice in ("required", "function")

    def definitions(self) -> list[dict[str, Any]]:
        """The functions in the form that templates expect."""
        return [{"type": "function", "function": dict(function)} for function in self.functions]


def read_tools(given: list[Any] | None, choice: Any, parallel: bool) -> Tools:
    """The tools of a request, in the form of chat completions or of responses; raises ApiError where one is wrong."""
    if not given:
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice", "needs tools")
        return Tools()
    if len(given) > MOST_TOOLS:
        raise invalid("tools", f"expected at most {MOST_TOOLS}, found {len(given)}", "out_of_range")
    functions = [_function(tool, f"tools[{index}]") for index, tool in enumerate(given)]
    names = [function["name"] for function in functions]
    if len(set(names)) < len(names):
        raise invalid("tools", "two functions have the same name")
    if choice is None or choice in ("auto", "none", "required"):
        return Tools(tuple(functions), choice or "auto", parallel)
    wanted = None
    if isinstance(choice, dict) and choice.get("type") == "function":
        place = choice.get("function") if isinstance(choice.get("function"), dict) else choice
        wanted = place.get("name") if isinstance(place, dict) else None
    chosen = [function for function in functions if function["name"] == wanted]
    if not chosen:
        raise invalid("tool_choice", "expected none, auto, required or a function of tools")
    return Tools(tuple(chosen), "function", parallel=False)


def _function(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise invalid(f"{where}.type", "expected function; other tools are not supported", "unsupported")
    given = tool["function"] if isinstance(tool.get("function"), dict) else tool
    values = read({"name": text_field(64), "description": text_field(8192)}, given, f"{where}.function.")
    name = values["name"]
    if name is None or not _NAME.fullmatch(name):
        raise invalid(f"{where}.function.name", "expected 1 to 64 letters, digits, _ or -")
    parameters = given.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    check_schema(parameters, f"{where}.function.parameters")
    described = {} if values["description"] is None else {"description": values["description"]}
    return {"name": name, **described, "parameters": parameters}


def dialect_of(template: str) -> Dialect | None:
    """How a chat template has calls written; None for one that knows no tools."""
    if "tools" not in template:
        return None
    return GRANITE if GRANITE.open in template else HERMES if HERMES.open in template else None


def call_schema(tools: Tools) -> dict[str, Any]:
    """One call as JSON schema."""
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": _arguments(function["parameters"])},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for function in tools.functions
        ]
    }


def _arguments(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", **parameters}


def forced_calls(tools: Tools, dialect: Dialect, special: bool) -> str:
    """The rules, in llguidance's Lark, of an answer that consists of calls; its rule is `calls`.

    Args:
        special: the mark before a call is a special token of the model.
    """
    schema = call_schema(tools)
    definitions = _hoisted(tools)
    most = MOST_CALLS if tools.parallel else 1
    mark = dialect.open if special else json.dumps(dialect.open)
    if dialect.many:
        listed = {"type": "array", "items": schema, "minItems": 1, "maxItems": most, **definitions}
        return f"calls: {mark} list\nlist: %json {json.dumps(with_options(listed))}\n"
    one = json.dumps(with_options({**schema, **definitions}))
    again = f' ("\\n" call){{0,{most - 1}}}' if most > 1 else ""
    return f'calls: call{again}\ncall: {mark} "\\n" body "\\n" {json.dumps(dialect.close)}\nbody: %json {one}\n'


def _hoisted(tools: Tools) -> dict[str, Any]:
    """Definitions of the functions' schemas, whose references count from the root."""
    found: dict[str, Any] = {}
    for function in tools.functions:
        for key in ("$defs", "definitions"):
            if isinstance(function["parameters"].get(key), dict):
                found.setdefault(key, {}).update(function["parameters"][key])
    return found


def parse_calls(text: str) -> list[Call] | None:
    """The calls in what a model wrote after its mark: an object, or a list of them; None where it is no call."""
    try:
        found, _ = json.JSONDecoder().raw_decode(text.strip())
    except (ValueError, RecursionError):
        return None
    calls = []
    for item in found if isinstance(found, list) else [found]:
        name = item.get("name") if isinstance(item, dict) else None
        arguments: Any = next((item[key] for key in ("arguments", "parameters") if key in item), {}) if name else None
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        calls.append(Call(f"call_{secrets.token_hex(12)}", name, json.dumps(arguments, ensure_ascii=False)))
    return calls or None


def written_call(call: Mapping[str, Any]) -> str:
    """An earlier call as the model would have written it."""
    function = call["function"]
    return json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)


def with_written_calls(messages: Sequence[Message], dialect: Dialect) -> list[Message]:
    """The messages with calls as text, for a template that does not write them itself."""
    changed = []
    for message in messages:
        calls = message.get("tool_calls")
        if not calls:
            changed.append(message)
            continue
        if dialect.many:
            text = f"{dialect.open}[{', '.join(map(written_call, calls))}]"
        else:
            text = "\n".join(f"{dialect.open}\n{written_call(call)}\n{dialect.close}" for call in calls)
        content = f"{message['content']}\n{text}" if message["content"] else text
        changed.append({"role": "assistant", "content": content})
    return changed


def described(messages: Sequence[Message], tools: Tools) -> list[Message]:
    """The messages for a template that knows no tools: they are described in the system message, results are the user's."""
    changed: list[Message] = []
    for message in with_written_calls(messages, HERMES):
        if message["role"] == "tool":
            message = {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
            if changed and changed[-1]["role"] == "user":
                message["content"] = f"{changed.pop()['content']}\n{message['content']}"
        changed.append(message)
    if not tools.usable:
        return changed
    lines = "\n".join(json.dumps(definition) for definition in tools.definitions())
    text = (
        f"You can call functions. Their signatures:\n<tools>\n{lines}\n</tools>\n"
        "To call one, answer with its name and arguments as JSON:\n"
        '<tool_call>\n{"name": "…", "arguments": {…}}\n</tool_call>'
    )
    if changed[0]["role"] == "system":
        first = changed.pop(0)
        text = f"{first['content']}\n\n{text}"
    return [{"role": "system", "content": text}, *changed]
