"""The diagonal of the true Fisher information at the output of every linear layer: how much an error there raises the loss.

With labels drawn from the model itself, an error Δy_o at a layer's outputs raises the loss of a token by about
½ Σ_o F_o Δy_o², F_o = E[(∂L/∂y_o)²] (Martens 2020, section 9; docs/method.md), so a compressed matrix with the rows ŵ_o costs
½ Σ_o F_o (w − ŵ)_o C (w − ŵ)_oᵀ. Gradients are those of the summed loss of a window: the contribution of other tokens'
labels to the gradient at one token has mean zero, given the text before it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.calibrate.precision import fast_products
from mpo_exporter.calibrate.upstream import RecordingOps, block_linears
from mpo_formats import ConfigError
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_runtime.layers.linear import Linear
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.weights.protocol import Weights

# Called with the number of batches done and their total.
Progress = Callable[[int, int], None]
Vector = NDArray[np.float64]
# The key of the Fisher information [E] at the rows that are looked up in the embedding.
LOOKUP = "lookup"
# Tokens whose logits are in memory at once.
HEAD_TOKENS = 512


class OutputOps(RecordingOps):
    """The reference ops that also keep the outputs of the layers, for which gradients are computed."""

    def __init__(self, source: Weights) -> None:
        super().__init__(source)
        self.outputs: dict[str, Tensor] = {}

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """Σ_t term_t(x) + bias; the result is kept."""
        y = super().linear(layer, x)
        if y.requires_grad:
            self.outputs[layer.spec.name] = y
        return y


class Squares:
    """Running sums of squared gradients by layer name, in double precision."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, squares: Tensor) -> None:
        """Adds squares [..., O] to the sum of that name, over all axes but the last."""
        total = squares.reshape(-1, squares.shape[-1]).sum(0, dtype=torch.float64)
        self.sums[name] = self.sums[name] + total if name in self.sums else total


def output_fisher(
    source: Weights,
    windows: NDArray[np.int64],
    seed: int = 0,
    *,
    batch: int = 8,
    progress: Progress | None = None,
) -> dict[str, Vector]:
    """F_o = E[(∂L/∂y_o)²] at the output of every layer, L the loss in nats of labels that are drawn from the model itself.

    At the head, where y are the logits before scaling, the expectation over labels is exact: p_o (1 − p_o). One more entry,
    `LOOKUP`, is the Fisher information [E] at the looked up rows of the embedding. Gradients are computed block by block,
    backwards from the last one. In memory are one block's float32 matrices, the states of a batch between blocks, and the
    logits of 512 tokens.

    Args:
        windows: token ids [N, W]; 32 windows of 256 tokens are enough.
        seed: for drawing the labels.
        batch: windows that are run at once.

    Returns:
        F [O] by the layer's name; the head's under the embedding's name where the two are tied.

    Raises:
        ConfigError: when a block's output or the logits are not finite.
    """
    ops = OutputOps(source)
    model = decoder_for(source.spec.architecture, ops)
    generator = torch.Generator().manual_seed(seed)
    squares = Squares()
    starts = range(0, windows.shape[0], batch)
    for number, start in enumerate(starts):
        with fast_products():
            _add_batch(model, ops, squares, windows[start : start + batch], generator)
        if progress:
            progress(number + 1, len(starts))
    order = [linear.name for linear in source.spec.linears] + [LOOKUP]
    return {name: (squares.sums[name] / windows.size).numpy() for name in order if name in squares.sums}


def _add_batch(
    model: Decoder, ops: OutputOps, squares: Squares, windows: NDArray[np.int64], generator: torch.Generator
) -> None:
    architecture = model.architecture
    rows, count = windows.shape

    def run(x: Tensor, block: int) -> Tensor:
        with ops.holding(block_linears(architecture, block)):
            y: Tensor = model.block(x, ops.block_cache(architecture, rows, count), block)
        return y

    with torch.no_grad():
        states = [model.embed(ops.ids(windows.tolist()))]
        for block in range(architecture.num_hidden_layers):
            states.append(run(states[-1], block))
            if not torch.isfinite(states[-1]).all():
                raise ConfigError(
                    f"model.layers.{block}: its output is not finite on the calibration text; check the source model"
                )
    gradient = head_gradient(model, squares, states.pop(), generator)
    for block in reversed(range(architecture.num_hidden_layers)):
        x = states.pop().requires_grad_()
        y = run(x, block)
        gradient, *inner = torch.autograd.grad(y, [x, *ops.outputs.values()], gradient)
        for name, part in zip(ops.outputs, inner, strict=True):
            squares.add(name, part.square())
        ops.outputs.clear()
    squares.add(LOOKUP, (gradient * architecture.embedding_multiplier).square())


def head_gradient(model: Decoder, squares: Squares, x: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient [B, W, E] at the last residual stream x, for the summed loss of labels drawn from the model itself.

    Args:
        squares: the head's own Fisher information is added to it.
        generator: on the device of x.
    """
    name = EMBEDDING if model.architecture.tie_word_embeddings else HEAD
    flat = x.reshape(-1, x.shape[-1])
    gradients: list[Tensor] = []
    for start in range(0, flat.shape[0], HEAD_TOKENS):
        part = flat[start : start + HEAD_TOKENS].requires_grad_()
        scores = model.logits(model.normed(part)).log_softmax(-1)
        chances = scores.detach().exp()
        if not torch.isfinite(chances).all():
            raise ConfigError("the logits are not finite on the calibration text; check the source model")
        # Inverse transform sampling: torch.multinomial would draw a random number for every token of the vocabulary.
        drawn = torch.rand(len(part), 1, generator=generator, device=part.device)
        labels = torch.searchsorted(chances.cumsum(-1), drawn).clamp_(max=chances.shape[-1] - 1)
        # The expectation over the drawn label: E[(p_o − [o = label])²] = p_o (1 − p_o).
        squares.add(name, chances * (1 - chances) / model.architecture.logits_scaling**2)
        gradients += torch.autograd.grad(-scores.gather(-1, labels).sum(), [part])
    return torch.cat(gradients).reshape(x.shape)
