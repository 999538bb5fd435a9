"""The candidates of one layer: every way to store it that a plan may choose from, with its bytes and its expected loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.calibrate.moments import Moment, require_finite
from mpo_exporter.calibrate.precision import fast_products
from mpo_exporter.effort import USUAL
from mpo_exporter.fit.common import unfold
from mpo_exporter.fit.search import EXACT_SIZE, whiten
from mpo_exporter.fit.shapes import balanced_shape, low_rank_shape
from mpo_exporter.quantize.gptq import expected_errors, expected_residuals
from mpo_exporter.quantize.grid import LARGEST, Grid
from mpo_exporter.terms import DEFAULT_CHI, Candidate, fitting_group, hadamard_block, operator, stored_bytes
from mpo_formats import ConfigError, Dense, LinearSpec, Mpo, Quantized, Term
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_formats.packing import hadamard_transform, implicit_zero

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
# Grids for transformed inputs: weights are then spread like a normal distribution in every group, so that larger groups lose
# little, and zeros cost more than they gain.
TURNED_GRIDS = (
    *(Grid(bits, group) for bits in (2, 3, 4) for group in (32, 64, 128, 256)),
    *(Grid(bits, group) for bits in (5, 6) for group in (64, 128, 256)),
    Grid(8, 128),
)
# What the bases are compared on.
PROBE = Grid(3, 64)
# Grids that are also tried with int8 cores beside them, for every χ in LADDER: one decomposition gives the loss of each χ.
CORED = (*(Grid(bits, 64) for bits in (2, 3)), Grid(4, 32), Grid(4, 128))
LADDER = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# The share of the expected error that descent after the compensated rounding leaves, by bits (measured on the embedded
# model); FINER for all other widths.
DESCENT = {2: 0.85, 3: 0.9}
FINER = 0.91
# A matrix whose smaller side is above this is tried with cores only if bounds on its singular values let them pay.
BOUNDED = 640
# Vectors and power iterations that find a largest singular value, and by how much its square may be underestimated.
SKETCH, POWERS, SAFETY = 8, 4, 1.25


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The cost of an error R [O, I] of a matrix, in nats per token: ½ Σ_o rows_o · R_o H R_oᵀ (docs/method.md, Allocation).

    Args:
        moment: of the layer's input; its C is H [I, I]. None for inputs that nothing is known of, all alike: H is then 1.
        rows: [O], the Fisher information F of the layer's outputs. For an embedding see `table_sensitivity`.
    """

    moment: Moment | None
    rows: Vector

    @property
    def hessian(self) -> Matrix:
        """H [I, I]; needs the moment."""
        return self.known.second

    @property
    def known(self) -> Moment:
        """The moment; raises ConfigError where there is none."""
        if self.moment is None:
            raise ConfigError("sensitivity: this needs calibration text; give one with --calib")
        return self.moment

    def loss(self, residual: Matrix, weight: Vector) -> float:
        """The expected loss of rounding errors r [O, I] with R H Rᵀ = Σ_j weight_j r_j² in every row."""
        return float(self.rows @ (np.square(residual) @ weight)) / 2

    def total(self, matrix: Matrix) -> float:
        """The expected loss of setting a matrix [O, I] to zero."""
        return float(self.rows @ ((matrix @ self.hessian) * matrix).sum(1)) / 2

    def scaled(self, factor: float) -> Sensitivity:
        """The same with all costs times a factor."""
        return Sensitivity(self.moment, factor * self.rows)

    def sample(self, matrix: Matrix, count: int = USUAL.rows) -> tuple[Matrix, Sensitivity]:
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
    grids: Sequence[Grid] | None = None,
    chis: Sequence[int] = LADDER,
    *,
    hadamard: int = 0,
    every: bool = True,
    sampled: int = USUAL.rows,
) -> list[Candidate]:
    """The candidates of a layer with the loss that compensated rounding is expected to leave; the last is lossless.

    Args:
        grids: of integers; None for those that suit the basis.
        hadamard: the inputs that are transformed together, in all candidates but the lossless one; 0 for none.
        sampled: rows that errors are estimated on, of a matrix with more than twice as many.
        every: gives cores' losses for each grid of CORED; else for χ up to DEFAULT_CHI, and only where they may pay.

    Raises:
        ConfigError: when the matrix is not finite.
    """

    def candidate(loss: float, *terms: Term, hadamard: int = hadamard) -> Candidate:
        return Candidate(stored_bytes(replace(linear, terms=terms)), loss, terms, hadamard)

    require_finite(matrix, "matrix")
    grids = (TURNED_GRIDS if hadamard else GRIDS) if grids is None else grids
    matrix = hadamard_transform(matrix, hadamard)
    peak = float(np.abs(matrix).max(initial=0.0))
    fitting = [grid for grid in fitted(grids, linear.in_features) if peak <= LARGEST * implicit_zero(grid.bits)]
    lossless = candidate(0.0, *linear.terms, hadamard=0)
    if not fitting:
        narrow = candidate(0.0, Dense("bf16"), hadamard=0)
        return [lossless] if lossless.bytes <= narrow.bytes else [narrow, lossless]
    group = max(grid.group for grid in fitting)
    rows, counted = sensitivity.sample(matrix, sampled)
    losses = expected_errors(rows, sensitivity.moment, fitting, group, hadamard) @ counted.rows / 2
    result, bases = [], {}
    for grid, loss in zip(fitting, map(float, losses), strict=True):
        base, share = Quantized(grid.bits, grid.group, grid.zeros), DESCENT.get(grid.bits, FINER)
        result.append(candidate(share * loss, base))
        bases[grid] = base
    if not chis or linear.name in (EMBEDDING, HEAD):
        return [*result, lossless]
    chis = [chi for chi in chis if every or chi <= DEFAULT_CHI]
    cored = fitted([grid for grid in grids if grid in CORED], linear.in_features)
    picked = [grid for grid in cored if grid in bases]
    hull, shape = lower_hull([*result, lossless]), low_rank_shape(*matrix.shape)
    for grid in picked:
        sizes = [candidate(0.0, bases[grid], operator(*shape, chi, "int8")) for chi in chis if chi < min(matrix.shape)]
        share = DESCENT.get(grid.bits, FINER)
        bounded = not every and min(matrix.shape) > BOUNDED
        tried = [(matrix, sensitivity)] if rows is matrix or not bounded else [(rows, counted), (matrix, sensitivity)]
        residuals = (weighted_residual(*one, grid, group, hadamard) for one in tried)
        result += paying(residuals, share, sizes, None if every else hull, bounded)
    return [*result, lossless]


