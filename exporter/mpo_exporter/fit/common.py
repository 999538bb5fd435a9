"""What all fits share: cores, the error that they minimise, roots of moments, the order of bonds.

A fit takes (matrix [O, I], moment [I, I] or None, out_dims, in_dims, chi) and gives cores. The moment is C = E[x xᵀ] of the
layer's input; the error is √tr[(W − Ŵ) C (W − Ŵ)ᵀ], the root mean square of what the layer's output is off by, and the
Frobenius norm where there is no moment (METHOD.md).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpo_exporter.fit.remember import Remembered
from mpo_formats import ConfigError
from mpo_formats.architecture import full_rank

Matrix = NDArray[np.float64]
Dims = tuple[int, ...]
log = logging.getLogger(__name__)
# A singular moment is loaded by this share of its mean diagonal, and by ten times more until it has a root.
LEAST_LOAD = 1e-10
# Products of more multiply-adds than this are taken in single precision, so many rows at a time.
DOUBLE_WORK = 1 << 29
# Leading directions of a moment that are kept in double precision, and power iterations that find them.
LEADING, POWERS = 4, 6
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


def check_fit(matrix: Matrix, moment: Matrix | None, out_dims: Dims, in_dims: Dims, chi: int) -> tuple[int, ...]:
    """Checks what a fit was given and returns its bonds: χ, cut to the full rank of each; a χ above all is logged.

    Raises:
        ConfigError: for a χ below one, factors that do not multiply to the matrix, a moment of another size, or values
            that are not finite (with their place).
    """
    if chi < 1:
        raise ConfigError(f"chi: expected at least 1, found {chi}")
    if len(out_dims) != len(in_dims) or matrix.shape != (math.prod(out_dims), math.prod(in_dims)):
        raise ConfigError(f"shape {out_dims} x {in_dims}: does not multiply to a matrix of {list(matrix.shape)}")
    require_finite(matrix, "matrix")
    if moment is not None:
        if moment.shape != (matrix.shape[1], matrix.shape[1]):
            raise ConfigError(f"moment: expected {matrix.shape[1]} x {matrix.shape[1]}, found {list(moment.shape)}")
        require_finite(moment, "moment")
    most = full_rank(out_dims, in_dims)
    if most and chi > max(most):
        log.warning(
            "chi %d is above the full rank of shape %s x %s and is cut to %d", chi, out_dims, in_dims, max(most)
        )
    return tuple(min(chi, rank) for rank in most)


def require_finite(matrix: Matrix, name: str) -> None:
    """Raises ConfigError with the place of the first value that is not finite."""
    finite = np.isfinite(matrix)
    if not finite.all():
        row, column = (int(place) for place in np.unravel_index(int(finite.argmin()), matrix.shape))
        raise ConfigError(
            f"{name}: row {row}, column {column} is {matrix[row, column]}, not finite; check the source model"
        )


def unfold(matrix: Matrix, out_dims: Dims, in_dims: Dims) -> Matrix:
    """Reorders [O, I] to the tensor [o_1, i_1, o_2, i_2, …]."""
    count = len(out_dims)
    order = [axis for k in range(count) for axis in (k, count + k)]
    return matrix.reshape(*out_dims, *in_dims).transpose(order)


def fold(tensor: Matrix, out_dims: Dims, in_dims: Dims) -> Matrix:
    """Reorders values in the order of the tensor [o_1, i_1, o_2, i_2, …] to the matrix [O, I]."""
    dims = [size for pair in zip(out_dims, in_dims, strict=True) for size in pair]
    count = len(out_dims)
    order = [2 * k for k in range(count)] + [2 * k + 1 for k in range(count)]
    return tensor.reshape(dims).transpose(order).reshape(math.prod(out_dims), math.prod(in_dims))


def contract(cores: Sequence[Matrix]) -> Matrix:
    """Multiplies cores [χ_{k−1}, o_k, i_k, χ_k] out to the matrix [O, I]."""
    state = np.ones((1, 1))
    for core in cores:
        state = (state @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[3])  # [o_1 i_1 … o_k i_k, χ_k]
    return fold(state, tuple(core.shape[1] for core in cores), tuple(core.shape[2] for core in cores))


def activation_error(residual: Matrix, moment: Matrix | None) -> float:
    """√tr(R C Rᵀ) of a residual R [O, I] and a moment C [I, I]; ‖R‖_F without a moment.

    Of products of more than DOUBLE_WORK multiply-adds only what C has outside of its few leading directions is taken in
    single precision: where one direction holds nearly all of C, that is where rounding would be seen.
    """
    if moment is None:
        return float(np.linalg.norm(residual))
    if residual.size * len(moment) <= DOUBLE_WORK:
        # Rounding may leave a tiny negative sum where R lies in the null space of C.
        return math.sqrt(max(float(np.vdot(residual @ moment, residual)), 0.0))
    lead, inner, small = split(moment)
    along = residual @ lead
    total = float(np.vdot(along @ inner, along))
    for start in range(0, len(residual), PANEL):
        part = residual[start : start + PANEL]
        total += float(np.vdot((part.astype(np.float32) @ small).astype(np.float64), part))
    return math.sqrt(max(total, 0.0))


def split(moment: Matrix) -> tuple[Matrix, Matrix, NDArray[np.float32]]:
    """V [I, r], S [r, r] and a single-precision rest with C = V S Vᵀ + rest, V about C's leading eigenvectors."""
    lead = np.random.default_rng(0).standard_normal((len(moment), min(LEADING, len(moment))))
    for _ in range(POWERS):
        lead = np.linalg.qr(moment @ lead)[0]
    inner = lead.T @ (moment @ lead)
    rest = np.empty(moment.shape, np.float32)
    for start in range(0, len(moment), PANEL):  # by panels: at 12800 a second matrix in double precision takes 1.3 GB
        rows = slice(start, start + PANEL)
        rest[rows] = moment[rows] - (lead[rows] @ inner) @ lead.T
    return lead, inner, rest


