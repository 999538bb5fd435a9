"""The messages of a conversation: checked, and in the form that chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mpo_server.errors import invalid
from mpo_server.fields import Table, read, text_field

MOST_MESSAGES = 4096
LONGEST_CONTENT = 1 << 21  # characters
ROLES = ("system", "developer", "user", "assistant", "tool")
Message = dict[str, Any]
_FIELDS: Table = {"role": text_field(32), "name": text_field(256), "tool_call_id": text_field(256)}


def read_messages(given: Any, param: str = "messages") -> list[Message]:
    """The messages as templates take them: content is text, arguments of tool calls are objects.

    A `developer` is the `system`. Fields that templates do not know are left out.
    """
    if not isinstance(given, list) or not 1 <= len(given) <= MOST_MESSAGES:
        raise invalid(param, f"expected a list of 1 to {MOST_MESSAGES} messages", "invalid_type")
    messages = [_message(message, f"{param}[{index}]") for index, message in enumerate(given)]
    if sum(len(message["content"]) for message in messages) > LONGEST_CONTENT:
        raise invalid(param, f"expected at most {LONGEST_CONTENT} characters in all messages together", "out_of_range")
    ending = [message["role"] for message in messages[-2:]]
    if ending == ["assistant", "assistant"]:
        raise invalid(f"{param}[{len(messages) - 1}]", "the last two messages are both the assistant's; join them")
    return messages


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, dict):
        raise invalid(where, "expected an object with role and content", "invalid_type")
    values = read(_FIELDS, given, f"{where}.")
    role = values["role"]
    if role not in ROLES:
        raise invalid(f"{where}.role", f"expected one of {', '.join(ROLES)}, found {json.dumps(role)[:40]}")
    message: Message = {"role": "system" if role == "developer" else role}
    calls = given.get("tool_calls")
    if calls is not None:
        if role != "assistant":
            raise invalid(f"{where}.tool_calls", "only messages of the assistant have calls")
        message["tool_calls"] = read_calls(calls, f"{where}.tool_calls")
    message["content"] = read_content(given.get("content"), f"{where}.content", bool(message.get("tool_calls")))
    reasoning = given.get("reasoning_content")
    if role == "assistant" and isinstance(reasoning, str) and reasoning:
        message["reasoning_content"] = reasoning
    return message | {key: values[key] for key in ("name", "tool_call_id") if values[key] is not None}


def read_content(given: Any, where: str, may_be_empty: bool = False) -> str:
    """The text of a message, of its parts joined by line breaks; only text is supported."""
    if given is None:
        if may_be_empty:
            return ""
        raise invalid(where, "is missing; expected a string or a list of text parts", "missing_required_parameter")
    if isinstance(given, str):
        parts = [given]
    elif isinstance(given, list):
        parts = [_part(part, f"{where}[{index}]") for index, part in enumerate(given)]
    else:
        raise invalid(where, "expected a string or a list of text parts", "invalid_type")
    if sum(map(len, parts)) > LONGEST_CONTENT:
        raise invalid(where, f"expected at most {LONGEST_CONTENT} characters", "out_of_range")
    return "\n".join(parts)


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
    if kind not in ("text", "input_text", "output_text", "refusal"):
        raise invalid(where, "only text is supported; expected {type: text, text: …}", "unsupported")
    if not isinstance(text, str):
        raise invalid(f"{where}.text", "expected a string", "invalid_type")
    return text


def read_calls(given: Any, where: str) -> list[dict[str, Any]]:
    """The calls that the assistant made earlier."""
    if not isinstance(given, list) or len(given) > 128:
        raise invalid(where, "expected a list of at most 128 calls", "invalid_type")
    calls = []
    for index, call in enumerate(given):
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise invalid(
                f"{where}[{index}]", "expected {id, type: function, function: {name, arguments}}", "invalid_type"
            )
        arguments = read_arguments(function.get("arguments"), f"{where}[{index}].function.arguments")
        identity = call.get("id") if isinstance(call.get("id"), str) else ""
        calls.append({"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def read_arguments(given: Any, where: str) -> dict[str, Any]:
    """The arguments of a call as an object; OpenAI's form is the JSON text of one."""
    if given is None or given == "":
        return {}
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise invalid(where, "expected the JSON text of an object", "invalid_type")
    return found


def split_prefill(messages: Sequence[Message]) -> tuple[list[Message], str]:
    """The conversation up to the answer, and the beginning of the answer where the last message is the assistant's."""
    last = messages[-1]
    if last["role"] != "assistant" or last.get("tool_calls"):
        return list(messages), ""
    if len(messages) == 1:
        raise invalid("messages", "expected a message to answer before the assistant's")
    return list(messages[:-1]), str(last["content"])


def template_data(value: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """Variables for the chat template (`chat_template_kwargs`)."""
    if value is None:
        return {}
    for name in value:
        if not name.isidentifier() or len(name) > 64:
            raise invalid(where, "expected names of template variables as keys")
    return dict(value)
