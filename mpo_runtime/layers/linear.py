"""A linear layer as a sum of terms, in torch: y = Σ_t term_t(T x) (+ bias), term ∈ {Dense, Quantized, Mpo}.

The reference backend runs these classes. The product with an integer matrix of any width is the plain product with the
dequantised one (`mpo_runtime.native.dequantize`); the native backend multiplies without dequantising (csrc/).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpo_formats import Dense, LinearSpec, Mpo, Quantized
from mpo_formats.layout import PLANES
from mpo_formats.packing import bf16_to_f32, hadamard_signs
from mpo_runtime import native
from mpo_runtime.layers.contraction import choose_order
from mpo_runtime.layers.transform import transform_matrices
from mpo_runtime.weights.protocol import Weights


@dataclass(slots=True)
class MatrixTerm:
    """A Dense or Quantized term [out, in]: `held` in memory as float32, or None and rebuilt from the file at every use."""

    held: Tensor | None
    rebuild: Callable[[], Tensor]
    rebuild_rows: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, weight: Tensor) -> MatrixTerm:
        """A term of that matrix [out, in], which stays in memory."""
        return cls(weight, lambda: weight, lambda ids: weight[ids])

    def weight(self) -> Tensor:
        """The matrix [out, in]."""
        return self.held if self.held is not None else self.rebuild()

    def apply(self, x: Tensor) -> Tensor:
        """Maps x [T, in] to [T, out]."""
        return F.linear(x, self.weight())

    def rows(self, ids: Tensor) -> Tensor:
        """The rows `ids` [T] of the matrix, as [T, in]."""
        if self.held is not None:
            return F.embedding(ids, self.held)
        return self.rebuild_rows(ids)


@dataclass(slots=True)
class MpoTerm:
    """An Mpo term: cores [χ_{k−1}, o_k, i_k, χ_k]."""

    spec: Mpo
    cores: list[Tensor]

    def apply(self, x: Tensor) -> Tensor:
        """Maps x [T, in] to [T, out] in the order of contraction that costs least (contraction.py)."""
        order = choose_order(self.spec, x.shape[0])
        if order == "densify":
            return F.linear(x, self.weight())
        return self._sweep(x) if order == "left" else self._sweep_back(x)

    def weight(self) -> Tensor:
        """The matrix [out, in]."""
        state = self.cores[0].new_ones(1, 1, 1)
        for core in self.cores:
            rows, columns, _ = state.shape
            state = torch.einsum("oia,apjb->opijb", state, core)  # [O, o, I, i, χ]
            state = state.reshape(rows * core.shape[1], columns * core.shape[2], core.shape[3])
        return state[..., 0]

    def rows(self, ids: Tensor) -> Tensor:
        """The rows `ids` [T] of the matrix, as [T, in]."""
        state = self.cores[0].new_ones(ids.shape[0], 1, 1)
        after = math.prod(self.spec.out_dims)
        for core in self.cores:
            after //= core.shape[1]
            digit = ids // after % core.shape[1]  # o_k of each row
            state = torch.einsum("tia,atjb->tijb", state, core[:, digit]).flatten(1, 2)  # [T, I·i, χ]
        return state[..., 0]

    def _sweep(self, x: Tensor) -> Tensor:
        # The state is [T·O, χ·i_k, rest]: finished outputs first, inputs that are still to be contracted last.
        rows, rest = x.shape[0], x.shape[1]
        state = x
        for core in self.cores:
            chi, out, inner, bond = core.shape
            rest //= inner
            state = state.reshape(-1, chi * inner, rest)
            matrix = core.permute(1, 3, 0, 2).reshape(out * bond, chi * inner)
            state = product(matrix, state)  # [T·O, o·χ', rest]
            state = state.reshape(-1, bond, rest)
        return state.reshape(rows, -1)

    def _sweep_back(self, x: Tensor) -> Tensor:
        # The state is [T·rest, i_k·χ, O]: inputs that are still to be contracted first, finished outputs last.
        rows, done = x.shape[0], 1
        state = x
        for core in reversed(self.cores):
            chi, out, inner, bond = core.shape
            state = state.reshape(-1, inner * bond, done)
            matrix = core.reshape(chi * out, inner * bond)
            state = product(matrix, state)  # [T·rest, χ'·o, O]
            done *= out
            state = state.reshape(-1, chi, done)
        return state.reshape(rows, -1)


def product(matrix: Tensor, state: Tensor) -> Tensor:
    """The product of a matrix [M, K] with each of the states [N, K, R].

    Where R is 1, as it always is in low-rank operators, it is computed as one matrix product: torch.matmul would take N
    products with a vector and read the matrix N times, which is 20 times slower.
    """
    if state.shape[2] == 1:
        return F.linear(state[..., 0], matrix)[..., None]
    return torch.matmul(matrix, state)


TorchTerm = MatrixTerm | MpoTerm


@dataclass(slots=True)
class Linear:
    """A loaded layer: its spec, terms and bias, and the matrices [count, block, block] of the transform of its input, if any."""

    spec: LinearSpec
    terms: list[TorchTerm]
    bias: Tensor | None
    transform: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Maps x [..., in] to [..., out]."""
        flat = block_transform(x.reshape(-1, self.spec.in_features), self.transform)
        y = self.terms[0].apply(flat)
        for term in self.terms[1:]:
            y = y + term.apply(flat)
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.spec.out_features)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows `ids` [...] of the weight, as [..., in]: the embedding of tokens."""
        flat = ids.reshape(-1)
        y = self.terms[0].rows(flat)
        for term in self.terms[1:]:
            y = y + term.rows(flat)
        return back_transform(y, self.transform).reshape(*ids.shape, self.spec.in_features)

    def weight(self) -> Tensor:
        """The matrix [out, in] that x is multiplied with: terms summed, then transformed."""
        return back_transform(torch.stack([term.weight() for term in self.terms]).sum(0), self.transform)


@functools.cache  # recorded steps on a GPU read them as long as they live
def hadamard_matrix(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The Hadamard transform [block, block]; may be kept for a backward pass, whoever asks for it first."""
    with torch.inference_mode(False):
        return torch.from_numpy(hadamard_signs(block) * block**-0.5).to(device, dtype)


