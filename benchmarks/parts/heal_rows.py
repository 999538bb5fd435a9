"""The files that benchmarks/healing.py heals: published plans, allocated widths, and cores alone, at given sizes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from quality import Bench

from mpo_exporter.calibrate.moments import Calibration, dense_matrix
from mpo_exporter.calibrate.windows import cut_calibration
from mpo_exporter.fit.layer import Method
from mpo_exporter.fit.shapes import balanced_shape, low_rank_shape
from mpo_exporter.measure.survey import sensitivities
from mpo_exporter.plan.budget import allocated_layers, file_bytes
from mpo_exporter.plan.named import plan_layers
from mpo_exporter.plan.options import Options
from mpo_exporter.terms import Candidate, fitting_group, operator, stored_bytes
from mpo_formats import Dense, LinearSpec, ModelSpec, Mpo, Quantized, Term
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_formats.spec import CoreType
from parts.rows import allocated as beside_cores

Linears = tuple[LinearSpec, ...]
# The paper's file sizes are 93 % below float32: 7 % of four bytes a weight.
PAPER_BITS = 0.07 * 32
# Shares of a matrix's full rank that cores alone may have in the smallest file, and the widths of its integers.
RANKS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
# int4 cores lose a little more than their truncation.
CORE_ROUNDING = 1.05
# Bytes by which the header of a file may be larger than that of the dense model.
PROVENANCE = 1024


# Bits of embedding and head, by the bits of the matrices.
TABLE_BITS = {2: 4, 3: 5, 4: 6, 5: 6, 6: 8, 8: 8}


def integers(linear: LinearSpec, bits: int, group: int) -> Term:
    """A Quantized term of the largest group that fits, or bf16."""
    fitting = fitting_group(linear.in_features, group)
    return Dense("bf16") if fitting is None else Quantized(bits, fitting, False)


def uniform(linears: Linears, bits: int, group: int, chi: int = 0) -> Linears:
    """One width for all matrices and more for the tables; beside the matrices int8 cores (O,1)×(1,I) where χ is given."""
    rows = []
    for linear in linears:
        table = linear.name in (EMBEDDING, HEAD)
        terms: tuple[Term, ...] = (integers(linear, TABLE_BITS[bits] if table else bits, 64 if table else group),)
        if chi and not table:
            terms += (operator(*low_rank_shape(linear.out_features, linear.in_features), chi, "int8"),)
        rows.append(replace(linear, terms=terms))
    return tuple(rows)


@dataclass(frozen=True, slots=True)
class Row:
    """One file: its name in the table, how its layers are planned and fitted, and how its healing differs from others.

    `tokens` are those of its healing, 0 for none, None for as many as all rows have.
    """

    name: str
    layers: Callable[[Bench], Linears]
    method: Method = field(default_factory=Method)
    tokens: int | None = None
    chi_dropout: float = 0.0


def matrices(linears: Linears) -> list[LinearSpec]:
    """The attention and MLP matrices."""
    return [linear for linear in linears if linear.name not in (EMBEDDING, HEAD)]


def with_cores(linears: Linears, chi: int, *, balanced: bool, dtype: CoreType) -> Linears:
    """Cores of one χ in the place of every attention and MLP matrix, tables in 4 bits: the published plan, none spared.

    The published plan spares early blocks and the last MLP: of six blocks that would leave more than the size asked for.
    """
    rows = []
    for linear in linears:
        size = linear.out_features, linear.in_features
        if linear.name in (EMBEDDING, HEAD):
            rows.append(replace(linear, terms=(integers(linear, 4, 32),)))
        else:
            shape = balanced_shape(*size, 2) if balanced else low_rank_shape(*size)
            rows.append(replace(linear, terms=(operator(*shape, chi, dtype),)))
    return tuple(rows)


def largest_chi(fits: Callable[[int], bool]) -> int:
    """The largest χ that fits, at least 1, by bisection."""
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
        if high > 1 << 14:
            break
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def core_parameters(linears: Linears) -> int:
    """Weights in the cores of the attention and MLP matrices."""
    return sum(
        int(np.prod(shape))
        for one in matrices(linears)
        for term in one.terms
        if isinstance(term, Mpo)
        for shape in term.core_shapes()
    )


def of_parameters(share: float, *, balanced: bool) -> Callable[[Bench], Linears]:
    """fp16 cores with at most a share of the attention and MLP parameters."""

    def layers(bench: Bench) -> Linears:
        linears = bench.source.spec.linears
        room = share * sum(one.out_features * one.in_features for one in matrices(linears))

        def plan(chi: int) -> Linears:
            return with_cores(linears, chi, balanced=balanced, dtype="f16")

        return plan(largest_chi(lambda chi: core_parameters(plan(chi)) <= room))

    return layers


def of_bytes(bits: float, *, balanced: bool) -> Callable[[Bench], Linears]:
    """fp16 cores in a file of at most `bits` a weight, tokenizer and header included."""

    def layers(bench: Bench) -> Linears:
        spec = bench.source.spec
        room = bits * spec.architecture.parameters() / 8

        def plan(chi: int) -> Linears:
            return with_cores(spec.linears, chi, balanced=balanced, dtype="f16")

        return plan(largest_chi(lambda chi: whole_bytes(spec, plan(chi)) <= room))

    return layers


def whole_bytes(spec: ModelSpec, linears: Linears) -> int:
    """Bytes of the file that a plan makes."""
    return file_bytes(replace(spec, linears=linears))


def auto(bits: float) -> Callable[[Bench], Linears]:
    """Widths by layer in a file of at most `bits` a weight, everything included."""
    return lambda bench: allocated(bench, bench.survey().candidates, bits)


def cored(bits: float, chi: int) -> Callable[[Bench], Linears]:
    """The same with int8 cores of χ beside every matrix, widths allocated for the bytes that are left."""

    def layers(bench: Bench) -> Linears:
        spec = bench.source.spec
        return beside_cores(spec, bench.survey(), int(bits * spec.architecture.parameters() / 8), chi)

    return layers


def smallest(bits: float) -> Callable[[Bench], Linears]:
    """The same, with int4 cores alone among what a layer may become: below about two bits integers do not reach."""

    def layers(bench: Bench) -> Linears:
        cores = core_candidates(bench)
        return allocated(
            bench, {name: [*row, *cores.get(name, [])] for name, row in bench.survey().candidates.items()}, bits
        )

    return layers


def allocated(bench: Bench, candidates: Mapping[str, Sequence[Candidate]], bits: float) -> Linears:
    """The layers of least expected loss in a file of at most `bits` a weight."""
    spec = bench.source.spec
    room = int(bits * spec.architecture.parameters() / 8)
    return allocated_layers(spec, candidates, room - PROVENANCE)


def based(bits: int, group: int, chi: int) -> Callable[[Bench], Linears]:
    """Integers of one width, more for tables, and int8 cores (O,1)×(1,I) beside the matrices where χ is given."""
    return lambda bench: uniform(bench.source.spec.linears, bits, group, chi)


def core_candidates(bench: Bench) -> dict[str, list[Candidate]]:
    """int4 cores (O,1)×(1,I) of several χ in the place of each matrix, and the loss that truncation is expected to leave."""
    ids = cut_calibration(bench.calibration, bench.source.architecture, count=bench.windows)
    found: dict[str, list[Candidate]] = {}
    with tempfile.TemporaryDirectory() as folder:
        groups = sensitivities(bench.source, Calibration(bench.source, ids, Path(folder)))
        for name, sensitivity in (item for block in groups for group in block for item in group.items()):
            if name in (EMBEDDING, HEAD):
                continue
            linear, matrix = bench.source.spec.linear(name), dense_matrix(bench.source, name)
            load = 1e-6 * np.trace(sensitivity.hessian) / matrix.shape[1] * np.eye(matrix.shape[1])
            root = np.linalg.cholesky(sensitivity.hessian + load)
            rows = np.sqrt(sensitivity.rows / 2)[:, None]
            values = np.square(np.linalg.svd(rows * matrix @ root, compute_uv=False))
            found[name] = []
            for share in RANKS:
                chi = max(round(share * min(matrix.shape)), 1)
                terms = (operator(*low_rank_shape(*matrix.shape), chi, "int4"),)
                size = stored_bytes(replace(linear, terms=terms))
                found[name].append(Candidate(size, CORE_ROUNDING * float(values[chi:].sum()), terms))
    return found


def planned(plan: str, **options: int) -> Callable[[Bench], Linears]:
    """The layers of one of the exporter's named plans."""

    return lambda bench: plan_layers(bench.source.spec, Options(plan, **options))
