"""Linear layers as nodes: the sum of a layer's terms, applied to activations or looked up by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_formats import Dense, LinearSpec, Mpo, Quantized
from mpo_formats.layout import PLANES, TRANSFORM
from mpo_formats.packing import bf16_to_f32, hadamard_signs, unpack
from mpo_runtime.layers.transform import transform_matrices
from mpo_runtime.onnx.cores import Operator
from mpo_runtime.onnx.graph import Graph
from mpo_runtime.onnx.integers import Blocks, Integers, container, joined, lay_out
from mpo_runtime.weights.protocol import Weights


@dataclass(frozen=True, slots=True)
class Stored:
    """Integers in the graph: the blocks with the names of their codes, scales and zeros, and the name of the offset."""

    parts: list[tuple[Blocks, str, str, str]]
    offset: str


@dataclass(slots=True)
class Layers:
    """Writes the layers of a model into a graph.

    level: accuracy level of the integer products: 0 (float activations) or 4 (int8 activations).
    chi: cuts every bond to its first `chi` values; None keeps them.
    looked_up: names of layers whose rows are looked up: their zeros are stored apart from the codes.
    lookup_bits: bit widths in which the runtime looks up rows; other tables are stored as floats besides.
    """

    graph: Graph
    weights: Weights
    level: int
    chi: int | None
    looked_up: frozenset[str]
    lookup_bits: frozenset[int]
    _integers: dict[str, Stored] = field(default_factory=dict)
    _sums: dict[tuple[str, int], str] = field(default_factory=dict)
    _transforms: dict[tuple[str, str], str] = field(default_factory=dict)

    def apply(self, layer: LinearSpec, x: str) -> str:
        """The output [..., out] of a layer for the value x [..., in]."""
        x = self._transformed(x, layer)
        total = ""
        for index, term in enumerate(layer.terms):
            prefix = f"{layer.name}.{index}"
            if isinstance(term, Dense):
                y = self.graph.microsoft("FusedMatMul", x, self.floats(f"{prefix}.weight"), transB=1)
            elif isinstance(term, Quantized):
                y = self._multiply(self._stored(layer, prefix, term), x)
            else:
                y = self._operator(prefix, term).apply(self.graph, x)
            total = self.graph.add("Add", total, y) if total else y
        return self.graph.add("Add", total, self.floats(f"{layer.name}.bias")) if layer.bias else total

    def together(self, layers: Sequence[LinearSpec], x: str) -> str:
        """The outputs of layers that have the same input one after another [..., Σ out], as one product.

        An empty name where that cannot be: for other layers than integers of one form without biases.
        """
        first = layers[0]
        [term, *others] = first.terms
        kind = first.terms, first.hadamard, first.transform, None
        alike = all((one.terms, one.hadamard, one.transform, one.bias) == kind for one in layers)
        if others or not isinstance(term, Quantized) or not alike:
            return ""
        found = joined([self._laid_out(layer, f"{layer.name}.0", term) for layer in layers])
        return (
            "" if found is None else self._multiply(self._store(f"{first.name}.0", found), self._transformed(x, first))
        )

    def rows(self, layer: LinearSpec, ids: str) -> str:
        """The rows of a layer's matrix [B, S, in] for token ids [B, S]."""
        total = ""
        for index, term in enumerate(layer.terms):
            prefix = f"{layer.name}.{index}"
            if isinstance(term, Dense):
                y = self.graph.add("Gather", self.floats(f"{prefix}.weight"), ids)
            elif isinstance(term, Quantized):
                y = self._integer_rows(layer, prefix, term, ids)
            else:
                y = self._operator(prefix, term).rows(self.graph, ids)
            total = self.graph.add("Add", total, y) if total else y
        return self._transformed(total, layer, back=True)

    def _transformed(self, x: str, layer: LinearSpec, *, back: bool = False) -> str:
        """The transform T x of x [B, S, in] that a layer takes, once for all layers that take the same; `back`: x T of rows."""
        stored = layer.transform
        if not layer.hadamard and stored is None:
            return x
        name = f"hadamard.{layer.hadamard}" if stored is None else f"{stored.name}.{TRANSFORM}{'.back' if back else ''}"
        if (x, name) not in self._transforms:
            matrices = self._once(name, lambda: self._matrices(layer, back))
            block, one = (layer.hadamard, True) if stored is None else (stored.block, stored.count == 1)
            blocks = self.graph.constant([0, 0, layer.in_features // block, *([] if one else [1]), block])
            parts = self.graph.add("MatMul", self.graph.add("Reshape", x, blocks), matrices)
            whole = self.graph.constant([0, 0, layer.in_features])
            self._transforms[x, name] = self.graph.add("Reshape", parts, whole)
        return self._transforms[x, name]

    def _matrices(self, layer: LinearSpec, back: bool) -> NDArray[np.float32]:
        """What the blocks of a transformed input, as rows, are multiplied with: [b, b], or [in/b, b, b]."""
        if layer.transform is None:
            return np.asarray(hadamard_signs(layer.hadamard) * layer.hadamard**-0.5, np.float32)
        stored = transform_matrices(self.weights.array, layer.transform)
        turned: NDArray[np.float32] = np.ascontiguousarray(stored if back else stored.transpose(0, 2, 1))
        return turned.reshape(turned.shape[1:]) if layer.transform.count == 1 else turned

    def floats(self, name: str) -> str:
        """A stored float tensor in the graph's element type, once."""
        return self._once(name, lambda: widened(self.weights, name))

    def _once(self, name: str, make: Callable[[], NDArray[Any]]) -> str:
        return name if name in self.graph.initializers else self.graph.floats(name, make())

    def _operator(self, prefix: str, term: Mpo) -> Operator:
        kept = term if self.chi is None else term.truncated(self.chi)
        return Operator(self.weights, prefix, term, kept)

    def _stored(self, layer: LinearSpec, prefix: str, term: Quantized) -> Stored:
        if prefix not in self._integers:
            self._store(prefix, self._laid_out(layer, prefix, term))
        return self._integers[prefix]

    def _store(self, prefix: str, integers: Integers) -> Stored:
        parts = []
        for index, block in enumerate(integers.blocks):
            name = f"{prefix}.part{index}"
            zeros = "" if block.zeros is None else self.graph.tensor(f"{name}.zeros", block.zeros)
            codes = self.graph.tensor(f"{name}.codes", block.codes)
            parts.append((block, codes, self.graph.floats(f"{name}.scale", block.scale), zeros))
        offset = "" if integers.offset is None else self.graph.floats(f"{prefix}.offset", integers.offset)
        self._integers[prefix] = Stored(parts, offset)
        return self._integers[prefix]

    def _laid_out(self, layer: LinearSpec, prefix: str, term: Quantized) -> Integers:
        planes = [self.weights.array(f"{prefix}.q{plane}") for plane in PLANES[term.bits]]
        zero = self.weights.array(f"{prefix}.zero") if term.zeros else None
        scale = self.weights.array(f"{prefix}.scale")
        whole = layer.name not in self.looked_up
        return lay_out(unpack(planes, term.bits), term.bits, term.group, scale, zero, level=self.level, whole=whole)

    def _multiply(self, stored: Stored, x: str) -> str:
        total = ""
        for block, codes, scale, zeros in stored.parts:
            rows, groups = block.scale.shape
            columns = groups * block.group
            attributes: dict[str, Any] = {"K": columns, "N": rows, "bits": block.bits, "block_size": block.group}
            inputs = (x, codes, scale, *([zeros] if zeros else []))
            y = self.graph.microsoft("MatMulNBits", *inputs, accuracy_level=self.level, **attributes)
            total = self.graph.add("Add", total, y) if total else y
        if stored.offset:
            sums = self._group_sums(x, columns, block.group)
            y = self.graph.microsoft("FusedMatMul", sums, stored.offset, transB=1)
            total = self.graph.add("Add", total, y)
        return total

    def _group_sums(self, x: str, columns: int, group: int) -> str:
        """The sum [..., G] of each group of columns of x [..., G·group]."""
        if (x, group) not in self._sums:
            shape = self.graph.constant([0, 0, columns // group, group])
            grouped = self.graph.add("Reshape", x, shape)
            self._sums[x, group] = self.graph.add("ReduceSum", grouped, self.graph.constant([-1]), keepdims=0)
        return self._sums[x, group]

    def _integer_rows(self, layer: LinearSpec, prefix: str, term: Quantized, ids: str) -> str:
        if container(term.bits, term.group, self.level) not in self.lookup_bits:
            table = self._once(f"{prefix}.table", lambda: self._laid_out(layer, prefix, term).matrix())
            return self.graph.add("Gather", table, ids)
        stored = self._stored(layer, prefix, term)
        last = self.graph.constant([-1])
        total = ""
        for block, codes, scale, _ in stored.parts:
            # The blocks [N, G, bytes] serve the product too; the lookup wants their scales as [N, G, 1].
            inputs = (codes, ids, self.graph.add("Unsqueeze", scale, last))
            attributes: dict[str, Any] = {
                "bits": block.bits,
                "block_size": block.group,
                "gather_axis": 0,
                "quantize_axis": 2,
            }
            y = self.graph.microsoft("GatherBlockQuantized", *inputs, **attributes)  # [B, S, G, group]
            total = self.graph.add("Add", total, y) if total else y
        if stored.offset:
            shift = self.graph.add("Unsqueeze", self.graph.add("Gather", stored.offset, ids), last)
            total = self.graph.add("Add", total, shift)
        return self.graph.add("Reshape", total, self.graph.constant([0, 0, layer.in_features]))


def widened(weights: Weights, name: str) -> NDArray[Any]:
    """A stored float tensor; bf16 as float32, others as they are."""
    array = weights.array(name)
    return bf16_to_f32(array.view(np.uint16)) if weights.dtype(name) == "bf16" else array
