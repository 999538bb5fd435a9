"""The terms of linear layers on the device, and layers with one input in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from mpo_formats import Dense, LinearSpec, Mpo, Quantized
from mpo_formats.layout import PLANES
from mpo_runtime.backends.triton import products
from mpo_runtime.backends.triton.lazy import Parts
from mpo_runtime.backends.triton.tiles import FEW, Tiles
from mpo_runtime.layers.linear import Linear, MpoTerm, block_transform, float_tensor, load_cores, load_transform, widen
from mpo_runtime.weights.protocol import Weights

# Matrices that one launch multiplies: queries, keys and values.
MOST_MATRICES = 3
# Columns of a looked-up row in a program, and of a tile of a matrix that is written as floats; its rows.
ROW_COLUMNS, MATRIX_ROWS = 256, 16
# From so many tokens on a matrix is written as floats and multiplied by torch: unpacking it for each tile of tokens, between
# which the matrix units wait, then takes longer than writing and reading 2 bytes a weight. Larger matrices (a vocabulary's)
# are multiplied as they are stored, because of the memory.
LONG_PROMPT, LARGEST_MATRIX = 512, 1 << 28


class IntegerTerm:
    """A Quantized term on the device: planes, scales and zeros as the file has them."""

    def __init__(
        self, weights: Weights, prefix: str, term: Quantized, device: torch.device, settings: Settings
    ) -> None:
        def put(name: str) -> Tensor:
            return torch.from_numpy(np.array(weights.array(f"{prefix}.{name}"))).to(device)

        bits = PLANES[term.bits]
        self.planes = [words(put(f"q{plane}")) for plane in bits]
        self.low, self.high = bits[0], bits[1] if len(bits) > 1 else 0
        self.scale = put("scale")
        self.zero = put("zero") if term.zeros else None
        self.bits, self.group, self.settings = term.bits, term.group, settings
        self.outputs, self.columns = self.scale.shape[0], self.scale.shape[1] * term.group

    def arguments(self) -> tuple[Tensor | int, ...]:
        """Planes, scales, zeros and the number of rows as the kernels take them; what is absent is not read."""
        zero = self.scale if self.zero is None else self.zero
        return (self.planes[0], self.planes[-1], self.scale, zero, self.outputs)

    def constants(self, index: str = "") -> dict[str, Any]:
        """What the kernels are compiled for; `index` is the matrix's number in a launch."""
        stored = {"LOW": self.low, "HIGH": self.high, "GROUP": self.group, "ZEROS": self.zero is not None}
        return {f"{name}{index}": value for name, value in stored.items()}

    def apply(self, x: Tensor) -> Tensor:
        """Maps x [T, in] to [T, out]."""
        y = multiply([self], x)
        return Parts(y, 0, self.outputs, x.shape[:-1]).sum()

    def rows(self, ids: Tensor) -> Tensor:
        """The rows `ids` [T], as [T, in]."""
        columns = max(self.group, ROW_COLUMNS)
        y = torch.empty((ids.shape[0], self.columns), dtype=torch.float32, device=ids.device)
        grid = (ids.shape[0], triton.cdiv(self.columns, columns))
        products.integer_rows[grid](
            ids, *self.arguments()[:4], y, self.outputs, INPUTS=self.columns, **self.constants(), COLUMNS=columns
        )
        return y

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [out, in], rounded to a float type."""
        columns = max(self.group, ROW_COLUMNS)
        y = torch.empty((self.outputs, self.columns), dtype=dtype, device=self.scale.device)
        products.integer_matrix[(triton.cdiv(self.outputs, MATRIX_ROWS), triton.cdiv(self.columns, columns))](
            *self.arguments()[:4], y, self.outputs, INPUTS=self.columns, **self.constants(),
            ROWS=MATRIX_ROWS, COLUMNS=columns,
        )  # fmt: skip
        return y


def words(plane: Tensor) -> Tensor:
    """A plane of R rows in words of 32 bits [R, N] where its rows are whole words, else in bytes."""
    rows = plane.flatten(1)
    return rows if rows.shape[1] % 4 else rows.view(torch.int32)


class Settings:
    """How a backend multiplies: the tiles of its card, and in which type.

    Args:
        mode: BF16, EXACT or EMULATED of products.py.
    """

    def __init__(self, tiles: Tiles, mode: int) -> None:
        self.tiles, self.mode = tiles, mode
        self.dtype = torch.float32 if mode == products.EXACT else torch.bfloat16


def multiply(terms: Sequence[IntegerTerm], x: Tensor) -> Tensor:
    """x [T, in] times the matrices of one to three terms with the same input, side by side, in one launch.

    Returns [P, T, out], whose sum over P is meant.
    """
    tokens, x, columns, settings = x.shape[0], x.contiguous(), terms[0].columns, terms[0].settings
    if tokens >= LONG_PROMPT and all(term.outputs * columns <= LARGEST_MATRIX for term in terms):
        return multiply_as_floats(terms, x)
    # In float32 a tile for many tokens would need more than all registers, and more shared memory than some cards have.
    tile = settings.tiles.choose(
        min(tokens, FEW) if settings.dtype == torch.float32 else tokens, max(t.bits for t in terms)
    )
    tiles = sum(triton.cdiv(term.outputs, tile.rows) for term in terms)
    parts = tile.parts(tiles, tokens, columns)
    width = sum(term.outputs for term in terms)
    y = x.new_empty((parts, tokens, width), dtype=torch.float32)
    filled = [*terms, *[terms[0]] * (MOST_MATRICES - len(terms))]
    arguments = [argument for term in filled for argument in term.arguments()]
    constants: dict[str, Any] = {}
    for index, term in enumerate(filled):
        constants |= term.constants(str(index))
    products.integer_products[(tiles, triton.cdiv(tokens, tile.tokens), parts)](
        x, y, tokens, width, *arguments, INPUTS=columns, MATRICES=len(terms), **constants,
        ROWS=tile.rows, COLUMNS=tile.columns, TOKENS=tile.tokens, PARTS=parts, MODE=settings.mode, STAGES=tile.stages,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def multiply_as_floats(terms: Sequence[IntegerTerm], x: Tensor) -> Tensor:
    """What `multiply` returns, [1, T, out], by torch's products with the matrices as floats, one after the other."""
    y = x.new_empty((1, x.shape[0], sum(term.outputs for term in terms)), dtype=torch.float32)
    x, first = x.to(terms[0].settings.dtype), 0
    for term in terms:
        y[0, :, first : first + term.outputs] = F.linear(x, term.weight(x.dtype))
        first += term.outputs
    return y


