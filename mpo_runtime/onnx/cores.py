"""An Mpo term as nodes: reshapes and matrix products in the cheapest order for one token.

A graph could also build the matrix for long prompts, behind an `If`. Measured on granite-nano with balanced cores of χ = 48 that
made decoding 4 times slower and prompts no faster, and the runtime kept all the built matrices in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_formats import Mpo
from mpo_formats.packing import bf16_to_f32
from mpo_runtime import native
from mpo_runtime.layers.contraction import sweep_cost
from mpo_runtime.onnx.graph import Graph
from mpo_runtime.weights.protocol import Weights


@dataclass(frozen=True, slots=True)
class Operator:
    """A term of cores under `prefix`, of which the graph gets the leading part `kept`."""

    weights: Weights
    prefix: str
    stored: Mpo
    kept: Mpo

    def apply(self, graph: Graph, x: str) -> str:
        """The output [B, S, out] for x [B, S, in]: the states of `_sweep` and `_sweep_back` (mpo_runtime/layers/linear.py)."""
        shapes = self.kept.core_shapes()  # [χ', χ, o, i]
        matrices = self._matrices(graph)
        done, rest, state = 1, math.prod(self.kept.in_dims), x
        for index in reversed(range(len(shapes))) if self._reverse else range(len(shapes)):
            bond, chi, out, inner = shapes[index]
            rest //= inner
            ends = (inner * bond, done) if self._reverse else (chi * inner, rest)
            state = multiplied(graph, matrices[index], state, *ends)
            done *= out
        lead = graph.add("Shape", x, start=0, end=2)
        return graph.add("Reshape", state, graph.add("Concat", lead, graph.constant([done]), axis=0))

    def rows(self, graph: Graph, ids: str) -> str:
        """The rows [B, S, in] of the matrix for token ids [B, S]."""
        flat = graph.add("Reshape", ids, graph.constant([-1]))
        after, columns = math.prod(self.kept.out_dims), 1
        state = ""
        for index, core in enumerate(self._cores()):
            chi, out, inner, bond = core.shape
            after //= out
            digit = graph.add("Mod", graph.add("Div", flat, graph.constant(after)), graph.constant(out))
            table = graph.floats(
                f"{self.prefix}.table{index}", core.transpose(1, 0, 2, 3).reshape(out, chi, inner * bond)
            )
            picked = graph.add("Gather", table, digit)  # [T, χ, i·χ']
            state = graph.add("MatMul", state, picked) if state else picked  # [T, I, i·χ']
            columns *= inner
            state = graph.add("Reshape", state, graph.constant([-1, columns, bond]))
        shape = graph.add("Concat", graph.add("Shape", ids), graph.constant([columns]), axis=0)
        return graph.add("Reshape", state, shape)

    def _cores(self) -> list[NDArray[np.float32]]:
        """The cores [χ_{k−1}, o_k, i_k, χ_k] as float32."""
        return [core.transpose(1, 2, 3, 0) for core in stored_cores(self.weights, self.prefix, self.stored, self.kept)]

    @property
    def _reverse(self) -> bool:
        return sweep_cost(self.kept, 1, reverse=True) < sweep_cost(self.kept, 1, reverse=False)

    def _matrices(self, graph: Graph) -> list[str]:
        """The cores as the matrices that a sweep multiplies with: [o·χ', χ·i], or [χ·o, i·χ'] from the right; stored once."""
        names = []
        for index, core in enumerate(self._cores()):
            chi, out, inner, bond = core.shape
            if self._reverse:
                matrix = core.reshape(chi * out, inner * bond)
            else:
                matrix = core.transpose(1, 3, 0, 2).reshape(out * bond, chi * inner)
            names.append(graph.floats(f"{self.prefix}.core{index}", matrix))
        return names


def multiplied(graph: Graph, matrix: str, state: str, inner: int, rest: int) -> str:
    """The product of a matrix [M, inner] with each of the states [N, inner, rest]; one product where rest is 1."""
    if rest == 1:
        flat = graph.add("Reshape", state, graph.constant([-1, inner]))
        return graph.microsoft("FusedMatMul", flat, matrix, transB=1)
    return graph.add("MatMul", matrix, graph.add("Reshape", state, graph.constant([-1, inner, rest])))


def stored_cores(weights: Weights, prefix: str, stored: Mpo, kept: Mpo) -> list[NDArray[Any]]:
    """The leading part of each core, [χ_k, χ_{k−1}, o_k, i_k] in float32."""
    cores = []
    for index, (full, part) in enumerate(zip(stored.core_shapes(), kept.core_shapes(), strict=True)):
        name = f"{prefix}.core{index}"
        if stored.core_bits:
            planes = weights.array(f"{name}.q{stored.core_bits}")
            whole = native.dequantize([planes], stored.core_bits, weights.array(f"{name}.scale"), None)
        else:
            whole = weights.array(name)
            whole = bf16_to_f32(whole.view(np.uint16)) if stored.dtype == "bf16" else whole.astype(np.float32)
        cores.append(whole.reshape(full)[: part[0], : part[1]])
    return cores
