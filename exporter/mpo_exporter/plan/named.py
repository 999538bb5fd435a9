"""The named plans: a registry with one function for each plan, which decides the terms of every layer.

A plan is complete before anything is fitted, so the file's header can be written first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mpo_exporter.fit.shapes import balanced_shape, low_rank_shape, parameters
from mpo_exporter.terms import integers, operator
from mpo_formats import LinearSpec, ModelSpec, Mpo, PlanError, Term
from mpo_formats.architecture import EMBEDDING, HEAD, full_rank

if TYPE_CHECKING:
    from mpo_exporter.plan.options import KeyOptions, Options

BITS, EMBEDDING_BITS = 4, 6
# Correction cores take at most this share of a matrix's parameters: without healing they are worth no more than their bits.
CORE_SHARE = 1 / 16
KEYS = ".self_attn.k_proj"
# The share of the blocks, counted from the first, that the published method leaves without cores.
SPARED = 1 / 4

# (the dense model, the options, the names of the layers that the plan acts on) → the terms of every layer, in order.
Decide = Callable[[ModelSpec, "Options", Set[str]], list[tuple[Term, ...]]]


@dataclass(frozen=True, slots=True)
class Plan:
    """A named plan.

    Args:
        decide: gives the terms of every layer.
        allocates: chooses among the survey's candidates where a target is given; then `decide` is not asked.
        chooses: may act on the least sensitive layers alone (`--top-k`, `--compression-ratio`).
        calibrated: fits layers to the built-in calibration text if the user names none.
        fits: whether any layer is fitted at all, so that calibration text has a use.
        takes_chi: gives operators bonds of χ.
        replaces_keys: replaces key projections, as `KeyOptions` say.
    """

    name: str
    decide: Decide
    allocates: bool = False
    chooses: bool = True
    calibrated: bool = False
    fits: bool = True
    takes_chi: bool = False
    replaces_keys: bool = False


def dense(source: ModelSpec, options: Options, acted_on: Set[str]) -> list[tuple[Term, ...]]:
    """Everything as it is: the baseline."""
    return [linear.terms for linear in source.linears]


def int4(source: ModelSpec, options: Options, acted_on: Set[str]) -> list[tuple[Term, ...]]:
    """4-bit integers in groups of 32, without cores."""
    return [(rounded(linear, BITS),) if linear.name in acted_on else linear.terms for linear in source.linears]


def paper(source: ModelSpec, options: Options, acted_on: Set[str]) -> list[tuple[Term, ...]]:
    """fp16 cores of one χ in the place of attention and MLP matrices, int4 for the rest (CompactifAI, arXiv 2401.14109).

    Early blocks and the last MLP get no cores, unless the user chose the layers.
    """
    chosen = options.choice.names is not None or options.choice.pattern is not None

    def terms(linear: LinearSpec) -> Term:
        cores = linear.name in acted_on if chosen else not spared(linear.name, source)
        if not cores or linear.name in (EMBEDDING, HEAD):
            return rounded(linear, BITS)
        shape = balanced_shape(linear.out_features, linear.in_features, options.cores)
        return operator(*shape, options.largest_chi, "f16")

    return [(terms(linear),) for linear in source.linears]


def corrected(source: ModelSpec, options: Options, acted_on: Set[str]) -> list[tuple[Term, ...]]:
    """4-bit integers (6 bits for embedding and head), with int8 cores of at most χ that correct the rounding."""

    def terms(linear: LinearSpec) -> tuple[Term, ...]:
        if linear.name in (EMBEDDING, HEAD):
            return (rounded(linear, EMBEDDING_BITS),)
        base = rounded(linear, BITS)
        # A dense base has no rounding errors that are worth correcting.
        return (base, *correction(linear, options)) if base.kind == "quantized" else (base,)

    return [terms(linear) if linear.name in acted_on else linear.terms for linear in source.linears]


def k_proj(source: ModelSpec, options: Options, acted_on: Set[str]) -> list[tuple[Term, ...]]:
    """Two low-rank factors in the place of every key projection; the rest as it is.

    Raises:
        PlanError: where there is no key projection to replace.
    """
    keys = options.keys
    found = [linear for linear in source.linears if linear.name.endswith(KEYS) and linear.name in acted_on]
    ranks = {linear.name: key_rank(linear, source, keys) for linear in found}
    if not any(ranks.values()):
        largest = max((min(linear.out_features, linear.in_features) for linear in found), default=0)
        raise PlanError(
            f"--plan k-proj: no key projection that was asked for has both sides of at least --min-dim "
            f"{keys.min_dim} (the largest smaller side is {largest}); lower --min-dim"
        )

    def terms(linear: LinearSpec) -> tuple[Term, ...]:
        rank = ranks.get(linear.name, 0)
        shape = low_rank_shape(linear.out_features, linear.in_features)
        return (operator(*shape, rank, keys.dtype),) if rank else linear.terms

    return [terms(linear) for linear in source.linears]


AUTO = Plan("auto", corrected, allocates=True, chooses=False, calibrated=True)
PAPER = Plan("paper", paper, takes_chi=True)
K_PROJ = Plan("k-proj", k_proj, replaces_keys=True)
CORRECTED = Plan("corrected", corrected, calibrated=True, takes_chi=True)
INT4 = Plan("int4", int4)
DENSE = Plan("dense", dense, chooses=False, fits=False)
PLANS = {plan.name: plan for plan in (AUTO, PAPER, K_PROJ, CORRECTED, INT4, DENSE)}


def plan_layers(source: ModelSpec, options: Options) -> tuple[LinearSpec, ...]:
    """Decides the terms of every layer of a dense model by the named plan, and the layers of a plan file by that file.

    Raises:
        PlanError: for layers that the model does not have, or a choice that leaves nothing to do.
    """
    pinned = options.pinned(source)
    decided = options.named.decide(source, options, acted_on(source, options))
    return tuple(
        pinned.get(linear.name) or replace(linear, terms=terms)
        for linear, terms in zip(source.linears, decided, strict=True)
    )


def acted_on(source: ModelSpec, options: Options) -> set[str]:
    """The names of the layers that the plan acts on, before any choice by sensitivity.

    Raises:
        PlanError: for a name that no attention or MLP matrix has, or a regular expression that matches no layer.
    """
    names, pattern = {linear.name for linear in source.linears}, options.choice.pattern
    for name in options.choice.names or ():
        if name not in names - {EMBEDDING, HEAD}:
            raise PlanError(f"layers: {name} is no attention or MLP matrix of this model; mpo-run info lists them")
    if options.choice.names is not None:
        names = set(options.choice.names)
    if pattern is None:
        return names
    found = {name for name in names if re.search(pattern, name)}
    if not found:
        example = source.linears[min(1, len(source.linears) - 1)].name
        raise PlanError(f"--layers {pattern}: matches no layer of this model, whose names are like {example}")
    return found


def rounded(linear: LinearSpec, bits: int) -> Term:
    """Integers for a layer of the dense model; if no group divides its rows, a dense term of two bytes stays as it is."""
    found, own = integers(linear.in_features, bits), linear.terms[0]
    return own if found.kind == "dense" and own.kind == "dense" and own.dtype != "f32" else found


def spared(name: str, source: ModelSpec) -> bool:
    """Whether the published plan leaves a layer without cores: early blocks, the last MLP, embedding and head."""
    if name in (EMBEDDING, HEAD):
        return True
    block, blocks = int(name.split(".")[2]), source.architecture.num_hidden_layers
    return block < math.ceil(SPARED * blocks) or (block == blocks - 1 and ".mlp." in name)


def key_rank(linear: LinearSpec, source: ModelSpec, keys: KeyOptions) -> int:
    """The rank of a key projection's factors; 0 for a matrix with a side below `min_dim`.

    At most half the rank at which the factors have as many parameters as the matrix, so that they always save. In the first
    and the last block, which matter most, half as much again, and at most three quarters of that rank.
    """
    rows, columns = linear.out_features, linear.in_features
    if min(rows, columns) < keys.min_dim:
        return 0
    even = rows * columns / (rows + columns)
    if int(linear.name.split(".")[2]) in (0, source.architecture.num_hidden_layers - 1):
        return max(1, min(math.ceil(1.5 * keys.rank), int(0.75 * even)))
    return max(1, min(keys.rank, int(even / 2)))


def correction(linear: LinearSpec, options: Options) -> tuple[Mpo, ...]:
    """int8 cores beside an integer base.

    None if even χ = 1 would exceed their share of the parameters, unless cores were demanded.
    """
    if options.demands_cores:
        return (demanded(linear, options),)
    shape, room = correction_shape(linear, options), CORE_SHARE * linear.out_features * linear.in_features
    chi = min(options.largest_chi, max(full_rank(*shape)))
    while chi and parameters(*shape, operator(*shape, chi, "f16").bonds) > room:
        chi -= 1
    return (operator(*shape, chi, "int8"),) if chi else ()


def demanded(linear: LinearSpec, options: Options) -> Mpo:
    """int8 cores of χ, at most the full rank, whatever they take."""
    return operator(*correction_shape(linear, options), options.largest_chi, "int8")


def correction_shape(linear: LinearSpec, options: Options) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The factor shape of cores beside integers: two cores are a low-rank product."""
    rows, columns = linear.out_features, linear.in_features
    return low_rank_shape(rows, columns) if options.cores == 2 else balanced_shape(rows, columns, options.cores)
