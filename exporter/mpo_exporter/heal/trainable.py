"""The parameters that healing trains. The forward pass sees them rounded as the file will store them.

Scales, zeros, float cores, norms and biases are rounded to their stored type. The codes of integer matrices are frozen or
move (see grid.py); those of integer cores always move.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from mpo_exporter.heal.grid import Arrays, Grid, root_mean_square
from mpo_exporter.heal.rounding import TYPES, rounded, stored
from mpo_formats import Dense, LinearSpec, ModelSpec, Mpo, Quantized, Transform, VectorSpec
from mpo_formats.layout import TRANSFORM
from mpo_formats.packing import implicit_zero
from mpo_runtime.layers.linear import Linear, MatrixTerm, MpoTerm, block_transform, float_tensor, load_transform
from mpo_runtime.weights.protocol import Weights


class Frozen(nn.Module):
    """A dense matrix [R, C] in its stored type; it is not trained."""

    held: Tensor

    def __init__(self, weights: Weights, prefix: str) -> None:
        super().__init__()
        self.name = f"{prefix}.weight"
        self.dtype = weights.dtype(self.name)
        self.array = weights.array(self.name)
        self.register_buffer("held", float_tensor(weights, self.name).to(TYPES[self.dtype]), persistent=False)

    def weight(self) -> Tensor:
        """The matrix [R, C]."""
        return self.held.float()

    def rows(self, ids: Tensor) -> Tensor:
        """The rows `ids` [T] of the matrix, as [T, C]."""
        return self.held[ids].float()

    def learning(self) -> Iterator[tuple[str, Tensor, float]]:
        """Yields nothing."""
        yield from ()

    def arrays(self) -> Arrays:
        """The arrays to store, by their names in the file."""
        return {self.name: self.array}


class FloatCore(nn.Module):
    """A core [χ_{k−1}, o_k, i_k, χ_k] in a float type."""

    def __init__(self, weights: Weights, prefix: str, dtype: str) -> None:
        super().__init__()
        self.name, self.dtype = prefix, dtype
        self.values = nn.Parameter(float_tensor(weights, prefix).permute(1, 2, 3, 0).contiguous())

    def core(self) -> Tensor:
        """The core, rounded as the file stores it."""
        return rounded(self.values, self.dtype)

    @torch.no_grad()
    def set_core(self, core: Tensor) -> None:
        """Replaces the values [χ_{k−1}, o_k, i_k, χ_k]."""
        self.values.copy_(core)

    @torch.no_grad()
    def reorder(self, left: Tensor, right: Tensor) -> None:
        """Puts the values of the left and the right bond into the given orders."""
        self.values.copy_(self.values[left][..., right])

    def learning(self) -> Iterator[tuple[str, Tensor, float]]:
        """Yields (kind, parameter, unit of its learning rate)."""
        yield "core", self.values, root_mean_square(self.values)

    def arrays(self) -> Arrays:
        """The arrays to store, by their names in the file."""
        return {self.name: stored(rounded(self.values, self.dtype).permute(3, 0, 1, 2).contiguous(), self.dtype)}


class IntegerCore(nn.Module):
    """A core [χ_{k−1}, o_k, i_k, χ_k] in int8 or int4: a moving grid of χ_k · χ_{k−1} rows, one for each pair of values."""

    def __init__(self, weights: Weights, prefix: str, bits: int, shape: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.shape = shape  # stored: right bond first
        self.grid = Grid(weights, prefix, bits, zeros=False, moving=True)

    def core(self) -> Tensor:
        """The core, rounded as the file stores it."""
        return self.grid.weight().view(self.shape).permute(1, 2, 3, 0)

    @torch.no_grad()
    def set_core(self, core: Tensor) -> None:
        """Replaces the core by the values [χ_{k−1}, o_k, i_k, χ_k], rounded onto new grids."""
        from mpo_exporter.quantize.rounding import round_to_nearest

        matrix = core.permute(3, 0, 1, 2).reshape(self.shape[0] * self.shape[1], -1)
        found = round_to_nearest(matrix.double().cpu().numpy(), self.grid.bits, self.grid.group)
        self.grid.set_matrix(torch.from_numpy(found.codes).float(), torch.from_numpy(found.scale.astype(np.float32)))

    @torch.no_grad()
    def reorder(self, left: Tensor, right: Tensor) -> None:
        """Puts the values of the left and the right bond into the given orders; no stored number changes."""
        rows = (right[:, None] * self.shape[1] + left).flatten()
        self.grid.reorder(rows)

    def learning(self) -> Iterator[tuple[str, Tensor, float]]:
        """Yields (kind, parameter, unit of its learning rate)."""
        for kind, parameter, _ in self.grid.learning():
            if kind == "code":
                yield "core", parameter, root_mean_square(parameter - implicit_zero(self.grid.bits))
            else:
                yield kind, parameter, 1.0

    def arrays(self) -> Arrays:
        """The arrays to store, by their names in the file."""
        return self.grid.arrays()


class Cores(nn.Module):
    """An MPO term: its cores."""

    def __init__(self, weights: Weights, prefix: str, term: Mpo) -> None:
        super().__init__()
        self.term = term
        self.cores: list[FloatCore | IntegerCore] = [
            IntegerCore(weights, f"{prefix}.core{k}", term.core_bits, shape)
            if term.core_bits
            else FloatCore(weights, f"{prefix}.core{k}", term.dtype)
            for k, shape in enumerate(term.core_shapes())
        ]
        self.parts = nn.ModuleList(self.cores)

    def operator(self, chi: int | None) -> MpoTerm:
        """The term with its present cores, every bond cut to its first `chi` values (None: not cut)."""
        kept = self.term if chi is None else self.term.truncated(chi)
        cores = [
            part.core()[:left, :, :, :right]
            for part, (right, left, _, _) in zip(self.cores, kept.core_shapes(), strict=True)
        ]
        return MpoTerm(kept, cores)

    def learning(self) -> Iterator[tuple[str, Tensor, float]]:
        """Yields (kind, parameter, unit of its learning rate)."""
        for part in self.cores:
            yield from part.learning()

    def arrays(self) -> Arrays:
        """The arrays to store, by their names in the file."""
        return {name: array for part in self.cores for name, array in part.arrays().items()}


class Vector(nn.Module):
    """A norm's weight or a bias."""

    def __init__(self, weights: Weights, name: str, dtype: str) -> None:
        super().__init__()
        self.name, self.dtype = name, dtype
        self.values = nn.Parameter(float_tensor(weights, name))

    def value(self) -> Tensor:
        """The vector, rounded as the file stores it."""
        return rounded(self.values, self.dtype)

    def learning(self) -> Iterator[tuple[str, Tensor, float]]:
        """Yields (kind, parameter, unit of its learning rate)."""
        yield "norm", self.values, root_mean_square(self.values)

    def arrays(self) -> Arrays:
        """The arrays to store, by their names in the file."""
        return {self.name: stored(self.value(), self.dtype)}


