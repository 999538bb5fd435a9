"""Sums of outer products over the tokens of a text, from which second moments are made."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.calibrate.precision import add_outer, kernel_takes
from mpo_formats import ConfigError

Matrix = NDArray[np.float64]
# Rows of a product that are computed at once, so that its single-precision result takes little memory beside the sums.
PANEL, HALF_PANEL = 768, 192
# Tokens that are summed in single precision, for sums of at most so many entries.
TOKENS, MOST_PART = 8192, 1 << 24


class Sums:
    """Running sums of x x̂ᵀ over tokens: those of a few thousand in single precision, the sum of these in double precision.

    They are on the device of the inputs; `mean` brings them to the CPU.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.part: Tensor | None = None
        self.tokens = self.flushed = 0

    def add(self, left: Tensor, right: Tensor | None = None) -> None:
        """Adds Σ_t left_t right_tᵀ of inputs [..., I]; without `right`, Σ_t left_t left_tᵀ, of which the upper half is summed."""
        left = left.detach().reshape(-1, left.shape[-1])
        right_ = left if right is None else right.detach().reshape(-1, right.shape[-1])
        size = left.shape[1]
        if self.total is None:
            self.total = left.new_zeros((size, right_.shape[1]), dtype=torch.float64)
            # Where the sums are large, memory counts for more than time.
            self.part = left.new_zeros(size, right_.shape[1]) if self.total.numel() <= MOST_PART else None
        if self.part is not None and kernel_takes(left, right_):
            add_outer(left, right_, self.part, upper=right is None)
        else:
            self._add(left, right_, right is None)
        self.tokens += left.shape[0]
        if self.tokens - self.flushed >= TOKENS:
            self._flush()

    def _add(self, left: Tensor, right: Tensor, symmetric: bool) -> None:
        """Adds products of panels of columns."""
        # Narrow panels leave out nearly all of the lower half. Where there is none to leave out, wide ones are faster, and for
        # the kernel, which arranges all of `right` for each panel.
        panel = HALF_PANEL if symmetric and not kernel_takes(left, right) else PANEL
        for start in range(0, left.shape[1], panel):
            first = start if symmetric else 0
            rows = slice(start, start + panel)
            if kernel_takes(left, right):
                product = left.new_zeros(min(panel, left.shape[1] - start), right.shape[1] - first)
                add_outer(left[:, rows], right[:, first:], product, upper=symmetric)
            else:
                product = left[:, rows].T @ right[:, first:]
            if self.part is not None:
                self.part[rows, first:] += product
            elif self.total is not None:
                self.total[rows, first:] += product

    def _flush(self) -> None:
        """Adds the sums in single precision to those in double precision."""
        if self.total is not None and self.part is not None:
            self.total += self.part
            self.part.zero_()
        self.flushed = self.tokens

    def take(self, other: Sums) -> None:
        """Adds other sums of the same sizes, which are used up."""
        other._flush()
        if self.total is None:
            self.total = other.total
        elif other.total is not None:
            self.total += other.total
        self.tokens += other.tokens
        other.total = other.part = None

    def mean(self, symmetric: bool) -> Matrix:
        """The sums divided by the number of tokens; `symmetric` fills the lower half in where only the upper was summed."""
        if self.total is None:
            raise ConfigError("calibration: no tokens were seen; give a longer text with --calib")
        self._flush()
        total: Matrix = self.total.cpu().numpy()
        self.total = self.part = None
        total /= self.tokens
        if symmetric:
            for start in range(0, total.shape[0], HALF_PANEL):
                rows = slice(start, start + HALF_PANEL)
                total[start + HALF_PANEL :, rows] = total[rows, start + HALF_PANEL :].T
                # The lower half of the block on the diagonal was summed in parts only.
                total[rows, rows] = np.triu(total[rows, rows]) + np.triu(total[rows, rows], 1).T
        return total


def joined(lanes: Sequence[Sums]) -> Sums:
    """The sums of all lanes, in the first one of them."""
    first, *others = lanes
    for other in others:
        first.take(other)
    return first
