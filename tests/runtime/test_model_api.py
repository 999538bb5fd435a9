"""The Python API: generating, stopping, scoring, and several threads on one model."""

from __future__ import annotations

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
from mpo_runtime import Model, SamplingOptions, load
from mpo_runtime.engine import Engine
from tests.helpers import BOS, EOS, VOCABULARY, byte_tokenizer, granite_config, some_ids, write_folder

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
    assert not model.engine.lock.locked()


def test_an_end_token_ends_the_text_and_is_not_part_of_it(model: Model) -> None:
    pieces = list(model.generate("x", temperature=0, logit_bias={EOS: 100}))
    assert [(piece.text, piece.token, piece.finish) for piece in pieces] == [("", EOS, "stop")]


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
    """Generations, of which one runs at a time, beside scores, which share nothing with them."""
    jobs: list[Callable[[], Any]] = [
        lambda seed=seed: list(model.generate(some_ids(3 + seed, seed), temperature=1.0, seed=seed, max_tokens=10))
        for seed in range(6)
    ]
    jobs += [lambda seed=seed: model.score(some_ids(9, seed)) for seed in range(3)]
    alone = [job() for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = [future.result(timeout=120) for future in [pool.submit(job) for job in jobs]]
    assert together == alone


def test_closing_an_unfinished_generation_lets_the_next_one_run(model: Model) -> None:
    unfinished = model.generate("Hello", temperature=0)
    next(unfinished)
    assert model.engine.lock.locked()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: list(model.generate("Hi", temperature=0, max_tokens=3)))
        unfinished.close()
        assert len(waiting.result(timeout=60)) == 3
    assert not model.engine.lock.locked()
    assert list(unfinished) == []


def test_a_failure_inside_a_generation_releases_the_lock(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = model.generate("Hello", temperature=0)
    next(pieces)

    def fails(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(model.network, "hidden", fails)
        next(pieces)
    assert not model.engine.lock.locked()
    # What the engine holds is still true: the same prompt continues as a fresh engine continues it.
    again = [piece.token for piece in model.generate("Hello", temperature=0, max_tokens=6)]
    assert again == [
        step.token
        for step in Engine(model.network).generate(
            [BOS, *RAW.encode("Hello", add_special_tokens=False).ids], SamplingOptions(temperature=0), max_tokens=6
        )
    ]


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
