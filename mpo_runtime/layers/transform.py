"""The matrices of a stored transform of inputs, in numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpo_formats import Dense, Transform
from mpo_formats.layout import PLANES, TRANSFORM
from mpo_formats.packing import bf16_to_f32, dequantize
from mpo_runtime.weights.protocol import Weights


def transform_matrices(weights: Weights, transform: Transform) -> NDArray[np.float32]:
    """The matrices [count, block, block] of a stored transform."""
    prefix, term = f"{transform.name}.{TRANSFORM}", transform.term
    if isinstance(term, Dense):
        raw = weights.array(f"{prefix}.weight")
        found = bf16_to_f32(raw.view(np.uint16)) if term.dtype == "bf16" else raw.astype(np.float32)
    else:
        planes = [weights.array(f"{prefix}.q{plane}") for plane in PLANES[term.bits]]
        zero = weights.array(f"{prefix}.zero") if term.zeros else None
        found = dequantize(planes, term.bits, weights.array(f"{prefix}.scale"), zero).astype(np.float32)
    return found.reshape(transform.count, transform.block, transform.block)
