"""Rounding to nearest, group by group, with a searched scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mpo_exporter.quantize import native
from mpo_exporter.quantize.grid import Grid, Levels, encode, inverse, require_range, search
from mpo_formats import ConfigError
from mpo_formats.packing import implicit_zero, pack

Matrix = NDArray[np.float64]
# Factors by which a group's range is scaled to find the lowest squared error: its extreme value may be clipped by a quarter.
SHRINK = np.linspace(0.75, 1.05, 13)
LARGEST_SCALE = float(np.finfo(np.float16).max)
# Half precision stores scales in steps of 2^-24 at its lower end: smaller ones lose their digits, and at last all of them.
SCALE_STEP = 2.0**-24
# The share of a matrix's squared values that rounding its scales may cost: four bits cost five times as much.
MOST_LOST = 1e-3
# Values rounded at a time, which bounds the memory that the search takes.
BLOCK = 1 << 18
# Values that are made from codes at a time.
PIECE = 1 << 15


@dataclass(frozen=True, slots=True)
class Integers:
    """A quantised matrix: codes [rows, columns], scales [rows, groups], and zeros [rows, groups] or None (`implicit_zero`)."""

    codes: NDArray[np.uint8]
    scale: NDArray[np.float16]
    zero: NDArray[np.float16] | None
    bits: int
    group: int

    def matrix(self) -> Matrix:
        """scale · (q − zero) in float64."""
        (rows, columns), groups = self.codes.shape, self.scale.shape[1]
        result = np.empty((rows, columns))
        step = max(1, PIECE // max(columns, 1))
        for start in range(0, rows, step):  # pieces that stay in the caches
            piece = slice(start, start + step)
            grouped = self.codes[piece].reshape(-1, groups, columns // groups).astype(np.float64)
            grouped -= implicit_zero(self.bits) if self.zero is None else self.zero[piece].astype(np.float64)[..., None]
            grouped *= self.scale[piece].astype(np.float64)[..., None]
            result[piece] = grouped.reshape(-1, columns)
        return result

    def planes(self) -> list[NDArray[np.uint8]]:
        """The packed planes, low bits first."""
        return pack(self.codes, self.bits, self.group)


def round_to_nearest(
    matrix: Matrix, bits: int, group: int, *, zeros: bool = False, weight: NDArray[np.float64] | None = None
) -> Integers:
    """Quantises a matrix [rows, columns], every value to its nearest code: w ≈ scale · (q − zero).

    Without stored zeros, the scale of a group is such that code 0 stands for the value of largest magnitude, times the
    factor that leaves the smallest squared error.

    Args:
        zeros: stores a zero per group, searched together with its scale.
        weight: of the squared error of each column [columns], such as the diagonal of the input's second moment.

    Raises:
        ConfigError: when the matrix has values that are not finite, or too large for half-precision scales.
    """
    if not np.isfinite(matrix).all():
        raise ConfigError("matrix: has values that are not finite; check the source model")
    if native.usable():
        return _round_native(matrix, Grid(bits, group, zeros), weight)
    if zeros or weight is not None:
        return _round_searched(
            matrix, Levels(bits, zeros), group, np.ones(matrix.shape[1]) if weight is None else weight
        )
    step = max(1, BLOCK // matrix.shape[1])
    parts = [_round_rows(matrix[start : start + step], bits, group) for start in range(0, matrix.shape[0], step)]
    codes, scale = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Integers(codes, scale, None, bits, group)


def require_scales(matrix: Matrix, bits: int, group: int) -> None:
    """Raises ConfigError for a matrix [rows, columns] whose values are so small that half precision cannot hold its scales.

    Groups of tiny values among larger ones, such as rows of tokens that were never trained, do no harm and are let pass.
    """
    lost_in_scales(matrix, bits, group).require()


@dataclass(frozen=True, slots=True)
class LostInScales:
    """What rounding the scales of small values to half precision costs a matrix, or some rows of it.

    Args:
        small: whether there are such values.
        lost, total: squared values that it costs, and all of them.
        peak: the largest magnitude.
    """

    small: bool
    lost: float
    total: float
    peak: float

    def __add__(self, other: LostInScales) -> LostInScales:
        lost, total = self.lost + other.lost, self.total + other.total
        return LostInScales(self.small or other.small, lost, total, max(self.peak, other.peak))

    def require(self) -> None:
        """Raises ConfigError where it is too much."""
        if self.small and (not self.lost <= MOST_LOST * self.total or self.total == 0.0):
            raise ConfigError(
                f"matrix: values of at most {self.peak:.2g} are below the range of half-precision scales; "
                "store this layer dense"
            )


def lost_in_scales(matrix: Matrix, bits: int, group: int) -> LostInScales:
    """What rounding its scales costs a matrix [rows, columns]."""
    rows, columns = matrix.shape
    smallest = SCALE_STEP * implicit_zero(bits) / np.sqrt(MOST_LOST)
    grouped = matrix.reshape(rows, columns // group, group)
    peaks = np.abs(grouped).max(-1, initial=0.0)
    energy = np.einsum("rgi,rgi->rg", grouped, grouped)
    suspects = (peaks > 0) & (peaks < smallest)
    # The scale, peak / implicit_zero, is rounded by at most half a step, and the values with it.
    share = np.divide(SCALE_STEP / 2 * implicit_zero(bits), peaks, out=np.zeros_like(peaks), where=suspects)
    lost = float((np.minimum(share, 1.0) ** 2 * energy).sum())
    return LostInScales(bool(suspects.any()), lost, float(energy.sum()), float(peaks.max(initial=0.0)))


def _round_native(matrix: Matrix, grid: Grid, weight: NDArray[np.float64] | None) -> Integers:
    require_range(float(np.abs(matrix).max(initial=0.0)), Levels(grid.bits, grid.zeros))
    single = matrix.astype(np.float32)
    if grid.zeros or weight is not None:
        given = None if weight is None else weight.astype(np.float32)
        codes, scale, zero = native.nearest(single, grid, given)
    else:
        codes, scale, zero = native.nearest(single, grid, factors=SHRINK.tolist(), turns=0)
    return Integers(codes, scale, zero if grid.zeros else None, grid.bits, grid.group)


def _round_searched(matrix: Matrix, levels: Levels, group: int, weight: NDArray[np.float64]) -> Integers:
    values = torch.from_numpy(matrix.T.astype(np.float32))  # [columns, rows]
    importance = torch.from_numpy(weight).float()
    codes = torch.empty(values.shape, dtype=torch.uint8)
    grids = []
    for start in range(0, len(values), group):
        inside = slice(start, start + group)
        scale, zero = search(values[inside], importance[inside], levels)
        codes[inside] = encode(values[inside], inverse(scale), zero, levels).to(torch.uint8)
        grids.append((scale, zero))
    scales, zeros = (torch.stack(parts, 1).half().numpy() for parts in zip(*grids, strict=True))
    return Integers(codes.T.contiguous().numpy(), scales, zeros if levels.zeros else None, levels.bits, group)


def _round_rows(matrix: Matrix, bits: int, group: int) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    rows, columns = matrix.shape
    middle, top = np.float32(implicit_zero(bits)), np.float32((1 << bits) - 1)
    # Single precision: the search is bound by memory, and codes are far coarser.
    grouped = matrix.reshape(rows, columns // group, group).astype(np.float32)
    index = np.abs(grouped).argmax(-1)[..., None]
    extreme = np.take_along_axis(grouped, index, -1).astype(np.float64)  # [rows, groups, 1]
    if not np.abs(extreme).max(initial=0.0) / middle <= LARGEST_SCALE:
        raise ConfigError("matrix: values exceed the range of half-precision scales; store this layer dense")
    best = np.full(extreme.shape, np.inf, np.float32)
    scale = np.zeros(extreme.shape, np.float16)
    for shrink in SHRINK:
        # A factor above 1 must not push the scale over the edge of half precision.
        candidate = np.clip(-extreme / middle * shrink, -LARGEST_SCALE, LARGEST_SCALE).astype(np.float16)
        error = _codes(grouped, candidate, middle, top)
        error -= middle
        error *= candidate.astype(np.float32)
        error -= grouped
        squared = np.einsum("rgi,rgi->rg", error, error)[..., None]
        better = squared < best
        scale, best = np.where(better, candidate, scale), np.where(better, squared, best)
    codes = _codes(grouped, scale, middle, top).astype(np.uint8).reshape(rows, columns)
    return codes, scale[..., 0]


def _codes(
    grouped: NDArray[np.float32], scale: NDArray[np.float16], middle: np.float32, top: np.float32
) -> NDArray[np.float32]:
    wide = scale.astype(np.float32)
    inverse = np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)
    codes = grouped * inverse
    codes += middle
    np.rint(codes, out=codes)
    return np.clip(codes, 0, top, out=codes)
