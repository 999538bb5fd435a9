"""The candidates of one layer: every way to store it that a plan may choose from, with its bytes and its expected loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from mpo_exporter.calibrate.moments import Moment, require_finite
from mpo_exporter.fit.common import unfold
from mpo_exporter.fit.search import EXACT_SIZE, whiten
from mpo_exporter.fit.shapes import balanced_shape, low_rank_shape
from mpo_exporter.quantize.gptq import Grid, expected_residuals
from mpo_exporter.quantize.grid import LARGEST
from mpo_exporter.terms import Candidate, fitting_group, operator, stored_bytes
from mpo_formats import Dense, LinearSpec, Quantized, Term
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_formats.packing import implicit_zero

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]
# (χ, expected loss) for rising χ.
Curve = tuple[tuple[int, float], ...]

# Grids of integers. Stored zeros pay at few bits, large groups at many bits.
GRIDS = (
    *(Grid(bits, group, zeros) for bits in (2, 3) for group in (32, 64, 128) for zeros in (False, True)),
    *(Grid(4, group) for group in (32, 64, 128)),
    *(Grid(bits, group) for bits in (5, 6) for group in (64, 128)),
    Grid(8, 128),
)
# Grids that are also tried with int8 cores beside them, for every χ in LADDER: one decomposition gives the loss of each χ.
CORED = (*(Grid(bits, 64) for bits in (2, 3)), Grid(4, 32), Grid(4, 128))
LADDER = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# The share of the expected error that descent after the compensated rounding leaves, by bits (measured on the embedded
# model); FINER for all other widths.
DESCENT = {2: 0.85, 3: 0.9}
FINER = 0.91
# Rows sampled from a large matrix where no spectrum is needed.
SAMPLED_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The cost of an error R [O, I] of a matrix, in nats per token: ½ Σ_o rows_o · R_o H R_oᵀ (docs/method.md, Allocation).

    Args:
        moment: of the layer's input; its C is H [I, I].
        rows: [O], the Fisher information F of the layer's outputs. For an embedding see `table_sensitivity`.
    """

    moment: Moment
    rows: Vector

    @property
    def hessian(self) -> Matrix:
        """H [I, I]."""
        return self.moment.second

    def loss(self, residual: Matrix, weight: Vector) -> float:
        """The expected loss of rounding errors r [O, I] with R H Rᵀ = Σ_j weight_j r_j² in every row."""
        return float(self.rows @ (np.square(residual) @ weight)) / 2

    def total(self, matrix: Matrix) -> float:
        """The expected loss of setting a matrix [O, I] to zero."""
        return float(self.rows @ ((matrix @ self.hessian) * matrix).sum(1)) / 2

    def sample(self, matrix: Matrix, count: int = SAMPLED_ROWS) -> tuple[Matrix, Sensitivity]:
        """`count` rows of `matrix` [O, I] with about the expected loss of all; a matrix of few rows as it is.

        A row is drawn in proportion to its share of `rows`, evenly along them, so all drawn rows get the same weight. The
        estimate is off only as far as errors differ between rows of equal sensitivity.
        """
        total = float(self.rows.sum())
        if len(matrix) <= 2 * count or not total > 0:
            return matrix, self
        ends = np.cumsum(self.rows) / total
        picks = np.searchsorted(ends, (np.arange(count) + 0.5) / count).clip(max=len(matrix) - 1)
        return matrix[picks], Sensitivity(self.moment, np.full(count, total / count))


def table_sensitivity(
    frequency: Vector, lookup: Vector, moment: Matrix | None = None, fisher: Vector | None = None
) -> Sensitivity:
    """The sensitivity of an embedding [V, E]; with `moment` and `fisher` given it is also the head.

    As an embedding, row v is used with its token's frequency p_v, and its error is weighted by the Fisher information L [E]
    of the looked-up vector: p_v L. As a head it is weighted by F_v C. Both rise with the token's frequency, so one Hessian
    serves all rows: the mean of the two uses, H = mean(F) C + mean(p) L, times the row's frequency relative to the mean.

    Args:
        frequency: p [V]; lookup: L [E]; moment: C [E, E]; fisher: F [V].
    """
    seen = frequency / max(float(frequency.mean()), 1e-30)
    hessian = np.diag(float(frequency.mean()) * lookup)
    if moment is None or fisher is None:
        return Sensitivity(Moment(hessian), seen)
    mean = max(float(fisher.mean()), 1e-30)
    return Sensitivity(Moment(hessian + mean * moment), (seen + fisher / mean) / 2)


@dataclass(frozen=True, slots=True)
class Alone:
    """The expected losses of cores that replace a matrix, by χ: for the shape (O,1)×(1,I) and for balanced factors."""

    low_rank: Curve
    balanced: Curve


