"""What rounding needs to know of an input's second moment: the damped Hessian, its triangular root, an order of columns."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.fit.remember import Remembered
from mpo_formats import ConfigError

Matrix = NDArray[np.float64]
log = logging.getLogger(__name__)

# Added to the diagonal of C, as a share of its mean.
DAMPING = 0.01


@dataclass(frozen=True, slots=True)
class Hessian:
    """H = P (C / mean(diag C) + damping · 1) Pᵀ of an input, and H = R Rᵀ with R upper triangular.

    `order` [I] are the columns in processing order (the rows of P), `matrix` is H [I, I], `feedback` is R [I, I] with each
    column divided by its diagonal entry, `weight` [I] those entries squared, all in float32, and `mean` is mean(diag C).
    What rounding column j loses with all later columns free to make up for it is weight_j times its square.
    """

    order: Tensor
    matrix: Tensor
    feedback: Tensor
    weight: Tensor
    mean: float

    def solve(self, sides: Tensor) -> Tensor:
        """X [O, I] with X (C / mean + damping · 1) = sides [O, I], in float32."""
        # H = F D² Fᵀ with F the feedback and D² the weights.
        found = torch.linalg.solve_triangular(
            self.feedback.T, sides[:, self.order], upper=False, left=False, unitriangular=True
        )
        found /= self.weight
        found = torch.linalg.solve_triangular(self.feedback, found, upper=True, left=False, unitriangular=True)
        result = torch.empty_like(found)
        result[:, self.order] = found
        return result


def hessian_of(moment: Matrix, group: int, damping: float = DAMPING) -> Hessian:
    """The Hessian of inputs of second moment C [I, I], its columns in the processing order for groups of that size.

    It is remembered as long as the array `moment` lives, as layers with one input share it.

    Raises:
        ConfigError: when C has values that are not finite.
    """
    return _hessians.get(moment, (group, damping), lambda: _decompose(moment, group, damping))


_hessians: Remembered[Hessian] = Remembered()


def _decompose(moment: Matrix, group: int, damping: float) -> Hessian:
    if not np.isfinite(moment).all():
        raise ConfigError("second moment: has values that are not finite; check the source model and the text")
    mean = float(np.trace(moment)) / len(moment)
    whole = torch.from_numpy(moment if mean > 0 else np.zeros_like(moment))
    unit = mean if mean > 0 else 1.0
    order = processing_order(whole.diagonal(), group)
    # Backwards, as the lower triangular root of a matrix that is turned round both ways is the upper one of the matrix.
    backwards = order.flip(0)
    root, load = _root(whole[backwards][:, backwards].div_(unit), damping)
    root = root.float().flip(0, 1)
    pivots = root.diagonal().clone()
    matrix = whole.float()[order][:, order].div_(unit)
    matrix.diagonal().add_(load)
    return Hessian(order, matrix, root.div_(pivots), pivots.square(), mean)


def _root(scaled: Tensor, damping: float) -> tuple[Tensor, float]:
    """The lower triangular root of scaled + load · 1 and that load: damping, or more where that is singular (logged)."""
    plain = scaled.diagonal().clone()
    load = damping
    while True:
        scaled.diagonal().copy_(plain + load)
        root, info = torch.linalg.cholesky_ex(scaled)
        if not int(info):
            if load > damping:
                log.warning("second moment of %d inputs is singular; its diagonal was raised by %g", len(plain), load)
            return root, load
        load = max(10 * load, 1e-6)


def processing_order(diagonal: Tensor, group: int) -> Tensor:
    """Columns by falling C_jj, but groups stay together: whole groups by their sum, and columns inside each."""
    grouped = diagonal.reshape(-1, group)
    inside = grouped.argsort(dim=1, descending=True, stable=True)
    outside = grouped.sum(1).argsort(dim=0, descending=True, stable=True)
    return (inside[outside] + outside[:, None] * group).reshape(-1)
