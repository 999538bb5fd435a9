"""Steps as CUDA graphs: a small model's step is thousands of small kernels, which take longer to launch than to run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpo_exporter.heal.ops import compute

# Passes before the recording, on its stream: libraries allocate their workspaces in the first ones.
REHEARSALS = 2


class GraphedStep:
    """The forward and backward pass of a module (batch, None) -> [loss, figure], recorded once and replayed.

    Every replay writes the gradients into the same tensors, so they must never be set to None.

    Args:
        module: its parameters' gradients are forgotten here.
        batch: a tuple of tensors; all others must be like it.
    """

    def __init__(self, module: nn.Module, batch: Any, device: str) -> None:
        held = [None if tensor is None else tensor.clone() for tensor in batch]
        self.batch = batch._make(held) if hasattr(batch, "_make") else tuple(held)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        outer = torch.cuda.current_stream(device)
        stream.wait_stream(outer)
        with torch.cuda.stream(stream):
            for _ in range(REHEARSALS):
                self._pass(module, device)
        outer.wait_stream(stream)
        module.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.figures = self._pass(module, device)

    def _pass(self, module: nn.Module, device: str) -> Tensor:
        with compute(device):
            found = module(self.batch, None)
        found[0].backward()
        figures: Tensor = found.detach()
        return figures

    def __call__(self, batch: Any) -> Tensor:
        """Sets the gradients of a batch; returns its figures, which the next call overwrites."""
        for held, tensor in zip(self.batch, batch, strict=True):
            if held is not None:
                held.copy_(tensor)
        self.graph.replay()
        return self.figures
