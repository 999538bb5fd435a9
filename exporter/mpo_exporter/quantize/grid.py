"""The grid of a group, w = scale · (q − zero): a search for the best scale and zero in half precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpo_formats import ConfigError
from mpo_formats.packing import implicit_zero

# Factors by which a group's range is scaled to find the lowest weighted error; with few bits, clipping outliers pays.
SHRINK = torch.linspace(0.40, 1.05, 14)
# Turns of computing the best scale and zero for the codes, in closed form, and the best codes for these.
TURNS = 2
# The largest finite half-precision number.
LARGEST = float(torch.finfo(torch.float16).max)


@dataclass(frozen=True, slots=True)
class Grid:
    """How a matrix is stored: bits, group size, and whether each group stores its zero."""

    bits: int
    group: int
    zeros: bool = False


@dataclass(frozen=True, slots=True)
class Levels:
    """The range of the codes, 0 … 2^bits − 1, and whether each group stores its zero."""

    bits: int
    zeros: bool

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> float:
        """The zero where none is stored."""
        return implicit_zero(self.bits)


def require_range(peak: float, levels: Levels) -> None:
    """Raises ConfigError where a largest magnitude `peak` needs a scale beyond half precision."""
    if not peak / levels.middle <= LARGEST:
        raise ConfigError("matrix: values exceed the range of half-precision scales; store this layer dense")


def half(values: Tensor) -> Tensor:
    """The values rounded to half precision, in float32; values outside its range are clipped to it."""
    return values.clamp(-LARGEST, LARGEST).half().float()


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0: all codes of such a group become its zero."""
    return torch.where(scale != 0, scale.reciprocal(), torch.zeros_like(scale))


def encode(values: Tensor, inverse_scale: Tensor, zero: Tensor, levels: Levels) -> Tensor:
    """The nearest codes, as floats, of values [g, R] or [R] on grids given by inverse scale and zero [R]."""
    return torch.addcmul(zero, values, inverse_scale).round_().clamp_(0, levels.top)


def search(values: Tensor, weight: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """The scale [R] and zero [R] of a group of values [g, R] that leave the least Σ_j weight_j · (w_j − ŵ_j)².

    Ranges scaled by several factors are tried, and the best of them is improved by alternating codes and least squares.

    Raises:
        ConfigError: when a value is too large for half-precision scales.
    """
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for scale, zero in _starts(values, levels):
        best = _better(best, values, weight, scale, zero, levels)
    if best is None:
        raise ConfigError("group: no values")
    for _ in range(TURNS):
        scale, zero = _least_squares(values, weight, best[1], best[2], levels)
        best = _better(best, values, weight, scale, zero, levels)
    return best[1], best[2]


def _starts(values: Tensor, levels: Levels) -> list[tuple[Tensor, Tensor]]:
    low, high = values.amin(0), values.amax(0)
    require_range(float(torch.maximum(high, -low).max()), levels)
    if levels.zeros:
        middle = (low + high) / 2
        steps = [half((high - low) * shrink / levels.top) for shrink in SHRINK]
        return [(step, levels.top / 2 - torch.where(step != 0, middle / step, middle * 0)) for step in steps]
    zero = torch.full_like(low, levels.middle)
    extreme = torch.where(high > -low, -high, -low)  # code 0 stands for the value of largest magnitude
    return [(half(extreme * shrink / levels.middle), zero) for shrink in SHRINK]


def _better(
    best: tuple[Tensor, Tensor, Tensor] | None,
    values: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor,
    levels: Levels,
) -> tuple[Tensor, Tensor, Tensor]:
    scale, zero = half(scale), half(zero)
    residual = values - scale * (encode(values, inverse(scale), zero, levels) - zero)
    error = weight @ residual.square_()
    if best is None:
        return error, scale, zero
    better = error < best[0]
    return torch.where(better, error, best[0]), torch.where(better, scale, best[1]), torch.where(better, zero, best[2])


def _least_squares(
    values: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, levels: Levels
) -> tuple[Tensor, Tensor]:
    codes = encode(values, inverse(scale), zero, levels)
    if not levels.zeros:
        codes -= zero
        square = weight @ codes.square()
        product = weight @ (codes * values)
        return torch.where(square > 0, product / square, scale), zero
    total = weight.sum()
    mean_code, mean = weight @ codes / total, weight @ values / total
    spread = weight @ (codes - mean_code).square()
    product = weight @ ((codes - mean_code) * (values - mean))
    step = torch.where(spread > 0, product / spread, scale)
    return step, torch.where(step != 0, mean_code - mean / step, zero)
