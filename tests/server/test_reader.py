"""What a model writes, cut into pieces of any size, becomes the same reasoning, content and calls."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import llguidance
import pytest
from hypothesis import given
from hypothesis import strategies as some

from mpo_formats import ConfigError
from mpo_runtime import load
from mpo_runtime.text.chat_template import ChatTemplate
from mpo_runtime.text.tokenizer import Tokenizer
from mpo_server import structure
from mpo_server.errors import ApiError
from mpo_server.messages import read_messages
from mpo_server.reader import MessageReader
from mpo_server.structure import Compiler, lark_grammar
from mpo_server.tools import (
    GRANITE,
    HERMES,
    Dialect,
    Tools,
    described,
    dialect_of,
    forced_calls,
    parse_calls,
    read_tools,
    with_written_calls,
)
from tests.server.conftest import NANO

CALL = '{"name": "add", "arguments": {"a": 1, "b": [2]}}'
WANTED = ("add", {"a": 1, "b": [2]})
Read = tuple[str, str, list[tuple[str, Any]]]


def read(parts: list[tuple[str, bool]], **options: Any) -> Read:
    """Reasoning, content and calls of parts; the last part is pushed as the last."""
    reader, reasoning, content, calls = MessageReader(**options), "", "", []
    for index, part in enumerate(parts):
        for found in reader.push([part], index == len(parts) - 1):
            reasoning, content = reasoning + found.reasoning, content + found.content
            if found.call:
                calls.append((found.call.name, json.loads(found.call.arguments)))
    return reasoning, content, calls


CASES: list[tuple[str, dict[str, Any], Read]] = [
    ("Hello there", {}, ("", "Hello there", [])),
    ("  Hello ", {}, ("", "  Hello ", [])),
    ("<think>\nWell\n</think>\n\nHello", {"thinks": True}, ("Well", "Hello", [])),
    ("\n<think>Well</think>Hello </think>", {"thinks": True}, ("Well", "Hello </think>", [])),
    ("Well</think>Hello", {"thinks": True, "thinking": True}, ("Well", "Hello", [])),
    ("<think>never ends", {"thinks": True}, ("never ends", "", [])),
    ("<thin air", {"thinks": True}, ("", "<thin air", [])),
    ("Hello <think>x</think>", {"thinks": True}, ("", "Hello <think>x</think>", [])),
    ("<think>Well</think><response>Hello</response>", {"thinks": True, "responds": True}, ("Well", "Hello", [])),
    ("<think>x</think>", {}, ("", "<think>x</think>", [])),
    (f"<tool_call>\n{CALL}\n</tool_call>", {"dialect": HERMES}, ("", "", [WANTED])),
    (f"Hm.\n\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>\n", {"dialect": HERMES}, ("", "Hm.", [WANTED] * 2)),
    (f"<tool_call>{CALL}</tool_call>x<tool_call>{CALL}</tool_call>", {"dialect": HERMES, "single": True}, ("", "", [WANTED])),
    (f"<tool_call>{CALL}", {"dialect": HERMES}, ("", "", [WANTED])),
    ("a <tool_call>nonsense</tool_call> b", {"dialect": HERMES}, ("", "a <tool_call>nonsense</tool_call> b", [])),
    ("a <tool_cal", {"dialect": HERMES}, ("", "a <tool_cal", [])),
    (f"<tool_call>{CALL}</tool_call>", {}, ("", f"<tool_call>{CALL}</tool_call>", [])),
    (f"<|tool_call|>[{CALL}, {CALL}]", {"dialect": GRANITE}, ("", "", [WANTED] * 2)),
    (f"<|tool_call|>{CALL}", {"dialect": GRANITE}, ("", "", [WANTED])),
    (f"<think>Hm</think>I will. <|tool_call|>[{CALL}]", {"thinks": True, "dialect": GRANITE}, ("Hm", "I will.", [WANTED])),
]  # fmt: skip


@pytest.mark.parametrize(("text", "options", "wanted"), CASES)
def test_what_is_read_does_not_depend_on_the_pieces(text: str, options: dict[str, Any], wanted: Read) -> None:
    assert read([(text, False)], **options) == wanted
    assert read([(letter, False) for letter in text], **options) == wanted

    @given(some.lists(some.integers(0, len(text)), max_size=6))
    def cut(places: list[int]) -> None:
        edges = [0, *sorted(places), len(text)]
        parts = [(text[start:end], False) for start, end in pairwise(edges)]
        assert read(parts, **options) == wanted

    cut()


def test_marks_may_be_special_tokens() -> None:
    parts = [("Well. ", False), ("<|tool_call|>", True), (f"[{CALL}]", False), ("<|other|>", True)]
    assert read(parts, dialect=GRANITE) == ("", "Well.", [WANTED])
    hermes = [("<tool_call>", True), (CALL, False), ("</tool_call>", True), ("\n", False), ("<tool_call>", True)]
    assert read([*hermes, (CALL, False), ("</tool_call>", True)], dialect=HERMES) == ("", "", [WANTED] * 2)
    assert read([("<|tool_call|>", True), ("x", False)]) == ("", "x", [])
    assert read([("<think>", True), ("a", False), ("</think>", True), ("b", False)], thinks=True) == ("a", "b", [])


def test_content_comes_as_soon_as_it_is_certain() -> None:
    reader = MessageReader(dialect=HERMES)
    told = [
        "".join(found.content for found in reader.push([(piece, False)], False))
        for piece in ("Hi", " you", " <to", "p")
    ]
    assert told == ["Hi", " you", "", " <top"]


@pytest.mark.parametrize("text", ["", "x", "[]", "3", '{"name": 3}', '{"name": "a", "arguments": 3}', "[" * 5000])
def test_what_is_no_call(text: str) -> None:
    assert parse_calls(text) is None


def test_calls_in_other_spellings() -> None:
    [call] = parse_calls('{"name": "a", "parameters": {"b": 1}} and more') or []
    assert (call.name, call.arguments) == ("a", '{"b": 1}')
    [call] = parse_calls('{"name": "a", "arguments": "{\\"b\\": 1}"}') or []
    assert call.arguments == '{"b": 1}'
    [call] = parse_calls('{"name": "a"}') or []
    assert call.arguments == "{}"


FUNCTIONS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"$ref": "#/$defs/digit"}, "b": {"enum": ["x"]}},
                "required": ["a", "b"],
                "additionalProperties": False,
                "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]


@pytest.mark.parametrize("dialect", [GRANITE, HERMES])
@pytest.mark.parametrize("parallel", [False, True])
def test_the_grammar_of_calls_takes_what_the_reader_reads(dialect: Dialect, parallel: bool) -> None:
    tools = read_tools(FUNCTIONS, "required", parallel)
    with load(NANO) as model:
        compiler = Compiler(model)
        grammar = compiler.compile(lark_grammar(f"start: calls\n{forced_calls(tools, dialect, False)}"), "tools")
        first, second = '{"name": "add", "arguments": {"a": 3, "b": "x"}}', '{"name": "stop", "arguments": {}}'

        def written(*calls: str) -> str:
            if dialect.many:
                return f"{dialect.open}[{', '.join(calls)}]"
            return "\n".join(f"{dialect.open}\n{call}\n{dialect.close}" for call in calls)

        def accepts(text: str) -> bool:
            matcher = grammar.matcher.deep_copy()
            return bool(matcher.consume_tokens(model.text_tokenizer().encode(text))) and matcher.is_accepting()

        assert accepts(written(first)) and accepts(written(second))
        assert accepts(written(first, second)) is parallel
        assert not accepts(written('{"name": "other", "arguments": {}}'))
        assert not accepts(written('{"name": "add", "arguments": {"a": 10, "b": "x"}}'))
        assert not accepts(first) and not accepts(" " + written(first)) and not accepts(written(first) + " ")
        compiler.close()
    assert read([(written(first), False)], dialect=dialect)[2] == [("add", {"a": 3, "b": "x"})]


def test_a_schema_takes_no_longer_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {"allOf": [{"type": "integer", "multipleOf": value} for value in (9973, 9967, 9949, 9941)]}
    monkeypatch.setattr(structure, "SECONDS", 1.0)
    with load(NANO) as model:
        compiler = Compiler(model)
        for _ in range(2):  # the helper that was ended is followed by another
            with pytest.raises(ApiError, match="longer than 1 seconds") as caught:
                compiler.schema(slow, "response_format")
            assert (caught.value.status, caught.value.param) == (400, "response_format")
            assert compiler.schema({"type": "integer"}, "x").hook() is not None
        kept = compiler.schema({"type": "integer"}, "x")
        for number in range(structure.KEPT_GRAMMARS - 1):
            compiler.schema({"const": number}, "x")
        assert compiler.schema({"type": "integer"}, "x") is kept
        for number in range(structure.KEPT_GRAMMARS):
            compiler.schema({"const": number}, "x")
        assert compiler.schema({"type": "integer"}, "x") is not kept
        compiler.close()


def test_a_mark_that_is_a_special_token_is_demanded_as_one(shared: Any) -> None:
    tokenizer = Tokenizer.from_folder(shared / "tokenizers" / "granite-3.3-reconstructed")
    template = ChatTemplate.from_files(
        lambda name: (shared / "tokenizers" / "granite-3.3-reconstructed" / name).read_bytes()
    )
    assert template is not None and dialect_of(template.source) == GRANITE
    special = GRANITE.open in tokenizer.special_tokens
    rules = forced_calls(read_tools(FUNCTIONS, "required", True), GRANITE, special)
    raw = llguidance.LLTokenizer(tokenizer.to_json(), eos_token=tokenizer.eos_id)
    matcher = llguidance.LLMatcher(raw, lark_grammar(f"start: calls\n{rules}"))
    assert not matcher.is_error(), matcher.get_error()
    text = f'{GRANITE.open}[{{"name": "stop", "arguments": {{}}}}]'
    assert matcher.consume_tokens(tokenizer.encode(text, parse_special=True)) and matcher.is_accepting()


def test_the_dialect_of_a_template() -> None:
    assert dialect_of("{% if tools %}<tool_call>{% endif %}") == HERMES
    assert dialect_of("{% if tools %}<|tool_call|>{% endif %}") == GRANITE
    assert dialect_of("{{ messages }}") is None and dialect_of("{{ tools }}") is None


EARLIER = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
MESSAGES = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": None, "tool_calls": [EARLIER]},
    {"role": "tool", "tool_call_id": "1", "content": "4"},
]


def test_earlier_calls_are_written_as_the_model_would() -> None:
    messages = read_messages(MESSAGES)
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 2}
    assert (
        with_written_calls(messages, GRANITE)[1]["content"] == '<|tool_call|>[{"name": "add", "arguments": {"a": 2}}]'
    )
    told = described(messages, read_tools(FUNCTIONS, None, True))
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert '"name": "stop"' in told[0]["content"] and told[3]["content"] == "<tool_response>\n4\n</tool_response>"
    assert described(messages, Tools())[0]["role"] == "user"


def test_tools_that_are_wrong() -> None:
    same = [FUNCTIONS[1], FUNCTIONS[1]]
    for tools, choice in ((same, None), (FUNCTIONS, "never"), (FUNCTIONS, {"type": "function"}), ([3], None)):
        with pytest.raises(ApiError):
            read_tools(tools, choice, True)  # type: ignore[arg-type]
    assert read_tools(FUNCTIONS, {"type": "function", "name": "stop"}, True).functions[0]["name"] == "stop"
    assert not issubclass(ApiError, ConfigError)
