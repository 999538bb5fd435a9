"""What each layer could be stored as, and what that is expected to cost: the survey that an allocation chooses from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mpo_exporter.allocate import Candidate
from mpo_exporter.build import widen
from mpo_exporter.calibrate.fisher import LOOKUP, output_fisher
from mpo_exporter.calibrate.moments import Calibration
from mpo_exporter.fit.shapes import low_rank_shape
from mpo_exporter.plan import operator
from mpo_exporter.progress import Progress, silent
from mpo_exporter.quantize.gptq import Grid, expected_residuals
from mpo_formats import ConfigError, Dense, LinearSpec, Quantized
from mpo_formats.architecture import EMBEDDING
from mpo_formats.layout import linear_tensors
from mpo_runtime.weights import Weights

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]

# Stored zeros pay where codes are few; large groups where they are many.
GRIDS = (
    *(Grid(bits, group, zeros) for bits in (2, 3) for group in (32, 64, 128) for zeros in (False, True)),
    *(Grid(4, group) for group in (32, 64, 128)),
    *(Grid(bits, group) for bits in (5, 6) for group in (64, 128)),
    Grid(8, 128),
)
# What descent after the compensated rounding leaves of the expected error, by bits (measured on the embedded model).
DESCENT = {2: 0.85, 3: 0.9}
FINER = 0.91
# Windows whose gradients are taken: the Fisher information needs less text than the moments.
FISHER_WINDOWS = 32


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What an error R [O, I] of a matrix costs in nats a token: ½ Σ_o rows_o · R_o H R_oᵀ.

    H [I, I] is the second moment C of the input and `rows` [O] the Fisher information F of the outputs; of a table that is
    looked up, `table_sensitivity` says.
    """

    hessian: Matrix
    rows: Vector

    def loss(self, residual: Matrix, weight: Vector) -> float:
        """The expected loss of rounding errors r [O, I] whose R H Rᵀ is Σ_j weight_j r_j² in each row."""
        return float(self.rows @ (np.square(residual) @ weight)) / 2


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
        return Sensitivity(hessian, seen)
    mean = max(float(fisher.mean()), 1e-30)
    return Sensitivity(hessian + mean * moment, (seen + fisher / mean) / 2)


@dataclass(frozen=True, slots=True)
class Survey:
    """Every layer's candidates, in the order of the file, and the second moment to round the embedding's rows with."""

    candidates: dict[str, list[Candidate]]
    table: Matrix


def survey(
    source: Weights,
    calibration: Calibration,
    *,
    grids: Sequence[Grid] = GRIDS,
    chis: Sequence[int] = (),
    fisher_windows: int = FISHER_WINDOWS,
    progress: Progress = silent,
) -> Survey:
    """Measures every layer's candidates on the dense upstream, one block at a time.

    Rows of a width that no group divides stay in bf16.

    Args:
        chis: bond dimensions of int8 cores beside the integers, each one more candidate; none by default.

    Raises:
        ConfigError: naming the layer whose values are not finite.
    """
    found: dict[str, list[Candidate]] = {}
    table = None
    for name, sensitivity in sensitivities(source, calibration, fisher_windows, progress):
        matrix = dense_matrix(source, name)
        try:
            found[name] = candidates(source.spec.linear(name), matrix, sensitivity, grids, chis)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
        if name == EMBEDDING:
            table = sensitivity.hessian
        progress("surveying", len(found), len(source.spec.linears))
    if table is None:
        raise ConfigError("survey: the embedding was not measured")
    return Survey({linear.name: found[linear.name] for linear in source.spec.linears}, table)


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
                yield name, Sensitivity(moment.second, fisher[name])


def dense_matrix(source: Weights, name: str) -> Matrix:
    """The dense matrix [O, I] of a layer, in float64."""
    tensor = f"{name}.0.weight"
    return widen(source.array(tensor), source.dtype(tensor))


def candidates(
    linear: LinearSpec,
    matrix: Matrix,
    sensitivity: Sensitivity,
    grids: Sequence[Grid] = GRIDS,
    chis: Sequence[int] = (),
) -> list[Candidate]:
    """The candidates of one layer with the loss that compensated rounding is expected to leave."""
    fitting = [grid for grid in grids if linear.in_features % grid.group == 0]
    if not fitting:
        dense = replace(linear, terms=(Dense("dense", "bf16"),))
        return [Candidate(stored_bytes(dense), 0.0, dense.terms)]
    residuals, weight = expected_residuals(matrix, sensitivity.hessian, fitting)
    result = []
    for grid, residual in zip(fitting, residuals, strict=True):
        base = Quantized("quantized", grid.bits, grid.group, grid.zeros)
        share = DESCENT.get(grid.bits, FINER)
        loss = share * sensitivity.loss(residual, weight)
        result.append(Candidate(stored_bytes(replace(linear, terms=(base,))), loss, (base,)))
        if chis and linear.name != EMBEDDING:
            rows = np.sqrt(sensitivity.rows * share / 2)[:, None]
            tail = np.square(np.linalg.svd(rows * residual * np.sqrt(weight), compute_uv=False))
            for chi in chis:
                terms = (base, operator(*low_rank_shape(*matrix.shape), chi, "int8"))
                size = stored_bytes(replace(linear, terms=terms))
                result.append(Candidate(size, float(tail[chi:].sum()), terms))
    return result


def stored_bytes(linear: LinearSpec) -> int:
    """Bytes of a layer's tensors in the file, padding included."""
    return sum(tensor.size + tensor.padding for tensor in linear_tensors(linear))
