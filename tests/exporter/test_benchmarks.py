"""The quality benchmark's rows: the layers that it plans, its table, and the figures of several texts together."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import judge
import quality

from mpo_exporter.sources import embedded_model
from mpo_exporter.survey import stored_bytes
from mpo_formats import Mpo, Quantized
from mpo_formats.architecture import EMBEDDING
from mpo_runtime.checkpoint import Checkpoint
from mpo_runtime.measure import Comparison, summarise
from tests.helpers import write_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(write_folder(tmp_path_factory.mktemp("source") / "model"))


def test_cores_alone_fill_the_bytes_that_they_are_given(source: Checkpoint) -> None:
    for balanced in (False, True):
        for linear in quality.alone(source.spec.linears, balanced, 5.0):
            [term] = linear.terms
            if linear.name == EMBEDDING:
                assert isinstance(term, Quantized)
                continue
            assert isinstance(term, Mpo) and (term.out_dims[1] > 1) == balanced
            room = 5.0 * linear.out_features * linear.in_features / 8
            assert stored_bytes(linear) <= room or term.bonds == (1,)


def test_one_width_with_more_for_the_table(source: Checkpoint) -> None:
    for linear in quality.uniform(source.spec.linears, 2, 16, 4):
        base, *cores = linear.terms
        assert isinstance(base, Quantized) and base.bits == (4 if linear.name == EMBEDDING else 2)
        assert bool(cores) == (linear.name != EMBEDDING)


def test_figures_of_several_texts_are_those_of_one_long_text() -> None:
    losses = [np.random.default_rng(seed).exponential(2, 20) for seed in range(5)]
    parts = [summarise(losses[:2], 20), summarise(losses[2:], 20)]
    whole = summarise(losses, 20)
    found = judge.figures([Comparison(part, part, 0.1 * n, 0.2, 0.5, 1, 0) for n, part in enumerate(parts, 1)])
    assert found["perplexity"] == pytest.approx(whole.perplexity)
    assert found["kl_mean"] == pytest.approx((2 * 0.1 + 3 * 0.2) / 5)
    assert found["tokens"] == 100


def test_domains_of_the_embedded_text() -> None:
    source = Checkpoint(embedded_model())
    texts = judge.domain_texts(source, None, "test", 500)
    assert list(texts) == list(judge.DOMAINS) and {text.ids.size for text in texts.values()} == {500}
    only = judge.calibration_tokens(source, None, "web")
    assert 0 < only.ids.size < judge.calibration_tokens(source, None, None).ids.size
