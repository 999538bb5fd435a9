"""With integer weights, rows of a batch are the single run's in every bit, where the kernels of this CPU promise it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mpo_runtime._native", reason="the native kernels were not built")

from benchmarks.synthetic import SyntheticPlan, write_synthetic
from mpo_runtime.engine import Request, Scheduler
from mpo_runtime.loading import load_network, open_weights
from mpo_runtime.sampler import SamplingOptions
from tests.helpers import some_ids

GREEDY = SamplingOptions(temperature=0)


def test_logits_of_a_batch_are_those_of_each_text_alone(tmp_path: Path) -> None:
    write_synthetic("tiny", SyntheticPlan((4,)), tmp_path / "tiny.mpo")
    model = load_network(open_weights(tmp_path / "tiny.mpo"), backend="native")
    if not model.ops.row_exact:
        pytest.skip("the kernels of this CPU round a row differently beside others; its texts are run one by one")
    asked = [Request(tuple(some_ids(3 + 40 * index, index)), GREEDY, 12, ()) for index in range(6)]
    engine = Scheduler(model, chunk=64)
    texts = [engine.submit(request) for request in asked]
    together = [[step.logits for step in text] for text in texts]
    assert engine.stats().step_rows > 6
    for request, found in zip(asked, together, strict=True):
        alone = [step.logits for step in Scheduler(model, speculate="ngram").submit(request)]
        np.testing.assert_array_equal(np.stack(found), np.stack(alone))
