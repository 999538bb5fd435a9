"""Layers of integers with wide inputs, fitted some columns at a time (see calibrate/shortfall.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from mpo_exporter.calibrate.moments import Moment, Parts
from mpo_exporter.fit.layer import Built, joined_parts, quantized_part
from mpo_exporter.quantize.rounding import Integers
from mpo_formats import LinearSpec

Matrix = NDArray[np.float64]


def integer_parts(
    linears: Mapping[str, LinearSpec],
    takes: Callable[[str], bool],
    finished: Callable[[LinearSpec, Built, float], None],
) -> Parts:
    """Fits parts of layers of integers alone.

    Args:
        takes: whether the layer of that name may be fitted so.
        finished: is given a layer, its tensors and the seconds that it took, when its last part is fitted.
    """
    found: list[Integers] = []
    start = 0.0

    def build(name: str, columns: slice, matrix: Matrix, moment: Moment) -> NDArray[np.float32]:
        nonlocal start
        linear = linears[name]
        if columns.start == 0:
            found.clear()
            start = time.perf_counter()
        integers, stored = quantized_part(linear, matrix, moment)
        found.append(integers)
        if columns.stop == linear.in_features:
            finished(linear, joined_parts(linear, found), time.perf_counter() - start)
        return stored.astype(np.float32)

    return Parts(takes, build)
