"""Error-compensated rounding (GPTQ: Frantar et al. 2023, arXiv 2210.17323), then descent on the same error.

The error is E = tr[(W − Ŵ) C (W − Ŵ)ᵀ] with the second moment C of the inputs. Columns are rounded one after another,
and what rounding one loses is made up for by the later ones; afterwards codes, and scales given the codes, are
improved in turns as long as that lowers E (`descent.py`). Rows do not depend on each other.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.fit.common import require_finite
from mpo_exporter.quantize.descent import Problem, State, descend, refit
from mpo_exporter.quantize.grid import Levels, encode, inverse, search
from mpo_exporter.quantize.rounding import Integers
from mpo_formats import ConfigError

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]
log = logging.getLogger(__name__)

# Added to the diagonal of C, as a share of its mean.
DAMPING = 0.01
# Columns whose compensation is applied to the rest at once, and rows worked on at once (both for the caches' sake).
BLOCK = 64
ROWS = 2048
# Turns of coordinate descent over the codes and least squares over the scales.
TURNS = 4


def loaded(moment: Matrix, damping: float = DAMPING) -> Tensor:
    """C / mean(diag C) + damping · I in float64, with more of it where that is still singular (which is logged).

    Raises:
        ConfigError: when C has values that are not finite.
    """
    if not np.isfinite(moment).all():
        raise ConfigError("second moment: has values that are not finite; check the source model and the text")
    mean = float(np.trace(moment)) / len(moment)
    matrix = torch.from_numpy(moment / mean if mean > 0 else np.zeros_like(moment))
    identity = torch.eye(len(moment), dtype=torch.float64)
    load = damping
    while True:
        candidate = matrix + load * identity
        if not int(torch.linalg.cholesky_ex(candidate).info):
            if load > damping:
                log.warning("second moment of %d inputs is singular; its diagonal was raised by %g", len(moment), load)
            return candidate
        load = max(10 * load, 1e-6)


def target(
    matrix: Matrix, moment: Matrix, cross: Matrix | None, drift: Matrix | None = None, damping: float = DAMPING
) -> Matrix:
    """The matrix to fit: W, or (W E[x x̂ᵀ] + D) C⁻¹ where the inputs x̂ differ from the dense model's x.

    That is the least-squares map from x̂ to W x, so errors of earlier layers are made up for as far as a linear map can, and
    with D = E[(h − ĥ) x̂ᵀ] / m (`Moment.drift`) also the error of the residual stream that the output is added to.
    """
    if cross is None:
        return matrix
    load = np.diag(np.full(len(moment), damping * float(np.trace(moment)) / len(moment)))
    wanted = matrix @ (cross + load) + (0 if drift is None else drift)
    result: Matrix = np.linalg.solve(moment + load, wanted.T).T.astype(np.float64, copy=False)
    return result


@dataclass(frozen=True, slots=True)
class Grid:
    """How a matrix is stored: bits, group size, and whether each group stores its zero."""

    bits: int
    group: int
    zeros: bool = False


def compensated(
    matrix: Matrix, moment: Matrix, bits: int, group: int, *, zeros: bool = False,
    turns: int = TURNS, damping: float = DAMPING,
) -> Integers:  # fmt: skip
    """Quantises W [O, I] for inputs of second moment C [I, I], in groups of `group` columns.

    Args:
        zeros: stores a zero per group (asymmetric); else it is 2^(bits − 1).
        turns: of descent after the compensated rounding; 0 is plain GPTQ.
        damping: added to the diagonal of C, as a share of its mean.

    Raises:
        ConfigError: for values that are not finite or exceed half precision, or a group that does not divide a row.
    """
    check(matrix, moment, group)
    levels = Levels(bits, zeros)
    hessian = loaded(moment, damping)
    order = processing_order(hessian.diagonal(), group)
    hessian = hessian[order][:, order]
    factor = root_of_inverse(hessian).float()
    wanted = torch.from_numpy(matrix).float()
    problem = Problem(hessian.float(), group, levels)
    parts = [
        _rows(problem, factor, wanted[start : start + ROWS, order].T.contiguous(), turns)
        for start in range(0, len(wanted), ROWS)
    ]
    codes = torch.cat([part.codes for part in parts], 1)
    restored = torch.empty(codes.shape, dtype=torch.uint8)
    restored[order] = codes.to(torch.uint8)
    groups = order[::group] // group
    scale, zero = (
        torch.empty_like(stacked).index_copy_(0, groups, stacked)
        for stacked in (torch.cat([getattr(part, name) for part in parts], 1) for name in ("scale", "zero"))
    )
    return Integers(
        restored.T.contiguous().numpy(), scale.T.half().contiguous().numpy(),
        zero.T.half().contiguous().numpy() if zeros else None, bits, group,
    )  # fmt: skip


def expected_residuals(matrix: Matrix, moment: Matrix, grids: Sequence[Grid]) -> tuple[list[Matrix], Vector]:
    """What compensated rounding is expected to leave, without carrying it out, for several grids of one matrix.

    Rounding the columns in order leaves Σ_j r_j² d_j of each row, where r_j is the rounding error of the updated value and
    d_j = 1 / U_jj², U the factor of the damped C⁻¹. The updates hardly change the spread of the values, so r is taken as the
    error of rounding W itself on its searched grids.

    Returns:
        The residuals r [O, I], one for each grid, and d [I].

    Raises:
        ConfigError: as `compensated` does.
    """
    hessian = loaded(moment, DAMPING)
    weight = root_of_inverse(hessian).diagonal().square().reciprocal()
    values = torch.from_numpy(matrix.T.astype(np.float32))
    residuals = []
    for grid in grids:
        check(matrix, moment, grid.group)
        levels = Levels(grid.bits, grid.zeros)
        rest = torch.empty_like(values)
        for start in range(0, len(values), grid.group):
            inside = slice(start, start + grid.group)
            scale, zero = search(values[inside], weight[inside].float(), levels)
            rest[inside] = values[inside] - scale * (encode(values[inside], inverse(scale), zero, levels) - zero)
        residuals.append(rest.T.double().numpy())
    return residuals, weight.numpy() * float(np.trace(moment)) / len(moment)


def check(matrix: Matrix, moment: Matrix, group: int) -> None:
    """Raises ConfigError for a matrix with values that are not finite, and where group, matrix and moment do not fit."""
    require_finite(matrix, "matrix")
    if matrix.shape[1] % group or moment.shape != (matrix.shape[1],) * 2:
        shapes = f"group {group}, a matrix {list(matrix.shape)}, a second moment {list(moment.shape)}"
        raise ConfigError(f"quantise: {shapes} do not fit together")


def root_of_inverse(hessian: Tensor) -> Tensor:
    """The upper triangular U with H⁻¹ = Uᵀ U."""
    inverted = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    root: Tensor = torch.linalg.cholesky(inverted, upper=True)
    return root


def processing_order(diagonal: Tensor, group: int) -> Tensor:
    """Columns by falling C_jj, but groups stay together: whole groups by their sum, and columns inside each."""
    grouped = diagonal.reshape(-1, group)
    inside = grouped.argsort(dim=1, descending=True, stable=True)
    outside = grouped.sum(1).argsort(dim=0, descending=True, stable=True)
    return (inside[outside] + outside[:, None] * group).reshape(-1)


def _rows(problem: Problem, factor: Tensor, wanted: Tensor, turns: int) -> State:
    """Rounds wanted [I, R], both in processing order."""
    state = sweep(problem, factor, wanted)
    for _ in range(turns):
        state = descend(problem, wanted, refit(problem, wanted, state))
    return state


def sweep(problem: Problem, factor: Tensor, wanted: Tensor) -> State:
    """GPTQ's pass over the columns of wanted [I, R] with the factor U of H⁻¹ = Uᵀ U."""
    group, levels = problem.group, problem.levels
    columns, rows = wanted.shape
    rest = wanted.clone()
    codes = torch.empty_like(wanted)
    scale = wanted.new_empty(columns // group, rows)
    zero = torch.empty_like(scale)
    block = max(group, BLOCK)
    pivots = factor.diagonal().tolist()
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = wanted.new_empty(stop - start, rows)
        for column in range(start, stop):
            at = column // group
            if column % group == 0:
                inside = slice(column, column + group)
                importance = factor.diagonal()[inside].square().reciprocal()
                scale[at], zero[at] = search(rest[inside], importance, levels)
                step, middle, inverse_step = scale[at], zero[at], inverse(scale[at])
            code = codes[column] = encode(rest[column], inverse_step, middle, levels)
            error = errors[column - start] = (rest[column] - step * (code - middle)) / pivots[column]
            rest[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return State(codes, scale, zero)
