"""Truncated SVD in the activation norm: exact where one core takes the whole input, a start for ALS elsewhere.

C = L Lᵀ, W L = U S Vᵀ, Ŵ = U_χ U_χᵀ W with E² = Σ_{i>χ} s_i² (METHOD.md; Wang et al. 2024, arXiv 2403.07378). For other
factor shapes C is replaced by its partial traces C_1 ⊗ C_2, and the same is done to the rearranged matrix.
"""

from __future__ import annotations

import numpy as np

from mpo_exporter.fit.bonds import order_bonds
from mpo_exporter.fit.common import (
    Cores,
    Dims,
    Matrix,
    activation_error,
    check_fit,
    cholesky_root,
    contract,
    factor_moments,
    unfold,
)
from mpo_exporter.fit.svd import SKETCH_SIZE, truncated_svd
from mpo_formats import ConfigError


def fit(matrix: Matrix, moment: Matrix | None, out_dims: Dims, in_dims: Dims, chi: int) -> Cores:
    """Fits two cores by a singular value decomposition of the whitened, rearranged matrix.

    The best fit there is for (O, 1) × (1, I), and wherever one of the input factors is 1. Without a moment it is the plain
    SVD. A singular moment is loaded and that is logged.

    Raises:
        ConfigError: for other than two cores, and as `check_fit` does.
    """
    if len(out_dims) != 2:
        raise ConfigError(f"shape {out_dims} x {in_dims}: whitened SVD takes 2 cores; fit {len(out_dims)} by sweeps")
    (rank,) = check_fit(matrix, moment, out_dims, in_dims, chi)
    cores = order_bonds(project_whitened(matrix, moment, out_dims, in_dims, rank, exact=True), moment)
    return Cores(cores, activation_error(matrix - contract(cores), moment))


def project_whitened(
    matrix: Matrix, moment: Matrix | None, out_dims: Dims, in_dims: Dims, rank: int, *, exact: bool
) -> list[Matrix]:
    """Two cores whose frame is the dominant subspace of the whitened matrix, the other core being the projection on it.

    Only the side with the smaller input factor is unwhitened, so that a factor of 1 needs no inverse at all.

    Args:
        exact: takes a full decomposition, else a sketch of the subspace where the matrix is large.
    """
    (o1, o2), (i1, i2) = out_dims, in_dims
    if i1 > i2:  # the mirror image
        swapped = matrix.reshape(o1, o2, i1, i2).transpose(1, 0, 3, 2).reshape(o2 * o1, i2 * i1)
        turned = None if moment is None else swap_factors(moment, i1, i2)
        pair = project_whitened(swapped, turned, (o2, o1), (i2, i1), rank, exact=exact)
        return [core.transpose(3, 1, 2, 0) for core in reversed(pair)]
    first, second = (cholesky_root(part) for part in factor_moments(moment, in_dims))
    tensor = unfold(matrix, out_dims, in_dims)
    half = (tensor.transpose(0, 2, 3, 1) @ first).transpose(0, 3, 1, 2).reshape(o1 * i1, o2, i2)  # rows whitened
    frame = dominant_subspace((half @ second).reshape(o1 * i1, o2 * i2), rank, exact)
    behind = (frame.T @ half.reshape(o1 * i1, o2 * i2)).reshape(rank, o2, i2, 1)
    # first is lower triangular: A = U L⁻¹ on the input axis.
    front = np.asarray(np.linalg.solve(first.T, frame.reshape(o1, i1, rank)), np.float64).reshape(1, o1, i1, rank)
    return [front, behind]


def swap_factors(moment: Matrix, first: int, second: int) -> Matrix:
    """The moment of inputs whose two factors have changed places."""
    size = first * second
    return moment.reshape(first, second, first, second).transpose(1, 0, 3, 2).reshape(size, size)


def dominant_subspace(matrix: Matrix, rank: int, exact: bool) -> Matrix:
    """The `rank` leading left singular vectors [m, r] of a matrix [m, n].

    Large matrices: from the eigenvectors of the smaller Gram matrix, or from a seeded sketch with one power iteration
    (Halko, Martinsson & Tropp 2011) where that is good enough or far smaller.
    """
    smallest = min(matrix.shape)
    if smallest <= SKETCH_SIZE or rank * 8 <= smallest:
        return truncated_svd(matrix, rank)[0]
    if not exact and rank * 2 <= smallest:
        sketch = np.random.default_rng(0).standard_normal((matrix.shape[1], rank + 16))
        basis = np.linalg.qr(matrix @ (matrix.T @ np.linalg.qr(matrix @ sketch)[0]))[0]
        part = basis.T @ matrix
        return np.asarray(basis @ leading_eigenvectors(part @ part.T, rank), np.float64)
    if matrix.shape[0] <= matrix.shape[1]:
        return leading_eigenvectors(matrix @ matrix.T, rank)
    return np.asarray(np.linalg.qr(matrix @ leading_eigenvectors(matrix.T @ matrix, rank))[0], np.float64)


def leading_eigenvectors(gram: Matrix, count: int) -> Matrix:
    """The eigenvectors [n, count] of the largest eigenvalues of a symmetric matrix, the largest first."""
    return np.asarray(np.linalg.eigh(gram)[1][:, : -count - 1 : -1], np.float64)
