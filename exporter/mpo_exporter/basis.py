"""The basis of a layer's inputs: the inputs themselves, their Hadamard transform, or a stored transform of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_formats import LinearSpec, Transform
from mpo_formats.packing import block_transform, hadamard_signs
from mpo_runtime.layers.transform import transform_matrices

Matrix = NDArray[np.float64]
Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Basis:
    """T x in the place of inputs x: their Hadamard transform in blocks of `hadamard`, a stored `transform`, or x itself.

    Args:
        tensors: of the stored transform, by their names in the file.
    """

    hadamard: int = 0
    transform: Transform | None = None
    tensors: Tensors = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def matrices(self) -> Matrix | None:
        """The matrices [count, block, block] on the diagonal of T; None where T is 1."""
        stored = self.transform
        if stored is None:
            return hadamard_signs(self.hadamard)[None] / math.sqrt(self.hadamard) if self.hadamard else None
        return transform_matrices(self.tensors.__getitem__, stored).astype(np.float64)

    @cached_property
    def inverses(self) -> Matrix | None:
        """The matrices on the diagonal of T⁻¹; None where T is 1."""
        return None if self.matrices is None else np.asarray(np.linalg.inv(self.matrices), np.float64)

    def turned(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """W T⁻¹ of a matrix W [O, I]: what takes T x in the place of x."""
        return matrix if self.inverses is None else block_transform(matrix, self.inverses.transpose(0, 2, 1))

    def back(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """V T of a matrix V [O, I] that takes T x: what takes x."""
        return matrix if self.matrices is None else block_transform(matrix, self.matrices.transpose(0, 2, 1))

    def of(self, linear: LinearSpec) -> LinearSpec:
        """The layer, its terms taking T x."""
        return replace(linear, hadamard=self.hadamard, transform=self.transform)


PLAIN = Basis()
# The stored transforms of a file by their names.
Bases = Mapping[str, Basis]


def basis_of(linear: LinearSpec, stored: Bases) -> Basis:
    """The basis that a layer's terms take its inputs in; raises KeyError for a transform that is not among the stored ones."""
    return Basis(linear.hadamard) if linear.transform is None else stored[linear.transform.name]
