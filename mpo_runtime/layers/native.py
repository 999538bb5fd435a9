"""A linear layer for the native backend: its terms are views of the mapped file; only a bias is copied."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import mpo_runtime._native as _native
from mpo_formats import Dense, LinearSpec, Mpo, Quantized
from mpo_formats.layout import PLANES
from mpo_formats.packing import bf16_to_f32
from mpo_runtime.layers.contraction import densify_from, sweep_cost
from mpo_runtime.layers.transform import transform_matrices
from mpo_runtime.weights.protocol import Weights


def load_linear(
    weights: Weights, spec: LinearSpec, *, chi: int | None, transforms: dict[str, _native.Transform] | None = None
) -> _native.Linear:
    """A layer whose terms are read directly from the mapped file, every bond cut to its first `chi` values.

    Args:
        transforms: those of other layers by name; layers that share one are computed together.

    Raises:
        ValueError: when a tensor has another size than the layer table says, which cannot happen in a checked file.
    """
    matrices, operators = [], []
    for index, term in enumerate(spec.terms):
        prefix = f"{spec.name}.{index}"
        if isinstance(term, Mpo):
            operators.append(load_operator(weights, prefix, term, term if chi is None else term.truncated(chi)))
        elif isinstance(term, Dense):
            matrices.append(dense_matrix(weights, f"{prefix}.weight", spec.out_features, spec.in_features))
        else:
            matrices.append(integer_matrix(weights, prefix, term, spec.out_features, spec.in_features))
    bias = None if spec.bias is None else float_vector(weights, f"{spec.name}.bias")
    transform = load_transform(weights, spec, {} if transforms is None else transforms)
    sizes = spec.out_features, spec.in_features
    return _native.Linear(spec.name, *sizes, matrices, operators, bias, spec.hadamard, transform)


def load_transform(weights: Weights, spec: LinearSpec, known: dict[str, _native.Transform]) -> _native.Transform | None:
    """The stored transform of a layer's input, one of those that are known or now among them; None where it has none."""
    stored = spec.transform
    if stored is None:
        return None
    if stored.name not in known:
        matrices = transform_matrices(weights.array, stored)
        known[stored.name] = _native.Transform(stored.count, stored.block, matrices.reshape(-1))
    return known[stored.name]


def load_operator(weights: Weights, prefix: str, stored: Mpo, kept: Mpo) -> _native.Operator:
    """An Mpo term, of `stored` the leading part that `kept` describes, with the cheapest order for one and for many tokens."""
    cores = []
    for index, (full, part) in enumerate(zip(stored.core_shapes(), kept.core_shapes(), strict=True)):
        name = f"{prefix}.core{index}"
        rows, columns = full[0] * full[1], full[2] * full[3]
        if stored.core_bits:
            as_integers = Quantized(stored.core_bits, stored.group, False)
            matrix = integer_matrix(weights, name, as_integers, rows, columns)
        else:
            matrix = dense_matrix(weights, name, rows, columns)
        right, left, out, inner = part
        cores.append(_native.Core(matrix, left, right, out, inner, full[1]))
    reverse = sweep_cost(kept, 1, reverse=True) < sweep_cost(kept, 1, reverse=False)
    return _native.Operator(cores, reverse, densify_from(kept))


def dense_matrix(weights: Weights, name: str, rows: int, columns: int) -> _native.Matrix:
    """A float tensor as a matrix [rows, columns]."""
    return _native.Matrix.dense(name, weights.dtype(name), rows, columns, raw_bytes(weights.array(name)))


def integer_matrix(weights: Weights, prefix: str, term: Quantized, rows: int, columns: int) -> _native.Matrix:
    """The planes, scales and zeros under `prefix` as a matrix [rows, columns]."""
    planes = [raw_bytes(weights.array(f"{prefix}.q{plane}")) for plane in PLANES[term.bits]]
    scale = raw_bytes(weights.array(f"{prefix}.scale"))
    zero = raw_bytes(weights.array(f"{prefix}.zero")) if term.zeros else None
    return _native.Matrix.integer(prefix, term.bits, rows, columns, term.group, planes, scale, zero)


def raw_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes of a contiguous array, as a view."""
    return array.reshape(-1).view(np.uint8)


def float_vector(weights: Weights, name: str) -> NDArray[np.float32]:
    """A stored vector as float32."""
    array = weights.array(name)
    return bf16_to_f32(array.view(np.uint16)) if weights.dtype(name) == "bf16" else array.astype(np.float32)
