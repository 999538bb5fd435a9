"""The Python API: generating, stopping, scoring, and several threads on one model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GraniteForCausalLM
from transformers.utils import logging

import mpo_runtime
from mpo_formats import CheckpointError, ConfigError
from mpo_runtime import Model, SamplingOptions, load, native
from mpo_runtime.engine import Generation, Request, Scheduler, Step
from mpo_runtime.model import end_ids
from mpo_runtime.text.chat_template import TemplateOptions
from mpo_runtime.text.tokenizer import Tokenizer
from tests.helpers import (
    BOS,
    EOS,
    VOCABULARY,
    byte_tokenizer,
    granite_config,
    random_tensors,
    some_ids,
    write_folder,
    write_weights,
)

logging.set_verbosity_error()
logging.disable_progress_bar()

RAW = byte_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = granite_config(tie_word_embeddings=False)
    return write_folder(tmp_path_factory.mktemp("api") / "model", config, seed=4)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with load(folder) as opened:
        yield opened


def text_of(pieces: Any) -> str:
    return "".join(piece.text for piece in pieces)


def test_text_and_ids_give_the_same_answer(model: Model) -> None:
    pieces = list(model.generate("Hello", temperature=0, max_tokens=20))
    ids = [BOS, *RAW.encode("Hello", add_special_tokens=False).ids]
    assert [piece.token for piece in model.generate(ids, temperature=0, max_tokens=20)] == [p.token for p in pieces]
    assert text_of(pieces) == RAW.decode([*ids, *(piece.token for piece in pieces)]).removeprefix("Hello")
    assert [piece.finish for piece in pieces] == [None] * 19 + ["length"]
    assert all(piece.logprob <= 0 for piece in pieces)


def test_a_seed_makes_a_text_reproducible(model: Model) -> None:
    first, second, third = (
        text_of(model.generate("Once", temperature=1.5, seed=seed, max_tokens=12)) for seed in (1, 1, 2)
    )
    assert first == second != third
    options = SamplingOptions(temperature=1.5, seed=1)
    assert text_of(model.generate("Once", sampling=options, max_tokens=12)) == first
    assert text_of(model.generate("Once", sampling=options, max_tokens=12, seed=2)) == third


def ascii_only() -> dict[int, float]:
    """A bias that leaves lower-case letters, so that characters are single tokens."""
    letters = {RAW.token_to_id(chr(code)) for code in range(ord("a"), ord("z") + 1)}
    return {token: -100.0 for token in range(VOCABULARY) if token not in letters}


def test_a_stop_string_ends_the_text_before_it(model: Model) -> None:
    def run(**more: Any) -> list[Any]:
        return list(model.generate("x", temperature=1.5, seed=3, max_tokens=30, logit_bias=ascii_only(), **more))

    whole = text_of(run())
    assert len(whole) == 30
    stop = whole[10:13]
    pieces = run(stop=[stop, "never occurs"])
    assert text_of(pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish == "stop"
    assert all(piece.finish is None for piece in pieces[:-1])
    assert text_of(run(stop=["never occurs"])) == whole


def test_an_end_token_ends_the_text_and_is_not_part_of_it(model: Model) -> None:
    pieces = list(model.generate("x", temperature=0, logit_bias={EOS: 100}))
    assert [(piece.text, piece.token, piece.finish) for piece in pieces] == [("", EOS, "stop")]


IM_END = 258


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A model whose end of a turn is named by the tokenizer alone, and whose templates show what they are told."""
    config = granite_config(vocab_size=260, max_position_embeddings=256)
    path = write_folder(tmp_path_factory.mktemp("chatty") / "model", config, seed=4)
    raw = byte_tokenizer()
    raw.add_special_tokens(["<|im_end|>", "<|tool|>"])
    (path / "tokenizer.json").write_text(raw.to_str())
    shown = "{{ thinking }}|{{ enable_thinking }}|{{ tools|length if tools }}|{{ documents|length if documents }}|{{ controls }}"
    templates = [{"name": "default", "template": shown}, {"name": "tool_use", "template": "T" + shown}]
    names = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "chat_template": templates}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    with load(path) as opened:
        yield opened


