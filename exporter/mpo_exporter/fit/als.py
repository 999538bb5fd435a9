"""Alternating least squares on the activations for two cores: Ŵ = Σ_a A_a ⊗ B_a (docs/method.md).

With one core fixed the error is quadratic in the other. Where χ is small the normal equations are formed and solved; where
that would cost more than products with the whole matrix, a few steps of preconditioned conjugate gradients replace it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

from mpo_exporter.calibrate.moments import Moment
from mpo_exporter.fit.bonds import order_bonds
from mpo_exporter.fit.common import Cores, Dims, Matrix, activation_error, check_fit, contract, second_of
from mpo_exporter.fit.site import Target, make_target, site_at
from mpo_exporter.fit.whitened import project_whitened
from mpo_formats import ConfigError

SWEEPS = 20
# Conjugate-gradient steps for one core before the other one: more sweeps gain more than more steps.
STEPS = 4
# Sweeping ends when one sweep lowers E² by less than this share.
TOLERANCE = 1e-4
# Normal equations of more unknowns per output are never formed: 4096² in double precision is 128 MiB.
MOST_UNKNOWNS = 4096
# Share of the mean diagonal that is added to the normal equations in double and in single precision: it bounds values of the
# cores that have no effect on the error.
RIDGE = {np.dtype(np.float64): 1e-12, np.dtype(np.float32): 1e-7}


def fit(
    matrix: Matrix,
    moment: Moment | None,
    out_dims: Dims,
    in_dims: Dims,
    chi: int,
    *,
    sweeps: int = SWEEPS,
    start: Cores | None = None,
    seconds: float = math.inf,
) -> Cores:
    """Fits two cores of any factor shape to lower E² = tr[(W − Ŵ) C (W − Ŵ)ᵀ]; never worse than the start.

    Where one core takes the whole input, or without a moment, the optimum has a closed form and is returned.

    Args:
        sweeps: the most turns of the two cores.
        start: cores of this shape and χ to improve; None for those of the whitened SVD.
        seconds: no further core is improved after that time.

    Raises:
        ConfigError: for other than two cores, a start of another shape, and as `check_fit` does.
    """
    if len(out_dims) != 2:
        raise ConfigError(f"shape {out_dims} x {in_dims}: ALS takes 2 cores; fit {len(out_dims)} by sweeps")
    second = second_of(moment)
    bonds = check_fit(matrix, second, out_dims, in_dims, chi)
    if second is None or min(in_dims) == 1:
        closed = order_bonds(project_whitened(matrix, moment, out_dims, in_dims, bonds[0], exact=True), second)
        return Cores(closed, activation_error(matrix - contract(closed), second))
    if start is None:
        begin = project_whitened(matrix, moment, out_dims, in_dims, bonds[0], exact=False)
    else:
        require_start(start, out_dims, in_dims, bonds)
        begin = list(start.cores)
    best = order_bonds(begin, second)
    error = activation_error(matrix - contract(best), second)
    if not error:
        return Cores(best, error)
    found = alternate(matrix, second, begin, sweeps, time.monotonic() + seconds)
    cores = order_bonds(found, second)
    after = activation_error(matrix - contract(cores), second)
    return Cores(cores, after) if after < error else Cores(best, error)


def require_start(start: Cores, out_dims: Dims, in_dims: Dims, bonds: Dims) -> None:
    """Raises ConfigError when `start` has another shape or χ than the fit."""
    found = tuple(core.shape for core in start.cores)
    wanted = ((1, out_dims[0], in_dims[0], bonds[0]), (bonds[0], out_dims[1], in_dims[1], 1))
    if found != wanted:
        raise ConfigError(f"start: expected cores of shape {wanted[0]} and {wanted[1]}, found {found}")


def alternate(matrix: Matrix, second: Matrix, start: Sequence[Matrix], sweeps: int, until: float) -> list[Matrix]:
    """Improves two cores in turns until a sweep gains too little, `sweeps` are done or the clock passes `until`."""
    out_dims = tuple(core.shape[1] for core in start)
    in_dims = tuple(core.shape[2] for core in start)
    target = make_target(matrix, second, in_dims)
    cores = [core.astype(target.product.dtype) for core in start]
    chi = cores[0].shape[3]
    direct = [pays_to_form(out_dims, in_dims, chi, k) for k in (0, 1)]
    last = math.inf
    for _ in range(sweeps):
        for k in (0, 1):
            if direct[k]:
                cores[k], square = solve_directly(target, cores, k)
            else:
                cores[k], square = site_at(target, cores, k).solve(cores[k], STEPS)
            if late := time.monotonic() > until:
                break
        if late or last - square <= TOLERANCE * square:
            break
        last = square
    return [core.astype(np.float64) for core in cores]


def pays_to_form(out_dims: Dims, in_dims: Dims, chi: int, k: int) -> bool:
    """Whether the normal equations of core k fit into memory and cost fewer multiply-adds than the gradient steps would."""
    rows, columns = math.prod(out_dims), math.prod(in_dims)
    unknowns, behind = chi * in_dims[k], chi * in_dims[1 - k]
    if max(unknowns, behind) > MOST_UNKNOWNS:
        return False
    formed = (chi * columns) ** 2 + unknowns**3 / 3 + behind**2 * out_dims[1 - k]
    return formed < (STEPS + 1) * rows * columns * (columns + 2 * chi)


def solve_directly(target: Target, cores: Sequence[Matrix], k: int) -> tuple[Matrix, float]:
    """The best core k for the other one, from the normal equations; returns the core and E².

    M[(a, i), (b, j)] = Σ P[a, i', b, j'] C[(i i'), (j j')] with P the Gram matrix of the other core over its outputs; the
    right-hand sides are W C contracted with the other core.
    """
    product = target.product
    chi = cores[0].shape[3]
    dims = [core.shape[1:3] for core in cores]
    other = cores[1][..., 0] if k == 0 else cores[0][0].transpose(2, 0, 1)  # [a, o', i']
    (_, inner), (_, behind) = dims[k], dims[1 - k]
    flat = other.transpose(1, 0, 2).reshape(-1, chi * behind)
    gram = (flat.T @ flat).reshape(chi, behind, chi, behind).transpose(0, 2, 1, 3).reshape(chi * chi, behind * behind)
    second = target.second if target.second is not None else np.eye(product.shape[1])
    blocks = second.reshape(dims[0][1], dims[1][1], dims[0][1], dims[1][1])
    normal = np.empty((chi, inner, chi, inner))
    for i in range(inner):
        # [j, i', j']
        block = blocks[i].transpose(1, 0, 2) if k == 0 else blocks[:, i].transpose(2, 0, 1)
        normal[:, i] = (gram @ block.reshape(inner, -1).T).reshape(chi, chi, inner)
    tensor = product.reshape(dims[0][0], dims[1][0], dims[0][1], dims[1][1])
    tensor = tensor.transpose((0, 2, 1, 3) if k == 0 else (1, 3, 0, 2))  # [o, i, o', i']
    outs = dims[k][0]
    sides = tensor.reshape(outs * inner, -1) @ other.reshape(chi, -1).T
    sides = sides.reshape(outs, inner, chi).transpose(2, 1, 0).reshape(chi * inner, outs).astype(np.float64)
    matrix = normal.reshape(chi * inner, chi * inner)
    matrix = (matrix + matrix.T) / 2
    mean = float(np.trace(matrix)) / (chi * inner)
    matrix += np.diag(np.full(chi * inner, RIDGE[product.dtype] * mean if mean > 0 else 1.0))
    solution = np.linalg.solve(matrix, sides)
    square = target.square - 2 * float(np.vdot(solution, sides)) + float(np.vdot(solution, matrix @ solution))
    core = solution.reshape(chi, inner, outs).transpose(2, 1, 0).astype(product.dtype)  # [o, i, a]
    return (core[None] if k == 0 else core.transpose(2, 0, 1)[..., None]), square