def paying(
    residuals: Iterator[Tensor],
    share: float,
    sizes: Sequence[Candidate],
    hull: Sequence[tuple[int, float]] | None,
    bounded: bool,
) -> list[Candidate]:
    """Cores beside integers with their losses; none where no χ lowers the loss more than integers do.

    Args:
        residuals: the weighted ones of a matrix; before it perhaps those of sampled rows, which overestimate what cores take
            off, and cost less.
        share, sizes, hull: as `may_pay` takes them; without a hull all cores are given.
        bounded: asks `may_pay` first, which is cheaper than the singular values of a large matrix.
    """
    for whitened in residuals:
        if bounded and hull and not may_pay(whitened, share, sizes, hull):
            return []
    with nullcontext() if hull is None else fast_products():
        curve = tails(whitened, [largest_bond(one) for one in sizes])
    found = [replace(one, loss=share * loss) for one, (_, loss) in zip(sizes, curve, strict=True)]
    return found if hull is None or any(one.loss < line_at(hull, one.bytes) for one in found) else []


def largest_bond(candidate: Candidate) -> int:
    """The largest χ of a candidate's cores."""
    return max(bond for term in candidate.terms if isinstance(term, Mpo) for bond in term.bonds)


def transform_gain(
    linear: LinearSpec, matrix: Matrix, sensitivity: Sensitivity, sampled: int = USUAL.rows
) -> tuple[int, float]:
    """The Hadamard block that lowers the expected loss of a layer's integers, and by which factor; (0, 1) if none does."""
    block = hadamard_block(linear.in_features)
    grids = fitted([PROBE], linear.in_features)
    require_finite(matrix, "matrix")
    if not block or not grids or np.abs(matrix).max(initial=0.0) > LARGEST:
        return 0, 1.0
    rows, counted = sensitivity.sample(matrix, sampled)
    losses = []
    for basis, tried in ((0, GRIDS), (block, TURNED_GRIDS)):
        group = max(grid.group for grid in fitted(tried, linear.in_features))  # as for the candidates
        errors = expected_errors(hadamard_transform(rows, basis), sensitivity.moment, grids, group, basis)
        losses.append(float((errors @ counted.rows)[0]))
    return (block, losses[0] / losses[1]) if 0 < losses[1] < losses[0] else (0, 1.0)