def test_the_end_tokens_of_all_files(chatty: Model) -> None:
    assert chatty.end_ids == (EOS, IM_END)
    for end in chatty.end_ids:
        pieces = list(chatty.generate("x", temperature=0, logit_bias={end: 100}))
        assert [(piece.text, piece.token, piece.finish) for piece in pieces] == [("", end, "stop")]


def test_an_end_token_that_the_model_lacks(caplog: pytest.LogCaptureFixture) -> None:
    raw = byte_tokenizer()
    raw.add_special_tokens(["<|im_end|>"])
    tokenizer = Tokenizer(raw, {"eos_token": "<|im_end|>"})
    assert end_ids((EOS,), 258, tokenizer) == (EOS,)
    assert "eos_token has the id 258 and is ignored: the model has 258" in caplog.text
    assert end_ids((EOS,), 259, tokenizer) == (EOS, IM_END)
    assert end_ids((EOS,), 258, None) == (EOS,)


@pytest.mark.parametrize(
    ("stop", "text", "count"),
    [
        ("<|tool|>", "ab", 3),
        ("b<|tool|>", "a", 3),
        ("<|tool|>c", "ab", 4),
        ("b<|tool|>cd", "a", 5),
        ("|>c", "ab", 4),
        ("<|to", "ab", 3),
        ("<|tool|><|tool|>", "abcd", 7),
        ("bc", "a", 4),  # in the text alone
        ("<|tool|>x", "abcd", 7),
    ],
)
def test_stop_strings_of_special_tokens(
    chatty: Model, monkeypatch: pytest.MonkeyPatch, stop: str, text: str, count: int
) -> None:
    """They end the text although its special tokens are no part of it: ab<|tool|>cd<|tool|><|tool|>."""
    tool = 259
    tokens = [RAW.token_to_id("a"), RAW.token_to_id("b"), tool, RAW.token_to_id("c"), RAW.token_to_id("d"), tool, tool]
    row = np.zeros(260, np.float32)

    class Scripted(Generation):
        def __init__(self) -> None:
            self.steps = [Step(token, 0.0, row, None) for token in tokens[:-1]] + [Step(tokens[-1], 0.0, row, "length")]

        def __next__(self) -> Step:
            return self.steps.pop(0)

        def cancel(self) -> None:
            self.steps.clear()

    monkeypatch.setattr(chatty.engine, "submit", lambda request, notify: Scripted())
    pieces = list(chatty.generate("x", stop=[stop]))
    assert (text_of(pieces), len(pieces)) == (text, count)
    assert pieces[-1].finish == ("length" if stop == "<|tool|>x" else "stop")
    assert text_of(chatty.generate("x")) == "abcd"


def test_parse_special_reads_tokens_in_a_raw_prompt(chatty: Model) -> None:
    plain = chatty.encode("a<|im_end|>")
    assert plain == [BOS, *chatty.text_tokenizer().encode("a<|im_end|>")] and IM_END not in plain
    assert chatty.encode("a<|im_end|>", parse_special=True) == [BOS, RAW.token_to_id("a"), IM_END]
    assert chatty.encode("<s>a", parse_special=True) == [BOS, RAW.token_to_id("a")]  # one begin-of-text token
    assert chatty.encode("<s><s>a", parse_special=True) == [BOS, BOS, RAW.token_to_id("a")]
    ids = chatty.encode("a<|im_end|>", parse_special=True)
    asked = {"temperature": 0, "max_tokens": 3}
    from_text = [piece.token for piece in chatty.generate("a<|im_end|>", parse_special=True, **asked)]
    assert from_text == [piece.token for piece in chatty.generate(ids, **asked)]


