"""What each layer could be stored as, and what that is expected to cost: the survey that an allocation chooses from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from mpo_exporter.calibrate.fisher import LOOKUP, output_fisher
from mpo_exporter.calibrate.moments import Calibration, Moment, require_finite
from mpo_exporter.fit.common import unfold
from mpo_exporter.fit.layer import widen
from mpo_exporter.fit.search import EXACT_SIZE, whiten
from mpo_exporter.fit.shapes import balanced_shape, low_rank_shape
from mpo_exporter.progress import Progress, silent
from mpo_exporter.quantize.gptq import Grid, expected_residuals
from mpo_exporter.quantize.grid import LARGEST
from mpo_exporter.quantize.rounding import fitting_group
from mpo_exporter.terms import Candidate, operator
from mpo_formats import ConfigError, Dense, LinearSpec, Quantized, Term
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_formats.layout import linear_tensors
from mpo_formats.packing import implicit_zero
from mpo_runtime.weights.protocol import Weights

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]

# Stored zeros pay where codes are few; large groups where they are many.
GRIDS = (
    *(Grid(bits, group, zeros) for bits in (2, 3) for group in (32, 64, 128) for zeros in (False, True)),
    *(Grid(4, group) for group in (32, 64, 128)),
    *(Grid(bits, group) for bits in (5, 6) for group in (64, 128)),
    Grid(8, 128),
)
# Cores are tried beside these, in int8 and with these bonds: one decomposition gives all of them, so any χ can be planned.
CORED = (*(Grid(bits, 64) for bits in (2, 3)), Grid(4, 32), Grid(4, 128))
LADDER = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# What descent after the compensated rounding leaves of the expected error, by bits (measured on the embedded model).
DESCENT = {2: 0.85, 3: 0.9}
FINER = 0.91
# Rows of a large matrix that stand for all of them where no spectrum is needed.
SAMPLED_ROWS = 1024
# Windows whose gradients are taken: the Fisher information needs less text than the moments.
FISHER_WINDOWS = 32


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What an error R [O, I] of a matrix costs in nats a token: ½ Σ_o rows_o · R_o H R_oᵀ.

    H [I, I] is the second moment C of the input and `rows` [O] the Fisher information F of the outputs; of a table that is
    looked up, `table_sensitivity` says.
    """

    moment: Moment
    rows: Vector

    @property
    def hessian(self) -> Matrix:
        """H [I, I]."""
        return self.moment.second

    def loss(self, residual: Matrix, weight: Vector) -> float:
        """The expected loss of rounding errors r [O, I] whose R H Rᵀ is Σ_j weight_j r_j² in each row."""
        return float(self.rows @ (np.square(residual) @ weight)) / 2

    def total(self, matrix: Matrix) -> float:
        """The expected loss of leaving a matrix [O, I] out."""
        return float(self.rows @ ((matrix @ self.hessian) * matrix).sum(1)) / 2

    def sample(self, matrix: Matrix, count: int = SAMPLED_ROWS) -> tuple[Matrix, Sensitivity]:
        """Rows of `matrix` [O, I] whose expected loss is about that of all, `count` of them where there are far more.

        A row is taken as often as its share of `rows` says, evenly along them, so each counts the same afterwards: the
        estimate is off only as far as errors differ between rows that matter alike.
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
    """The sensitivity of an embedding [V, E], which is the head too where a moment is given.

    Looked up, row v is seen as often as its token occurs, p_v, and its error weighs by the Fisher information L [E] there:
    p_v L. As the head it weighs by F_v C. Both rise with the token's frequency, so one Hessian serves all rows: the mean of
    the two uses, H = mean(F) C + mean(p) L, times the row's frequency relative to the mean.
    """
    seen = frequency / max(float(frequency.mean()), 1e-30)
    hessian = np.diag(float(frequency.mean()) * lookup)
    if moment is None or fisher is None:
        return Sensitivity(Moment(hessian), seen)
    mean = max(float(fisher.mean()), 1e-30)
    return Sensitivity(Moment(hessian + mean * moment), (seen + fisher / mean) / 2)


@dataclass(frozen=True, slots=True)
class Alone:
    """The expected losses of cores in the place of a matrix, for each χ of the ladder: (O,1)×(1,I), and balanced factors."""

    low_rank: tuple[tuple[int, float], ...]
    balanced: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """Every layer's candidates, in the order of the file, and the second moment to round the embedding's rows with.

    `alone` is there for the attention and MLP matrices.
    """

    candidates: dict[str, list[Candidate]]
    table: Matrix
    alone: dict[str, Alone] = field(default_factory=dict)


def survey(
    source: Weights,
    calibration: Calibration,
    *,
    grids: Sequence[Grid] = GRIDS,
    chis: Sequence[int] = LADDER,
    fisher_windows: int = FISHER_WINDOWS,
    progress: Progress = silent,
) -> Survey:
    """Measures every layer's candidates on the dense upstream, one block at a time.

    A grid whose group does not divide a layer's rows is tried with the largest smaller one that does. Rows that none divides
    stay in bf16, as do values that no scale in half precision reaches.

    Args:
        chis: bond dimensions of cores, beside the integers and alone.

    Raises:
        ConfigError: naming the layer whose values are not finite.
    """
    found: dict[str, list[Candidate]] = {}
    cores: dict[str, Alone] = {}
    table = None
    for name, sensitivity in sensitivities(source, calibration, fisher_windows, progress):
        matrix = dense_matrix(source, name)
        try:
            found[name] = candidates(source.spec.linear(name), matrix, sensitivity, grids, chis)
            if name not in (EMBEDDING, HEAD):
                cores[name] = alone(matrix, sensitivity, chis)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
        if name == EMBEDDING:
            # Single precision, as it is kept in the cache: an export is the same with and without one.
            table = sensitivity.hessian.astype(np.float32).astype(np.float64)
        progress("surveying", len(found), len(source.spec.linears))
    if table is None:
        raise ConfigError("survey: the embedding was not measured")
    names = [linear.name for linear in source.spec.linears]
    return Survey({name: found[name] for name in names}, table, {name: cores[name] for name in names if name in cores})


def sensitivities(
    source: Weights, calibration: Calibration, fisher_windows: int = FISHER_WINDOWS, progress: Progress = silent
) -> Iterator[tuple[str, Sensitivity]]:
    """Yields every layer's name and sensitivity on the dense upstream, block by block, the head last."""
    windows = calibration.windows
    picks = np.linspace(0, len(windows) - 1, min(fisher_windows, len(windows))).round().astype(np.int64)
    fisher = output_fisher(source, windows[picks], progress=lambda done, total: progress("gradients", done, total))
    architecture = source.spec.architecture
    frequency = np.bincount(windows.reshape(-1), minlength=architecture.vocab_size) / windows.size
    if not architecture.tie_word_embeddings:
        yield EMBEDDING, table_sensitivity(frequency, fisher[LOOKUP])
    for names, moment in calibration.dense():
        for name in names:
            if name == EMBEDDING:
                yield name, table_sensitivity(frequency, fisher[LOOKUP], moment.second, fisher[name])
            else:
                yield name, Sensitivity(moment, fisher[name])


