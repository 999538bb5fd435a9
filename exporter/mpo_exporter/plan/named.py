"""Which terms each layer gets. A plan is complete before any work starts, so the header can be written first."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, replace

from mpo_exporter.fit import shapes
from mpo_exporter.terms import integers, operator
from mpo_formats import Architecture, LinearSpec, ModelSpec, Mpo, PlanError, Term
from mpo_formats.architecture import EMBEDDING, HEAD, full_rank
from mpo_formats.spec import CoreType

PLANS = ("auto", "paper", "k-proj", "corrected", "int4", "dense")
# Plans that choose layers by sensitivity where --top-k or --compression-ratio asks for it.
CHOOSING = ("paper", "k-proj", "corrected", "int4")
EMBEDDING_BITS = 6
# Correction cores may take at most this share of a matrix's parameters: they are worth their bits, no more.
CORE_SHARE = 1 / 16
# How many bits the factors of key projections may have, and how these are stored.
FACTORS: dict[int, CoreType] = {4: "int4", 8: "int8", 16: "f16"}
KEYS = ".self_attn.k_proj"
LEVELS = ("fast", "full")
# The published method leaves early blocks alone; here the first quarter.
SPARED = 1 / 4


@dataclass(frozen=True, slots=True)
class KeyOptions:
    """How the plan `k-proj` replaces key projections: by factors of this rank, in integers of so many bits.

    `bits` 16 stores them in fp16; `norm` scales an operator to its matrix's Frobenius norm; `min_dim` leaves out matrices
    with a side below it.
    """

    rank: int = 128
    bits: int = 8
    norm: bool = True
    min_dim: int = 64

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise PlanError(f"--rank {self.rank}: expected at least 1")
        if self.bits not in FACTORS:
            raise PlanError(f"--quant-bits {self.bits}: expected one of {', '.join(map(str, FACTORS))}")
        if self.min_dim < 1:
            raise PlanError(f"--min-dim {self.min_dim}: expected at least 1")


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for.

    Which layers: `layers` names those that the plan acts on (its own choice where None), `pattern` is a regular expression
    that a layer's name must match, `top_k` or `share` keep the least sensitive of them. The rest is stored as the plan stores
    what it leaves alone: int4 in `paper`, else as it is.

    The plan `auto` fills `target_bytes`, the size of the whole file, or takes as few bytes as an expected KL of `max_kl`
    allows; `for_speed` keeps it from terms that are slower than int4 on this machine. Without either it is `corrected`.

    `pinned` gives the terms of single layers, whatever the plan says, and `file` names the plan file that they are from.
    """

    plan: str = "auto"
    chi: int = 32
    cores: int = 2
    layers: tuple[str, ...] | None = None
    target_bytes: int | None = None
    max_kl: float | None = None
    for_speed: bool = False
    pattern: str | None = None
    top_k: int | None = None
    share: float | None = None
    sensitivity: str = "fast"
    keys: KeyOptions = field(default_factory=KeyOptions)
    pinned: tuple[tuple[str, tuple[Term, ...]], ...] = ()
    file: str | None = None

    def __post_init__(self) -> None:
        if self.plan not in PLANS:
            raise PlanError(f"--plan {self.plan}: expected one of {', '.join(PLANS)}, or file:PLAN.json")
        if self.chi < 1:
            raise PlanError(f"--chi {self.chi}: the bond dimension must be at least 1")
        if not 2 <= self.cores <= 8:
            raise PlanError(f"--cores {self.cores}: expected 2 to 8")
        self._check_targets()
        self._check_choice()

    def _check_targets(self) -> None:
        if self.target_bytes is not None and (self.plan != "auto" or self.target_bytes < 1):
            raise PlanError(f"target {self.target_bytes}: expected at least 1 byte, and the plan auto")
        if self.max_kl is not None and (self.plan != "auto" or not 0 < self.max_kl < math.inf):
            raise PlanError(f"--max-kl {self.max_kl:g}: expected more than 0 nats a token, and the plan auto")
        if self.max_kl is not None and self.target_bytes is not None:
            raise PlanError("--max-kl and a target in bytes: give one of them")
        if self.for_speed and self.plan != "auto":
            raise PlanError(f"--for-speed: expected the plan auto, found {self.plan}")

    def _check_choice(self) -> None:
        if self.sensitivity not in LEVELS:
            raise PlanError(f"--sensitivity {self.sensitivity}: expected one of {', '.join(LEVELS)}")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise PlanError(f"--layers {self.pattern}: not a regular expression ({error})") from None
        if (self.top_k is not None or self.share is not None) and self.plan not in CHOOSING:
            raise PlanError(
                f"--top-k and --compression-ratio: expected the plan {', '.join(CHOOSING)}, found {self.plan}"
            )
        if self.top_k is not None and self.share is not None:
            raise PlanError("--top-k and --compression-ratio: give one of them")
        if self.top_k is not None and self.top_k < 1:
            raise PlanError(f"--top-k {self.top_k}: expected at least 1")
        if self.share is not None and not 0 < self.share <= 1:
            raise PlanError(f"--compression-ratio {self.share:g}: expected more than 0 and at most 1")

    @property
    def chooses(self) -> bool:
        """Whether layers are chosen by how sensitive they are."""
        return self.top_k is not None or self.share is not None

    @property
    def allocates(self) -> bool:
        """Whether the survey's candidates are chosen from."""
        return self.target_bytes is not None or self.max_kl is not None

    def recorded(self) -> dict[str, str]:
        """The options as a file's provenance keeps them: plan, χ and cores, and of the others those that were given."""
        found = {"plan": self.plan, "chi": str(self.chi), "cores": str(self.cores)}
        for name in ("target_bytes", "max_kl", "for_speed", "pattern", "top_k", "share", "file"):
            if (value := getattr(self, name)) not in (None, False):
                found[name] = str(value)
        if self.sensitivity != "fast":
            found["sensitivity"] = self.sensitivity
        if self.plan == "k-proj":
            found |= {f"keys.{name}": str(value) for name, value in asdict(self.keys).items()}
        return found


