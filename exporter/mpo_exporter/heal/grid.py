"""An integer matrix in training: its grid, whose scales are trained, and its codes, which may move.

Scales are trained as a relative change of their first values. Codes are frozen, or held as real ("latent") numbers in units of
the grid's step and rounded to integers in the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpo_exporter.heal.rounding import cells, dequantize, rounded, stored
from mpo_formats.layout import PLANES
from mpo_formats.packing import implicit_zero, pack, unpack
from mpo_runtime import native
from mpo_runtime.weights.protocol import Weights

# `aim` moves a latent number at most this far from its integer. With 0.49, the edge of the rounding cell, the first noisy
# steps changed many codes of error-compensated matrices, whose codes were chosen together and are better than the nearest.
CELL = 0.3
# Grids of more bits than this have lower learning rates.
FULL_RATE_BITS = 4
Arrays = dict[str, NDArray[Any]]


def root_mean_square(values: Tensor) -> float:
    """√ mean x², at least 1e-8."""
    return max(float(values.detach().square().mean().sqrt()), 1e-8)


@cache
def fused_kernels(device: str) -> Callable[[Tensor, Tensor, Tensor, int], Tensor] | None:
    """What takes the place of `cells` and `dequantize` for whole matrices on a kind of device; None where nothing does.

    On a GPU these are kernels of Triton, on a CPU the native ones.
    """
    if device == "cuda" and find_spec("triton") is not None:
        from mpo_exporter.heal.fused import fused_cells

        return fused_cells
    if device == "cpu" and native.available():
        from mpo_exporter.heal.native_cells import native_cells

        return native_cells
    return None


class Grid(nn.Module):
    """An integer matrix [R, C]. Its scales and zeros are trained, its codes only where `moving`."""

    codes: Tensor
    base: Tensor
    base_zero: Tensor

    def __init__(self, weights: Weights, prefix: str, bits: int, *, zeros: bool, moving: bool) -> None:
        super().__init__()
        self.prefix, self.bits, self.zeros = prefix, bits, zeros
        planes = [weights.array(f"{prefix}.q{plane}") for plane in PLANES[bits]]
        codes = torch.from_numpy(unpack(planes, bits))
        scale = torch.from_numpy(weights.array(f"{prefix}.scale").astype(np.float32))
        self.group = codes.shape[1] // scale.shape[1]
        zero = torch.full_like(scale, implicit_zero(bits))
        if zeros:
            zero = torch.from_numpy(weights.array(f"{prefix}.zero").astype(np.float32))
        self.register_buffer("base", scale, persistent=moving)  # `set_matrix` changes it in a moving grid
        self.register_buffer("base_zero", zero, persistent=False)
        self.change = nn.Parameter(torch.zeros_like(scale))
        self.shift = nn.Parameter(torch.zeros_like(scale)) if zeros else None
        self.latent = nn.Parameter(codes.float()) if moving else None
        self.register_buffer("codes", codes[:0] if moving else codes, persistent=False)

    def scale_and_zero(self) -> tuple[Tensor, Tensor]:
        """Scales and zeros [R, groups], rounded as the file stores them."""
        scale = rounded(self.base * (1 + self.change), "f16")
        return scale, self.base_zero if self.shift is None else rounded(self.base_zero + self.shift, "f16")

    def weight(self) -> Tensor:
        """The matrix [R, C], for products; kernels, where there are any, round it to the type of those."""
        scale, zero = self.scale_and_zero()
        if (fused := fused_kernels(scale.device.type)) is not None:
            return fused(self.codes if self.latent is None else self.latent, scale, zero, (1 << self.bits) - 1)
        return self._values(scale, zero, slice(None))

    def rows(self, ids: Tensor) -> Tensor:
        """The rows `ids` [T] of the matrix, as [T, C]."""
        scale, zero = self.scale_and_zero()
        return self._values(scale[ids], zero[ids], ids)

    def _values(self, scale: Tensor, zero: Tensor, rows: slice | Tensor) -> Tensor:
        if self.latent is None:
            return dequantize(self.codes[rows], scale, zero)
        return cells(self.latent[rows], scale, zero, (1 << self.bits) - 1)

    @torch.no_grad()
    def aim(self, matrix: Tensor) -> None:
        """Moves the latent numbers of a moving grid towards a dense matrix [R, C], but not so far that a code changes."""
        if self.latent is not None:
            scale, zero = self.scale_and_zero()
            grouped = matrix.view(*scale.shape, -1)
            wanted = torch.where(scale[..., None] != 0, grouped / scale[..., None], 0) + zero[..., None]
            codes = self.latent.round()
            self.latent.copy_(wanted.view(codes.shape).clamp(codes - CELL, codes + CELL))

    @torch.no_grad()
    def set_matrix(self, codes: Tensor, scale: Tensor) -> None:
        """Replaces the codes [R, C] and scales [R, groups] of a moving grid."""
        if self.latent is None:
            raise RuntimeError(f"{self.prefix}: the codes of this grid are frozen")
        self.latent.copy_(codes)
        self.base.copy_(scale)
        self.change.zero_()

    @torch.no_grad()
    def reorder(self, rows: Tensor) -> None:
        """Puts the rows of a moving grid without zeros into the order `rows`."""
        for held in (self.latent, self.base, self.change):
            if held is not None:
                held.copy_(held[rows])

    def learning(self) -> Iterator[tuple[str, Tensor, float]]:
        """Yields (kind, parameter, unit of its learning rate); `kind` names a rate in Settings: core, code, scale, norm.

        The unit is 1 up to 4 bits and is halved for each further bit: wide grids have less to gain, but in units of the
        grid's step the noise of an optimizer step would be the same.
        """
        unit = min(1.0, 2.0 ** (FULL_RATE_BITS - self.bits))
        yield "scale", self.change, unit
        if self.shift is not None:
            yield "scale", self.shift, unit
        if self.latent is not None:
            yield "code", self.latent, unit  # in steps of the grid

    def arrays(self) -> Arrays:
        """The arrays to store, by their names in the file."""
        scale, zero = self.scale_and_zero()
        codes = self.codes
        if self.latent is not None:
            codes = self.latent.detach().round().clamp(0, (1 << self.bits) - 1).to(torch.uint8)
        planes = pack(codes.cpu().numpy(), self.bits, self.group)
        result: Arrays = {f"{self.prefix}.q{p}": plane for p, plane in zip(PLANES[self.bits], planes, strict=True)}
        result[f"{self.prefix}.scale"] = stored(scale, "f16")
        if self.zeros:
            result[f"{self.prefix}.zero"] = stored(zero, "f16")
        return result
