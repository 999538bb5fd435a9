"""Matrices and moments for the tests of the fits, and their errors by definition."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpo_exporter.fit.common import Cores
from mpo_formats import reference

Matrix = NDArray[np.float64]
Dims = tuple[int, ...]
SHAPES: list[tuple[Dims, Dims]] = [((12, 1), (1, 16)), ((4, 3), (4, 4)), ((3, 4), (2, 8)), ((6, 2), (8, 2))]


def case(rows: int, columns: int, seed: int = 0) -> tuple[Matrix, Matrix]:
    """A matrix with a decaying spectrum and a moment of inputs that are strongly correlated."""
    source = np.random.default_rng(seed)
    decay = 1 / np.arange(1.0, columns + 1)
    matrix = source.standard_normal((rows, columns)) * np.sqrt(decay) @ source.standard_normal((columns, columns))
    inputs = source.standard_normal((8 * columns, columns)) * decay @ source.standard_normal((columns, columns))
    return matrix, inputs.T @ inputs / len(inputs)


def true_error(matrix: Matrix, cores: Cores | tuple[Matrix, ...], moment: Matrix) -> float:
    """√tr[(W − Ŵ) C (W − Ŵ)ᵀ], the operator multiplied out by the format's own slow reference."""
    residual = matrix - reference.contract(list(cores.cores if isinstance(cores, Cores) else cores))
    return float(np.sqrt(np.trace(residual @ moment @ residual.T)))


def prefix(cores: tuple[Matrix, ...], chi: int) -> tuple[Matrix, ...]:
    """The cores with every bond cut to its first χ values."""
    last = len(cores) - 1
    return tuple(core[: chi if k else None, :, :, : chi if k < last else None] for k, core in enumerate(cores))
