"""The matrices of a stored transform of inputs, in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_formats import Dense, Transform
from mpo_formats.layout import PLANES, TRANSFORM
from mpo_formats.packing import bf16_to_f32, dequantize


def transform_matrices(tensor: Callable[[str], NDArray[Any]], transform: Transform) -> NDArray[np.float32]:
    """The matrices [count, block, block] of a stored transform.

    Args:
        tensor: gives the tensors of the file by name; bf16 as uint16 bit patterns.
    """
    prefix, term = f"{transform.name}.{TRANSFORM}", transform.term
    if isinstance(term, Dense):
        raw = tensor(f"{prefix}.weight")
        found = bf16_to_f32(raw.view(np.uint16)) if term.dtype == "bf16" else raw.astype(np.float32)
    else:
        planes = [tensor(f"{prefix}.q{plane}") for plane in PLANES[term.bits]]
        zero = tensor(f"{prefix}.zero") if term.zeros else None
        found = dequantize(planes, term.bits, tensor(f"{prefix}.scale"), zero).astype(np.float32)
    return found.reshape(transform.count, transform.block, transform.block)
