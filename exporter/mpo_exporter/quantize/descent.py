"""Descent on E = tr[(W − Ŵ) C (W − Ŵ)ᵀ] over codes (one column after another) and over scales and zeros (least squares)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpo_exporter.quantize.grid import Levels, encode, half, inverse

# Columns between two updates of the whole gradient.
BLOCK = 64
# Added to the normal equations of the scales, as a share of their diagonal.
RIDGE = 1e-4
# Bytes of normal equations solved at once.
SOLVE_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Problem:
    """The Hessian H [I, I] of the error of every row, the group size and the codes."""

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


def errors(problem: Problem, wanted: Tensor, state: State) -> Tensor:
    """(w − ŵ) H (w − ŵ)ᵀ of each row [R]."""
    residual = wanted - state.matrix(problem.group)
    return (residual * (problem.hessian @ residual)).sum(0)


def descend(problem: Problem, wanted: Tensor, state: State) -> State:
    """One pass of coordinate descent: every code in turn becomes the best one, all others as they are; E never rises."""
    hessian, group, levels = problem.hessian, problem.group, problem.levels
    columns = len(hessian)
    codes, scale, zero = state.codes.clone(), state.scale, state.zero
    gradient = hessian @ (wanted - state.matrix(group))  # [I, R]
    pulls = hessian.diagonal().reciprocal().tolist()
    inverse_scale = inverse(scale)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        before = codes[start:stop].clone()
        local, inner = gradient[start:stop], hessian[start:stop, start:stop]
        for column in range(start, stop):
            at, index = column // group, column - start
            step, now = scale[at], codes[column]
            wish = torch.addcmul(local[index] * pulls[column], step, now - zero[at])
            best = encode(wish, inverse_scale[at], zero[at], levels)
            local.addr_(inner[:, index], step * (best - now), alpha=-1)
            codes[column] = best
        grouped = scale.repeat_interleave(group, 0)[start:stop] if group < columns else scale
        change = grouped * (codes[start:stop] - before)
        gradient[:start].addmm_(hessian[:start, start:stop], change, alpha=-1)
        gradient[stop:].addmm_(hessian[stop:, start:stop], change, alpha=-1)
    return State(codes, scale, zero)


def refit(problem: Problem, wanted: Tensor, state: State) -> State:
    """The scales (and stored zeros) that leave the least error for these codes, where rounding them keeps it lower."""
    unknowns = len(state.scale) * (2 if problem.levels.zeros else 1)
    step = max(1, SOLVE_BYTES // (8 * unknowns * unknowns))
    rows = wanted.shape[1]
    parts = []
    for start in range(0, rows, step):
        inside = slice(start, start + step)
        part = State(state.codes[:, inside], state.scale[:, inside], state.zero[:, inside])
        scale, zero = _solve(problem, wanted[:, inside], part)
        fitted = State(part.codes, half(scale), half(zero))
        better = errors(problem, wanted[:, inside], fitted) < errors(problem, wanted[:, inside], part)
        better &= torch.isfinite(fitted.scale).all(0) & torch.isfinite(fitted.zero).all(0)
        parts.append((torch.where(better, fitted.scale, part.scale), torch.where(better, fitted.zero, part.zero)))
    return State(state.codes, torch.cat([scale for scale, _ in parts], 1), torch.cat([zero for _, zero in parts], 1))


def _solve(problem: Problem, wanted: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """Normal equations of ŵ = Σ_G scale_G · basis_G (+ shift_G · 1_G), one system per row."""
    hessian, group = problem.hessian, problem.group
    groups, rows = state.scale.shape
    basis = state.codes - state.zero.repeat_interleave(group, 0)  # [I, R]
    pull = (hessian @ wanted).reshape(groups, group, rows)
    grouped = basis.reshape(groups, group, rows)
    kinds = [grouped, torch.ones_like(grouped[..., :1])] if problem.levels.zeros else [grouped]
    system = wanted.new_empty(rows, len(kinds) * groups, len(kinds) * groups)
    for right, columns in enumerate(kinds):
        for at in range(groups):
            inside = slice(at * group, (at + 1) * group)
            image = (hessian[:, inside] @ columns[at]).reshape(groups, group, -1)  # [groups, group, R or 1]
            for left, others in enumerate(kinds):
                entries = (others * image).sum(1)  # [groups, R or 1]
                system[:, left * groups : (left + 1) * groups, right * groups + at] = entries.T
    right_side = torch.cat([(columns * pull).sum(1) for columns in kinds]).T.double()  # [R, unknowns]
    system = system.double()
    now = torch.cat([state.scale, torch.zeros_like(state.scale)][: len(kinds)]).T.double()
    ridge = RIDGE * system.diagonal(dim1=1, dim2=2) + 1e-12
    system = system + torch.diag_embed(ridge)
    found = torch.linalg.solve_ex(system, (right_side + ridge * now)[..., None]).result[..., 0].T.float()
    scale = found[:groups]
    if not problem.levels.zeros:
        return scale, state.zero
    shift = torch.where(scale != 0, found[groups:] / scale, torch.zeros_like(scale))
    return scale, state.zero - shift
