"""How much the loss bends at the output of every linear layer: the diagonal of the true Fisher information.

With labels drawn from the model itself, an error Δy_o at a layer's outputs raises the loss of a token by about
½ Σ_o F_o Δy_o², F_o = E[(∂L/∂y_o)²] (Martens 2020, section 9; METHOD.md), so a compressed matrix with the rows ŵ_o costs
½ Σ_o F_o (w − ŵ)_o C (w − ŵ)_oᵀ. Gradients are those of the summed loss of a window: what other tokens' labels add to the
gradient at one has mean zero given the text before.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.calibrate.upstream import RecordingOps, block_cache
from mpo_formats import ConfigError
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_runtime.layers.linear import Linear
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.weights.protocol import Weights

Progress = Callable[[int, int], None]
Vector = NDArray[np.float64]
# The key of what is measured at the embedding's rows, [E], where tokens are looked up.
LOOKUP = "lookup"
# Tokens whose logits are held at a time.
HEAD_TOKENS = 512


class OutputOps(RecordingOps):
    """The reference ops, that keep the outputs of a run's linears while gradients are taken."""

    def __init__(self, source: Weights) -> None:
        super().__init__(source)
        self.outputs: dict[str, Tensor] = {}

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """Σ_t term_t(x) + bias, kept."""
        y = super().linear(layer, x)
        if y.requires_grad:
            self.outputs[layer.spec.name] = y
        return y


class Squares:
    """Running sums of squared gradients by layer name, in double precision."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, squares: Tensor) -> None:
        """Adds squares [..., O], summed over all but the last axis."""
        total = squares.double().reshape(-1, squares.shape[-1]).sum(0)
        self.sums[name] = self.sums[name] + total if name in self.sums else total


def output_fisher(
    source: Weights,
    windows: NDArray[np.int64],
    seed: int = 0,
    *,
    batch: int = 4,
    progress: Progress | None = None,
) -> dict[str, Vector]:
    """F_o = E[(∂L/∂y_o)²] at the output of every linear, L the loss in nats, its labels drawn from the model itself.

    At the head, y being the logits before they are scaled, the expectation over labels is taken exactly: p_o (1 − p_o).
    One more entry, `LOOKUP`, holds it at the embedding's rows as tokens look them up [E]. Gradients are taken block by
    block, back from the last: in memory are one block's float32 matrices, the states of a batch between blocks, and the
    logits of 512 tokens.

    Args:
        windows: token ids [N, W]; 32 windows of 256 tokens do.
        seed: of the drawn labels.
        batch: windows run at a time.

    Returns:
        By the layer's name, [O]; the head under the embedding's name where the two are tied.
    """
    ops = OutputOps(source)
    model = decoder_for(source.spec.architecture, ops)
    generator = torch.Generator().manual_seed(seed)
    squares = Squares()
    starts = range(0, windows.shape[0], batch)
    for number, start in enumerate(starts):
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
        with ops.holding(block):
            y: Tensor = model.block(x, block_cache(architecture, rows, count, x.device), block)
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
    """The gradient [B, W, E] at the residual stream x of the summed loss of labels drawn from the model itself.

    Args:
        squares: to which the head's own Fisher information is added.
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
        labels = torch.multinomial(chances, 1, generator=generator)
        # Of the labels' draw, E[(p_o − [o = label])²] = p_o (1 − p_o).
        squares.add(name, chances * (1 - chances) / model.architecture.logits_scaling**2)
        gradients += torch.autograd.grad(-scores.gather(-1, labels).sum(), [part])
    return torch.cat(gradients).reshape(x.shape)
