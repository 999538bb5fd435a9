"""Perplexity, KL divergence and agreement against a float64 computation with transformers on the documented windows."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import GraniteForCausalLM
from transformers.utils import logging

from mpo_formats import ConfigError
from mpo_runtime.measure import compare, cut_windows, perplexity, summarise
from mpo_runtime.models.decoder import Decoder
from tests.helpers import BOS, VOCABULARY, granite_config, network, some_ids, write_folder

logging.set_verbosity_error()
logging.disable_progress_bar()

Matrix = NDArray[np.float64]
WINDOW = 16
COUNT = 70  # not a multiple of 15: the last window is shorter
IDS = np.array(some_ids(COUNT, 5), np.int64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models that lead each window with a token, one with nearly the same weights, and one without such a token."""
    root = tmp_path_factory.mktemp("measure")
    config = granite_config(logits_scaling=4.0, tie_word_embeddings=False)
    return {
        "first": write_folder(root / "first", config, seed=1),
        "near": write_folder(root / "near", config, seed=1, dtype=torch.bfloat16),
        "second": write_folder(root / "second", config, seed=2),
        "no bos": write_folder(root / "no bos", config | {"bos_token_id": None}, seed=1),
        "few words": write_folder(root / "few words", granite_config(vocab_size=80, bos_token_id=0, eos_token_id=1)),
    }


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Decoder]:
    return {name: network(folder) for name, folder in folders.items()}


def windows_by_hand(lead: list[int]) -> list[list[int]]:
    """Consecutive pieces of the text, led by the begin-of-text token where there is one; 16 tokens in all."""
    size = WINDOW - len(lead)
    return [lead + IDS[start : start + size].tolist() for start in range(0, COUNT, size)]


def oracle(folder: Path, lead: list[int]) -> list[Matrix]:
    """The log-probabilities [S − 1, vocabulary] that predict each window's tokens after its first, in float64."""
    model = GraniteForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    with torch.inference_mode():
        return [
            torch.log_softmax(model(torch.tensor([window[:-1]])).logits[0], -1).numpy()
            for window in windows_by_hand(lead)
        ]


def losses_by_hand(scores: list[Matrix], lead: list[int]) -> list[list[float]]:
    return [
        [-float(row[token]) for row, token in zip(rows, window[1:], strict=True)]
        for rows, window in zip(scores, windows_by_hand(lead), strict=True)
    ]


def error_by_hand(losses: list[list[float]]) -> tuple[float, float, float]:
    """Mean loss, perplexity and its standard error: the ratio estimator over windows, times the perplexity (delta rule)."""
    tokens = sum(len(window) for window in losses)
    mean = sum(sum(window) for window in losses) / tokens
    spread = sum((sum(window) - mean * len(window)) ** 2 for window in losses)
    error = math.sqrt(len(losses) / (len(losses) - 1) * spread) / tokens
    return mean, math.exp(mean), math.exp(mean) * error


@pytest.mark.parametrize(("name", "lead"), [("first", [BOS]), ("no bos", [])])
def test_perplexity(folders: dict[str, Path], models: dict[str, Decoder], name: str, lead: list[int]) -> None:
    losses = losses_by_hand(oracle(folders[name], lead), lead)
    mean, value, error = error_by_hand(losses)
    steps: list[tuple[int, int]] = []
    found = perplexity(models[name], IDS, WINDOW, lambda *step: steps.append(step))
    assert found.nats == pytest.approx(mean, abs=1e-5)
    assert found.perplexity == pytest.approx(value, rel=1e-5)
    assert found.error == pytest.approx(error, rel=1e-4)
    assert (found.tokens, found.windows, found.window) == (sum(map(len, losses)), 5, WINDOW)
    # With a lead every token is predicted once; without, the first of each window is not.
    assert found.tokens == (COUNT if lead else COUNT - 5)
    assert steps == [(index + 1, 5) for index in range(5)]
    assert found.bits_per_byte(1000) == pytest.approx(mean * found.tokens / math.log(2) / 1000, rel=1e-5)


