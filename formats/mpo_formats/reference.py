"""Rebuilds matrices from a `.mpo` file in float64: slow, short, and what every fast path is tested against."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpo_formats.layout import PLANES, TRANSFORM
from mpo_formats.packing import bf16_to_f32, block_transform, dequantize, hadamard_transform
from mpo_formats.reader import MpoFile
from mpo_formats.spec import Dense, LinearSpec, Mpo, Quantized, Transform

Matrix = NDArray[np.float64]


def float_tensor(file: MpoFile, name: str) -> Matrix:
    """A floating-point tensor widened to float64, exactly."""
    raw = file.array(name)
    return (bf16_to_f32(raw) if file.dtype(name) == "bf16" else raw).astype(np.float64)


def integer_tensor(file: MpoFile, prefix: str, bits: int, zeros: bool) -> Matrix:
    """An integer matrix [rows, columns] dequantised to float64."""
    planes = [file.array(f"{prefix}.q{plane}") for plane in PLANES[bits]]
    zero = file.array(f"{prefix}.zero") if zeros else None
    return dequantize(planes, bits, file.array(f"{prefix}.scale"), zero)


def cores(file: MpoFile, prefix: str, term: Mpo, chi: int | None = None) -> list[Matrix]:
    """The cores [χ_{k−1}, o_k, i_k, χ_k] of an MPO term, every bond cut to its first `chi` values."""
    kept = term if chi is None else term.truncated(chi)
    result = []
    for index, (stored, wanted) in enumerate(zip(term.core_shapes(), kept.core_shapes(), strict=True)):
        name = f"{prefix}.core{index}"
        if term.core_bits:
            core = integer_tensor(file, name, term.core_bits, zeros=False).reshape(stored)
        else:
            core = float_tensor(file, name)
        result.append(core[: wanted[0], : wanted[1]].transpose(1, 2, 3, 0))
    return result


def contract(parts: list[Matrix]) -> Matrix:
    """Contracts cores [χ_{k−1}, o_k, i_k, χ_k] into the matrix [Π o_k, Π i_k]."""
    result = np.ones((1, 1, 1))
    for core in parts:
        # [O, I, χ] × [χ, o, i, χ'] -> [O, o, I, i, χ']
        rows, columns, _ = result.shape
        result = np.einsum("OIa,aoib->OoIib", result, core)
        result = result.reshape(rows * core.shape[1], columns * core.shape[2], core.shape[3])
    return result[..., 0]


def transform_matrices(file: MpoFile, transform: Transform) -> Matrix:
    """The matrices [count, block, block] of a stored transform."""
    prefix, term = f"{transform.name}.{TRANSFORM}", transform.term
    if isinstance(term, Dense):
        found = float_tensor(file, f"{prefix}.weight")
    else:
        found = integer_tensor(file, prefix, term.bits, term.zeros)
    return found.reshape(transform.count, transform.block, transform.block)


def matrix(file: MpoFile, linear: LinearSpec, chi: int | None = None) -> Matrix:
    """The weight [out, in] of a layer: the sum of its terms, MPO bonds cut to `chi`, in the basis of the layer's input."""
    total = np.zeros((linear.out_features, linear.in_features))
    for index, term in enumerate(linear.terms):
        prefix = f"{linear.name}.{index}"
        if isinstance(term, Dense):
            total += float_tensor(file, f"{prefix}.weight")
        elif isinstance(term, Quantized):
            total += integer_tensor(file, prefix, term.bits, term.zeros)
        else:
            total += contract(cores(file, prefix, term, chi))
    if linear.transform is None:
        return hadamard_transform(total, linear.hadamard)
    return block_transform(total, transform_matrices(file, linear.transform).transpose(0, 2, 1))
