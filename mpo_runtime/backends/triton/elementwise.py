"""Triton kernels: norms, residual sums and gates.

Their inputs may be products whose shares of columns are not added up yet (`Parts` of lazy.py): PARTS values that are `part`
apart stand for their sum. So a split product needs no launch of its own for the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_sum(source, inside, part, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Σ of PARTS values that are `part` apart, 0 outside; always added in the same order."""
    values = tl.load(source, mask=inside, other=0)
    for index in tl.static_range(1, PARTS):
        values += tl.load(source + index * part, mask=inside, other=0)
    return values


@triton.jit
def sum_parts(y, out, part, y_width, width, PARTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out [T, W] = the sum of the parts of y, whose rows are `y_width` apart; a program for BLOCK columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    tl.store(out + row * width + column, load_sum(y + row * y_width + column, inside, part, PARTS), mask=inside)


@triton.jit
def rms_norm(x, weight, y, width, eps, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = x / √(mean x² + eps) · weight, one stretch of `width` elements a program."""
    place = tl.program_id(0).to(tl.int64) * width + tl.arange(0, WIDTH)
    inside = tl.arange(0, WIDTH) < width
    values = tl.load(x + place, mask=inside, other=0)
    scale = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    tl.store(y + place, values * scale * tl.load(weight + tl.arange(0, WIDTH), mask=inside, other=0), mask=inside)


@triton.jit
def add_and_norm(  # type: ignore[no-untyped-def]
    x, y, added, weight, normed, part, y_width, width, scale, eps, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """added = x + scale · y, and normed = added / √(mean added² + eps) · weight; a program for each row of `width`."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    inside = lane < width
    values = tl.load(x + row * width + lane, mask=inside, other=0)
    values += scale * load_sum(y + row * y_width + lane, inside, part, PARTS)
    tl.store(added + row * width + lane, values, mask=inside)
    factor = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    tl.store(normed + row * width + lane, values * factor * tl.load(weight + lane, mask=inside, other=0), mask=inside)


@triton.jit
def swiglu(gate, up, y, part, in_width, width, PARTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """y [T, W] = silu(gate) · up, whose rows are `in_width` apart; a program for BLOCK columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    values = load_sum(gate + row * in_width + column, inside, part, PARTS)
    small = tl.exp(-tl.abs(values))  # never overflows
    silu = values * tl.where(values >= 0, 1.0, small) / (1 + small)
    other = load_sum(up + row * in_width + column, inside, part, PARTS)
    tl.store(y + row * width + column, silu * other, mask=inside)