def plan_layers(source: ModelSpec, options: Options) -> tuple[LinearSpec, ...]:
    """Decides the terms of every layer of a model whose layers are dense.

    Plans: `dense` stores bf16 as it is (the baseline); `int4` rounds everything to 4 bits, group 32; `paper` replaces
    attention and MLP matrices by fp16 cores of one χ, except in the first quarter of the blocks and the last MLP, and
    stores the rest as int4; `corrected`, and `auto` where it has nothing to choose from, rounds to 4 bits (embeddings to 6)
    and lets int8 cores of at most χ correct the rounding; `k-proj` replaces the key projections alone, by two factors.

    Raises:
        PlanError: for layers that the model does not have, or a choice that leaves nothing to do.
    """
    check_names(source, options)
    pinned = dict(options.pinned)
    acted_on = matching(source, options)
    if options.plan == "k-proj":
        require_keys(source, options, acted_on)
    planned = []
    for linear in source.linears:
        terms = pinned.get(linear.name) or plan_terms(linear, source.architecture, options, linear.name in acted_on)
        planned.append(replace(linear, terms=terms))
    return tuple(planned)


def check_names(source: ModelSpec, options: Options) -> None:
    """Raises PlanError for a layer that the model does not have, or tables among those that are to get cores."""
    names = {linear.name for linear in source.linears}
    for name, _ in options.pinned:
        if name not in names:
            raise PlanError(f"{options.file or 'plan'}: {name} is no layer of this model; mpo-run info lists them")
    for name in options.layers or ():
        if name not in names - {EMBEDDING, HEAD}:
            raise PlanError(f"layers: {name} is no attention or MLP matrix of this model; mpo-run info lists them")


def matching(source: ModelSpec, options: Options) -> set[str]:
    """The names of the layers that the plan acts on, before any choice by sensitivity.

    Raises:
        PlanError: when a regular expression matches none.
    """
    names = {linear.name for linear in source.linears if options.layers is None or linear.name in options.layers}
    if options.pattern is None:
        return names
    found = {name for name in names if re.search(options.pattern, name)}
    if not found:
        example = source.linears[min(1, len(source.linears) - 1)].name
        raise PlanError(f"--layers {options.pattern}: matches no layer of this model, whose names are like {example}")
    return found


