"""The loss of healing: divergence from the teacher's largest logits, and cross entropy, with its gradient in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# No bucket of probabilities is taken to be smaller: the logarithm of a rounding error says nothing.
LEAST_MASS = 1e-6


class _HeadLoss(torch.autograd.Function):
    """Σ weight · (KL + λ · nll), and Σ weight · KL alone.

    With q the softmax of the logits, the gradient of KL is q − p at the K kept tokens and q · (1 − p_rest / q_rest) at
    the others, so it is finished in the forward pass and nothing else of [T, V] is kept.
    """

    @staticmethod
    def forward(
        context: Any, logits: Tensor, labels: Tensor, weight: Tensor, scores: Tensor, chosen: Tensor, share: float
    ) -> tuple[Tensor, Tensor]:
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
        gradient = log_q.exp_() * (mass + share - pull)[:, None]
        gradient.scatter_(-1, chosen, kept.exp() * (mass + share)[:, None] - p)
        if share:
            gradient.scatter_add_(-1, labels[:, None], gradient.new_full((labels.shape[0], 1), -share))
        context.save_for_backward((gradient * weight[:, None]).to(logits.dtype))
        alone = (kl * weight).sum()
        context.mark_non_differentiable(alone)
        return total, alone

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = context.saved_tensors
        return gradient * gradients[0], None, None, None, None, None


# (logits [T, V], labels [T], weight [T], scores [T, K], chosen [T, K], λ): Σ weight · (KL + λ · nll), Σ weight · KL.
# KL is that of the teacher's K largest log-probabilities `scores` at the tokens `chosen` and of one bucket for the rest:
# Σ_k p_k (log p_k − log q_k) + p_rest (log p_rest − log q_rest), the divergence itself where K is the whole vocabulary
# and a lower bound of it otherwise.
head_loss: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = _HeadLoss.apply
