"""Chat templates against jinja2 as transformers runs it, and templates and messages that mean harm."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_formats.errors import ConfigError
from mpo_runtime.text.chat_template import ChatTemplate

FOLDER = Path(__file__).parent / "templates"
NAMES = ["chatml", "llama3", "mistral", "gemma", "zephyr"]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": "Hi"}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The "weather" of <a> city & more, in °C',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "clock", "description": "日本の時刻", "parameters": {}, "strict": True}},
]
TALK = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "  Zwölf Boxkämpfer 🥊?\r\n\n"},
    {"role": "assistant", "content": "<think>\nHm,\n\nwell\n</think>\n\nYes, twelve.\n"},
    {"role": "user", "content": "{{ 7*7 }} {% raise %} <b>&amp;</b> \\n 'quoted' \"twice\""},
]
CALLS = [
    {"role": "user", "content": "What is the weather in Köln?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "abcdefghi",
                "type": "function",
                "function": {"name": "weather", "arguments": {"city": "Köln", "n": 1.0}},
            }
        ],
    },
    {"role": "tool", "content": '{"celsius": 21}', "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "21 °C."},
    {"role": "user", "content": "Thanks"},
]


def jinja2_render(source: str, **variables: Any) -> str:
    """What transformers' apply_chat_template renders."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template([variables.pop("messages")], chat_template=source, **variables)
    return rendered[0]


