"""The compressed model in training: the one forward pass of the project, over ops whose weights are being trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpo_exporter.heal.loss import head_loss
from mpo_exporter.heal.ops import HealingOps, run_block
from mpo_exporter.heal.trainable import Trainables
from mpo_formats import Architecture
from mpo_runtime.backends.reference import free_memory
from mpo_runtime.models.decoder import Decoder

# Logits that are held at a time.
HEAD_LOGITS = 1 << 26
# The most of the free memory that the backward pass may keep instead of running blocks again.
KEPT_SHARE = 0.4


def head_tokens(vocabulary: int) -> int:
    """Tokens whose logits are held at a time."""
    return max(HEAD_LOGITS // vocabulary, 1)


def kept_bytes(architecture: Architecture, windows: int, length: int) -> int:
    """About the bytes that the backward pass keeps of `windows` windows of `length` tokens, and of the matrices.

    A token's states and products in a block: 40 bytes for each hidden number, 16 for each inner one of the MLP, 8 for each
    attention score (counted on the ops; bf16 beside float32). Matrices are kept in bf16.
    """
    token = 40 * architecture.hidden_size + 16 * architecture.intermediate_size
    token += 8 * architecture.num_attention_heads * length
    return windows * length * architecture.num_hidden_layers * token + 2 * architecture.parameters()


def fits(architecture: Architecture, windows: int, length: int, device: str) -> bool:
    """Whether all that the backward pass wants may be kept."""
    return kept_bytes(architecture, windows, length) <= KEPT_SHARE * free_memory(device)


class Batch(NamedTuple):
    """Windows to learn from.

    Args:
        inputs, labels: token ids [B, S].
        weight: of each prediction [B, S]; over a whole optimizer step and all devices it sums to one.
        scores, chosen: the teacher's largest log-probabilities [B, S, K] and their token ids.
        states: the outputs [B, S, M, E] of M of its blocks, in float32 or bf16; None where none are matched.
    """

    inputs: Tensor
    labels: Tensor
    weight: Tensor
    scores: Tensor
    chosen: Tensor
    states: Tensor | None = None


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Runs a function that will be run again in the backward pass, so that nothing inside it is kept."""
    # The pass is deterministic: there is no state of a random generator to put back.
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


class Student(nn.Module):
    """The whole model and its loss.

    Args:
        model: over HealingOps.
        trainables: all layers and vectors of the model.
        cross_entropy: λ.
        recompute: runs blocks again in the backward pass.
        matched: by block, G [E]: what a squared error of its output adds to the loss.
    """

    def __init__(
        self,
        model: Decoder,
        ops: HealingOps,
        trainables: Trainables,
        *,
        cross_entropy: float,
        recompute: bool,
        matched: Mapping[int, Tensor],
    ) -> None:
        super().__init__()
        self.model, self.ops = model, ops
        self.trainables = trainables
        self.cross_entropy, self.recompute = cross_entropy, recompute
        self.matched = matched

    def forward(self, batch: Batch, chi: int | None = None) -> Tensor:
        """Σ weight · (KL + λ · cross entropy + Σ G e²), e the errors of the matched blocks' outputs.

        Shape [2]: that, and Σ weight · KL alone.
        """
        self.ops.trainables, self.ops.chi = self.trainables, chi
        x, apart = self.model.embed(batch.inputs), batch.weight.new_zeros(2)
        wanted = [] if batch.states is None else list(batch.states.unbind(2))
        for block in range(self.model.architecture.num_hidden_layers):
            x = recomputed(run_block, self.model, x, block) if self.recompute else run_block(self.model, x, block)
            if block in self.matched:
                error = (x.float() - wanted.pop(0)).square().mul(self.matched[block]).sum(-1)
                apart = apart + torch.stack(((error * batch.weight).sum(), apart[1]))
        x = self.model.normed(x).flatten(0, 1)
        flat = [part.flatten(0, 1) for part in (batch.labels, batch.weight, batch.scores, batch.chosen)]
        pieces, size = [], head_tokens(self.model.architecture.vocab_size)
        for start in range(0, x.shape[0], size):
            part = [tensor[start : start + size] for tensor in (x, *flat)]
            pieces.append(recomputed(self._loss, *part) if self.recompute else self._loss(*part))
        return torch.stack(pieces).sum(0) + apart

    def _loss(self, x: Tensor, labels: Tensor, weight: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        return torch.stack(head_loss(self.model.logits(x), labels, weight, scores, chosen, self.cross_entropy))


class BlockStudent(nn.Module):
    """One block and its loss: the weighted squared error of its output."""

    def __init__(self, model: Decoder, ops: HealingOps, trainables: Trainables, block: int) -> None:
        super().__init__()
        self.model, self.ops = model, ops
        self.trainables, self.block = trainables, block

    def forward(self, batch: tuple[Tensor, Tensor, Tensor], chi: int | None = None) -> Tensor:
        """Σ (y − target)² · weight [E] of inputs x [B, S, E]; shape [2]: that, twice."""
        x, target, weight = batch
        self.ops.trainables, self.ops.chi = self.trainables, chi
        loss = ((run_block(self.model, x, self.block) - target).square() * weight).sum()
        return torch.stack((loss, loss.detach()))
