"""Rows of a batch are the single run's in every bit, where the kernels of this CPU promise it."""

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


@pytest.mark.parametrize("plan", ["4", "2,3,8", "dense", "4+chi8"])
def test_logits_of_a_batch_are_those_of_each_text_alone(tmp_path: Path, plan: str) -> None:
    write_synthetic("tiny", SyntheticPlan.parse(plan), tmp_path / "tiny.mpo")
    model = load_network(open_weights(tmp_path / "tiny.mpo"), backend="native")
    if not model.ops.row_exact:
        pytest.skip("the kernels of this CPU round a row differently beside others; its texts are run one by one")
    asked = [Request(tuple(some_ids(3 + 11 * index, index)), GREEDY, 12, ()) for index in range(20)]
    engine = Scheduler(model, chunk=64, parallel=20)
    texts = [engine.submit(request) for request in asked]
    together = [[step.logits for step in text] for text in texts]
    assert engine.stats().step_rows > 12
    for request, found in zip(asked, together, strict=True):
        alone = [step.logits for step in Scheduler(model, chunk=64, speculate="ngram").submit(request)]
        np.testing.assert_array_equal(np.stack(found), np.stack(alone))
