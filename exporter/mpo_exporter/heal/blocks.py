"""Reconstruction of single blocks: each learns to give the dense model's block output, from the healed blocks before it.

An error of the output counts as much as it is expected to raise the divergence of the whole model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.calibrate.fisher import Squares, head_gradient
from mpo_exporter.calibrate.spill import mapped_file
from mpo_exporter.heal.ops import compute, run_block
from mpo_runtime.models.decoder import Decoder


class Stream:
    """The residual stream [N, S, E] of a model over token ids [N, S], in a file.

    Raises:
        OutputError: when it would not fit on the disk.
    """

    def __init__(self, model: Decoder, ids: NDArray[np.int64], file: Path, batch: int, device: str) -> None:
        self.model, self.ids, self.batch, self.device = model, ids, batch, device
        shape = (*ids.shape, model.architecture.hidden_size)
        self.states = mapped_file(file, shape, "healing", "lower --block-share or --heal-tokens")

    def _batches(self) -> list[slice]:
        return [slice(start, start + self.batch) for start in range(0, self.ids.shape[0], self.batch)]

    def read(self, rows: slice | NDArray[np.int64]) -> Tensor:
        """The states [B, S, E] of some windows."""
        return torch.from_numpy(np.array(self.states[rows]))

    @torch.no_grad()
    def embed(self) -> None:
        """Sets the stream to the embedded tokens."""
        for rows in self._batches():
            self.states[rows] = self.model.ops.to_numpy(self.model.embed(self.model.ops.ids(self.ids[rows].tolist())))

    @torch.no_grad()
    def advance(self, block: int) -> None:
        """Replaces the stream by what a block makes of it."""
        for rows in self._batches():
            x = self.read(rows).to(self.device)
            with compute(self.device):
                self.states[rows] = self.model.ops.to_numpy(run_block(self.model, x, block))


def block_names(block: int, names: list[str]) -> list[str]:
    """The layers and vectors of a block among `names`."""
    return [name for name in names if name.startswith(f"model.layers.{block}.")]


def stream_fisher(model: Decoder, ids: NDArray[np.int64], batch: int, device: str) -> Tensor:
    """F [blocks, E] = E[(∂L/∂h)²] at each block's output h, L the loss in nats of labels drawn from the model itself.

    An error e there raises the model's divergence from what it was by about ½ Σ F e² (Martens 2020, section 9).

    Args:
        model: over WindowOps.
        ids: token ids [N, S].
        batch: windows run at a time.
    """
    blocks = model.architecture.num_hidden_layers
    generator, squares = torch.Generator(device).manual_seed(0), Squares()
    for start in range(0, ids.shape[0], batch):
        with torch.no_grad():
            states = [model.embed(torch.from_numpy(ids[start : start + batch]).to(device))]
            for block in range(blocks):
                states.append(run_block(model, states[-1], block))
        gradient = head_gradient(model, squares, states.pop(), generator)
        for block in reversed(range(blocks)):
            squares.add(str(block), gradient.square())
            x = states.pop().requires_grad_()
            (gradient,) = torch.autograd.grad(run_block(model, x, block), x, gradient)
    return torch.stack([squares.sums[str(block)] for block in range(blocks)]).float() / ids.size
