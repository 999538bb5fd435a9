"""The best factor shape of two cores for a matrix, under limits on parameters, multiply-adds and time.

All shapes (o_1, o_2) × (i_1, i_2) are scored by the part of the whitened, rearranged matrix that a truncated SVD drops, with
the moment replaced by its partial traces. The few best, and (O, 1) × (1, I) in any case, are fitted completely. The fit of
the latter is the whitened SVD, so the result is never worse than that. Shapes with an input factor of 1 have an optimum in
closed form and an exact score, so only the best of them is fitted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpo_exporter.calibrate.hessian import cholesky_root
from mpo_exporter.calibrate.moments import Moment
from mpo_exporter.fit import als
from mpo_exporter.fit.common import Cores, Dims, Matrix, check_fit, factor_moments, second_of, unfold
from mpo_exporter.fit.shapes import divisors, low_rank_shape, parameters
from mpo_formats import PlanError
from mpo_formats.architecture import full_rank

# From out_dims, in_dims and χ to the seconds of one token.
Latency = Callable[[Dims, Dims, int], float]
log = logging.getLogger(__name__)
# Shapes that are fitted by ALS.
KEEP = 3
# A Gram matrix of at most this size is decomposed; for larger matrices a sketch estimates the dropped part.
EXACT_SIZE = 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that cores may cost: parameters; multiply-adds for one token; seconds for one token, which `latency` gives."""

    parameters: int
    multiply_adds: int | None = None
    seconds: float | None = None
    latency: Latency | None = None

    def __post_init__(self) -> None:
        if self.parameters < 1 or (self.multiply_adds is not None and self.multiply_adds < 1):
            raise PlanError(
                f"limits: expected at least 1 parameter and multiply-add, found {self.parameters} and "
                f"{self.multiply_adds}"
            )
        if (self.seconds is None) != (self.latency is None):
            raise PlanError("limits: seconds and latency go together; give both or neither")

    def largest_chi(self, out_dims: Dims, in_dims: Dims) -> int:
        """The largest χ of that shape within the limits, 0 where there is none; assumes that latency grows with χ."""
        chi = min(full_rank(out_dims, in_dims)[0], self.parameters // parameters(out_dims, in_dims, (1,)))
        if self.multiply_adds is not None:
            chi = min(chi, self.multiply_adds // bond_multiply_adds(out_dims, in_dims))
        if self.seconds is None or self.latency is None:
            return chi
        low, high = 0, chi
        while low < high:
            middle = (low + high + 1) // 2
            if self.latency(out_dims, in_dims, middle) <= self.seconds:
                low = middle
            else:
                high = middle - 1
        return low


@dataclass(frozen=True, slots=True)
class Scored:
    """A shape, its largest χ, and the share of tr(W C Wᵀ), with C by its partial traces, that a truncated SVD would drop."""

    out_dims: Dims
    in_dims: Dims
    chi: int
    dropped: float


def bond_multiply_adds(out_dims: Dims, in_dims: Dims) -> int:
    """Multiply-adds of two cores for one token and one value of the bond, in the cheaper order (docs/method.md)."""
    (o1, o2), (i1, i2) = out_dims, in_dims
    return min(i1 * i2 * o2 + i1 * o1 * o2, i1 * i2 * o1 + i2 * o1 * o2)


def score_shapes(matrix: Matrix, second: Matrix | None, limits: Limits) -> list[Scored]:
    """All shapes within the limits, the one that drops the least first.

    Raises:
        ConfigError: as `check_fit` does.
    """
    rows, columns = matrix.shape
    check_fit(matrix, second, (rows, 1), (1, columns), 1)
    found = []
    for inner in divisors(columns):
        in_dims = (inner, columns // inner)
        shapes = [((outer, rows // outer), in_dims) for outer in divisors(rows)]
        if inner == columns > 1:
            shapes = shapes[1:]  # (1, O) × (I, 1) is (O, 1) × (1, I) with the two cores swapped
        fitting = [(shape, chi) for shape in shapes if (chi := limits.largest_chi(*shape)) > 0]
        if not fitting:
            continue
        whitened = whiten(matrix, second, in_dims)
        for (out_dims, _), chi in fitting:
            tensor = unfold(whitened, out_dims, in_dims).reshape(out_dims[0] * in_dims[0], -1)
            found.append(Scored(out_dims, in_dims, chi, dropped_share(tensor, chi)))
    return sorted(found, key=lambda shape: shape.dropped)


def whiten(matrix: Matrix, second: Matrix | None, in_dims: Dims) -> Matrix:
    """W (L_1 ⊗ L_2), with L_k the Cholesky roots of the moment's partial traces."""
    left, right = (cholesky_root(part) for part in factor_moments(second, in_dims))
    tensor = matrix.reshape(-1, *in_dims) @ right
    turned: Matrix = (tensor.transpose(0, 2, 1) @ left).transpose(0, 2, 1).reshape(matrix.shape)
    return turned


def dropped_share(matrix: Matrix, rank: int) -> float:
    """The share of ‖M‖² outside the `rank` largest singular values; for a large matrix an estimate from a sketch."""
    smallest = min(matrix.shape)
    total = float(np.vdot(matrix, matrix))
    if rank >= smallest or not total:
        return 0.0
    if smallest <= EXACT_SIZE:
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        values = np.linalg.eigvalsh(wide @ wide.T)
        return max(float(values[: smallest - rank].sum()), 0.0) / total
    small = matrix.astype(np.float32)
    sketch = np.random.default_rng(0).standard_normal((matrix.shape[1], rank + 16), np.float32)
    basis = np.linalg.qr(small @ sketch)[0]
    basis = np.linalg.qr(small.T @ basis)[0]
    kept = np.square(np.linalg.svd(small @ basis, compute_uv=False)[:rank].astype(np.float64)).sum()
    return max(0.0, 1 - float(kept) / total)


def search(
    matrix: Matrix, moment: Moment | None, limits: Limits, *, keep: int = KEEP, seconds: float = math.inf
) -> Cores:
    """Fits two cores of the best shape within the limits.

    Args:
        keep: shapes that are fitted by ALS, besides those with a closed form.
        seconds: the time limit of each of these fits.

    Raises:
        PlanError: where no shape stays within the limits.
        ConfigError: as `check_fit` does.
    """
    scored = score_shapes(matrix, second_of(moment), limits)
    if not scored:
        raise PlanError(
            f"cores: no factor shape of a {matrix.shape[0]} x {matrix.shape[1]} matrix has as little as "
            f"{limits.parameters} parameters within the limits; allow more"
        )
    plain = [shape for shape in scored if (shape.out_dims, shape.in_dims) == low_rank_shape(*matrix.shape)]
    closed = [shape for shape in scored if min(shape.in_dims) == 1 and shape not in plain]
    chosen = plain + closed[:1] + [shape for shape in scored if min(shape.in_dims) > 1][:keep]
    best: Cores | None = None
    for shape in chosen:
        fitted = als.fit(matrix, moment, shape.out_dims, shape.in_dims, shape.chi, seconds=seconds)
        log.debug("%s x %s, chi %d: error %g", shape.out_dims, shape.in_dims, shape.chi, fitted.error)
        if best is None or fitted.error < best.error:
            best = fitted
    if best is None:
        raise PlanError(f"cores: expected to keep at least 1 shape of the search, found {keep}")
    return best
