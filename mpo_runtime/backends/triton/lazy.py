"""Arrays that are not computed yet: what a product or a residual sum still lacks is done by the op that reads it.

Models pass arrays from op to op without looking into them (backends/ops.py), so the ops of this backend may pass these. They
save launches: in a step of one token each launch takes about as long as a small product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mpo_runtime.backends.triton import elementwise

BLOCK = 1024


@dataclass(slots=True)
class Parts:
    """Columns of a product whose shares of inputs are not added up: y [P, T, width] stands for its sum over P.

    Attributes:
        first, size: the columns that are meant.
        leading: the shape of the T tokens.
    """

    y: Tensor
    first: int
    size: int
    leading: torch.Size

    @property
    def shape(self) -> torch.Size:
        """The shape of the sum."""
        return torch.Size((*self.leading, self.size))

    @property
    def count(self) -> int:
        """The number of parts."""
        return self.y.shape[0]

    @property
    def width(self) -> int:
        """How far rows are apart, in elements."""
        return self.y.shape[2]

    @property
    def part(self) -> int:
        """How far parts are apart, in elements."""
        return self.y.shape[1] * self.y.shape[2]

    def begin(self) -> Tensor:
        """A tensor that begins at the first element."""
        return self.y[0, :, self.first :]

    def tokens(self) -> int:
        """The number of rows."""
        return self.y.shape[1]

    def sum(self) -> Tensor:
        """The sum."""
        if self.count == 1 and self.size == self.width:
            return self.y.view(self.shape)
        out = self.y.new_empty((self.tokens(), self.size))
        grid = (self.tokens(), triton.cdiv(self.size, BLOCK))
        elementwise.sum_parts[grid](self.begin(), out, self.part, self.width, self.size, PARTS=self.count, BLOCK=BLOCK)
        return out.view(self.shape)


@dataclass(slots=True)
class Residual:
    """x + scale · y of which the sum is not computed yet; the norm that reads it computes both."""

    x: Tensor
    y: Parts
    scale: float
    value: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape of the sum."""
        return self.x.shape

    def sum(self) -> Tensor:
        """The sum."""
        if self.value is None:
            self.value = torch.add(self.x, self.y.sum(), alpha=self.scale)
        return self.value

    def normed(self, weight: Tensor, eps: float) -> Tensor:
        """The sum's RMSNorm over its last axis, in one launch with the sum."""
        width = self.y.size
        if self.value is not None or weight.shape[0] != width:
            return rms_norm(self.sum(), weight, eps)
        self.value, normed = torch.empty_like(self.x), torch.empty_like(self.x)
        elementwise.add_and_norm[(self.y.tokens(),)](
            self.x, self.y.begin(), self.value, weight, normed, self.y.part, self.y.width, width, self.scale, eps,
            PARTS=self.y.count, WIDTH=triton.next_power_of_2(width),
        )  # fmt: skip
        return normed


Lazy = Parts | Residual


def resolved(x: Tensor | Lazy) -> Tensor:
    """The array itself."""
    return x if isinstance(x, Tensor) else x.sum()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight, for each stretch of x that is as wide as the weight."""
    x, width = x.contiguous(), weight.shape[0]
    y = torch.empty_like(x)
    elementwise.rms_norm[(math.prod(x.shape) // width,)](x, weight, y, width, eps, WIDTH=triton.next_power_of_2(width))
    return y


def swiglu(gate: Tensor | Parts, up: Tensor | Parts) -> Tensor:
    """silu(gate) · up."""
    shape, size = gate.shape, gate.shape[-1]
    if isinstance(gate, Parts) and isinstance(up, Parts) and gate.y is up.y:
        begin, other, part, width, parts = gate.begin(), up.begin(), gate.part, gate.width, gate.count
    else:
        begin, other = resolved(gate).contiguous(), resolved(up).contiguous()
        part, width, parts = 0, size, 1
    y = torch.empty(shape, dtype=torch.float32, device=begin.device)
    grid = (math.prod(shape) // size, triton.cdiv(size, BLOCK))
    elementwise.swiglu[grid](begin, other, y, part, width, size, PARTS=parts, BLOCK=BLOCK)
    return y
