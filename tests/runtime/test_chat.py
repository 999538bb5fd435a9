"""The chat: what fits the context, settings, saved files, commands, the line editor's keys, and a real terminal."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from mpo_runtime import ConfigError, OutputError
from mpo_runtime.cli import chat
from mpo_runtime.cli.conversation import FORMAT, Conversation, Settings, read_conversation
from mpo_runtime.loading import load
from mpo_runtime.model import Model
from mpo_runtime.sampler import SamplingOptions
from mpo_runtime.text.chat_template import TemplateOptions
from tests.helpers import EOS, granite_config, write_folder

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
ROOT = Path(__file__).resolve().parents[2]
# A random model repeats itself unless it is heated; the end token is ruled out, so that lengths are known.
SAMPLING = SamplingOptions(temperature=30, seed=5, logit_bias={EOS: -100})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of one token a byte, with a chat template."""
    config = granite_config(max_position_embeddings=4096)
    path = write_folder(tmp_path_factory.mktemp("chat") / "tiny", config)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with load(folder, context=160) as loaded:
        yield loaded


@pytest.fixture
def conversation(model: Model) -> Conversation:
    return Conversation(model, Settings(SAMPLING, max_tokens=6))


def say(conversation: Conversation, text: str) -> str:
    """One exchange; returns the answer."""
    conversation.add(text)
    return "".join(piece.text for piece in conversation.answer())


def test_an_exchange_becomes_part_of_the_conversation(conversation: Conversation) -> None:
    answer = say(conversation, "hello")
    assert conversation.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer}]
    expected = "".join(
        piece.text for piece in conversation.model.chat(conversation.messages[:1], max_tokens=6, sampling=SAMPLING)
    )
    assert answer == expected


def test_seeded_answers_differ_between_turns_and_repeat_between_sessions(model: Model) -> None:
    def session() -> list[str]:
        talk = Conversation(model, Settings(SAMPLING, max_tokens=12))
        answers = [say(talk, "hello")]
        answers.append(say(talk, talk.again()))
        assert [message["content"] for message in talk.messages] == ["hello", answers[1]]
        return answers

    first = session()
    assert first[0] != first[1]
    assert session() == first


def test_the_next_turn_reuses_the_cache(conversation: Conversation) -> None:
    say(conversation, "a first message")
    conversation.add("another")
    list(conversation.answer())
    # With a seed only tokens of prompts, whose bits do not depend on the step that they were in.
    assert conversation.totals.reused == len("[user]a first message\n[assistant]")
    conversation.settings = replace(conversation.settings, sampling=SamplingOptions())
    conversation.add("a third")
    list(conversation.answer())
    assert conversation.totals.reused > 2 * len("[user]a first message\n[assistant]")


def test_the_oldest_exchanges_are_left_out_when_the_context_is_full(conversation: Conversation) -> None:
    left_out = []
    for number in range(8):
        left_out.append(conversation.add(f"message {number}"))
        assert len(conversation.model.encode_chat(conversation.sent())) <= conversation.model.engine.context - 6
        list(conversation.answer())
    assert left_out[0] == 0 and sum(left_out) > 0
    assert conversation.forgotten == 2 * sum(left_out)
    assert len(conversation.messages) == 16  # all of it is still saved
    assert conversation.sent()[0]["role"] == "user"


def test_a_message_that_never_fits_is_taken_back(conversation: Conversation) -> None:
    say(conversation, "short")
    with pytest.raises(ConfigError, match=r"does not fit: it takes 2\d\d tokens.*holds 160.*--ctx-size"):
        conversation.add("x" * 200)
    assert len(conversation.messages) == 2 and conversation.forgotten == 0
    assert conversation.add("x" * 120) == 1  # may use the answer's part
    assert "".join(piece.text for piece in conversation.answer())