def test_what_the_template_is_told(chatty: Model) -> None:
    messages = [{"role": "user", "content": "a"}]
    tools, documents = [{"name": "f"}, {"name": "g"}], [{"doc_id": 1, "text": "x"}]

    def seen(**options: Any) -> str:
        return chatty.text_tokenizer().decode(chatty.encode_chat(messages, TemplateOptions(**options)))

    assert seen() == "||||"
    assert seen(thinking=True) == "True|True|||"
    assert seen(thinking=False) == "False|False|||"
    assert seen(tools=tools, documents=documents) == "T||2|1|"
    assert seen(tools=tools, template="default", arguments={"controls": {"length": 1e-5}}) == "||2||{'length': 1e-05}"
    for options in (
        {"thinking": True, "tools": tools},
        {"documents": documents, "controls": {"length": "short"}},
        {"template_args": {"controls": 1.0}, "template": "tool_use", "top_k": 3},
    ):
        known = {"template_args", "controls", "top_k"}
        arguments = {
            **options.get("template_args", {}),
            **{key: options[key] for key in ("controls",) if key in options},
        }
        told = {key: value for key, value in options.items() if key not in known}
        ids = chatty.encode_chat(messages, TemplateOptions(**told, arguments=arguments))
        expected = [piece.token for piece in chatty.generate(ids, temperature=0, max_tokens=3)]
        assert [piece.token for piece in chatty.chat(messages, temperature=0, max_tokens=3, **options)] == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"thinking": "yes"}, "thinking is 'yes', expected true or false"),
        ({"tools": {"name": "f"}}, "tools: expected a list of objects"),
        ({"documents": ["x"]}, "documents: expected a list of objects"),
        ({"template": "rag"}, "template 'rag': the model has no such chat template; it has tool_use"),
        ({"template_args": {"messages": []}}, "template argument 'messages': expected the name of a variable"),
        ({"template_args": {"a b": 1}}, "template argument 'a b'"),
        ({"warmth": 1}, "options warmth: expected some of temperature"),
    ],
)
def test_what_the_template_cannot_be_told(chatty: Model, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        chatty.chat([{"role": "user", "content": "a"}], **options)


def test_generation_fills_the_context_and_no_more(folder: Path) -> None:
    with load(folder, context=12) as small:
        pieces = list(small.generate("Hello", temperature=0, logit_bias={EOS: -100}))
        assert len(pieces) == 12 - 6 and pieces[-1].finish == "length"
        with pytest.raises(
            ConfigError, match=r"prompt: 12 tokens do not fit into a context of 12; shorten it or raise"
        ):
            small.generate("Hello world")


def test_score_is_the_log_softmax_of_transformers(folder: Path, model: Model) -> None:
    text = "A line of text, to be scored."
    ids = [BOS, *RAW.encode(text, add_special_tokens=False).ids]
    oracle = GraniteForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    with torch.inference_mode():
        scores = torch.log_softmax(oracle(torch.tensor([ids])).logits[0, :-1], -1)
    expected = scores[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    found = model.score(text)
    assert found.tokens == ids[1:]
    np.testing.assert_allclose(found.logprobs, expected, atol=1e-5)
    assert found.total == pytest.approx(float(expected.sum()), abs=1e-4)
    assert model.score(ids) == found
    # Scoring is not part of the conversation that the engine holds.
    generated = list(model.generate(ids[:5], temperature=0, max_tokens=3))
    again = model.score([*ids[:5], *(piece.token for piece in generated)]).logprobs[-3:]
    np.testing.assert_allclose([piece.logprob for piece in generated], again, atol=1e-5)


def test_the_longest_text_that_can_be_scored(model: Model) -> None:
    assert len(model.score(some_ids(65)).logprobs) == 64
    with pytest.raises(ConfigError, match="score: 66 tokens, the model was made for 65; score it in parts"):
        model.score(some_ids(66))


def test_threads_get_what_they_would_get_alone(model: Model) -> None:
    """Generations in one batch, beside scores, which share nothing with them."""
    jobs: list[Callable[[], Any]] = [
        lambda seed=seed: list(model.generate(some_ids(3 + seed, seed), temperature=1.0, seed=seed, max_tokens=10))
        for seed in range(6)
    ]
    jobs += [lambda seed=seed: model.score(some_ids(9, seed)) for seed in range(3)]
    alone = [job() for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = [future.result(timeout=120) for future in [pool.submit(job) for job in jobs]]
    assert together == alone


def test_several_texts_in_one_thread(model: Model) -> None:
    """They are read in turns, and one is left half read."""
    first, second = (model.generate(start, temperature=0, max_tokens=20) for start in ("Hello", "Hi"))
    found = [(next(first), next(second)) for _ in range(10)]
    second.close()
    assert list(second) == []
    rest = list(first)
    whole = list(model.generate("Hello", temperature=0, max_tokens=20))
    assert [pair[0] for pair in found] + rest == whole
    assert [pair[1] for pair in found] == list(model.generate("Hi", temperature=0, max_tokens=20))[:10]


def test_a_text_is_started_polled_and_measured(model: Model) -> None:
    pieces = model.generate("Hello", temperature=0, max_tokens=5, prompt_logprobs=True)
    assert pieces.generation is None
    generation, found = pieces.start(), []
    while not pieces.done:
        if (piece := pieces.poll()) is not None:
            found.append(piece)
    assert found == list(model.generate("Hello", temperature=0, max_tokens=5))
    assert (generation.prompt_tokens, generation.figures.tokens, generation.done) == (6, 5, True)
    scores = generation.prompt_logprobs
    assert scores is not None
    np.testing.assert_allclose(np.array(scores[1:], float), model.score("Hello").logprobs, atol=1e-5)
    assert list(pieces) == [] and pieces.poll() is None


def test_a_logits_hook(model: Model) -> None:
    def only_a(generated: Any, logits: Any) -> None:
        logits[np.arange(logits.size) != RAW.token_to_id("a")] = -np.inf

    assert text_of(model.generate("x", max_tokens=4, logits_hook=only_a)) == "aaaa"


def test_a_failure_inside_a_generation_ends_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk"):
        patch.setattr(model.network.ops, "run", fails)
        next(model.generate("Hello", temperature=0))
    # What is kept is still true: the same prompt continues as a fresh engine continues it.
    again = [piece.token for piece in model.generate("Hello", temperature=0, max_tokens=6)]
    ids = (BOS, *RAW.encode("Hello", add_special_tokens=False).ids)
    fresh = Scheduler(model.network).submit(Request(ids, SamplingOptions(temperature=0), 6))
    assert again == [step.token for step in fresh]


def test_nothing_can_be_asked_of_a_closed_model(folder: Path) -> None:
    with load(folder) as opened:
        half = opened.generate("Hello", temperature=0)
        next(half)
        later = opened.generate("Hello", temperature=0)
    assert len(list(half)) < 64
    with pytest.raises(ConfigError, match="closed"):
        next(later)
    with pytest.raises(ConfigError, match="closed"):
        opened.generate("Hello")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.generate(""), None),
        (lambda m: m.generate([]), "prompt: is empty"),
        (lambda m: m.generate([VOCABULARY]), "lies outside the vocabulary"),
        (lambda m: m.generate("a", max_tokens=0), "max_tokens: expected at least 1, found 0"),
        (lambda m: m.generate("a", temperature=-1), "temperature is -1, expected 0 or more"),
        (lambda m: m.generate("a", heat=1), "options heat: expected some of temperature, top_k"),
        (lambda m: m.chat([{"role": "user", "content": "a"}]), "chat: the model has no chat template; use generate"),
        (lambda m: m.generate("a", logit_bias={VOCABULARY: 1.0}), f"logit_bias: token id {VOCABULARY} lies outside"),
        (lambda m: m.score(""), "score: expected at least 2 tokens"),
        (lambda m: m.score([1, VOCABULARY]), f"token id {VOCABULARY} lies outside"),
        (lambda m: m.score([-1, 1]), "token id -1 lies outside"),
    ],
)
def test_calls_that_cannot_be_honoured(model: Model, call: Callable[[Model], Any], words: str | None) -> None:
    """They fail at the call, before anything is generated; an empty text is the begin-of-text token alone."""
    if words is None:
        assert len(list(call(model))) > 0
        return
    with pytest.raises(ConfigError, match=words):
        call(model)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chi": 0}, "chi: expected at least 1, found 0"),
        ({"threads": 0}, "threads: expected at least 1, found 0"),
        ({"device": "abacus"}, "device abacus: expected cpu, cuda"),
        ({"context": 1}, "context: expected at least 2 tokens, found 1"),
        ({"context": 65}, "context of 65 tokens: the model was made for 64"),
    ],
)
def test_options_of_load_that_cannot_be_honoured(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(folder, **options)


def test_a_device_that_is_absent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device cuda: torch finds no CUDA device; use --device cpu"):
        load(folder, device="cuda")
    for device in ("hpu", "xpu:7", "vulkan"):
        with pytest.raises(ConfigError, match=f"device {device}: torch cannot use it here .*; use --device cpu"):
            load(folder, device=device)


def test_a_model_without_a_tokenizer_takes_ids(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with load(folder) as bare:
        pieces = list(bare.generate([1, 2], temperature=0, max_tokens=2))
        assert [piece.text for piece in pieces] == ["", ""]
        with pytest.raises(ConfigError, match="no tokenizer.json; give token ids"):
            bare.generate("text")


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        mpo_runtime.load(tmp_path / "absent.mpo")


def test_a_long_text_is_scored_in_pieces(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = some_ids(50, 4)
    whole = model.score(ids)
    monkeypatch.setattr("mpo_runtime.model.PREFILL_CHUNK", 7)
    pieces = model.score(ids)
    assert pieces.tokens == whole.tokens == ids[1:]
    np.testing.assert_allclose(pieces.logprobs, whole.logprobs, atol=1e-5)


def test_a_stream_may_be_read_by_one_thread_after_another(model: Model) -> None:
    """As servers do that hand a generator to a pool of threads."""
    stream = model.generate([5, 6, 7], max_tokens=6, temperature=0)
    pieces = [next(stream)]
    reader = threading.Thread(target=lambda: pieces.append(next(stream)))
    reader.start()
    reader.join()
    finished = threading.Event()

    def rest() -> None:
        finished.wait(0.2)
        pieces.extend(stream)

    reader = threading.Thread(target=rest)
    reader.start()
    other = list(model.generate([5, 6, 7], max_tokens=6, temperature=0))  # waits for the other thread, not for itself
    reader.join()
    assert [piece.token for piece in pieces] == [piece.token for piece in other]


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_ids_beyond_the_tokenizer_are_never_drawn(tmp_path: Path, backend: str) -> None:
    """A table that is padded with rows whose logits are the largest: they are no tokens, however the text is drawn."""
    config = granite_config(vocab_size=VOCABULARY + 40)
    folder = write_folder(tmp_path / "model", config)
    tensors = random_tensors(config, 0, torch.float32)
    tensors["model.embed_tokens.weight"][VOCABULARY:] *= 50
    write_weights(folder, tensors)
    with load(folder, backend=backend) as model:
        assert model.score([BOS, *some_ids(5)]).logprobs
        for options in ({"temperature": 0.0}, {"temperature": 2.0, "seed": 1}, {"logit_bias": {VOCABULARY + 1: 100}}):
            pieces = list(model.generate("x", max_tokens=30, top_logprobs=3, **options))
            assert all(piece.token < VOCABULARY for piece in pieces)
            assert all(choice.token < VOCABULARY for piece in pieces for choice in piece.top)


@pytest.mark.skipif(not native.available(), reason="the native kernels are not built")
def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    monkeypatch.setattr("mpo_runtime.memory.available_memory", lambda: size // 2)
    with pytest.raises(
        ConfigError, match=r"needs .* GB of memory .* of KV cache.* are available; .*--load map"
    ) as caught:
        load(folder, backend="native")
    assert str(caught.value).startswith(f"{folder}: needs ")
    load(folder, backend="native", load="map", context=2).close()
    with pytest.raises(ConfigError, match="smaller --ctx-size"):
        monkeypatch.setattr("mpo_runtime.memory.available_memory", lambda: 100)
        load(folder, backend="native", load="map")
