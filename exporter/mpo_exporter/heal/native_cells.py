"""Integer matrices in training by the native kernels: a matrix in one pass over its latent numbers, its gradients in another.

torch's operations read and write a matrix six times for that, which is a third of a step of a small model. The functions are
those of rounding.py, which is what the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.heal.rounding import cells, dequantize, product_dtype

# The kernels take groups of a multiple of the first number of columns, up to the second.
GROUPS = (16, 256)


def _numbers(tensor: Tensor) -> NDArray[Any]:
    """The memory of a float32 or bf16 tensor; bf16 as bit patterns."""
    values = tensor.detach()
    return values.view(torch.int16).numpy().view(np.uint16) if values.dtype == torch.bfloat16 else values.numpy()


class _Native(torch.autograd.Function):
    """scale · (q − zero) [R, C] in a type, float32 or bf16, and its gradients, for latent numbers [R, C]."""

    @staticmethod
    def forward(context: Any, latent: Tensor, scale: Tensor, zero: Tensor, top: int, dtype: torch.dtype) -> Tensor:
        import mpo_runtime._native as module

        latent, scale, zero = latent.contiguous(), scale.contiguous(), zero.contiguous()
        context.save_for_backward(latent, scale, zero)
        context.top = top
        matrix = torch.empty(latent.shape, dtype=dtype)
        module.cells(_numbers(latent), _numbers(scale), _numbers(zero), top, _numbers(matrix))
        return matrix

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        import mpo_runtime._native as module

        held = context.saved_tensors  # read once: where blocks are run again, it may not be read twice
        latent, scale, zero = (_numbers(tensor) for tensor in held)
        by_latent, by_scale, by_zero = (torch.empty_like(tensor) for tensor in held)
        found = _numbers(by_latent), _numbers(by_scale), _numbers(by_zero)
        module.cell_gradients(latent, scale, zero, context.top, _numbers(gradients[0].contiguous()), *found)
        return by_latent, by_scale, by_zero, None, None


_native: Callable[[Tensor, Tensor, Tensor, int, torch.dtype], Tensor] = _Native.apply


def native_cells(source: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """scale · (q − zero) [R, C] in the type of products, where q are the integers 0 … top nearest to latent numbers, or codes.

    Args:
        source: latent numbers [R, C] in float32; or codes as bytes, which torch's operations take.
        scale, zero: float32 [R, groups]; torch's operations take groups that the kernels do not.
    """
    if not source.is_floating_point():
        return dequantize(source, scale, zero)
    group = source.shape[1] // scale.shape[1]
    if group % GROUPS[0] or group > GROUPS[1]:
        return cells(source, scale, zero, top)
    return _native(source, scale, zero, top, product_dtype(source.device))