def test_a_stopped_answer_is_kept_and_one_without_text_is_not(conversation: Conversation) -> None:
    conversation.settings = Settings(SAMPLING, max_tokens=30)
    conversation.add("hello")
    pieces = conversation.answer()
    texts = [next(pieces).text for _ in range(12)]
    pieces.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": "".join(texts)}
    conversation.add("again")
    pieces = conversation.answer()
    next(pieces)
    pieces.close()
    del conversation.messages[2:]
    assert say(conversation, "and the model is free") != ""

    conversation.settings = Settings(SamplingOptions(temperature=0, logit_bias={EOS: 100}))
    before = list(conversation.messages)
    assert say(conversation, "say nothing") == ""
    assert conversation.messages == before


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("temperature", "0.5", 0.5),
        ("top-k", "5", 5),
        ("--seed", "7", 7),
        ("seed", "off", None),
        ("n", "12", 12),
        ("max_tokens", "default", None),
        ("stop", "42", ("42",)),
        ("stop", '["a", "b c"]', ("a", "b c")),
        ("verbose", "on", True),
        ("logit_bias", "3=1.5 4=-2", {3: 1.5, 4: -2.0}),
    ],
)
def test_settings_are_changed_by_name(name: str, text: str, expected: object) -> None:
    changed = Settings(SamplingOptions(seed=1), max_tokens=3).changed(name, text)
    full = {"n": "max_tokens"}.get(name, name.lstrip("-").replace("-", "_"))
    assert changed.named()[full] == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("temperature", "-1", "temperature is -1, expected 0 or more"),
        ("temperature", "NaN", "temperature is nan"),
        ("temprature", "1", "no such setting; expected one of temperature"),
        ("max_tokens", "0", "max_tokens is 0"),
        ("max_tokens", "true", "max_tokens is True"),
        ("stop", "[1]", "stop"),
        ("verbose", "maybe", "expected on or off"),
        ("thinking", "maybe", "thinking is 'maybe', expected true or false"),
        ("logit_bias", "3", "expected ID=BIAS"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Settings().changed(name, text)
    assert "\n" not in str(caught.value)


def test_thinking_tools_and_documents_reach_the_template(folder: Path, tmp_path: Path) -> None:
    copied = write_folder(tmp_path / "model", granite_config(max_position_embeddings=256))
    (copied / "chat_template.jinja").write_text("{{ messages|length }}{{ thinking }}{{ tools|length if tools }}")
    with load(copied) as model:
        tokenizer = model.text_tokenizer()
        talk = Conversation(model, Settings(SAMPLING, max_tokens=3, template=TemplateOptions(tools=[{"name": "f"}])))
        talk.add("a")
        assert tokenizer.decode(talk._ids) == "11"
        talk.settings = talk.settings.changed("thinking", "on")
        talk.messages.pop()
        talk.add("a")
        assert tokenizer.decode(talk._ids) == "1True1"
        assert talk.used() == len("1True1")
        for text, value in (("off", False), ("default", None)):
            talk.settings = talk.settings.changed("thinking", text)
            assert talk.settings.template.thinking is value


def test_a_saved_conversation_of_another_system(conversation: Conversation, tmp_path: Path) -> None:
    say(conversation, "hello")
    conversation.save(tmp_path / "talk.json")
    content = (tmp_path / "talk.json").read_text(encoding="utf-8")
    (tmp_path / "talk.json").write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    assert read_conversation(tmp_path / "talk.json") == conversation.messages
    (tmp_path / "talk.json").write_bytes(content.encode("utf-16"))
    with pytest.raises(ConfigError, match=r"talk\.json: not UTF-8 at byte 0, it is UTF-16; convert it"):
        read_conversation(tmp_path / "talk.json")


def test_a_saved_conversation_loads_again(conversation: Conversation, tmp_path: Path) -> None:
    conversation.system = "Grüße\n日本語"
    say(conversation, "hello")
    conversation.save(tmp_path / "talk.json")
    other = Conversation(conversation.model, Settings())
    other.load(tmp_path / "talk.json")
    assert (other.system, other.messages) == (conversation.system, conversation.messages)
    other.save(tmp_path / "talk.json")  # over a conversation, but over nothing else
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="is not a saved conversation"):
        other.save(tmp_path / "thesis.txt")
    with pytest.raises(OutputError, match="cannot be written"):
        other.save(tmp_path / "absent" / "talk.json")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["talk.json", "thesis.txt"]


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not a saved conversation"),
        ({"format": "other"}, "is not a saved conversation"),
        ({"format": FORMAT, "version": 2, "messages": []}, "version 2, expected 1"),
        ({"format": FORMAT, "version": 1}, "expected a list"),
        ({"format": FORMAT, "version": 1, "messages": [USER]}, "user and assistant in turn"),
        ({"format": FORMAT, "version": 1, "messages": [ANSWER, USER]}, "user and assistant in turn"),
        ({"format": FORMAT, "version": 1, "messages": [{**USER, "content": 3}, ANSWER]}, r"messages\[0\]"),
        ({"format": FORMAT, "version": 1, "messages": [{**USER, "tool": "x"}, ANSWER]}, r"messages\[0\]"),
    ],
)
def test_other_files_are_refused(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        read_conversation(path)


@pytest.fixture
def typed(conversation: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that types keys into a chat and returns when the chat ends."""
    monkeypatch.setenv("MPO_HOME", str(tmp_path / "home"))

    def type_keys(keys: str) -> None:
        with create_pipe_input() as keyboard:
            keyboard.send_text(keys)
            chat.talk(conversation, chat.make_session(keyboard, DummyOutput()))

    return type_keys


def contents(conversation: Conversation) -> list[str]:
    """What the user said."""
    return [message["content"] for message in conversation.messages if message["role"] == "user"]


def test_the_keys(typed: Callable[[str], None], conversation: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    typed('one\rtwo\x1b\rlines\r"""\ra\r\rb\r"""\r\x03half\x03\x04')
    assert contents(conversation) == ["one", "two\nlines", "a\n\nb"]
    assert "(Ctrl-D or /bye leaves)" in capsys.readouterr().out


def test_the_history_is_kept_in_a_private_file(typed: Callable[[str], None], conversation: Conversation) -> None:
    typed("remember me\r/bye\r")
    assert chat.history_file().stat().st_mode & 0o077 == 0
    assert next(iter(chat.open_history().load_history_strings())) == "/bye"
    assert "remember me" in chat.open_history().load_history_strings()


def test_the_commands(
    typed: Callable[[str], None], conversation: Conversation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = tmp_path / "a talk.json"
    typed(
        f"/system Be brief\r/set temperature 0\r/set top_p 2\rhello\r/save {talk}\r/clear\r/regen\r/load {talk}\r"
        "/stats\r/show\r/nonsense\r /usr is a folder\r/help\r/bye\rnever read\r"
    )
    out = capsys.readouterr().out
    assert conversation.system == "Be brief"
    assert conversation.settings.sampling.temperature == 0
    assert contents(conversation) == ["hello", "/usr is a folder"]
    for line in (
        "error: top_p is 2, expected above 0 and at most 1",
        f"saved 2 messages to {talk}",
        "error: there is no answer yet to generate again",
        f"loaded 2 messages from {talk}",
        "conversation  2 messages",
        "temperature         0\n",
        "error: /nonsense: no such command",
        "/regen",
    ):
        assert line in out


def test_ctrl_c_stops_the_answer_and_not_the_program(
    typed: Callable[[str], None],
    conversation: Conversation,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original, printed = chat.print_text, []

    def interrupted(text: str) -> None:
        original(text)
        printed.append(text)
        if len(printed) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "print_text", interrupted)
    typed("first\rsecond\r/bye\r")
    assert "(stopped)" in capsys.readouterr().out
    assert contents(conversation) == ["first", "second"]
    assert conversation.messages[1]["content"] == "".join(printed[:4])


def test_forgotten_exchanges_are_announced(
    typed: Callable[[str], None], capsys: pytest.CaptureFixture[str], conversation: Conversation
) -> None:
    typed("a" * 60 + "\r" + "b" * 60 + "\r/bye\r")
    assert conversation.forgotten == 2
    assert "no longer sees the oldest exchange)" in capsys.readouterr().out


def test_fences() -> None:
    assert chat.unfenced('"""a\n"b"\n"""') == 'a\n"b"'
    assert chat.unfenced('/system """\na\nb\n"""') == "/system a\nb"
    assert chat.unfenced('say """this"""') == 'say """this"""'
    assert chat.fence_is_open('"""a') and chat.fence_is_open('/system """a')
    assert not chat.fence_is_open('"""a"""') and not chat.fence_is_open('what is """')


def test_piped_input_is_one_message(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("two\nlines ü\n".encode())))
    settings = Settings(SAMPLING, max_tokens=8)
    chat.run_chat(folder, {"context": 100}, None, "Be brief", settings)
    with load(folder, context=100) as model:
        talk = Conversation(model, settings, "Be brief")
        assert capsys.readouterr().out == say(talk, "two\nlines ü") + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b" \n")))
    with pytest.raises(ConfigError, match="message is empty"):
        chat.run_chat(folder, {}, None, None, settings)