def read(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def granite(shared: Path) -> str:
    return (shared / "tokenizers/granite-3.3-reconstructed/chat_template.jinja").read_text(encoding="utf-8")


def variations() -> Iterator[dict[str, Any]]:
    for messages in (TALK, TALK[1:], [USER], [*TALK, {"role": "assistant", "content": "Ja"}], CALLS):
        for prompt in (True, False):
            yield {"messages": messages, "add_generation_prompt": prompt}
        yield {"messages": messages, "add_generation_prompt": True, "tools": TOOLS}


def compare(source: str, variables: dict[str, Any]) -> bool:
    """Compares with jinja2; False where both refuse the conversation."""
    template = ChatTemplate(source, isolated=False)
    try:
        expected = jinja2_render(source, **variables)
    except Exception:
        with pytest.raises(ConfigError):
            template.render(**variables)
        return False
    assert template.render(**variables) == expected
    return True


@pytest.mark.parametrize("name", NAMES)
def test_renders_what_transformers_renders(name: str) -> None:
    rendered = [compare(read(name), {**variables, **TOKENS}) for variables in variations()]
    assert sum(rendered) >= 9


@pytest.mark.shared
def test_renders_granite_as_transformers_does(shared: Path, granite: str) -> None:
    documents = [{"doc_id": 1, "text": "Bonds < cores & 'χ'"}, {"doc_id": "b", "text": "Second\n"}]
    extras: list[dict[str, Any]] = [
        {},
        {"documents": documents},
        {"thinking": True},
        {"documents": documents, "controls": {"citations": True, "hallucinations": True}},
        {"controls": {"length": "short", "originality": "abstractive"}},
        {"available_tools": TOOLS},
    ]
    for variables in variations():
        for extra in extras:
            assert compare(granite, {**variables, **extra, **TOKENS})


@pytest.mark.parametrize("name", ["chatml", "gemma"])
def test_variables_reach_the_template(name: str) -> None:
    assert compare(read(name), {"messages": [USER], "add_generation_prompt": True, "enable_thinking": False, **TOKENS})


# Python's strip takes U+001C to U+001F for white space, Unicode and minijinja do not.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x1c\x1d\x1e\x1f"), max_size=12)
ROLES = st.sampled_from(["user", "assistant", "system"])


@given(st.lists(st.tuples(ROLES, TEXT), min_size=1, max_size=5), st.booleans())
def test_any_text_renders_as_in_jinja2(turns: list[tuple[str, str]], prompt: bool) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    for name in NAMES:
        compare(read(name), {"messages": messages, "add_generation_prompt": prompt, "date_string": "today", **TOKENS})


SNIPPETS = [
    "{% for m in messages %}{{ loop.index }}{{ m.role|upper }}{{ '\\n' if not loop.last }}{% endfor %}\n\n",
    "a\r\nb{# gone #}\n  {% if true %}\n  c\n  {% endif %}\nd\n",
    "{%- set ns = namespace(n=0) %}{% for i in range(4) %}{% if i == 2 %}{% continue %}{% endif %}{% set ns.n = ns.n + i %}"
    "{% endfor %}{{ ns.n }}",
    "{{ none }} {{ true }} {{ 1.0 }} {{ 7 // 2 }} {{ 7 / 2 }} {{ [1, 'x', none] }} {{ {'k': true} }}",
    "{{ 'a-b-c'.split('-')[-1] }} {{ ' x '.strip() }} {{ 'abc'[::-1] }} {{ 'ab'.replace('a', 'x') }} {{ 'ab'.title() }}",
    "{{ messages|map(attribute='role')|join(',') }} {{ messages|selectattr('role', 'eq', 'user')|list|length }}",
    "{{ {'b': [1, {'ü': '<'}], 'a': none}|tojson }} {{ [1, 2]|tojson(indent=2) }} {{ 'é'|tojson(ensure_ascii=true) }}",
    "{{ {'b': 1, 'a': 2}|tojson(separators=(',', ':'), sort_keys=true) }} {{ {'b': 1}.items()|list }}",
    "{% macro f(a, b='d') %}[{{ a }}{{ b }}]{% endmacro %}{{ f(1) }}{{ f(2, b='e') }}",
    "{{ missing }}{{ missing is defined }}{{ 'x' in missing }}{{ missing|default('d') }}{{ messages[0].missing }}",
    "{{ messages[0].get('content') }} {{ messages[0]['nothing'] }} {{ messages[0].nothing is defined }}",
    "{{ 'x' if messages|length > 1 else 'y' }}{{ messages[-1].content is string }}{{ messages is iterable }}",
]


@pytest.mark.parametrize("source", SNIPPETS)
def test_features_agree_with_jinja2(source: str) -> None:
    assert compare(source, {"messages": TALK, "add_generation_prompt": False})


@pytest.mark.shared
def test_the_helper_renders_the_same(granite: str) -> None:
    isolated, plain = ChatTemplate(granite), ChatTemplate(granite, isolated=False)
    for variables in variations():
        assert isolated.render(**variables) == plain.render(**variables)
    isolated.close()
    assert isolated.render([USER]) == plain.render([USER])  # closing is not the end
    isolated.close()


def test_text_parts() -> None:
    parts = [{"type": "text", "text": " one "}, {"type": "text", "text": "two"}]
    message = {"role": "user", "content": parts}
    source = read("gemma")
    assert compare(source, {"messages": [message], "add_generation_prompt": True, **TOKENS})
    joined = ChatTemplate(read("zephyr"), isolated=False).render([message], **TOKENS)
    assert joined == "<|user|>\n one \ntwo</s>\n<|assistant|>\n"


BOMBS = {
    "a long range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "a long string": "{{ 'a' * 10**10 }}",
    "a long list": "{{ [1] * 10**10 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "a large power": "{{ 10**10**10 }}",
    "deep brackets": "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
    "deep blocks": "{% if 1 %}" * 9000 + "{% endif %}" * 9000,
}
MEMORY_BOMBS = {
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by hand": "{% set x = 'ab' %}" + "{% set x = x + x %}" * 60,
    "a wide format": "{{ '%0999999999d'|format(1)|length }}",
    "a wide indent": "{{ 'a'|indent(10**10)|length }}",
    "growing messages": "{{ messages.extend(messages) }}" * 60,
    "long output": "{{ 'a' * 90000000 }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_in_this_process_too(name: str) -> None:
    with pytest.raises(ConfigError, match="^chat template: [^\n]*$"):
        ChatTemplate(BOMBS[name], isolated=False).render([USER])


@pytest.mark.parametrize("name", [*BOMBS, *MEMORY_BOMBS])
def test_bombs_end_in_the_helper(name: str) -> None:
    resource = pytest.importorskip("resource")
    template = ChatTemplate({**BOMBS, **MEMORY_BOMBS}[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match="^chat template: [^\n]*$"):
        template.render([USER])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB on Linux, bytes on macOS
    template.close()


def test_a_rendering_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpo_runtime.text.chat_template.SECONDS", 0.5)
    slow = (
        "{% set x = 'a' * 999999 %}{% for i in range(99999) %}{% set y = x|upper|lower|replace('a', 'b') %}{% endfor %}"
    )
    template = ChatTemplate("{% if messages|length > 1 %}" + slow + "{% endif %}ok")
    with pytest.raises(ConfigError, match="takes longer than 0.5 seconds"):
        template.render([USER, USER])
    assert template.render([USER]) == "ok"  # with a new helper
    template.close()


def test_the_helper_ends_with_its_template() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render([USER]) == "Hi"
    helper = template._renderer.__self__._process._process
    assert helper.poll() is None
    del template
    gc.collect()
    assert helper.poll() is not None


def test_a_missing_interpreter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(ConfigError, match="does not start; .*isolated=False"):
        ChatTemplate("x").render([USER])
    assert ChatTemplate("x", isolated=False).render([USER]) == "x"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_starts_its_own_helper() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    template.render([USER])
    child = os.fork()
    if child == 0:
        answer = template.render([{"role": "user", "content": "child"}])
        template.close()
        os._exit(0 if answer == "child" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert template.render([USER]) == "Hi"
    template.close()


def test_threads_take_turns() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    wrong: list[str] = []

    def ask(name: str) -> None:
        for index in range(50):
            content = f"{name} {index}"
            if template.render([{"role": "user", "content": content}]) != content:
                wrong.append(content)

    threads = [threading.Thread(target=ask, args=(f"thread {index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    template.close()


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__",
        "''['__class__']",
        "''|attr('__class__')",
        "messages.__class__",
        "messages[0].__class__.__mro__",
        "messages[0].get.__self__",
        "messages.append.__self__.__class__",
        "raise_exception.__globals__",
        "strftime_now.__globals__['__builtins__']",
        "messages|map(attribute='__class__')|first",
        "namespace.__init__.__globals__",
        "self.__init__.__globals__",
        "range.__subclasses__()",
        "debug()",
        "lipsum.__globals__",
        "cycler.__init__.__globals__.os",
    ],
)
def test_no_way_to_python(expression: str, isolated: bool) -> None:
    template = ChatTemplate("[{{ " + expression + " }}]", isolated=isolated)
    try:
        assert template.render([USER]) == "[]"  # undefined
    except ConfigError as error:
        assert "unknown method" in str(error) or "unknown function" in str(error) or "undefined" in str(error)
    template.close()


@pytest.mark.parametrize("tag", ["{% include 'x' %}", "{% import '/etc/passwd' as x %}", "{% extends 'x' %}"])
def test_no_way_to_files(tag: str) -> None:
    with pytest.raises(ConfigError, match="template not found"):
        ChatTemplate(tag, isolated=False).render([USER])


@pytest.mark.parametrize(
    "text", ["{{ 7*7 }}", "{% for i in range(9) %}x{% endfor %}", "{# c #}", "{{ messages }}", "%}"]
)
def test_template_syntax_in_a_message_is_text(text: str) -> None:
    for name in NAMES:
        rendered = ChatTemplate(read(name), isolated=False).render([{"role": "user", "content": text}], **TOKENS)
        assert text in rendered


def test_a_template_cannot_change_the_callers_messages() -> None:
    messages = [{"role": "user", "content": "Hi", "list": [1]}]
    ChatTemplate("{{ messages[0].list.append(2) }}{{ messages.clear() }}", isolated=False).render(messages)
    assert messages == [{"role": "user", "content": "Hi", "list": [1]}]


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "messages"),
        ("Hi", "messages"),
        ({"role": "user", "content": "Hi"}, "messages"),
        (["Hi"], r"messages\[0\] is a str"),
        ([{"content": "Hi"}], r"messages\[0\]\.role"),
        ([{"role": 3, "content": "Hi"}], r"messages\[0\]\.role"),
        ([USER, {"role": "user"}], r"messages\[1\]\.content"),
        ([{"role": "user", "content": None}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": b"Hi"}], r"messages\[0\]\.content is a bytes"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\]\.content\[0\].*only text"),
        ([{"role": "user", "content": ["Hi"]}], r"messages\[0\]\.content\[0\]"),
        ([{"role": "user", "content": "Hi", "x": object()}], r"messages\[0\]\.x is a object"),
        ([{"role": "user", "content": "Hi", "x": {1: 2}}], r"messages\[0\]\.x: has the key 1"),
        ([{"role": "user", "content": "a\ud800"}], "surrogate"),
    ],
)
def test_bad_messages_are_named(messages: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ChatTemplate("x", isolated=False).render(messages)


def test_other_bad_input_is_named() -> None:
    template = ChatTemplate("x", isolated=False)
    deep: list[Any] = []
    for _ in range(99):
        deep = [deep]
    for keywords, named in (
        ({"tools": [1]}, "^tools"),
        ({"documents": {"a": 1}}, "^documents"),
        ({"thinking": {1, 2}}, "^thinking is a set"),
        ({"extra": deep}, "nested deeper"),
    ):
        with pytest.raises(ConfigError, match=named):
            template.render([USER], **keywords)
    with pytest.raises(ConfigError, match="bytes"):
        ChatTemplate(b"x")
    with pytest.raises(ConfigError, match="characters"):
        ChatTemplate("x" * (1 << 21))
    with pytest.raises(ConfigError, match="syntax error"):
        ChatTemplate("{% if %}").render([USER])
    with pytest.raises(ConfigError, match="^chat template: Conversation roles must alternate"):
        ChatTemplate(read("gemma")).render([{"role": "assistant", "content": "Hi"}], **TOKENS)


# Encoding a conversation