class DenseTerm:
    """A Dense term on the device, in the type in which it is multiplied."""

    def __init__(self, weight: Tensor) -> None:
        self.held = weight

    def apply(self, x: Tensor) -> Tensor:
        """Maps x [T, in] to [T, out]."""
        return F.linear(x.to(self.held.dtype), self.held).float()

    def rows(self, ids: Tensor) -> Tensor:
        """The rows `ids` [T], as [T, in]."""
        return F.embedding(ids, self.held).float()

    def weight(self) -> Tensor:
        """The matrix [out, in]."""
        return self.held.float()


class CoreTerm:
    """An Mpo term whose cores are multiplied in another type than float32."""

    def __init__(self, term: MpoTerm) -> None:
        self.term = term

    def apply(self, x: Tensor) -> Tensor:
        """Maps x [T, in] to [T, out]."""
        return self.term.apply(x.to(self.term.cores[0].dtype)).float()

    def rows(self, ids: Tensor) -> Tensor:
        """The rows `ids` [T], as [T, in]."""
        return self.term.rows(ids).float()

    def weight(self) -> Tensor:
        """The matrix [out, in]."""
        return self.term.weight().float()


def load_layer(weights: Weights, spec: LinearSpec, chi: int | None, device: torch.device, settings: Settings) -> Linear:
    """A layer on the device: integers as they are stored, dense matrices and cores in the type of products."""
    terms: list[Any] = []
    for index, term in enumerate(spec.terms):
        prefix = f"{spec.name}.{index}"
        if isinstance(term, Quantized):
            terms.append(IntegerTerm(weights, prefix, term, device, settings))
        elif isinstance(term, Dense):
            matrix = widen(weights.array(f"{prefix}.weight"), weights.dtype(f"{prefix}.weight"))
            terms.append(DenseTerm(matrix.to(settings.dtype).to(device)))
        elif isinstance(term, Mpo):
            kept = term if chi is None else term.truncated(chi)
            cores = load_cores(weights, prefix, term, kept, device)
            terms.append(CoreTerm(MpoTerm(kept, [core.to(settings.dtype) for core in cores])))
    bias = None if spec.bias is None else float_tensor(weights, f"{spec.name}.bias").to(device)
    return Linear(spec, terms, bias, load_transform(weights, spec, device))


