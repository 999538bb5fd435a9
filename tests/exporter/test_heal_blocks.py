"""What an error of a block's output is taken to cost, against what it costs in transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mpo_exporter.heal.blocks import stream_fisher
from mpo_exporter.heal.ops import WindowOps
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import VOCABULARY, granite_config, write_folder

WINDOWS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 12))
SIZE = 1e-2


@pytest.mark.parametrize("block", [0, 1])
def test_an_error_costs_what_is_expected(tmp_path: Path, block: int) -> None:
    """½ Σ F e² of random errors at a block's output, against the divergence that they cause."""
    folder = write_folder(tmp_path, granite_config())
    source = Checkpoint(folder)
    dense = decoder_for(source.spec.architecture, WindowOps(source))
    felt = stream_fisher(dense, np.tile(WINDOWS, (40, 1)), 6, "cpu")
    assert felt.shape == (source.spec.architecture.num_hidden_layers, source.spec.architecture.hidden_size)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().double()
    ids, costs = torch.from_numpy(WINDOWS), []
    generator = torch.Generator().manual_seed(0)

    def disturbed(_: torch.nn.Module, __: object, y: torch.Tensor) -> torch.Tensor:
        return y + SIZE * torch.randn(y.shape, generator=generator, dtype=y.dtype)

    with torch.no_grad():
        clean = model(ids).logits.log_softmax(-1)
        model.model.layers[block].register_forward_hook(disturbed)
        for _ in range(40):
            costs.append((clean.exp() * (clean - model(ids).logits.log_softmax(-1))).sum(-1).mean().item())
    assert np.mean(costs) == pytest.approx(0.5 * float(felt[block].sum()) * SIZE**2, rel=0.2)
