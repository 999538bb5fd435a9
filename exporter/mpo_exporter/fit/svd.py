"""Tensorizing a matrix by sequential singular value decompositions (Oseledets 2011, algorithm 1; arXiv 2401.14109)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpo_formats import ConfigError
from mpo_formats.architecture import full_rank

Matrix = NDArray[np.float64]
# Above this size, and when few singular values are wanted, the range is sketched first.
SKETCH_SIZE = 1024


@dataclass(frozen=True, slots=True)
class Cores:
    """A fitted operator: cores [χ_{k−1}, o_k, i_k, χ_k] in float64 and ‖W − Ŵ‖_F as the dropped values tell it."""

    cores: tuple[Matrix, ...]
    error: float

    @property
    def bonds(self) -> tuple[int, ...]:
        """The inner bond dimensions."""
        return tuple(core.shape[3] for core in self.cores[:-1])


def unfold(matrix: Matrix, out_dims: tuple[int, ...], in_dims: tuple[int, ...]) -> Matrix:
    """Reorders [O, I] to the tensor [o_1, i_1, o_2, i_2, …]."""
    count = len(out_dims)
    order = [axis for k in range(count) for axis in (k, count + k)]
    return matrix.reshape(*out_dims, *in_dims).transpose(order)


def contract(cores: tuple[Matrix, ...] | list[Matrix]) -> Matrix:
    """Multiplies cores [χ_{k−1}, o_k, i_k, χ_k] out to the matrix [O, I]."""
    state = np.ones((1, 1, 1))
    for core in cores:
        rows, columns, _ = state.shape
        state = np.einsum("OIa,aoib->OoIib", state, core, optimize=True)
        state = state.reshape(rows * core.shape[1], columns * core.shape[2], core.shape[3])
    return state[..., 0]


def truncated_svd(matrix: Matrix, rank: int) -> tuple[Matrix, Matrix, Matrix]:
    """The `rank` largest singular triplets U [m, r], s [r], Vᵀ [r, n].

    Exact, except for large matrices of which less than an eighth of the spectrum is wanted: there the range is found by
    a seeded random sketch with 16 extra columns and three power iterations (Halko, Martinsson & Tropp 2011).
    """
    smallest = min(matrix.shape)
    if smallest <= SKETCH_SIZE or rank * 8 > smallest:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    sketch = np.random.default_rng(0).standard_normal((matrix.shape[1], rank + 16))
    basis = np.linalg.qr(matrix @ sketch)[0]
    for _ in range(3):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    u, s, vt = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u[:, :rank], s[:rank], vt[:rank]


def sequential_svd(matrix: Matrix, out_dims: tuple[int, ...], in_dims: tuple[int, ...], chi: int) -> Cores:
    """Fits an MPO by cutting off one core after another, each time keeping the `chi` largest singular values.

    For two cores this is the best approximation in the Frobenius norm, and its error is the root of the sum of squares of
    the dropped singular values (Eckart & Young 1936). Bonds are in descending order of their singular values, and
    neighbouring cores share each value's root, which keeps both in the range of half precision.

    Args:
        matrix: [O, I] with O = Π out_dims and I = Π in_dims.
        chi: the largest bond dimension; bonds are also cut to the full rank.

    Raises:
        ConfigError: for a χ below one, factors that do not multiply to the matrix, or values that are not finite.
    """
    if chi < 1:
        raise ConfigError(f"chi: expected at least 1, found {chi}")
    if matrix.shape != (math.prod(out_dims), math.prod(in_dims)):
        raise ConfigError(f"shape {out_dims} x {in_dims}: does not multiply to a matrix of {list(matrix.shape)}")
    if not np.isfinite(matrix).all():
        raise ConfigError("matrix: has values that are not finite; check the source model")
    rest = unfold(matrix.astype(np.float64), out_dims, in_dims).reshape(1, -1)
    most = full_rank(out_dims, in_dims)
    cores, values, dropped, bond = [], [], 0.0, 1
    for k in range(len(out_dims) - 1):
        rest = rest.reshape(bond * out_dims[k] * in_dims[k], -1)
        rank = min(chi, *rest.shape, most[k])
        u, s, vt = truncated_svd(rest, rank)
        cores.append(u.reshape(bond, out_dims[k], in_dims[k], rank))
        values.append(s)
        dropped += max(float(np.square(rest).sum() - np.square(s).sum()), 0.0)
        rest, bond = s[:, None] * vt, rank
    cores.append(rest.reshape(bond, out_dims[-1], in_dims[-1], 1))
    return Cores(tuple(share_values(cores, values)), math.sqrt(dropped))


def share_values(cores: list[Matrix], values: list[Matrix]) -> list[Matrix]:
    """Moves the root of each bond's singular values to its left core; the product stays the same."""
    cores = list(cores)
    for k, s in enumerate(values):
        root = np.sqrt(np.maximum(s, 1e-12 * max(float(s[0]), 1e-30)))
        cores[k] = cores[k] * root
        cores[k + 1] = cores[k + 1] / root[:, None, None, None]
    return cores