def cholesky_root(moment: Matrix) -> Matrix:
    """L with L Lᵀ = C; a singular C is loaded on its diagonal until it has such a root, and the load is logged.

    It is remembered as long as the array lives, as layers with one input share their moment.
    """
    return _roots.get(moment, None, lambda: _root(moment))


_roots: Remembered[Matrix] = Remembered()


def _root(moment: Matrix) -> Matrix:
    size = moment.shape[0]
    mean = float(np.trace(moment)) / size
    if mean <= 0:
        log.warning("moment is zero: the fit weighs all inputs the same; give more calibration text")
        return np.eye(size)
    load = 0.0
    while True:
        try:
            loaded = moment + np.diag(np.full(size, load * mean)) if load else moment
            root = np.asarray(np.linalg.cholesky(loaded), np.float64)
        except np.linalg.LinAlgError:
            load = load * 10 if load else LEAST_LOAD
            continue
        if load:
            log.warning(
                "moment of size %d is singular: %.0e of its mean diagonal was added; more calibration text would help",
                size,
                load,
            )
        return root


def factor_moments(moment: Matrix | None, in_dims: Dims) -> list[Matrix]:
    """C's partial traces over all but one input factor, [i_k, i_k] each, of mean diagonal 1: ⊗_k C_k stands in for C."""
    if moment is None:
        return [np.eye(size) for size in in_dims]
    result = []
    for k, size in enumerate(in_dims):
        before, after = math.prod(in_dims[:k]), math.prod(in_dims[k + 1 :])
        whole = before == after == 1
        part = moment if whole else np.einsum("aibajb->ij", moment.reshape(before, size, after, before, size, after))
        mean = float(np.trace(part)) / size
        result.append(part / mean if mean > 0 else np.eye(size))
    return result


def share_values(cores: Sequence[Matrix], values: Sequence[Matrix]) -> list[Matrix]:
    """Moves the root of each bond's singular values to its left core; the product stays the same."""
    cores = list(cores)
    for k, s in enumerate(values):
        root = np.sqrt(np.maximum(s, 1e-12 * max(float(s[0]), 1e-30)))
        cores[k] = cores[k] * root
        cores[k + 1] = cores[k + 1] / root[:, None, None, None]
    return cores
