"""generate and the Python API: pieces, log-probabilities, several prompts, JSON, KV types, threads."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mpo_runtime import ConfigError
from mpo_runtime.cli.generate import read_prompts
from mpo_runtime.cli.main import app
from mpo_runtime.loading import load
from mpo_runtime.model import Model, Piece
from tests.helpers import EOS, forward, granite_config, network, some_ids, write_folder

# A random model repeats itself unless it is heated.
OPTIONS = ("--seed", "1", "--temperature", "30", "--json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("generate") / "tiny", granite_config(max_position_embeddings=256))


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with load(folder) as loaded:
        yield loaded


def run(folder: Path, *arguments: str, text: str | None = None) -> str:
    """The output of `mpo-run generate`; raises what the command raised."""
    result = CliRunner().invoke(app, ["generate", str(folder), "-n", "8", *arguments], input=text)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_pieces_carry_what_the_model_computed(model: Model) -> None:
    pieces = list(model.generate("hello", max_tokens=10, seed=3, temperature=30, top_logprobs=4))
    ids = model.text_tokenizer().encode("hello", add_special_tokens=True)
    tokens = [piece.token for piece in pieces]
    scores = model.score([*ids, *tokens])
    np.testing.assert_allclose([piece.logprob for piece in pieces], scores.logprobs[len(ids) - 1 :], atol=2e-4)
    logits = forward(model.network, [[*ids, *tokens]])[0, len(ids) - 1 : -1]
    for piece, row in zip(pieces, logits, strict=True):
        assert [choice.token for choice in piece.top] == np.argsort(-row)[:4].tolist()
        assert max(choice.logprob for choice in piece.top) >= piece.logprob
    assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish in ("stop", "length")


def test_json_says_what_the_api_says(folder: Path, model: Model) -> None:
    facts = json.loads(run(folder, "-p", "hello", "--seed", "3", "--temperature", "30", "--json", "--logprobs", "2"))
    pieces = list(model.generate("hello", max_tokens=8, seed=3, temperature=30, top_logprobs=2))
    assert facts["tokens"] == [piece.token for piece in pieces]
    assert facts["text"] == "".join(piece.text for piece in pieces)
    assert facts["finish"] == pieces[-1].finish
    np.testing.assert_allclose(facts["logprobs"], [piece.logprob for piece in pieces], rtol=1e-4)
    first = pieces[0].top[0]
    assert facts["top_logprobs"][0][0]["token"] == first.token
    assert facts["timings"]["prompt_tokens"] == 6 and facts["timings"]["new_tokens"] == len(pieces)


def test_several_prompts_are_answered_as_if_alone(folder: Path, tmp_path: Path) -> None:
    lines, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("hello\n\nwörld\r\n")
    rows.write_text('{"prompt": "hello"}\n{"prompt": "wörld", "id": 2}\n')
    alone = [json.loads(run(folder, "-p", text, *OPTIONS)) for text in ("hello", "wörld")]
    for path in (lines, rows):
        facts = [json.loads(line) for line in run(folder, "--prompts", str(path), *OPTIONS).splitlines()]
        assert [row["index"] for row in facts] == [0, 1]
        assert [row["text"] for row in facts] == [row["text"] for row in alone]
    plain = run(folder, "--prompts", str(lines), "--seed", "1", "--logit-bias", f"{EOS}=-100")
    assert plain.startswith("hello") and "\n\nwörld" in plain


MARK = "\ufeff"


@pytest.mark.parametrize("line", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", MARK])
def test_prompt_files_of_other_systems(folder: Path, tmp_path: Path, mark: str, line: str) -> None:
    lines, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_bytes(f"{mark}hello{line}wörld{line}".encode())
    rows.write_bytes(f'{mark}{{"prompt": "hello"}}{line}{{"prompt": "wörld"}}{line}'.encode())
    for path in (lines, rows):
        assert read_prompts(path) == ["hello", "wörld"]
    facts = json.loads(run(folder, *OPTIONS, text=f"{mark}hello{line}"))
    assert facts["prompt"] == "hello"


def test_prompts_in_another_encoding_are_refused_with_a_remedy(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("hällo".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"prompts\.txt: not UTF-8 at byte 1 \(0xE4\); convert it with: iconv"):
        run(folder, "--prompts", str(tmp_path / "prompts.txt"))
    for name, data in (("UTF-16", "hello".encode("utf-16")), ("UTF-16LE", "hello".encode("utf-16-le"))):
        result = CliRunner().invoke(app, ["generate", str(folder)], input=data)
        assert f"standard input: not UTF-8 at byte 0, it is {name}; convert it" in str(result.exception)


def test_special_tokens_in_a_raw_prompt(folder: Path, model: Model) -> None:
    plain, parsed = (json.loads(run(folder, "-p", "hi</s>", *OPTIONS, *more)) for more in ([], ["--parse-special"]))
    assert plain["timings"]["prompt_tokens"] == 7 and parsed["timings"]["prompt_tokens"] == 4
    ids = model.encode("hi</s>", parse_special=True)
    assert parsed["tokens"] == [piece.token for piece in model.generate(ids, max_tokens=8, seed=1, temperature=30)]
    with pytest.raises(ConfigError, match="--parse-special: is for prompts that are continued as they are"):
        run(folder, "-p", "x", "--parse-special", "--chat")


def test_prompts_as_messages_with_options_of_the_template(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "chat", granite_config(max_position_embeddings=256))
    template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{{ thinking }}{{ tools|tojson }}{{ a }}"
    )
    (folder / "chat_template.jinja").write_text(template)
    (folder.parent / "tools.json").write_bytes(b'\xef\xbb\xbf[{"name": "f"}]\r\n')
    chosen = ("--system", "S", "--thinking", "--tools", str(folder.parent / "tools.json"), "--template-arg", "a=1.0")
    facts = json.loads(run(folder, "-p", "hello", *OPTIONS, *chosen))
    with load(folder) as model:
        rendered = 's:S;u:hello;True[{"name": "f"}]1.0'
        ids = model.text_tokenizer().encode(rendered)
        assert facts["timings"]["prompt_tokens"] == len(ids)
        expected = [piece.token for piece in model.generate(ids, max_tokens=8, seed=1, temperature=30)]
        assert facts["tokens"] == expected
        answer = "".join(piece.text for piece in model.generate(ids, max_tokens=8, seed=1, temperature=30))
    assert run(folder, "-p", "hello", "--seed", "1", "--temperature", "30", *chosen) == answer + "\n"
    chat = CliRunner().invoke(
        app, ["chat", str(folder), "-p", "hello", "-n", "8", "--seed", "1", "--temperature", "30", *chosen]
    )
    assert chat.stdout.rstrip("\n") == answer.rstrip("\n")
    without = json.loads(run(folder, "-p", "hello", "--chat", *OPTIONS))
    assert without["timings"]["prompt_tokens"] == len("u:hello;null")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tools", "absent.json"], "--tools absent.json: cannot be read"),
        (["--tools", "TEXT"], "--tools .*: is not JSON .*; give a list of objects"),
        (["--documents", "NUMBERS"], "--documents .*: expected a list of objects"),
        (["--documents", "LATIN"], r"not UTF-8 at byte 1 \(0xE4\)"),
        (["--template-arg", "a"], "--template-arg a: expected NAME=VALUE"),
        (["--template-arg", "1a=2"], "template argument '1a'"),
        (["--template", "rag"], "template 'rag': the model has no such chat template; it has no named ones"),
        (["--thinking"], "the model has no chat template"),
    ],
)
def test_options_of_the_template_that_cannot_be_honoured(
    arguments: list[str], message: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "TEXT").write_text("{")
    (tmp_path / "NUMBERS").write_text("[1, 2]")
    (tmp_path / "LATIN").write_bytes('"ä"'.encode("latin-1"))
    chat = tmp_path / "chat"
    if "--thinking" not in arguments:
        write_folder(chat)
        (chat / "chat_template.jinja").write_text("x")
    given = [str(tmp_path / item) if item.isupper() else item for item in arguments]
    with pytest.raises(ConfigError, match=message):
        run(folder if "--thinking" in arguments else chat, "-p", "x", *given)


def test_a_model_without_a_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "bare")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"bare: has no tokenizer, which text needs; put the model's tokenizer\.json"):
        run(folder, "-p", "x")


def test_the_prompt_comes_from_standard_input(folder: Path) -> None:
    assert run(folder, "--seed", "1", text="hello\n") == run(folder, "--seed", "1", "-p", "hello")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\n", "holds no prompt"),
        ("a.txt", b"a\n\xff", "not UTF-8 at byte 2"),
        ("a.jsonl", b'{"prompt": "a"}\n{', "line 2 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'\n{"text": "a"}', "line 2: expected an object with a text under `prompt`"),
        ("a.jsonl", b'{"prompt": 3}', "line 1: expected"),
    ],
)
def test_wrong_prompt_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "x", "--logprobs", "2"], "add --json"),
        (["-p", "x", "--json", "--logprobs", "999"], "top_logprobs: expected 0 to 258, found 999"),
        (["-p", "x", "--kv-type", "q8_0"], "kv-type q8_0: expected one of f32, f16, bf16"),
        (["-p", "x", "--logit-bias", "900=1"], "logit_bias: token id 900 lies outside the vocabulary of 258"),
        (["-p", "x", "--logit-bias", "a=1"], "expected ID=BIAS"),
        (["-p", "x", "--temperature", "-1"], "temperature is -1.0"),
        (["-p", "x", "--prompts", "y"], "give one of them"),
        (["-p", "x" * 300], "do not fit into a context of 256"),
        (["-p", "x", "--stop", ""], "stop"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run(folder, *arguments)


def test_a_prompt_that_does_not_fit_is_named_before_any_runs(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("good\n" + "x" * 300)
    result = CliRunner().invoke(app, ["generate", str(folder), "--prompts", str(tmp_path / "prompts.txt")])
    assert "prompts.txt: prompt 2: prompt: 301 tokens do not fit" in str(result.exception)
    assert result.stdout == ""


def test_environment_variables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(folder, "-p", "hello", "--seed", "9", "--temperature", "33", "--json", "--ctx-size", "20")
    for name, value in {"MPO_SEED": "9", "MPO_TEMPERATURE": "33", "MPO_CTX_SIZE": "20"}.items():
        monkeypatch.setenv(name, value)
    facts, again = json.loads(expected), json.loads(run(folder, "-p", "hello", "--json"))
    assert again["tokens"] == facts["tokens"]
    monkeypatch.setenv("MPO_CTX_SIZE", "5")
    with pytest.raises(ConfigError, match="context of 5"):
        run(folder, "-p", "hello")


def test_shell_completion() -> None:
    environment = {"_MPO_RUN_COMPLETE": "complete_bash", "COMP_WORDS": "mpo-run ch", "COMP_CWORD": "1"}
    assert CliRunner().invoke(app, [], env=environment, prog_name="mpo-run").output.split() == ["chat"]


@pytest.mark.parametrize(
    ("kv_type", "dtype", "tolerance"), [("f16", torch.float16, 0.01), ("bf16", torch.bfloat16, 0.1)]
)
def test_the_cache_is_stored_in_the_type_asked_for(
    folder: Path, kv_type: str, dtype: torch.dtype, tolerance: float
) -> None:
    ids = some_ids(40, vocabulary=256)
    ours, exact = network(folder, kv_type=kv_type), network(folder)
    cache: Any = ours.ops.new_cache(ours.architecture, 1, 8)
    assert {block.dtype for block in cache.held} == {dtype}
    difference = np.abs(forward(ours, [ids]) - forward(exact, [ids])).max()
    assert 0 < difference < tolerance  # stored more coarsely, and computed alike


def test_threads_share_steps(model: Model) -> None:
    def text(prompt: str) -> list[int]:
        return [piece.token for piece in model.generate(prompt, max_tokens=20, seed=1, temperature=30)]

    prompts = ["one", "two", "three"]
    expected = [text(prompt) for prompt in prompts]
    found: dict[str, list[int]] = {}
    threads = [
        threading.Thread(target=lambda prompt=prompt: found.update({prompt: text(prompt)})) for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[prompt] for prompt in prompts] == expected


def test_beside_a_half_read_generation_others_go_on(model: Model) -> None:
    pieces = model.generate("one", max_tokens=9, logit_bias={EOS: -100})
    assert isinstance(next(pieces), Piece)
    assert list(model.generate("two", max_tokens=2))
    assert len(model.score("scoring goes on").tokens) == 15
    assert len(list(pieces)) == 8


def test_a_closed_model_says_so(folder: Path) -> None:
    with load(folder) as model:
        pass
    with pytest.raises(ConfigError, match="closed"):
        model.generate("hello")
    with pytest.raises(ConfigError, match="closed"):
        model.score("hello")


def test_a_chi_that_cuts_nothing_is_said(folder: Path) -> None:
    result = CliRunner().invoke(app, ["generate", str(folder), "-p", "hello", "-n", "2", "--chi", "3"])
    assert "note: --chi 3 changes nothing: the model has no cores" in result.stderr
