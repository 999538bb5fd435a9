"""The compressed model in training: its loss as a whole, and the loss of a single block.

The forward pass is the runtime's, over ops whose weights are being trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpo_exporter.calibrate.spill import mapped_file
from mpo_exporter.heal.ops import HealingOps, autocast, head_tokens, in_cache, run_block
from mpo_exporter.heal.trainable import Trainables
from mpo_formats import Architecture
from mpo_runtime.backends.reference import free_memory
from mpo_runtime.models.decoder import Decoder

# The share of the free memory that intermediate results of the forward pass may take; above it, blocks are run again.
KEPT_SHARE = 0.4
# A class with less probability than this is treated as having this much: the logarithm of a rounding error means nothing.
LEAST_MASS = 1e-6


def _part_of_loss(
    logits: Tensor, labels: Tensor, weight: Tensor, scores: Tensor, chosen: Tensor, share: float, *, out: Tensor
) -> Tensor:
    """Σ weight · (KL + λ · nll) and Σ weight · KL, of some tokens; writes the gradient of the former to `out`.

    With q the softmax of the logits, the gradient of the KL is q − p at the K kept tokens and q · (1 − p_rest / q_rest)
    at all others.
    """
    log_q = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    kept, p = log_q.gather(-1, chosen), scores.exp()
    kl, mass, pull = (p * (scores - kept)).sum(-1), p.sum(-1), torch.zeros_like(weight)
    if chosen.shape[-1] < logits.shape[-1]:
        p_rest, q_rest = (1 - mass).clamp_min(LEAST_MASS), 1 - kept.exp().sum(-1)
        felt = q_rest > LEAST_MASS
        q_rest = q_rest.clamp_min(LEAST_MASS)
        kl = kl + p_rest * (p_rest.log() - q_rest.log())
        mass = mass + p_rest * felt
        pull = felt * p_rest / q_rest
    total = ((kl + share * -log_q.gather(-1, labels[:, None])[:, 0]) * weight).sum()
    gradient = log_q.exp_().mul_((mass + share - pull)[:, None])
    gradient.scatter_(-1, chosen, kept.exp() * (mass + share)[:, None] - p)
    if share:
        gradient.scatter_add_(-1, labels[:, None], gradient.new_full((labels.shape[0], 1), -share))
    out.copy_(gradient.mul_(weight[:, None]))
    return torch.stack((total, (kl * weight).sum()))


class _HeadLoss(torch.autograd.Function):
    """Σ weight · (KL + λ · nll), and Σ weight · KL alone.

    The gradient is computed in the forward pass, so that no other array of shape [T, V] has to be kept.
    """

    @staticmethod
    def forward(
        context: Any, logits: Tensor, labels: Tensor, weight: Tensor, scores: Tensor, chosen: Tensor, share: float
    ) -> tuple[Tensor, Tensor]:
        gradient, sums = torch.empty_like(logits), weight.new_zeros(2)
        for some in in_cache(logits):
            sums += _part_of_loss(
                logits[some], labels[some], weight[some], scores[some], chosen[some], share, out=gradient[some]
            )
        context.save_for_backward(gradient)
        total, alone = sums.unbind()
        context.mark_non_differentiable(alone)
        return total, alone

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = context.saved_tensors
        return gradient * gradients[0], None, None, None, None, None


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """(output − target) / r, r the root mean square of the target over its last axis [E].

    What reads a block's output normalises it first, so an error counts relative to the output's size. Without this, the
    few tokens whose outputs are a thousand times as large as the others' (massive activations, arXiv 2402.17762) would be
    nearly the whole loss.
    """
    target = target.float()
    return (output.float() - target) / size_of_outputs(target)


def size_of_outputs(states: Tensor) -> Tensor:
    """The root mean squares [..., 1] of outputs [..., E], at least 1e-8."""
    return states.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-8)


# (logits [T, V], labels [T], weight [T], scores [T, K], chosen [T, K], λ): Σ weight · (KL + λ · nll), Σ weight · KL.
# `scores` are the teacher's K largest log-probabilities, at the tokens `chosen`; all other tokens form one class "rest":
# KL = Σ_k p_k (log p_k − log q_k) + p_rest (log p_rest − log q_rest). This is the exact KL where K is the whole vocabulary,
# and a lower bound of it otherwise.
head_loss: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = _HeadLoss.apply


def kept_bytes(architecture: Architecture, windows: int, length: int) -> int:
    """About how many bytes the backward pass needs kept for `windows` windows of `length` tokens, matrices included.

    For each token and block: 40 bytes for each hidden number, 16 for each inner number of the MLP, 8 for each attention
    score (counted from the ops, in bf16 and float32). The matrices are kept in bf16.
    """
    token = 40 * architecture.hidden_size + 16 * architecture.intermediate_size
    token += 8 * architecture.num_attention_heads * length
    return windows * length * architecture.num_hidden_layers * token + 2 * architecture.parameters()


def fits(architecture: Architecture, windows: int, length: int, device: str) -> bool:
    """Whether everything that the backward pass needs may be kept in memory."""
    return kept_bytes(architecture, windows, length) <= KEPT_SHARE * free_memory(device)


class Batch(NamedTuple):
    """Windows to learn from.

    Args:
        inputs, labels: token ids [B, S].
        weight: of each prediction [B, S]; the weights of one optimizer step sum to 1 over all devices.
        scores, chosen: the teacher's largest log-probabilities [B, S, K] and their token ids.
        states: the outputs [B, S, M, E] of M of the teacher's blocks, float32 or bf16; None where none are matched.
    """

    inputs: Tensor
    labels: Tensor
    weight: Tensor
    scores: Tensor
    chosen: Tensor
    states: Tensor | None = None


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Runs a function without keeping its intermediate results; the backward pass runs it again."""
    # Nothing inside is random, so no generator's state has to be restored.
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


