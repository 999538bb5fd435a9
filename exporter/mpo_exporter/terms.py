"""The terms that a layer can be stored as: integers and operators, and a candidate's bytes and expected loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from mpo_formats import Dense, LinearSpec, Mpo, Quantized, Term, Transform
from mpo_formats.architecture import full_rank
from mpo_formats.layout import linear_tensors
from mpo_formats.spec import GROUPS, HADAMARDS, CoreType

# The bond dimension where none is given.
DEFAULT_CHI = 32
# Weights that share a scale in the named plans.
GROUP = 32
# The largest group of integer cores.
CORE_GROUP = 64
# Which transforms of inputs layers may take: none, Hadamard transforms, or also rotations that are fitted to them and stored.
Transforms = Literal["none", "hadamard", "fitted"]
TRANSFORMS: tuple[str, ...] = get_args(Transforms)
# Inputs that are transformed together: larger blocks lower no error any more (docs/method.md).
LARGEST_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to store a layer: its bytes in the file, its expected loss in nats per token, its terms, and what they take."""

    bytes: int
    loss: float
    terms: tuple[Term, ...]
    hadamard: int = 0
    transform: Transform | None = None

    def stored(self, linear: LinearSpec) -> LinearSpec:
        """The layer, stored in this way."""
        return replace(linear, terms=self.terms, hadamard=self.hadamard, transform=self.transform)

    def describes(self, linear: LinearSpec) -> bool:
        """Whether the layer is stored in this way."""
        found = linear.terms, linear.hadamard, linear.transform
        return found == (self.terms, self.hadamard, self.transform)


def fitting_group(columns: int, wanted: int) -> int | None:
    """The largest allowed group size of at most `wanted` that divides a row of `columns` weights; None if there is none.

    A matrix whose rows no group divides is stored dense: 172 = 4 · 43 is such a row length.
    """
    return max((group for group in GROUPS if group <= wanted and columns % group == 0), default=None)


def hadamard_block(columns: int) -> int:
    """The largest block of at most LARGEST_BLOCK inputs whose transform a row of `columns` weights can take, 0 if none."""
    return max(block for block in HADAMARDS if block <= LARGEST_BLOCK and (not block or columns % block == 0))


def integers(columns: int, bits: int, group: int = GROUP) -> Term:
    """A Quantized term with the largest group of at most `group` that divides the row; bf16 if none does."""
    fitting = fitting_group(columns, group)
    return Dense("bf16") if fitting is None else Quantized(bits, fitting, False)


def operator(out_dims: tuple[int, ...], in_dims: tuple[int, ...], chi: int, dtype: CoreType) -> Mpo:
    """An Mpo term with bonds of at most χ; integer cores become fp16 if no group divides every core."""
    bonds = tuple(min(chi, most) for most in full_rank(out_dims, in_dims))
    if dtype not in ("int8", "int4"):
        return Mpo(out_dims, in_dims, bonds, dtype, 0)
    group = fitting_group(math.gcd(*(o * i for o, i in zip(out_dims, in_dims, strict=True))), CORE_GROUP)
    return Mpo(out_dims, in_dims, bonds, "f16", 0) if group is None else Mpo(out_dims, in_dims, bonds, dtype, group)


def without_operators(row: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that have no cores."""
    return [one for one in row if not any(term.kind == "mpo" for term in one.terms)]


def stored_bytes(linear: LinearSpec) -> int:
    """Bytes of a layer's tensors in the file, padding included."""
    return sum(tensor.size + tensor.padding for tensor in linear_tensors(linear))
