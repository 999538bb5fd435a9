"""Which terms each layer gets. A plan is complete before any work starts, so the header can be written first."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpo_exporter.fit import shapes
from mpo_exporter.quantize.rounding import fitting_group
from mpo_formats import Architecture, Dense, LinearSpec, ModelSpec, Mpo, PlanError, Quantized, Term
from mpo_formats.architecture import EMBEDDING, HEAD, full_rank
from mpo_formats.spec import CoreType

PLANS = ("auto", "paper", "int4", "dense")
GROUP = 32
EMBEDDING_BITS = 6
# Correction cores may take at most this share of a matrix's parameters: they are worth their bits, no more.
CORE_SHARE = 1 / 16
# The published method leaves early blocks alone; here the first quarter.
SPARED = 1 / 4


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for.

    `layers` names those that the plan `paper` gives cores, its own choice where None; `target_bytes` is the size of the
    whole file that the plan `auto` is to fill with integers of several widths.
    """

    plan: str = "auto"
    chi: int = 32
    cores: int = 2
    layers: tuple[str, ...] | None = None
    target_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.plan not in PLANS:
            raise PlanError(f"--plan {self.plan}: expected one of {', '.join(PLANS)}")
        if self.chi < 1:
            raise PlanError(f"--chi {self.chi}: the bond dimension must be at least 1")
        if not 2 <= self.cores <= 8:
            raise PlanError(f"--cores {self.cores}: expected 2 to 8")
        if self.target_bytes is not None and (self.plan != "auto" or self.target_bytes < 1):
            raise PlanError(f"target {self.target_bytes}: expected at least 1 byte, and the plan auto")


def plan_layers(source: ModelSpec, options: Options) -> tuple[LinearSpec, ...]:
    """Decides the terms of every layer of a model whose layers are dense.

    Plans: `dense` stores bf16 as it is (the baseline); `int4` rounds everything to 4 bits, group 32; `paper` replaces
    attention and MLP matrices by fp16 cores of one χ, except in the first quarter of the blocks and the last MLP, and
    stores the rest as int4; `auto` rounds to 4 bits (embeddings to 6) and lets int8 cores of at most χ correct the rounding.
    """
    names = {linear.name for linear in source.linears} - {EMBEDDING, HEAD}
    for name in options.layers or ():
        if name not in names:
            raise PlanError(f"layers: {name} is no attention or MLP matrix of this model; mpo-run info lists them")
    return tuple(plan_layer(linear, source.architecture, options) for linear in source.linears)


def plan_layer(linear: LinearSpec, architecture: Architecture, options: Options) -> LinearSpec:
    """Decides the terms of one layer."""
    rows, columns, name = linear.out_features, linear.in_features, linear.name
    table = name in (EMBEDDING, HEAD)
    terms: tuple[Term, ...]
    if options.plan == "dense":
        terms = linear.terms
    elif options.plan == "int4":
        terms = (integers(columns, 4),)
    elif options.plan == "paper":
        cores = not table and gets_cores(name, architecture, options)
        terms = (full_cores(rows, columns, options),) if cores else (integers(columns, 4),)
    elif table:
        terms = (integers(columns, EMBEDDING_BITS),)
    else:
        base = integers(columns, 4)
        # A dense base has no rounding that is worth correcting.
        terms = (base, *correction(rows, columns, options)) if base.kind == "quantized" else (base,)
    return LinearSpec(name, rows, columns, linear.bias, terms)


def integers(columns: int, bits: int) -> Term:
    """A Quantized term, or bf16 where no group divides the row."""
    group = fitting_group(columns, GROUP)
    return Dense("dense", "bf16") if group is None else Quantized("quantized", bits, group, False)


def gets_cores(name: str, architecture: Architecture, options: Options) -> bool:
    """Whether the plan `paper` tensorizes a matrix of the blocks: those that the user named, or all that it does not spare."""
    return name in options.layers if options.layers is not None else not spared(name, architecture)


def spared(name: str, architecture: Architecture) -> bool:
    """Whether the published plan leaves a layer of the blocks without cores: early blocks, and the last MLP."""
    block = int(name.split(".")[2])
    last = architecture.num_hidden_layers - 1
    return block < math.ceil(SPARED * architecture.num_hidden_layers) or (block == last and ".mlp." in name)


def full_cores(rows: int, columns: int, options: Options) -> Mpo:
    """Cores of a balanced shape that replace a matrix."""
    out_dims, in_dims = shapes.balanced_shape(rows, columns, options.cores)
    return operator(out_dims, in_dims, options.chi, "f16")


def correction(rows: int, columns: int, options: Options) -> tuple[Mpo, ...]:
    """int8 cores beside an integer base: none where even χ = 1 would exceed their share of the parameters."""
    low_rank = options.cores == 2
    shape = shapes.low_rank_shape(rows, columns) if low_rank else shapes.balanced_shape(rows, columns, options.cores)
    out_dims, in_dims = shape
    room = CORE_SHARE * rows * columns
    chi = options.chi
    while chi and shapes.parameters(out_dims, in_dims, operator(out_dims, in_dims, chi, "f16").bonds) > room:
        chi -= 1
    return (operator(out_dims, in_dims, chi, "int8"),) if chi else ()


def operator(out_dims: tuple[int, ...], in_dims: tuple[int, ...], chi: int, dtype: CoreType) -> Mpo:
    """An Mpo term with bonds of at most χ; integer cores fall back to fp16 where no group divides a core."""
    bonds = tuple(min(chi, most) for most in full_rank(out_dims, in_dims))
    group = fitting_group(math.gcd(*(o * i for o, i in zip(out_dims, in_dims, strict=True))), 64)
    if dtype in ("int8", "int4") and group is not None:
        return Mpo("mpo", out_dims, in_dims, bonds, dtype, group)
    return Mpo("mpo", out_dims, in_dims, bonds, "f16" if dtype in ("int8", "int4") else dtype, 0)
