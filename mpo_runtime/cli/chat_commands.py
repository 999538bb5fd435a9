"""The commands of a chat: lines that start with a slash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mpo_formats.errors import ConfigError
from mpo_runtime.cli.console import size_text
from mpo_runtime.cli.conversation import Conversation
from mpo_runtime.filesystem import expand_user
from mpo_runtime.memory import peak_memory


class Leave(Exception):
    """The user wants to leave."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command: how it is written, what it does, and the function, which may return a message to be answered."""

    usage: str
    help: str
    run: Callable[[Conversation, str], str | None]


def run_command(conversation: Conversation, line: str) -> str | None:
    """Runs a line such as `/set seed 1`; returns a message that is to be answered, or None.

    Raises:
        ConfigError: for an unknown command or an argument it cannot take.
        Leave: for /bye.
    """
    name, _, argument = line.removeprefix("/").partition(" ")
    if "\n" in name:
        name, _, argument = line.removeprefix("/").partition("\n")
    command = COMMANDS.get(ALIASES.get(name, name))
    if command is None:
        raise ConfigError(
            f"/{name}: no such command; /help lists them (a message that starts with / needs a space before it)"
        )
    return command.run(conversation, argument.strip())


def show_help(conversation: Conversation, argument: str) -> None:
    """Lists the commands and the keys."""
    width = max(len(command.usage) for command in COMMANDS.values())
    for command in COMMANDS.values():
        print(f"{command.usage:<{width}}  {command.help}")
    for keys, effect in KEYS:
        print(f"{keys:<{width}}  {effect}")


def set_system(conversation: Conversation, argument: str) -> None:
    """Shows, changes or removes the system message."""
    if argument in ("off", "none"):
        conversation.system = None
    elif argument:
        conversation.system = argument
    print(f"system: {conversation.system or '(none)'}")


def change_setting(conversation: Conversation, argument: str) -> None:
    """Changes one setting, or shows all."""
    name, _, value = argument.partition(" ")
    if not name:
        show_settings(conversation, "")
        return
    if not value.strip():
        raise ConfigError(f"/set {name}: expected a value, such as /set temperature 0.5")
    conversation.settings = conversation.settings.changed(name, value.strip())


def show_settings(conversation: Conversation, argument: str) -> None:
    """Shows the settings and the system message."""
    print(f"system              {conversation.system or '(none)'}")
    for name, value in conversation.settings.named().items():
        print(f"{name:<18}  {setting_text(value)}")


def setting_text(value: object) -> str:
    """A setting's value as /set takes it."""
    if value is None or value == () or value == {}:
        return "off"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(repr, value))
    if hasattr(value, "items"):
        return " ".join(f"{token}={bias:g}" for token, bias in value.items())
    return str(value)


def save(conversation: Conversation, argument: str) -> None:
    """Writes the conversation to a file."""
    path = path_of(argument, "/save")
    conversation.save(path)
    print(f"saved {len(conversation.messages)} messages to {path}")


def load(conversation: Conversation, argument: str) -> None:
    """Continues a saved conversation."""
    path = path_of(argument, "/load")
    conversation.load(path)
    print(f"loaded {len(conversation.messages)} messages from {path}")


def path_of(argument: str, command: str) -> Path:
    """The path that a command was given."""
    if not argument:
        raise ConfigError(f"{command}: expected a file, such as {command} talk.json")
    return expand_user(argument)


def clear(conversation: Conversation, argument: str) -> None:
    """Starts a new conversation."""
    conversation.clear()
    print("(a new conversation)")


def regenerate(conversation: Conversation, argument: str) -> str:
    """Takes the last answer back and asks its message again."""
    return conversation.again()


def show_stats(conversation: Conversation, argument: str) -> None:
    """Shows figures of the session and of the last answer."""
    totals, context = conversation.totals, conversation.model.engine.context
    print(f"conversation  {len(conversation.messages)} messages, {conversation.used()} of {context} tokens of context")
    if conversation.forgotten:
        print(f"left out      the {conversation.forgotten // 2} oldest exchanges")
    print(f"session       {totals.answers} answers, {totals.tokens} tokens")
    if totals.last_tokens:
        print(f"last answer   {totals.speed()}")
    print(f"memory        {size_text(peak_memory())} at most")


def leave(conversation: Conversation, argument: str) -> None:
    """Leaves."""
    raise Leave


COMMANDS = {
    "system": Command("/system [TEXT]", "show or set the system message; off removes it", set_system),
    "set": Command("/set [NAME VALUE]", "change a setting, such as temperature 0.5; default resets it", change_setting),
    "show": Command("/show", "show the settings", show_settings),
    "save": Command("/save FILE", "save the conversation as JSON", save),
    "load": Command("/load FILE", "continue a saved conversation", load),
    "clear": Command("/clear", "start a new conversation", clear),
    "regen": Command("/regen", "answer the last message again", regenerate),
    "stats": Command("/stats", "tokens, speed, memory", show_stats),
    "help": Command("/help", "this list", show_help),
    "bye": Command("/bye", "leave", leave),
}
ALIASES = {"exit": "bye", "quit": "bye", "?": "help"}
KEYS = (
    ('"""', "starts and ends a message of several lines"),
    ("Alt-Enter", "a new line (Esc, then Enter, works too)"),
    ("Up, Down", "earlier messages; Ctrl-R searches them"),
    ("Ctrl-C", "stops an answer, or clears the line"),
    ("Ctrl-D", "leaves"),
)