class Student(nn.Module):
    """The whole model and its loss.

    Args:
        model: over `ops`.
        trainables: all layers and vectors of the model.
        cross_entropy: λ.
        recompute: run blocks again in the backward pass instead of keeping their intermediate results.
        matched: for each matched block, G [E]: the factors of the squared relative errors of its output in the loss.
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
        """Shape [2]: the loss Σ weight · (KL + λ · cross entropy + Σ G e²), and Σ weight · KL alone.

        e are the relative errors of the matched blocks' outputs; `chi` cuts all bonds to their first `chi` values.
        """
        self.ops.trainables, self.ops.chi = self.trainables, chi
        x, matching = self.model.embed(batch.inputs), batch.weight.new_zeros(2)
        wanted = [] if batch.states is None else list(batch.states.unbind(2))
        for block in range(self.model.architecture.num_hidden_layers):
            x = recomputed(run_block, self.model, x, block) if self.recompute else run_block(self.model, x, block)
            if block in self.matched:
                error = relative_error(x, wanted.pop(0)).square().mul(self.matched[block]).sum(-1)
                matching = matching + torch.stack(((error * batch.weight).sum(), matching[1]))
        x = self.model.normed(x).flatten(0, 1)
        flat = [part.flatten(0, 1) for part in (batch.labels, batch.weight, batch.scores, batch.chosen)]
        pieces, size = [], head_tokens(self.model.architecture.vocab_size)
        for start in range(0, x.shape[0], size):
            part = [tensor[start : start + size] for tensor in (x, *flat)]
            pieces.append(recomputed(self._loss, *part) if self.recompute else self._loss(*part))
        return torch.stack(pieces).sum(0) + matching

    def _loss(self, x: Tensor, labels: Tensor, weight: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        return torch.stack(head_loss(self.model.logits(x), labels, weight, scores, chosen, self.cross_entropy))


class BlockStudent(nn.Module):
    """One block and its loss: the weighted squared relative error of its output."""

    def __init__(self, model: Decoder, ops: HealingOps, trainables: Trainables, block: int) -> None:
        super().__init__()
        self.model, self.ops = model, ops
        self.trainables, self.block = trainables, block

    def forward(self, batch: tuple[Tensor, Tensor, Tensor], chi: int | None = None) -> Tensor:
        """Shape [2]: Σ e² · weight [E] for inputs x [B, S, E], e relative errors; twice (the loss, and the figure to show)."""
        x, target, weight = batch
        self.ops.trainables, self.ops.chi = self.trainables, chi
        loss = (relative_error(run_block(self.model, x, self.block), target).square() * weight).sum()
        return torch.stack((loss, loss.detach()))


class Stream:
    """A model's residual stream [N, S, E] over token ids [N, S], kept in a file and advanced block by block.

    Raises:
        OutputError: when the disk has no room for it.
    """

    def __init__(self, model: Decoder, ids: NDArray[np.int64], file: Path, batch: int, device: str) -> None:
        self.model, self.ids, self.batch, self.device = model, ids, batch, device
        shape = (*ids.shape, model.architecture.hidden_size)
        self.states = mapped_file(file, shape, "healing", "lower --block-share or --heal-tokens")

    def _batches(self) -> list[slice]:
        return [slice(start, start + self.batch) for start in range(0, self.ids.shape[0], self.batch)]

    def read(self, rows: slice | NDArray[np.int64]) -> Tensor:
        """The states [B, S, E] of the windows `rows`."""
        return torch.from_numpy(np.array(self.states[rows]))

    @torch.no_grad()
    def embed(self) -> None:
        """Sets the stream to the embedded tokens."""
        for rows in self._batches():
            self.states[rows] = self.model.ops.to_numpy(self.model.embed(self.model.ops.ids(self.ids[rows].tolist())))

    @torch.no_grad()
    def advance(self, block: int) -> None:
        """Replaces the stream, the input of a block, by the block's output."""
        for rows in self._batches():
            x = self.read(rows).to(self.device)
            with autocast(self.device):
                self.states[rows] = self.model.ops.to_numpy(run_block(self.model, x, block))
