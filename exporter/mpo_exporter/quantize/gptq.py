"""Error-compensated rounding (GPTQ: Frantar et al. 2023, arXiv 2210.17323), then descent on the same error.

The error is E = tr[(W − Ŵ) C (W − Ŵ)ᵀ] with the second moment C of the inputs. Columns are rounded one after another, and
the later columns are adjusted to compensate the rounding error of the earlier ones. Then scales and codes are improved in
turns as long as that lowers E (descent.py). Rows do not depend on each other.

This is the torch code, which runs on other devices than the CPU and where no native kernels were built; native.py has the same
in C++.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.basis import Basis
from mpo_exporter.calibrate.hessian import DAMPING, Hessian
from mpo_exporter.calibrate.moments import Moment, require_finite
from mpo_exporter.calibrate.precision import fast_products
from mpo_exporter.quantize import native
from mpo_exporter.quantize.descent import Problem, State, blocks, column_kernels, descend, gradient_of, inner_blocks
from mpo_exporter.quantize.grid import Grid, Levels, encode, inverse, require_range, search
from mpo_exporter.quantize.rounding import Integers
from mpo_formats import ConfigError

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]

# Added to the diagonal of C where a layer makes up for the errors of those before it, as a share of its mean: what a text of a
# few thousand tokens shows along directions of little weight is chance.
RIDGE = 0.2
# Rows that are rounded at once: on a CPU their arrays should stay in its caches, elsewhere launches should be few.
ROWS, ROWS_ELSEWHERE = 2048, 1 << 16
# The most passes of descent over scales and codes.
TURNS = 5
# Descent ends when a pass lowers E by less than this share.
TOLERANCE = 0.01


def target(matrix: Matrix, moment: Moment, damping: float = RIDGE) -> Matrix:
    """The matrix to fit: W, or (W E[x x̂ᵀ] + D) C⁻¹ where the inputs x̂ differ from the dense model's x.

    It is W + D C⁻¹ where the moment has no E[x x̂ᵀ], and D has all that the output falls short by.

    That is the least-squares map from x̂ to W x. It compensates the errors of earlier layers as far as a linear map can, and
    with D = E[(h − ĥ) x̂ᵀ] / m (`Moment.drift`) also the error of the residual stream that the output is added to. By how
    much W changes is a ridge regression.

    Args:
        damping: added to the diagonal of C for that, as a share of its mean.
    """
    if moment.cross is None and moment.drift is None:
        return matrix
    # W (cross + load) + D = (W + Δ) (C + load): only the change Δ is solved for, so single precision is enough.
    # Of large matrices it is computed in bf16: what that rounds is far below what the integers will.
    fast = matrix.shape[1] >= native.FAST_COLUMNS
    change = torch.zeros(matrix.shape, device=moment.device)
    root, mean = moment.ridge(damping)
    with fast_products() if fast else nullcontext():
        if moment.cross is not None:
            difference = torch.from_numpy(np.subtract(moment.cross, moment.second, dtype=np.float32)).to(moment.device)
            wide = torch.from_numpy(matrix.astype(np.float32)).to(moment.device)
            change += torch.nn.functional.linear(wide, difference.T.contiguous())
        if moment.drift is not None:
            change += torch.from_numpy(moment.drift).float().to(moment.device)
        change /= mean
        if fast and len(matrix) >= matrix.shape[1]:
            change = torch.nn.functional.linear(change, torch.cholesky_inverse(root))
        else:
            change = torch.cholesky_solve(change.T, root).T
    result: Matrix = matrix + change.cpu().numpy()
    return result


def compensated(
    matrix: Matrix,
    moment: Moment,
    bits: int,
    group: int,
    *,
    zeros: bool = False,
    turns: int = TURNS,
    damping: float = DAMPING,
) -> Integers:
    """Quantises W [O, I] for inputs of second moment C [I, I], in groups of `group` columns.

    Args:
        zeros: stores a zero per group (asymmetric); else every zero is `implicit_zero(bits)`.
        turns: the most passes of descent after the compensated rounding; 0 is plain GPTQ.
        damping: added to the diagonal of C, as a share of its mean.

    Raises:
        ConfigError: for values that are not finite or exceed half precision, or a group that does not divide a row.
    """
    check(matrix, moment, group)
    hessian = moment.hessian(group, damping)
    if native.usable(moment.device):
        require_range(float(np.abs(matrix).max(initial=0.0)), Levels(bits, zeros))
        grid = Grid(bits, group, zeros)
        found = native.compensated(matrix.astype(np.float32), hessian, grid, turns, TOLERANCE)
        return Integers(found[0], found[1], found[2] if zeros else None, bits, group)
    problem, order = Problem(hessian.matrix, group, Levels(bits, zeros)), hessian.order
    wanted = torch.from_numpy(matrix.astype(np.float32)).to(moment.device)
    size = ROWS if moment.device == "cpu" else ROWS_ELSEWHERE
    parts = [
        _rows(problem, hessian, wanted[start : start + size, order].T.contiguous(), turns)
        for start in range(0, len(wanted), size)
    ]
    codes = torch.cat([part.codes for part in parts], 1)
    restored = codes.new_empty(codes.shape, dtype=torch.uint8)
    restored[order] = codes.to(torch.uint8)
    groups = order[::group] // group
    scale, zero = (
        torch.empty_like(stacked).index_copy_(0, groups, stacked)
        for stacked in (torch.cat([getattr(part, name) for part in parts], 1) for name in ("scale", "zero"))
    )
    return Integers(
        restored.T.contiguous().cpu().numpy(),
        scale.T.half().contiguous().cpu().numpy(),
        zero.T.half().contiguous().cpu().numpy() if zeros else None,
        bits,
        group,
    )


def expected_residuals(
    matrix: Matrix, moment: Moment, grids: Sequence[Grid], group: int | None = None, basis: Basis | None = None
) -> tuple[Iterator[Matrix], Vector]:
    """The error that compensated rounding is expected to leave on several grids, estimated without doing the rounding.

    Rounding the columns in order leaves Σ_j r_j² d_j in each row, where r_j is the rounding error of the adjusted value and
    d_j = R_jj², R the triangular root of the damped C. The adjustments hardly change the spread of the values, so r is
    approximated by the error of rounding W itself on its searched grids.

    Args:
        group: the group size that orders the columns; None for the largest of the grids.
        basis: that of the matrix; None for the one in which the moment is.

    Returns:
        The residuals r [O, I], one for each grid and computed when it is read, and d [I].

    Raises:
        ConfigError: as `compensated` does.
    """
    weight, scaled = _expected_weight(matrix, moment, grids, group, basis)
    single = matrix.astype(np.float32)
    if native.usable(moment.device):
        return (native.residual(single, weight.numpy(), grid).astype(np.float64) for grid in grids), scaled
    values = torch.from_numpy(single.T.copy()).to(moment.device)
    return (_residual(values, weight, grid).T.double().cpu().numpy() for grid in grids), scaled


def expected_errors(
    matrix: Matrix,
    moment: Moment | None,
    grids: Sequence[Grid],
    group: int | None = None,
    basis: Basis | None = None,
) -> Matrix:
    """Σ_j r_j² d_j of each row on each of several grids [grids, O], with r and d of `expected_residuals`.

    Args:
        moment: of the input; without one d is 1 and r the error of rounding to nearest.
        group, basis: as `expected_residuals` takes them.

    Raises:
        ConfigError: as `compensated` does.
    """
    if moment is None:
        weight, scaled = torch.ones(matrix.shape[1]), np.ones(matrix.shape[1])
    else:
        weight, scaled = _expected_weight(matrix, moment, grids, group, basis)
    if not native.usable("cpu" if moment is None else moment.device):
        values, costs = torch.from_numpy(matrix.astype(np.float32).T.copy()).to(weight.device), torch.from_numpy(scaled)
        costs = costs.to(weight.device)
        return np.array([(costs @ _residual(values, weight, grid).double().square()).cpu().numpy() for grid in grids])
    found = native.errors(matrix.astype(np.float32), weight.numpy(), grids).astype(np.float64)
    result: Matrix = found * (scaled.sum() / max(float(weight.sum(dtype=torch.float64)), 1e-300))
    return result


def _expected_weight(
    matrix: Matrix, moment: Moment, grids: Sequence[Grid], group: int | None, basis: Basis | None
) -> tuple[Tensor, Vector]:
    """The weights R_jj² of the columns [I] in their own order, and these times the mean of C's diagonal."""
    for grid in grids:
        check(matrix, moment, grid.group)
        require_range(float(np.abs(matrix).max(initial=0.0)), Levels(grid.bits, grid.zeros))
    largest = group or max((grid.group for grid in grids), default=1)
    weight = torch.from_numpy(moment.pivots(largest, moment.basis if basis is None else basis))
    costs = weight.double().numpy() * float(np.trace(moment.second)) / len(moment.second)
    return weight.to(moment.device), costs


