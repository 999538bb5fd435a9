"""The same rounding as in gptq.py, rounding.py and grid.py, by the native kernels and with all their threads.

Where no kernels were built, and in `torch_alone`, the torch code runs. It is what the kernels are tested against.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_exporter.calibrate.hessian import Hessian
from mpo_exporter.quantize.grid import SHRINK, TURNS, Grid
from mpo_runtime import native

Single = NDArray[np.float32]
# Codes [rows, columns], scales and zeros [rows, groups].
Stored = tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]
# Rows of at least so many columns are rounded with products in bf16, which are too rough for more passes than these.
FAST_COLUMNS, FAST_PASSES = 2048, 2
_allowed = True


def usable(device: str = "cpu") -> bool:
    """Whether the native kernels are there, were not ruled out, and run on the device."""
    return _allowed and device == "cpu" and native.available()


@contextmanager
def torch_alone() -> Iterator[None]:
    """Runs the torch code in the place of the kernels, for tests and benchmarks."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def compensated(matrix: Single, hessian: Hessian, grid: Grid, passes: int, tolerance: float) -> Stored:
    """Error-compensated rounding of a matrix [O, I], with at most `passes` of descent for every 64 rows.

    Products between blocks of columns are computed in bf16 where the CPU has units for that and a row is long.
    """
    out = _empty(matrix, grid.group)
    fast = matrix.shape[1] >= FAST_COLUMNS and _module().has_bf16_products()
    _module().fit_compensated(
        np.ascontiguousarray(matrix),
        hessian.order.numpy(),
        np.ascontiguousarray(hessian.matrix.numpy()),
        np.ascontiguousarray(hessian.feedback.numpy()),
        np.ascontiguousarray(hessian.weight.numpy()),
        _tuple(grid),
        SHRINK.tolist(),
        TURNS,
        min(passes, FAST_PASSES) if fast else passes,
        tolerance,
        fast,
        *_bits(out),
    )
    return out


def nearest(
    matrix: Single, grid: Grid, weight: Single | None = None, factors: Sequence[float] | None = None, turns: int = TURNS
) -> Stored:
    """Every value of a matrix [O, I] to its nearest code, on grids with the least weighted error.

    Args:
        weight: of each column [I]; None for ones.
        factors: of the range of a group, which are tried; None for those of grid.py.
        turns: of least squares that follow.
    """
    out = _empty(matrix, grid.group)
    weight = np.ones(matrix.shape[1], np.float32) if weight is None else np.ascontiguousarray(weight)
    tried = SHRINK.tolist() if factors is None else list(factors)
    _module().fit_nearest(np.ascontiguousarray(matrix), weight, _tuple(grid), tried, turns, *_bits(out))
    return out


def errors(matrix: Single, weight: Single, grids: Sequence[Grid]) -> Single:
    """Σ_j weight_j (w − ŵ)_j² of each row of a matrix [O, I] on each of several grids: [grids, O], in one pass."""
    out = np.empty((len(grids), len(matrix)), np.float32)
    _module().fit_errors(
        np.ascontiguousarray(matrix),
        np.ascontiguousarray(weight),
        [_tuple(grid) for grid in grids],
        SHRINK.tolist(),
        TURNS,
        out,
    )
    return out


def residual(matrix: Single, weight: Single, grid: Grid) -> Single:
    """w − ŵ [O, I] of rounding a matrix to nearest on searched grids."""
    out = np.empty(matrix.shape, np.float32)
    _module().fit_residual(
        np.ascontiguousarray(matrix), np.ascontiguousarray(weight), _tuple(grid), SHRINK.tolist(), TURNS, out
    )
    return out


def _module() -> Any:
    import mpo_runtime._native as module

    return module


def _tuple(grid: Grid) -> tuple[int, int, bool]:
    return grid.bits, grid.group, grid.zeros


def _empty(matrix: Single, group: int) -> Stored:
    groups = (len(matrix), matrix.shape[1] // group)
    return np.empty(matrix.shape, np.uint8), np.empty(groups, np.float16), np.empty(groups, np.float16)


def _bits(out: Stored) -> tuple[NDArray[np.uint8], NDArray[np.uint16], NDArray[np.uint16]]:
    codes, scale, zero = out
    return codes, scale.view(np.uint16), zero.view(np.uint16)
