"""The files that benchmarks/quality.py makes: for every size integers alone, integers with cores, and cores alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mpo_exporter.fit.layer import Method
from mpo_exporter.fit.shapes import balanced_shape, low_rank_shape
from mpo_exporter.measure.survey import Survey
from mpo_exporter.plan.allocate import choose
from mpo_exporter.plan.budget import allocated_layers, file_bytes
from mpo_exporter.terms import Candidate, fitting_group, operator, stored_bytes
from mpo_formats import Dense, LinearSpec, ModelSpec, PlanError, Quantized, Term
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_runtime.weights.checkpoint import Checkpoint

NEAREST, COMPENSATED = Method("nearest", "svd"), Method("compensated", "weighted")
METHODS = {"nearest": NEAREST, "compensated": COMPENSATED}
# Sizes of the whole file in bits per weight, tokenizer and tables included.
SIZES = (2.3, 2.6, 3.0, 3.4, 3.8, 4.25, 4.8, 5.5, 6.5, 8.0)
CHIS = (8, 16, 32, 64)
# The rows of --quick: integers at all sizes; with cores of each χ, and cores alone, only at these sizes.
QUICK_CORES = {8: (3.0, 4.8), 16: (2.6, 3.0, 3.8, 4.8), 32: (3.0, 4.8), 64: (3.0, 4.8)}
QUICK_ALONE = (2.6, 4.8)
# Bytes by which the header of a row's file may be larger than the source's.
PROVENANCE = 512
# Name of the family: whether factors are balanced, and how the cores are fitted.
ALONE = {
    "plain SVD": (False, NEAREST),
    "whitened SVD": (False, COMPENSATED),
    "naive MPO": (True, NEAREST),
    "ALS MPO": (True, COMPENSATED),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One file to make: a family of the table, its size in bits a weight or a name, χ, its layers, and how they are fitted."""

    family: str
    size: float | str
    chi: int
    layers: tuple[LinearSpec, ...]
    method: Method

    @property
    def label(self) -> str:
        """The row's name in the table."""
        cores = f" + cores χ={self.chi}" if self.chi else ""
        return f"{self.family}{cores}, {self.size}{' bits' if isinstance(self.size, float) else ''}"

    @property
    def calibrated(self) -> bool:
        """Whether the layers are fitted to activations."""
        return self.method.rounding == "compensated"


def is_table(linear: LinearSpec) -> bool:
    """Whether a layer is the embedding or the head."""
    return linear.name in (EMBEDDING, HEAD)


def with_cores(linear: LinearSpec, candidates: Sequence[Candidate], chi: int) -> list[Candidate]:
    """The candidates of a matrix with int8 cores (O,1)×(1,I) of χ beside them; a table's as they are.

    Their losses stay: what cores take off is about the same share of each, and only the differences decide.
    """
    if not chi or is_table(linear):
        return list(candidates)
    cores = operator(*low_rank_shape(linear.out_features, linear.in_features), chi, "int8")
    rows = []
    for candidate in candidates:
        terms = (*candidate.terms, cores)
        size = stored_bytes(replace(linear, terms=terms))
        rows.append(replace(candidate, bytes=size, terms=terms))
    return rows


def allocated(spec: ModelSpec, surveyed: Survey, target_bytes: int, chi: int = 0) -> tuple[LinearSpec, ...]:
    """Widths by layer for a file of so many bytes, with cores of χ beside every matrix.

    Raises:
        PlanError: when the smallest widths and the cores take more.
    """
    rows: Mapping[str, Sequence[Candidate]] = {
        linear.name: with_cores(linear, surveyed.candidates[linear.name], chi) for linear in spec.linears
    }
    return allocated_layers(spec, rows, target_bytes - PROVENANCE)


def allocated_bytes(source: Checkpoint, surveyed: Survey, tensor_bytes: int) -> tuple[LinearSpec, ...]:
    """Widths by layer for so many bytes of tensors (the norms among them)."""
    chosen = choose(surveyed.candidates, tensor_bytes - vector_bytes(source))
    return tuple(chosen[linear.name].stored(linear) for linear in source.spec.linears)


def vector_bytes(source: Checkpoint) -> int:
    """Bytes of the norms."""
    return sum(source.array(f"{vector.name}.weight").nbytes for vector in source.spec.vectors)


def alone(spec: ModelSpec, balanced: bool, target_bytes: int) -> tuple[LinearSpec, ...]:
    """int8 cores in the place of every matrix, of as many bonds as fit into the file; tables in 4 to 8 bits.

    Raises:
        PlanError: when cores of one bond and the tables take more.
    """
    bits = 8 * target_bytes / spec.architecture.parameters()
    table = 4 if bits < 4 else 6 if bits < 6 else 8

    def planned(share: float) -> tuple[LinearSpec, ...]:
        return tuple(
            replace(linear, terms=(integers(linear, table) if is_table(linear) else filling(linear, balanced, share),))
            for linear in spec.linears
        )

    low, high = 0.0, 16.0
    for _ in range(24):
        middle = (low + high) / 2
        fits = file_bytes(replace(spec, linears=planned(middle))) <= target_bytes - PROVENANCE
        low, high = (middle, high) if fits else (low, middle)
    if not low:
        raise PlanError(f"cores alone: not even one bond a matrix fits into {target_bytes:,} bytes")
    return planned(low)


def integers(linear: LinearSpec, bits: int) -> Term:
    """A Quantized term of the largest group up to 64 that fits, or bf16."""
    group = fitting_group(linear.in_features, 64)
    return Dense("bf16") if group is None else Quantized(bits, group, False)


def filling(linear: LinearSpec, balanced: bool, bits: float) -> Term:
    """int8 cores of as many bonds as fit into `bits` a weight, one at least."""
    size = linear.out_features, linear.in_features
    shape = balanced_shape(*size, 2) if balanced else low_rank_shape(*size)
    room = bits * size[0] * size[1] / 8
    low, high = 1, max(operator(*shape, size[0] * size[1], "int8").bonds)
    while low < high:
        middle = (low + high + 1) // 2
        fits = stored_bytes(replace(linear, terms=(operator(*shape, middle, "int8"),))) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return operator(*shape, low, "int8")


def planned_rows(quick: bool) -> Iterator[tuple[str, float, int]]:
    """Family, size and χ of every row of the table, the most informative for their time first."""
    for size in SIZES:
        for family in METHODS:
            yield family, size, 0
    for chi in CHIS:
        for size in QUICK_CORES[chi] if quick else SIZES:
            for family in METHODS:
                yield family, size, chi
    for size in QUICK_ALONE if quick else SIZES:
        for family in ALONE:
            yield family, size, 0


def make_row(source: Checkpoint, surveyed: Survey, family: str, size: float, chi: int) -> Row:
    """The row of that family, size and χ.

    Raises:
        PlanError: where no such file is that small.
    """
    target = int(size * source.spec.architecture.parameters() / 8)
    if family in METHODS:
        return Row(family, size, chi, allocated(source.spec, surveyed, target, chi), METHODS[family])
    balanced, method = ALONE[family]
    return Row(family, size, 0, alone(source.spec, balanced, target), method)