def block_transform(rows: Tensor, matrices: Tensor | None) -> Tensor:
    """T x for every vector x along the last axis of rows [T, in], with matrices [1 or in/b, b, b] for its blocks; None is 1."""
    if matrices is None:
        return rows
    count, block, _ = matrices.shape
    turned = matrices.mT.to(rows)
    if count == 1:
        return (rows.reshape(-1, block) @ turned[0]).reshape(rows.shape)
    blocks = rows.reshape(-1, count, block).transpose(0, 1) @ turned  # [in/b, T, b]
    return blocks.transpose(0, 1).reshape(rows.shape)


def back_transform(rows: Tensor, matrices: Tensor | None) -> Tensor:
    """w T for every row w of a matrix: the row that x is multiplied with, where w is what T x is."""
    return rows if matrices is None else block_transform(rows, matrices.mT)


def load_transform(weights: Weights, spec: LinearSpec, device: torch.device) -> Tensor | None:
    """The matrices [count, block, block] of the transform of a layer's input in float32; None where it has none."""
    if spec.transform is None:
        return hadamard_matrix(spec.hadamard, torch.float32, device)[None] if spec.hadamard else None
    return torch.from_numpy(transform_matrices(weights.array, spec.transform)).to(device)


def load_linear(weights: Weights, spec: LinearSpec, *, chi: int | None, held: bool, device: torch.device) -> Linear:
    """Loads a layer in float32.

    Args:
        chi: cuts every bond to its first `chi` values; only that part of each core is read.
        held: keeps Dense and Quantized terms in memory as float32 matrices; otherwise they are rebuilt at every use.
    """
    terms: list[TorchTerm] = []
    for index, term in enumerate(spec.terms):
        prefix = f"{spec.name}.{index}"
        if isinstance(term, Mpo):
            kept = term if chi is None else term.truncated(chi)
            terms.append(MpoTerm(kept, load_cores(weights, prefix, term, kept, device)))
        else:
            terms.append(_matrix_term(weights, prefix, term, held, device))
    bias = None if spec.bias is None else float_tensor(weights, f"{spec.name}.bias").to(device)
    return Linear(spec, terms, bias, load_transform(weights, spec, device))


def _matrix_term(
    weights: Weights, prefix: str, term: Dense | Quantized, held: bool, device: torch.device
) -> MatrixTerm:
    every = slice(None)

    def rebuild(rows: slice | np.ndarray[tuple[int, ...], np.dtype[np.int64]] = every) -> Tensor:
        if isinstance(term, Dense):
            return widen(weights.array(f"{prefix}.weight")[rows], weights.dtype(f"{prefix}.weight")).to(device)
        planes = [np.ascontiguousarray(weights.array(f"{prefix}.q{plane}")[rows]) for plane in PLANES[term.bits]]
        scale = np.ascontiguousarray(weights.array(f"{prefix}.scale")[rows])
        zero = np.ascontiguousarray(weights.array(f"{prefix}.zero")[rows]) if term.zeros else None
        return torch.from_numpy(native.dequantize(planes, term.bits, scale, zero)).to(device)

    return MatrixTerm(rebuild() if held else None, rebuild, lambda ids: rebuild(ids.cpu().numpy()))


def load_cores(weights: Weights, prefix: str, stored: Mpo, kept: Mpo, device: torch.device) -> list[Tensor]:
    """Reads cores as float32 [χ_{k−1}, o_k, i_k, χ_k]: of the term `stored` the leading part that `kept` describes."""
    cores = []
    for index, (full, part) in enumerate(zip(stored.core_shapes(), kept.core_shapes(), strict=True)):
        name = f"{prefix}.core{index}"
        if stored.core_bits:
            picked = [
                np.ascontiguousarray(array.reshape(full[0], full[1], *array.shape[1:])[: part[0], : part[1]])
                for array in (weights.array(f"{name}.q{stored.core_bits}"), weights.array(f"{name}.scale"))
            ]
            planes, scale = (array.reshape(part[0] * part[1], *array.shape[2:]) for array in picked)
            core = torch.from_numpy(native.dequantize([planes], stored.core_bits, scale, None)).reshape(part)
        else:
            core = widen(weights.array(name)[: part[0], : part[1]], stored.dtype)
        cores.append(core.permute(1, 2, 3, 0).contiguous().to(device))
    return cores


def widen(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], dtype: str) -> Tensor:
    """A float32 copy of a stored float tensor; exact."""
    if dtype == "bf16":
        return torch.from_numpy(bf16_to_f32(array.view(np.uint16)))
    return torch.from_numpy(array.astype(np.float32))


def float_tensor(weights: Weights, name: str) -> Tensor:
    """A stored float tensor as float32."""
    return widen(weights.array(name), weights.dtype(name))