def weighted_residual(matrix: Matrix, sensitivity: Sensitivity, grid: Grid, group: int, basis: int) -> Tensor:
    """The error [O, I] that rounding is expected to leave, each entry times the root of what its square costs in nats."""
    residuals, weight = expected_residuals(matrix, sensitivity.known, [grid], group, basis)
    rows, columns = np.sqrt(sensitivity.rows / 2).astype(np.float32), np.sqrt(weight).astype(np.float32)
    residual = rows[:, None] * next(residuals).astype(np.float32) * columns
    return torch.from_numpy(residual).to(sensitivity.known.device)


def lower_hull(row: Sequence[Candidate]) -> list[tuple[int, float]]:
    """The corners (bytes, loss) of the lower convex hull of candidates, by rising bytes."""
    hull: list[tuple[int, float]] = []
    for size, loss in sorted((one.bytes, one.loss) for one in row):
        if hull and loss >= hull[-1][1]:
            continue
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (size - hull[-2][0]) >= (loss - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((size, loss))
    return hull


def line_at(hull: Sequence[tuple[int, float]], size: int) -> float:
    """The loss at a number of bytes on the line through the corners of a hull."""
    bytes_, losses = zip(*hull, strict=True)
    return float(np.interp(size, bytes_, losses))


def may_pay(whitened: Tensor, share: float, sizes: Sequence[Candidate], hull: Sequence[tuple[int, float]]) -> bool:
    """Whether cores of some χ could lower the loss more than as many bytes of integers do.

    χ bonds take at most χ λ_max off the loss, and at most √(χ Σ λ²), with λ the squared singular values: neither needs all of
    them.

    Args:
        whitened: the weighted residual [O, I] that cores would correct.
        share: of it that descent leaves.
        sizes: the candidates with cores, by rising χ.
        hull: of the candidates without (`lower_hull`).
    """
    wide = whitened if whitened.shape[0] <= whitened.shape[1] else whitened.T
    gram = wide @ wide.T
    basis = start_basis(len(gram), min(SKETCH, len(gram)), gram)
    for _ in range(POWERS):
        basis = torch.linalg.qr(gram @ basis).Q
    largest = SAFETY * float(torch.linalg.eigvalsh(basis.T @ gram @ basis)[-1])
    total, squares = float(gram.trace()), float(gram.square().sum(dtype=torch.float64))
    for one in sizes:
        chi = largest_bond(one)
        most = min(chi * largest, math.sqrt(chi * squares))
        if share * max(total - most, 0.0) < line_at(hull, one.bytes):
            return True
    return False


def fitted(grids: Sequence[Grid], columns: int) -> list[Grid]:
    """The grids, each with the largest group up to its own that divides a row of `columns` weights; without duplicates."""
    groups = [(grid, fitting_group(columns, grid.group)) for grid in grids]
    return list(dict.fromkeys(replace(grid, group=group) for grid, group in groups if group is not None))


def alone(matrix: Matrix, sensitivity: Sensitivity, chis: Sequence[int] = LADDER) -> Alone:
    """The expected losses of cores that replace a matrix [O, I]: the squares that truncating the whitened matrix drops.

    For balanced factors the moment is approximated by its partial traces, and the sum is scaled to the moment's own.
    """
    rows = np.sqrt(sensitivity.rows / 2)[:, None]
    low_rank = tails(torch.from_numpy(rows * (matrix @ sensitivity.known.root)), chis)
    out_dims, in_dims = balanced_shape(matrix.shape[0], matrix.shape[1], 2)
    turned = unfold(whiten(rows * matrix, sensitivity.hessian, (in_dims[0], in_dims[1])), out_dims, in_dims)
    folded = turned.reshape(out_dims[0] * in_dims[0], -1)
    whole, sketched = sensitivity.total(matrix), max(float(np.vdot(folded, folded)), 1e-300)
    balanced = tuple((chi, loss * whole / sketched) for chi, loss in tails(torch.from_numpy(folded), chis))
    return Alone(low_rank, balanced)


def tails(matrix: Tensor, chis: Sequence[int]) -> Curve:
    """(χ, the sum of the squared singular values after the first χ) for every χ below the full rank.

    For matrices with both sides above 1,024 the leading values come from a sketch of the subspace.
    """
    smallest = min(matrix.shape)
    ranks = [chi for chi in chis if chi < smallest]
    if not ranks:
        return ()
    wide = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).float()
    total = float(wide.square().sum(dtype=torch.float64))
    if smallest <= EXACT_SIZE:
        squares = torch.linalg.eigvalsh(torch.nn.functional.linear(wide, wide)).flip(0)
    else:
        start = start_basis(wide.shape[1], min(ranks[-1] + 16, smallest), wide)
        basis = torch.linalg.qr(wide @ start).Q
        basis = torch.linalg.qr(wide @ (wide.T @ basis)).Q
        squares = torch.linalg.svdvals(basis.T @ wide).square()
    kept = squares.double().clamp(min=0).cumsum(0).cpu()
    return tuple((chi, max(total - float(kept[chi - 1]), 0.0)) for chi in ranks)


