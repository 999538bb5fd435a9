"""The compressed model in training: the one forward pass of the project, over ops whose weights are being trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpo_exporter.calibrate.upstream import block_cache
from mpo_exporter.heal.trainable import Trainables
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.layers.linear import Linear
from mpo_runtime.models.granite import GraniteModel
from mpo_runtime.weights import Weights

# Tokens whose logits are held at a time.
HEAD_TOKENS = 1024
# No bucket of probabilities is taken to be smaller: the logarithm of a rounding error says nothing.
LEAST_MASS = 1e-6


class HealingOps(ReferenceOps):
    """The reference ops, whose layers and vectors are those in training where there are such.

    `chi` cuts the bonds of the layers in training; `record` sees every layer's name and input [..., I].
    """

    def __init__(self, weights: Weights, device: str = "cpu") -> None:
        super().__init__(weights, held=False, device=device)
        self.trainables: Trainables | None = None
        self.chi: int | None = None
        self.record: Callable[[str, Tensor], None] | None = None

    def weights(self, layer: str) -> Linear | Tensor:
        """The layer or vector of that name, with its present parameters."""
        if self.trainables is not None:
            if layer in self.trainables.layers:
                return self.trainables.layers[layer].linear(self.chi)
            if layer in self.trainables.vectors:
                return self.trainables.vectors[layer].value()
        return super().weights(layer)

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """Σ_t term_t(x) + bias, seen by `record`."""
        if self.record is not None:
            self.record(layer.spec.name, x)
        return super().linear(layer, x)


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows to learn from.

    Args:
        inputs, labels: token ids [B, S].
        weight: of each prediction [B, S]; over a whole optimizer step and all devices it sums to one.
        scores, chosen: the teacher's largest log-probabilities [B, S, K] and their token ids.
    """

    inputs: Tensor
    labels: Tensor
    weight: Tensor
    scores: Tensor
    chosen: Tensor


def run_block(model: GraniteModel, x: Tensor, block: int) -> Tensor:
    """One block on x [B, S, E], from the beginning of the text."""
    y: Tensor = model.block(x, block_cache(model.architecture, x.shape[0], x.shape[1], x.device), block)
    return y


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Runs a function that will be run again in the backward pass, so that nothing inside it is kept."""
    # The pass is deterministic: there is no state of a random generator to put back.
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


def divergence(scores: Tensor, logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student) [T] where the teacher is known by its K largest log-probabilities, and log q [T, V].

    The rest of the mass is one bucket: Σ_k p_k (log p_k − log q_k) + p_rest (log p_rest − log q_rest). That is the
    divergence itself where K is the whole vocabulary, and a lower bound of it otherwise.
    """
    log_q = logits.log_softmax(-1)
    kept = log_q.gather(-1, chosen)
    p = scores.exp()
    result = (p * (scores - kept)).sum(-1)
    if chosen.shape[-1] < logits.shape[-1]:
        p_rest = (1 - p.sum(-1)).clamp_min(LEAST_MASS)
        q_rest = (1 - kept.exp().sum(-1)).clamp_min(LEAST_MASS)
        result = result + p_rest * (p_rest.log() - q_rest.log())
    return result, log_q


class Student(nn.Module):
    """The whole model and its loss.

    Args:
        model: over HealingOps.
        trainables: all layers and vectors of the model.
        cross_entropy: λ.
        recompute: runs blocks again in the backward pass.
    """

    def __init__(
        self, model: GraniteModel, ops: HealingOps, trainables: Trainables, *, cross_entropy: float, recompute: bool
    ) -> None:
        super().__init__()
        self.model, self.ops = model, ops
        self.trainables = trainables
        self.cross_entropy, self.recompute = cross_entropy, recompute

    def forward(self, batch: Batch, chi: int | None = None) -> Tensor:
        """Σ weight · (KL + λ · cross entropy); shape [2]: that, and Σ weight · KL alone."""
        self.ops.trainables, self.ops.chi = self.trainables, chi
        x = self.model.embed(batch.inputs)
        for block in range(self.model.architecture.num_hidden_layers):
            x = recomputed(run_block, self.model, x, block) if self.recompute else run_block(self.model, x, block)
        x = self.model.normed(x).flatten(0, 1)
        flat = [part.flatten(0, 1) for part in (batch.labels, batch.weight, batch.scores, batch.chosen)]
        pieces = []
        for start in range(0, x.shape[0], HEAD_TOKENS):
            part = slice(start, start + HEAD_TOKENS)
            pieces.append(recomputed(self._loss, x[part], *(tensor[part] for tensor in flat)))
        return torch.stack(pieces).sum(0)

    def _loss(self, x: Tensor, labels: Tensor, weight: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        logits = self.model.logits(x).float()
        kl, log_q = divergence(scores, logits, chosen)
        nll = F.nll_loss(log_q, labels, reduction="none")
        return torch.stack((((kl + self.cross_entropy * nll) * weight).sum(), (kl * weight).sum().detach()))


class BlockStudent(nn.Module):
    """One block and its loss: the mean squared error of its output, over the mean square of what the block adds."""

    def __init__(self, model: GraniteModel, ops: HealingOps, trainables: Trainables, block: int) -> None:
        super().__init__()
        self.model, self.ops = model, ops
        self.trainables, self.block = trainables, block

    def forward(self, batch: tuple[Tensor, Tensor, float], chi: int | None = None) -> Tensor:
        """Σ (y − target)² · weight of inputs x [B, S, E]; shape [2]: that, twice."""
        x, target, weight = batch
        self.ops.trainables, self.ops.chi = self.trainables, chi
        loss = (run_block(self.model, x, self.block) - target).square().sum() * weight
        return torch.stack((loss, loss.detach()))