def plan_terms(linear: LinearSpec, architecture: Architecture, options: Options, acted_on: bool) -> tuple[Term, ...]:
    """Decides the terms of one layer; `acted_on`: whether it is among those that the user named, or named none."""
    rows, columns, name = linear.out_features, linear.in_features, linear.name
    table = name in (EMBEDDING, HEAD)
    if options.plan == "paper":
        chosen = options.layers is not None or options.pattern is not None
        cores = not table and (acted_on if chosen else not spared(name, architecture))
        return (full_cores(rows, columns, options),) if cores else (integers_of(linear, 4),)
    if options.plan == "k-proj":
        rank = key_rank(linear, architecture, options.keys) if acted_on else 0
        return (key_factors(rows, columns, rank, options.keys),) if rank else linear.terms
    if options.plan == "dense" or not acted_on:
        return linear.terms
    if options.plan == "int4":
        return (integers_of(linear, 4),)
    if table:
        return (integers_of(linear, EMBEDDING_BITS),)
    base = integers_of(linear, 4)
    # A dense base has no rounding that is worth correcting.
    return (base, *correction(rows, columns, options)) if base.kind == "quantized" else (base,)


def integers_of(linear: LinearSpec, bits: int) -> Term:
    """As `integers` for a layer of the source; where no group divides its rows, a dense term of two bytes stays as it is."""
    found, own = integers(linear.in_features, bits), linear.terms[0]
    return own if found.kind == "dense" and own.kind == "dense" and own.dtype != "f32" else found


def spared(name: str, architecture: Architecture) -> bool:
    """Whether the published plan leaves a layer of the blocks without cores: early blocks, and the last MLP."""
    block = int(name.split(".")[2])
    last = architecture.num_hidden_layers - 1
    return block < math.ceil(SPARED * architecture.num_hidden_layers) or (block == last and ".mlp." in name)


def key_rank(linear: LinearSpec, architecture: Architecture, keys: KeyOptions) -> int:
    """The rank of a key projection's factors: 0 for other layers and for matrices with a side below `min_dim`.

    At most half the rank at which factors have as many parameters as the matrix, so that they always save; in the first and
    the last block, on which most depends, half as much again within three quarters of it.
    """
    rows, columns = linear.out_features, linear.in_features
    if not linear.name.endswith(KEYS) or min(rows, columns) < keys.min_dim:
        return 0
    even = rows * columns / (rows + columns)
    block = int(linear.name.split(".")[2])
    if block in (0, architecture.num_hidden_layers - 1):
        return max(1, min(math.ceil(1.5 * keys.rank), int(0.75 * even)))
    return max(1, min(keys.rank, int(even / 2)))


def key_factors(rows: int, columns: int, rank: int, keys: KeyOptions) -> Mpo:
    """The two factors (O,1)×(1,I) of a key projection."""
    return operator(*shapes.low_rank_shape(rows, columns), rank, FACTORS[keys.bits])


def require_keys(source: ModelSpec, options: Options, acted_on: set[str]) -> None:
    """Raises PlanError where the plan `k-proj` has no matrix to replace."""
    found = [linear for linear in source.linears if linear.name.endswith(KEYS) and linear.name in acted_on]
    if not any(key_rank(linear, source.architecture, options.keys) for linear in found):
        largest = max((min(linear.out_features, linear.in_features) for linear in found), default=0)
        raise PlanError(
            f"--plan k-proj: no key projection that was asked for has both sides of at least --min-dim "
            f"{options.keys.min_dim} (the largest smaller side is {largest}); lower --min-dim"
        )


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
    chi = min(options.chi, max(full_rank(out_dims, in_dims)))
    while chi and shapes.parameters(out_dims, in_dims, operator(out_dims, in_dims, chi, "f16").bonds) > room:
        chi -= 1
    return (operator(out_dims, in_dims, chi, "int8"),) if chi else ()
