"""chat: one answer for --prompt or piped input, a conversation in a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpo_formats.errors import ConfigError, MpoError
from mpo_runtime.cli.chat_commands import ALIASES, COMMANDS, Leave, run_command
from mpo_runtime.cli.console import one_line
from mpo_runtime.cli.conversation import Conversation, Settings
from mpo_runtime.cli.generate import open_model, print_text, read_stdin
from mpo_runtime.cli.prompt_cache import kept_prompt
from mpo_runtime.filesystem import expand_user, user_folder
from mpo_runtime.text.decode import decode_argument

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History
    from prompt_toolkit.input import Input
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import Output

FENCE = '"""'
PROMPT, CONTINUED = ">>> ", "... "


def run_chat(
    file: Path,
    load_options: dict[str, Any],
    prompt: str | None,
    system: str | None,
    settings: Settings,
    prompt_cache: Path | None = None,
) -> None:
    """Answers one message, or talks until the user leaves."""
    text = None if prompt is None else decode_argument(prompt, "--prompt")
    if text is None and not sys.stdin.isatty():
        text = read_stdin()
    if text is not None and not text.strip():
        raise ConfigError("the message is empty; give one with --prompt or on standard input")
    with open_model(file, load_options) as model, kept_prompt(model, load_options, prompt_cache):
        if model.template is None:
            raise ConfigError(f"{file}: has no chat template; continue a plain text instead: mpo-run generate {file}")
        conversation = Conversation(model, settings, decode_argument(system or "", "--system") or None)
        if text is not None:
            conversation.add(text.strip())
            answer(conversation)
            return
        size = f"{model.network.architecture.parameters():,} parameters"
        print(f"{file.name}: {size}, context of {model.engine.context} tokens")
        print("/help shows the commands, Ctrl-D leaves")
        talk(conversation, make_session())


def talk(conversation: Conversation, session: PromptSession[str]) -> None:
    """Reads messages and commands until the user leaves; an error is printed and the chat goes on."""
    while True:
        try:
            text = session.prompt(PROMPT)
        except KeyboardInterrupt:
            if not session.default_buffer.text:
                print("(Ctrl-D or /bye leaves)")
            continue
        except EOFError:
            return
        try:
            respond(conversation, text)
        except Leave:
            return
        except KeyboardInterrupt:
            print("(stopped)")
        except (MpoError, OSError, MemoryError) as error:
            print(f"error: {one_line(error)}", flush=True)


def respond(conversation: Conversation, text: str) -> None:
    """Runs a command or answers a message; raises Leave for /bye."""
    message = unfenced(text)
    if message.startswith("/") and not text.startswith((" ", FENCE)):
        message_again = run_command(conversation, message)
        if message_again is None:
            return
        message = message_again
    if not message.strip():
        return
    forgotten = conversation.add(message.strip())
    if forgotten:
        exchanges = "the oldest exchange" if forgotten == 1 else f"the {forgotten} oldest exchanges"
        print(
            f"(the conversation no longer fits the context of {conversation.model.engine.context} tokens: the model "
            f"no longer sees {exchanges})"
        )
    answer(conversation)


def answer(conversation: Conversation) -> None:
    """Streams one answer; Ctrl-C stops it, and what came so far stays part of the conversation."""
    text = ""
    with quiet_keyboard(), closing(conversation.answer()) as pieces:
        try:
            for piece in pieces:
                text += piece.text
                print_text(piece.text)
        finally:
            if not text.endswith("\n"):
                print(flush=True)
    notes = []
    if not text.strip():
        notes.append("(no answer came; the message is taken back)")
    if conversation.finish == "length" and conversation.settings.max_tokens is None:
        notes.append("(the context is full: the answer is cut)")
    if conversation.settings.verbose:
        notes.append(f"[{conversation.totals.speed()}]")
    for note in notes:
        print(note, file=sys.stderr, flush=True)


@contextmanager
def quiet_keyboard() -> Iterator[None]:
    """Turns off the terminal's echo during an answer; what is typed then appears at the next prompt."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    try:
        before = termios.tcgetattr(sys.stdin.fileno())
    except (OSError, ValueError, termios.error):  # no terminal
        yield
        return
    quiet = termios.tcgetattr(sys.stdin.fileno())
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, before)


def unfenced(text: str) -> str:
    """The text without the fences around it, or around what follows a command."""
    before, fence, rest = text.partition(FENCE)
    if not fence or (before.strip() and not before.startswith("/")):
        return text
    inner, _, after = rest.partition(FENCE)
    return before + inner.strip("\n") + after


def make_session(keyboard: Input | None = None, screen: Output | None = None) -> PromptSession[str]:
    """The line editor: history in a file, Alt-Enter for a new line, Tab completes commands.

    Args:
        keyboard, screen: where it reads and writes; the terminal where None.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.output import create_output

    return PromptSession(
        history=open_history(),
        key_bindings=key_bindings(),
        completer=WordCompleter([f"/{name}" for name in (*COMMANDS, *ALIASES)], sentence=True),
        complete_while_typing=False,
        multiline=True,
        prompt_continuation=lambda width, line, wrapped: "" if wrapped else CONTINUED,
        input=keyboard,
        output=screen or create_output(always_prefer_tty=True),  # `mpo-run chat FILE > answers` still shows the prompt
    )


def key_bindings() -> KeyBindings:
    """Enter sends, except inside an open fence; Alt-Enter (or Esc, Enter) is a new line."""
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if fence_is_open(buffer.text):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    @bindings.add("escape", "c-j")  # what a terminal sends for it while an answer is written
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings


def fence_is_open(text: str) -> bool:
    """Whether a message, or what follows a command, opens a fence and does not close it."""
    before, fence, rest = text.partition(FENCE)
    return bool(fence) and (not before.strip() or before.startswith("/")) and FENCE not in rest


def history_file() -> Path | None:
    """The file of earlier messages: in MPO_HOME, else in the user's state folder (XDG_STATE_HOME, ~/.local/state).

    None for a user without such a folder.
    """
    if chosen := os.environ.get("MPO_HOME"):
        return expand_user(chosen) / "chat_history"
    state = user_folder("XDG_STATE_HOME", ".local/state")
    return None if state is None else state / "mpo-runtime" / "chat_history"


def open_history() -> History:
    """The history in its file, which only the user may read; in memory where it cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = history_file()
    if path is None:
        print("note: this user has no home folder; messages are not remembered (MPO_HOME names one)", file=sys.stderr)
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600))
    except OSError as error:
        print(f"note: {path} cannot be written ({error.strerror}); messages are not remembered", file=sys.stderr)
        return InMemoryHistory()
    return FileHistory(str(path))