def dense_matrix(source: Weights, name: str) -> Matrix:
    """The dense matrix [O, I] of a layer, in float64."""
    tensor = f"{name}.0.weight"
    return widen(source.array(tensor), source.dtype(tensor))


def candidates(
    linear: LinearSpec,
    matrix: Matrix,
    sensitivity: Sensitivity,
    grids: Sequence[Grid] = GRIDS,
    chis: Sequence[int] = LADDER,
) -> list[Candidate]:
    """The candidates of one layer with the loss that compensated rounding is expected to leave; the last is lossless."""

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
    """The grids with the largest group up to their own that divides rows of so many columns, each once."""
    groups = [(grid, fitting_group(columns, grid.group)) for grid in grids]
    return list(dict.fromkeys(replace(grid, group=group) for grid, group in groups if group is not None))


def alone(matrix: Matrix, sensitivity: Sensitivity, chis: Sequence[int] = LADDER) -> Alone:
    """What cores in the place of a matrix are expected to cost: the squares that a truncation of the whitened one drops.

    For balanced factors the moment's partial traces stand in for it, and the sum is scaled to the moment's own.
    """
    rows = np.sqrt(sensitivity.rows / 2)[:, None]
    low_rank = tails(rows * (matrix @ sensitivity.moment.root), chis)
    out_dims, in_dims = balanced_shape(matrix.shape[0], matrix.shape[1], 2)
    turned = unfold(whiten(rows * matrix, sensitivity.hessian, (in_dims[0], in_dims[1])), out_dims, in_dims)
    folded = turned.reshape(out_dims[0] * in_dims[0], -1)
    whole, sketched = sensitivity.total(matrix), max(float(np.vdot(folded, folded)), 1e-300)
    balanced = tuple((chi, loss * whole / sketched) for chi, loss in tails(folded, chis))
    return Alone(low_rank, balanced)


def tails(matrix: Matrix, chis: Sequence[int]) -> tuple[tuple[int, float], ...]:
    """(χ, sum of the squared singular values past the first χ) for each χ below the full rank.

    Of matrices with both sides above 1,024 the leading values are those of a sketch of the subspace.
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


def stored_bytes(linear: LinearSpec) -> int:
    """Bytes of a layer's tensors in the file, padding included."""
    return sum(tensor.size + tensor.padding for tensor in linear_tensors(linear))
