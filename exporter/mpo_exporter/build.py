"""Fits the terms of one layer to its matrix and gives their tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_exporter.fit.svd import Cores, contract, sequential_svd
from mpo_exporter.quantize.rounding import Integers, round_to_nearest
from mpo_formats import ConfigError, Dense, LinearSpec, Mpo, Quantized
from mpo_formats.layout import PLANES
from mpo_formats.packing import bf16_to_f32, f32_to_bf16

Matrix = NDArray[np.float64]
Tensors = dict[str, NDArray[Any]]
# A base and the cores that correct it are fitted in turns; the best round in the Frobenius norm is kept.
ROUNDS = 2


def widen(raw: NDArray[Any], dtype: str) -> Matrix:
    """A stored float tensor in float64."""
    return (bf16_to_f32(raw) if dtype == "bf16" else raw).astype(np.float64)


def narrow(values: Matrix, dtype: str) -> NDArray[Any]:
    """float64 values in a stored float type; bf16 as bit patterns.

    Raises:
        ConfigError: when a value does not fit into half precision.
    """
    if dtype == "bf16":
        return f32_to_bf16(values.astype(np.float32))
    with np.errstate(over="ignore"):
        result = values.astype(np.float16 if dtype == "f16" else np.float32)
    if not np.isfinite(result).all():
        raise ConfigError(f"values exceed the range of {dtype}; store this layer in another type")
    return result


def build_linear(linear: LinearSpec, raw: NDArray[Any], dtype: str) -> Tensors:
    """Fits all terms of a layer to its stored matrix [out, in].

    Raises:
        ConfigError: naming the layer, when its values are not finite or do not fit.
    """
    only = linear.terms[0]
    if isinstance(only, Dense) and only.dtype == dtype and len(linear.terms) == 1:
        return {f"{linear.name}.0.weight": raw}
    try:
        return _fit(linear, widen(raw, dtype))
    except ConfigError as error:
        raise ConfigError(f"{linear.name}: {error}") from None


def _fit(linear: LinearSpec, matrix: Matrix) -> Tensors:
    rest = matrix
    best: tuple[float, list[Tensors]] | None = None
    fitted: list[tuple[Tensors, Matrix]] = [({}, np.zeros_like(matrix)) for _ in linear.terms]
    for _ in range(ROUNDS if len(linear.terms) > 1 else 1):
        for index, term in enumerate(linear.terms):
            rest = matrix - sum(part for other, (_, part) in enumerate(fitted) if other != index)
            prefix = f"{linear.name}.{index}"
            if isinstance(term, Dense):
                stored = narrow(rest, term.dtype)
                fitted[index] = ({f"{prefix}.weight": stored}, widen(stored, term.dtype))
            elif isinstance(term, Quantized):
                integers = round_to_nearest(rest, term.bits, term.group)
                fitted[index] = (dict(integer_tensors(prefix, integers)), integers.matrix())
            else:
                fitted[index] = store_cores(
                    prefix, term, sequential_svd(rest, term.out_dims, term.in_dims, max(term.bonds))
                )
        error = float(np.linalg.norm(matrix - sum(part for _, part in fitted)))
        if best is None or error < best[0]:
            best = error, [tensors for tensors, _ in fitted]
    return {name: array for tensors in best[1] for name, array in tensors.items()} if best else {}


def integer_tensors(prefix: str, integers: Integers) -> Iterator[tuple[str, NDArray[Any]]]:
    """The tensors of an integer matrix under their names."""
    for plane, array in zip(PLANES[integers.bits], integers.planes(), strict=True):
        yield f"{prefix}.q{plane}", array
    yield f"{prefix}.scale", integers.scale
    if integers.zero is not None:
        yield f"{prefix}.zero", integers.zero


def store_cores(prefix: str, term: Mpo, fit: Cores) -> tuple[Tensors, Matrix]:
    """Stores cores [χ_{k−1}, o, i, χ_k] as [χ_k, χ_{k−1}, o, i] in the term's type, and the matrix that this type gives."""
    tensors: Tensors = {}
    kept = []
    for index, (core, shape) in enumerate(zip(fit.cores, term.core_shapes(), strict=True)):
        name = f"{prefix}.core{index}"
        ordered = np.ascontiguousarray(core.transpose(3, 0, 1, 2))
        if term.core_bits:
            integers = round_to_nearest(ordered.reshape(shape[0] * shape[1], -1), term.core_bits, term.group)
            tensors.update(integer_tensors(name, integers))
            rounded = integers.matrix().reshape(shape)
        else:
            tensors[name] = narrow(ordered, term.dtype)
            rounded = widen(tensors[name], term.dtype)
        kept.append(rounded.transpose(1, 2, 3, 0))
    return tensors, contract(kept)