@pytest.mark.parametrize("name", ["near", "second"])
def test_comparison(folders: dict[str, Path], models: dict[str, Decoder], name: str) -> None:
    ours, theirs = oracle(folders[name], [BOS]), oracle(folders["first"], [BOS])
    q, p = np.concatenate(ours), np.concatenate(theirs)
    divergence = (np.exp(p) * (p - q)).sum(-1)
    found = compare(models[name], models["first"], IDS, WINDOW)
    assert found.kl_mean == pytest.approx(divergence.mean(), rel=1e-3, abs=1e-6)
    assert found.kl_999 == pytest.approx(np.quantile(divergence, 0.999), rel=1e-3, abs=1e-6)
    assert found.same_top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert found.model == perplexity(models[name], IDS, WINDOW)
    assert found.reference == perplexity(models["first"], IDS, WINDOW)
    assert (found.same_top1 > 0.8) == (name == "near")


def test_cosine_and_squared_error_are_of_the_logits(folders: dict[str, Path], models: dict[str, Decoder]) -> None:
    logits = {}
    for name in ("first", "second"):
        model = GraniteForCausalLM.from_pretrained(folders[name], dtype=torch.float64, attn_implementation="eager")
        with torch.inference_mode():
            rows = [model(torch.tensor([window[:-1]])).logits[0].numpy() for window in windows_by_hand([BOS])]
        logits[name] = np.concatenate(rows)
    a, b = logits["first"], logits["second"]
    found = compare(models["second"], models["first"], IDS, WINDOW)
    assert found.mse == pytest.approx(np.square(a - b).mean(), rel=1e-4)
    cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert found.cosine == pytest.approx(cosines.mean(), abs=1e-5)


def test_a_model_does_not_differ_from_itself(models: dict[str, Decoder]) -> None:
    found = compare(models["first"], models["first"], IDS, WINDOW)
    assert (found.kl_mean, found.kl_999, found.same_top1, found.mse) == (0, 0, 1, 0)
    assert found.model == found.reference


def test_a_reference_may_be_a_function_of_a_window(models: dict[str, Decoder]) -> None:
    found = compare(models["first"], lambda window: np.zeros((window.size - 1, VOCABULARY), np.float32), IDS, WINDOW)
    assert found.reference.perplexity == pytest.approx(VOCABULARY, rel=1e-5)
    assert found.reference.error == pytest.approx(0, abs=1e-3)


def test_one_window_takes_its_tokens_as_independent(models: dict[str, Decoder]) -> None:
    found = perplexity(models["first"], IDS[:10], WINDOW)
    assert found.windows == 1
    assert 0 < found.error < math.inf


def test_the_error_shrinks_with_the_root_of_the_windows() -> None:
    """Windows of the same distribution, eight times as many: √8 times less error."""
    source = np.random.default_rng(0)
    few, many = (summarise([source.normal(3, 1, 20) for _ in range(count)], 20) for count in (500, 4000))
    assert few.error / many.error == pytest.approx(math.sqrt(8), rel=0.1)
    assert many.error / many.perplexity == pytest.approx(1 / math.sqrt(20 * 4000), rel=0.1)


def test_the_default_window_is_the_context_of_a_small_model(models: dict[str, Decoder]) -> None:
    windows = cut_windows(np.array(some_ids(200), np.int64), models["first"], None)
    assert [part.size for part in windows] == [64, 64, 64, 12]
    assert all(part[0] == BOS for part in windows)
    np.testing.assert_array_equal(np.concatenate([part[1:] for part in windows]), some_ids(200))


@pytest.mark.parametrize(
    ("ids", "window", "words"),
    [
        (IDS, 1, "window: expected 2 to 64 tokens, found 1"),
        (IDS, 65, "window: expected 2 to 64 tokens, found 65"),
        (IDS[:0], None, "text: too short"),
        (np.array([3, VOCABULARY]), None, f"token id {VOCABULARY} lies outside the vocabulary of {VOCABULARY}"),
        (np.array([3, -7]), None, "token id -7 lies outside"),
    ],
    ids=["small", "large", "empty", "unknown", "negative"],
)
def test_texts_that_cannot_be_measured(
    models: dict[str, Decoder], ids: NDArray[np.int64], window: int | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        perplexity(models["first"], ids, window)


def test_models_of_different_vocabularies_cannot_be_compared(models: dict[str, Decoder]) -> None:
    with pytest.raises(ConfigError, match="vocabularies of 80 and 258 tokens differ"):
        compare(models["few words"], models["first"], IDS % 80, WINDOW)


def test_output_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ConfigError, match="not finite; run mpo-run verify"):
        summarise([np.array([1.0, np.nan])], 3)
