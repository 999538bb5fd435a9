"""Error-compensated rounding that minds the outputs too: what some rows lose, later rows make up for.

The rounding of gptq.py lowers tr[Δ C Δᵀ], Δ = W − Ŵ, in which the rows of W do not depend on each other. What an error costs the
model is closer to tr[G Δ C Δᵀ], G = E[g gᵀ] the second moment of the loss's gradient g by the layer's outputs (Kronecker-factored
Fisher information: Martens & Grosse 2015, arXiv 1503.05671; for rounding: arXiv 2505.22988). With G = S Sᵀ, S upper triangular in
blocks of rows, the rows of block b are best rounded from

    W_b + S_bb^{−T} Σ_{a<b} S_abᵀ Δ_a

whatever later ones become, and within the block as gptq.py does it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mpo_exporter.calibrate.moments import Moment, require_finite
from mpo_exporter.quantize.gptq import TURNS, compensated
from mpo_exporter.quantize.rounding import Integers
from mpo_formats import ConfigError

Matrix = NDArray[np.float64]
# Share of G's entries beside the diagonal that is taken off: those of a few thousand tokens are in part chance.
SHRINKAGE = 0.3
# Added to the diagonal of G, as a share of its mean.
DAMPING = 1e-3
# Rows that are rounded at once, without regard for each other: one part in so many of all rows, within these bounds. The kernels
# take 64 at a time, and as long for fewer.
PARTS, FEWEST_ROWS, MOST_ROWS = 32, 8, 64


def compensated_rows(
    matrix: Matrix,
    moment: Moment,
    outputs: Matrix,
    bits: int,
    group: int,
    *,
    zeros: bool = False,
    turns: int = TURNS,
    rows: int | None = None,
) -> Integers:
    """Quantises W [O, I] for inputs of second moment C [I, I] and output gradients of second moment G [O, O].

    Args:
        outputs: G, symmetric and positive semidefinite; where it is zero, the rows are rounded one by one.
        bits, group, zeros, turns: as `compensated` takes them.
        rows: that are rounded at once; None for `rows_at_once`.

    Raises:
        ConfigError: for a G of another size or with values that are not finite, and as `compensated` does.
    """
    count = len(matrix)
    rows = rows or rows_at_once(count)
    if outputs.shape != (count, count):
        raise ConfigError(f"outputs: expected a second moment of {count} x {count}, found {list(outputs.shape)}")
    require_finite(outputs, "outputs")
    order, root = row_root(outputs)
    wanted = matrix[order]
    lost = np.zeros(matrix.shape, np.float32)
    parts = []
    for start in range(0, count, rows):
        block = slice(start, min(start + rows, count))
        aim = wanted[block]
        if start:
            pull = root[:start, block].T.astype(np.float32) @ lost[:start]
            aim = aim + np.linalg.solve(root[block, block].T, pull.astype(np.float64))
        parts.append(compensated(aim, moment, bits, group, zeros=zeros, turns=turns))
        lost[block] = wanted[block] - parts[-1].matrix()
    back = np.argsort(order)
    return Integers(
        np.concatenate([part.codes for part in parts])[back],
        np.concatenate([part.scale for part in parts])[back],
        np.concatenate([part.zero for part in parts if part.zero is not None])[back] if zeros else None,
        bits,
        group,
    )


def rows_at_once(count: int) -> int:
    """The rows of a matrix of `count` rows that are rounded at once."""
    return min(max(count // PARTS, FEWEST_ROWS), MOST_ROWS)


def row_root(outputs: Matrix) -> tuple[NDArray[np.int64], Matrix]:
    """The rows in the order of processing, those of the largest G_oo first, and the upper triangular S of G in that order.

    S Sᵀ is G with its entries beside the diagonal shrunk and its diagonal raised.
    """
    diagonal = outputs.diagonal().copy()
    mean = float(diagonal.mean())
    if mean <= 0:
        return np.arange(len(outputs)), np.eye(len(outputs))
    order = np.argsort(-diagonal, kind="stable")
    whole = (1 - SHRINKAGE) * outputs[order][:, order] / mean
    whole[np.diag_indices_from(whole)] = diagonal[order] / mean + DAMPING
    backwards = torch.from_numpy(whole[::-1, ::-1].copy())
    root = torch.linalg.cholesky(backwards).numpy()
    return order, root[::-1, ::-1].copy()