class Group:
    """Layers with one input, whose integers or dense matrices are multiplied in one launch; their other terms beside it.

    Where all are stored alike, their tensors are put one below the other, so that the launch has a single matrix.

    Args:
        layers: at most three, with the same inputs and transform, and each with one integer term, or each with one dense one.
    """

    def __init__(self, layers: Sequence[Linear]) -> None:
        self.layers = layers
        self.sizes = [layer.spec.out_features for layer in layers]
        found = [main_term(layer) for layer in layers]
        self.rest = [
            [term for term in layer.terms if term is not main] for layer, main in zip(layers, found, strict=True)
        ]
        self.terms: list[Any] = [joined(found)] if alike(found) else found

    @staticmethod
    def fits(layers: Sequence[Linear]) -> bool:
        """Whether layers can be grouped."""
        first, mains = layers[0].spec, [main_term(layer) for layer in layers]
        kind = first.in_features, first.hadamard, first.transform
        same = all((one.spec.in_features, one.spec.hadamard, one.spec.transform) == kind for one in layers)
        integers = all(isinstance(main, IntegerTerm) for main in mains)
        return same and 1 < len(layers) <= MOST_MATRICES and (integers or alike(mains))

    def apply(self, x: Tensor) -> list[Tensor | Parts]:
        """Maps x [..., in] to each layer's [..., out]."""
        first_layer, leading = self.layers[0], x.shape[:-1]
        flat = block_transform(x.reshape(-1, first_layer.spec.in_features), first_layer.transform)
        y = multiply(self.terms, flat) if isinstance(self.terms[0], IntegerTerm) else self.terms[0].apply(flat)[None]
        results: list[Tensor | Parts] = []
        first = 0
        for size, layer, rest in zip(self.sizes, self.layers, self.rest, strict=True):
            part = Parts(y, first, size, leading)
            first += size
            results.append(finished(part, layer, rest, flat))
        return results


def finished(part: Parts, layer: Linear, rest: Sequence[Any], flat: Tensor) -> Tensor | Parts:
    """A layer's product with its other terms [T, in] → [T, out] and its bias added; the product itself where it has none."""
    if not rest and layer.bias is None:
        return part
    y = part.sum()
    for term in rest:
        y = y + term.apply(flat).view(y.shape)
    return y if layer.bias is None else y + layer.bias


def apply_layer(layer: Linear, x: Tensor) -> Tensor | Parts:
    """Maps x [..., in] to [..., out], the integers' sum left to whoever reads it."""
    main = main_term(layer)
    if not isinstance(main, IntegerTerm):
        return layer.apply(x)
    flat = block_transform(x.reshape(-1, layer.spec.in_features), layer.transform)
    part = Parts(multiply([main], flat), 0, main.outputs, x.shape[:-1])
    terms: list[Any] = list(layer.terms)
    return finished(part, layer, [term for term in terms if term is not main], flat)


def main_term(layer: Linear) -> Any:
    """The one integer term of a layer, else its one dense one; None where it has neither or several."""
    terms: list[Any] = list(layer.terms)
    for kind in (IntegerTerm, DenseTerm):
        found = [term for term in terms if isinstance(term, kind)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def alike(terms: Sequence[Any]) -> bool:
    """Whether terms are stored in the same way."""
    if any(isinstance(term, IntegerTerm) for term in terms):
        return all(isinstance(term, IntegerTerm) and term.constants() == terms[0].constants() for term in terms)
    return all(isinstance(term, DenseTerm) for term in terms)


def joined(terms: Sequence[Any]) -> Any:
    """One term with the rows of all; the terms become views of it, so that nothing is held twice."""
    first = terms[0]
    sizes = [term.weight().shape[0] if isinstance(term, DenseTerm) else term.outputs for term in terms]
    if isinstance(first, DenseTerm):
        whole = DenseTerm(torch.cat([term.held for term in terms]))
        for term, part in zip(terms, whole.held.split_with_sizes(sizes), strict=True):
            term.held = part
        return whole
    one = object.__new__(IntegerTerm)
    one.__dict__.update(first.__dict__)
    one.planes = [torch.cat([term.planes[index] for term in terms]) for index in range(len(first.planes))]
    one.scale = torch.cat([term.scale for term in terms])
    one.zero = None if first.zero is None else torch.cat([term.zero for term in terms])
    one.outputs = sum(sizes)
    for index in range(len(first.planes)):
        for term, part in zip(terms, one.planes[index].split_with_sizes(sizes), strict=True):
            term.planes[index] = part
    for term, part in zip(terms, one.scale.split_with_sizes(sizes), strict=True):
        term.scale = part
    if one.zero is not None:
        for term, part in zip(terms, one.zero.split_with_sizes(sizes), strict=True):
            term.zero = part
    return one
