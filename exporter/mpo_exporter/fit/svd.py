"""Cores of a matrix by sequential singular value decompositions (Oseledets 2011, algorithm 1; arXiv 2401.14109)."""

from __future__ import annotations

import math

import numpy as np

from mpo_exporter.calibrate.moments import Moment
from mpo_exporter.fit.common import Cores as Cores
from mpo_exporter.fit.common import Dims, Matrix, activation_error, check_fit, second_of, share_values, unfold
from mpo_exporter.fit.common import contract as contract

# Above this size the range of a matrix is sketched first where few singular values are needed.
SKETCH_SIZE = 1024


def fit(matrix: Matrix, moment: Moment | None, out_dims: Dims, in_dims: Dims, chi: int) -> Cores:
    """Fits as `sequential_svd` does, without using the moment, and returns the error in the moment's norm.

    Raises:
        ConfigError: as `check_fit` does.
    """
    check_fit(matrix, second_of(moment), out_dims, in_dims, chi)
    result = sequential_svd(matrix, out_dims, in_dims, chi)
    if moment is None:
        return result
    return Cores(result.cores, activation_error(matrix - contract(result.cores), moment.second))


def truncated_svd(matrix: Matrix, rank: int) -> tuple[Matrix, Matrix, Matrix]:
    """The `rank` largest singular triplets U [m, r], s [r], Vᵀ [r, n].

    Exact for matrices with a side of at most 1,024. For larger ones, where less than an eighth of the spectrum is needed, the
    range is found by a seeded random sketch with 16 extra columns and three power iterations (Halko, Martinsson & Tropp
    2011); else the triplets come from the eigenvectors of the smaller Gram matrix, and singular values below 1e-8 of the
    largest are rounding noise.
    """
    smallest = min(matrix.shape)
    if smallest <= SKETCH_SIZE:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    if rank * 8 > smallest:
        if matrix.shape[0] > matrix.shape[1]:
            v, s, ut = truncated_svd(np.ascontiguousarray(matrix.T), rank)
            return ut.T, s, v.T
        u = np.linalg.eigh(matrix @ matrix.T)[1][:, : -rank - 1 : -1]
        rest = u.T @ matrix
        s = np.linalg.norm(rest, axis=1)
        return u, s, rest / np.maximum(s, 1e-30)[:, None]
    sketch = np.random.default_rng(0).standard_normal((matrix.shape[1], rank + 16))
    basis = np.linalg.qr(matrix @ sketch)[0]
    for _ in range(3):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    u, s, vt = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u[:, :rank], s[:rank], vt[:rank]


def sequential_svd(matrix: Matrix, out_dims: Dims, in_dims: Dims, chi: int) -> Cores:
    """Fits an MPO by splitting off one core after another, each time keeping the `chi` largest singular values.

    For two cores this is the best approximation in the Frobenius norm (Eckart & Young 1936). Bonds are in descending order
    of their singular values s, and each of the two neighbouring cores takes √s, which keeps both in the range of half
    precision.

    Args:
        matrix: [O, I] with O = Π out_dims and I = Π in_dims.
        chi: the largest bond dimension; bonds are also cut to the full rank.

    Returns:
        The cores and ‖W − Ŵ‖_F.

    Raises:
        ConfigError: for a χ below one, factors that do not multiply to the matrix, or values that are not finite.
    """
    most = check_fit(matrix, None, out_dims, in_dims, chi)
    rest = unfold(matrix.astype(np.float64), out_dims, in_dims).reshape(1, -1)
    cores, values, bond = [], [], 1
    for k in range(len(out_dims) - 1):
        rest = rest.reshape(bond * out_dims[k] * in_dims[k], -1)
        rank = min(*rest.shape, most[k])
        u, s, vt = truncated_svd(rest, rank)
        cores.append(u.reshape(bond, out_dims[k], in_dims[k], rank))
        values.append(s)
        rest, bond = s[:, None] * vt, rank
    cores.append(rest.reshape(bond, out_dims[-1], in_dims[-1], 1))
    cores = share_values(cores, values)
    return Cores(tuple(cores), math.sqrt(float(np.square(matrix - contract(cores)).sum())))
