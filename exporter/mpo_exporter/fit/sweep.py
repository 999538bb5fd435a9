"""Sweeps over any number of cores, in mixed-canonical form (DMRG style: White 1992; Holtz, Rohwedder & Schneider 2012).

From left to right and back, each core in turn is improved to lower E² while the others are fixed. The parts left and right of
it are made orthonormal before, which keeps its least-squares problem well conditioned. Bonds keep their size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

from mpo_exporter.calibrate.moments import Moment
from mpo_exporter.fit.bonds import order_bonds
from mpo_exporter.fit.common import Cores, Dims, Matrix, activation_error, check_fit, contract, second_of
from mpo_exporter.fit.site import make_target, site_at
from mpo_exporter.fit.svd import sequential_svd

SWEEPS = 12
# Conjugate-gradient steps for one core before the next one.
STEPS = 4
# Sweeping ends when one sweep lowers E² by less than this share.
TOLERANCE = 1e-4


def fit(
    matrix: Matrix,
    moment: Moment | None,
    out_dims: Dims,
    in_dims: Dims,
    chi: int,
    *,
    sweeps: int = SWEEPS,
    seconds: float = math.inf,
) -> Cores:
    """Fits two or more cores to lower E² = tr[(W − Ŵ) C (W − Ŵ)ᵀ]; never worse than the sequential SVD, where it starts.

    Args:
        sweeps: the most sweeps from left to right and back.
        seconds: no further core is improved after that time.

    Raises:
        ConfigError: as `check_fit` does.
    """
    second = second_of(moment)
    check_fit(matrix, second, out_dims, in_dims, chi)
    begin = sequential_svd(matrix, out_dims, in_dims, chi).cores
    best = order_bonds(begin, second)
    error = activation_error(matrix - contract(best), second)
    found = order_bonds(sweep(matrix, second, begin, sweeps, time.monotonic() + seconds), second)
    after = activation_error(matrix - contract(found), second)
    return Cores(found, after) if after < error else Cores(best, error)


def sweep(
    matrix: Matrix, second: Matrix | None, start: Sequence[Matrix], sweeps: int, until: float
) -> tuple[Matrix, ...]:
    """Improves cores from left to right and back, until a sweep gains too little or the clock passes `until`."""
    target = make_target(matrix, second, tuple(core.shape[2] for core in start))
    cores = [core.astype(target.product.dtype) for core in start]
    for k in range(len(cores) - 1, 0, -1):
        shift_left(cores, k)
    last = math.inf
    there_and_back = [*range(len(cores)), *range(len(cores) - 2, -1, -1)]
    for _ in range(sweeps):
        at = 0
        for k in there_and_back:
            if k > at:
                shift_right(cores, at)
            elif k < at:
                shift_left(cores, at)
            cores[k], square = site_at(target, cores, k).solve(cores[k], STEPS)
            at = k
            if late := time.monotonic() > until:
                break
        if late or last - square <= TOLERANCE * square:
            break
        last = square
    return tuple(core.astype(np.float64) for core in cores)


def shift_right(cores: list[Matrix], k: int) -> None:
    """Makes core k orthonormal towards its right bond by a QR decomposition; R goes into core k + 1."""
    shape = cores[k].shape
    q, r = np.linalg.qr(cores[k].reshape(-1, shape[3]))
    cores[k] = q.reshape(*shape[:3], -1)
    cores[k + 1] = np.tensordot(r, cores[k + 1], 1)


def shift_left(cores: list[Matrix], k: int) -> None:
    """Makes core k orthonormal towards its left bond by a QR decomposition; R goes into core k − 1."""
    shape = cores[k].shape
    q, r = np.linalg.qr(cores[k].reshape(shape[0], -1).T)
    cores[k] = q.T.reshape(-1, *shape[1:])
    cores[k - 1] = np.tensordot(cores[k - 1], r.T, 1)