class StoredTransform(nn.Module):
    """A stored transform of inputs in integers: a moving grid [count · block, block]."""

    def __init__(self, weights: Weights, transform: Transform, term: Quantized) -> None:
        super().__init__()
        self.shape = transform.count, transform.block, transform.block
        self.grid = Grid(weights, f"{transform.name}.{TRANSFORM}", term.bits, zeros=term.zeros, moving=True)

    def matrices(self) -> Tensor:
        """The matrices [count, block, block], rounded as the file stores them."""
        return self.grid.weight().view(self.shape)

    def learning(self) -> Iterator[tuple[str, Tensor, float]]:
        """Yields (kind, parameter, unit of its learning rate)."""
        yield from self.grid.learning()

    def arrays(self) -> Arrays:
        """The arrays to store, by their names in the file."""
        return self.grid.arrays()


class Layer(nn.Module):
    """A linear layer: its terms and its bias.

    Args:
        trained: the transform of its input, where that is trained; it belongs to all layers that share it.
    """

    fixed: Tensor | None

    def __init__(self, weights: Weights, spec: LinearSpec, trained: StoredTransform | None, *, moving: bool) -> None:
        super().__init__()
        self.spec = spec
        self.trained = () if trained is None else (trained,)  # in a tuple, which does not make it a part of this module
        self.terms: list[Frozen | Grid | Cores] = []
        for index, term in enumerate(spec.terms):
            prefix = f"{spec.name}.{index}"
            if isinstance(term, Dense):
                self.terms.append(Frozen(weights, prefix))
            elif isinstance(term, Mpo):
                self.terms.append(Cores(weights, prefix, term))
            else:
                self.terms.append(Grid(weights, prefix, term.bits, zeros=term.zeros, moving=moving))
        self.parts = nn.ModuleList(self.terms)
        self.bias = None if spec.bias is None else Vector(weights, f"{spec.name}.bias", spec.bias)
        fixed = None if self.trained else load_transform(weights, spec, torch.device("cpu"))
        self.register_buffer("fixed", fixed, persistent=False)

    def transform(self) -> Tensor | None:
        """The matrices [count, block, block] of the transform of its input; None where it has none."""
        return self.trained[0].matrices() if self.trained else self.fixed

    def linear(self, chi: int | None) -> Linear:
        """The layer for the reference backend, with its present parameters; every bond cut to `chi` values (None: not)."""
        terms = [term.operator(chi) if isinstance(term, Cores) else _matrix_term(term) for term in self.terms]
        return Linear(self.spec, terms, None if self.bias is None else self.bias.value(), self.transform())

    @torch.no_grad()
    def aim(self, matrix: Tensor) -> None:
        """Moves the latent numbers of moving grids towards the dense matrix [out, in] that the layer approximates."""
        if (transform := self.transform()) is not None:
            matrix = block_transform(matrix, torch.linalg.inv(transform).mT)
        for index, term in enumerate(self.terms):
            if isinstance(term, Grid):
                others = [other.weight() for place, other in enumerate(self.linear(None).terms) if place != index]
                term.aim(matrix - torch.stack(others).sum(0) if others else matrix)

    def learning(self) -> Iterator[tuple[str, Tensor, float]]:
        """Yields (kind, parameter, unit of its learning rate)."""
        for term in self.terms:
            yield from term.learning()
        if self.bias is not None:
            yield from self.bias.learning()

    def arrays(self) -> Arrays:
        """The arrays to store, by their names in the file."""
        result = {name: array for term in self.terms for name, array in term.arrays().items()}
        return result if self.bias is None else result | self.bias.arrays()


