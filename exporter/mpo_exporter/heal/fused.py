"""Triton kernels for integer matrices in training: a matrix in one pass over its codes, its gradients in another.

On a GPU torch's operations read and write a matrix of 2 billion numbers some six times for that. The functions are those of
rounding.py, which is what the tests compare with; only tensors on a GPU come here.

Shapes: N groups of G columns, N = R · groups of a matrix [R, C].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpo_exporter.heal.rounding import product_dtype

# Numbers of a program.
NUMBERS = 4096
ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding it rounds to a whole number, ties to even


@triton.jit
def codes_at(source, place, inside, top, MOVING: tl.constexpr):  # type: ignore[no-untyped-def]
    """The integers 0 … top nearest to latent numbers, or frozen codes, in float32; and whether gradients pass through."""
    held = tl.load(source + place, mask=inside, other=0).to(tl.float32)
    codes, passing = held, inside
    if MOVING:
        passing = (held > -0.5) & (held < top + 0.5)
        # Cut first, so that adding ROUNDER rounds: above 2²² it would not.
        codes = tl.minimum(tl.maximum(held, 0.0), top * 1.0) + ROUNDER - ROUNDER
    return codes, passing


@triton.jit
def write_cells(  # type: ignore[no-untyped-def]
    source, scale, zero, matrix, count, top, GROUP: tl.constexpr, GROUPS: tl.constexpr, MOVING: tl.constexpr,
):  # fmt: skip
    """matrix [N, G] = scale · (q − zero), rounded to its type; a program for GROUPS groups."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    place, some = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :], group < count
    codes, _ = codes_at(source, place, some[:, None], top, MOVING)
    factor = tl.load(scale + group, mask=some, other=0)
    middle = tl.load(zero + group, mask=some, other=0)
    values = (codes - middle[:, None]) * factor[:, None]
    tl.store(matrix + place, values.to(matrix.dtype.element_ty), mask=some[:, None])


@triton.jit
def write_gradients(  # type: ignore[no-untyped-def]
    source, scale, zero, gradient, by_code, by_scale, by_zero, count, top,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, MOVING: tl.constexpr,
):  # fmt: skip
    """The gradients of latent numbers [N, G], where they move, and of scales and zeros [N]; a program for GROUPS groups."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    place, some = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :], group < count
    codes, passing = codes_at(source, place, some[:, None], top, MOVING)
    felt = tl.load(gradient + place, mask=some[:, None], other=0).to(tl.float32)
    factor = tl.load(scale + group, mask=some, other=0)
    middle = tl.load(zero + group, mask=some, other=0)
    total = tl.sum(felt, 1)
    if MOVING:
        tl.store(by_code + place, tl.where(passing, felt * factor[:, None], 0.0), mask=some[:, None])
    tl.store(by_scale + group, tl.sum(codes * felt, 1) - middle * total, mask=some)
    tl.store(by_zero + group, -factor * total, mask=some)


class _Fused(torch.autograd.Function):
    """scale · (q − zero) [R, C] and its gradients, for latent numbers or frozen codes [R, C], as in rounding.py."""

    @staticmethod
    def forward(context: Any, source: Tensor, scale: Tensor, zero: Tensor, top: int, dtype: torch.dtype) -> Tensor:
        source, scale, zero = source.contiguous(), scale.contiguous(), zero.contiguous()
        context.save_for_backward(source, scale, zero)
        context.top = top
        matrix = torch.empty(source.shape, dtype=dtype, device=source.device)
        with torch.cuda.device_of(source):  # type: ignore[no-untyped-call]
            write_cells[grid(scale, source)](
                source, scale, zero, matrix, scale.numel(), top, **constants(scale, source)
            )
        return matrix

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        source, scale, zero = context.saved_tensors
        moving = source.is_floating_point()
        by_code = torch.empty_like(source) if moving else scale  # not written where codes are frozen
        by_scale, by_zero = torch.empty_like(scale), torch.empty_like(zero)
        with torch.cuda.device_of(source):  # type: ignore[no-untyped-call]
            write_gradients[grid(scale, source)](
                source, scale, zero, gradients[0].contiguous(), by_code, by_scale, by_zero, scale.numel(), context.top,
                **constants(scale, source),
            )  # fmt: skip
        return by_code if moving else None, by_scale, by_zero, None, None


def constants(scale: Tensor, source: Tensor) -> dict[str, Any]:
    """What the kernels are compiled for."""
    group = source.numel() // scale.numel()
    return {"GROUP": group, "GROUPS": NUMBERS // group, "MOVING": source.is_floating_point()}


def grid(scale: Tensor, source: Tensor) -> tuple[int]:
    """The number of programs."""
    return (triton.cdiv(scale.numel(), constants(scale, source)["GROUPS"]),)


_fused: Callable[[Tensor, Tensor, Tensor, int, torch.dtype], Tensor] = _Fused.apply


def fused_cells(source: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """scale · (q − zero) [R, C] in the type of products, where q are the integers 0 … top nearest to latent numbers, or codes.

    Args:
        source: latent numbers [R, C] in float32, or codes as bytes.
        scale, zero: float32 [R, groups], of groups of a power of two of columns up to 4,096.
    """
    return _fused(source, scale, zero, top, product_dtype(source.device))
