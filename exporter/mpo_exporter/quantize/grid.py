"""The grid of a group, w = scale · (q − zero): searched for the values of the group, and rounded to half precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpo_formats import ConfigError
from mpo_formats.packing import implicit_zero

# A group's range may shrink by this much where that lowers its weighted error: few bits clip more of a long tail.
SHRINK = torch.linspace(0.40, 1.05, 14)
# Given codes, the best scale and zero follow in closed form; given those, codes may change: so many turns.
TURNS = 2
LARGEST = float(torch.finfo(torch.float16).max)


@dataclass(frozen=True, slots=True)
class Levels:
    """The codes 0 … 2^bits − 1, and the zero where none is stored."""

    bits: int
    zeros: bool

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> float:
        """The zero of groups that store none."""
        return implicit_zero(self.bits)


def half(values: Tensor) -> Tensor:
    """The values as half precision stores them, in float32; too large ones at the edge of its range."""
    return values.clamp(-LARGEST, LARGEST).half().float()


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, 0 where that is 0: such a group's codes are its zero."""
    return torch.where(scale != 0, scale.reciprocal(), torch.zeros_like(scale))


def encode(values: Tensor, inverse_scale: Tensor, zero: Tensor, levels: Levels) -> Tensor:
    """The nearest codes of values [g, R] (or [R]) on grids of inverse scale and zero [R], as floats."""
    return torch.addcmul(zero, values, inverse_scale).round_().clamp_(0, levels.top)


def search(values: Tensor, weight: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Finds scale [R] and zero [R] of a group of values [g, R] that leave the least Σ_j weight_j · (w_j − ŵ_j)².

    Ranges shrunk by several factors are tried, the best of them polished by alternating codes and least squares.

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
    if not float(torch.maximum(high, -low).max()) / levels.middle <= LARGEST:
        raise ConfigError("matrix: values exceed the range of half-precision scales; store this layer dense")
    if levels.zeros:
        middle = (low + high) / 2
        steps = [half((high - low) * shrink / levels.top) for shrink in SHRINK]
        return [(step, levels.top / 2 - torch.where(step != 0, middle / step, middle * 0)) for step in steps]
    zero = torch.full_like(low, levels.middle)
    extreme = torch.where(high > -low, -high, -low)  # the value of largest magnitude lies on code 0
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