def candidates(
    linear: LinearSpec,
    matrix: Matrix,
    sensitivity: Sensitivity,
    grids: Sequence[Grid] = GRIDS,
    chis: Sequence[int] = LADDER,
) -> list[Candidate]:
    """The candidates of a layer with the loss that compensated rounding is expected to leave; the last is lossless.

    Raises:
        ConfigError: when the matrix is not finite.
    """

    def candidate(loss: float, *terms: Term) -> Candidate:
        return Candidate(stored_bytes(replace(linear, terms=terms)), loss, terms)

    require_finite(matrix, "matrix")
    peak = float(np.abs(matrix).max(initial=0.0))
    fitting = [grid for grid in fitted(grids, linear.in_features) if peak <= LARGEST * implicit_zero(grid.bits)]
    lossless = candidate(0.0, *linear.terms)
    if not fitting:
        narrow = candidate(0.0, Dense("bf16"))
        return [lossless] if lossless.bytes <= narrow.bytes else [narrow, lossless]
    with_cores = chis and linear.name not in (EMBEDDING, HEAD)
    cored = set(fitted([grid for grid in grids if with_cores and grid in CORED], linear.in_features)) & set(fitting)
    result = []
    for part in (cored, set(fitting) - cored):
        picked = [grid for grid in fitting if grid in part]
        rows, counted = (matrix, sensitivity) if part is cored else sensitivity.sample(matrix)
        residuals, weight = expected_residuals(rows, sensitivity.moment, picked, max(grid.group for grid in fitting))
        for grid, residual in zip(picked, residuals, strict=True):
            base = Quantized(grid.bits, grid.group, grid.zeros)
            share = DESCENT.get(grid.bits, FINER)
            result.append(candidate(share * counted.loss(residual, weight), base))
            if grid in cored:
                scale = np.sqrt(counted.rows * share / 2)[:, None]
                for chi, loss in tails(scale * residual * np.sqrt(weight), chis):
                    result.append(candidate(loss, base, operator(*low_rank_shape(*matrix.shape), chi, "int8")))
    return [*result, lossless]


def fitted(grids: Sequence[Grid], columns: int) -> list[Grid]:
    """The grids, each with the largest group up to its own that divides a row of `columns` weights; without duplicates."""
    groups = [(grid, fitting_group(columns, grid.group)) for grid in grids]
    return list(dict.fromkeys(replace(grid, group=group) for grid, group in groups if group is not None))


def alone(matrix: Matrix, sensitivity: Sensitivity, chis: Sequence[int] = LADDER) -> Alone:
    """The expected losses of cores that replace a matrix [O, I]: the squares that truncating the whitened matrix drops.

    For balanced factors the moment is approximated by its partial traces, and the sum is scaled to the moment's own.
    """
    rows = np.sqrt(sensitivity.rows / 2)[:, None]
    low_rank = tails(rows * (matrix @ sensitivity.moment.root), chis)
    out_dims, in_dims = balanced_shape(matrix.shape[0], matrix.shape[1], 2)
    turned = unfold(whiten(rows * matrix, sensitivity.hessian, (in_dims[0], in_dims[1])), out_dims, in_dims)
    folded = turned.reshape(out_dims[0] * in_dims[0], -1)
    whole, sketched = sensitivity.total(matrix), max(float(np.vdot(folded, folded)), 1e-300)
    balanced = tuple((chi, loss * whole / sketched) for chi, loss in tails(folded, chis))
    return Alone(low_rank, balanced)


def tails(matrix: Matrix, chis: Sequence[int]) -> Curve:
    """(χ, the sum of the squared singular values after the first χ) for every χ below the full rank.

    For matrices with both sides above 1,024 the leading values come from a sketch of the subspace.
    """
    smallest = min(matrix.shape)
    ranks = [chi for chi in chis if chi < smallest]
    if not ranks:
        return ()
    wide = torch.from_numpy(np.ascontiguousarray(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T)).float()
    total = float(wide.square().sum(dtype=torch.float64))
    if smallest <= EXACT_SIZE:
        squares = torch.linalg.eigvalsh(wide @ wide.T).flip(0)
    else:
        start = torch.randn(wide.shape[1], min(ranks[-1] + 16, smallest), generator=torch.Generator().manual_seed(0))
        basis = torch.linalg.qr(wide @ start).Q
        basis = torch.linalg.qr(wide @ (wide.T @ basis)).Q
        squares = torch.linalg.svdvals(basis.T @ wide).square()
    kept = squares.double().clamp(min=0).cumsum(0)
    return tuple((chi, max(total - float(kept[chi - 1]), 0.0)) for chi in ranks)
