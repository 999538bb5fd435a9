"""Rounding inside a training: the forward pass computes with the rounded values that a file stores.

The gradient passes straight through the rounding (Bengio et al. 2013).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_formats.packing import f32_to_bf16

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# The largest finite value of fp16.
LARGEST = float(torch.finfo(torch.float16).max)


class _Rounded(torch.autograd.Function):
    """Rounds to a stored float type; the gradient passes straight through."""

    @staticmethod
    def forward(context: Any, values: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype == torch.float16:
            values = values.clamp(-LARGEST, LARGEST)
        return values.to(dtype).float()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Cells(torch.autograd.Function):
    """scale · (q − zero) [R, C], where q are the integers 0 … top nearest to the latent numbers [R, C].

    The gradient passes straight through the rounding, but is 0 where the latent number lies outside the range. For the
    backward pass only the latent numbers, scales and zeros are kept.
    """

    @staticmethod
    def forward(context: Any, latent: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
        context.save_for_backward(latent, scale, zero)
        context.top = top
        codes = latent.round().clamp_(0, top).view(*scale.shape, -1)
        return codes.sub_(zero[..., None]).mul_(scale[..., None]).view(latent.shape)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        latent, scale, zero = context.saved_tensors
        gradient = gradients[0].reshape(*scale.shape, -1)
        codes = latent.round().clamp_(0, context.top).view(gradient.shape)
        total = gradient.sum(-1)
        by_code = codes.mul_(gradient).sum(-1)
        inside = (latent > -0.5) & (latent < context.top + 0.5)
        passed = (gradient * scale[..., None]).view(latent.shape).mul_(inside)
        return passed, by_code - zero * total, -scale * total, None


class _Dequantized(torch.autograd.Function):
    """scale · (q − zero) [R, C] for frozen codes, which are kept for the backward pass as bytes."""

    @staticmethod
    def forward(context: Any, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        context.save_for_backward(codes, scale, zero)
        grouped = codes.to(scale.dtype).view(*scale.shape, -1)
        return grouped.sub_(zero[..., None]).mul_(scale[..., None]).view(codes.shape)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor]:
        codes, scale, zero = context.saved_tensors
        gradient = gradients[0].reshape(*scale.shape, -1)
        total = gradient.sum(-1)
        by_code = codes.to(gradient.dtype).view(gradient.shape).mul_(gradient).sum(-1)
        return None, by_code - zero * total, -scale * total


_round: Callable[[Tensor, torch.dtype], Tensor] = _Rounded.apply
# (latent [R, C], scale [R, groups], zero [R, groups], top): scale · (q − zero) [R, C], q the integers 0 … top nearest to
# the latent numbers.
cells: Callable[[Tensor, Tensor, Tensor, int], Tensor] = _Cells.apply
# (codes [R, C], scale [R, groups], zero [R, groups]): scale · (codes − zero) [R, C].
dequantize: Callable[[Tensor, Tensor, Tensor], Tensor] = _Dequantized.apply


def product_dtype(device: torch.device) -> torch.dtype:
    """The type in which matrix products are computed: that of autocast where it is on."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else torch.float32


def rounded(values: Tensor, dtype: str) -> Tensor:
    """The values rounded to the type `f32`, `f16` or `bf16`, in float32; gradients pass straight through."""
    if dtype == "f32":
        return values
    return _round(values, TYPES[dtype])


def stored(values: Tensor, dtype: str) -> NDArray[Any]:
    """A float32 tensor as the array that a file stores; bf16 as bit patterns."""
    array = values.detach().cpu().numpy().astype(np.float32)
    return f32_to_bf16(array) if dtype == "bf16" else array.astype({"f32": "<f4", "f16": "<f2"}[dtype])
