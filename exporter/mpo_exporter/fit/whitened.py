"""Truncated SVD in the activation norm: exact where one core takes the whole input, a start for ALS elsewhere.

C = L Lᵀ, W L = U S Vᵀ, Ŵ = U_χ U_χᵀ W with E² = Σ_{i>χ} s_i² (docs/method.md; Wang et al. 2024, arXiv 2403.07378). For other
factor shapes C is replaced by its partial traces C_1 ⊗ C_2, and the same is done to the rearranged matrix.
"""

from __future__ import annotations

import numpy as np

from mpo_exporter.calibrate.hessian import cholesky_root
from mpo_exporter.calibrate.moments import Moment
from mpo_exporter.fit.bonds import order_bonds
from mpo_exporter.fit.common import (
    Cores,
    Dims,
    Matrix,
    activation_error,
    check_fit,
    contract,
    factor_moments,
    second_of,
    unfold,
)
from mpo_exporter.fit.svd import SKETCH_SIZE, truncated_svd
from mpo_formats import ConfigError

# The fewest columns of a sketch beyond the rank, and its power iterations.
EXTRA = 16
POWERS = 6


def fit(matrix: Matrix, moment: Moment | None, out_dims: Dims, in_dims: Dims, chi: int) -> Cores:
    """Fits two cores by a singular value decomposition of the whitened, rearranged matrix.

    This is the optimum for (O, 1) × (1, I), and wherever one of the input factors is 1. Without a moment it is the plain
    SVD. The diagonal of a singular moment is raised, which is logged.

    Raises:
        ConfigError: for other than two cores, and as `check_fit` does.
    """
    if len(out_dims) != 2:
        raise ConfigError(f"shape {out_dims} x {in_dims}: whitened SVD takes 2 cores; fit {len(out_dims)} by sweeps")
    second = second_of(moment)
    (rank,) = check_fit(matrix, second, out_dims, in_dims, chi)
    cores = order_bonds(project_whitened(matrix, moment, out_dims, in_dims, rank, exact=True), second)
    return Cores(cores, activation_error(matrix - contract(cores), second))


def project_whitened(
    matrix: Matrix, moment: Moment | None, out_dims: Dims, in_dims: Dims, rank: int, *, exact: bool
) -> list[Matrix]:
    """Two cores: a frame of the dominant subspace of the whitened matrix, and the projection of the matrix on it.

    Only the side with the smaller input factor is unwhitened, so a factor of 1 needs no inverse at all.

    Args:
        exact: uses a full decomposition unless the rank is small; False sketches the subspace of a large matrix.
    """
    (o1, o2), (i1, i2) = out_dims, in_dims
    if i1 > i2:  # the mirror image
        swapped = matrix.reshape(o1, o2, i1, i2).transpose(1, 0, 3, 2).reshape(o2 * o1, i2 * i1)
        turned = None if moment is None else Moment(swap_factors(moment.second, i1, i2))
        pair = project_whitened(swapped, turned, (o2, o1), (i2, i1), rank, exact=exact)
        return [core.transpose(3, 1, 2, 0) for core in reversed(pair)]
    tensor = unfold(matrix, out_dims, in_dims)
    # Where the second core takes the whole input its factor is C itself, unscaled: the scale does not matter here.
    whole = moment if i1 == 1 else None
    first, second = factor_moments(second_of(moment), in_dims) if whole is None else (np.eye(1), whole.second)
    if i1 > 1:
        first = cholesky_root(first)
        tensor = (tensor.transpose(0, 2, 3, 1) @ first).transpose(0, 3, 1, 2)  # rows whitened
    half = np.ascontiguousarray(tensor).reshape(o1 * i1, o2 * i2)
    if min(half.shape) > SKETCH_SIZE and rank * (8 if exact else 2) <= min(half.shape):
        frame = sketched_frame(half, second, rank)
    else:
        whitened = half.reshape(-1, i2) @ (cholesky_root(second) if whole is None else whole.root)
        frame = dominant_subspace(whitened.reshape(half.shape), rank)
    behind = (frame.T @ half).reshape(rank, o2, i2, 1)
    front = frame.reshape(o1, i1, rank)
    if i1 > 1:  # first is lower triangular: A = U L⁻¹ on the input axis
        front = np.asarray(np.linalg.solve(first.T, front), np.float64)
    return [front.reshape(1, o1, i1, rank), behind]


def swap_factors(moment: Matrix, first: int, second: int) -> Matrix:
    """The second moment of the inputs after their two factors have been swapped."""
    size = first * second
    return moment.reshape(first, second, first, second).transpose(1, 0, 3, 2).reshape(size, size)


def sketched_frame(half: Matrix, moment: Matrix, rank: int) -> Matrix:
    """The `rank` leading left singular vectors [m, r] of M (1 ⊗ L), for M [m, o · i] and L Lᵀ = C [i, i].

    Seeded subspace iteration on M (1 ⊗ C) Mᵀ (Halko, Martinsson & Tropp 2011) in single precision: neither the root of C nor
    the whitened matrix is formed.
    """
    rows, columns = half.shape[0], moment.shape[0]
    small, weight = half.astype(np.float32), moment.astype(np.float32)

    def apply(frame: Matrix) -> Matrix:
        state = (small.T @ frame.astype(np.float32)).reshape(-1, columns, frame.shape[1])  # [o, i, r]
        state = np.matmul(weight, state).reshape(-1, frame.shape[1])
        return np.asarray(small @ state, np.float64)

    extra = max(EXTRA, rank // 4)
    frame = np.random.default_rng(0).standard_normal((rows, min(rank + extra, rows)))
    for _ in range(POWERS):
        frame = np.linalg.qr(apply(frame))[0]
    turn = leading_eigenvectors(frame.T @ apply(frame), rank)
    return np.asarray(frame @ turn, np.float64)


def dominant_subspace(matrix: Matrix, rank: int) -> Matrix:
    """The `rank` leading left singular vectors [m, r] of a matrix [m, n]; for a large one from its smaller Gram matrix."""
    if min(matrix.shape) <= SKETCH_SIZE:
        return truncated_svd(matrix, rank)[0]
    if matrix.shape[0] <= matrix.shape[1]:
        return leading_eigenvectors(matrix @ matrix.T, rank)
    return np.asarray(np.linalg.qr(matrix @ leading_eigenvectors(matrix.T @ matrix, rank))[0], np.float64)


def leading_eigenvectors(gram: Matrix, count: int) -> Matrix:
    """The eigenvectors [n, count] of the largest eigenvalues of a symmetric matrix, the largest first."""
    return np.asarray(np.linalg.eigh((gram + gram.T) / 2)[1][:, : -count - 1 : -1], np.float64)