def transform_name(spec: LinearSpec) -> str:
    """The name of a layer's stored transform; empty where it has none."""
    return "" if spec.transform is None else spec.transform.name


def _matrix_term(term: Grid | Frozen) -> MatrixTerm:
    return MatrixTerm(None, term.weight, term.rows)


class Trainables(nn.Module):
    """The layers and vectors of a model, or of some of its blocks, by their names in the file.

    Args:
        names: of the layers and vectors.
        moving: train the codes of integer matrices and stored transforms of integers too.
    """

    def __init__(self, weights: Weights, names: Iterator[str] | list[str], *, moving: bool) -> None:
        super().__init__()
        wanted = set(names)
        spec: ModelSpec = weights.spec
        linears = [item for item in spec.linears if item.name in wanted]
        stored = {item.transform.name: item.transform for item in linears if item.transform is not None and moving}
        self.transforms = {
            name: StoredTransform(weights, transform, transform.term)
            for name, transform in stored.items()
            if isinstance(transform.term, Quantized)
        }
        self.layers = {
            item.name: Layer(weights, item, self.transforms.get(transform_name(item)), moving=moving)
            for item in linears
        }
        vectors: list[VectorSpec] = [item for item in spec.vectors if item.name in wanted]
        self.vectors = {item.name: Vector(weights, f"{item.name}.weight", item.dtype) for item in vectors}
        transforms = {f"{name}.{TRANSFORM}": transform for name, transform in self.transforms.items()}
        parts: dict[str, nn.Module] = {**self.layers, **self.vectors, **transforms}
        self.parts = nn.ModuleDict({name.replace(".", "/"): part for name, part in parts.items()})

    def aim(self, source: Weights) -> None:
        """Moves the latent numbers of all moving grids towards the dense model's matrices."""
        for name, layer in self.layers.items():
            if any(isinstance(term, Grid) and term.latent is not None for term in layer.terms):
                layer.aim(float_tensor(source, f"{name}.0.weight"))

    def learning(self) -> Iterator[tuple[str, Tensor, float]]:
        """Yields (kind, parameter, unit of its learning rate)."""
        parts: list[Layer | Vector | StoredTransform] = [
            *self.layers.values(),
            *self.vectors.values(),
            *self.transforms.values(),
        ]
        for part in parts:
            yield from part.learning()
