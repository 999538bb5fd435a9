"""Cuts a layer for tensor parallelism: a share of its rows, or of its columns, whose products put together are the layer's.

Integers and dense matrices are cut where they lie, integers by whole groups. Of cores, the one is cut whose factor the share
covers in part: row and column indices are mixed-radix numbers with the first core's factor as the highest digit, so a
contiguous share is a range of the first core's factor, or one value of it and a range of the second's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpo_formats import ConfigError, Dense, FormatError, LinearSpec, Mpo, Quantized, Term, Transform
from mpo_formats.layout import PLANES, transform_tensors
from mpo_formats.packing import bf16_to_f32, dequantize

Arrays = dict[str, NDArray[Any]]
Axis = Literal["rows", "columns"]
# The element types of SPEC.md by those of numpy; bf16 as its bit patterns.
TYPES = {"float32": "f32", "float16": "f16", "uint16": "bf16", "uint8": "u8"}


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer with its tensors by their names in a `.mpo` file; gives them as `mpo_runtime.weights.protocol` does."""

    spec: LinearSpec
    arrays: Arrays

    def array(self, name: str) -> NDArray[Any]:
        """The tensor of that name; bf16 as uint16 bit patterns."""
        return self.arrays[name]

    def dtype(self, name: str) -> str:
        """Its element type."""
        return TYPES[self.arrays[name].dtype.name]


def share(layer: Layer, axis: Axis, start: int, stop: int) -> Layer:
    """The rows or columns `start` to `stop` of a layer, without its bias.

    Raises:
        ConfigError: where the cut goes through a group of integers or cannot be made in the cores, naming the layer.
    """
    spec = layer.spec
    rows = (start, stop) if axis == "rows" else (0, spec.out_features)
    columns = (start, stop) if axis == "columns" else (0, spec.in_features)
    block = spec.hadamard if spec.transform is None else spec.transform.block
    if block and (columns[0] % block or columns[1] % block):
        raise ConfigError(
            f"{spec.name}: columns {columns[0]} to {columns[1]} cut through a transform of {block} inputs; "
            "use fewer ranks, or export with --transforms none"
        )
    transform, arrays = cut_transform(layer, columns)
    terms: list[Term] = []
    for index, term in enumerate(spec.terms):
        prefix = f"{spec.name}.{index}"
        if (rows, columns) == ((0, spec.out_features), (0, spec.in_features)):
            found = {name: array for name, array in layer.arrays.items() if name.startswith(f"{prefix}.")}
            cut: Term = term
        elif isinstance(term, Dense):
            weight = layer.array(f"{prefix}.weight")[slice(*rows), slice(*columns)]
            cut, found = term, {f"{prefix}.weight": weight}
        elif isinstance(term, Quantized):
            cut, found = term, cut_integers(layer, prefix, term, rows, columns)
        else:
            cut, found = cut_cores(layer, prefix, term, axis, start, stop)
        terms.append(cut)
        arrays |= {name: np.ascontiguousarray(array) for name, array in found.items()}
    sizes = rows[1] - rows[0], columns[1] - columns[0]
    return Layer(LinearSpec(spec.name, *sizes, None, tuple(terms), spec.hadamard, transform), arrays)


def cut_transform(layer: Layer, columns: tuple[int, int]) -> tuple[Transform | None, Arrays]:
    """The stored transform of whole blocks of a layer's inputs."""
    stored = layer.spec.transform
    if stored is None:
        return None, {}
    rows = slice(None) if stored.count == 1 else slice(*columns)
    found = {tensor.name: layer.array(tensor.name)[rows] for tensor in transform_tensors(stored)}
    count = 1 if stored.count == 1 else (columns[1] - columns[0]) // stored.block
    return replace(stored, count=count), {name: np.ascontiguousarray(array) for name, array in found.items()}


def cut_integers(layer: Layer, prefix: str, term: Quantized, rows: tuple[int, int], columns: tuple[int, int]) -> Arrays:
    """Planes, scales and zeros of whole groups."""
    if columns[0] % term.group or columns[1] % term.group:
        raise ConfigError(
            f"{layer.spec.name}: columns {columns[0]} to {columns[1]} cut through a group of {term.group}; "
            "use fewer ranks, or export with a smaller group"
        )
    groups = slice(columns[0] // term.group, columns[1] // term.group)
    parts = [*(f"q{plane}" for plane in PLANES[term.bits]), "scale", *(["zero"] if term.zeros else [])]
    return {f"{prefix}.{part}": layer.array(f"{prefix}.{part}")[slice(*rows), groups] for part in parts}


def cut_cores(layer: Layer, prefix: str, term: Mpo, axis: Axis, start: int, stop: int) -> tuple[Term, Arrays]:
    """The term for a share, as float32 cores; as a dense matrix where the share has a lower rank than the bonds."""
    cores = [float_core(layer, f"{prefix}.core{index}", term, index) for index in range(len(term.out_dims))]
    dims = list(term.out_dims if axis == "rows" else term.in_dims)
    for index, (first, last) in digits(layer.spec.name, tuple(dims), start, stop):
        picked = slice(first, last)
        cores[index] = cores[index][:, :, picked] if axis == "rows" else cores[index][:, :, :, picked]
        dims[index] = last - first
    try:
        kept = replace(
            term,
            out_dims=tuple(dims) if axis == "rows" else term.out_dims,
            in_dims=tuple(dims) if axis == "columns" else term.in_dims,
            dtype="f32",
            group=0,
        )
    except FormatError:  # a bond above the full rank of the share, whose matrix is then the smaller form
        return Dense("f32"), {f"{prefix}.weight": contracted(cores)}
    return kept, {f"{prefix}.core{index}": core for index, core in enumerate(cores)}


def digits(name: str, dims: tuple[int, ...], start: int, stop: int) -> list[tuple[int, tuple[int, int]]]:
    """The ranges of factors that make up `start` to `stop`: (core, (first, last)), highest digit first."""
    found: list[tuple[int, tuple[int, int]]] = []
    low, size, rest = start, stop - start, math.prod(dims)
    for index, factor in enumerate(dims):
        rest //= factor
        if size >= rest:
            if size % rest or low % rest:
                break
            return [*found, (index, (low // rest, (low + size) // rest))]
        if low // rest != (low + size - 1) // rest:
            break
        found.append((index, (low // rest, low // rest + 1)))
        low %= rest
    raise ConfigError(
        f"{name}: {start} to {stop} is no range of the factors {list(dims)} of its cores; use fewer ranks"
    )


def float_core(layer: Layer, name: str, term: Mpo, index: int) -> NDArray[np.float32]:
    """A core [χ_k, χ_{k−1}, o_k, i_k] as float32."""
    if term.core_bits:
        planes = [layer.array(f"{name}.q{plane}") for plane in PLANES[term.core_bits]]
        found: NDArray[Any] = dequantize(planes, term.core_bits, layer.array(f"{name}.scale"), None)
    else:
        raw = layer.array(name)
        found = bf16_to_f32(raw) if layer.dtype(name) == "bf16" else raw
    return found.astype(np.float32).reshape(term.core_shapes()[index])


def contracted(cores: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The matrix of cores [χ_k, χ_{k−1}, o_k, i_k]."""
    result = np.ones((1, 1, 1), np.float32)  # [O, I, χ]
    for core in cores:
        result = np.einsum("OIa,baoi->OoIib", result, core)
        result = result.reshape(result.shape[0] * result.shape[1], -1, result.shape[4])
    return np.ascontiguousarray(result[..., 0])
