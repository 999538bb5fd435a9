"""The terms that a plan gives a layer: integers, operators, and what each would cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpo_exporter.quantize.rounding import fitting_group
from mpo_formats import Dense, Mpo, Quantized, Term
from mpo_formats.architecture import full_rank
from mpo_formats.spec import CoreType

# Weights that share a scale in the named plans.
GROUP = 32


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a layer could be stored as: its bytes in the file, its predicted loss in nats a token, and its terms."""

    bytes: int
    loss: float
    terms: tuple[Term, ...]


def integers(columns: int, bits: int, group: int = GROUP) -> Term:
    """A Quantized term of the largest group that fits, or bf16 where none divides the row."""
    fitting = fitting_group(columns, group)
    return Dense("bf16") if fitting is None else Quantized(bits, fitting, False)


def operator(out_dims: tuple[int, ...], in_dims: tuple[int, ...], chi: int, dtype: CoreType) -> Mpo:
    """An Mpo term with bonds of at most χ; integer cores fall back to fp16 where no group divides a core."""
    bonds = tuple(min(chi, most) for most in full_rank(out_dims, in_dims))
    group = fitting_group(math.gcd(*(o * i for o, i in zip(out_dims, in_dims, strict=True))), 64)
    if dtype in ("int8", "int4") and group is not None:
        return Mpo(out_dims, in_dims, bonds, dtype, group)
    return Mpo(out_dims, in_dims, bonds, "f16" if dtype in ("int8", "int4") else dtype, 0)
