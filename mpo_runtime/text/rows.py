"""Reads rows of text and chat data in the usual layouts: the text or the messages of a row."""

from __future__ import annotations

import json
from typing import Any

from mpo_formats import ConfigError

Message = dict[str, Any]
# The names that data sets have for roles.
ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}
LAYOUTS = (
    "`text`, `messages` (role, content), `conversations` (from, value), `data` (turns), or `instruction` and `output`"
)


def parse_row(line: str, where: str) -> str | list[Message]:
    """The text or the messages of a line of JSON in one of the usual layouts.

    Args:
        where: file and line, for errors.

    Raises:
        ConfigError: for a line that is not JSON, or an object of another layout.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ConfigError(f"{where} is not JSON; expected one object a line") from None
    content = recognise(row)
    if content is None:
        raise ConfigError(f"{where}: expected an object with {LAYOUTS}, all of them strings")
    return content


def recognise(row: Any) -> str | list[Message] | None:
    """The text or the messages of a row in one of the usual layouts, None for another.

    These are rows of `text`, Ultrachat (`messages` or `data`), Alpaca (`instruction`, `input`, `output`), and OpenHermes or
    ShareGPT (`conversations`).
    """
    if not isinstance(row, dict):
        return None
    if isinstance(row.get("text"), str):
        return str(row["text"])
    for key, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        if isinstance(row.get(key), list):
            return _messages(
                [(turn.get(role), turn.get(content)) if isinstance(turn, dict) else (None, None) for turn in row[key]]
            )
    if isinstance(row.get("data"), list):  # Ultrachat's raw form: user and assistant in turn
        return _messages([(("user", "assistant")[index % 2], turn) for index, turn in enumerate(row["data"])])
    if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        given = row.get("input")
        question = (
            f"{row['instruction']}\n\n{given}" if isinstance(given, str) and given.strip() else row["instruction"]
        )
        return _messages([("user", question), ("assistant", row["output"])])
    return None


def _messages(turns: list[tuple[Any, Any]]) -> list[Message] | None:
    if not all(isinstance(role, str) and isinstance(content, str) for role, content in turns):
        return None
    return [{"role": ROLES.get(role.lower(), role), "content": content} for role, content in turns]