def test_a_model_without_a_template_is_sent_to_generate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no chat template; continue a plain text instead: mpo-run generate"):
        chat.run_chat(write_folder(tmp_path / "plain"), {}, "hello", None, Settings())


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_in_a_real_terminal(folder: Path, tmp_path: Path) -> None:
    import pty

    process, terminal = pty.fork()
    if process == 0:  # the program, with the terminal as its own
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background of a shell ignore it
        os.environ.update(PYTHONPATH=f"{ROOT}:{ROOT / 'formats'}", MPO_HOME=str(tmp_path), TERM="xterm")
        os.environ.update(PROMPT_TOOLKIT_NO_CPR="1")
        program = [sys.executable, "-c", "from mpo_runtime.cli.main import main; main()"]
        os.execv(sys.executable, [*program, "chat", str(folder), "--temperature", "0", "--logit-bias", f"{EOS}=-100"])
    seen = ""

    def wait_for(text: str) -> None:
        nonlocal seen
        end = time.monotonic() + 60
        while text not in seen:
            if not select.select([terminal], [], [], max(0.0, end - time.monotonic()))[0]:
                pytest.fail(f"{text!r} did not come within a minute; the terminal shows {seen[-500:]!r}")
            seen += os.read(terminal, 4096).decode(errors="replace")
        seen = seen.partition(text)[2]

    wait_for(">>>")
    os.write(terminal, b"hello\r")
    wait_for("]]]]")  # the answer of this model, which would go on for thousands of tokens
    os.write(terminal, b"\x03")
    wait_for("(stopped)")
    wait_for(">>>")
    os.write(terminal, b"\x1b[A")  # the arrow brings the message back
    wait_for("hello")
    os.write(terminal, b"\r")
    wait_for("]]]]")
    os.write(terminal, b"\x03")
    wait_for("(stopped)")
    wait_for(">>>")
    os.write(terminal, b"/bye\r")
    try:
        while os.read(terminal, 4096):
            pass
    except OSError:  # how Linux says that the other end is closed
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    os.close(terminal)
