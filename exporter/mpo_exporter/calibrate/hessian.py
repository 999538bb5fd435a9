"""What fits and rounding derive from a second moment C [I, I]: its Cholesky root, and a damped Hessian with its own root."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_formats import ConfigError
from mpo_formats.packing import block_transform

Matrix = NDArray[np.float64]
log = logging.getLogger(__name__)

# Added to the diagonal of C for the Hessian, as a share of the mean of the diagonal.
DAMPING = 0.01
# A singular C gets this share of its mean diagonal added to the diagonal, and ten times more until it has a Cholesky root.
LEAST_LOAD = 1e-10
# Inputs that are wider than this are compressed in parts of at most so many columns. A part is a multiple of the widest group.
WIDE, PART, UNIT = 6144, 2560, 256
# Rows of a matrix that are transformed at once.
PANEL = 768


def parts_of(columns: int) -> list[slice]:
    """The columns of wide inputs in parts of about the same size, which no group and no Hadamard block goes beyond."""
    count = -(-columns // PART)
    size = -(-columns // (count * UNIT)) * UNIT
    return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]


def transform_in_place(matrix: NDArray[Any], matrices: Matrix) -> None:
    """Exchanges every row r of a matrix for T r, some rows at a time; T has the matrices [1 or I/b, b, b] on its diagonal."""
    for start in range(0, len(matrix), PANEL):
        rows = slice(start, start + PANEL)
        matrix[rows] = block_transform(np.ascontiguousarray(matrix[rows]), matrices)


def cholesky_root(second: Matrix) -> Matrix:
    """The lower triangular L with L Lᵀ = C; where C is singular its diagonal is raised until L exists, which is logged."""
    size = second.shape[0]
    mean = float(np.trace(second)) / size
    if mean <= 0:
        log.warning("moment is zero: the fit weighs all inputs the same; give more calibration text")
        return np.eye(size)
    load = 0.0
    while True:
        try:
            loaded = second + np.diag(np.full(size, load * mean)) if load else second
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


@dataclass(frozen=True, slots=True)
class Hessian:
    """H = P (C / mean(diag C) + damping · 1) Pᵀ of an input, and H = R Rᵀ with R upper triangular.

    `order` [I] lists the columns in processing order (the rows of P), `matrix` is H [I, I], `feedback` is R [I, I] with each
    column divided by its diagonal entry, `weight` [I] those entries squared, all in float32, and `mean` is mean(diag C).
    When column j is rounded and all later columns are adjusted to compensate, the error is weight_j times the square of the
    rounding error.
    """

    order: Tensor
    matrix: Tensor
    feedback: Tensor
    weight: Tensor
    mean: float


def decompose(second: Matrix, group: int, damping: float, device: str = "cpu") -> Hessian:
    """The Hessian of inputs of second moment C [I, I] on a device, its columns in the processing order for groups of that size.

    Raises:
        ConfigError: when C has values that are not finite.
    """
    if not np.isfinite(second).all():
        raise ConfigError("second moment: has values that are not finite; check the source model and the text")
    mean = float(np.trace(second)) / len(second)
    whole = torch.from_numpy(second if mean > 0 else np.zeros_like(second)).to(device)
    unit = mean if mean > 0 else 1.0
    order = processing_order(whole.diagonal(), group)
    # The lower triangular root of the matrix with rows and columns reversed, reversed again, is the upper triangular root.
    backwards = order.flip(0)
    root, load = _root(whole[backwards][:, backwards].div_(unit), damping)
    root = root.float().flip(0, 1)
    pivots = root.diagonal().clone()
    matrix = whole.float()[order][:, order].div_(unit)
    matrix.diagonal().add_(load)
    return Hessian(order, matrix, root.div_(pivots), pivots.square(), mean)


def pivots(
    second: Matrix, group: int, damping: float, device: str = "cpu", turns: Sequence[Matrix] = ()
) -> NDArray[np.float32]:
    """The weights R_jj² [I] of `decompose`, in the inputs' own order; in single precision, which is enough for estimates.

    Wide inputs are taken in parts, as if those of two parts had nothing in common: that is how they are compressed.

    Args:
        turns: matrices [1 or I/b, b, b] on the diagonals of the transforms that the inputs are to take first, in order.

    Raises:
        ConfigError: as `decompose` does.
    """
    found = np.empty(len(second), np.float32)
    mean = float(second.diagonal().mean())
    if not 0 < mean < math.inf:
        hessian = decompose(second, group, damping)
        found[hessian.order.numpy()] = hessian.weight.numpy()
        return found
    for part in parts_of(len(second)) if len(second) > WIDE else [slice(0, len(second))]:
        inside = np.ascontiguousarray(second[part, part], np.float32)
        for matrices in turns:
            own = (
                matrices
                if len(matrices) == 1
                else matrices[part.start // matrices.shape[1] : part.stop // matrices.shape[1]]
            )
            transform_in_place(inside, own)
            transform_in_place(inside.T, own)
        whole = torch.from_numpy(inside).to(device)
        backwards = processing_order(whole.diagonal(), group).flip(0)
        root, _ = _root(whole[backwards][:, backwards].div_(mean), damping)
        found[part][backwards.cpu().numpy()] = root.diagonal().square().cpu().numpy()
    return found


def ridge(second: Matrix, damping: float, device: str = "cpu") -> tuple[Tensor, float]:
    """The lower triangular root [I, I] of C / mean(diag C) + damping · 1, or of more where that is singular, and the mean.

    In single precision; the mean is 1 where C is zero.
    """
    whole = torch.from_numpy(second).to(device).float()
    mean = float(whole.diagonal().double().mean())
    unit = mean if mean > 0 else 1.0
    return _root(whole.div_(unit), damping)[0], unit


def _root(scaled: Tensor, damping: float) -> tuple[Tensor, float]:
    """The lower triangular root of scaled + load · 1, and the load: damping, or more where that is singular (logged)."""
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
    """Columns by descending C_jj with groups kept together: groups by their sum, and columns inside each group."""
    grouped = diagonal.reshape(-1, group)
    inside = grouped.argsort(dim=1, descending=True, stable=True)
    outside = grouped.sum(1).argsort(dim=0, descending=True, stable=True)
    return (inside[outside] + outside[:, None] * group).reshape(-1)
