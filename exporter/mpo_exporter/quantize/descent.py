"""Coordinate descent on E = tr[(W − Ŵ) C (W − Ŵ)ᵀ] over the codes, and over the scale and zero of each group.

The gradient (W − Ŵ) H is updated block by block during the pass, so that a pass over a matrix [O, I] costs O · I²
multiply-adds, as one product with H does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mpo_exporter.quantize.grid import Levels, encode, half, inverse

# Columns between two updates of the whole gradient, and between two of the block's.
BLOCK = 128
INNER = 32
# Scale and zero of a group cannot be separated when its codes are nearly equal: the vectors of codes and of ones are then
# nearly parallel, by this measure, and the zero stays.
PARALLEL = 1e-6


@dataclass(frozen=True, slots=True)
class Problem:
    """The Hessian H [I, I] of the error of every row, the group size, and the range of the codes."""

    hessian: Tensor
    group: int
    levels: Levels


@dataclass(frozen=True, slots=True)
class State:
    """A quantised matrix, transposed: codes [I, R] as floats, scale and zero [I / group, R]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def matrix(self, group: int) -> Tensor:
        """Ŵᵀ [I, R]."""
        groups, rows = self.scale.shape
        grouped = self.codes.reshape(groups, group, rows)
        return (self.scale[:, None] * (grouped - self.zero[:, None])).reshape(-1, rows)

    def part(self, groups: slice) -> State:
        """Some groups, as views."""
        group = len(self.codes) // len(self.scale)
        return State(self.codes[groups.start * group : groups.stop * group], self.scale[groups], self.zero[groups])


@cache
def column_kernels(device: str) -> Any:
    """The module of kernels that round columns one after another on a kind of device; None where torch does."""
    if device != "cuda" or find_spec("triton") is None:
        return None
    from mpo_exporter.quantize import columns

    return columns


def errors(problem: Problem, wanted: Tensor, state: State) -> Tensor:
    """(w − ŵ) H (w − ŵ)ᵀ of each row [R]."""
    residual = wanted - state.matrix(problem.group)
    return (residual * (problem.hessian @ residual)).sum(0)


def gradient_of(problem: Problem, wanted: Tensor, state: State) -> Tensor:
    """H (w − ŵ)ᵀ [I, R]."""
    return problem.hessian @ (wanted - state.matrix(problem.group))


def blocks(columns: int, group: int) -> Iterator[slice]:
    """Blocks of about BLOCK columns, of whole groups."""
    size = max(group, BLOCK // group * group)
    return (slice(start, min(start + size, columns)) for start in range(0, columns, size))


def inner_blocks(block: slice, group: int) -> Iterator[slice]:
    """Parts of a block of about INNER columns, either of whole groups or within one."""
    size = min(group, INNER) if group > INNER else INNER // group * group
    return (slice(start, min(start + size, block.stop)) for start in range(block.start, block.stop, size))


def descend(problem: Problem, state: State, gradient: Tensor) -> State:
    """One pass of coordinate descent; apart from floating-point rounding, no row's E ever rises.

    Group by group, scale (and zero) are set to the best for the codes with all other groups fixed; then each code in turn is
    set to the best one with everything else fixed.

    Args:
        gradient: H (w − ŵ)ᵀ [I, R]; it is changed in place to the gradient of the result.
    """
    hessian, group = problem.hessian, problem.group
    found = State(state.codes.clone(), state.scale.clone(), state.zero.clone())
    for block in blocks(len(hessian), group):
        groups = slice(block.start // group, block.stop // group)
        part = found.part(groups)
        before = part.matrix(group)
        local, inner = gradient[block], hessian[block, block]
        for at in range(groups.start, groups.stop):
            _refit(problem, found, at, local, inner, block.start)
            inside = slice(at * group, (at + 1) * group)
            for columns in inner_blocks(inside, group):
                _recode(problem, found, columns, local, inner, block.start)
        change = part.matrix(group) - before
        gradient[: block.start].addmm_(hessian[: block.start, block], change, alpha=-1)
        gradient[block.stop :].addmm_(hessian[block.stop :, block], change, alpha=-1)
    return found


def _refit(problem: Problem, state: State, at: int, local: Tensor, inner: Tensor, start: int) -> None:
    """Sets scale and zero of group `at` by least squares given its codes, in the rows where that lowers E after rounding."""
    group, levels = problem.group, problem.levels
    inside = slice(at * group - start, (at + 1) * group - start)
    codes, scale, zero = state.codes[at * group : (at + 1) * group], state.scale[at], state.zero[at]
    own, pull = inner[inside, inside], local[inside]
    basis = codes - zero
    now = scale * basis
    square, along = (basis * (own @ basis)).sum(0), (basis * pull).sum(0)
    if levels.zeros:
        ones = own.sum(1)
        total, mixed, shift = ones.sum(), ones @ basis, pull.sum(0)
        determinant = square * total - mixed * mixed
        usable = determinant > PARALLEL * square * total
        step = torch.where(usable, (along * total - shift * mixed) / determinant, 0)
        fitted = half(scale + step)
        moved = torch.where(usable, (square * shift - mixed * along) / determinant, 0)
        middle = half(zero - torch.where(fitted != 0, moved / fitted, 0))
    else:
        fitted, middle = half(scale + torch.where(square > 0, along / square, 0)), zero
    change = fitted * (codes - middle) - now
    gain = (change * (2 * pull - own @ change)).sum(0)
    better = (gain > 0) & torch.isfinite(fitted) & torch.isfinite(middle)
    state.scale[at] = torch.where(better, fitted, scale)
    state.zero[at] = torch.where(better, middle, zero)
    local.addmm_(inner[:, inside], torch.where(better, change, 0), alpha=-1)


def _recode(problem: Problem, state: State, columns: slice, local: Tensor, inner: Tensor, start: int) -> None:
    """Sets the codes of some columns of one group, one after another, and updates the block's gradient."""
    levels, at = problem.levels, columns.start // problem.group
    scale, zero = state.scale[at], state.zero[at]
    inverse_scale = inverse(scale)
    inside = slice(columns.start - start, columns.stop - start)
    near, own = local[inside], inner[inside, inside]
    before = state.codes[columns].clone()
    if (kernels := column_kernels(near.device.type)) is not None:
        kernels.recode(near, state.codes[columns], scale, zero, own, levels.top)
    else:
        pulls = own.diagonal().reciprocal().tolist()
        for index, column in enumerate(range(columns.start, columns.stop)):
            now = state.codes[column]
            wish = torch.addcmul(near[index] * pulls[index], scale, now - zero)
            best = encode(wish, inverse_scale, zero, levels)
            near.addr_(own[:, index], scale * (best - now), alpha=-1)
            state.codes[column] = best
    change = scale * (state.codes[columns] - before)
    local[: inside.start].addmm_(inner[: inside.start, inside], change, alpha=-1)
    local[inside.stop :].addmm_(inner[inside.stop :, inside], change, alpha=-1)
