"""What all fits share: cores, the error that they minimise, partial traces of moments.

A fit takes (matrix [O, I], moment or None, out_dims, in_dims, chi) and returns cores. The moment is C = E[x xᵀ] [I, I] of the
layer's input; the error is √tr[(W − Ŵ) C (W − Ŵ)ᵀ], the root mean square error of the layer's output, or the Frobenius norm
of W − Ŵ where there is no moment (docs/method.md).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpo_exporter.calibrate.moments import Moment, require_finite
from mpo_formats import ConfigError
from mpo_formats.architecture import full_rank

Matrix = NDArray[np.float64]
Dims = tuple[int, ...]
log = logging.getLogger(__name__)
# Products of more multiply-adds than this are computed in single precision.
DOUBLE_WORK = 1 << 29
# Leading eigenvectors of a moment that are kept in double precision, and power iterations that find them.
LEADING, POWERS = 4, 6
# Rows of a matrix that are converted to single precision at once.
PANEL = 1024


@dataclass(frozen=True, slots=True)
class Cores:
    """A fitted operator: cores [χ_{k−1}, o_k, i_k, χ_k] in float64, and its error."""

    cores: tuple[Matrix, ...]
    error: float

    @property
    def bonds(self) -> tuple[int, ...]:
        """The inner bond dimensions."""
        return tuple(core.shape[3] for core in self.cores[:-1])


def second_of(moment: Moment | None) -> Matrix | None:
    """The matrix C [I, I] of a moment; None without one."""
    return None if moment is None else moment.second


def check_fit(matrix: Matrix, second: Matrix | None, out_dims: Dims, in_dims: Dims, chi: int) -> tuple[int, ...]:
    """Checks the arguments of a fit and returns its bonds: χ, or less where the full rank is less; a χ above all is logged.

    Raises:
        ConfigError: for a χ below one, factors whose product is not the size of the matrix, a moment of another size, or
            values that are not finite (with their place).
    """
    if chi < 1:
        raise ConfigError(f"chi: expected at least 1, found {chi}")
    if len(out_dims) != len(in_dims) or matrix.shape != (math.prod(out_dims), math.prod(in_dims)):
        raise ConfigError(f"shape {out_dims} x {in_dims}: does not multiply to a matrix of {list(matrix.shape)}")
    require_finite(matrix, "matrix")
    if second is not None:
        if second.shape != (matrix.shape[1], matrix.shape[1]):
            raise ConfigError(f"moment: expected {matrix.shape[1]} x {matrix.shape[1]}, found {list(second.shape)}")
        require_finite(second, "moment")
    most = full_rank(out_dims, in_dims)
    if most and chi > max(most):
        log.warning(
            "chi %d is above the full rank of shape %s x %s and is cut to %d", chi, out_dims, in_dims, max(most)
        )
    return tuple(min(chi, rank) for rank in most)


def unfold(matrix: Matrix, out_dims: Dims, in_dims: Dims) -> Matrix:
    """Reorders [O, I] to the tensor [o_1, i_1, o_2, i_2, …]."""
    count = len(out_dims)
    order = [axis for k in range(count) for axis in (k, count + k)]
    return matrix.reshape(*out_dims, *in_dims).transpose(order)


def fold(tensor: Matrix, out_dims: Dims, in_dims: Dims) -> Matrix:
    """The inverse of `unfold`: the tensor [o_1, i_1, o_2, i_2, …], of any shape with that order, to the matrix [O, I]."""
    dims = [size for pair in zip(out_dims, in_dims, strict=True) for size in pair]
    count = len(out_dims)
    order = [2 * k for k in range(count)] + [2 * k + 1 for k in range(count)]
    return tensor.reshape(dims).transpose(order).reshape(math.prod(out_dims), math.prod(in_dims))


def contract(cores: Sequence[Matrix]) -> Matrix:
    """Contracts cores [χ_{k−1}, o_k, i_k, χ_k] to the matrix [O, I]."""
    state = np.ones((1, 1))
    for core in cores:
        state = (state @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[3])  # [o_1 i_1 … o_k i_k, χ_k]
    return fold(state, tuple(core.shape[1] for core in cores), tuple(core.shape[2] for core in cores))


def activation_error(residual: Matrix, second: Matrix | None) -> float:
    """√tr(R C Rᵀ) of a residual R [O, I] and a second moment C [I, I]; ‖R‖_F where that is None.

    Products of more than DOUBLE_WORK multiply-adds are computed in single precision, but for the part of C along its few
    leading eigenvectors: where they make up nearly all of C, rounding errors would matter there.
    """
    if second is None:
        return float(np.linalg.norm(residual))
    if residual.size * len(second) <= DOUBLE_WORK:
        # Where R lies in the null space of C, rounding may leave a tiny negative sum.
        return math.sqrt(max(float(np.vdot(residual @ second, residual)), 0.0))
    lead, inner, small = split(second)
    along = residual @ lead
    total = float(np.vdot(along @ inner, along))
    for start in range(0, len(residual), PANEL):
        part = residual[start : start + PANEL]
        total += float(np.vdot((part.astype(np.float32) @ small).astype(np.float64), part))
    return math.sqrt(max(total, 0.0))


def split(second: Matrix) -> tuple[Matrix, Matrix, NDArray[np.float32]]:
    """V [I, r], S [r, r] and a single-precision rest with C = V S Vᵀ + rest; V are roughly C's leading eigenvectors."""
    lead = np.random.default_rng(0).standard_normal((len(second), min(LEADING, len(second))))
    for _ in range(POWERS):
        lead = np.linalg.qr(second @ lead)[0]
    inner = lead.T @ (second @ lead)
    rest = np.empty(second.shape, np.float32)
    for start in range(0, len(second), PANEL):  # by panels: one more double-precision matrix of 12,800² takes 1.3 GB
        rows = slice(start, start + PANEL)
        rest[rows] = second[rows] - (lead[rows] @ inner) @ lead.T
    return lead, inner, rest


def factor_moments(second: Matrix | None, in_dims: Dims) -> list[Matrix]:
    """The partial traces C_k [i_k, i_k] of C over all but one input factor, scaled to mean diagonal 1: ⊗_k C_k approximates C.

    Without a moment they are identities.
    """
    if second is None:
        return [np.eye(size) for size in in_dims]
    result = []
    for k, size in enumerate(in_dims):
        before, after = math.prod(in_dims[:k]), math.prod(in_dims[k + 1 :])
        whole = before == after == 1
        part = second if whole else np.einsum("aibajb->ij", second.reshape(before, size, after, before, size, after))
        mean = float(np.trace(part)) / size
        result.append(part / mean if mean > 0 else np.eye(size))
    return result


def share_values(cores: Sequence[Matrix], values: Sequence[Matrix]) -> list[Matrix]:
    """Moves √s of each bond's singular values s from the right core to the left one; the product stays the same."""
    cores = list(cores)
    for k, s in enumerate(values):
        root = np.sqrt(np.maximum(s, 1e-12 * max(float(s[0]), 1e-30)))
        cores[k] = cores[k] * root
        cores[k + 1] = cores[k + 1] / root[:, None, None, None]
    return cores
