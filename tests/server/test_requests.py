"""What a request may say: every field at its edges, hostile bodies, prompts that are too long. Never a 5xx."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mpo_server.chat import CHAT
from mpo_server.completions import COMPLETION
from mpo_server.fields import Table
from mpo_server.responses import RESPONSE
from tests.server.conftest import Server

MESSAGES = [{"role": "user", "content": "Hello"}]
ENDPOINTS: dict[str, tuple[Table, dict[str, Any]]] = {
    "/v1/chat/completions": (CHAT, {"messages": MESSAGES, "max_tokens": 1}),
    "/v1/completions": (COMPLETION, {"prompt": "Hello", "max_tokens": 1}),
    "/v1/responses": (RESPONSE, {"input": "Hello", "max_output_tokens": 1}),
}
NUMBERS = [
    (path, name, field.kinds[0])
    for path, (table, _) in ENDPOINTS.items()
    for name, field in table.items()
    if {"integer", "number"} & set(field.kinds)
]


@pytest.mark.parametrize(("path", "name", "kind"), NUMBERS)
def test_numeric_fields_at_their_edges(server: Server, path: str, name: str, kind: str) -> None:
    table, base = ENDPOINTS[path]
    extra: dict[str, Any] = {"logprobs": True} if name == "top_logprobs" else {}
    for text in (
        "-1",
        "0",
        "2147483648",
        "9223372036854775808",
        "1e999",
        "NaN",
        "-Infinity",
        '"1"',
        "[]",
        "{}",
        "1" * 5000,
    ):
        body = json.dumps(base | extra | {name: 0}).replace(f'"{name}": 0', f'"{name}": {text}').encode()
        reply = server.post(path, body)
        assert reply.status == 200 or 400 <= reply.status < 500, (text, reply)
        if text in ("9223372036854775808", "1e999", "NaN", "-Infinity", "[]", "{}", '"1"'):
            assert reply.status == 400, (text, reply)
        if reply.status == 400 and text in ("-1", "9223372036854775808", "[]"):
            assert reply.error["param"] == name
        if text == "-1":
            least = table[name].least
            assert (reply.status == 200) == (least is None or least <= -1)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
         "messages[0].content[0]"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages[2]"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", 3]}, "stop[1]"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"n": 17}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": "a"}}, "logit_bias"),
        ({"logit_bias": [[1]]}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "messages"),
        ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 3}}]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "x"}}}], "tool_choice": "required"},
         "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}], "tool_choice": "b"}, "tool_choice"),
        ({"functions": [{"name": "a"}]}, "functions"),
        ({"grammar": 'root ::= "a"'}, "grammar"),
        ({"suffix": "x"}, "suffix"),
        ({"model": 3}, "model"),
        ({"stream": "yes"}, "stream"),
        ({"documents": [3]}, "documents"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(server: Server, fields: dict[str, Any], param: str) -> None:
    reply = server.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1} | fields)
    assert reply.status == 400
    assert reply.error["param"] == param and reply.error["type"] == "invalid_request_error" and reply.error["code"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [4096]}, "prompt"),
        ({"prompt": [["a"]]}, "prompt[0]"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 20, "n": 4}, "n"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 3}, "best_of"),
    ],
)
def test_wrong_fields_of_completions_are_named(server: Server, fields: dict[str, Any], param: str) -> None:
    reply = server.complete(**{"prompt": "a", "max_tokens": 1} | fields)
    assert reply.status == 400 and reply.error["param"] == param


def test_unknown_fields_and_nulls_change_nothing(server: Server) -> None:
    plain = server.chat().json["choices"]
    fields = {"user": "someone", "store": True, "service_tier": "auto", "seed": None, "stop": None, "tools": None}
    assert server.chat(**fields, temperature=0.0, top_p=1, logit_bias={}).json["choices"] == plain


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"\xff\xfe",
        b'{"a": NaN}',
        b'{"messages": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 99,
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_bodies_that_are_no_object(server: Server, body: bytes, path: str) -> None:
    assert server.post(path, body).status == 400


def test_deep_nesting_is_refused(server: Server) -> None:
    deep: Any = {}
    for _ in range(80):
        deep = {"properties": {"a": deep}}
    reply = server.chat(response_format={"type": "json_schema", "json_schema": {"schema": deep}})
    assert reply.status == 400 and "nested" in reply.error["message"]


def test_bodies_of_another_kind(server: Server) -> None:
    body = json.dumps({"messages": MESSAGES}).encode()
    assert server.post("/v1/chat/completions", body, Content_Type="text/plain").status == 415
    assert server.post("/v1/chat/completions", body, Content_Encoding="gzip").status == 415
    assert server.post("/v1/chat/completions", b'{"messages": "' + b"x" * (17 << 20) + b'"}').status == 413


def test_paths_and_methods(server: Server) -> None:
    assert (server.get("/nothing").status, server.get("/nothing").error["code"]) == (404, "not_found")
    assert server.get("/v1/chat/completions").status == 405
    assert server.get("/../etc/passwd").status == 404
    assert server.get("/%2e%2e/%2e%2e/etc/passwd").status == 404
    refused = server.post("/v1/embeddings", {"input": "x"})
    assert refused.status == 501 and "embeddings" in refused.error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long(server: Server, stream: bool) -> None:
    long = "sea and land " * 2000
    for reply in (server.chat(long, stream=stream), server.complete(long, stream=stream)):
        assert reply.status == 400
        assert reply.headers["content-type"] == "application/json"
        assert reply.error["type"] == reply.error["code"] == "exceed_context_size_error"
        assert reply.error["n_ctx"] == 1024 and reply.error["n_prompt_tokens"] > 4000
    response = server.post("/v1/responses", {"input": long, "stream": stream})
    assert response.error["type"] == "exceed_context_size_error"


def test_a_prompt_that_almost_fills_the_context(server: Server) -> None:
    ids = [300 + index for index in range(1020)]
    reply = server.complete(ids, max_tokens=50, ignore_eos=True).json
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"] == reply["usage"] | {"prompt_tokens": 1020, "completion_tokens": 4}


def test_tokens_there_and_back(server: Server) -> None:
    text = "A table, für zwei 🍽️ <|end_of_text|>"
    ids = server.post("/tokenize", {"content": text}).json["tokens"]
    assert server.post("/detokenize", {"tokens": ids}).json["content"] == text
    plain = server.post("/tokenize", {"content": text, "parse_special": False}).json["tokens"]
    assert len(plain) > len(ids) and server.post("/detokenize", {"tokens": plain}).json["content"] == text
    pieces = server.post("/tokenize", {"content": text, "with_pieces": True}).json["tokens"]
    assert [piece["id"] for piece in pieces] == ids
    joined = b"".join(bytes(p) if isinstance(p, list) else p.encode() for p in (piece["piece"] for piece in pieces))
    assert joined.decode() == text
    assert server.post("/tokenize", {"content": ""}).json == {"tokens": []}
    assert server.post("/tokenize", {}).error["param"] == "content"
    assert server.post("/detokenize", {"tokens": [1, -1]}).error["param"] == "tokens[1]"
    assert server.post("/detokenize", {"tokens": [2**40]}).status == 400


def test_the_template_is_applied(server: Server) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    reply = server.post("/apply-template", {"messages": messages}).json
    assert reply["prompt"] == (
        "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
    )


def test_completions_take_texts_and_ids(server: Server) -> None:
    text = server.complete("I want to").json["choices"][0]["text"]
    ids = server.post("/tokenize", {"content": "I want to"}).json["tokens"]
    assert server.complete(ids).json["choices"][0]["text"] == text
    several = server.complete(["I want to", "The sea", "I want to"], n=2, seed=4, temperature=1).json["choices"]
    assert [choice["index"] for choice in several] == list(range(6))
    assert several[0]["text"] == several[4]["text"] != several[1]["text"] == several[5]["text"]
    events = server.complete("I want to", stream=True).events()
    assert "".join(event["choices"][0]["text"] for event in events) == text
    assert server.complete("", max_tokens=2).json["usage"]["prompt_tokens"] == 1
    assert server.complete([ids, ids], max_tokens=None).json["usage"]["completion_tokens"] <= 32


def test_echo_has_the_prompts_log_probabilities(server: Server) -> None:
    prompt = "I want to book a table"
    ids = server.post("/tokenize", {"content": prompt}).json["tokens"]
    reply = server.complete(prompt, echo=True, logprobs=2, max_tokens=2).json["choices"][0]
    assert reply["text"].startswith(prompt)
    facts = reply["logprobs"]
    assert len(facts["tokens"]) == len(facts["token_logprobs"]) == len(facts["top_logprobs"]) == len(ids) + 2
    assert facts["token_logprobs"][0] is None and facts["top_logprobs"][0] is None
    assert "".join(facts["tokens"]) == reply["text"]
    assert facts["text_offset"] == [len("".join(facts["tokens"][:index])) for index in range(len(facts["tokens"]))]
    alone = server.complete(prompt, echo=True, logprobs=2, max_tokens=0).json
    assert alone["choices"][0]["text"] == prompt and alone["usage"]["completion_tokens"] == 0
    assert alone["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(
        facts["token_logprobs"][: len(ids)], abs=1e-3
    )
    # The same as one generates token by token: the oracle.
    for count in (3, len(ids) - 1):
        told = server.complete(ids[:count], max_tokens=1, logprobs=2).json["choices"][0]["logprobs"]
        likely = dict(told["top_logprobs"][0])
        assert likely.keys() <= facts["top_logprobs"][count].keys()
        for token, value in likely.items():
            assert facts["top_logprobs"][count][token] == pytest.approx(value, abs=0.05)


def test_log_probabilities_of_completions(server: Server) -> None:
    choice = server.complete("I want to", logprobs=3).json["choices"][0]
    facts = choice["logprobs"]
    assert "".join(facts["tokens"]) == choice["text"] and facts["text_offset"][0] == 0
    for token, value, top in zip(facts["tokens"], facts["token_logprobs"], facts["top_logprobs"], strict=True):
        assert top[token] == value == max(top.values()), "at temperature 0"
    assert server.complete("I want to").json["choices"][0]["logprobs"] is None
    none = server.complete("I want to", logprobs=0).json["choices"][0]["logprobs"]
    assert none["token_logprobs"] == facts["token_logprobs"] and none["top_logprobs"] is None