def start_basis(rows: int, columns: int, beside: Tensor) -> Tensor:
    """Random vectors [rows, columns], the same on every device, on the device of another tensor."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(beside.device)


@dataclass(frozen=True, slots=True)
class Tried:
    """What a survey tries of every layer; the fields are its arguments, and `rows` of its `care`."""

    grids: tuple[Grid, ...] | None
    chis: tuple[int, ...]
    hadamard: bool
    complete: bool
    rows: int

    def layer(
        self, linear: LinearSpec, matrix: Matrix, sensitivity: Sensitivity
    ) -> tuple[list[Candidate], Alone | None, float]:
        """The candidates of a layer, the losses of cores alone if asked for, and the factor by which a transform lowers its loss.

        Raises:
            ConfigError: naming the layer, when its values are not finite.
        """
        block, gain = 0, 1.0
        try:
            if self.hadamard:
                block, gain = transform_gain(linear, matrix, sensitivity, self.rows)
            found = candidates(
                linear,
                matrix,
                sensitivity,
                self.grids,
                self.chis,
                hadamard=block,
                every=self.complete,
                sampled=self.rows,
            )
            with_alone = self.complete and linear.name not in (EMBEDDING, HEAD)
            if sensitivity.moment is not None and (with_alone or linear.name == EMBEDDING):
                sensitivity.moment.turn(0)
            cores = alone(matrix, sensitivity, self.chis) if with_alone else None
        except ConfigError as error:
            raise ConfigError(f"{linear.name}: {error}") from None
        return found, cores, gain