def _residual(values: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    """The error [I, O] of rounding values [I, O] to nearest on searched grids."""
    levels, rest = Levels(grid.bits, grid.zeros), torch.empty_like(values)
    for start in range(0, len(values), grid.group):
        inside = slice(start, start + grid.group)
        scale, zero = search(values[inside], weight[inside], levels)
        rest[inside] = values[inside] - scale * (encode(values[inside], inverse(scale), zero, levels) - zero)
    return rest


def check(matrix: Matrix, moment: Moment, group: int) -> None:
    """Raises ConfigError for a value that is not finite, or sizes of group, matrix and moment that do not fit together."""
    require_finite(matrix, "matrix")
    if matrix.shape[1] % group or moment.second.shape != (matrix.shape[1],) * 2:
        shapes = f"group {group}, a matrix {list(matrix.shape)}, a second moment {list(moment.second.shape)}"
        raise ConfigError(f"quantise: {shapes} do not fit together")


def _rows(problem: Problem, hessian: Hessian, wanted: Tensor, turns: int) -> State:
    """Rounds the values `wanted` [I, R], which are in processing order, as the result is."""
    state = sweep(problem, hessian, wanted)
    if not turns:
        return state
    gradient = gradient_of(problem, wanted, state)
    last = math.inf
    for _ in range(turns):
        state = descend(problem, state, gradient)
        error = float(torch.sum((wanted - state.matrix(problem.group)).mul_(gradient), dtype=torch.float64))
        if last - error <= TOLERANCE * error:
            break
        last = error
    return state


def sweep(problem: Problem, hessian: Hessian, wanted: Tensor) -> State:
    """GPTQ's pass over the columns of `wanted` [I, R].

    With H = R Rᵀ the error of the columns up to j is least, whatever the later ones become, when column j is rounded from
    w_j + Σ_{i<j} (w_i − ŵ_i) R_ij / R_jj. This equals GPTQ's updates by the root of H⁻¹ and needs no inverse (Chee et al.
    2023, arXiv 2307.13304, theorem 6).
    """
    group, levels, feedback = problem.group, problem.levels, hessian.feedback
    columns, rows = wanted.shape
    rest = wanted.clone()
    state = State(
        torch.empty_like(wanted), wanted.new_empty(columns // group, rows), wanted.new_empty(columns // group, rows)
    )
    for block in blocks(columns, group):
        errors = wanted.new_empty(block.stop - block.start, rows)
        for near in inner_blocks(block, group):
            for start in range(near.start, near.stop, group):
                part, at = slice(start, min(start + group, near.stop)), start // group
                if start % group == 0:
                    inside = slice(start, start + group)
                    state.scale[at], state.zero[at] = search(rest[inside], hessian.weight[inside], levels)
                missed = errors[part.start - block.start : part.stop - block.start]
                _round_part(rest[part], wanted[part], missed, state, part, feedback[part, part], levels)
                rest[part.stop : near.stop].addmm_(feedback[part, part.stop : near.stop].T, missed)
            done = errors[near.start - block.start : near.stop - block.start]
            rest[near.stop : block.stop].addmm_(feedback[near, near.stop : block.stop].T, done)
        rest[block.stop :].addmm_(feedback[block, block.stop :].T, errors)
    return state


def _round_part(
    rest: Tensor, wanted: Tensor, errors: Tensor, state: State, part: slice, feedback: Tensor, levels: Levels
) -> None:
    """Rounds the columns `part` of one group: writes their codes to the state, and their errors [C, R].

    Args:
        rest, wanted: the columns [C, R] with the errors of those before them made up for, and without; `rest` is used up.
        feedback: [C, C], what each error adds to later columns.
    """
    at = part.start * len(state.scale) // len(state.codes)
    codes, scale, zero = state.codes[part], state.scale[at], state.zero[at]
    if (kernels := column_kernels(rest.device.type)) is not None:
        kernels.sweep(rest, wanted, codes, errors, scale, zero, feedback, levels.top)
        return
    inverse_scale = inverse(scale)
    for index in range(len(rest)):
        codes[index] = encode(rest[index], inverse_scale, zero, levels)
        errors[index] = wanted[index] - scale * (codes[index] - zero)
        rest[index + 1 :].addr_(feedback[index, index + 1 :], errors[index])
