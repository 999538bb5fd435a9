"""The second moment of the loss's gradient by the outputs of every linear layer: which errors of outputs go together.

As in fisher.py the labels are drawn from the model itself, so that ½ Δyᵀ G Δy, G = E[g gᵀ], is the divergence that an error Δy
of a layer's outputs is expected to cause (Martens 2020, section 9). There only the diagonal of G is kept, here all of it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.calibrate.fisher import OutputOps, Squares, drawn_chances, head_gradient
from mpo_exporter.calibrate.precision import fast_products
from mpo_exporter.calibrate.store import Memory, Store
from mpo_exporter.calibrate.sums import Sums
from mpo_exporter.calibrate.upstream import block_linears
from mpo_formats import ConfigError
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.weights.protocol import Weights

Single = NDArray[np.float32]
Progress = Callable[[int, int], None]
# Outputs of more numbers have no moment: it would take more room than the matrix itself.
MOST = 4096
# Windows that are run at once.
BATCH = 8
# Before the names of the moments in a store, and the name of the mark that all of them are there.
PREFIX, DONE = "outputs-", "outputs-done"


class Outputs:
    """G of the layers of all blocks: one pass forward and one backward over windows of token ids [N, W].

    Args:
        store: keeps the states between the blocks, N · W · E · 4 bytes each, while the passes run, and G of every layer; what
            finished passes left there is used again. None keeps them in memory.
        seed: for drawing the labels.
        device: that the model is run on.
    """

    def __init__(
        self,
        source: Weights,
        windows: NDArray[np.int64],
        store: Store | None = None,
        *,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.source, self.windows, self.seed, self.device = source, windows, seed, device
        self.store: Store = Memory() if store is None else store
        self.parts = [slice(start, start + BATCH) for start in range(0, len(windows), BATCH)]

    def moment(self, name: str) -> Single | None:
        """G [O, O] of a layer; None for one outside the blocks or of more than MOST outputs, and before `measure`."""
        arrays = self.store.read(PREFIX + name)
        return None if arrays is None else arrays["g"]

    def measure(self, progress: Progress | None = None) -> None:
        """Measures all moments, unless they were.

        Args:
            progress: is given the blocks done, of twice as many as there are.

        Raises:
            ConfigError: when the logits or a gradient are not finite.
        """
        if self.store.read(DONE) is not None:
            return
        told = progress or (lambda done, total: None)
        self.ops = OutputOps(self.source, self.device)
        self.model = decoder_for(self.source.spec.architecture, self.ops)
        blocks = self.model.architecture.num_hidden_layers
        with fast_products():
            state = self._embedded()
            for block in range(blocks):
                state = self._forward(block, state)
                told(block + 1, 2 * blocks)
            gradient = self._head(state)
            for block in reversed(range(blocks)):
                gradient = self._backward(block, gradient)
                told(2 * blocks - block, 2 * blocks)
        self.store.write(DONE, {})

    def _tensor(self, array: Single) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _run(self, x: Tensor, block: int) -> Tensor:
        y: Tensor = self.model.block(x, self.ops.block_cache(self.model.architecture, *x.shape[:2]), block)
        return y

    @torch.no_grad()
    def _embedded(self) -> Single:
        tables = [self.model.embed(self.ops.ids(self.windows[part].tolist())) for part in self.parts]
        return np.concatenate([table.cpu().numpy() for table in tables])

    @torch.no_grad()
    def _forward(self, block: int, state: Single) -> Single:
        """Keeps the state before a block; returns that behind it."""
        self.store.write(f"{PREFIX}state-{block}", {"x": state})
        with self.ops.holding(block_linears(self.model.architecture, block)):
            return np.concatenate([self._run(self._tensor(state[part]), block).cpu().numpy() for part in self.parts])

    def _head(self, state: Single) -> Single:
        """The gradient by the last state, for labels drawn from the model."""
        drawn = drawn_chances(self.seed, *state.shape[:2])
        found = [head_gradient(self.model, Squares(), self._tensor(state[part]), drawn[part]) for part in self.parts]
        return np.concatenate([part.cpu().numpy() for part in found])

    def _backward(self, block: int, gradient: Single) -> Single:
        """Keeps G of a block's layers; returns the gradient by the state before the block from the one by that behind it."""
        kept = self.store.read(f"{PREFIX}state-{block}")
        if kept is None:
            raise ConfigError(f"calibration: the state before block {block} is missing; start again")
        sums: dict[str, Sums] = {}
        before = np.empty_like(gradient)
        with self.ops.holding(block_linears(self.model.architecture, block)):
            for part in self.parts:
                self.ops.outputs.clear()
                x = self._tensor(kept["x"][part]).requires_grad_()
                y = self._run(x, block)
                wanted = [x, *self.ops.outputs.values()]
                back, *inner = torch.autograd.grad(y, wanted, self._tensor(gradient[part]))
                before[part] = back.cpu().numpy()
                for name, own in zip(self.ops.outputs, inner, strict=True):
                    if own.shape[-1] <= MOST:
                        sums.setdefault(name, Sums()).add(own)
        self.ops.outputs.clear()
        for name, total in sums.items():
            mean = total.mean(symmetric=True).astype(np.float32)
            if not np.isfinite(mean).all():
                raise ConfigError(f"{name}: its gradient is not finite on the calibration text; check the source model")
            self.store.write(PREFIX + name, {"g": mean})
        self.store.forget(f"{PREFIX}state-{block}")
        return before
