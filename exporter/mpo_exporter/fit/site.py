"""One core of an operator with the others fixed: a linear least-squares problem, solved without forming its matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpo_exporter.fit.bonds import left_grams
from mpo_exporter.fit.common import DOUBLE_WORK, Dims, Matrix, factor_moments

# Share of the mean diagonal that is added to the matrices that the preconditioner inverts.
LOAD = 1e-4


@dataclass(frozen=True, slots=True)
class Target:
    """What is fitted: C [I, I] or None for the identity, `product` = W C [O, I], `square` = tr(W C Wᵀ), C's partial traces."""

    second: Matrix | None
    product: Matrix
    square: float
    weights: list[Matrix]

    def weigh(self, matrix: Matrix) -> Matrix:
        """The matrix [O, I] times C."""
        return matrix if self.second is None else matrix @ self.second


def make_target(matrix: Matrix, second: Matrix | None, in_dims: Dims) -> Target:
    """The target of a matrix and a moment; in single precision where the products with C are large."""
    weights = factor_moments(second, in_dims)
    wanted = matrix
    if second is not None and matrix.size * second.shape[0] > DOUBLE_WORK:
        second, wanted = second.astype(np.float32), matrix.astype(np.float32)
    product = wanted if second is None else wanted @ second
    return Target(second, product, float(np.vdot(matrix, product)), weights)


class Site:
    """The place of core k between two frames, the contracted cores left [O_{<k} · I_{<k}, a] and right [b, O_{>k} · I_{>k}].

    Args:
        grams: the Gram matrices of the two frames, [a, a] and [b, b], inputs weighted by the partial traces; the
            preconditioner is made of them.
    """

    def __init__(
        self,
        target: Target,
        out_dims: Dims,
        in_dims: Dims,
        k: int,
        left: Matrix,
        right: Matrix,
        grams: tuple[Matrix, Matrix],
    ) -> None:
        self.target, self.left, self.right = target, left, right
        self.shape = (left.shape[1], out_dims[k], in_dims[k], right.shape[0])
        outs = (math.prod(out_dims[:k]), out_dims[k], math.prod(out_dims[k + 1 :]))
        ins = (math.prod(in_dims[:k]), in_dims[k], math.prod(in_dims[k + 1 :]))
        self.pairs = (outs[0], ins[0], outs[1], ins[1], outs[2], ins[2])
        self.sides = (*outs, *ins)
        first, last = grams
        self.inverses = [inverse(gram).astype(target.product.dtype) for gram in (first, target.weights[k], last)]

    def expand(self, core: Matrix) -> Matrix:
        """The operator [O, I] with this core [a, o, i, b]."""
        state = core.reshape(self.shape[0], -1)
        if self.left.size > 1:
            state = self.left @ state
        tensor = state.reshape(-1, self.shape[3])
        if self.right.size > 1:
            tensor = tensor @ self.right
        rows, columns = self.target.product.shape
        return tensor.reshape(self.pairs).transpose(0, 2, 4, 1, 3, 5).reshape(rows, columns)

    def project(self, matrix: Matrix) -> Matrix:
        """The adjoint of `expand`: [O, I] to [a, o, i, b]."""
        tensor = matrix.reshape(self.sides).transpose(0, 3, 1, 4, 2, 5)
        state = tensor.reshape(-1, self.right.shape[1])
        if self.right.size > 1:
            state = state @ self.right.T
        state = state.reshape(self.left.shape[0], -1)
        if self.left.size > 1:
            state = self.left.T @ state
        return state.reshape(self.shape)

    def precondition(self, core: Matrix) -> Matrix:
        """Applies the inverse of (left Gram) ⊗ C_k ⊗ (right Gram), which approximates the matrix of the normal equations."""
        first, weight, last = self.inverses
        a, o, i, b = self.shape
        state = (first @ core.reshape(a, -1)).reshape(-1, b) @ last
        return (weight @ state.reshape(a * o, i, b)).reshape(self.shape)

    def _residual(self, core: Matrix) -> tuple[Matrix, float]:
        whole = self.expand(core)
        residual = self.target.product - self.target.weigh(whole)
        square = self.target.square - float(np.vdot(whole, self.target.product)) - float(np.vdot(whole, residual))
        return residual, square

    def solve(self, core: Matrix, steps: int) -> tuple[Matrix, float]:
        """Improves the core by `steps` of preconditioned conjugate gradients; returns the new core and E².

        Every step lowers E² by exactly α rᵀz, so the result is never worse than the start (Hestenes & Stiefel 1952).
        """
        residual, square = self._residual(core)
        r = self.project(residual)
        z = self.precondition(r)
        direction, descent = z, float(np.vdot(r, z))
        floor = 1e-14 * self.target.square
        for _ in range(steps):
            image = self.project(self.target.weigh(self.expand(direction)))
            curvature = float(np.vdot(direction, image))
            if descent <= floor or curvature <= 0:
                break
            step = descent / curvature
            core = core + step * direction
            square -= step * descent
            r = r - step * image
            z = self.precondition(r)
            descent, before = float(np.vdot(r, z)), descent
            direction = z + (descent / before) * direction
        return core, square


def site_at(target: Target, cores: Sequence[Matrix], k: int) -> Site:
    """The place of core k among the others, which are contracted to the two frames."""
    left, right = left_frame(cores[:k], target.product.dtype), right_frame(cores[k + 1 :], target.product.dtype)
    mirrored = [core.transpose(3, 1, 2, 0) for core in reversed(cores[k + 1 :])]
    grams = left_grams(cores[:k], target.weights[:k])[-1], left_grams(mirrored, target.weights[:k:-1])[-1]
    out_dims, in_dims = (tuple(core.shape[axis] for core in cores) for axis in (1, 2))
    return Site(target, out_dims, in_dims, k, left, right, grams)


def left_frame(cores: Sequence[Matrix], dtype: np.dtype[Any]) -> Matrix:
    """Cores contracted to [O · I, χ] with the bond on their right."""
    state = np.ones((1, 1, 1), dtype)
    for core in cores:
        rows, columns, bond = state.shape
        _, out, inner, after = core.shape
        state = (state.reshape(-1, bond) @ core.reshape(bond, -1)).reshape(rows, columns, out, inner, after)
        state = state.transpose(0, 2, 1, 3, 4).reshape(rows * out, columns * inner, after)
    return state.reshape(-1, state.shape[2])


def right_frame(cores: Sequence[Matrix], dtype: np.dtype[Any]) -> Matrix:
    """Cores contracted to [χ, O · I] with the bond on their left."""
    state = np.ones((1, 1, 1), dtype)
    for core in reversed(cores):
        bond, rows, columns = state.shape
        before, out, inner, _ = core.shape
        state = (core.reshape(-1, bond) @ state.reshape(bond, -1)).reshape(before, out, inner, rows, columns)
        state = state.transpose(0, 1, 3, 2, 4).reshape(before, out * rows, inner * columns)
    return state.reshape(state.shape[0], -1)


def inverse(gram: Matrix) -> Matrix:
    """The inverse of a positive semidefinite matrix after a small share of its mean diagonal was added to the diagonal."""
    size = gram.shape[0]
    mean = float(np.trace(gram)) / size
    result: Matrix = np.linalg.inv(gram + (LOAD * mean if mean > 0 else 1.0) * np.eye(size, dtype=gram.dtype))
    return result
